"""BERT's masked language model, top to bottom.

    token ids ─Embeddings→ hidden states ─EncoderLayer × N→ hidden states ─MLMHead→ a score for every word

How to read it: have one sentence in mind, "[CLS] paris is in [MASK] . [SEP]". It has T = 7 tokens, so `x` is 7 vectors
from the first layer to the last, and `batch` is that sentence. Where there are several sentences, their tokens stand
one after the other, and T is the number of all of them (packing.py). Every part treats each token alone, except
attention (attention.py), which is where the tokens of a sentence look at each other.

Shapes, here and everywhere in this package, with the numbers of bert-base-uncased:

    B  sequences in a batch             D  hidden size, 768           V  vocabulary size, 30,522
    S  padded length, at most 512       H  attention heads, 12        F  feed-forward size, 3,072
    T  tokens of all sequences          K  head size, D / H = 64      M  positions that are predicted

Devlin, Chang, Lee, Toutanova: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
2019, https://arxiv.org/abs/1810.04805. The layers are those of Vaswani et al.: "Attention Is All You Need", 2017,
https://arxiv.org/abs/1706.03762. The reference code is https://github.com/google-research/bert, modeling.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import checks
from minibert.attention import attention
from minibert.config import BertConfig
from minibert.packing import PackedBatch

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # x Φ(x), with the exact erf: what "gelu" means in the hub's config.json files
    "gelu_new": partial(F.gelu, approximate="tanh"),  # the tanh approximation: gelu() in google-research/bert
    "relu": F.relu,
    "silu": F.silu,
}


class Embeddings(nn.Module):
    """A token is the sum of three learned vectors: its word, its place, and the segment it belongs to.

    Why a vector for the place: attention does not see the order of the tokens, so their vectors have to tell it.

    Section 3, "Input/Output Representations", figure 2; modeling.py, embedding_lookup and embedding_postprocessor.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # [PAD] gets no gradient from this lookup, as in transformers (Google's code has no such rule).
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch) -> Tensor:
        x = self.word(batch.input_ids) + self.token_type(batch.token_type_ids)  # (T, D)
        x = x + self.position(batch.position_ids)
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Each token asks a question (query), which is compared with what every token of its sequence offers (key). The
    better the two fit, the more it takes of what that token says (value). H heads do this at once, each with its own
    questions.

    Why the comparison is divided by √K: the dot product of two random vectors of K numbers grows as √K. Undivided, it
    would drive the softmax to all or nothing, where its gradient is almost 0.

    Vaswani et al., section 3.2 and its footnote 4; modeling.py, attention_layer. The formula itself is in attention.py.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_size = config.head_size
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # query, key and value side by side
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)  # of the attention weights

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x)  # (T, 3 D)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, self.head_size)).unbind(-3)  # each (T, H, K)
        return query, key, value

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        query, key, value = self.split_heads(x)  # each (T, H, K)
        context = attention(query, key, value, batch, self.dropout)  # (T, H, K)
        return self.output(context.flatten(-2))  # (T, D)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, for each token alone.

    Why it is there: attention only mixes what the tokens say. This is where a token works on what it has gathered; two
    thirds of a layer's weights are here.

    Vaswani et al., section 3.3; modeling.py, transformer_model, "intermediate" and "output".
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.intermediate(x))  # (T, F)
        return self.output(x)  # (T, D)


class EncoderLayer(nn.Module):
    """Attention, then feed-forward. Each is added to what it read, so a layer only has to learn what to change.

    Why the LayerNorm comes after the sum ("post-LayerNorm"): the Transformer of 2017 has it so, and BERT's weights were
    trained with it. Later models moved it before each part, because that trains without a warm-up of the learning rate
    (Xiong et al. 2020, https://arxiv.org/abs/2002.04745). A checkpoint works only with the one it was trained with.

    Vaswani et al., section 3.1; modeling.py, transformer_model.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        x = self.attention_LayerNorm(self.dropout(self.attention(x, batch)) + x)  # (T, D)
        return self.feed_forward_LayerNorm(self.dropout(self.feed_forward(x)) + x)  # (T, D)


class MLMHead(nn.Module):
    """From a hidden state to a score for every word: one more transformation, then the dot product with each word's
    own embedding, plus a bias.

    Why the transformation: a hidden state sums up a place in a sentence. This turns it into something that can be
    compared with the vector of a word.
    Why the decoder is the embedding matrix: words that are alike as input should be alike as answers, and it saves
    23 million weights (Press and Wolf 2017, https://arxiv.org/abs/1608.05859). The matrix comes in as an argument, so
    there is no second copy.

    Section 3.1, task 1; run_pretraining.py, get_masked_lm_output.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        x = self.LayerNorm(self.activation(self.dense(x)))  # (M, D)
        return F.linear(x, word_embeddings, self.bias)  # (M, V)


class Bert(nn.Module):
    """The whole model. masked_lm.py adds what a user's program needs around it: padding, labels, loading, saving."""

    layers: Sequence[EncoderLayer]

    def __init__(self, config: BertConfig, layer: type[EncoderLayer] = EncoderLayer) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))  # type: ignore[assignment]
        self.head = MLMHead(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """modeling.py, create_initializer: a normal distribution cut off at two standard deviations. Biases are 0."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def word_embeddings(self) -> Tensor:
        """The vectors of all words, (V, D), which the head compares its answer with."""
        return self.embeddings.word.weight

    def encode(self, batch: PackedBatch) -> Tensor:
        """The hidden states of the last layer, (T, D).

        Raises ValueError if a token id, a token type or a position has no embedding.
        """
        checks.require_embeddings(batch.largest, self.config)
        x = self.embeddings(batch)  # (T, D)
        for layer in self.layers:
            x = layer(x, batch)  # (T, D)
        return x

    def predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """The logits at `positions` (M,), which count the tokens of the batch from 0 to T − 1: (M, V).

        Raises ValueError for a position outside the batch, and as `encode` does.
        """
        checks.require_positions(positions, batch.num_tokens)
        x = self.encode(batch)[positions]  # (M, D)
        return self.head(x, self.word_embeddings)  # (M, V)
