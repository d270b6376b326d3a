"""config.json as it is found: every key of transformers' configuration, and those that others write, beside
transformers.
"""

import json
import re
from dataclasses import fields

import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from minibert import BertConfig, BertForMaskedLM
from minibert.checkpoint import names as config_keys

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=16,
)
IDS = torch.randint(1, 99, (5, 7), generator=torch.Generator().manual_seed(1))

# What each key of transformers' BertConfig and of its base class is for us: transformers/models/bert/
# configuration_bert.py, configuration_utils.py, and what modeling_bert.py reads of them. Version 5.23.
KINDS = {
    "own": """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
        hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings type_vocab_size initializer_range
        layer_norm_eps pad_token_id""",
    "one value only": "model_type is_decoder add_cross_attention is_encoder_decoder tie_word_embeddings",
    # which class, library, file or data type; the form of the output; other heads; text generation; the same numbers
    # in pieces (chunk_size_feed_forward) or by another kernel (attn_implementation)
    "harmless": """transformers_version architectures dtype torch_dtype _name_or_path name_or_path _commit_hash
        output_hidden_states output_attentions return_dict use_cache classifier_dropout problem_type id2label label2id
        num_labels bos_token_id eos_token_id chunk_size_feed_forward _attn_implementation attn_implementation
        experts_implementation""",
    "another model": "per_layer_config rope_scaling rope_theta rope_parameters layer_types mlp_layer_types",
}
KIND = {key: kind for kind, keys in KINDS.items() for key in keys.split()}


def kind(key):
    if key in config_keys.OWN_KEYS:
        return "own"
    if key in config_keys.FIXED_KEYS:
        return "one value only"
    if config_keys.HARMLESS_KEYS.fullmatch(key):
        return "harmless"
    return "another model" if config_keys.OTHER_MODELS.fullmatch(key) else "unknown"


def test_own_keys_are_the_fields():
    assert set(config_keys.OWN_KEYS) == {field.name for field in fields(BertConfig)}


def test_every_key_of_transformers_has_a_kind():
    generation = set(GenerationConfig._get_default_generation_params())  # popped by PreTrainedConfig.__post_init__
    found = set(transformers.BertConfig().to_dict()) | {field.name for field in fields(transformers.BertConfig)}
    found |= {field.name for field in fields(PreTrainedConfig)} - {"transformers_weights"}
    for key in found | KIND.keys():
        if key not in generation:
            assert kind(key) == KIND.get(key), key
    assert {kind(key) for key in generation - KIND.keys()} == {"harmless"}
    overlap = [key for key in KIND if sum(key in group for group in (config_keys.OWN_KEYS, config_keys.FIXED_KEYS)) > 1]
    assert overlap == []


# -------------------------------------------------------------------------------------------------- beside transformers


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same_logits(folder):
    ours = BertForMaskedLM.from_pretrained(folder)
    theirs = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    return ours


ACTIVATIONS = ["gelu", "gelu_new", "relu", "silu", *config_keys.ACTIVATION_NAMES]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_name_of_an_activation(folder, name):
    change(folder, hidden_act=name)
    model = assert_same_logits(folder)
    assert model.config.hidden_act == config_keys.ACTIVATION_NAMES.get(name, name)


def test_other_activations_give_other_numbers(folder):
    logits = []
    for name in ("gelu", "gelu_new", "relu", "silu"):
        change(folder, hidden_act=name)
        logits.append(BertForMaskedLM.from_pretrained(folder)(IDS).logits)
    for one in range(4):
        for other in range(one):
            assert (logits[one] - logits[other]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["tanh", "quick_gelu", "gelu_10", "mish", "leaky_relu", "linear", "nothing", 3, None])
def test_other_activations_are_refused(folder, name):
    change(folder, hidden_act=name)
    with pytest.raises(ValueError, match=rf"hidden_act {re.escape(repr(name))}.*gelu, gelu_new, relu, silu"):
        BertForMaskedLM.from_pretrained(folder)


