"""The training loop: packed batches, the head on the masked positions only, one process or many.

Recipe: Devlin et al. 2019, appendix A.2: Adam with decoupled weight decay 0.01 (none on biases and LayerNorm),
warm-up, then linear decay of the learning rate; google-research/bert, optimization.py. The loss of a step is the
mean over the masked tokens of its whole batch, however many passes and processes the batch is cut into.
"""

import hashlib
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minibert.config import BertConfig
from minibert.kernels import quick_dropout
from minibert.loss import masked_lm_loss
from minibert.masked_lm import BertForMaskedLM
from minibert.masking import example_generator
from minibert.model import EncoderLayer
from minibert.packing import PackedBatch
from minibert.training import saving
from minibert.training.data import Corpus, Example, masked_rows
from minibert.training.ranks import ALONE, Ranks
from minibert.training.saving import Progress
from minibert.training.tokens import TokenFile

SCHEDULES = ("linear", "cosine")
DTYPES = ("float32", "bfloat16")
Figures = dict[str, dict[str, float]]  # of each text and of "all": loss, top1, masked_tokens


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is learnt: steps, of the optimizer. tokens_per_step: about so many tokens in each, over all processes.
    max_length: tokens in a row, at most. short_fraction: share of rows that are one line alone. learning_rate:
    its peak, reached after the share `warmup` of the steps; from there it falls to 0 by `schedule`.
    weight_decay: of matrices. clip: the longest gradient. dropout: use the model's own dropout rates. dtype: in
    which matrices are multiplied; the weights are float32.

    How it is computed, which may change when a run goes on: micro_tokens: tokens in one pass, at most; a step is
    as many passes as it takes (None: one). checkpoint_activations: keep only the input of each layer, and compute
    the layer again for the gradient: less memory, more time. compile: the layers, with torch.compile. workers:
    processes that make batches ahead. save_every, evaluate_every: steps between checkpoints, and between looks
    at the held-out lines.
    """

    steps: int
    tokens_per_step: int = 8192
    max_length: int = 128
    short_fraction: float = 0.3
    learning_rate: float = 3e-4
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: bool = True
    dtype: str = "bfloat16"
    seed: int = 0

    micro_tokens: int | None = None
    checkpoint_activations: bool = False
    compile: bool = False
    workers: int = 0
    save_every: int = 500
    evaluate_every: int = 500

    def __post_init__(self) -> None:
        for key, least in (("steps", 1), ("save_every", 1), ("evaluate_every", 1), ("workers", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, not {getattr(self, key)}")
        if self.max_length < 3:
            raise ValueError(f"max_length must be at least 3, for [CLS], a token and [SEP], not {self.max_length}")
        for key in ("tokens_per_step", "micro_tokens"):
            tokens = getattr(self, key)
            if tokens is not None and tokens < self.max_length:
                raise ValueError(f"{key} is {tokens}: a row of max_length {self.max_length} would not fit")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, and {self.seed} does not")
        for key in ("learning_rate", "clip"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be a number above 0, not {getattr(self, key)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, not {self.weight_decay}")
        for key in ("warmup", "short_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is a share, from 0 to 1, not {getattr(self, key)}")
        for key, allowed in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, not {getattr(self, key)!r}")

    def described(self) -> dict[str, Any]:
        """The settings that a run must keep when it goes on."""
        free = ("micro_tokens", "checkpoint_activations", "compile", "workers", "save_every", "evaluate_every")
        return {key: value for key, value in asdict(self).items() if key not in free}

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        left = (self.steps - step) / max(1, self.steps - warm)  # from 1 down to 0
        return self.learning_rate * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases and LayerNorm (optimization.py, exclude_from_weight_decay)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------------------------------- batches


class Share(NamedTuple):
    """What one rank computes of one step: the passes, how many tokens they are, and where the step is in the data."""

    epoch: int
    step_in_epoch: int
    tokens: int
    passes: list[Example]


class Shares(Dataset[Share]):
    """Makes the share of rank `rank`. Rows alike in length come together: that wastes least on a GPU."""

    def __init__(self, corpus: Corpus, ranks: Ranks, micro_tokens: int | None) -> None:
        self.corpus = corpus
        self.rank, self.size = ranks.rank, ranks.size
        self.micro_tokens = micro_tokens

    def __getitem__(self, step: tuple[int, int, list[int]]) -> Share:
        epoch, step_in_epoch, numbers = step
        length = dict(zip(numbers, self.corpus.lengths(epoch, numbers), strict=True))
        mine = sorted(numbers, key=lambda number: -length[number])[self.rank :: self.size]
        passes = [self.corpus.examples(epoch, some) for some in cut(mine, length, self.micro_tokens)]
        if not passes:  # fewer rows than ranks: take part all the same, with a row in which nothing is asked
            idle = self.corpus.examples(epoch, numbers[:1])
            passes = [Example(idle.batch, idle.positions[:0], idle.targets[:0])]
        return Share(epoch, step_in_epoch, sum(length[number] for number in mine), passes)


def cut(numbers: Sequence[int], length: Mapping[int, int], most: int | None) -> list[list[int]]:
    """The rows with these numbers in their order, cut into runs of at most `most` tokens."""
    passes: list[list[int]] = []
    room = 0.0
    for number in numbers:
        if length[number] > room:
            passes.append([])
            room = math.inf if most is None else most
        passes[-1].append(number)
        room -= length[number]
    return passes


def shares(corpus: Corpus, settings: Settings, progress: Progress, ranks: Ranks) -> Iterable[Share]:
    """The shares of all the steps from `progress` on."""

    def steps(begin: tuple[int, int]) -> Iterator[tuple[int, int, list[int]]]:
        for epoch in count(begin[0]):
            for step_in_epoch, numbers in enumerate(corpus.steps(epoch)):
                if (epoch, step_in_epoch) >= begin:
                    yield epoch, step_in_epoch, numbers

    return DataLoader(
        Shares(corpus, ranks, settings.micro_tokens),
        batch_size=None,
        sampler=islice(steps((progress.epoch, progress.step_in_epoch)), settings.steps - progress.step),
        num_workers=settings.workers,
        multiprocessing_context="fork" if settings.workers else None,  # the token files stay mapped, and are not copied
        collate_fn=_as_it_is,
    )


def _as_it_is(share: Any) -> Any:
    return share


# ------------------------------------------------------------------------------------------------------------ one step


class LossSum(nn.Module):
    """What DistributedDataParallel wraps: its forward() is the sum of the loss over the targets."""

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch, positions: Tensor, targets: Tensor) -> Tensor:
        return masked_lm_loss(self.model.predict(batch, positions), targets).sum


def accumulate(objective: nn.Module, passes: Sequence[Example], targets: float, dtype: str, ranks: Ranks) -> float:
    """Add to each parameter's gradient that of the mean loss over `targets`, which is the number of masked tokens in
    the step: in all passes of all ranks. Returns the sum of the loss over the passes of this rank.
    """
    device = next(objective.parameters()).device
    losses: list[Tensor] = []
    for number, example in enumerate(passes, start=1):
        batch, positions, answers = example.batch.to(device), example.positions.to(device), example.targets.to(device)
        with ExitStack() as around:
            if isinstance(objective, DistributedDataParallel) and number < len(passes):
                around.enter_context(objective.no_sync())  # gradients go over the wire once a step
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = objective(batch, positions, answers)
            # Over the ranks, DistributedDataParallel takes the mean of the gradients, and this is a part of a sum.
            (loss * (ranks.size / targets)).backward()
        losses.append(loss.detach())
    return sum(loss.item() for loss in losses)


def take_step(
    objective: nn.Module, optimizer: torch.optim.Optimizer, share: Share, step: int, settings: Settings, ranks: Ranks
) -> dict[str, Any]:
    """One step of the optimizer, `step` counted from 0, and what there is to say about it; the loss is None where no
    token was masked. Raises FloatingPointError, before the weights are touched, if the loss or the gradient is not a
    number any more.
    """
    targets, tokens = ranks.sum(sum(len(example.targets) for example in share.passes), share.tokens)
    # Dropout draws from torch's own generator, seeded anew for each step: so there is no state of it to save.
    torch.manual_seed(random.Random(f"{settings.seed} {step} {ranks.rank}").getrandbits(63))
    optimizer.zero_grad()
    loss_sum = accumulate(objective, share.passes, max(1, targets), settings.dtype, ranks)
    loss = ranks.sum(loss_sum)[0] / max(1, targets)
    norm = nn.utils.clip_grad_norm_(objective.parameters(), settings.clip).item()
    rate = settings.rate(step)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss}, the length of the gradient {norm}. The weights were not touched, "
            f"and what was saved before stands. Is a learning rate of {settings.learning_rate} too high?"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return {
        "loss": loss if targets else None,
        "learning_rate": rate,
        "gradient_norm": norm,
        "masked_tokens": int(targets),
        "tokens": int(tokens),
    }


@contextmanager
def wrapped_layers(
    model: BertForMaskedLM, *, compile: bool = False, checkpoint_activations: bool = False
) -> Iterator[None]:
    """Within this block the encoder layers are compiled, or keep only their input for the backward pass, as asked; and
    dropout on the CPU is quick (compiled code has its own).
    """
    with ExitStack() as around:
        if not compile and model.embeddings.word.weight.is_cpu:
            around.enter_context(quick_dropout(model))
        try:
            for layer in model.layers:
                assert isinstance(layer, EncoderLayer)
                if compile:
                    # Attention stays outside: its loop over the lengths would make another graph of every batch.
                    vars(layer.attention)["forward"] = torch.compiler.disable(layer.attention.forward)
                    vars(layer)["forward"] = torch.compile(layer.forward, dynamic=True)
                if checkpoint_activations:
                    vars(layer)["forward"] = partial(recompute, layer.forward, use_reentrant=False)
            yield
        finally:
            for module in model.modules():
                vars(module).pop("forward", None)


# ----------------------------------------------------------------------------------------------------------- the loop


def train(
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
    """Train `model` in place and write to `out` what saving.py lists. Returns the figures on held-out lines after the
    last step, or None if `stop` was set before that: then a checkpoint was saved, and the run can go on.

    checkpoint: go on from here; `model` was read from it. Raises ValueError if the rows are longer than the model
    allows or the tokenizer is not its own; FloatingPointError, before the weights are touched, if loss or gradient are
    not numbers any more; OSError if a file cannot be written. The last checkpoint then stands.
    """
    require_fit(model, tokenizer, settings)
    corpus = Corpus(
        files,
        tokenizer,
        vocab_size=model.config.vocab_size,
        max_length=settings.max_length,
        short_fraction=settings.short_fraction,
        tokens_per_step=settings.tokens_per_step,
        seed=settings.seed,
    )
    model.train(settings.dropout)
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, eps=1e-6, fused=True)
    progress = Progress() if checkpoint is None else saving.restore(checkpoint, model, optimizer)
    objective: nn.Module = LossSum(model)
    if ranks.size > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
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
            line: dict[str, Any] = {"step": progress.step, "epoch": share.epoch, **taken, "tokens_per_second": speed}
            last = progress.step == settings.steps
            if last or progress.step % settings.evaluate_every == 0:
                model.eval()
                figures = evaluate(model, tokenizer, files, max_length=settings.max_length, ranks=ranks)
                model.train(settings.dropout)
                line["held_out"] = _without_nan(figures)
                if figures["all"]["loss"] < (math.inf if progress.best_loss is None else progress.best_loss):
                    progress.best_step, progress.best_loss = progress.step, figures["all"]["loss"]
                    if ranks.first:
                        saving.save_model(out / "best", model, tokenizer)
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


def describe(
    init: str, config: BertConfig, tokenizer: Tokenizer, files: Sequence[TokenFile], settings: Settings
) -> dict[str, Any]:
    """What a run is; one that goes on must be the same (`saving.open_run`). config: what `init` says the model is."""
    texts = {
        f"text {number}": f"{file.name}:{file.weight:g} (SHA-256 {file.sha256[:16]})"
        for number, file in enumerate(files, start=1)
    }
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    sizes = {f"configuration's {key}": value for key, value in asdict(config).items()}
    return {"init": init, **sizes, "tokenizer": f"SHA-256 {digest[:16]}", **settings.described(), **texts}


def _without_nan(figures: Figures) -> dict[str, dict[str, float | None]]:
    """For JSON, which has no NaN."""
    return {
        name: {key: None if math.isnan(value) else value for key, value in of_text.items()}
        for name, of_text in figures.items()
    }


def require_fit(model: BertForMaskedLM, tokenizer: Tokenizer, settings: Settings) -> None:
    """Raise ValueError unless the rows fit the model's positions, and the tokenizer's ids its vocabulary."""
    if settings.max_length > model.config.max_position_embeddings:
        raise ValueError(
            f"max_length {settings.max_length} is more than the {model.config.max_position_embeddings} positions "
            "that the model has"
        )
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {ids} tokens, the model only {model.config.vocab_size}: not its tokenizer")


# ----------------------------------------------------------------------------------------------------------- held out


@torch.inference_mode()
def evaluate(
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    files: Sequence[TokenFile],
    *,
    max_length: int = 128,
    lines: int = 300,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Figures:
    """Loss (nats a token) and top-1 accuracy on masked tokens of each file's held-out lines, the first `lines`
    of each, one line a row, masked by BERT's recipe; and over all of them together, under "all". NaN where
    nothing is masked. The ranks share the work.
    """
    device = model.embeddings.word.weight.device
    sums: dict[str, list[float]] = {}  # loss, right answers, masked tokens
    for file in files:
        rows = [file.held_out.line(number)[: max_length - 2] for number in range(min(lines, len(file.held_out)))]
        here = torch.zeros(3, dtype=torch.float64)
        for at in range(64 * ranks.rank, len(rows), 64 * ranks.size):
            some = rows[at : at + 64]
            generators = [example_generator(seed, 1, number) for number in range(at, at + len(some))]
            example = masked_rows(some, generators, tokenizer, model.config.vocab_size)
            logits = model.predict(example.batch.to(device), example.positions.to(device)).cpu()  # (M, V)
            loss = masked_lm_loss(logits, example.targets)
            right = (logits.argmax(-1) == example.targets).sum()
            here += torch.stack([loss.sum, right, loss.count]).double()
        sums[file.name] = ranks.sum(*here.tolist())
    sums["all"] = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    return {
        name: {"loss": loss / count, "top1": right / count, "masked_tokens": count}
        if count
        else {"loss": math.nan, "top1": math.nan, "masked_tokens": 0}
        for name, (loss, right, count) in sums.items()
    }
