"""How a model is trained: every number of the recipe in one place.

Recipe: Devlin et al. 2019, appendix A.2: Adam with decoupled weight decay 0.01 (none on biases and LayerNorm), warm-up,
then linear decay of the learning rate; google-research/bert, optimization.py.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEDULES = ("linear", "cosine")
DTYPES = ("float32", "bfloat16")
# What may change when a run goes on: it says how the steps are computed and when the run is saved, not what is learnt.
FREE = ("micro_tokens", "checkpoint_activations", "compile", "workers", "save_every", "evaluate_every")


def option(default: Any, help: str, **about: Any) -> Any:
    """A field that is an option of `minibert train`. ...: it must be given."""
    metadata = {"help": help, **about}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. Raises ValueError, naming the setting, for a value that makes no sense.

    Most are options of `minibert train`, whose help text is beside the field.
    """

    # What is learnt. A run that goes on must keep these.
    steps: int = option(..., "how many steps the optimizer takes", metavar="N")
    tokens_per_step: int = option(8192, "tokens in a step, about, over all passes and processes", metavar="N")
    max_length: int = option(128, "tokens in a row, at most, [CLS] and [SEP] included", metavar="TOKENS")
    short_fraction: float = 0.3  # share of the rows that are one line alone
    learning_rate: float = option(3e-4, "the highest one, after the warm-up", metavar="LR")
    schedule: str = option("linear", "how the learning rate falls to 0", choices=SCHEDULES)
    warmup: float = option(0.05, "share of the steps in which the learning rate rises", metavar="SHARE")
    weight_decay: float = 0.01  # of matrices
    clip: float = 1.0  # a gradient that is longer is made this long
    dropout: bool = option(True, "train without dropout")  # with the rates of the model's own configuration
    dtype: str = option("bfloat16", "in which matrices are multiplied; the weights are float32", choices=DTYPES)
    seed: int = option(0, "of the random weights, the order of the rows, the masks and dropout", metavar="N")

    # How it is computed and saved. These may change when a run goes on.
    micro_tokens: int | None = option(None, "tokens in one pass, at most (default: the whole step)", metavar="N")
    checkpoint_activations: bool = option(False, "compute each layer twice, and keep less in memory")
    compile: bool | None = option(None, "compile the layers with torch.compile (default: on CUDA, where Triton is)")
    workers: int = option(0, "processes that tokenize, and that make batches; 0: by need", metavar="N")
    save_every: int = option(500, "save a checkpoint every so many steps", metavar="STEPS")
    evaluate_every: int = option(500, "look at the held-out lines every so many steps", metavar="STEPS")

    def __post_init__(self) -> None:
        whole, above_0, share = "must be at least 1", "must be a number above 0", "is a share, from 0 to 1"
        for key, right, rule in (
            *((key, getattr(self, key) >= 1, whole) for key in ("steps", "save_every", "evaluate_every")),
            *((key, 0 < getattr(self, key) < math.inf, above_0) for key in ("learning_rate", "clip")),
            *((key, 0 <= getattr(self, key) <= 1, share) for key in ("warmup", "short_fraction")),
            ("workers", self.workers >= 0, "must be at least 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "must be at least 0"),
            ("max_length", self.max_length >= 3, "must be at least 3, for [CLS], a token and [SEP]"),
            ("seed", -(2**63) <= self.seed < 2**63, "must fit in 64 bits"),
            ("schedule", self.schedule in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}"),
            ("dtype", self.dtype in DTYPES, f"must be one of {', '.join(DTYPES)}"),
        ):
            if not right:
                raise ValueError(f"{key} {rule}, not {getattr(self, key)}")
        for key in ("tokens_per_step", "micro_tokens"):
            tokens = getattr(self, key)
            if tokens is not None and tokens < self.max_length:
                raise ValueError(f"{key} is {tokens}: a row of max_length {self.max_length} would not fit")

    def described(self) -> dict[str, Any]:
        """The settings that a run must keep when it goes on."""
        return {key: value for key, value in asdict(self).items() if key not in FREE}

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        left = (self.steps - step) / max(1, self.steps - warm)  # from 1 down to 0
        return self.learning_rate * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
