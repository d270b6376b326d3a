"""What `minibert bench` is asked to measure."""

from dataclasses import dataclass

from minibert.bench.contenders import PEERS

TASKS = ("inference", "training")
# The largest difference of a logit from minibert's in float32, over the largest logit. float32: the same sums in
# another order; bfloat16: some tens of roundings of 2^-8. int8 is reported and has no gate.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": None}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. Raises ValueError for a value that is not known, with the name of its option."""

    model: str | None = None  # a name for from_pretrained; None: BERT-base's sizes with random weights
    revision: str | None = None  # of the model, if it is on the hub
    layers: int = 12  # of that random model
    device: str = "auto"  # as `devices.find_device` has it
    precisions: tuple[str, ...] = ("float32", "bfloat16", "int8")
    tasks: tuple[str, ...] = TASKS
    shapes: tuple[str, ...] | None = None  # None: SHAPES for inference, TRAINING_SHAPES for training
    rounds: int = 9  # how often each contender is timed
    peers: tuple[str, ...] = PEERS
    memory: bool = False  # run each contender once more, in a process of its own, for its peak memory

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        for name, given, known in (
            ("--peers", self.peers, PEERS),
            ("--dtype", self.precisions, tuple(TOLERANCE)),
            ("--task", self.tasks, TASKS),
        ):
            if wrong := [one for one in given if one not in known]:
                raise ValueError(f"{name} does not know {wrong[0]!r}: choose among {', '.join(known)}")
            if not given and name != "--peers":
                raise ValueError(f"{name} is empty: choose among {', '.join(known)}")
        if self.tasks == ("training",) and "int8" in self.precisions:
            raise ValueError(
                f"--task training with --dtype {','.join(self.precisions)}: nothing is trained in int8. Choose among "
                "float32 and bfloat16, or --task inference"
            )
