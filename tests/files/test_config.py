"""config.json as it is found: read beside transformers, key by key, or refused by name."""

import itertools
import re
from dataclasses import fields

import pytest
import torch
import transformers
from checkpoints import assert_same, assert_same_logits, change_json, logits, refused
from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from minibert import BertConfig, BertForMaskedLM
from minibert.checkpoint import names
from minibert.checkpoint.names import ACTIVATION_NAMES, FIXED_KEYS, HARMLESS_KEYS, NULL_IS_FIXED, OTHER_MODELS, OWN_KEYS


def test_every_key_of_transformers_is_known():
    """Of its BertConfig, of the base class, and of text generation: transformers 5.23."""
    assert set(OWN_KEYS) == {field.name for field in fields(BertConfig)}
    found = set(transformers.BertConfig().to_dict()) | {field.name for field in fields(transformers.BertConfig)}
    found |= {field.name for field in fields(PreTrainedConfig)} - {"transformers_weights"}
    found |= set(GenerationConfig._get_default_generation_params())  # popped by PreTrainedConfig.__post_init__
    others = set("per_layer_config rope_scaling rope_theta rope_parameters layer_types mlp_layer_types".split())
    found |= set("_name_or_path torch_dtype return_dict num_labels attn_implementation".split()) | others
    assert {key for key in found - FIXED_KEYS.keys() - set(OWN_KEYS) if not HARMLESS_KEYS.fullmatch(key)} == others
    assert all(OTHER_MODELS.fullmatch(key) for key in others)
    for key in OWN_KEYS:  # and where a file leaves it out, the same value
        assert getattr(BertConfig(), key) == getattr(transformers.BertConfig(), key), key


def beside_transformers(folder):
    ours = BertForMaskedLM.from_pretrained(folder)
    assert_same_logits(ours, transformers.BertForMaskedLM.from_pretrained(folder).eval())
    return ours


def test_every_name_of_an_activation(folder):
    numbers = []
    for name in ("gelu", "gelu_new", "relu", "silu", *ACTIVATION_NAMES):
        change_json(folder / "config.json", hidden_act=name)
        model = beside_transformers(folder)
        assert model.config.hidden_act == ACTIVATION_NAMES.get(name, name)
        numbers += [logits(model)] if name == model.config.hidden_act else []
    for one, other in itertools.combinations(numbers, 2):
        assert (one - other).abs().max() > 5e-5  # five times the tolerance


# key, value, and whether it is known to change nothing; else the reader of the file says that it knows of no use.
WITHOUT_EFFECT = [
    ("xla_device", True, False),
    ("transformers.js_config", {"dtype": "q8"}, False),
    ("do_lower_case", True, False),
    ("note of one's own", [1, {"a": None}], False),
    ("rope_theta", None, False),
    ("auto_map", {"AutoTokenizer": ["x", None]}, False),
    ("chunk_size_feed_forward", 7, True),
    ("id2label", {"0": "a", "1": "b", "2": "c"}, True),
    ("pooler_type", "first_token_transform", True),
    ("num_beams", 3, True),
    ("bos_token_id", 7, True),
    ("torch_dtype", "float16", True),
]


@pytest.mark.parametrize(("key", "value", "known"), WITHOUT_EFFECT, ids=[key for key, *_ in WITHOUT_EFFECT])
def test_keys_that_change_nothing(folder, recwarn, key, value, known):
    change_json(folder / "config.json", **{key: value})
    report = beside_transformers(folder).load_report
    assert (key in report.ignored_config_keys, report.unknown_config_keys) == ((True, ()) if known else (False, (key,)))
    said = [
        each for each in recwarn if repr(key) in str(each.message) and str(folder / "config.json") in str(each.message)
    ]
    assert [each.filename for each in said] == ([] if known else [__file__])  # the warning points at the caller


def test_null_is_the_one_value(folder, ours):
    for key in NULL_IS_FIXED:
        for value in (None, FIXED_KEYS[key]):
            change_json(folder / "config.json", **{key: value})
            model = BertForMaskedLM.from_pretrained(folder)
            assert torch.equal(logits(model), logits(ours))
            assert key not in model.load_report.ignored_config_keys


