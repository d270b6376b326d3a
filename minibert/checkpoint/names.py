"""The names in a checkpoint, and what they mean for the masked language model.

First the keys of config.json: which of them BERT is made of, which would make another model of it, and which change
nothing. Then the names of tensors: the module of ours and the modules of theirs stand side by side in NAMES. What else
is found in BERT checkpoints, and is no part of a masked language model, stands below it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a configuration is read without torch
    from torch import Tensor

# ------------------------------------------------------------------------------------------------- keys of config.json

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
    "swish": "silu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"), "gelu_new"),
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


def _any_of(patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns.split()))


# Keys of models that call themselves BERT and compute something else, often without a tensor that would show it; and of
# quantised weights. With a value that switches it off (null, false, 0, nothing in it) they change nothing.
OTHER_MODELS = _any_of(
    """
    rope_.* rotary_.* use_rotary.* .*alibi.* relative_attention.* max_relative_positions
    pre_?norm norm_first normalize_before layer_norm_first use_pre_layer_norm use_rms_?norm norm_type
    feed_forward_type use_glu.* .*swiglu.* hidden_mlp_type mlp_type
    sliding_window attention_window attention_type num_random_blocks num_key_value_heads num_kv_heads
    embed_scale scale_embedding embedding_multiplier residual_multiplier logits_scaling logit_scale .*softcapping
    attention_scale softmax_scale qk_norm qk_layernorm
    num_hidden_groups inner_group_num share_layers share_.*_layers layer_types mlp_layer_types per_layer_config
    use_bottleneck true_hidden_size num_feedforward_networks pre_seq_len prefix_projection num_experts num_local_experts
    moe_.* quantization_config compression_config
    """
)
# Keys that real files carry and that change no number of the masked language model: bookkeeping, other tasks' heads,
# the pooler, and text generation.
HARMLESS_KEYS = _any_of(
    """
    architectures dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash language
    model_max_length use_cache use_return_dict return_dict return_dict_in_generate output_.* torchscript use_bfloat16
    tf_legacy_loss gradient_checkpointing chunk_size_feed_forward is_composition tie_encoder_decoder
    cross_attention_hidden_size
    _?attn_implementation(_autoset)? _?experts_implementation tokenizer_class prefix
    classifier_dropout finetuning_task task_specific_params problem_type num_labels _num_labels id2label label2id
    directionality pooler_.* summary_.* (sep|bos|eos|cls|mask|decoder_start|forced_bos|forced_eos)_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups .*_penalty temperature top_k top_p
    typical_p .*no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values (begin_)?suppress_tokens
    assistant_.* num_assistant_.* epsilon_cutoff eta_cutoff target_lookbehind
    """
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
        if value and key not in OWN_KEYS and OTHER_MODELS.fullmatch(key):
            raise ValueError(
                f"{key} is {value!r}: a model with this key computes something else than BERT, or has quantised "
                "weights. If you know that it changes nothing here, take it out of config.json"
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


def other_keys(values: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of a parsed config.json that are known to change nothing; and those that nobody's BERT reads, as far as
    we know.
    """
    others = sorted(values.keys() - FIXED_KEYS.keys() - set(OWN_KEYS))
    harmless = tuple(key for key in others if HARMLESS_KEYS.fullmatch(key))
    return harmless, tuple(key for key in others if key not in harmless)


# ----------------------------------------------------------------------------------------------------- names of tensors

