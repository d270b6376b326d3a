"""The batches that are timed. All contenders start from the same padded tensors, as a user has them, so that packing is
part of our time.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.loss import IGNORE

SHAPES = ("1x16", "1x128", "8x128", "8x512", "mixed", "normal", "lognormal")
TRAINING_SHAPES = ("8x128", "mixed")
ASKED = 0.15  # of the tokens, as in BERT's loss


@dataclass(frozen=True)
class Workload:
    """One batch. All tensors are (B, S), on the device."""

    name: str
    input_ids: Tensor
    attention_mask: Tensor
    asked: Tensor  # true where logits are wanted
    labels: Tensor  # an id there, −100 elsewhere
    lengths: tuple[int, ...]  # B numbers of real tokens
    everywhere: bool  # whether logits are wanted at all real tokens

    @property
    def tokens(self) -> int:
        """The number of real tokens. Padding does not count."""
        return sum(self.lengths)

    def flops(self, config: BertConfig) -> float:
        """Floating-point operations of the matrix products that one forward pass needs: for real tokens, each of which
        sees its own sequence, and for the head at the asked positions only.
        """
        d, f = config.hidden_size, config.intermediate_size
        layer = self.tokens * (8 * d * d + 4 * d * f) + sum(4 * n * n * d for n in self.lengths)
        head = int(self.asked.sum()) * (2 * d * d + 2 * d * config.vocab_size)
        return float(config.num_hidden_layers * layer + head)


def make_workload(name: str, config: BertConfig, device: str, *, everywhere: bool) -> Workload:
    """`name` is "8x128" (rows x tokens, no padding) or "mixed", "normal", "lognormal". The same ids in every run.
    everywhere: dense shapes ask for all logits.

    Raises ValueError for any other name, and for a row that is longer than the model allows.
    """
    generator = torch.Generator().manual_seed(0)
    dense = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if dense:
        lengths = [int(dense[2])] * int(dense[1])
    elif name == "mixed":
        lengths = torch.randint(10, 129, (16,), generator=generator).tolist()
    elif name == "normal":
        lengths = (256 + 64 * torch.randn(8, generator=generator)).round().clamp(32, 512).int().tolist()
    elif name == "lognormal":
        lengths = (20 * (0.6 * torch.randn(32, generator=generator)).exp()).round().clamp(3, 128).int().tolist()
    else:
        raise ValueError(f"there is no shape {name!r}: give rows x tokens, as in 8x128, or mixed, normal, lognormal")
    if max(lengths) > config.max_position_embeddings:
        raise ValueError(
            f"shape {name} has rows of {max(lengths)} tokens, and the model has positions for "
            f"{config.max_position_embeddings}: leave it out of --shapes"
        )
    shape, everywhere = (len(lengths), max(lengths)), everywhere and bool(dense)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, config.vocab_size, shape, generator=generator) * mask
    asked = mask.bool()
    if not everywhere:
        places = asked.flatten().nonzero().flatten()
        chosen = places[torch.randperm(len(places), generator=generator)[: max(1, round(ASKED * len(places)))]]
        asked = torch.zeros(shape[0] * shape[1], dtype=torch.bool).index_fill(0, chosen, True).view(shape)
    targets = torch.randint(1, config.vocab_size, shape, generator=generator)
    labels = torch.where(asked, targets, IGNORE)
    ids, mask, asked, labels = (x.to(device) for x in (ids, mask, asked, labels))
    return Workload(name, ids, mask, asked, labels, tuple(lengths), everywhere)
