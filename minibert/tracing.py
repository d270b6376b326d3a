"""For programs that are recorded: torch.export, torch.compile, torch.jit.trace, and ONNX on top of them.

A recorder follows one call and keeps the steps. It cannot ask a tensor how long its sentences are: the answer of this
one batch would become a constant of the program, which would then be wrong for the next. So while it is recorded, the
padded call keeps its rectangle (B, S), padding and all, and attention masks the keys. The results are the same up to
rounding, and B and S may be others in each run of the program.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.attention import equation_1
from minibert.packing import PackedBatch


def being_traced() -> bool:
    """Whether the call that we are in is being recorded, or transformed by torch.func (vmap, grad, …)."""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
    )


@dataclass(frozen=True)
class Rectangle:
    """A batch with its padding, each (B, S). What treats each token alone takes it in place of a PackedBatch.

    maps: a list that attention adds its probabilities to, (B, H, S, S), layer after layer; None if nobody wants them.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor  # bool: true where a token is
    maps: list[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where it is: captum asks what a layer reads."""
        return self.input_ids.device

    @classmethod
    def of(cls, batch: PackedBatch, maps: list[Tensor] | None) -> "Rectangle":
        """A batch that has been checked, spread out again."""
        ids, types, positions, mask = map(
            batch.unpack, (batch.input_ids, batch.token_type_ids, batch.position_ids, torch.ones_like(batch.input_ids))
        )
        return cls(ids, types, positions, mask.bool(), maps)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: nn.Dropout | None = None) -> Tensor:
        """Attention of query, key and value (B, S, H, K) with a mask over the keys: (B, S, H, K)."""
        # (B, 1): a row without a token may see all of itself; otherwise its softmax would be no number.
        nobody = ~self.attention_mask.any(1, keepdim=True)
        mask = (self.attention_mask | nobody)[:, None, None, :]  # (B, 1, 1, S)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # each (B, H, S, K)
        if self.maps is None:
            rate = 0.0 if dropout is None else dropout.p
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate).transpose(1, 2)
        seen = self.attention_mask[:, None, :, None] & self.attention_mask[:, None, None, :]  # (B, 1, S, S)

        def keep(probabilities: Tensor) -> Tensor:
            """On the way to the values, so that there is a gradient of what follows by the map."""
            self.maps.append(probabilities.masked_fill(~seen, 0))  # type: ignore[union-attr]
            return self.maps[-1] if dropout is None else dropout(self.maps[-1])  # type: ignore[index]

        return equation_1(q, k, v, mask, keep)[0].transpose(1, 2)


def rectangle(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    maps: list[Tensor] | None = None,
) -> Rectangle:
    """The arguments of the padded call, with nothing left out, and 0 in the padding. What they hold is not checked, for
    nobody can be asked; their shapes are. Raises ValueError.
    """
    for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"{name} is {tuple(given.shape)}, but input_ids is {tuple(input_ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    mask = attention_mask.bool()
    position_ids = position_ids.expand(input_ids.shape)
    ids, types, positions = (x.masked_fill(~mask, 0) for x in (input_ids, token_type_ids, position_ids))
    return Rectangle(ids, types, positions, mask, maps)
