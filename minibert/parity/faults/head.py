"""Faults in the feed-forward, the head, and dropout."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from minibert.parity.steps import Steps


class TanhGelu(Steps):
    title = "tanh-GELU"
    remedy = "use the GELU with erf (torch: approximate='none'); jax.nn.gelu is the tanh form unless told"
    source = "huggingface/candle#900; Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2, has both forms"

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class ErfGelu(Steps):
    title = "erf-GELU"
    remedy = "hidden_act is not gelu: use what it says (gelu_new is the tanh form)"
    source = "CyberZHG/keras-bert#129; Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2, has both forms"

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class HeadActivationMissing(Steps):
    title = "head activation missing"
    remedy = "apply hidden_act between the head's dense layer and its LayerNorm"
    source = "run_pretraining.py, get_masked_lm_output: the dense layer has activation=modeling.get_activation"

    def head_activation(self, x: Tensor) -> Tensor:
        return x


class TransformSkipped(Steps):
    title = "head transform skipped"
    remedy = "dense, activation and LayerNorm (cls.predictions.transform) stand between the encoder and the decoder"
    source = "google-research/bert, run_pretraining.py, get_masked_lm_output"

    def head(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "", x


class BiasMissing(Steps):
    title = "MLM bias missing"
    remedy = "add cls.predictions.bias to the logits"
    source = "vllm-project/vllm#46835: the output bias was not applied where the embeddings are tied"

    def decoder_bias(self) -> Tensor | None:
        return None


class BiasDoubled(Steps):
    title = "MLM bias doubled"
    remedy = "cls.predictions.bias and cls.predictions.decoder.bias are one tensor: add it once"
    source = "huggingface/transformers#2957: transformers 2.4 itself"

    def decoder_bias(self) -> Tensor | None:
        return 2 * self.model.head.bias


class Untied(Steps):
    title = "decoder untied"
    remedy = "the decoder's weight is the word embedding itself, not a copy: both uses add to one gradient"
    source = "huggingface/transformers#18855: the ties were lost in preparing; Press and Wolf 2017, arXiv:1608.05859"

    def decoder(self) -> Tensor:
        return super().decoder().detach().clone()


class DropoutOn(Steps):
    title = "dropout left on"
    remedy = "switch to evaluation (torch: model.eval()) before comparing"
    source = "huggingface/transformers#679 and #695: the same input, other outputs"

    def made(self, name: str, x: Tensor) -> Tensor:
        # Which entries were dropped is chance; the given trace shows it. What is checked is all the rest.
        x = super().made(name, x)
        dropped = name == "embeddings.norm" or name.endswith((".probabilities", ".attention_output", ".feed_forward"))
        if not dropped or self.given.shapes().get(name) != tuple(x.shape):
            return x
        of_attention = name.endswith("probabilities")
        rate = self.config.attention_probs_dropout_prob if of_attention else self.config.hidden_dropout_prob
        return x * (self.given.read(name).to(x.device) != 0) / (1 - rate)


FAULTS: tuple[type[Steps], ...] = (
    TanhGelu,
    ErfGelu,
    HeadActivationMissing,
    TransformSkipped,
    BiasMissing,
    BiasDoubled,
    Untied,
    DropoutOn,
)
