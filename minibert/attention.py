"""Attention: how the tokens of a sequence look at each other.

    Attention(Q, K, V) = softmax(Q Kᵀ / √K) V            Vaswani et al. 2017, equation 1

`equation_1` is that line. A batch comes as a list of T tokens, and this is the one place where it has to be known which
tokens belong together: `to_rows` gives each sequence a row of its own, filled up with zeros where it is shorter than
the longest one, and `to_tokens` goes back. What is faster than this, and computes the same, is in kernels.py.

Shapes, as in model.py: T tokens · B sequences · S the longest of them · H heads · K head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
