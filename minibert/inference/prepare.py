"""`prepare_for_inference`: a model with the same two calls and the same answers, up to rounding, and faster.

Everywhere, `predict` runs the last layer for the asked positions only: no later layer reads the others.

On the CPU, linear layers are computed by oneDNN on weights that were ordered for it beforehand (onednn.py), in int8 on
weights of 8 bits (int8.py).

On CUDA, the weights are bfloat16, so attention.py chooses flash attention on the packed tokens. What is done for each
token alone is compiled by the first call, once for all lengths. Attention stays outside, since it needs the lengths on
the host. Small batches are replayed as CUDA graphs (cuda_graphs.py).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minibert import checks
from minibert.attention import attention, forced_kernel, one_sequence
from minibert.checkpoint.reading import shapes_only
from minibert.inference.cuda_graphs import Graphs, can_compile, has_flash_attention
from minibert.inference.fixed import PREPARED, fix
from minibert.inference.int8 import Int8Embedding, Int8Linear, finish_layer
from minibert.inference.onednn import (
    ConvolvedLinear,
    PrepackedHead,
    PrepackedLinear,
    filled_up,
    has_bfloat16,
    prepack_layer,
)
from minibert.inference.ways import WAYS, fastest_way, has_int8_products, linear_layer, working_ways
from minibert.masked_lm import BertForMaskedLM, Layer
from minibert.model import ACTIVATIONS, Bert, EncoderLayer, FeedForward, MLMHead, SelfAttention
from minibert.packing import PackedBatch

COMPILED_ON = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


def prepare_for_inference(
    model: BertForMaskedLM, dtype: torch.dtype | None = None, *, linear: str = "auto"
) -> "PreparedBert":
    """The fastest form of `model` for inference on its device. It holds a copy of every tensor: what happens to `model`
    afterwards does not reach it, and `model` itself stays as it is. A model that is prepared already is returned.

    dtype: of the weights and the arithmetic; None is the model's own on the CPU, bfloat16 on CUDA. torch.int8, on the
    CPU: the weights and what they are multiplied with have 8 bits, the rest float32 or bfloat16.
    linear: how linear layers are computed. "torch": as torch has them. "product" and "convolution": the two ways of
    oneDNN, on the CPU. "auto": the fastest, which is measured once in a process. Two ways round differently in the last
    digits, so name one where results must be the same in each run; `prepared.linear` is the one that was taken.

    Raises ValueError for a dtype or a way that this device does not have, for a prepared model if another dtype or way
    is asked for, and for a model with forward hooks, which would not be called.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be torch.int8 or a floating-point type such as torch.bfloat16, not {dtype!r}")
    if isinstance(model, PreparedBert):
        return _as_it_is(model, dtype, linear)
    if hooked := [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]:
        raise ValueError(
            f"{hooked[0] or 'the model'} has a forward hook, and a prepared model would not call it: remove the hook, "
            "or use the model as it is"
        )
    _require_unchanged(model)
    device = model.embeddings.word.weight.device
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else model.embeddings.word.weight.dtype
    _require_dtype(dtype, device)
    with torch.inference_mode(False):  # tensors that are made in inference mode could not be used outside it
        return PreparedBert(model, dtype, _choose_way(linear, dtype, device))


