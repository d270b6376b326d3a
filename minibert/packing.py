"""PackedBatch: a batch of sequences as one flat list of T real tokens, without padding.

Everything in BERT but attention treats each token alone, so the model runs on the flat list; only attention has
to know where a sequence begins and ends. That is `cu_seqlens`: sequence b owns the tokens cu_seqlens[b] to
cu_seqlens[b + 1].

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


@dataclass(frozen=True)
class PackedBatch:
    """B sequences as T tokens. Build it with `from_padded`, `from_lists` or `from_flat`.

    input_ids, token_type_ids, position_ids   (T,) int64
    cu_seqlens                                (B + 1,) int32: where each sequence begins, and T
    lengths                                   B whole numbers on the host, so that nobody asks the device for them
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

        input_ids (B, S) integers; attention_mask (B, S) of 0 and 1, or bool (default: all 1); token_type_ids
        (B, S) (default: all 0); position_ids (B, S) or (1, S) (default: the column, counted from 0 whatever the
        mask says, so that a left-padded row starts late: the same as transformers). Raises ValueError for other
        shapes or types.
        """
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids must be (batch, length), not {tuple(input_ids.shape)}: add the batch dimension"
            )
        _require_integers("input_ids", input_ids)
        batch_size, length = input_ids.shape
        if attention_mask is None:
            padded_index = torch.arange(batch_size * length, device=input_ids.device)
            lengths = (length,) * batch_size
        else:
            _require_shape("attention_mask", attention_mask, input_ids)
            if attention_mask.dtype != torch.bool:
                _require_integers("attention_mask", attention_mask)
                if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
                    raise ValueError(
                        "attention_mask may hold only 0 (padding) and 1 (token), but it ranges from "
                        f"{int(attention_mask.min())} to {int(attention_mask.max())}"
                    )
            mask = attention_mask.bool()
            padded_index = mask.flatten().nonzero().flatten()  # (T,)
            lengths = tuple(mask.sum(1).tolist())
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        if tuple(position_ids.shape) == (1, length):
            position_ids = position_ids.expand(batch_size, length)
        for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            _require_shape(name, ids, input_ids)
            _require_integers(name, ids)

        ids, types, positions = (
            x.reshape(-1)[padded_index].long() for x in (input_ids, token_type_ids, position_ids)
        )  # each (T,)
        return cls(
            input_ids=ids,
            token_type_ids=types,
            position_ids=positions,
            cu_seqlens=_cumulative(lengths, input_ids.device),
            lengths=lengths,
            padded_shape=(batch_size, length),
            padded_index=padded_index,
            largest=_largest(ids, types, positions),
        )

    @classmethod
    def from_lists(
        cls,
        input_ids: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> "PackedBatch":
        """Put lists of token ids end to end. Positions count from 0 in each list.

        token_type_ids, if given, has the same lengths (default: all 0). Raises ValueError if it has not.
        """
        lengths = tuple(len(ids) for ids in input_ids)
        if token_type_ids is not None and tuple(len(types) for types in token_type_ids) != lengths:
            raise ValueError(
                f"token_type_ids has lengths {[len(types) for types in token_type_ids]}, input_ids has {list(lengths)}"
            )

        def flat(lists: Sequence[Sequence[int]]) -> Tensor:
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
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        counts = torch.tensor(lengths, dtype=torch.int64)
        row = torch.arange(len(lengths)).repeat_interleave(counts, output_size=len(input_ids))
        positions = torch.arange(len(input_ids)) - (counts.cumsum(0) - counts)[row]
        longest = max(lengths, default=0)
        return cls(
            input_ids=input_ids,
            token_type_ids=types,
            position_ids=positions,
            cu_seqlens=_cumulative(lengths, None),
            lengths=tuple(lengths),
            padded_shape=(len(lengths), longest),
            padded_index=row * longest + positions,
            largest=_largest(input_ids, types, positions),
        )

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
        row = torch.repeat_interleave(
            torch.arange(len(counts), device=starts.device), counts, output_size=self.num_tokens
        )
        token = torch.arange(self.num_tokens, device=starts.device)
        return row * self.max_seqlen + token - starts[row]

    @cached_property
    def key_mask(self) -> Tensor:
        """(B, max_seqlen) bool: which places of that rectangle hold a token."""
        counts = self.cu_seqlens.diff()
        return torch.arange(self.max_seqlen, device=counts.device) < counts[:, None]

    def filled_up(self, missing: int) -> "PackedBatch":
        """This batch and one more sequence of `missing` tokens that nobody asked for, for kernels that are fastest at
        certain T. For `unpack` it is one row of all its tokens: the rectangle belongs to this batch alone.
        """
        zeros = self.input_ids.new_zeros(missing)
        tokens = self.num_tokens + missing
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, zeros]),
            token_type_ids=torch.cat([self.token_type_ids, zeros]),
            position_ids=torch.cat([self.position_ids, zeros]),
            cu_seqlens=torch.cat([self.cu_seqlens, self.cu_seqlens[-1:] + missing]),
            lengths=(*self.lengths, missing),
            padded_shape=(1, tokens),
            padded_index=torch.arange(tokens, device=self.padded_index.device),
        )

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

    def require_embeddings(self, vocab_size: int, type_vocab_size: int, max_position_embeddings: int) -> None:
        """Raise ValueError if a token id, type or position has no embedding in tables of these sizes. Reads
        host numbers only: on a GPU an index out of range would otherwise end the process, and asking for it
        would stall the queue.
        """
        token_id, token_type, position = self.largest
        if token_id >= vocab_size:
            raise ValueError(
                f"token id {token_id} is unknown: the vocabulary has {vocab_size} entries, 0 to {vocab_size - 1}"
            )
        if token_type >= type_vocab_size:
            raise ValueError(f"token type {token_type} is unknown: the model has {type_vocab_size}, counted from 0")
        if position >= max_position_embeddings:
            raise ValueError(
                f"a sequence reaches {position + 1} tokens, and the model has positions for {max_position_embeddings}: "
                "shorten it, or ask for truncation where the text is tokenized"
            )

    def require_positions(self, positions: Tensor) -> None:
        """Raise ValueError unless `positions` is (M,) whole numbers between 0 and T − 1. On a GPU the range is left to
        the indexing itself, since asking would stall the queue.
        """
        if positions.dim() != 1 or positions.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"positions must be (M,) whole numbers, not {tuple(positions.shape)} {positions.dtype}")
        if positions.is_cpu and positions.numel():
            low, high = int(positions.min()), int(positions.max())
            if low < 0 or high >= self.num_tokens:
                raise ValueError(
                    f"positions go from {low} to {high}, but they count packed tokens, from 0 to {self.num_tokens - 1}"
                )

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        names = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "padded_index")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def _cumulative(lengths: Sequence[int], device: torch.device | str | None) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _largest(ids: Tensor, types: Tensor, positions: Tensor) -> tuple[int, int, int]:
    if ids.numel() == 0:
        return (-1, -1, -1)
    stacked = torch.stack([ids, types, positions])  # (3, T): one question to the device, not six
    (id_low, id_high), (type_low, type_high), (position_low, position_high) = torch.stack(
        [stacked.amin(1), stacked.amax(1)], dim=1
    ).tolist()
    for name, low in (("input_ids", id_low), ("token_type_ids", type_low), ("position_ids", position_low)):
        if low < 0:
            raise ValueError(f"{name} may not be negative, but holds {low}")
    return id_high, type_high, position_high


def _require_shape(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but input_ids is {tuple(input_ids.shape)}: give both alike")


def _require_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        allowed = "integers, or bool" if name == "attention_mask" else "integers"
        raise ValueError(f"{name} must hold {allowed}, not {tensor.dtype}")