REFUSED = {
    "position_embedding_type": ["relative_key", "rotary"],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "is_encoder_decoder": [True],
    "tie_word_embeddings": [False, None],
    "model_type": ["roberta", None, 3],
    "pruned_heads": [{"0": [1]}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "rope_theta": [10000.0],
    "rotary_base": [10000],
    "use_alibi": [True],
    "prenorm": [True],
    "feed_forward_type": ["glumlp"],
    "sliding_window": [128],
    "embed_scale": [2.0],
    "num_hidden_groups": [1],
    "num_experts": [2],
    "auto_map": [{"AutoModelForMaskedLM": "modeling_bert.MyBert"}, {"AutoModel": "x.Y", "AutoConfig": "x.Z"}],
    "layer_norm_eps": ["1e-12", None, 0, 1.0],
    "type_vocab_size": [2.0, None, 0, True],
    "attention_probs_dropout_prob": [None, 1.0, -0.1],
    "hidden_dropout_prob": [1.5],
    "initializer_range": [0, None],
    "vocab_size": [None, -1, 2**31, "99"],
    "hidden_size": [33],  # for four heads
    "num_attention_heads": [0],
    "pad_token_id": [99, -1, "0"],
    "hidden_act": ["tanh", "gelu_10", 3, None],
}


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_make_it_another_model(folder, key):
    for value in REFUSED[key]:
        change_json(folder / "config.json", **{key: value})
        said = r"AutoModel" if key == "auto_map" else re.escape(str(value))
        refused(folder, rf"config\.json: {key}\b.*{said}", mentions="config.json")


NO_JSON = "not a proper JSON file"
NO_CONFIG = {
    "empty": ("  \n", "empty"),
    "cut off": ("{", NO_JSON),
    "nested": ("[" * 100_000, NO_JSON),
    "html": ("<html>not found</html>", "HTML page"),
    "list": ("[1, 2]", "list"),
    "duplicate": ('{"vocab_size": 99, "vocab_size": 98}', "'vocab_size'.*2 times"),
    "endless": ('{"vocab_size": ' + "9" * 5000 + "}", NO_JSON),
    "lfs": ("version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    "no UTF-8": ('{"model_type": "\udcff"}', NO_JSON),
    "another architecture, before its keys": (
        '{"rope_theta": 1, "model_type": "gpt2"}',
        "'gpt2'.*another architecture",
    ),
}


@pytest.mark.parametrize(("text", "match"), NO_CONFIG.values(), ids=NO_CONFIG)
def test_config_that_is_none(folder, text, match):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, match, mentions="config.json")


def test_missing_keys(folder, ours):
    change_json(folder / "config.json", leave_out=["layer_norm_eps", "hidden_act"])
    model = BertForMaskedLM.from_pretrained(folder)
    assert (model.config.layer_norm_eps, model.config.hidden_act) == (1e-12, "gelu")
    assert set(model.load_report.defaulted_config_keys) == {"layer_norm_eps", "hidden_act"}
    assert_same(model, ours)
    whole = (folder / "config.json").read_text()
    for key in names.SIZES:
        (folder / "config.json").write_text(whole)
        change_json(folder / "config.json", leave_out=[key])
        refused(folder, rf"there is no {key}", mentions="config.json")
    (folder / "config.json").write_text(whole)
    change_json(folder / "config.json", num_hidden_layers=2**31 - 1)  # in no time
    refused(folder, r"layer 5 is missing \(num_hidden_layers .* is 2147483647", mentions="model.safetensors")


def test_a_configuration_by_name(folder):
    change_json(folder / "config.json", hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-5)
    config = BertConfig.from_pretrained(folder)
    assert config == BertForMaskedLM.from_pretrained(folder).config == BertConfig.from_json_file(folder / "config.json")
    assert (config.hidden_act, config.layer_norm_eps, config.model_type) == ("gelu_new", 1e-5, "bert")
    assert config.head_size == 8
    assert BertConfig.from_pretrained("minibert-uncased").hidden_size == 384
    (folder / "config.json").write_text("{")
    for load in (BertConfig.from_pretrained, lambda folder: BertConfig.from_json_file(folder / "config.json")):
        with pytest.raises(ValueError, match=r"config\.json: not a proper JSON file"):
            load(folder)


# ---------------------------------------------------------------------------------------------------------- data types

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def test_dtypes_by_name(good):
    for name, dtype in DTYPES.items():
        for options in ({"dtype": name}, {"torch_dtype": dtype}):
            model = BertForMaskedLM.from_pretrained(good, **options)
            assert (model.dtype, model.load_report.dtype) == (dtype, name)
    with pytest.raises(ValueError, match="dtype is 'float32' and torch_dtype 'float16'"):
        BertForMaskedLM.from_pretrained(good, dtype="float32", torch_dtype="float16")
    for none in (torch.int64, "int8", 16):
        with pytest.raises(ValueError, match="dtype"):
            BertForMaskedLM.from_pretrained(good, dtype=none)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_auto_is_what_transformers_takes(folder, name):
    transformers.BertForMaskedLM.from_pretrained(folder, dtype=DTYPES[name]).save_pretrained(folder)
    for said in ({}, {"dtype": name}, {"torch_dtype": name}):
        change_json(folder / "config.json", leave_out=["dtype"])
        change_json(folder / "config.json", **said)
        assert transformers.BertForMaskedLM.from_pretrained(folder, dtype="auto").dtype == DTYPES[name]
        model = BertForMaskedLM.from_pretrained(folder, dtype="auto")
        assert model.load_report.dtype == name
        assert_same(model, BertForMaskedLM.from_pretrained(folder).to(DTYPES[name]))
    change_json(folder / "config.json", dtype="float64")  # what is said comes first
    assert BertForMaskedLM.from_pretrained(folder, dtype="auto").load_report.dtype == "float64"