# Our module, and the module (or the three modules) of the hub's BERT checkpoints. N is a layer's number.
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embeddings.word", ("bert.embeddings.word_embeddings",)),
    ("embeddings.position", ("bert.embeddings.position_embeddings",)),
    ("embeddings.token_type", ("bert.embeddings.token_type_embeddings",)),
    ("embeddings.LayerNorm", ("bert.embeddings.LayerNorm",)),
    (
        "layers.N.attention.qkv",
        tuple(f"bert.encoder.layer.N.attention.self.{part}" for part in ("query", "key", "value")),
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
# The other way: the hub's module → ours, and which part of our tensor it is.
OURS = {hub: (ours, part) for ours, hubs in NAMES for part, hub in enumerate(hubs)}

# Tensors that BERT checkpoints carry and a masked language model has no use for.
IGNORED = (
    (re.compile(r"bert\.embeddings\.(position|token_type)_ids"), "a constant, which the model makes itself"),
    (re.compile(r"bert\.pooler\.dense\.(weight|bias)"), "the pooler serves sentence classification"),
    (re.compile(r"cls\.seq_relationship\.(weight|bias)"), "the next-sentence head"),
    (re.compile(r"(classifier|qa_outputs|crf|score)\..+"), "another task's head"),
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
ADAPTERS = re.compile(r"(?<![^.])(lora_\w+|modules_to_save|ia3_\w+|base_layer)\.|^prompt_encoder\.")


def is_ours(name: str) -> bool:
    """Whether this is a tensor of the model, and of nothing that was put into it."""
    return _numbered(name)[0] in TABLE


def beginning(name: str) -> str:
    """Our name, beginning as the hub's does: "layers.0.…" → "bert.encoder.layer.0.…"."""
    for ours, hub in (("embeddings.", "bert."), ("layers.", "bert.encoder.layer."), ("head.", "cls.predictions.")):
        if name.startswith(ours):
            return hub + (name if ours == "embeddings." else name.removeprefix(ours))
    return name


def hub_names(name: str) -> list[str]:
    """The name, or the three names, under which a checkpoint holds our tensor `name`."""
    module, number, parameter = _numbered(name)
    return [f"{hub.replace('.N.', number)}.{parameter}" for hub in TABLE[module]]


def _numbered(name: str) -> tuple[str, str, str]:
    """ "layers.7.attention.qkv.bias" → "layers.N.attention.qkv", ".7.", "bias"."""
    module, _, parameter = name.rpartition(".")
    number = re.search(r"\.\d+\.", module)
    return (module.replace(number[0], ".N.", 1), number[0], parameter) if number else (module, ".N.", parameter)


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
    _refuse_adapters(keys)
    result = Spelling(prefix=common_prefix(keys))
    prefix = result.prefix
    bare = {key: (key if key.startswith(prefix) else WRAPPERS.sub("", key)).removeprefix(prefix) for key in keys}
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


def _refuse_adapters(keys: Iterable[str]) -> None:
    if adapters := [key for key in keys if ADAPTERS.search(key)]:
        raise ValueError(
            f"{several('tensor', adapters)} of an adapter: merge it into the weights first (in PEFT: "
            "model.merge_and_unload(), which gives the model to save), or save it alone, by its own library"
        )


def common_prefix(keys: Iterable[str]) -> str:
    """What stands before every name: "module.", "base_model.model.", … "" if nothing does, or not one and the same."""
    keys = list(keys)
    for names in (keys, [WRAPPERS.sub("", key) for key in keys]):
        prefixes = {name[: match.start()] for name in names if (match := BEGINS.search(name))}
        if len(prefixes) == 1:
            return prefixes.pop()
    return ""


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


def from_transformers(state: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The state dict of a transformers BertForMaskedLM under our names, for `model.load_state_dict`. Other spellings of
    its names, and what stands before all of them, are understood as in files. query, key and value become one tensor;
    all others are the same tensors, not copies.

    Raises ValueError for a tensor that the model does not have, and for a second copy of a tied tensor that differs.
    """
    import torch

    spelling = read_names(state)
    require_equal_copies(spelling, lambda name: state[name])
    parts: dict[str, dict[int, Tensor]] = {}
    for hub, key in spelling.spelled.items():
        module, number, parameter = _numbered(hub)
        if module not in OURS:
            raise ValueError(f"{key} is no tensor of BERT's masked language model{nearest(module, OURS)}")
        ours, part = OURS[module]
        parts.setdefault(f"{ours.replace('.N.', number)}.{parameter}", {})[part] = state[key]
    for name, found in parts.items():
        if missing := [hub for part, hub in enumerate(hub_names(name)) if part not in found]:
            raise ValueError(f"{several('tensor', missing)} missing: {name} is made of {len(hub_names(name))}")
    return {
        name: found[0] if len(found) == 1 else torch.cat([found[part] for part in sorted(found)])
        for name, found in parts.items()
    }


def require_equal_copies(spelling: Spelling, tensor: "Callable[[str], Tensor]") -> None:
    """Raise ValueError if a second copy of a tied tensor is not the same as the first. NaN is the same as NaN. tensor:
    gives the one of a name in the file.
    """
    for copy, original in spelling.tied.items():
        one, other = tensor(copy), tensor(spelling.spelled[original])
        same = one.shape == other.shape and one.dtype == other.dtype
        if not same or not (one.equal(other) or bool(((one == other) | (one.isnan() & other.isnan())).all())):
            raise ValueError(f"{copy} and {spelling.spelled[original]} must be the same tensor, but they differ")


def to_transformers(state: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The opposite: contiguous tensors on the CPU, under the names of transformers. No two share memory."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        hubs = hub_names(name)
        for hub, part in zip(hubs, tensor.detach().cpu().chunk(len(hubs)), strict=True):
            result[hub] = part.clone() if len(hubs) > 1 else part.contiguous()
    return result


def refuse_transformers(state: Mapping[str, Any]) -> None:
    """Raise ValueError if the names are those of transformers. (embeddings.LayerNorm is a name of both.)"""
    if theirs := [key for key in state if BEGINS.search(key) and not key.startswith("embeddings.LayerNorm.")]:
        raise ValueError(
            f"{theirs[0]} is a name of transformers, and this model has others: "
            "load_state_dict(minibert.checkpoint.names.from_transformers(state)) translates them"
        )


def require_state(state: "Mapping[str, Tensor]", wanted: "Mapping[str, Tensor]") -> None:
    """Raise ValueError unless `state` has the tensors that are wanted, in their shapes, and no other."""
    refuse_transformers(state)
    _refuse_adapters(state)
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(f"{several('tensor', missing)} missing")
    if extra := sorted(state.keys() - wanted.keys()):
        raise ValueError(f"{several('tensor', extra)} not the model's")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, and weights are floating-point numbers")
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and the model's is {tuple(wanted[name].shape)}")
