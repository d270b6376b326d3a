"""Faults in attention: projections, heads, scale and mask."""

import math

import torch
from torch import Tensor

from minibert.model import EncoderLayer
from minibert.parity.steps import Steps


class QueryKeySwapped(Steps):
    title = "query and key swapped"
    remedy = "exchange the query's and the key's weights"
    source = "in a fused projection the order is by convention; transformers' names are query, key, value"

    def project(self, layer: EncoderLayer, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = super().project(layer, x)
        return key, query, value


class KeyValueSwapped(Steps):
    title = "key and value swapped"
    remedy = "exchange the key's and the value's weights"
    source = "tenstorrent/tt-mlir#8958: the fusion of the three projections mixes up two outputs"

    def project(self, layer: EncoderLayer, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = super().project(layer, x)
        return query, value, key


class SquareTransposed(Steps):
    title = "square weights transposed"
    remedy = "transpose the D × D weights: TensorFlow and Flax hold (in, out), torch (out, in); no shape complains"
    source = "transformers before 5.0, load_tf_weights_in_bert: np.transpose for every kernel"

    def square(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return super().square(x, weight.T, bias)


class HeadsInterleaved(Steps):
    title = "heads split in the wrong order"
    remedy = "D is (heads, head size), head by head: view(B, S, H, K), then exchange S and H"
    source = "modeling.py, transpose_for_scores"

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.num_attention_heads)).permute(0, 3, 1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(-2)


class HeadsSplitWithoutTranspose(Steps):
    title = "heads split by a view, without the transpose"
    remedy = "view(B, S, H, K), then transpose(1, 2): a view to (B, H, S, K) mixes tokens and heads"
    source = "reczoo/FuxiCTR#30; hyunwoongko/transformer#15"

    def split(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        return x.reshape(rows, self.config.num_attention_heads, length, -1)


class HeadsMergedWithoutTranspose(Steps):
    title = "heads put together without the transpose"
    remedy = "transpose(1, 2) the context to (B, S, H, K) before it is flattened to (B, S, D)"
    source = "jsbaan/transformer-from-scratch#6"

    def merge(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[2], -1)


class Unscaled(Steps):
    title = "scores not scaled"
    remedy = "divide query · key by √K, K the size of a head"
    source = "mlc-ai/mlc-llm#3426: the fallback kernel of BERT's attention ran with a scale of 1"

    def scale(self) -> float:
        return 1.0


class ScaledByHidden(Steps):
    title = "scores scaled by √D"
    remedy = "divide query · key by √K, K the size of a head, not by √D of all heads together"
    source = "karpathy/ng-video-lecture#6; Vaswani et al. 2017, section 3.2.1: d_k is a head's"

    def scale(self) -> float:
        return self.config.hidden_size**-0.5


class MaskIgnored(Steps):
    title = "attention mask ignored"
    remedy = "keep the padding's keys out of the softmax"
    source = "transformers warns where a batch with padding comes without an attention_mask"

    def masked(self, scores: Tensor) -> Tensor:
        return scores


class MaskInverted(Steps):
    title = "attention mask inverted"
    remedy = "1 (true) means a token that is seen; some libraries mean a key that is hidden"
    source = "torch: key_padding_mask of nn.MultiheadAttention hides what is true, a bool attn_mask of sdpa shows it"

    def masked(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.seen[:, None, None, :], torch.finfo(scores.dtype).min)


class MaskAddedRaw(Steps):
    title = "attention mask added as 0 and 1"
    remedy = "add 0 for a token and a very negative number for padding, not the mask itself"
    source = "modeling.py, attention_layer: adder = (1.0 - mask) * -10000.0"

    def masked(self, scores: Tensor) -> Tensor:
        return scores + self.seen[:, None, None, :].to(scores.dtype)


class MaskAfterSoftmax(Steps):
    title = "attention mask after the softmax"
    remedy = "mask the scores, not the probabilities: they must sum to 1 over the tokens"
    source = "huggingface/pytorch-image-models#2236"

    def masked(self, scores: Tensor) -> Tensor:
        return scores

    def softmax(self, name: str, scores: Tensor) -> Tensor:
        return super().softmax(name, scores) * self.seen[:, None, None, :]


class Causal(Steps):
    title = "causal mask"
    remedy = "BERT looks both ways: switch the causal mask off (is_causal=False)"
    source = "sgl-project/sglang#35434: a kernel for the CPU masked BERT rerankers as if they were decoders"

    def masked(self, scores: Tensor) -> Tensor:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return super().masked(scores).masked_fill(later, torch.finfo(scores.dtype).min)


class HalfSoftmax(Steps):
    title = "fp16 softmax overflow"
    remedy = "subtract the largest score before exp, or compute the softmax in float32: in fp16 exp(11.1) is infinite"
    source = "huggingface/transformers#17437: NaN of OPT's softmax in half precision"

    def softmax(self, name: str, scores: Tensor) -> Tensor:
        most = torch.finfo(torch.float16).max
        powers = scores.exp()
        infinite = powers > most
        if self.given.shapes().get(name) == tuple(scores.shape):  # at the border rounding decides; the trace shows how
            border = (scores - math.log(most)).abs() < 0.01 * scores.clamp(min=0).amax()
            infinite = torch.where(border, self.given.read(name).to(scores.device).isnan(), infinite)
        powers = powers.clamp(max=most).masked_fill(infinite, float("inf"))
        powers = powers.masked_fill(powers < 2**-25, 0.0)  # what float16 rounds to 0; a row of them is 0 / 0
        total = powers.sum(-1, keepdim=True)
        return powers / torch.where(total > most, float("inf"), total)


FAULTS: tuple[type[Steps], ...] = (
    QueryKeySwapped,
    KeyValueSwapped,
    SquareTransposed,
    HeadsInterleaved,
    HeadsSplitWithoutTranspose,
    HeadsMergedWithoutTranspose,
    Unscaled,
    ScaledByHidden,
    MaskIgnored,
    MaskInverted,
    MaskAddedRaw,
    MaskAfterSoftmax,
    Causal,
    HalfSoftmax,
)
