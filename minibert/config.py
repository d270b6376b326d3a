"""BertConfig: the keys of a BERT checkpoint's config.json, validated and frozen.

Source: google-research/bert, modeling.py, BertConfig; the key names are the hub's, verbatim.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from minibert.checkpoint.files import naming, read_json
from minibert.checkpoint.hub import Source, locate, read_config
from minibert.checkpoint.names import OWN_KEYS, SIZES, own_values

HIDDEN_ACTS = ("gelu", "gelu_new", "relu", "silu")


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes and rates of a BERT. The defaults are bert-base-uncased.

    Raises ValueError, naming the key and its value, for anything that is not a BERT this package can compute.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for key in (*SIZES, "max_position_embeddings", "type_vocab_size"):
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{key} must be a whole number from 1 to 2^31 - 1, not {value!r}")
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 <= value < 1 or (value == 0 and not key.endswith("prob")):
                raise ValueError(f"{key} must be a number from 0 to below 1 (0 for dropout only), not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split into num_attention_heads "
                f"{self.num_attention_heads} equal heads: choose a multiple"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not known: choose one of {', '.join(HIDDEN_ACTS)}")
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id {pad!r} is not an id below vocab_size {self.vocab_size}")

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"BertConfig has no {name!r}: it holds {', '.join(OWN_KEYS)}; dataclasses.replace(config, …) makes "
                "another, and json.dumps(config.to_dict()) its text"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BertConfig":
        """The configuration in a parsed config.json. Keys that change nothing are skipped, and all but `SIZES` may be
        missing. A key that makes it another model, or a missing size, is a ValueError. See checkpoint/names.py.
        """
        return cls(**own_values(values))

    @classmethod
    def from_json_file(cls, path: str | PathLike[str]) -> "BertConfig":
        """The configuration in a file like config.json, under any name. Raises ValueError, naming the file."""
        with naming(Path(path)):
            return cls.from_dict(read_json(Path(path)))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], *, revision: str | None = None, local_files_only: bool = False
    ) -> "BertConfig":
        """The configuration of a checkpoint, named as for `BertForMaskedLM.from_pretrained`."""
        return config_of(locate(name_or_path, revision=revision, local_files_only=local_files_only))[0]

    def to_dict(self) -> dict[str, Any]:
        """What save_pretrained writes to config.json: every key here, and those that say it is a BERT."""
        return {
            "architectures": ["BertForMaskedLM"],
            "model_type": self.model_type,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            **asdict(self),
        }


def config_of(source: Source) -> tuple[BertConfig, dict[str, Any]]:
    """The configuration of a checkpoint, and all that is in its config.json."""
    path, values = read_config(source)
    with naming(path):
        config = BertConfig.from_dict(values)
        if source.is_pinned and config != PINNED:
            key, known = next((key, known) for key, known in asdict(PINNED).items() if known != getattr(config, key))
            raise ValueError(
                f"{source.name} at {source.commit} has not {key} {getattr(config, key)!r} but {known!r}: this file of "
                "the hub or of the cache is another one"
            )
    return config, values


PINNED = BertConfig()  # of bert-base-uncased, whose config.json has no known SHA-256
