"""Training BERT's masked language model, on a text of one's own.

    from minibert.training import Settings, train
    train(["corpus.txt"], init="minibert-uncased", out="OUT", settings=Settings(steps=1000))

The files, in reading order: tokens.py (text to token files), data.py (to examples), batches.py (to the steps of a run),
step.py (one step), evaluation.py (held-out lines), loop.py (step after step), saving.py (what is left on the disk, and
how a run goes on), ranks.py (several processes), run.py (all of it).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minibert.training.run import Result, train
    from minibert.training.settings import Settings

__all__ = ["Result", "Settings", "train"]

_ROOMS = {"Result": "run", "Settings": "settings", "train": "run"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the processes that tokenize are to start without torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'minibert.training' has no attribute {name!r}")
    return getattr(import_module(f"minibert.training.{_ROOMS[name]}"), name)
