"""BERT's masked language model, top to bottom.

Devlin, Chang, Lee, Toutanova: "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019, https://arxiv.org/abs/1810.04805. The layers are those of Vaswani et al.: "Attention Is
All You Need", 2017, https://arxiv.org/abs/1706.03762. The reference code is
https://github.com/google-research/bert, modeling.py.

    token ids ─Embeddings→ hidden states ─EncoderLayer × N→ hidden states ─MLMHead→ logits over the vocabulary

Shapes, here and everywhere in this package:

    B  sequences in a batch          D  hidden size              V  vocabulary size
    S  padded length                 H  attention heads          F  feed-forward size
    T  packed tokens, no padding     K  head size, D / H         M  positions that are predicted

The model works on packed tokens: all the real tokens of a batch in one list of T, no padding (packing.py).
Every part treats each token alone, except attention (attention.py), which is where tokens of one sequence look
at each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import checkpoint
from minibert.attention import attention, formula
from minibert.checkpoint import LoadReport
from minibert.config import BertConfig
from minibert.loss import IGNORE, masked_lm_loss
from minibert.packing import PackedBatch

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # x Φ(x), with the exact erf: what "gelu" means in the hub's config.json files
    "gelu_new": partial(F.gelu, approximate="tanh"),  # the tanh approximation: gelu() in google-research/bert
    "relu": F.relu,
}


class Embeddings(nn.Module):
    """A token is the sum of three learned vectors: its word, its place, and the segment it belongs to.

    Section 3, "Input/Output Representations", figure 2; modeling.py, embedding_lookup and embedding_postprocessor.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # [PAD] gets no gradient from this lookup, as in transformers (Google's code has no such rule).
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch) -> Tensor:
        batch.require_embeddings(self.word.num_embeddings, self.token_type.num_embeddings, self.position.num_embeddings)
        x = self.word(batch.input_ids) + self.token_type(batch.token_type_ids)  # (T, D)
        x = x + self.position(batch.position_ids)
        return self.dropout(self.norm(x))


class SelfAttention(nn.Module):
    """Each token asks (query) all tokens of its sequence (key) and gathers what they say (value), in H heads at
    once.

    Vaswani et al., section 3.2.2; modeling.py, attention_layer.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_size = config.head_size
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # query, key and value side by side
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x)  # (T, 3 D)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, self.head_size)).unbind(-3)  # each (T, H, K)
        return query, key, value

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        query, key, value = self.split_heads(x)
        context = attention(query, key, value, batch, self.dropout if self.training else 0.0)  # (T, H, K)
        return self.output(context.flatten(-2))  # (T, D)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, for each token alone.

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
    """Attention, then feed-forward; each is added to its input, and the sum is normalised ("post-LayerNorm").

    Vaswani et al., section 3.1; modeling.py, transformer_model.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        x = self.attention_norm(self.dropout(self.attention(x, batch)) + x)  # (T, D)
        return self.feed_forward_norm(self.dropout(self.feed_forward(x)) + x)  # (T, D)


