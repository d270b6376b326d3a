"""A fault in one place only: a known fault in the head, in the encoder or in one layer, or one LayerNorm's eps."""

from collections.abc import Callable
from typing import Any

from minibert.parity.steps import Steps

ENCODER, LAYERS, HEAD = ("embeddings.", "layers."), ("layers.",), ("head.",)


def methods(kind: type[Steps]) -> set[str]:
    """Which methods of Steps a fault replaces."""
    return {name for name in vars(kind) if callable(getattr(Steps, name, None))}


def confined(fault: type[Steps], sections: tuple[str, ...], where: str) -> type[Steps]:
    """The fault in the sections whose names start with one of `sections`. where: these, in words."""

    def only_there(name: str) -> Callable[..., Any]:
        def method(self: Steps, *given: Any) -> Any:
            kind = fault if self.section.startswith(sections) else Steps
            return getattr(kind, name)(self, *given)

        return method

    return type(
        fault.__name__,
        (fault,),
        {
            "title": f"{fault.title}, {where}",
            "sections_of_fault": sections,
            **{n: only_there(n) for n in methods(fault)},
        },
    )


def eps_at(place: str, value: float, configured: float) -> type[Steps]:
    """An eps of `value` in the LayerNorm that gives the tensor `place`, and the configured one elsewhere."""
    attributes = {
        "title": f"LayerNorm eps {value:.1e}, at {place} alone",
        "remedy": f"set this LayerNorm's eps to config's layer_norm_eps ({configured:.0e})",
        "source": "the numbers of this trace: this eps fits them",
        "eps": lambda self, name: value if name == place else configured,
    }
    return type("EpsAt", (Steps,), attributes)


def first_section(kind: type[Steps], layers: int) -> int:
    """The number of the first section that a fault can change: 0 the embeddings, then the layers, then the head."""
    changed = {name for each in kind.__mro__ if each not in Steps.__mro__ for name in methods(each)}
    only = getattr(kind, "sections_of_fault", ENCODER)
    if changed <= {"head", "head_activation", "decode", "decoder", "decoder_bias"} or only == HEAD:
        return layers + 1
    if only == LAYERS:
        return 1
    if only != ENCODER:  # one layer
        return 1 + int(only[0].split(".")[1])
    return 0 if changed & {"embed", "types", "positions", "embeddings", "layer_norm", "eps", "made"} else 1
