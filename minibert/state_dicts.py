"""Tensors in memory under our names, and under those of transformers and of the files on the hub."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minibert.names import ADAPTERS, BEGINS, NAMES, hub_names, nearest, read_names, several

# The hub's module → ours, and which part of our tensor it is.
OURS = {hub: (ours, part) for ours, hubs in NAMES for part, hub in enumerate(hubs)}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a transformers BertForMaskedLM under our names, for `model.load_state_dict`. Other spellings of
    its names, and what stands before all of them, are understood as in files (names.py). query, key and value become
    one tensor; all others are the same tensors, not copies.

    Raises ValueError for a tensor that the model does not have, and for a second copy of a tied tensor that differs.
    """
    spelling = read_names(state)
    for copy, original in spelling.tied.items():
        if not same_numbers(state[copy], state[spelling.spelled[original]]):
            raise ValueError(f"{copy} and {spelling.spelled[original]} must be the same tensor, but they differ")
    parts: dict[str, dict[int, Tensor]] = {}
    for hub, key in spelling.spelled.items():
        module, _, parameter = hub.rpartition(".")
        number = re.search(r"\.(\d+)\.", module)
        template = re.sub(r"\.\d+\.", ".N.", module, count=1)
        if template not in OURS:
            raise ValueError(f"{key} is no tensor of BERT's masked language model{nearest(template, OURS)}")
        ours, part = OURS[template]
        name = f"{ours.replace('.N.', number.group(0)) if number else ours}.{parameter}"
        parts.setdefault(name, {})[part] = state[key]
    for name, found in parts.items():
        if missing := [hub for part, hub in enumerate(hub_names(name)) if part not in found]:
            raise ValueError(f"{several('tensor', missing)} missing: {name} is made of {len(hub_names(name))}")
    return {
        name: found[0] if len(found) == 1 else torch.cat([found[part] for part in sorted(found)])
        for name, found in parts.items()
    }


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two copies of a tensor are equal. NaN is equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite: contiguous tensors on the CPU, under the names of transformers. No two share memory."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        hubs = hub_names(name)
        for hub, part in zip(hubs, tensor.detach().cpu().chunk(len(hubs)), strict=True):
            result[hub] = part.clone() if len(hubs) > 1 else part.contiguous()
    return result


def refuse_transformers(state: Mapping[str, Any]) -> None:
    """Raise ValueError if the names are those of transformers."""
    # embeddings.LayerNorm is a name of both.
    if theirs := [key for key in state if BEGINS.search(key) and not key.startswith("embeddings.LayerNorm.")]:
        raise ValueError(
            f"{theirs[0]} is a name of transformers, and this model has others: "
            "load_state_dict(minibert.state_dicts.from_transformers(state)) translates them"
        )


def require_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `state` has the tensors that are wanted, in their shapes, and no other."""
    refuse_transformers(state)
    if adapters := [key for key in state if ADAPTERS.search(f".{key}") or ".base_layer." in key]:
        raise ValueError(
            f"{several('tensor', adapters)} of an adapter: merge it into the weights first (in PEFT: "
            "model.merge_and_unload(), which gives the model to save), or save the adapter alone, by its own library"
        )
    if wrong := sorted(state.keys() ^ wanted.keys()):
        what = "missing" if wrong[0] in wanted else "not the model's"
        raise ValueError(
            f"{several('tensor', [key for key in wrong if (key in wanted) == (what == 'missing')])} {what}"
        )
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, and weights are floating-point numbers")
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and the model's is {tuple(wanted[name].shape)}")