UNKNOWN = {
    "xla_device": True,
    "transformers.js_config": {"dtype": "q8"},
    "do_lower_case": True,
    "vocab_file": "vocab.txt",
    "max_seq_length": 128,
    "train_batch_size": 32,
    "unsloth_version": "2025.1",
    "fusion_layer": 6,  # ALBEF's: its cross-attention would show in the names of the tensors
    "adapters": {"adapters": {}},
    "embedding_size": 32,
    "sep_token": "[SEP]",
    "note of one's own": [1, {"a": None}],
    "nothing": None,
    "quantization_config": None,
    "rope_theta": None,
    "sliding_window": None,
    "auto_map": {"AutoTokenizer": ["x", None]},
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_keys_that_nobodys_bert_reads(folder, key):
    change(folder, **{key: UNKNOWN[key]})
    with pytest.warns(UserWarning, match=re.escape(repr(key))) as caught:
        model = assert_same_logits(folder)
    assert [str(folder / "config.json") in str(each.message) for each in caught if "minibert" in str(each.message)] == [
        True
    ]
    assert caught[0].filename == __file__  # the warning points at the caller
    assert model.load_report.unknown_config_keys == (key,)


HARMLESS = {
    "output_attentions": True,
    "chunk_size_feed_forward": 7,
    "torch_dtype": "float32",
    "problem_type": "regression",
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "gradient_checkpointing": True,
    "tie_encoder_decoder": False,
    "is_composition": False,
    "_commit_hash": "abc",
    "num_beams": 3,
    "classifier_dropout": 0.5,
    "bos_token_id": 7,
}


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_change_nothing(folder, key):
    change(folder, **{key: HARMLESS[key]})
    model = assert_same_logits(folder)
    assert key in model.load_report.ignored_config_keys
    assert model.load_report.unknown_config_keys == ()


@pytest.mark.parametrize("key", sorted(config_keys.NULL_IS_FIXED))
def test_null_is_the_one_value(folder, key):
    change(folder, **{key: None})
    with torch.inference_mode():
        expected = BertForMaskedLM.from_pretrained(folder)(IDS).logits
    if key in ("position_embedding_type", "pruned_heads"):  # transformers wants a bool for the others
        assert_same_logits(folder)
    change(folder, **{key: config_keys.FIXED_KEYS[key]})
    assert torch.equal(BertForMaskedLM.from_pretrained(folder)(IDS).logits, expected)


REFUSED = {
    "position_embedding_type": ["relative_key", "relative_key_query", "alibi", "rotary"],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "is_encoder_decoder": [True],
    "tie_word_embeddings": [False, None],
    "model_type": ["roberta", "distilbert", None, 3],
    "pruned_heads": [{"0": [1]}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq"}],
    "rope_theta": [10000.0],
    "rotary_emb_fraction": [1.0],
    "use_alibi": [True],
    "prenorm": [True],
    "norm_first": [True],
    "feed_forward_type": ["glumlp"],
    "sliding_window": [128],
    "num_key_value_heads": [2],
    "embed_scale": [2.0],
    "num_hidden_groups": [1],
    "auto_map": [{"AutoModelForMaskedLM": "modeling_bert.MyBert"}, {"AutoModel": "x.Y", "AutoConfig": "x.Z"}],
    "layer_norm_eps": ["1e-12", None, 0, 1.0],
    "type_vocab_size": [2.0, None, 0, True],
    "attention_probs_dropout_prob": [None, 1.0, -0.1],
    "vocab_size": [None, -1, 2**31, 99.0],
}


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_make_it_another_model(folder, key):
    for value in REFUSED[key]:
        change(folder, **{key: value})
        with pytest.raises(ValueError, match=rf"config\.json: {key}\b") as caught:
            BertForMaskedLM.from_pretrained(folder)
        assert str(folder) in str(caught.value)


def test_more_layers_than_there_are_take_no_time(folder):
    change(folder, num_hidden_layers=2**31 - 1)
    with pytest.raises(ValueError, match=r"layer 2 is missing \(num_hidden_layers in config.json is 2147483647"):
        BertForMaskedLM.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- asked for by name


def test_a_configuration_by_name(folder):
    change(folder, hidden_act="gelu_new", layer_norm_eps=1e-5)
    config = BertConfig.from_pretrained(folder)
    assert config == BertForMaskedLM.from_pretrained(folder).config
    assert (config.hidden_act, config.layer_norm_eps, config.model_type) == ("gelu_new", 1e-5, "bert")
    assert BertConfig.from_json_file(folder / "config.json") == config
    assert BertConfig.from_pretrained("minibert-uncased").hidden_size == 384
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a proper JSON file"):
        BertConfig.from_pretrained(folder)


def test_transformers_reads_what_is_written(folder, tmp_path):
    change(folder, hidden_act="gelu_pytorch_tanh")
    BertForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert_same_logits(tmp_path / "again")


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_by_name(folder, name):
    for keyword in ("dtype", "torch_dtype"):
        for value in (name, DTYPES[name]):
            model = BertForMaskedLM.from_pretrained(folder, **{keyword: value})
            assert {tensor.dtype for tensor in model.state_dict().values()} == {DTYPES[name]}
    assert BertForMaskedLM.from_pretrained(folder).load_report.dtype == "float32"


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("said", ["dtype", "torch_dtype", "nothing"])
def test_auto_is_what_transformers_takes(folder, name, said):
    transformers.BertForMaskedLM.from_pretrained(folder, dtype=DTYPES[name]).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["dtype"]
    (folder / "config.json").write_text(json.dumps(values if said == "nothing" else {**values, said: name}))
    theirs = transformers.BertForMaskedLM.from_pretrained(folder, dtype="auto")
    assert theirs.dtype == DTYPES[name]
    assert BertForMaskedLM.from_pretrained(folder, dtype="auto").load_report.dtype == name


def test_two_dtypes(folder):
    with pytest.raises(ValueError, match="dtype is 'float32' and torch_dtype 'float16'"):
        BertForMaskedLM.from_pretrained(folder, dtype="float32", torch_dtype="float16")