class MLMHead(nn.Module):
    """From a hidden state to a score for every word: one more transformation, then the dot product with each
    word's own embedding, plus a bias. The embedding matrix comes in as an argument: there is no second copy
    that could drift away.

    Section 3.1, task 1; run_pretraining.py, get_masked_lm_output.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        x = self.norm(self.activation(self.dense(x)))  # (M, D)
        return F.linear(x, word_embeddings, self.bias)  # (M, V)


@dataclass(frozen=True)
class MaskedLMOutput:
    """loss: a scalar, or None without labels. logits: (B, S, V), zeros where the attention mask is 0.

    `out.logits`, `out["logits"]` and `out.keys()` work as in transformers; numbers as in `out[0]` do not.
    """

    loss: Tensor | None
    logits: Tensor

    def keys(self) -> tuple[str, ...]:
        return ("logits",) if self.loss is None else ("loss", "logits")

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.keys():
            raise KeyError(f"there is no {key!r}, only {', '.join(self.keys())}")
        value: Tensor = getattr(self, key)
        return value


class BertForMaskedLM(nn.Module):
    """The whole model, with two doors.

    The familiar one is `model(input_ids, …)`: padded batches in, a logit for every word at every position out,
    as transformers' BertForMaskedLM has it. The fast one is `encode` and `predict`: packed tokens, and logits
    only at the positions you ask for (BERT's loss needs 15 % of them).
    """

    load_report: LoadReport | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.head = MLMHead(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """modeling.py, create_initializer: a normal distribution cut off at two standard deviations. Biases are 0."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(self, batch: PackedBatch) -> Tensor:
        """The hidden states of the last layer, (T, D).

        Raises ValueError if a token id, a token type or a position has no embedding.
        """
        x = self.embeddings(batch)  # (T, D)
        for layer in self.layers:
            x = layer(x, batch)  # (T, D)
        return x

    def predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """The logits at `positions` (M,), which count packed tokens from 0 to T − 1: (M, V)."""
        batch.require_positions(positions)
        return self.head(self.encode(batch)[positions], self.embeddings.word.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Padded in, padded out. All arguments are (B, S); see `PackedBatch.from_padded` for what each may be
        left out for.

        labels are ids where a prediction is scored and −100 elsewhere; the loss is the mean over the scored
        positions. Raises ValueError for wrong shapes, dtypes, ids, or a label where the attention mask is 0.
        """
        batch = PackedBatch.from_padded(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.head(self.encode(batch), self.embeddings.word.weight)  # (T, V)
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(
                    f"labels is {tuple(labels.shape)}, but input_ids is {tuple(input_ids.shape)}: give both alike"
                )
            targets = batch.pack(labels)  # (T,)
            under_padding = int((labels != IGNORE).sum() - (targets != IGNORE).sum())
            if under_padding:
                raise ValueError(
                    f"{under_padding} labels stand where attention_mask is 0, and nothing is predicted there: "
                    f"make them {IGNORE}"
                )
            loss = masked_lm_loss(logits, targets).mean
        return MaskedLMOutput(loss, batch.unpack(logits))

    def attention_maps(self, batch: PackedBatch, layers: Sequence[int]) -> dict[int, Tensor]:
        """Who looks at whom: for each of the given layers (from 0) the attention probabilities, (B, H, S, S), S
        being the longest sequence; 0 beyond the end of a shorter one. The other layers stay on the fused
        kernel.
        """
        layers = list(layers)
        wrong = [number for number in layers if not 0 <= number < len(self.layers)]
        if wrong or not layers:
            raise ValueError(f"layers must name some of 0 to {len(self.layers) - 1}, not {layers}")
        maps = {}
        x = self.embeddings(batch)  # (T, D)
        for number, layer in enumerate(self.layers[: max(layers) + 1]):
            if number in layers:
                assert isinstance(layer, EncoderLayer)
                query, key, value = layer.attention.split_heads(x)  # each (T, H, K)
                maps[number] = formula(query, key, value, batch)[1]  # (B, H, S, S)
            if number < max(layers):
                x = layer(x, batch)  # (T, D)
        return maps

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_missing_head: bool = False,
    ) -> "BertForMaskedLM":
        """A checkpoint as a model, in evaluation mode (`model.train()` turns dropout on). `model.load_report`
        tells what was read.

        name_or_path: a folder; a bundled name ("minibert-uncased"); "bert-base-uncased"; or a hub id
        ("owner/name"). dtype: of the weights in memory; None is float32 whatever the file holds. revision: of a
        hub repository. local_files_only: never ask the hub, use what is in its cache. init_missing_head: accept
        a file that has an encoder and no MLM head; the head's transformation then starts as the identity.

        Raises ValueError for a file that is not exactly this model, FileNotFoundError for one that is not there.
        """
        source = checkpoint.locate(name_or_path, revision=revision, local_files_only=local_files_only)
        config = checkpoint.read_config(source)
        with checkpoint.shapes_only():  # no memory yet: the weights are held once, when they are read
            model = cls(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state, report = checkpoint.read_weights(
            source, shapes, dtype=dtype or torch.float32, device=device, init_missing_head=init_missing_head
        )
        model.load_state_dict(state, assign=True)
        model.load_report = report
        return model.eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write config.json and model.safetensors, under the names that transformers (and `from_pretrained`)
        reads.
        """
        checkpoint.write(folder, self.config, self.state_dict())
