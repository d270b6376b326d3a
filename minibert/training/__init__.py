"""Training BERT's masked language model, on a text of one's own.

    from minibert.training import Settings, train
    train(["corpus.txt"], init="minibert-uncased", out="OUT", settings=Settings(steps=1000))

The files, in reading order: settings.py (the recipe), tokens.py (text to token files), data.py (to the examples of each
step), step.py (one step, and the held-out lines), saving.py (what is left on the disk, and how a run goes on), run.py
(step after step). processes.py: what a run asks of the system.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minibert.training.run import Result, train
    from minibert.training.settings import Settings

__all__ = ["Result", "Settings", "train"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the processes that tokenize are to start without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'minibert.training' has no attribute {name!r}")
    return getattr(import_module(f"minibert.training.{'settings' if name == 'Settings' else 'run'}"), name)
