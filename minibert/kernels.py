"""The fast forms of attention, and the one place where one of them is chosen.

Each computes what `attention.formula` computes, up to rounding. query, key and value come as (T, H, K), and so does the
result: the context of every token, which sees all tokens of its own sequence and no other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.attention import equation_1, formula, to_rows, to_tokens
from minibert.packing import PackedBatch
from minibert.tracing import Rectangle, attend

KERNELS = ("formula", "sdpa", "sequences", "varlen", "jagged")
QUERIES = 128  # at a time, where scores are written out: so they stay in the cache, and memory does not grow with S²
_forced: ContextVar[str | None] = ContextVar("_forced", default=None)  # each thread has its own


def attention(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch | Rectangle, dropout: nn.Dropout | None = None
) -> Tensor:
    """The context of every token, (T, H, K). dropout: of the attention weights; it acts in training mode only. While a
    program is recorded, the batch is a Rectangle, and everything is (B, S, H, K).
    """
    dropout = dropout if dropout is not None and dropout.training and dropout.p > 0 else None
    if isinstance(batch, Rectangle):
        return attend(query, key, value, batch, dropout)
    kernel = choose_kernel(query, batch, dropout is not None)
    if kernel == "formula":
        return formula(query, key, value, batch, dropout)[0]
    if kernel == "varlen":
        if dropout is not None:
            raise ValueError("flash attention on packed tokens has no dropout: use another kernel, or model.eval()")
        return varlen(query, key, value, batch)
    if kernel == "jagged":
        return jagged(query, key, value, batch, dropout)
    if kernel == "sequences":
        return sequences(query, key, value, batch, dropout)
    return sdpa(query, key, value, batch, dropout)


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
    if batch.uniform:
        return "sdpa"
    head_size = query.shape[-1]
    if query.is_cuda and half and not dropout and head_size % 8 == 0 and head_size <= 256:
        return "varlen"
    return "sdpa"


def fused_is_slow(query: Tensor, length: int) -> bool:
    """Whether, in a forward pass on this CPU, equation 1 is faster than the fused kernel for a sequence of this length.

    torch's fused kernel multiplies bfloat16 matrices with AMX where that is; on other CPUs it has nothing as fast as
    the batched product that equation 1 calls: on an AMD EPYC (Zen 5) it took 1.5 times as long, and more.
    """
    return query.is_cpu and query.dtype == torch.bfloat16 and length >= 64 and not has_amx()


@cache
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


class QuickDropout(nn.Dropout):
    """nn.Dropout for training on the CPU, where torch draws random numbers one after the other, which took an eighth
    of a step. Here 16 random bits decide over an element, not 64. So p is rounded to a multiple of 2^-16, and the
    elements dropped are others than those of nn.Dropout (and of transformers) for the same seed.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        dropped = min(max(round(self.p * 2**16), 1), 2**16 - 1)  # of the 2^16 patterns that 16 bits have
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)  # 64 each
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0.0)


@contextmanager
def quick_dropout(model: nn.Module) -> Iterator[None]:
    """Within this block every nn.Dropout of `model` is a `QuickDropout`."""
    found = [module for module in model.modules() if type(module) is nn.Dropout]
    try:
        for module in found:
            module.__class__ = QuickDropout  # hooks, mode and rate stay
        yield
    finally:
        for module in found:
            module.__class__ = nn.Dropout


def sdpa(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: nn.Dropout | None = None) -> Tensor:
    """torch's fused attention on rows of equal length; where lengths differ, with a mask over the keys."""
    mask = None if batch.uniform else batch.is_token[:, None, None, :]  # (B, 1, 1, S)
    q, k, v = to_rows(query, batch), to_rows(key, batch), to_rows(value, batch)  # each (B, H, S, K)
    rate = 0.0 if dropout is None else dropout.p
    return to_tokens(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate), batch)


def sequences(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, dropout: nn.Dropout | None = None
) -> Tensor:
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
