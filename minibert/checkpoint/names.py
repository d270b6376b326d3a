"""Our names for the tensors of a checkpoint, and the hub's.

The module of ours and the modules of theirs stand side by side in NAMES. Loading, saving and layer-by-layer parity read
it. What else is found in BERT checkpoints, and what of it is no part of a masked language model, stands below it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

# The name table: our module, and the module (or the three modules) of the hub's BERT checkpoints. N is a
# layer's number. Loading, saving and layer-by-layer parity all read it.
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embeddings.word", ("bert.embeddings.word_embeddings",)),
    ("embeddings.position", ("bert.embeddings.position_embeddings",)),
    ("embeddings.token_type", ("bert.embeddings.token_type_embeddings",)),
    ("embeddings.LayerNorm", ("bert.embeddings.LayerNorm",)),
    (
        "layers.N.attention.qkv",
        (
            "bert.encoder.layer.N.attention.self.query",
            "bert.encoder.layer.N.attention.self.key",
            "bert.encoder.layer.N.attention.self.value",
        ),
    ),
    ("layers.N.attention.output", ("bert.encoder.layer.N.attention.output.dense",)),
    ("layers.N.attention_LayerNorm", ("bert.encoder.layer.N.attention.output.LayerNorm",)),
    ("layers.N.feed_forward.intermediate", ("bert.encoder.layer.N.intermediate.dense",)),
    ("layers.N.feed_forward.output", ("bert.encoder.layer.N.output.dense",)),
    ("layers.N.feed_forward_LayerNorm", ("bert.encoder.layer.N.output.LayerNorm",)),
    ("head.dense", ("cls.predictions.transform.dense",)),
    ("head.LayerNorm", ("cls.predictions.transform.LayerNorm",)),
    ("head", ("cls.predictions",)),  # its bias; the decoder's weight is the word embedding
)
TABLE = dict(NAMES)

# Tensors that BERT checkpoints carry and a masked language model has no use for.
IGNORED = (
    (re.compile(r"bert\.embeddings\.(position|token_type)_ids"), "a constant, which the model makes itself"),
    (re.compile(r"bert\.pooler\.dense\.(weight|bias)"), "the pooler serves sentence classification"),
    (re.compile(r"cls\.seq_relationship\.(weight|bias)"), "the next-sentence head"),
    (re.compile(r"classifier\..+"), "another task's head: classification of texts, tokens or choices"),
    (re.compile(r"qa_outputs\..+"), "another task's head: question answering"),
    (re.compile(r"(crf|score)\..+"), "another task's head: tagging or scoring"),
)
# Second copies of a tensor that the model holds once.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
HEAD = "cls.predictions."

# What wrappers put into the names of the modules that they wrap: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Where a name of the hub begins, behind whatever a program has put before all of them.
BEGINS = re.compile(
    r"(?<![^.])((bert\.)?(embeddings\.\w+_embeddings\.|embeddings\.LayerNorm\.|encoder\.layer\.\d+\.)|cls\.predictions\.)"
)
ADAPTERS = re.compile(r"\.(lora_\w+|modules_to_save|ia3_\w+)\.|^prompt_encoder\.")


def is_ours(name: str) -> bool:
    """Whether this is a tensor of the model, and of nothing that was put into it."""
    return re.sub(r"\.\d+\.", ".N.", name.rpartition(".")[0]) in TABLE


def beginning(name: str) -> str:
    """Our name, beginning as the hub's does: "layers.0.…" → "bert.encoder.layer.0.…"."""
    for ours, hub in (("embeddings.", "bert."), ("layers.", "bert.encoder.layer."), ("head.", "cls.predictions.")):
        if name.startswith(ours):
            return hub + (name if ours == "embeddings." else name.removeprefix(ours))
    return name


def hub_names(name: str) -> list[str]:
    """The name, or the three names, under which a checkpoint holds our tensor `name`."""
    module, _, parameter = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    template = re.sub(r"\.\d+\.", ".N.", module)
    return [f"{hub.replace('.N.', number.group(0)) if number else hub}.{parameter}" for hub in TABLE[template]]


@dataclass
class Spelling:
    """How the names in a file stand for the hub's names."""

    prefix: str = ""  # what stands before every name
    spelled: dict[str, str] = field(default_factory=dict)  # the hub's name → the name in the file
    renamed: dict[str, str] = field(default_factory=dict)  # another spelling in the file → the name it stands for
    tied: dict[str, str] = field(default_factory=dict)  # second copy in the file → the tensor it equals
    ignored: dict[str, str] = field(default_factory=dict)  # name in the file → why it is not needed


def read_names(keys: Iterable[str]) -> Spelling:
    """What the names in a file stand for.

    Raises ValueError if two of them stand for one tensor, and for adapters that are not merged into the weights.
    """
    keys = list(keys)
    if adapters := [key for key in keys if ADAPTERS.search(key)]:
        raise ValueError(
            f"{several('tensor', adapters)} of an adapter, which changes the weights beside it. Merge it first, with "
            "the library that wrote it (in PEFT: model.merge_and_unload().save_pretrained(…))"
        )
    result = Spelling(prefix=common_prefix(keys))
    bare = {key: _bare(key, result.prefix) for key in keys}
    names = {key: hub_spelling(name) for key, name in bare.items()}
    present = set(names.values())
    for key, name in names.items():
        if reason := next((why for pattern, why in IGNORED if pattern.fullmatch(name)), None):
            result.ignored[key] = reason
            continue
        if name in TIED and TIED[name] in present:
            result.tied[key] = TIED[name]
            continue
        name = TIED.get(name, name)  # the only copy, under its other name
        if name in result.spelled:
            raise ValueError(f"{result.spelled[name]} and {key} are two spellings of the same tensor")
        result.spelled[name] = key
        if name != bare[key]:
            result.renamed[key] = name
    return result


def common_prefix(keys: Iterable[str]) -> str:
    """What stands before every name: "module.", "model.", "base_model.model.", … "" if nothing does, or not everywhere
    the same.
    """
    keys = list(keys)
    for names in (keys, [WRAPPERS.sub("", key) for key in keys]):
        prefixes = {name[: match.start()] for name in names if (match := BEGINS.search(name))}
        if len(prefixes) == 1:
            return prefixes.pop()
    return ""


def _bare(key: str, prefix: str) -> str:
    return (key if key.startswith(prefix) else WRAPPERS.sub("", key)).removeprefix(prefix)


def hub_spelling(name: str) -> str:
    """The hub's name for a tensor, from one that differs only in how it is written."""
    name = WRAPPERS.sub("", name)
    name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", name)
    name = re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def layers(names: Iterable[str]) -> int:
    """How many layers a model with these names has, of those of the hub: one more than the largest number."""
    matches = (re.match(r"bert\.encoder\.layer\.(\d{1,9})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def nearest(name: str, others: Iterable[str]) -> str:
    """The end of a sentence: which of the other names looks most like `name`; "" if none does."""
    found = get_close_matches(name, list(others)[:1000], n=1, cutoff=0.5)
    return f"; the nearest to {name} is {found[0]}" if found else ""


def several(noun: str, names: Sequence[str], shown: int = 3) -> str:
    """The beginning of a sentence: "tensors a, b, c and 7 more are"."""
    many = len(names) > 1
    return f"{noun}{'s' if many else ''} {some(names, shown)} {'are' if many else 'is'}"


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many there are beside them: "a, b, c and 7 more"."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# --------------------------------------------------------------------- state dicts under our names, and under the hub's

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
            "load_state_dict(minibert.checkpoint.names.from_transformers(state)) translates them"
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
