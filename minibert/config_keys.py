"""The keys of config.json: which change what the model computes, which do not, and which must be there."""

from collections.abc import Iterable, Mapping
from typing import Any

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


def own_values(values: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Of a parsed config.json, the keys in `own`, which the caller understands.

    Raises ValueError, naming the key and its value, for a key that makes it another model or that nobody here knows,
    and for a missing size.
    """
    own = set(own)
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
    return {key: value for key, value in values.items() if key in own}


def ignored_keys(values: Mapping[str, Any]) -> list[str]:
    """The keys of a parsed config.json that are accepted without being used."""
    return sorted(set(values) & HARMLESS_KEYS)
