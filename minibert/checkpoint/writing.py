"""Tensors → files: a model is written whole, or not at all. (reading.py reads one.)"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minibert.checkpoint import files
from minibert.checkpoint.files import sha256
from minibert.checkpoint.hub import CONFIG, NEXT, WEIGHTS, unfinished_config
from minibert.checkpoint.names import to_transformers


def write(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    others: Mapping[str, str] | None = None,
) -> None:
    """config.json (the values of `config`) and model.safetensors in `folder`, which is made if need be; and others:
    name → text.

    Raises OSError if they cannot be written. Then, and also if the process is killed, a model that was in `folder`
    before is still loaded by minibert as it was. (Another program may meet new weights with the old configuration, and
    anybody the new `others` with the old weights, if the process is killed between the renames.) Other files in
    `folder` are not touched. The one error after which the new model is there is files.NotOnDisk.
    """
    others = others or {}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = to_transformers(state)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = {**config, "dtype": dtype}
    texts = {**others, CONFIG: json.dumps(values, indent=2) + "\n"}
    places = {name: files.writable_place(target / name) for name in [*others, WEIGHTS, CONFIG, NEXT]}
    try:
        with ExitStack() as around:
            # One in each folder: where a file is a link to one elsewhere, that one is replaced.
            parents = {place.parent for place in places.values()}
            scratch = {parent: around.enter_context(files.scratch_folder(parent)) for parent in parents}
            new = {name: scratch[place.parent] / name for name, place in places.items()}
            for name, text in texts.items():
                new[name].write_text(text, encoding="utf-8")
            save_file(tensors, new[WEIGHTS], metadata={"format": "pt"})
            for name in (*texts, WEIGHTS):
                files.set_mode(new[name], places[name])
            with suppress(OSError):  # a file system without locks
                around.enter_context(files.locked(target, wait=True))  # two at once: one after the other
            _replace_model(new, places, target, values)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{target / WEIGHTS}: could not be written: {error}") from error


def _finish_earlier(target: Path) -> None:
    """Give the weights that a killed save has left their configuration, which still waits in NEXT."""
    waiting = unfinished_config(target)
    if waiting is not None:
        with files.whole_file(target / CONFIG) as path:
            path.write_text(json.dumps(waiting, indent=2) + "\n", encoding="utf-8")
    (target / NEXT).unlink(missing_ok=True)


def _replace_model(new: Mapping[str, Path], places: Mapping[str, Path], target: Path, values: dict[str, Any]) -> None:
    """Move the files of a model from `new` to their `places`, both by name, as if it were one step.

    The weights of one model with the configuration of another may even load. If `target` has this very configuration,
    only the weights are replaced. If it has none, it comes last: without it, nobody takes `target` for a model. If it
    has another, the new one is first put beside it as NEXT, with the SHA-256 of the weights that it belongs to;
    `hub.read_config` reads it there once they are in place. The others (a tokenizer) come right before the weights.
    """
    _finish_earlier(target)
    old = places[CONFIG].read_bytes() if places[CONFIG].is_file() else None
    weights = [WEIGHTS] if old == new[CONFIG].read_bytes() else [WEIGHTS, CONFIG]
    names = [*(name for name in places if name not in (WEIGHTS, CONFIG, NEXT)), *weights]
    journal = old is not None and len(weights) == 2
    if journal:
        belongs = {"weights_sha256": sha256(new[WEIGHTS]), "config": values}
        new[NEXT].write_text(json.dumps(belongs), encoding="utf-8")
    for folder in {path.parent for path in new.values()}:
        files.to_disk(folder)
    had = {name: new[name].with_name(f"before {name}") for name in names if places[name].exists()}
    with suppress(OSError):  # a file system without second names: then NEXT has to do alone
        for name, before in had.items():
            os.link(places[name], before)
    if journal:
        os.replace(new[NEXT], places[NEXT])
    try:
        for name in names:
            os.replace(new[name], places[name])
    except BaseException:
        if any(not before.exists() for before in had.values()):
            raise  # nothing to go back to. NEXT stays, and says which configuration belongs to the weights there now
        for name in reversed(names):  # the configuration first: until the weights are back, NEXT has the one they need
            if name in had:
                os.replace(had[name], places[name])
            else:
                places[name].unlink(missing_ok=True)
        places[NEXT].unlink(missing_ok=True)
        raise
    with files.in_place(target):
        places[NEXT].unlink(missing_ok=True)
        for folder in {place.parent for place in places.values()}:
            files.to_disk(folder, files=False)
