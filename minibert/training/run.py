"""A run from its beginning, or from where it was, to its end: what `minibert train` does."""

import hashlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minibert.config import BertConfig
from minibert.masked_lm import BertForMaskedLM
from minibert.tokenizer import as_tokenizer, count_ids, load_tokenizer, require_id
from minibert.training import saving
from minibert.training.data import ALONE, Corpus, Ranks, ahead, join, shares
from minibert.training.saving import Progress
from minibert.training.settings import Settings
from minibert.training.step import (
    Figures,
    LossSum,
    compiles,
    evaluate,
    make_optimizer,
    take_step,
    wrapped_layers,
)
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

    Under torchrun each process calls this, and they share the work (data.py). SIGINT (Ctrl-C) and SIGTERM end the run
    after the step that it is at, and save it; a second one ends it at once.

    Raises ValueError, FileNotFoundError or OSError for what cannot be trained, read or written; FloatingPointError if
    the loss is not a number any more. What was saved before stands.
    """
    if not str(out).strip():
        raise ValueError("--out needs the name of a folder")
    if init.endswith(".json") and revision is not None:
        raise ValueError(f"revision {revision!r} was given, but {init} is a file: revisions are the hub's")
    out, name = Path(out), init if revision is None else f"{init} at {revision}"
    with join(device) as ranks, ExitStack() as around, _lost_workers():
        if ranks.first:
            if resume and not saving.is_begun(out):
                warnings.warn(f"there is no run in {out} to go on with: one begins", stacklevel=2)
            around.enter_context(saving.folder_of_run(out, resume=resume))
        ranks.wait()
        config = BertConfig.from_json_file(init) if init.endswith(".json") else None
        pieces = start_tokenizer(init, tokenizer, revision)
        finished = saving.is_finished(out)
        checkpoint = out if finished else next(reversed(saving.checkpoints(out)), None)
        if checkpoint is None:
            model = start_model(init, config, settings.seed, ranks.device, revision)
        else:
            model = BertForMaskedLM.from_pretrained(checkpoint, device=ranks.device)
        require_fit(model, pieces, settings)
        config = config or model.config  # that of the file may have changed since the run began
        if finished:
            saving.require_same(out, describe(name, config, pieces, [], settings))
            return Result("was finished", None, ranks.first)
        files = token_files(texts, pieces, Path(tokens or out / "tokens"), workers=settings.workers or None)
        if ranks.first:
            saving.open_run(out, describe(name, config, pieces, files, settings))
            if not any(len(file.held_out) for file in files):
                missing = f"there will be no figures and no {out / 'best'}"
                warnings.warn(f"the texts are so short that no line is held out: {missing}", stacklevel=2)
        ranks.wait()
        with stopped_by_signals() as stop:
            figures = train_steps(model, pieces, files, out, settings, ranks=ranks, checkpoint=checkpoint, stop=stop)
        return Result("stopped" if figures is None else "finished", figures, ranks.first)


def start_model(init: str, config: BertConfig | None, seed: int, device: str, revision: str | None) -> BertForMaskedLM:
    """The model named `init`, an encoder without a head too; or with that configuration, random weights of the seed."""
    if config is None:
        return BertForMaskedLM.from_pretrained(init, device=device, revision=revision, init_missing_head=True)
    torch.manual_seed(seed)
    return BertForMaskedLM(config).to(device)


def start_tokenizer(init: str, tokenizer: str | None, revision: str | None) -> Tokenizer:
    """The tokenizer of the model named `tokenizer`; None: that of `init`, or the one that lies beside that file."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    try:
        return load_tokenizer(Path(init).parent if init.endswith(".json") else init, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: name a model that has one with --tokenizer") from error


def require_fit(model: BertForMaskedLM, tokenizer: Tokenizer, settings: Settings) -> None:
    """Raise ValueError unless rows and ids fit the model, and the tokenizer has the tokens that a row needs."""
    longest, ids = model.config.max_position_embeddings, count_ids(tokenizer)
    if settings.max_length > longest:
        raise ValueError(f"max_length {settings.max_length} is more than the {longest} positions that the model has")
    if ids > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {ids} tokens, the model only {model.config.vocab_size}: not its tokenizer")
    for token in ("[CLS]", "[SEP]", "[MASK]"):
        require_id(tokenizer, token)


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


# ------------------------------------------------------------------------------------------------------ step after step


def train_steps(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    files: Sequence[TokenFile],
    out: Path,
    settings: Settings,
    *,
    ranks: Ranks = ALONE,
    checkpoint: Path | None = None,
    stop: Event | None = None,
) -> Figures | None:
    """Train `model` in place, and write to `out` what saving.py lists. Returns the figures on the held-out lines after
    the last step; or None if `stop` was set before that. Then a checkpoint was saved, and the run can go on.

    checkpoint: go on from here; `model` was read from it. Raises as `train` does.
    """
    tokenizer = as_tokenizer(tokenizer)
    corpus = Corpus(
        files,
        tokenizer,
        max_length=settings.max_length,
        short_fraction=settings.short_fraction,
        tokens_per_step=settings.tokens_per_step,
        seed=settings.seed,
    )
    model.train(settings.dropout)
    optimizer = make_optimizer(model, settings)
    objective: nn.Module = LossSum(model)
    if ranks.size > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    progress = Progress() if checkpoint is None else saving.restore(checkpoint, model, optimizer)
    figures: Figures = {}
    with ExitStack() as around:
        compiled, again = compiles(settings, model.device), settings.checkpoint_activations
        around.enter_context(wrapped_layers(model, compile=compiled, checkpoint_activations=again))
        log = around.enter_context(open_log(out, progress.step, settings.steps)) if ranks.first else None
        began = time.perf_counter()
        begin, left = (progress.epoch, progress.step_in_epoch), settings.steps - progress.step
        for share in ahead(shares(corpus, settings, begin, left, ranks), model.device):
            taken = take_step(objective, optimizer, share, progress.step, settings, ranks)
            progress.step += 1
            progress.epoch, progress.step_in_epoch = share.epoch, share.step_in_epoch + 1
            speed = round(taken["tokens"] / (time.perf_counter() - began))
            line = {"step": progress.step, "epoch": share.epoch, **taken, "tokens_per_second": speed}
            last = progress.step == settings.steps
            if last or progress.step % settings.evaluate_every == 0:
                figures = line["held_out"] = look_at_held_out(model, tokenizer, files, out, settings, progress, ranks)
            stopping = ranks.sum(stop is not None and stop.is_set()) != [0] and not last
            if log is not None:
                log(line)
                if last:
                    saving.finish(out, model, tokenizer)
                elif stopping or progress.step % settings.save_every == 0:
                    saving.save_checkpoint(out, model, tokenizer, optimizer, progress)
            if stopping:
                return None
            began = time.perf_counter()
    ranks.wait()  # until the first one has written the files
    model.eval()
    return figures


def look_at_held_out(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    files: Sequence[TokenFile],
    out: Path,
    settings: Settings,
    progress: Progress,
    ranks: Ranks,
) -> Figures:
    """The figures on the held-out lines. If the loss is the least so far, the model is saved as the best."""
    model.eval()
    figures = evaluate(model, tokenizer, files, max_length=settings.max_length, ranks=ranks)
    model.train(settings.dropout)
    loss = figures["all"]["loss"]  # None if no line is held out
    if loss is not None and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_step, progress.best_loss = progress.step, loss
        if ranks.first:
            saving.save_model(out / "best", model, tokenizer)
    return figures


@contextmanager
def open_log(out: Path, step: int, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes what happened in a step as a line of metrics.jsonl, and on the progress bar."""
    saving.cut_metrics(out, step)
    with (
        open(out / saving.METRICS, "a", encoding="utf-8") as file,
        tqdm(total=steps, initial=step, desc="training", unit=" steps", mininterval=1) as bar,
    ):

        def log(line: dict[str, Any]) -> None:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            bar.update()
            if line["loss"] is not None:
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']} tokens/s", refresh=False)

        yield log
