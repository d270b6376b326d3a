"""Attention: how the tokens of a sequence look at each other.

    Attention(Q, K, V) = softmax(Q Kᵀ / √K) V            Vaswani et al. 2017, equation 1

`equation_1` is that line, and `formula` is that line for a whole batch. A batch comes as a list of T tokens, and this
is the one place where it has to be known which tokens belong together: `to_rows` gives each sequence a row of its own,
filled up with zeros where it is shorter than the longest one, and `to_tokens` goes back.

There are faster ways to compute the same, up to rounding. `attention` is what the model calls, `choose_kernel` says
which way runs, and the ways themselves follow. Each takes query, key and value as (T, H, K), and gives the context of
every token, (T, H, K): it sees all tokens of its own sequence and no other.

Shapes, as in model.py: T tokens · B sequences · S the longest of them · H heads · K head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.packing import PackedBatch

Dropout = Callable[[Tensor], Tensor]


def equation_1(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ / √K) V, (…, S, K), and the softmax alone, (…, S, S).

    query, key, value (…, S, K); the query may also be there for some of the tokens only. mask (…, S): true where a key
    may be seen. dropout: what to do to the attention weights, in training.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (…, S, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    weights = probabilities if dropout is None else dropout(probabilities)
    return weights @ value, probabilities


def formula(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Equation 1 for every token, from query, key and value (T, H, K): the context (T, H, K), and the attention
    probabilities (B, H, S, S), which are 0 wherever the query or the key is padding.
    """
    q, k, v = to_rows(query, batch), to_rows(key, batch), to_rows(value, batch)  # each (B, H, S, K)
    if batch.uniform:
        context, probabilities = equation_1(q, k, v, None, dropout)
    else:
        is_key, is_query = batch.is_token[:, None, None, :], batch.is_token[:, None, :, None]
        context, probabilities = equation_1(q, k, v, is_key, dropout)
        probabilities = probabilities * is_query * is_key
    return to_tokens(context, batch), probabilities


def to_rows(x: Tensor, batch: PackedBatch) -> Tensor:
    """(T, H, K) → (B, H, S, K), with zeros after the end of a shorter sequence."""
    shape = (batch.num_sequences, batch.max_seqlen)
    if not batch.uniform:
        x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, batch.compact_index, x)  # (B * S, H, K)
    return x.unflatten(0, shape).transpose(1, 2)


def to_tokens(x: Tensor, batch: PackedBatch) -> Tensor:
    """(B, H, S, K) → (T, H, K)"""
    x = x.transpose(1, 2).flatten(0, 1)  # (B * S, H, K)
    return x if batch.uniform else x[batch.compact_index]


# ------------------------------------------------------------------------------------------------------- what is chosen

KERNELS = ("formula", "sdpa", "sequences", "varlen", "jagged")
QUERIES = 128  # at a time, where scores are written out: so they stay in the cache, and memory does not grow with S²
_forced: ContextVar[str | None] = ContextVar("_forced", default=None)  # each thread has its own


def attention(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: nn.Dropout | None = None
) -> Tensor:
    """The context of every token, (T, H, K). dropout: of the attention weights; it acts in training mode only. While a
    program is recorded, the batch is a rectangle, and everything is (B, S, H, K).
    """
    dropout = dropout if dropout is not None and dropout.training and dropout.p > 0 else None
    if not isinstance(batch, PackedBatch):  # a Rectangle (masked_lm.py)
        return batch.attend(query, key, value, dropout)
    kernel = choose_kernel(query, batch, dropout is not None)
    if kernel == "formula":
        return formula(query, key, value, batch, dropout)[0]
    if kernel == "varlen":
        if dropout is not None:
            raise ValueError("flash attention on packed tokens has no dropout: use another kernel, or model.eval()")
        return varlen(query, key, value, batch)
    return {"sdpa": sdpa, "sequences": sequences, "jagged": jagged}[kernel](query, key, value, batch, dropout)


