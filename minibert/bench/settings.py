"""What `minibert bench` is asked to measure: each field with a help text is an option of the command.
Without torch, since the command line reads this file.
"""

from dataclasses import dataclass
from typing import NamedTuple

from minibert.training.settings import option

TASKS = ("inference", "training")
PRECISIONS = ("float32", "bfloat16", "int8")


class Peer(NamedTuple):
    package: str  # that must be installed
    precision: str | None = None  # the only one that it has; None: those of --dtype
    trains: bool = False


PEERS = {
    "eager": Peer("transformers", trains=True),
    "sdpa": Peer("transformers", trains=True),
    "compiled": Peer("transformers", trains=True),
    "reduce-overhead": Peer("transformers", trains=True),
    "sdpa-asked": Peer("transformers"),
    "onnxruntime": Peer("onnxruntime", "float32"),
    "onnxruntime-int8": Peer("onnxruntime", "int8"),
    "openvino": Peer("openvino", "float32"),
    "openvino-bfloat16": Peer("openvino", "bfloat16"),
    "openvino-int8": Peer("openvino", "int8"),
}


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured. Raises ValueError for a value that is not known, with the name of its option."""

    model: str | None = None  # a name for from_pretrained; None: BERT-base's sizes with random weights
    revision: str | None = None  # of the model, if it is on the hub
    device: str = "auto"  # as `checks.find_device` has it
    layers: int = option(12, "layers of the random model; fewer for a quick look", metavar="N")
    dtype: tuple[str, ...] | None = option(
        None, f"some of {', '.join(PRECISIONS)} (default: all; nothing is trained in int8)", metavar="D,D"
    )
    task: str = option("both", "what to time", choices=(*TASKS, "both"))
    shapes: tuple[str, ...] | None = option(
        None,
        "rows x tokens, as in 8x128, or mixed, normal, lognormal (default: all; training: 8x128,mixed)",
        metavar="S,S",
    )
    rounds: int = option(9, "how often each is timed", metavar="N")
    peers: tuple[str, ...] = option(
        ("all",),
        f"all, none, or some of {', '.join(PEERS)}; the first five are forms of transformers (default: all)",
        metavar="P,P",
    )
    compile_layers: bool = option(False, "compile our layers for few tokens first, a minute or two for each type")
    memory: bool = option(False, "peak memory too, each contender in a process of its own")

    def __post_init__(self) -> None:
        short: dict[tuple[str, ...], tuple[str, ...]] = {("all",): tuple(PEERS), ("none",): ()}
        object.__setattr__(self, "peers", short.get(self.peers, self.peers))
        for name, number in (("rounds", self.rounds), ("layers", self.layers)):
            if number < 1:
                raise ValueError(f"--{name} must be at least 1, not {number}")
        for name, given, known in (
            ("peers", self.peers, PEERS),
            ("dtype", self.precisions, PRECISIONS),
            ("task", self.tasks, TASKS),
        ):
            if wrong := [one for one in given if one not in known] or (name == "dtype" and not given and [""]):
                raise ValueError(f"--{name} does not know {wrong[0]!r}: choose among {', '.join(known)}")
        if self.task == "training" and "int8" in self.precisions:
            raise ValueError(
                f"--task training with --dtype {','.join(self.precisions)}: nothing is trained in int8. Choose among "
                "float32 and bfloat16, or --task inference"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS if self.task == "both" else (self.task,)

    @property
    def precisions(self) -> tuple[str, ...]:
        if self.dtype is not None:
            return self.dtype
        return PRECISIONS if self.task != "training" else ("float32", "bfloat16")
