"""The keys of config.json, and what each means for the masked language model.

A config.json in the wild has more keys than BERT: those of other tasks, of text generation, of the program that trained
it, of somebody's own. Here stands which of them BERT is made of, which would make another model of it, and which change
nothing. What is in no list changes nothing in anybody's BERT that we know; the reader of a checkpoint says so.
"""

import re
from collections.abc import Mapping
from typing import Any

# Without these nobody can say which model it is: the number of heads, for one, shows in no tensor's shape.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# The fields of BertConfig.
OWN_KEYS = (
    *SIZES,
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings"),
    *("type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id"),
)
# Other names of an activation function, in transformers. gelu_fast differs from gelu_new by 1e-12.
ACTIVATION_NAMES = {
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "swish": "silu",
}

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
# Of these, null means the value above.
NULL_IS_FIXED = FIXED_KEYS.keys() - {"model_type", "tie_word_embeddings"}

# Keys of models that call themselves BERT and compute something else, often without a tensor that would show it. With a
# value that switches it off (null, false, 0, nothing in it) they change nothing.
OTHER_MODELS = tuple(
    (re.compile("|".join(keys.split())), what)
    for keys, what in (
        ("quantization_config compression_config", "its weights are quantised, and minibert reads floats"),
        (
            "rope_.* rotary_.* use_rotary.* .*alibi.* relative_attention.* max_relative_positions",
            "it has other positions than BERT's, which are added to the embeddings",
        ),
        (
            "pre_?norm norm_first normalize_before layer_norm_first use_pre_layer_norm use_rms_?norm norm_type",
            "it normalises elsewhere than BERT, or in another way",
        ),
        ("feed_forward_type use_glu.* .*swiglu.* hidden_mlp_type mlp_type", "it has another feed-forward than BERT's"),
        (
            "sliding_window attention_window attention_type num_random_blocks num_key_value_heads num_kv_heads",
            "not every token attends to every other one with a key of its own, as in BERT",
        ),
        (
            "embed_scale scale_embedding embedding_multiplier residual_multiplier logits_scaling logit_scale"
            " .*softcapping attention_scale softmax_scale qk_norm qk_layernorm",
            "it scales what BERT does not",
        ),
        (
            "num_hidden_groups inner_group_num share_layers share_.*_layers layer_types mlp_layer_types"
            " per_layer_config",
            "its layers are not all alike, or not each one's own, as in BERT",
        ),
        (
            "use_bottleneck true_hidden_size num_feedforward_networks pre_seq_len prefix_projection num_experts"
            " num_local_experts moe_.*",
            "it has parts that BERT does not have",
        ),
    )
)

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
    assistant_confidence_threshold assistant_lookbehind encoder_repetition_penalty epsilon_cutoff eta_cutoff
    num_assistant_tokens num_assistant_tokens_schedule target_lookbehind
    tie_encoder_decoder is_composition _commit_hash
    begin_suppress_tokens attn_implementation _attn_implementation _attn_implementation_autoset
    experts_implementation _experts_implementation language
    """.split()
)


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parsed config.json, the keys in `OWN_KEYS`.

    Raises ValueError, naming the key and its value, for a key that makes it another model, and for a missing size.
    """
    for key, wanted in FIXED_KEYS.items():  # first: another architecture is named before its keys
        value = values.get(key, wanted)
        if value != wanted and not (value is None and key in NULL_IS_FIXED):
            raise ValueError(
                f"{key} is {value!r}, and minibert computes only {wanted!r}: this checkpoint is another architecture"
            )
    for key, value in values.items():
        if value and key not in OWN_KEYS and (what := other_model(key)):
            raise ValueError(
                f"{key} is {value!r}: {what}. If you know that the key changes nothing here, take it out of config.json"
            )
    own_code = values.get("auto_map")
    if isinstance(own_code, dict) and (models := [key for key in own_code if key.startswith("AutoModel")]):
        raise ValueError(f"auto_map has {models[0]!r}: the model is computed by code that comes with the checkpoint")
    if missing := [key for key in SIZES if key not in values]:
        raise ValueError(f"there is no {missing[0]}: without it nobody can say which model this is")
    own = {key: values[key] for key in OWN_KEYS if key in values}
    if isinstance(own.get("hidden_act"), str):
        own["hidden_act"] = ACTIVATION_NAMES.get(own["hidden_act"], own["hidden_act"])
    return own


def other_model(key: str) -> str:
    """What a model with this key does that BERT does not; "" if the key is not of OTHER_MODELS."""
    return next((what for pattern, what in OTHER_MODELS if pattern.fullmatch(key)), "")


def ignored_keys(values: Mapping[str, Any]) -> list[str]:
    """The keys of a parsed config.json that are known to change nothing."""
    return sorted(values.keys() & HARMLESS_KEYS)


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """The keys of a parsed config.json that nobody's BERT reads, as far as we know."""
    return sorted(values.keys() - HARMLESS_KEYS - FIXED_KEYS.keys() - set(OWN_KEYS))


def defaulted_keys(values: Mapping[str, Any]) -> list[str]:
    """The keys of BertConfig that a parsed config.json leaves to their default."""
    return [key for key in OWN_KEYS if key not in values]
