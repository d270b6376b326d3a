"""What a call of BertForMaskedLM gives: the names of transformers' MaskedLMOutput, and the ways to read them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, overload

from torch import Tensor
from torch.utils import _pytree  # where torch keeps how a program's own classes are taken apart

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class MaskedLMOutput:
    """loss: a scalar, or None without labels. logits: (B, S, V), zeros where the attention mask is 0. If asked for,
    hidden_states: N + 1 of (B, S, D), and attentions: N of (B, H, S, S).

    `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, `loss, logits = out`, `"loss" in out`, `out.get("loss")` and
    `dict(out)` work. What is None is left out of all but the first. Going through it gives the values (transformers'
    own output gives their names there, so that `loss, logits = out` would be two words).
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: States | None = None
    attentions: States | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for _, value in self.items())

    def keys(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.items())

    def values(self) -> tuple[Any, ...]:
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return tuple((name, value) for name, value in named if value is not None)

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.items()).get(name, default)

    @overload
    def __getitem__(self, key: str | int) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"there is no {key!r}, only {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


_pytree.register_pytree_node(
    MaskedLMOutput,
    lambda output: (list(output.values()), output.keys()),
    lambda values, names: MaskedLMOutput(**{"loss": None, **dict(zip(names, values, strict=True))}),
    serialized_type_name="minibert.MaskedLMOutput",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
