"""The faults that ports of BERT really have.

Each is a class that replaces one of the methods of `Steps`; two faults together are a class that inherits from both. To
add one, write its class here: `diagnose` tries all that this file has, and the tests plant them and count them.
title, remedy and source are what `diagnose` prints. owner/name#number is an issue or pull request on GitHub in which
the fault happened; modeling.py and run_pretraining.py are google-research/bert's.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import EncoderLayer
from minibert.parity.steps import Steps

# The embeddings: token types and positions.


class MissingTypes(Steps):
    title = "token type embedding missing"
    remedy = "add the token type embedding to the sum, also when every type is 0: row 0 is not zero"
    source = "foundation-model-stack#399: a converted checkpoint whose token_type_embeddings nobody read"

    def types(self) -> Tensor:
        return torch.zeros_like(super().types())


class ConstantTypes(Steps):
    title = "token types ignored"
    remedy = "look up token_type_ids as they were given, not 0 for every token"
    source = "bytedance/lightseq#265: the export adds type 0 to every word embedding"

    def types(self) -> Tensor:
        result: Tensor = self.model.embeddings.token_type(torch.zeros_like(self.inputs.token_type_ids))
        return result


class PositionsFromOne(Steps):
    title = "positions off by one"
    remedy = "count positions from 0"
    source = "an embedding table that keeps row 0 for padding counts from 1 (padding_idx in fairseq)"

    def positions(self) -> Tensor:
        return self.clamp(super().positions() + 1)


class PositionsOfTokens(Steps):
    title = "positions count tokens, not columns"
    remedy = "the position is the column, whatever the mask says: a left-padded row starts late"
    source = "transformers, generation: position_ids = attention_mask.cumsum(-1) - 1, for left-padded decoders"

    def positions(self) -> Tensor:
        return self.clamp(self.seen.long().cumsum(1) - 1)


class PositionsOfRoberta(Steps):
    title = "positions off by the padding id (RoBERTa's)"
    remedy = "count positions from 0; RoBERTa counts tokens from padding_idx + 1"
    source = "huggingface/transformers#5285 and #11242: RoBERTa's positions start at padding_idx + 1"

    def positions(self) -> Tensor:
        padding = 1  # RoBERTa's id, whatever this model's is
        return self.clamp(self.seen.long().cumsum(1) * self.seen + padding)


# The LayerNorms, and their place.


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


# Attention: projections, heads, scale and mask.


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


# The feed-forward, the head, and dropout.


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


class LogProbabilities(Steps):
    title = "log-softmax over the logits"
    remedy = "give what the log-softmax reads: the loss takes the logarithm itself"
    source = "run_pretraining.py, get_masked_lm_output, goes on with tf.nn.log_softmax(logits)"

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(x).log_softmax(-1)


CATALOGUE: tuple[type[Steps], ...] = tuple(
    each
    for each in list(globals().values())
    if isinstance(each, type) and issubclass(each, Steps) and each is not Steps
)
