"""Tensors → files: a model is written whole, or not at all. (checkpoint.py reads one.)"""

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minibert import atomic
from minibert.config import BertConfig
from minibert.files import sha256
from minibert.hub import CONFIG, NEXT, WEIGHTS, unfinished_config
from minibert.state_dicts import to_transformers


def write(
    folder: str | os.PathLike[str],
    config: BertConfig,
    state: Mapping[str, Tensor],
    others: Mapping[str, str] | None = None,
) -> None:
    """config.json and model.safetensors in `folder`, which is made if need be; and others: name → text.

    Raises OSError if they cannot be written. Then, and also if the process is killed, a model that was in `folder`
    before is still loaded by minibert as it was. (Another program may meet new weights with the old configuration, and
    anybody the new `others` with the old weights, if the process is killed between the renames.) Other files in
    `folder` are not touched.
    """
    others = others or {}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = to_transformers(state)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = {**config.to_dict(), "dtype": dtype}
    try:
        with atomic.scratch_folder(target) as scratch:
            for name, text in {**others, CONFIG: json.dumps(values, indent=2) + "\n"}.items():
                (scratch / name).write_text(text, encoding="utf-8")
            save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
            (scratch / WEIGHTS).chmod(stat.S_IMODE((scratch / CONFIG).stat().st_mode))  # save_file makes it private
            _replace_model(scratch, target, values, list(others))
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{target / WEIGHTS}: could not be written: {error}") from error


def _finish_earlier(target: Path) -> None:
    """Give the weights that a killed save has left their configuration, which still waits in NEXT."""
    waiting = unfinished_config(target)
    if waiting is not None:
        with atomic.whole_file(target / CONFIG) as path:
            path.write_text(json.dumps(waiting, indent=2) + "\n", encoding="utf-8")
    (target / NEXT).unlink(missing_ok=True)


def _replace_model(scratch: Path, target: Path, values: dict[str, Any], others: list[str]) -> None:
    """Move the files of a model from `scratch` to `target`, as if it were one step.

    A file is renamed in one step, but there are several of them, and the weights of one model with the configuration of
    another may even load. If `target` has this very configuration, only the weights are replaced. If it has none, it
    comes last: without it, nobody takes `target` for a model. If it has another, the new one is first put beside it as
    NEXT, with the SHA-256 of the weights that it belongs to; `hub.read_config` reads it there once they are in place.
    The others (a tokenizer) come right before the weights.
    """
    _finish_earlier(target)
    old = (target / CONFIG).read_bytes() if (target / CONFIG).is_file() else None
    weights = [WEIGHTS] if old == (scratch / CONFIG).read_bytes() else [WEIGHTS, CONFIG]
    names = [*others, *weights]
    journal = old is not None and len(weights) == 2
    if journal:
        belongs = {"weights_sha256": sha256(scratch / WEIGHTS), "config": values}
        (scratch / NEXT).write_text(json.dumps(belongs), encoding="utf-8")
    atomic.to_disk(scratch)
    before, had = scratch / "before", [name for name in names if (target / name).exists()]
    before.mkdir()
    with suppress(OSError):  # a file system without second names: then NEXT has to do alone
        for name in had:
            os.link(target / name, before / name)
    if journal:
        os.replace(scratch / NEXT, target / NEXT)
    try:
        for name in names:
            os.replace(scratch / name, target / name)
    except BaseException:
        if any(not (before / name).exists() for name in had):
            raise  # nothing to go back to. NEXT stays, and says which configuration belongs to the weights there now
        for name in names:
            if name in had:
                os.replace(before / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)
        (target / NEXT).unlink(missing_ok=True)
        raise
    (target / NEXT).unlink(missing_ok=True)
    atomic.to_disk(target, files=False)
