"""Our names for the tensors of a checkpoint, and the hub's.

The module of ours and the modules of theirs stand side by side in NAMES. Loading, saving and layer-by-layer parity read
it. What else is found in BERT checkpoints, and what of it is no part of a masked language model, stands below it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# The name table: our module, and the module (or the three modules) of the hub's BERT checkpoints. N is a
# layer's number. Loading, saving and layer-by-layer parity all read it.
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embeddings.word", ("bert.embeddings.word_embeddings",)),
    ("embeddings.position", ("bert.embeddings.position_embeddings",)),
    ("embeddings.token_type", ("bert.embeddings.token_type_embeddings",)),
    ("embeddings.norm", ("bert.embeddings.LayerNorm",)),
    (
        "layers.N.attention.qkv",
        (
            "bert.encoder.layer.N.attention.self.query",
            "bert.encoder.layer.N.attention.self.key",
            "bert.encoder.layer.N.attention.self.value",
        ),
    ),
    ("layers.N.attention.output", ("bert.encoder.layer.N.attention.output.dense",)),
    ("layers.N.attention_norm", ("bert.encoder.layer.N.attention.output.LayerNorm",)),
    ("layers.N.feed_forward.intermediate", ("bert.encoder.layer.N.intermediate.dense",)),
    ("layers.N.feed_forward.output", ("bert.encoder.layer.N.output.dense",)),
    ("layers.N.feed_forward_norm", ("bert.encoder.layer.N.output.LayerNorm",)),
    ("head.dense", ("cls.predictions.transform.dense",)),
    ("head.norm", ("cls.predictions.transform.LayerNorm",)),
    ("head", ("cls.predictions",)),  # its bias; the decoder's weight is the word embedding
)
TABLE = dict(NAMES)

# Tensors that BERT checkpoints carry and a masked language model has no use for.
IGNORED = (
    (re.compile(r"(bert\.)?embeddings\.position_ids"), "a constant: 0, 1, 2, …"),
    (re.compile(r"(bert\.)?pooler\.dense\.(weight|bias)"), "the pooler serves sentence classification"),
    (re.compile(r"cls\.seq_relationship\.(weight|bias)"), "the next-sentence head"),
)
# Second copies of a tensor that the model holds once.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
HEAD = "cls.predictions."


def hub_names(name: str) -> list[str]:
    """The name, or the three names, under which a checkpoint holds our tensor `name`."""
    module, _, parameter = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    template = re.sub(r"\.\d+\.", ".N.", module)
    return [f"{hub.replace('.N.', number.group(0)) if number else hub}.{parameter}" for hub in TABLE[template]]


@dataclass
class Spelling:
    """How the names in a file stand for the hub's names."""

    spelled: dict[str, str] = field(default_factory=dict)  # the hub's name → the name in the file
    renamed: dict[str, str] = field(default_factory=dict)  # older spelling in the file → the name it stands for
    tied: dict[str, str] = field(default_factory=dict)  # second copy → the tensor it equals
    ignored: dict[str, str] = field(default_factory=dict)  # name in the file → why it is not needed


def read_names(keys: Iterable[str]) -> Spelling:
    """What the names in a file stand for. Raises ValueError if two of them stand for one tensor."""
    found = set(keys := list(keys))
    result = Spelling()
    for key in keys:
        if reason := next((why for pattern, why in IGNORED if pattern.fullmatch(key)), None):
            result.ignored[key] = reason
            continue
        name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", key)
        name = re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)
        if name.startswith(("embeddings.", "encoder.")):
            name = "bert." + name
        if name == "cls.predictions.decoder.bias" and TIED[name] not in found:
            name = TIED[name]  # the only copy of the bias, under its other name
        if name in TIED:
            result.tied[key] = TIED[name]
            continue
        if name in result.spelled:
            raise ValueError(f"{result.spelled[name]} and {key} are two spellings of the same tensor")
        result.spelled[name] = key
        if name != key:
            result.renamed[key] = name
    for copy, original in result.tied.items():
        if original not in result.spelled:
            raise ValueError(f"there is {copy}, but not {original}, which it is a copy of")
    return result


def several(noun: str, names: Sequence[str], shown: int = 3) -> str:
    """The beginning of a sentence: "tensors a, b, c and 7 more are"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    many = len(names) > 1
    return f"{noun}{'s' if many else ''} {', '.join(names[:shown])}{more} {'are' if many else 'is'}"