def _require_dtype(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16():
        raise ValueError("this CPU has no instructions for bfloat16: leave dtype out, or use torch.float32")
    if dtype != torch.int8:
        return
    if device.type != "cpu":
        raise ValueError(f"torch.int8 is for CPUs, and the model is on {device.type}: use torch.bfloat16 there")
    if not has_int8_products():
        raise ValueError("this CPU, or this torch, cannot multiply 8-bit numbers: leave dtype out, or use float32")


def _require_unchanged(model: BertForMaskedLM) -> None:
    """Raise ValueError for a model that computes something other than its configuration says: it would be lost."""
    config = model.config

    def as_configured(part: nn.Module) -> bool:
        if isinstance(part, nn.LayerNorm):
            return part.eps == config.layer_norm_eps
        if isinstance(part, SelfAttention):
            return part.num_heads == config.num_attention_heads
        if isinstance(part, FeedForward | MLMHead):
            return _same_function(part.activation, ACTIVATIONS[config.hidden_act])
        if isinstance(part, Bert):
            return (type(part).encode, type(part).predict) == (Bert.encode, Bert.predict)
        return not isinstance(part, EncoderLayer) or type(part) in (EncoderLayer, Layer)

    for name, part in model.named_modules():
        if not as_configured(part):
            raise ValueError(
                f"{name or type(model).__name__} is not as the configuration has it, but a prepared model would be: "
                "use the model as it is"
            )


def _same_function(one: object, other: object) -> bool:
    if isinstance(one, partial) and isinstance(other, partial):  # a copy of a model has a copy of it
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other


def _as_it_is(model: "PreparedBert", dtype: torch.dtype | None, linear: str) -> "PreparedBert":
    had = model.embeddings.word.weight.dtype
    if dtype not in (None, had) or linear not in ("auto", model.linear):
        raise ValueError(
            f"this model is prepared already, in {had} with linear={model.linear!r}: for {dtype or had} with "
            f"linear={linear!r}, prepare the one it was made from"
        )
    return model


def _choose_way(linear: str, dtype: torch.dtype, device: torch.device) -> str:
    """One of WAYS."""
    if linear not in ("auto", *WAYS):
        raise ValueError(f"linear must be one of auto, {', '.join(WAYS)}, not {linear!r}")
    if device.type != "cpu" and linear == "auto":
        return "torch"
    there = working_ways(dtype) if device.type == "cpu" else ("torch",)
    if linear != "auto" and linear not in there:
        raise ValueError(
            f"linear={linear!r} cannot be had in {dtype} on this {device.type}: choose one of auto, {', '.join(there)}"
        )
    return fastest_way(dtype) if linear == "auto" else linear


class PreparedBert(BertForMaskedLM):
    """What `prepare_for_inference` returns. It answers, and that is all: it cannot be trained, saved, moved, copied or
    changed. The model it was made from can.

    linear: the way in which its linear layers are computed.
    """

    def __init__(self, model: BertForMaskedLM, dtype: torch.dtype, linear: str) -> None:
        with shapes_only():
            super().__init__(model.config)
        self.linear = linear
        packed = linear_layer(linear, dtype)
        # Its own copy of every tensor. A matrix that is put into oneDNN's order, or rounded, is copied by that.
        copied = {f"{name}.weight" for name, part in self.named_modules() if packed and isinstance(part, nn.Linear)}
        if dtype == torch.int8:
            copied.add("embeddings.word.weight")
        full = torch.float32 if dtype == torch.int8 else dtype
        own = {  # tensors that were made in inference mode could not be used outside it, so they are copied too
            name: x.detach().to(full, copy=x.is_inference() or name not in copied)
            for name, x in model.state_dict().items()
        }
        self.load_state_dict(own, assign=True)
        self.requires_grad_(False).eval()
        self.load_report = model.load_report
        self._before, self._after = before_attention, after_attention
        self._graphs: Graphs | None = None
        if packed:
            self._pack(packed)
        word = self.embeddings.word.weight
        if word.device.type in COMPILED_ON and can_compile():
            self._before = torch.compile(before_attention, dynamic=True)
            self._after = torch.compile(after_attention, dynamic=True)
        if word.is_cuda and has_flash_attention(word, model.config.head_size):
            self._graphs = Graphs(word.device)
        fix(self)

    def _pack(self, linear: type[PrepackedLinear]) -> None:
        """Replace the linear layers, and in int8 the word embeddings."""
        hidden_act, word = self.config.hidden_act, self.embeddings.word.weight
        for layer in self.layers:
            prepack_layer(layer, linear, hidden_act)
            if linear is Int8Linear:
                finish_layer(layer)
        if linear is Int8Linear:
            self.embeddings.word = Int8Embedding(word)  # type: ignore[assignment]
        lookup = self.embeddings.word.weight
        self.head = PrepackedHead(self.head, linear, word, lookup, hidden_act)  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError("load the weights with BertForMaskedLM.from_pretrained, and prepare that")

    def get_input_embeddings(self) -> nn.Embedding:
        if self.dtype == torch.int8:
            raise ValueError(f"{PREPARED} in int8 has its words as whole numbers: call model.embeddings.word(ids)")
        return super().get_input_embeddings()

    def attention_maps(self, batch: PackedBatch, layers: Sequence[int]) -> dict[int, Tensor]:
        maps = super().attention_maps(batch, layers)
        return {number: x.float() if self.dtype == torch.int8 else x for number, x in maps.items()}

    def _padded_maps(self, states: Sequence[Tensor], batch: PackedBatch) -> Iterator[Tensor]:
        for x in super()._padded_maps(states, batch):
            yield x.float() if self.dtype == torch.int8 else x  # attention in int8 is computed in bfloat16

    def encode(self, batch: PackedBatch) -> Tensor:
        """As in BertForMaskedLM: (T, D)."""
        checks.require_embeddings(batch.largest, self.config)
        filled = self._fill_up(batch)
        x = self.embeddings(filled)  # (T, D)
        for layer in self.layers:
            x = self._after(layer, attention(*self._before(layer, x), filled), x)  # (T, D)
        return x if filled is batch else x[: batch.num_tokens]

    def predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """As in BertForMaskedLM: (M, V); the last layer runs for these positions only."""
        checks.require_positions(positions, batch.num_tokens)
        checks.require_embeddings(batch.largest, self.config)
        if self._graphs is not None and len(positions):
            logits = self._graphs(self._predict, batch, positions, self.config.max_position_embeddings)
            if logits is not None:
                return logits
        return self._predict(batch, positions)

    def _predict(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        batch = self._fill_up(batch)
        x = self.embeddings(batch)  # (T, D)
        *layers, last = self.layers
        for layer in layers:
            x = self._after(layer, attention(*self._before(layer, x), batch), x)  # (T, D)
        context = attention_at(*self._before(last, x), batch, positions)  # (M, H, K)
        return self.head(self._after(last, context, x[positions]), self.embeddings.word.weight)  # (M, V)

    def _fill_up(self, batch: PackedBatch) -> PackedBatch:
        """Convolutions need certain numbers of tokens. Here the batch is filled up once for the first of them, which
        mostly suits all. If it does not suit another one, that one fills up its own input.
        """
        qkv = self.layers[0].get_submodule("attention.qkv")
        missing = qkv.missing(batch.num_tokens) if isinstance(qkv, ConvolvedLinear) else 0
        return filled_up(batch, missing) if missing else batch


def before_attention(layer: EncoderLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value, each (T, H, K), of x (T, D)"""
    return layer.attention.split_heads(x)


def after_attention(layer: EncoderLayer, context: Tensor, x: Tensor) -> Tensor:
    """The rest of EncoderLayer, for any tokens: context (M, H, K) and what the layer read, x (M, D) → (M, D)"""
    x = layer.attention_LayerNorm(layer.attention.output(context.flatten(-2)) + x)  # (M, D)
    return layer.feed_forward_LayerNorm(layer.feed_forward(x) + x)  # (M, D)


def attention_at(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, positions: Tensor) -> Tensor:
    """The context of the tokens at `positions` (M,) only: (M, H, K). Without dropout."""
    if not query.is_cpu or forced_kernel() is not None or not 0 < len(positions) < len(query):
        return attention(query, key, value, batch)[positions]
    starts = batch.cu_seqlens
    sequence = torch.searchsorted(starts, positions, right=True) - 1  # (M,)
    order = sequence.argsort(stable=True)
    asked = sequence.bincount(minlength=batch.num_sequences).tolist()
    queries = query[positions[order]].transpose(0, 1).split(asked, dim=1)
    keys, values = (x.transpose(0, 1).split(batch.lengths, dim=1) for x in (key, value))
    contexts = [
        one_sequence(q, k, v).transpose(0, 1) for q, k, v in zip(queries, keys, values, strict=True) if q.shape[1]
    ]
    return torch.cat(contexts)[order.argsort()]  # (M, H, K)
