"""BertConfig: the keys of a BERT checkpoint's config.json, validated and frozen.

Source: google-research/bert, modeling.py, BertConfig; the key names are the hub's, verbatim.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

HIDDEN_ACTS = ("gelu", "gelu_new", "relu")

# Without these nobody can say which model it is: the number of heads, for one, shows in no tensor's shape.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# Keys that would change what the model computes. Only the value given here is BERT as the paper has it.
FIXED_KEYS: dict[str, Any] = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
}

# Keys that real config.json files carry and that change no number of the masked language model: bookkeeping,
# other tasks' heads, the pooler, and text generation. They are accepted and listed in the load report.
HARMLESS_KEYS = frozenset(
    """
    architectures dtype torch_dtype transformers_version _name_or_path name_or_path model_max_length
    use_cache use_return_dict return_dict output_attentions output_hidden_states output_past
    torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing chunk_size_feed_forward
    classifier_dropout finetuning_task task_specific_params problem_type num_labels _num_labels id2label label2id
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    tokenizer_class prefix sep_token_id bos_token_id eos_token_id cls_token_id mask_token_id decoder_start_token_id
    cross_attention_hidden_size max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens attn_implementation _attn_implementation _attn_implementation_autoset language
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes and rates of a BERT. The defaults are bert-base-uncased.

    Raises ValueError, naming the key and its value, for anything that is not a BERT this package can compute.
    """

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
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{key} must be a probability, 0 <= p < 1, not {value!r}")
        for key in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 < value < 1:
                raise ValueError(f"{key} must be a number between 0 and 1, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split into num_attention_heads "
                f"{self.num_attention_heads} equal heads: choose a multiple"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not known: choose one of {', '.join(HIDDEN_ACTS)}")
        if self.pad_token_id is not None and (
            type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size
        ):
            raise ValueError(f"pad_token_id {self.pad_token_id!r} is not an id below vocab_size {self.vocab_size}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BertConfig":
        """The configuration in a parsed config.json. Keys that change nothing are skipped (`ignored_keys` lists
        them), and keys other than `SIZES` may be missing (`defaulted_keys` lists them). A key that changes the
        computation, or that nobody here knows, or a missing size, is a ValueError that names it.
        """
        own = {field.name for field in fields(cls)}
        for key, wanted in FIXED_KEYS.items():  # first: of another architecture nobody asks about single keys
            if values.get(key, wanted) != wanted:
                raise ValueError(
                    f"{key} is {values[key]!r}, and minibert computes only {wanted!r}: "
                    "this checkpoint is another architecture"
                )
        for key, value in values.items():
            if key not in own and key not in HARMLESS_KEYS and key not in FIXED_KEYS:
                raise ValueError(
                    f"unknown key {key!r} (value {value!r}): it may change what the model computes. "
                    "If you know that it does not, take it out of config.json"
                )
        if missing := [key for key in SIZES if key not in values]:
            raise ValueError(f"there is no {missing[0]}: without it nobody can say which model this is")
        return cls(**{key: value for key, value in values.items() if key in own})

    def to_dict(self) -> dict[str, Any]:
        """What save_pretrained writes to config.json: every key here, and those that say it is a BERT."""
        return {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            **asdict(self),
        }


def defaulted_keys(values: dict[str, Any]) -> list[str]:
    """The keys of BertConfig that a parsed config.json leaves to their default."""
    return [field.name for field in fields(BertConfig) if field.name not in values]


def ignored_keys(values: dict[str, Any]) -> list[str]:
    """The keys of a parsed config.json that `BertConfig.from_dict` accepted without using them."""
    return sorted(set(values) & HARMLESS_KEYS)
