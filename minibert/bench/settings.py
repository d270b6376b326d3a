"""What `minibert bench` is asked to measure: each field is an option of the command, with its help text beside it.
Without torch, since the command line reads this file.
"""

from dataclasses import dataclass, field

TASKS = ("inference", "training")
PRECISIONS = ("float32", "bfloat16", "int8")
TRAINING_PEERS = ("eager", "sdpa", "compiled", "reduce-overhead")
# The peers that have one precision, whatever --dtype says.
PRECISION = {
    "onnxruntime": "float32",
    "onnxruntime-int8": "int8",
    "openvino": "float32",
    "openvino-bfloat16": "bfloat16",
    "openvino-int8": "int8",
}
PEERS = (*TRAINING_PEERS, "sdpa-asked", *PRECISION)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. Raises ValueError for a value that is not known, with the name of its option."""

    model: str | None = None  # a name for from_pretrained; None: BERT-base's sizes with random weights
    revision: str | None = None  # of the model, if it is on the hub
    device: str = "auto"  # as `devices.find_device` has it
    layers: int = field(
        default=12, metadata={"help": "layers of the random model; fewer for a quick look", "metavar": "N"}
    )
    dtype: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "one or several of float32, bfloat16, int8 (default: all; nothing is trained in int8)",
            "metavar": "D,D",
        },
    )
    task: str = field(default="both", metadata={"help": "what to time", "choices": (*TASKS, "both")})
    shapes: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "rows x tokens, as in 8x128, or mixed, normal, lognormal (default: all; training: 8x128,mixed)",
            "metavar": "S,S",
        },
    )
    rounds: int = field(default=9, metadata={"help": "how often each is timed", "metavar": "N"})
    peers: tuple[str, ...] = field(
        default=("all",),
        metadata={
            "help": f"all, none, or some of: {', '.join(PEERS[:5])} (transformers), {', '.join(PRECISION)}. The last "
            "five have one precision each, whatever --dtype says (default: all)",
            "metavar": "P,P",
        },
    )
    memory: bool = field(default=False, metadata={"help": "peak memory too, each contender in a process of its own"})

    def __post_init__(self) -> None:
        short: dict[tuple[str, ...], tuple[str, ...]] = {("all",): PEERS, ("none",): ()}
        object.__setattr__(self, "peers", short.get(self.peers, self.peers))
        for name, least in (("rounds", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        for name, given, known in (
            ("--peers", self.peers, PEERS),
            ("--dtype", self.precisions, PRECISIONS),
            ("--task", self.tasks, TASKS),
        ):
            if wrong := [one for one in given if one not in known]:
                raise ValueError(f"{name} does not know {wrong[0]!r}: choose among {', '.join(known)}")
            if not given and name != "--peers":
                raise ValueError(f"{name} is empty: choose among {', '.join(known)}")
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
