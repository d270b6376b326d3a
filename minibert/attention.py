"""Attention over a packed batch: the formula written out, and the fused kernels behind the same signature.

    Attention(Q, K, V) = softmax(Q Kᵀ / √K) V            Vaswani et al. 2017, equation 1

Shapes: T packed tokens · B sequences · S the longest of them · H heads · K head size. query, key and value come
as (T, H, K), and so does the result. A token sees all the tokens of its own sequence, and no other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.packing import PackedBatch

KERNELS = ("formula", "sdpa", "sequences", "varlen")
QUERIES = 128  # at a time, where scores are written out: so they stay in the cache, and memory does not grow with S²
_forced: ContextVar[str | None] = ContextVar("_forced", default=None)  # each thread has its own


def attention(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: float = 0.0) -> Tensor:
    """The context of every token, (T, H, K). `dropout` is the probability of dropping an attention weight."""
    kernel = choose_kernel(query, batch, dropout)
    if kernel == "formula":
        return formula(query, key, value, batch, dropout)[0]
    if kernel == "varlen":
        return varlen(query, key, value, batch)
    if kernel == "sequences":
        return sequences(query, key, value, batch, dropout)
    return sdpa(query, key, value, batch, dropout)


def choose_kernel(query: Tensor, batch: PackedBatch, dropout: float) -> str:
    """The one place where the kernel is chosen.

    "sdpa"       torch's scaled_dot_product_attention: for sequences of one length, where it needs no mask (on CUDA
                 torch then takes a flash kernel), and wherever nothing better is there
    "varlen"     flash attention on the packed tokens: CUDA in half precision, without dropout, which it does not have
    "sequences"  on the CPU: each sequence by itself, so that nothing is computed for padding; also for sequences of one
                 length, where dropout or the fused kernel would be slow
    "formula"    equation 1: for training on the CPU in half precision, where the fused kernel's backward is far slower
    """
    if (forced := forced_kernel()) is not None:
        return forced
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cpu:
        if not batch.uniform or (dropout and query.requires_grad):
            return "sequences"
        if half and query.requires_grad:
            return "formula"
        return "sequences" if fused_is_slow(query, batch.max_seqlen) else "sdpa"
    if batch.uniform:
        return "sdpa"
    head_size = query.shape[-1]
    if query.is_cuda and half and dropout == 0 and head_size % 8 == 0 and head_size <= 256:
        return "varlen"
    return "sdpa"


def fused_is_slow(query: Tensor, length: int) -> bool:
    """Whether, in a forward pass on this CPU, equation 1 is faster than the fused kernel for a sequence of this length.

    torch's fused kernel multiplies bfloat16 matrices with AMX where that is; on other CPUs it has nothing as fast as
    the batched product that equation 1 calls: on an AMD EPYC (Zen 5) it took 1.5 times as long, and more.
    """
    return query.is_cpu and query.dtype == torch.bfloat16 and length >= 64 and not _has_amx()


@cache
def _has_amx() -> bool:
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


def formula(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Equation 1 on padded rows. Returns the context (T, H, K) and the attention probabilities (B, H, S, S),
    which are 0 wherever the query or the key is padding.
    """
    q, k, v = to_rows(query, batch), to_rows(key, batch), to_rows(value, batch)  # each (B, H, S, K)
    mask = None if batch.uniform else batch.key_mask[:, None, None, :]  # (B, 1, 1, S)
    context, probabilities = equation_1(q, k, v, mask, dropout)
    if not batch.uniform:
        probabilities = probabilities * batch.key_mask[:, None, :, None] * batch.key_mask[:, None, None, :]
    return to_tokens(context, batch), probabilities


def equation_1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    drop: Callable[[Tensor, float], Tensor] = F.dropout,
) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ / √K) V, and the softmax alone. query, key, value (…, S, K), the query also for some of the tokens
    only; mask (…, S), true where a key may be seen. drop: how a weight is dropped, F.dropout or `quick_dropout`.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (…, S, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    return drop(probabilities, dropout) @ value, probabilities


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout for training on the CPU, where torch draws random numbers one after the other, which took an eighth of
    a step: here 16 random bits decide over an element, not 64. So p is rounded to a multiple of 2^-16, and the
    elements dropped are others than F.dropout's (and transformers') for the same seed.
    """
    if p == 0:
        return x
    dropped = min(max(round(p * 2**16), 1), 2**16 - 1)  # of the 2^16 patterns that 16 bits have
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)  # 64 each
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0.0)


def sdpa(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: float = 0.0) -> Tensor:
    """torch's fused attention on rows of equal length; where lengths differ, with a mask over the keys."""
    mask = None if batch.uniform else batch.key_mask[:, None, None, :]  # (B, 1, 1, S)
    q, k, v = to_rows(query, batch), to_rows(key, batch), to_rows(value, batch)  # each (B, H, S, K)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return to_tokens(context, batch)


def sequences(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: float = 0.0) -> Tensor:
    """Each sequence by itself: no padding, no mask. With gradients by equation 1, whose backward pass is the
    faster on the CPU, and with `quick_dropout`: what is dropped differs from padded rows in any case.
    """
    parts = [x.transpose(0, 1).split(batch.lengths, dim=1) for x in (query, key, value)]
    contexts = [one_sequence(q, k, v, dropout).transpose(0, 1) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(contexts)  # (T, H, K)


def one_sequence(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention of one sequence on the CPU: query (H, some or all of its tokens, K), key and value (H, length, K)."""
    if query.requires_grad or dropout:
        return equation_1(query, key, value, dropout=dropout, drop=quick_dropout)[0]
    if fused_is_slow(query, query.shape[1]):
        some = query.split(QUERIES, dim=1)
        return torch.cat([equation_1(q, key, value)[0] for q in some], dim=1)
    return F.scaled_dot_product_attention(query[None], key[None], value[None])[0]


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


def varlen(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch) -> Tensor:
    """Flash attention on the packed tokens: no padding is made and no mask is read. CUDA, float16 or bfloat16."""
    from torch.nn.attention.varlen import varlen_attn  # absent before torch 2.10, and of no use on the CPU

    longest = batch.max_seqlen
    context = varlen_attn(query, key, value, batch.cu_seqlens, batch.cu_seqlens, longest, longest)
    assert isinstance(context, Tensor)
    return context


def to_rows(x: Tensor, batch: PackedBatch) -> Tensor:
    """(T, H, K) → (B, H, S, K), with zeros after the end of a shorter sequence."""
    shape = (batch.num_sequences, batch.max_seqlen)
    if not batch.uniform:
        x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, batch.compact_index, x)
    return x.unflatten(0, shape).transpose(1, 2)


def to_tokens(x: Tensor, batch: PackedBatch) -> Tensor:
    """(B, H, S, K) → (T, H, K)"""
    x = x.transpose(1, 2).flatten(0, 1)  # (B * S, H, K)
    return x if batch.uniform else x[batch.compact_index]
