"""Activation checkpointing: encoder layers that keep only what they read, and are computed again for the gradient.

It takes more time, since each layer is computed twice, and lets a batch several times as large fit into memory. The
gradients are the same: dropout draws the same numbers again.

Chen et al.: "Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from minibert.model import EncoderLayer
from minibert.packing import PackedBatch


class RecomputedLayer(EncoderLayer):
    """A layer becomes one by `layer.__class__ = RecomputedLayer`. Its tensors, hooks and mode stay, and it can be
    copied and pickled as before.
    """

    def once(self, x: Tensor, batch: PackedBatch) -> Tensor:
        return super().forward(x, batch)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        if not torch.is_grad_enabled():
            return self.once(x, batch)
        y = recompute(self.once, x, batch, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y


def set_recomputing(layers: Iterable[nn.Module], on: bool) -> None:
    """Turn it on or off for all layers. Raises ValueError for a layer that something else has been made of, before any
    is changed.
    """
    layers = list(layers)
    for layer in layers:
        if type(layer) not in (EncoderLayer, RecomputedLayer):
            raise ValueError(
                f"the layers are {type(layer).__name__} now: turn activation checkpointing on or off before they are "
                "sharded, wrapped or prepared"
            )
    for layer in layers:
        layer.__class__ = RecomputedLayer if on else EncoderLayer


def is_recomputing(layers: Iterable[nn.Module]) -> bool:
    return any(isinstance(layer, RecomputedLayer) for layer in layers)
