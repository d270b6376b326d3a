"""The training loop: step after step, with a look at the held-out lines and a checkpoint now and then."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from minibert.masked_lm import BertForMaskedLM
from minibert.tokenizer import as_tokenizer, count_ids, require_id
from minibert.training import saving
from minibert.training.batches import shares
from minibert.training.data import Corpus
from minibert.training.evaluation import Figures, evaluate
from minibert.training.ranks import ALONE, Ranks
from minibert.training.saving import Progress
from minibert.training.settings import Settings
from minibert.training.step import make_objective, make_optimizer, take_step, wrapped_layers
from minibert.training.tokens import TokenFile


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

    checkpoint: go on from here; `model` was read from it. Raises ValueError as `require_fit` does; FloatingPointError,
    before the weights are touched, if the loss or the gradient is not a number any more; OSError if a file cannot be
    written. After an error the last checkpoint stands.
    """
    tokenizer = as_tokenizer(tokenizer)
    require_fit(model, tokenizer, settings)
    corpus = Corpus(
        files,
        tokenizer,
        max_length=settings.max_length,
        short_fraction=settings.short_fraction,
        tokens_per_step=settings.tokens_per_step,
        seed=settings.seed,
    )
    model.train(settings.dropout)
    optimizer, objective = make_optimizer(model, settings), make_objective(model, ranks)
    progress = Progress() if checkpoint is None else saving.restore(checkpoint, model, optimizer)
    figures: Figures = {}
    with ExitStack() as around:
        around.enter_context(
            wrapped_layers(model, compile=settings.compile, checkpoint_activations=settings.checkpoint_activations)
        )
        log = around.enter_context(open_log(out, progress.step, settings.steps)) if ranks.first else None
        began = time.perf_counter()
        for share in shares(corpus, settings, progress, ranks):
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
    recent: deque[dict[str, Any]] = deque(maxlen=50)
    with (
        open(out / saving.METRICS, "a", encoding="utf-8") as file,
        tqdm(total=steps, initial=step, desc="training", unit=" steps", mininterval=1) as bar,
    ):

        def log(line: dict[str, Any]) -> None:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            bar.update()
            if line["loss"] is not None:
                recent.append(line)
                loss, speed = (sum(one[key] for one in recent) / len(recent) for key in ("loss", "tokens_per_second"))
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s", refresh=False)

        yield log


def require_fit(model: BertForMaskedLM, tokenizer: Tokenizer, settings: Settings) -> None:
    """Raise ValueError unless the rows fit the model's positions, the tokenizer's ids fit its vocabulary, and the
    tokenizer has the special tokens that a row needs.
    """
    if settings.max_length > model.config.max_position_embeddings:
        raise ValueError(
            f"max_length {settings.max_length} is more than the {model.config.max_position_embeddings} positions "
            "that the model has"
        )
    ids = count_ids(tokenizer)
    if ids > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {ids} tokens, the model only {model.config.vocab_size}: not its tokenizer")
    for token in ("[CLS]", "[SEP]", "[MASK]"):
        require_id(tokenizer, token)
