"""Our names for the tensors of a checkpoint, and the hub's.

The module of ours and the modules of theirs stand side by side in NAMES. Loading, saving and layer-by-layer parity read
it. What else is found in BERT checkpoints, and what of it is no part of a masked language model, stands below it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

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
