"""A config.json that is none, or of another model, is refused by name."""

import json
import re

import pytest
from checkpoints import (
    SIZES,
    assert_same,
    change_config,
    refused,
)

from minibert import BertConfig, BertForMaskedLM

# --------------------------------------------------------------------------------------------------------------- config


CONFIGS = {
    "position_embedding_type": "relative_key",
    "is_decoder": True,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "model_type": "roberta",
    "hidden_act": "tanh",
    "hidden_size": 33,
    "num_attention_heads": 0,
    "vocab_size": "99",
    "layer_norm_eps": 0,
    "hidden_dropout_prob": 1.5,
    "pad_token_id": 99,
    "rotary_base": 10000,  # nobody knows this one
}


@pytest.mark.parametrize(("key", "value"), CONFIGS.items(), ids=CONFIGS.keys())
def test_config_of_another_model(folder, key, value):
    change_config(folder, **{key: value})
    refused(folder, rf"{key}.*{re.escape(str(value))}", mentions="config.json")


def test_another_architecture_is_named_before_its_keys(folder):
    values = {
        "activation_function": "gelu_new",
        **json.loads((folder / "config.json").read_text()),
        "model_type": "gpt2",
    }
    (folder / "config.json").write_text(json.dumps(values))
    refused(folder, "model_type is 'gpt2'.*another architecture", mentions="config.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("{", "not a proper JSON file"),
        ("[" * 100_000, "not a proper JSON file"),
        ("<html>not found</html>", "HTML page"),
        ("[1, 2]", "list"),
        ('{"vocab_size": 99, "vocab_size": 98}', "'vocab_size'.*2 times"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "not a proper JSON file"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    ],
    ids=["empty", "blank", "cut off", "nested", "html", "list", "duplicate", "endless", "lfs"],
)
def test_config_that_is_none(folder, text, match):
    (folder / "config.json").write_text(text)
    refused(folder, match, mentions="config.json")


def test_config_in_no_known_encoding(folder):
    (folder / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    refused(folder, "not a proper JSON file", mentions="config.json")


def test_harmless_config_keys_are_reported(folder, ours):
    extra = {"gradient_checkpointing": False, "directionality": "bidi", "pooler_type": "first_token_transform"}
    change_config(folder, **extra, position_embedding_type="absolute")
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same(model, ours)
    assert extra.keys() <= set(model.load_report.ignored_config_keys)
    assert "position_embedding_type" not in model.load_report.ignored_config_keys


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
)
def test_a_missing_size_is_an_error(tmp_path, key):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json: there is no {key}"):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_other_missing_keys_are_defaulted_and_reported(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["layer_norm_eps"], values["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = BertForMaskedLM.from_pretrained(tmp_path)
    assert (model.config.layer_norm_eps, model.config.hidden_act) == (1e-12, "gelu")
    assert set(model.load_report.defaulted_config_keys) == {"layer_norm_eps", "hidden_act"}