def choose_kernel(query: Tensor, batch: PackedBatch, dropout: bool = False) -> str:
    """The one place where the kernel is chosen.

    "sdpa"       torch's scaled_dot_product_attention: for sequences of one length, where it needs no mask (on CUDA
                 torch then takes a flash kernel), and wherever nothing better is there
    "varlen"     flash attention on the packed tokens: CUDA in half precision, without dropout, which it does not have
    "sequences"  on the CPU: each sequence by itself, so that nothing is computed for padding; also for sequences of one
                 length, where dropout or the fused kernel would be slow
    "jagged"     packed tokens with dropout: never chosen, until it was tested on a GPU; `use_kernel("jagged")` takes it
    "formula"    equation 1: for training on the CPU in half precision, where the fused kernel's backward is far slower
    """
    if (forced := forced_kernel()) is not None:
        return forced
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cpu:
        if len(query) and (not batch.uniform or (dropout and query.requires_grad)):
            return "sequences"
        if half and query.requires_grad:
            return "formula"
        return "sequences" if fused_is_slow(query, batch.max_seqlen) else "sdpa"
    flash = query.is_cuda and half and not dropout and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return "varlen" if flash and not batch.uniform else "sdpa"


def fused_is_slow(query: Tensor, length: int) -> bool:
    """Whether, in a forward pass on this CPU, equation 1 is faster than the fused kernel for a sequence of this length.

    torch's fused kernel multiplies bfloat16 matrices with AMX where that is; on other CPUs it has nothing as fast as
    the batched product that equation 1 calls: on an AMD EPYC (Zen 5) it took 1.5 times as long, and more.
    """
    return query.is_cpu and query.dtype == torch.bfloat16 and length >= 64 and not has_amx()


def has_amx() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 as a whole (AMX)."""
    return torch.cpu._is_amx_tile_supported()


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Within this block every attention runs on the named kernel, one of `KERNELS`. For study and tests."""
    if name not in KERNELS:
        raise ValueError(f"there is no attention kernel {name!r}: choose one of {', '.join(KERNELS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_kernel() -> str | None:
    """The kernel of the `use_kernel` block that this is in, or None."""
    return _forced.get()


# --------------------------------------------------------------------------------------------------------- faster forms


def sdpa(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: nn.Dropout | None = None) -> Tensor:
    """torch's fused attention on rows of equal length; where lengths differ, with a mask over the keys."""
    mask = None if batch.uniform else batch.is_token[:, None, None, :]  # (B, 1, 1, S)
    q, k, v = to_rows(query, batch), to_rows(key, batch), to_rows(value, batch)  # each (B, H, S, K)
    rate = 0.0 if dropout is None else dropout.p
    return to_tokens(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate), batch)


def sequences(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: nn.Dropout | None) -> Tensor:
    """Each sequence by itself: no padding, no mask. With gradients by equation 1, whose backward pass is the faster one
    on the CPU.
    """
    parts = [x.transpose(0, 1).split(batch.lengths, dim=1) for x in (query, key, value)]
    contexts = [one_sequence(q, k, v, dropout).transpose(0, 1) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(contexts)  # (T, H, K)


def one_sequence(query: Tensor, key: Tensor, value: Tensor, dropout: nn.Dropout | None = None) -> Tensor:
    """Attention of one sequence on the CPU: query (H, some or all of its tokens, K), key and value (H, length, K)."""
    if query.requires_grad or dropout is not None:
        return equation_1(query, key, value, dropout=dropout)[0]
    if fused_is_slow(query, query.shape[1]):
        some = query.split(QUERIES, dim=1)
        return torch.cat([equation_1(q, key, value)[0] for q in some], dim=1)
    return F.scaled_dot_product_attention(query[None], key[None], value[None])[0]


def varlen(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch) -> Tensor:
    """Flash attention on the packed tokens: no padding is made and no mask is read. CUDA, float16 or bfloat16."""
    from torch.nn.attention.varlen import varlen_attn  # absent before torch 2.10, and of no use on the CPU

    longest = batch.max_seqlen
    return varlen_attn(query, key, value, batch.cu_seqlens, batch.cu_seqlens, longest, longest)  # type: ignore[return-value]


def jagged(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: nn.Dropout | None = None) -> Tensor:
    """torch's fused attention on the packed tokens as a nested tensor: no padding, no mask, and it has dropout."""
    bounds, longest, shortest = batch.cu_seqlens.long(), batch.max_seqlen, min(batch.lengths, default=0)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, bounds, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
        for x in (query, key, value)
    )  # each (B, H, each sequence's own length, K)
    rate = 0.0 if dropout is None else dropout.p
    context: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2).values()
    return context
