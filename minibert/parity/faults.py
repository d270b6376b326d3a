"""The faults that ports of BERT really have: to add one, add an entry to CATALOGUE. `diagnose` tries all of them, and
the tests plant and count them.

An entry has a title, what to change, and where the fault is known from, which `diagnose` prints; and for each method of
`Steps` that is other than it should be, the function that stands in its place. owner/name#number is an issue or pull
request on GitHub in which the fault happened; modeling.py and run_pretraining.py are google-research/bert's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import EncoderLayer
from minibert.parity.steps import Section, Steps


def fault(title: str, remedy: str, source: str, **methods: Callable[..., Any]) -> type[Steps]:
    """Two faults together are a class that inherits from both. They never replace the same method, so what a method of
    Steps gives is asked of Steps itself.
    """
    return type("Fault", (Steps,), {"title": title, "remedy": remedy, "source": source, **methods})


def clamped(steps: Steps, counted: Tensor) -> Tensor:
    return counted.clamp(0, steps.config.max_position_embeddings - 1)


def wrong_eps(value: float, name: str, source: str) -> type[Steps]:
    remedy = "set eps to config's layer_norm_eps (1e-12 for BERT)"
    return fault(f"LayerNorm eps {name}", remedy, source, eps=lambda self, name: value)


def sample_variance(self: Steps, name: str, x: Tensor, norm: nn.LayerNorm) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + self.eps(name)).sqrt() * norm.weight + norm.bias


def pre_norm(self: Steps, prefix: str, layer: EncoderLayer, x: Tensor) -> Section:
    name = prefix + "attention_norm"
    read = yield name, self.layer_norm(name, x, layer.attention_LayerNorm)
    x = x + (yield from self.attend(prefix, layer, read))
    name = prefix + "feed_forward_norm"
    read = yield name, self.layer_norm(name, x, layer.feed_forward_LayerNorm)
    return x + (yield from self.feed_forward(prefix, layer, read))  # no module gives this, so no trace has it


def causal(self: Steps, scores: Tensor) -> Tensor:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return Steps.masked(self, scores).masked_fill(later, torch.finfo(scores.dtype).min)


def half_softmax(self: Steps, name: str, scores: Tensor) -> Tensor:
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


def no_head(self: Steps, x: Tensor) -> Section:
    yield from ()
    return x


def dropped(self: Steps, name: str, x: Tensor) -> Tensor:
    # Which entries were dropped is chance; the given trace shows it. What is checked is all the rest.
    here = name == "embeddings.norm" or name.endswith((".probabilities", ".attention_output", ".feed_forward"))
    if not here or self.given.shapes().get(name) != tuple(x.shape):
        return x
    of_attention = name.endswith("probabilities")
    rate = self.config.attention_probs_dropout_prob if of_attention else self.config.hidden_dropout_prob
    return x * (self.given.read(name).to(x.device) != 0) / (1 - rate)


CATALOGUE: tuple[type[Steps], ...] = (
    # The embeddings: token types and positions.
    fault(
        "token type embedding missing",
        "add the token type embedding to the sum, also when every type is 0: row 0 is not zero",
        "foundation-model-stack#399: a converted checkpoint whose token_type_embeddings nobody read",
        types=lambda self: torch.zeros_like(Steps.types(self)),
    ),
    fault(
        "token types ignored",
        "look up token_type_ids as they were given, not 0 for every token",
        "bytedance/lightseq#265: the export adds type 0 to every word embedding",
        types=lambda self: self.model.embeddings.token_type(torch.zeros_like(self.inputs.token_type_ids)),
    ),
    fault(
        "positions off by one",
        "count positions from 0",
        "an embedding table that keeps row 0 for padding counts from 1 (padding_idx in fairseq)",
        positions=lambda self: clamped(self, Steps.positions(self) + 1),
    ),
    fault(
        "positions count tokens, not columns",
        "the position is the column, whatever the mask says: a left-padded row starts late",
        "transformers, generation: position_ids = attention_mask.cumsum(-1) - 1, for left-padded decoders",
        positions=lambda self: clamped(self, self.seen.long().cumsum(1) - 1),
    ),
    fault(
        "positions off by the padding id (RoBERTa's)",
        "count positions from 0; RoBERTa counts tokens from padding_idx + 1",
        "huggingface/transformers#5285 and #11242: RoBERTa's positions start at padding_idx + 1",
        positions=lambda self: clamped(self, self.seen.long().cumsum(1) * self.seen + 1),
    ),
    # The LayerNorms, and their place.
    wrong_eps(
        1e-5, "1e-5", "keras-team/keras-hub#642: Keras' default, in the layers of a BERT; torch.nn.LayerNorm's too"
    ),
    wrong_eps(1e-6, "1e-6", "the default of flax.linen.LayerNorm"),
    wrong_eps(1e-3, "1e-3", "the default of keras.layers.LayerNormalization"),
    fault(
        "LayerNorm weight and bias not loaded",
        "load LayerNorm.gamma and LayerNorm.beta as weight and bias: they are still ones and zeros",
        "huggingface/transformers#11809: bert-base-uncased's file says gamma and beta, its model weight and bias",
        layer_norm=lambda self, name, x, norm: F.layer_norm(x, norm.normalized_shape, None, None, self.eps(name)),
    ),
    fault(
        "LayerNorm divides by n - 1",
        "divide the variance by n (torch.var(..., correction=0))",
        "harvardnlp/annotated-transformer#119: torch.std divides by n - 1 unless told",
        layer_norm=sample_variance,
    ),
    fault(
        "residual added after the LayerNorm",
        "add what the block has read before the LayerNorm, not to its result: LayerNorm(x + update)",
        "Liu et al. 2022, arXiv:2111.09883, figure 1: Swin Transformer V2 has it so (res-post-norm)",
        add_and_norm=lambda self, name, x, update, norm: x + self.layer_norm(name, update, norm),
    ),
    fault(
        "pre-LayerNorm",
        "normalise the sum after the residual (post-LayerNorm), not what a block reads",
        "mead-ml/mead-baseline#529; Xiong et al. 2020, arXiv:2002.04745, figure 1, has both",
        layer=pre_norm,
    ),
    # Attention: projections, heads, scale and mask.
    fault(
        "query and key swapped",
        "exchange the query's and the key's weights",
        "in a fused projection the order is by convention; transformers' names are query, key, value",
        project=lambda self, layer, x: tuple(Steps.project(self, layer, x)[part] for part in (1, 0, 2)),
    ),
    fault(
        "key and value swapped",
        "exchange the key's and the value's weights",
        "tenstorrent/tt-mlir#8958: the fusion of the three projections mixes up two outputs",
        project=lambda self, layer, x: tuple(Steps.project(self, layer, x)[part] for part in (0, 2, 1)),
    ),
    fault(
        "square weights transposed",
        "transpose the D × D weights: TensorFlow and Flax hold (in, out), torch (out, in); no shape complains",
        "transformers before 5.0, load_tf_weights_in_bert: np.transpose for every kernel",
        square=lambda self, x, weight, bias: Steps.square(self, x, weight.T, bias),
    ),
    fault(
        "heads split in the wrong order",
        "D is (heads, head size), head by head: view(B, S, H, K), then exchange S and H",
        "modeling.py, transpose_for_scores",
        split=lambda self, x: x.unflatten(-1, (-1, self.config.num_attention_heads)).permute(0, 3, 1, 2),
        merge=lambda self, x: x.permute(0, 2, 3, 1).flatten(-2),
    ),
    fault(
        "heads split by a view, without the transpose",
        "view(B, S, H, K), then transpose(1, 2): a view to (B, H, S, K) mixes tokens and heads",
        "reczoo/FuxiCTR#30; hyunwoongko/transformer#15",
        split=lambda self, x: x.reshape(len(x), self.config.num_attention_heads, x.shape[1], -1),
    ),
    fault(
        "heads put together without the transpose",
        "transpose(1, 2) the context to (B, S, H, K) before it is flattened to (B, S, D)",
        "jsbaan/transformer-from-scratch#6",
        merge=lambda self, x: x.reshape(x.shape[0], x.shape[2], -1),
    ),
    fault(
        "scores not scaled",
        "divide query · key by √K, K the size of a head",
        "mlc-ai/mlc-llm#3426: the fallback kernel of BERT's attention ran with a scale of 1",
        scale=lambda self: 1.0,
    ),
    fault(
        "scores scaled by √D",
        "divide query · key by √K, K the size of a head, not by √D of all heads together",
        "karpathy/ng-video-lecture#6; Vaswani et al. 2017, section 3.2.1: d_k is a head's",
        scale=lambda self: self.config.hidden_size**-0.5,
    ),
    fault(
        "attention mask ignored",
        "keep the padding's keys out of the softmax",
        "transformers warns where a batch with padding comes without an attention_mask",
        masked=lambda self, scores: scores,
    ),
    fault(
        "attention mask inverted",
        "1 (true) means a token that is seen; some libraries mean a key that is hidden",
        "torch: key_padding_mask of nn.MultiheadAttention hides what is true, a bool attn_mask of sdpa shows it",
        masked=lambda self, scores: scores.masked_fill(self.seen[:, None, None, :], torch.finfo(scores.dtype).min),
    ),
    fault(
        "attention mask added as 0 and 1",
        "add 0 for a token and a very negative number for padding, not the mask itself",
        "modeling.py, attention_layer: adder = (1.0 - mask) * -10000.0",
        masked=lambda self, scores: scores + self.seen[:, None, None, :].to(scores.dtype),
    ),
    fault(
        "attention mask after the softmax",
        "mask the scores, not the probabilities: they must sum to 1 over the tokens",
        "huggingface/pytorch-image-models#2236",
        masked=lambda self, scores: scores,
        softmax=lambda self, name, scores: Steps.softmax(self, name, scores) * self.seen[:, None, None, :],
    ),
    fault(
        "causal mask",
        "BERT looks both ways: switch the causal mask off (is_causal=False)",
        "sgl-project/sglang#35434: a kernel for the CPU masked BERT rerankers as if they were decoders",
        masked=causal,
    ),
    fault(
        "fp16 softmax overflow",
        "subtract the largest score before exp, or compute the softmax in float32: in fp16 exp(11.1) is infinite",
        "huggingface/transformers#17437: NaN of OPT's softmax in half precision",
        softmax=half_softmax,
    ),
    # The feed-forward, the head, and dropout.
    fault(
        "tanh-GELU",
        "use the GELU with erf (torch: approximate='none'); jax.nn.gelu is the tanh form unless told",
        "huggingface/candle#900; Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2, has both forms",
        activation=lambda self, x: F.gelu(x, approximate="tanh"),
    ),
    fault(
        "erf-GELU",
        "hidden_act is not gelu: use what it says (gelu_new is the tanh form)",
        "CyberZHG/keras-bert#129; Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2, has both forms",
        activation=lambda self, x: F.gelu(x),
    ),
    fault(
        "head activation missing",
        "apply hidden_act between the head's dense layer and its LayerNorm",
        "run_pretraining.py, get_masked_lm_output: the dense layer has activation=modeling.get_activation",
        head_activation=lambda self, x: x,
    ),
    fault(
        "head transform skipped",
        "dense, activation and LayerNorm (cls.predictions.transform) stand between the encoder and the decoder",
        "google-research/bert, run_pretraining.py, get_masked_lm_output",
        head=no_head,
    ),
    fault(
        "MLM bias missing",
        "add cls.predictions.bias to the logits",
        "vllm-project/vllm#46835: the output bias was not applied where the embeddings are tied",
        decoder_bias=lambda self: None,
    ),
    fault(
        "MLM bias doubled",
        "cls.predictions.bias and cls.predictions.decoder.bias are one tensor: add it once",
        "huggingface/transformers#2957: transformers 2.4 itself",
        decoder_bias=lambda self: 2 * self.model.head.bias,
    ),
    fault(
        "decoder untied",
        "the decoder's weight is the word embedding itself, not a copy: both uses add to one gradient",
        "huggingface/transformers#18855: the ties were lost in preparing; Press and Wolf 2017, arXiv:1608.05859",
        decoder=lambda self: Steps.decoder(self).detach().clone(),
    ),
    fault(
        "dropout left on",
        "switch to evaluation (torch: model.eval()) before comparing",
        "huggingface/transformers#679 and #695: the same input, other outputs",
        made=dropped,
    ),
    fault(
        "log-softmax over the logits",
        "give what the log-softmax reads: the loss takes the logarithm itself",
        "run_pretraining.py, get_masked_lm_output, goes on with tf.nn.log_softmax(logits)",
        decode=lambda self, x: Steps.decode(self, x).log_softmax(-1),
    ),
)
