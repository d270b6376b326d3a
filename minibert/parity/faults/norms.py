"""Faults in the LayerNorms, and in their place."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import EncoderLayer
from minibert.parity.steps import Steps


class Eps5(Steps):
    title = "LayerNorm eps 1e-5"
    remedy = "set eps to config's layer_norm_eps (1e-12 for BERT)"
    source = "keras-team/keras-hub#642: 1e-5, Keras' default, in the layers of a BERT; 1e-5 is torch.nn.LayerNorm's too"

    def eps(self, name: str) -> float:
        return 1e-5


class Eps6(Steps):
    title = "LayerNorm eps 1e-6"
    remedy = "set eps to config's layer_norm_eps (1e-12 for BERT)"
    source = "the default of flax.linen.LayerNorm"

    def eps(self, name: str) -> float:
        return 1e-6


class Eps3(Steps):
    title = "LayerNorm eps 1e-3"
    remedy = "set eps to config's layer_norm_eps (1e-12 for BERT)"
    source = "the default of keras.layers.LayerNormalization"

    def eps(self, name: str) -> float:
        return 1e-3


class NormNotLoaded(Steps):
    title = "LayerNorm weight and bias not loaded"
    remedy = "load LayerNorm.gamma and LayerNorm.beta as weight and bias: they are still ones and zeros"
    source = "huggingface/transformers#11809: bert-base-uncased's file says gamma and beta, its model weight and bias"

    def layer_norm(self, name: str, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, None, None, self.eps(name))


class SampleVariance(Steps):
    title = "LayerNorm divides by n - 1"
    remedy = "divide the variance by n (torch.var(..., correction=0))"
    source = "harvardnlp/annotated-transformer#119: torch.std divides by n - 1 unless told"

    def layer_norm(self, name: str, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True)
        return (x - mean) / (variance + self.eps(name)).sqrt() * norm.weight + norm.bias


class ResidualAfterNorm(Steps):
    title = "residual added after the LayerNorm"
    remedy = "add what the block has read before the LayerNorm, not to its result: LayerNorm(x + update)"
    source = "Liu et al. 2022, arXiv:2111.09883, figure 1: Swin Transformer V2 has it so (res-post-norm)"

    def add_and_norm(self, name: str, x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
        return x + self.layer_norm(name, update, norm)


class PreNorm(Steps):
    title = "pre-LayerNorm"
    remedy = "normalise the sum after the residual (post-LayerNorm), not what a block reads"
    source = "mead-ml/mead-baseline#529; Xiong et al. 2020, arXiv:2002.04745, figure 1, has both"

    def layer(self, prefix: str, layer: EncoderLayer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        name = prefix + "attention_norm"
        update = read = self.made(name, self.layer_norm(name, x, layer.attention_LayerNorm))
        for step, update in self.attend(prefix, layer, read):
            yield step, update
        yield prefix + "attention_norm", read
        x, name = x + update, prefix + "feed_forward_norm"
        read = self.made(name, self.layer_norm(name, x, layer.feed_forward_LayerNorm))
        for step, update in self.feed_forward(prefix, layer, read):
            yield step, update
        yield name, read
        yield "", x + update  # no module gives this, so no trace has it; the next layer reads it


FAULTS: tuple[type[Steps], ...] = (
    Eps3,
    Eps5,
    Eps6,
    NormNotLoaded,
    SampleVariance,
    ResidualAfterNorm,
    PreNorm,
)
