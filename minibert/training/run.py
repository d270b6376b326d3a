"""A run from its beginning, or from where it was, to its end: what `minibert train` does."""

import hashlib
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from tokenizers import Tokenizer

from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM
from minibert.training import saving
from minibert.training.evaluation import Figures
from minibert.training.loop import require_fit, train_steps
from minibert.training.ranks import join
from minibert.training.settings import Settings
from minibert.training.start import start_config, start_model, start_tokenizer
from minibert.training.tokens import TokenFile, token_files


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    ended: str  # "finished"; "stopped" by a signal, and saved; or "was finished" before
    figures: Figures | None  # on held-out lines, after the last step; None unless it finished now
    first: bool  # whether this process is the one that speaks for all of the run


def train(
    texts: Sequence[str],
    *,
    init: str,
    out: str | Path,
    settings: Settings,
    tokenizer: str | None = None,
    tokens: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    revision: str | None = None,
) -> Result:
    """Train a masked language model on text files, and save it in the folder `out`.

    texts: files, folders or globs, each with ":weight" if wanted (see `find_texts`). init: the name of a model to start
    from (of the hub's `revision`), or a config.json, to start from random weights. tokenizer: the name of a model whose
    tokenizer to use; None: that of `init`. tokens: the folder for token files; None: out/tokens. resume: go on with the
    run in `out`; if there is none, one begins. device: "cpu", "cuda", …; "auto": "cuda" where there is one.

    Under torchrun each process calls this, and they share the work (ranks.py). SIGINT (Ctrl-C) and SIGTERM end the run
    after the step that it is at, and save it; a second one ends it at once.

    Raises ValueError, FileNotFoundError or OSError for what cannot be trained, read or written; FloatingPointError if
    the loss is not a number any more. What was saved before stands.
    """
    if not str(out).strip():
        raise ValueError("--out needs the name of a folder")
    out = Path(out)
    with join(device) as ranks, ExitStack() as around, _lost_workers():
        if ranks.first:
            if resume and not saving.is_begun(out):
                warnings.warn(f"there is no run in {out} to go on with: one begins", stacklevel=2)
            around.enter_context(saving.folder_of_run(out, resume=resume))
        ranks.wait()
        pieces = start_tokenizer(init, tokenizer, revision=revision)
        finished = saving.is_finished(out)
        checkpoint = out if finished else next(reversed(saving.checkpoints(out)), None)
        if checkpoint is None:
            model = start_model(init, seed=settings.seed, device=ranks.device, revision=revision)
        else:
            model = BertForMaskedLM.from_pretrained(checkpoint, device=ranks.device)
        require_fit(model, pieces, settings)
        name, config = init if revision is None else f"{init} at {revision}", start_config(init, model)
        if finished:
            saving.require_same(out, describe(name, config, pieces, [], settings))
            return Result("was finished", None, ranks.first)
        files = token_files(texts, pieces, Path(tokens or out / "tokens"), workers=settings.workers or None)
        if ranks.first:
            saving.open_run(out, describe(name, config, pieces, files, settings))
            _warn_without_held_out(files, out)
        ranks.wait()
        with stopped_by_signals() as stop:
            figures = train_steps(model, pieces, files, out, settings, ranks=ranks, checkpoint=checkpoint, stop=stop)
        return Result("stopped" if figures is None else "finished", figures, ranks.first)


def describe(
    init: str, config: BertConfig, tokenizer: Tokenizer, files: Sequence[TokenFile], settings: Settings
) -> dict[str, Any]:
    """What a run is, for run.json: a run that goes on must be the same. config: of the model that it starts from."""
    texts = {
        f"text {number}": f"{file.name}:{file.weight:g} (SHA-256 {file.sha256[:16]})"
        for number, file in enumerate(files, start=1)
    }
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    sizes = {f"configuration's {key}": value for key, value in asdict(config).items()}
    return {"init": init, **sizes, "tokenizer": f"SHA-256 {digest[:16]}", **settings.described(), **texts}


@contextmanager
def stopped_by_signals() -> Iterator[Event]:
    """An event that SIGINT or SIGTERM sets while the block lasts. The second signal does what it always does."""
    stop = Event()
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield stop
        return

    def ask_to_stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _lost_workers() -> Iterator[None]:
    """Turn the error of a worker process that was killed, perhaps for lack of memory, into one that says so."""
    try:
        yield
    except RuntimeError as error:  # BrokenProcessPool of the processes that tokenize, or DataLoader's own
        if "DataLoader worker" not in str(error) and "process pool" not in str(error):
            raise
        raise ChildProcessError(f"a worker process ended before its work was done (out of memory?): {error}") from error


def _warn_without_held_out(files: Sequence[TokenFile], out: Path) -> None:
    if not any(len(file.held_out) for file in files):
        warnings.warn(
            f"the texts are so short that no line is held out: there will be no figures and no {out / 'best'}",
            stacklevel=3,
        )
