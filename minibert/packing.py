"""PackedBatch: a batch of sequences as one flat list of T real tokens, without padding.

Sentences differ in length. To put them into one rectangle, the shorter ones would have to be filled up with padding,
and the model would compute it all for nothing. Everything in BERT but attention treats each token alone, so the model
runs on one list of all tokens. Only attention has to know where a sequence begins and ends. That is `cu_seqlens`:
sequence b owns the tokens cu_seqlens[b] to cu_seqlens[b + 1].

    padded (B=2, S=4)         packed (T=5)             cu_seqlens
    [ the  cat  sat  .  ]                              [0, 4, 5]
    [ hi   PAD  PAD  PAD]     the cat sat . hi

Source: "effective transformers", ByteDance 2020; the names are those of the flash-attention kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from minibert import checks

Lists = Sequence[Sequence[int]]  # of token ids: one list for each sequence


@dataclass(frozen=True)
class PackedBatch:
    """B sequences as T tokens. Build it with `from_padded`, `from_lists` or `from_flat`.

    input_ids, token_type_ids, position_ids   (T,) int64
    cu_seqlens                                (B + 1,) int32: where each sequence begins, and T
    lengths                                   B whole numbers on the host: to ask a GPU for them would stall it
    padded_shape                              (B, S), the rectangle that `unpack` fills
    padded_index                              (T,) int64: where token t stands in the flattened rectangle
    largest                                   the largest token id, type and position, on the host
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    padded_shape: tuple[int, int]
    padded_index: Tensor
    largest: tuple[int, int, int]

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> "PackedBatch":
        """Keep the tokens whose attention_mask is 1, wherever they stand (padding left, right, or holes between).

        input_ids (B, S) integers; attention_mask (B, S) of 0 and 1 in any dtype (default: all 1); token_type_ids
        (B, S) (default: all 0); position_ids (B, S) or (1, S) (default: the column, counted from 0 whatever the
        mask says, so that a left-padded row starts late: the same as transformers). Raises ValueError for other
        shapes or types.
        """
        # each (B, S):
        mask, types, positions = checks.padded_inputs(input_ids, attention_mask, token_type_ids, position_ids)
        batch_size, length = input_ids.shape
        if mask is None:
            padded_index = torch.arange(batch_size * length, device=input_ids.device)  # (T,)
            lengths = (length,) * batch_size
        else:
            padded_index = mask.flatten().nonzero().flatten()  # (T,)
            lengths = tuple(mask.sum(1).tolist())
        ids, types, positions = (x.reshape(-1)[padded_index].long() for x in (input_ids, types, positions))  # (T,)
        bounds, largest = _cumulative(lengths, input_ids.device), checks.largest(ids, types, positions)
        return cls(ids, types, positions, bounds, lengths, (batch_size, length), padded_index, largest)

    @classmethod
    def from_lists(
        cls, input_ids: Lists, token_type_ids: Lists | None = None, *, device: torch.device | str | None = None
    ) -> "PackedBatch":
        """Put lists of token ids end to end. Positions count from 0 in each list.

        token_type_ids, if given, has the same lengths (default: all 0). Raises ValueError if it has not, and TypeError
        for what is no list of lists.
        """
        lengths = checks.lengths_of_lists("input_ids", input_ids)
        if token_type_ids is not None:
            others = checks.lengths_of_lists("token_type_ids", token_type_ids)
            if others != lengths:
                raise ValueError(f"token_type_ids has lengths {list(others)}, input_ids has {list(lengths)}")

        def flat(lists: Lists) -> Tensor:
            numbers = torch.tensor([number for row in lists for number in row])
            if numbers.numel() and numbers.dtype != torch.int64:
                raise ValueError(f"ids must be whole numbers, not {numbers.dtype}")
            return numbers.long()

        batch = cls.from_flat(flat(input_ids), lengths, None if token_type_ids is None else flat(token_type_ids))
        return batch if device is None else batch.to(device)

    @classmethod
    def from_flat(
        cls, input_ids: Tensor, lengths: Sequence[int], token_type_ids: Tensor | None = None
    ) -> "PackedBatch":
        """Ids that are end to end already: input_ids (T,) int64 on the CPU, of which the first lengths[0] are the first
        sequence, and so on. token_type_ids (T,) (default: all 0). Positions count from 0 in each sequence.
        """
        if sum(lengths) != len(input_ids):
            raise ValueError(f"lengths add up to {sum(lengths)}, and input_ids has {len(input_ids)} ids")
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        counts = torch.tensor(lengths, dtype=torch.int64)
        row = torch.arange(len(lengths)).repeat_interleave(counts, output_size=len(input_ids))
        positions = torch.arange(len(input_ids)) - (counts.cumsum(0) - counts)[row]
        bounds, largest = _cumulative(lengths, None), checks.largest(input_ids, types, positions)
        shape = (len(lengths), max(lengths, default=0))
        return cls(input_ids, types, positions, bounds, tuple(lengths), shape, row * shape[1] + positions, largest)

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """B"""
        return len(self.lengths)

    @cached_property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def uniform(self) -> bool:
        """Whether all sequences have one length: then (T, …) is also (B, max_seqlen, …), and attention needs no
        mask.
        """
        return min(self.lengths, default=0) == self.max_seqlen

    @cached_property
    def compact_index(self) -> Tensor:
        """(T,): where token t stands in the flattened (B, max_seqlen) rectangle whose rows have no holes."""
        starts = self.cu_seqlens[:-1].long()
        counts = self.cu_seqlens.diff().long()
        row = torch.arange(len(counts), device=starts.device).repeat_interleave(counts, output_size=self.num_tokens)
        token = torch.arange(self.num_tokens, device=starts.device)
        return row * self.max_seqlen + token - starts[row]

    @cached_property
    def is_token(self) -> Tensor:
        """(B, max_seqlen) bool: which places of that rectangle hold a token."""
        counts = self.cu_seqlens.diff()
        return torch.arange(self.max_seqlen, device=counts.device) < counts[:, None]

    def pack(self, padded: Tensor) -> Tensor:
        """(B, S, …) → (T, …)"""
        if tuple(padded.shape[:2]) != self.padded_shape:
            raise ValueError(f"expected (batch, length) = {self.padded_shape}, not {tuple(padded.shape[:2])}")
        return padded.flatten(0, 1)[self.padded_index]

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, …) → (B, S, …), with zeros where there is no token."""
        rows, columns = self.padded_shape
        if self.num_tokens == rows * columns:  # no padding at all: the same memory, seen as a rectangle
            return packed.unflatten(0, self.padded_shape)
        padded = packed.new_zeros(rows * columns, *packed.shape[1:])
        return padded.index_copy(0, self.padded_index, packed).unflatten(0, self.padded_shape)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        names = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "padded_index")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def _cumulative(lengths: Sequence[int], device: torch.device | str | None) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
