"""What a run leaves on the disk, and how it goes on from there.

    OUT/run.json          what the run is: its settings, its texts; a run that goes on must be the same one
    OUT/metrics.jsonl     a line for each step
    OUT/checkpoint-N/     everything that is needed to go on after step N: the model, the optimizer's moments, the
                          place in the data. The newest is kept, and none once the run is finished
    OUT/best/             the model with the least loss on held-out lines, so far
    OUT/config.json, …    the model after the last step: it is there when the run is finished

Whatever stands under its name is whole: a folder or file is written under another name, brought to the disk, and
renamed. So a run can be killed at any moment, and the newest checkpoint stands. Tensors are in safetensors, all
else in JSON; nothing is a pickle.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from minibert.checkpoint import read_header
from minibert.files import read_json
from minibert.hub import CONFIG, WEIGHTS
from minibert.masked_lm import BertForMaskedLM

RUN, METRICS, LOCK = "run.json", "metrics.jsonl", ".lock"
OPTIMIZER, PROGRESS, TOKENIZER = "optimizer.safetensors", "progress.json", "tokenizer.json"


@dataclass
class Progress:
    """How far a run is: optimizer steps done; the next one is number step_in_epoch of its epoch. best_loss: the
    least held-out loss so far, after best_step steps.

    There is no state of a random generator: masks and dropout follow from the seed and the step.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_loss: float | None = None
    best_step: int | None = None


# ------------------------------------------------------------------------------------------------- beginning, going on


@contextmanager
def folder_of_run(out: Path, *, resume: bool) -> Iterator[None]:
    """Make sure, before any work, that a run can be begun (or gone on with) in `out`, and that files can be written
    there; and that no other process does the same while the block lasts.

    Raises ValueError, or the OSError of the write that failed.
    """
    begun = is_begun(out)
    if is_finished(out) and not (begun and resume):
        raise ValueError(f"{out} holds {'a finished run' if begun else 'a model already'}: choose another --out")
    with ExitStack() as around:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / ".new-probe"
            probe.write_bytes(b"x")
            probe.unlink()
            lock = around.enter_context(open(out / LOCK, "w"))
        except OSError as error:
            what = "it is a file" if out.is_file() else error.strerror
            raise OSError(f"--out {out}: nothing can be written there: {what}") from error  # without errno's number
        try:
            # It ends with this process. (lockf would end as soon as a save opens and closes the file.)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{out}: another process is training there now") from error
        if begun and not resume:
            raise ValueError(
                f"{out} holds a run that is not finished: add --resume to go on with it, or choose another --out"
            )
        _remove_leftovers(out)
        yield


def is_begun(out: Path) -> bool:
    return (out / RUN).is_file()


def is_finished(out: Path) -> bool:
    return (out / CONFIG).is_file()


def open_run(out: Path, described: Mapping[str, Any]) -> None:
    """Write down what the run in `out` is, or check that it is still the same. `described` holds JSON scalars.

    Raises ValueError, naming both values, if the run was started with others.
    """
    if not is_begun(out):
        with _whole_file(out / RUN) as temporary:
            temporary.write_text(json.dumps(dict(described), indent=2) + "\n", encoding="utf-8")
        return
    require_same(out, dict.fromkeys(read_json(out / RUN), "not given") | dict(described))


def require_same(out: Path, described: Mapping[str, Any]) -> None:
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
    """Give the optimizer the moments that it had when `checkpoint` was written. The weights themselves are read by
    `BertForMaskedLM.from_pretrained(checkpoint)`. Raises ValueError, naming the file, if it is not whole.
    """
    path, keys = checkpoint / OPTIMIZER, ("step", "exp_avg", "exp_avg_sq")
    expected = {f"{name}.{key}" for name, _ in model.named_parameters() for key in keys}
    if wrong := read_header(path).keys() ^ expected:
        raise ValueError(f"{path}: {min(wrong)} is missing, or belongs to no parameter of the model")
    with safe_open(path, framework="pt") as file:
        for name, parameter in model.named_parameters():
            for key in keys:
                saved = file.get_tensor(f"{name}.{key}")
                like = saved if key == "step" else parameter  # the moments are laid out as the parameter is
                optimizer.state[parameter][key] = torch.empty_like(like, device=parameter.device).copy_(saved)
    return Progress(**read_json(checkpoint / PROGRESS))


def cut_metrics(out: Path, step: int) -> None:
    """Drop the lines after `step` from metrics.jsonl, so that none is there twice when those steps are done again."""
    path = out / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the run was killed in the middle of it
            break
    with _whole_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    out: Path, model: BertForMaskedLM, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write checkpoint-N, and only then delete the ones before it.

    Raises OSError, naming the folder, if it cannot be written; the one before it then stands.
    """
    folder, before = out / f"checkpoint-{progress.step}", checkpoints(out)
    if folder in before:  # the very one that we went on from
        return
    moments = {
        f"{name}.{key}": tensor.cpu()
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }
    with _new_folder(folder, f"; {before[-1]} stands, go on from it with --resume" if before else "") as temporary:
        _write_model(temporary, model, tokenizer)
        save_file(moments, temporary / OPTIMIZER)
        (temporary / PROGRESS).write_text(json.dumps(asdict(progress), indent=2, allow_nan=False) + "\n")
        _to_disk(temporary)
        os.rename(temporary, folder)
        _to_disk(out)
    for older in before:
        _remove(older)


def save_model(folder: Path, model: BertForMaskedLM, tokenizer: Tokenizer) -> None:
    """Write a model that `from_pretrained` reads. In the place of an earlier model of the same run, it is whole at
    every moment: each file is replaced at once, and only the weights differ.

    Raises OSError, naming the folder, if it cannot be written; what was there before then stands.
    """
    folder.mkdir(exist_ok=True)
    with _new_folder(folder / "model") as temporary:
        _write_model(temporary, model, tokenizer)
        _to_disk(temporary)
        for name in (TOKENIZER, WEIGHTS, CONFIG):  # config.json last: without it nobody takes this for a model
            os.replace(temporary / name, folder / name)
        _to_disk(folder)
    _to_disk(folder.parent)


def finish(out: Path, model: BertForMaskedLM, tokenizer: Tokenizer) -> None:
    """Save the model after the last step. The checkpoints are of no use any more."""
    save_model(out, model, tokenizer)
    for checkpoint in checkpoints(out):
        _remove(checkpoint)


def _write_model(folder: Path, model: BertForMaskedLM, tokenizer: Tokenizer) -> None:
    model.save_pretrained(folder)
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


@contextmanager
def _new_folder(target: Path, what_stands: str = "") -> Iterator[Path]:
    """An empty folder beside `target`, to be filled, and moved there. Gone when the block ends."""
    temporary = target.with_name(f".new-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir()
        yield temporary
    except (OSError, SafetensorError) as error:  # a full disk, for one; SafetensorError has no number
        message = f"{target} could not be written: {error}{what_stands}"
        raise OSError(message) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """A path beside `target`; the file written there takes its place."""
    temporary = target.with_name(f".new-{target.name}")
    yield temporary
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    _to_disk(target.parent)


def _to_disk(folder: Path) -> None:
    """Wait until the files of a folder, and their names, would survive a power cut."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Under its name there is the whole folder or nothing, here too."""
    gone = folder.with_name(f".old-{folder.name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _remove_leftovers(out: Path) -> None:
    """What a run that was killed was writing or removing."""
    for path in [*out.glob(".new-*"), *out.glob("best/.new-*"), *out.glob(".old-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if is_finished(out):
        for checkpoint in checkpoints(out):
            _remove(checkpoint)
