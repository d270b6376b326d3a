"""What a study holds: every number of every view, as lists. result.py fills it in; page.py and text.py show it."""

from dataclasses import dataclass, field

from minibert.study.changes import LayerChange
from minibert.study.cost import Part
from minibert.study.guesses import Guess, Guesses
from minibert.study.heads import Head
from minibert.study.maps import Maps
from minibert.study.reading import Reading
from minibert.study.words import Influence


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    heads: int
    hidden_size: int
    feed_forward_size: int
    vocabulary: int
    parameters: int


@dataclass(frozen=True)
class Answer:
    """The best words at one place, from the whole model."""

    position: int
    best: list[Guess]


@dataclass(frozen=True)
class Facts:
    """What BERT does with one text. A view that cannot be shown is empty, and `left_out` says why."""

    model: Model
    reading: Reading
    targets: list[str]
    answers: list[Answer]
    shares: dict[str, list[float]] = field(default_factory=dict)  # view 1: of word, position and segment
    guesses: list[Guesses] = field(default_factory=list)  # view 2: of each followed place
    influence: list[Influence] = field(default_factory=list)  # view 3: of each word
    looks: list[Head] = field(default_factory=list)  # view 4: the heads by their weights, and by what they take
    takes: list[Head] = field(default_factory=list)
    maps: Maps | None = None
    changes: list[LayerChange] = field(default_factory=list)  # view 5: of each layer
    cost: list[Part] = field(default_factory=list)  # view 6
    left_out: dict[str, str] = field(default_factory=dict)
