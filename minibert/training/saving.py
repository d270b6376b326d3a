"""What a run leaves on the disk (README.md lists it), and how it goes on from there.

Each file and folder appears whole, or not at all (checkpoint/files.py). So a run can be killed at any moment, and the
newest checkpoint stands. Once the model is there, under its final name, the run is finished, and has no checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from minibert.checkpoint.files import SCRATCH, NotOnDisk, read_json, whole_file, whole_folder
from minibert.checkpoint.hub import CONFIG
from minibert.checkpoint.reading import SafetensorsFile
from minibert.masked_lm import BertForMaskedLM
from minibert.training.processes import locked

RUN, METRICS, LOCK = "run.json", "metrics.jsonl", ".lock"
OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.json"


@dataclass
class Progress:
    """How far a run is. No state of a random generator is needed: masks and dropout follow from seed and step."""

    step: int = 0  # optimizer steps that are done
    epoch: int = 0  # of the next step
    step_in_epoch: int = 0  # number of the next step in its epoch, from 0
    best_loss: float | None = None  # the least loss on held-out lines so far
    best_step: int | None = None  # steps that were done then


# ------------------------------------------------------------------------------------------------- beginning, going on


@contextmanager
def folder_of_run(out: Path, *, resume: bool) -> Iterator[None]:
    """Check, before any work, that a run can begin or go on in `out`, and that files can be written there. While the
    block lasts, no other process can train in `out`. Raises ValueError or OSError.
    """
    begun = is_begun(out)
    if is_finished(out) and not (begun and resume):
        raise ValueError(f"{out} holds {'a finished run' if begun else 'a model already'}: choose another --out")
    with ExitStack() as around:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / f"{SCRATCH}probe"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            what = "it is a file" if out.is_file() else error.strerror
            raise OSError(f"--out {out}: nothing can be written there: {what}") from error  # without errno's number
        try:
            around.enter_context(locked(out / LOCK, wait=False))
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{out}: another process is training there now") from error
        if begun and not resume:
            raise ValueError(f"{out} holds a run that is not finished: add --resume to go on, or choose another --out")
        _remove_leftovers(out)
        yield


def is_begun(out: Path) -> bool:
    return (out / RUN).is_file()


def is_finished(out: Path) -> bool:
    return (out / CONFIG).is_file()


def open_run(out: Path, described: dict[str, Any]) -> None:
    """Write down what the run in `out` is, as JSON scalars by name; or, if that stands there, check that it is the same
    as `require_same` does.
    """
    if is_begun(out):
        require_same(out, dict.fromkeys(read_json(out / RUN), "not given") | described)
        return
    with whole_file(out / RUN) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def require_same(out: Path, described: dict[str, Any]) -> None:
    """Raise ValueError, naming both values, if the run in `out` was begun with anything other than `described`."""
    begun = read_json(out / RUN)
    for key, now in described.items():
        before = begun.get(key, "not given")
        if before != now:
            raise ValueError(
                f"{out}: this run was begun with {key} {before}, and now it is {now}: "
                "give what it was begun with, or choose another --out"
            )


def checkpoints(out: Path) -> list[Path]:
    """The folders checkpoint-N in `out`, the newest last."""
    steps = {int(match[1]): path for path in out.glob("*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps)]


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Give the optimizer the moments that it had when `checkpoint` was written, and return how far the run was. (The
    weights are read by `BertForMaskedLM.from_pretrained(checkpoint)`.)

    Raises ValueError, naming the file, if it is not whole.
    """
    path, keys = checkpoint / OPTIMIZER, ("step", "exp_avg", "exp_avg_sq")
    expected = {f"{name}.{key}" for name, _ in model.named_parameters() for key in keys}
    with SafetensorsFile(path) as file:
        if wrong := file.header.keys() ^ expected:
            raise ValueError(f"{path}: {min(wrong)} is missing, or belongs to no parameter of the model")
        for name, parameter in model.named_parameters():
            for key in keys:
                saved = file.read(f"{name}.{key}")
                like = saved if key == "step" else parameter  # the moments are laid out as the parameter is
                optimizer.state[parameter][key] = torch.empty_like(like, device=parameter.device).copy_(saved)
    values = read_json(checkpoint / PROGRESS)
    whole = [values.get(key) for key in ("step", "epoch", "step_in_epoch")]
    if values.keys() != asdict(Progress()).keys() or any(type(number) is not int or number < 0 for number in whole):
        raise ValueError(f"{checkpoint / PROGRESS} does not say how far the run is: {values}")
    return Progress(**values)


def cut_metrics(out: Path, step: int) -> None:
    """Drop the lines after `step` from metrics.jsonl, so that none is there twice when those steps are done again."""
    path = out / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError):  # the run was killed in the middle of it
            break
    with whole_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))


# -------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    out: Path, model: BertForMaskedLM, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write checkpoint-N, and only then delete the ones before it. Raises OSError, naming the folder, if it cannot be
    written; the one before it then stands.
    """
    folder, before = out / f"checkpoint-{progress.step}", checkpoints(out)
    if folder in before:  # the very one that we went on from
        return
    moments = {
        f"{name}.{key}": tensor.cpu()
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }
    stands = f"; {before[-1]} stands, go on from it with --resume" if before else ""
    with _told(folder, stands), whole_folder(folder) as new:
        model.save_pretrained(new, tokenizer=tokenizer)
        save_file(moments, new / OPTIMIZER)
        (new / PROGRESS).write_text(json.dumps(asdict(progress), indent=2, allow_nan=False) + "\n")
    for older in before:
        _remove(older)


def save_model(folder: Path, model: BertForMaskedLM, tokenizer: Tokenizer) -> None:
    """Write a model that `from_pretrained` reads, also in the place of an earlier one of the same run. It is whole at
    every moment. Raises OSError, naming the folder, if it cannot be written; what was there before then stands.
    """
    with _told(folder):
        folder.mkdir(exist_ok=True)
        model.save_pretrained(folder, tokenizer=tokenizer)


def finish(out: Path, model: BertForMaskedLM, tokenizer: Tokenizer) -> None:
    """Save the model after the last step, and delete the checkpoints, which are of no use any more."""
    save_model(out, model, tokenizer)
    for checkpoint in checkpoints(out):
        _remove(checkpoint)


@contextmanager
def _told(target: Path, what_stands: str = "") -> Iterator[None]:
    """An error while `target` is written, such as a full disk, becomes an OSError that names it."""
    try:
        yield
    except NotOnDisk:  # it is written
        raise
    except (OSError, SafetensorError) as error:  # SafetensorError has no number
        raise OSError(f"{target} could not be written: {error}{what_stands}") from error


def _remove(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that nothing half deleted is found under it."""
    gone = folder.with_name(f".old-{folder.name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _remove_leftovers(out: Path) -> None:
    """Delete what a killed run was still writing or deleting."""
    for path in [*out.glob(f"{SCRATCH}*"), *out.glob(f"best/{SCRATCH}*"), *out.glob(".old-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if is_finished(out):
        for checkpoint in checkpoints(out):
            _remove(checkpoint)
