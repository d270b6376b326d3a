"""Reading and writing checkpoints: every spelling in the wild, every kind of bad file, and interrupted writing."""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minibert import BertConfig, BertForMaskedLM, PackedBatch, hub, writing

# Awkward sizes, no two alike: a swapped axis cannot go unnoticed.
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 16,
}
WORD = "bert.embeddings.word_embeddings.weight"
BIAS = "cls.predictions.bias"
DECODER = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def theirs():
    """transformers' model. All weights are random, also the biases and LayerNorms that start as 0 and 1."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def good(theirs, tmp_path_factory):
    """A folder that nobody may change."""
    folder = tmp_path_factory.mktemp("good")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


@pytest.fixture
def tensors(good):
    return load_file(good / WEIGHTS)


@pytest.fixture(scope="module")
def ours(good):
    return BertForMaskedLM.from_pretrained(good)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 90, (13, 7), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, ids):
    return model(ids).logits


def store(folder, tensors, name=WEIGHTS):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same(model, ours):
    """The same tensors under the same names, bit for bit."""
    state, expected = model.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def refused(folder, match, error=ValueError, mentions=None, **options):
    """Loading is refused with this cause, and the message names the file at fault."""
    with pytest.raises(error, match=match) as caught:
        BertForMaskedLM.from_pretrained(folder, **options)
    assert str(folder if mentions is None else folder / mentions) in str(caught.value)


def loads_or_is_refused(folder, expected):
    """Either this very model, or an error that says where: never another exception, never other weights."""
    try:
        model = BertForMaskedLM.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        assert_same(model, expected)
        return
    assert str(folder) in message


# ------------------------------------------------------------------------------------------------------- every spelling


def test_same_logits_as_transformers(theirs, ours, ids):
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)
    assert not ours.training


def old_layer_norms(tensors):
    for key in list(tensors):
        if ".LayerNorm." in key:
            new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(key)


def decoder_copies(tensors):
    tensors[DECODER], tensors[DECODER_BIAS] = tensors[WORD], tensors[BIAS]


def only_decoder_bias(tensors):
    tensors[DECODER_BIAS] = tensors.pop(BIAS)


def no_prefix(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("bert.")] = tensors.pop(key)


def leftovers(tensors):
    tensors["bert.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"] = torch.ones(32, 32), torch.ones(32)
    tensors["cls.seq_relationship.weight"], tensors["cls.seq_relationship.bias"] = torch.ones(2, 32), torch.ones(2)


def everything_at_once(tensors):
    only_decoder_bias(tensors)
    tensors[DECODER] = tensors[WORD]
    leftovers(tensors)
    old_layer_norms(tensors)


@pytest.mark.parametrize(
    "respell", [old_layer_norms, decoder_copies, only_decoder_bias, no_prefix, leftovers, everything_at_once]
)
def test_each_spelling_gives_the_same_model(folder, tensors, theirs, ours, ids, respell):
    assert not {DECODER, DECODER_BIAS} & tensors.keys()  # so the unchanged file is the spelling without a decoder
    respell(tensors)
    store(folder, tensors)
    model = BertForMaskedLM.from_pretrained(folder)
    assert_same(model, ours)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)


def test_spelling_is_reported(folder, tensors):
    old_layer_norms(tensors)
    decoder_copies(tensors)
    leftovers(tensors)
    store(folder, tensors)
    report = BertForMaskedLM.from_pretrained(folder).load_report
    assert report.renamed["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"
    assert report.renamed["bert.embeddings.LayerNorm.beta"] == "bert.embeddings.LayerNorm.bias"
    assert len(report.renamed) == 2 * (1 + 2 * 5 + 1)
    assert report.tied == {DECODER: WORD, DECODER_BIAS: BIAS}
    assert set(report.ignored) == {
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    }
    assert all(report.ignored.values())  # each with its reason
    assert not set(report.loaded) & {*report.ignored, *report.tied}
    assert set(report.loaded) | {*report.ignored, *report.tied} == tensors.keys()


def test_gamma_is_renamed_only_under_a_layer_norm(folder, tensors):
    name = "bert.encoder.layer.0.output.dense."
    tensors[name + "gamma"] = tensors.pop(name + "weight")
    store(folder, tensors)
    refused(folder, "output.dense", mentions=WEIGHTS)


@pytest.mark.parametrize(("copy", "original"), [(DECODER, WORD), (DECODER_BIAS, BIAS)])
def test_tied_copies_that_differ(folder, tensors, copy, original):
    decoder_copies(tensors)
    tensors[copy] = tensors[copy].clone()
    tensors[copy].view(-1)[-1] += 1e-3
    store(folder, tensors)
    refused(folder, f"{re.escape(copy)} and {re.escape(original)} .*differ", mentions=WEIGHTS)


def test_tied_copy_of_another_shape(folder, tensors):
    decoder_copies(tensors)
    tensors[DECODER] = tensors[WORD][:1]
    store(folder, tensors)
    refused(folder, f"{re.escape(DECODER)} and {re.escape(WORD)} .*differ", mentions=WEIGHTS)


def test_tied_copies_with_nan_are_equal(folder, tensors):
    tensors[WORD][3, 4] = float("nan")
    tensors[DECODER] = tensors[WORD]
    store(folder, tensors)
    with pytest.warns(UserWarning, match="NaN"):
        model = BertForMaskedLM.from_pretrained(folder)
    assert model.load_report.non_finite == ("embeddings.word.weight",)
    tensors[DECODER] = tensors[WORD].nan_to_num()
    store(folder, tensors)
    refused(folder, "differ", mentions=WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder, tensors, dtype):
    store(folder, {key: tensor.to(dtype) for key, tensor in tensors.items()})
    name = "bert.encoder.layer.3.output.dense.weight"
    for asked, expected in ((None, torch.float32), (dtype, dtype), (torch.float64, torch.float64)):
        model = BertForMaskedLM.from_pretrained(folder, dtype=asked)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {expected}
        assert torch.equal(model.layers[3].feed_forward.output.weight, tensors[name].to(dtype).to(expected))
        assert model.load_report.dtype == str(expected).removeprefix("torch.")
        assert model.load_report.file_dtypes == {{torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]: len(tensors)}


def test_float32_file_in_half_precision(good, ours):
    model = BertForMaskedLM.from_pretrained(good, dtype=torch.bfloat16)
    assert_same(model, BertForMaskedLM.from_pretrained(good).to(torch.bfloat16))
    assert model.load_report.file_dtypes == {"F32": 90}


def test_older_transformers_dtype_key(folder, ours):
    values = json.loads((folder / "config.json").read_text())
    del values["dtype"]
    (folder / "config.json").write_text(json.dumps(values | {"torch_dtype": "float16"}))
    assert_same(BertForMaskedLM.from_pretrained(folder), ours)


@pytest.fixture
def sharded(theirs, tmp_path):
    folder = tmp_path / "sharded"
    theirs.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / WEIGHTS).exists()
    return folder


def test_sharded(sharded, ours):
    model = BertForMaskedLM.from_pretrained(sharded)
    assert_same(model, ours)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert list(model.load_report.files) == shards
    assert model.load_report.sha256 == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def test_encoder_only(theirs, ours, tmp_path, ids):
    theirs.bert.save_pretrained(tmp_path)  # no `bert.` prefix, no head
    refused(tmp_path, "init_missing_head", mentions=WEIGHTS)
    model = BertForMaskedLM.from_pretrained(tmp_path, init_missing_head=True)
    assert set(model.load_report.initialised) == {
        "head.bias",
        "head.dense.weight",
        "head.dense.bias",
        "head.norm.weight",
        "head.norm.bias",
    }
    batch = PackedBatch.from_padded(ids)
    with torch.inference_mode():
        assert torch.equal(model.encode(batch), ours.encode(batch))
    assert logits(model, ids).isfinite().all()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_init_missing_head_changes_nothing_in_a_whole_checkpoint(good, ours):
    model = BertForMaskedLM.from_pretrained(good, init_missing_head=True)
    assert_same(model, ours)
    assert model.load_report.initialised == ()


def test_half_a_head_is_an_error_all_the_same(folder, tensors):
    del tensors["cls.predictions.transform.dense.weight"]
    store(folder, tensors)
    refused(folder, "transform.dense.weight is missing", mentions=WEIGHTS, init_missing_head=True)


# ----------------------------------------------------------------------------------------------------------- the report


def test_load_report(good, ours, tensors):
    report = ours.load_report
    assert report.name == str(good)
    assert report.files == (good / WEIGHTS,)
    assert report.file_dtypes == {"F32": 90}
    assert report.dtype == "float32"
    assert report.loaded == tuple(sorted(tensors))
    assert (report.renamed, report.tied, report.ignored) == ({}, {}, {})
    assert (report.initialised, report.non_finite) == ((), ())
    assert {"architectures", "transformers_version", "use_cache"} <= set(report.ignored_config_keys)
    assert not set(report.ignored_config_keys) & set(SIZES)
    assert report.sha256 == {WEIGHTS: hashlib.sha256((good / WEIGHTS).read_bytes()).hexdigest()}


def test_sha256_of_a_file_that_has_changed_since(folder, tensors):
    report = BertForMaskedLM.from_pretrained(folder).load_report
    tensors["bert.pooler.dense.bias"] = torch.ones(32)
    store(folder, tensors)
    with pytest.raises(ValueError, match="has changed"):
        _ = report.sha256


# ---------------------------------------------------------------------------------------------------------- the decoder


def test_the_decoder_cannot_come_untied(good, ids):
    model = BertForMaskedLM.from_pretrained(good)
    assert len(model.state_dict()) == 4 + 1 + 5 * 12 + 5
    assert not [name for name in model.state_dict() if "decoder" in name]
    before = logits(model, ids)
    with torch.no_grad():
        model.embeddings.word.weight[98] = 0  # a word that is not in the input: only its own score may change
    after = logits(model, ids)
    assert torch.equal(after[..., :98], before[..., :98])
    assert torch.allclose(after[..., 98], model.head.bias[98])
    model.double()
    assert torch.allclose(logits(model, ids)[..., 98], model.head.bias[98])


# -------------------------------------------------------------------------------------------------- the caller's errors


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "int8", "float", 16])
def test_dtype_that_is_none(good, dtype):
    with pytest.raises((TypeError, ValueError), match="dtype"):
        BertForMaskedLM.from_pretrained(good, dtype=dtype)


def test_device(good, ours):
    assert_same(BertForMaskedLM.from_pretrained(good, device="cpu"), ours)
    assert_same(BertForMaskedLM.from_pretrained(good, device=torch.device("cpu")), ours)
    with pytest.raises((RuntimeError, ValueError), match="nonsense"):
        BertForMaskedLM.from_pretrained(good, device="nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(good):
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=r"CUDA|NVIDIA"):  # torch's own error
        BertForMaskedLM.from_pretrained(good, device="cuda")


def test_misspelt_keyword(good):
    with pytest.raises(TypeError, match="torch_type"):
        BertForMaskedLM.from_pretrained(good, torch_type=torch.float16)


def test_unknown_folder(tmp_path, good, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "nowhere"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            BertForMaskedLM.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="is a file"):
        BertForMaskedLM.from_pretrained(good / WEIGHTS)
    with pytest.raises(FileNotFoundError):
        BertForMaskedLM.from_pretrained("")


def test_revision_of_a_folder(good):
    with pytest.raises(ValueError, match=r"'v1'.*is a folder"):
        BertForMaskedLM.from_pretrained(good, revision="v1")


def test_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json", FileNotFoundError)


def test_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "no such file", FileNotFoundError, mentions=WEIGHTS)


# --------------------------------------------------------------------------------------------------------- broken files


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def header_of(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length].decode(), raw[8 + length :]


def with_header(header, data):
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def duplicate_key(raw):
    header, data = header_of(raw)
    entry = json.dumps(json.loads(header)[BIAS])
    return with_header(f'{{"{BIAS}":{entry},' + header[1:], data)


def nested_header(raw):
    return with_header("[" * 100_000, header_of(raw)[1])


def endless_number(raw):
    header, data = header_of(raw)
    return with_header(header.replace('"shape":[99', '"shape":[' + "9" * 5000), data)


BROKEN = {
    "truncated in the data": (lambda raw: raw[:-5], "not a whole safetensors file"),
    "truncated in the header": (lambda raw: raw[:500], "header claims"),
    "truncated in the length": (lambda raw: raw[:5], "cut off"),
    "too long": (lambda raw: raw + b"\0\0\0\0", "not a whole safetensors file"),
    "empty": (lambda raw: b"", "it is empty"),
    "corrupt header": (lambda raw: raw[:8] + b"x" + raw[9:], "not a whole safetensors file"),
    "duplicate key": (duplicate_key, f"{re.escape(BIAS)}.* 2 times"),
    "oversized header": (lambda raw: struct.pack("<Q", 2**63) + raw[8:], f"header claims {2**63} bytes"),
    "deeply nested header": (nested_header, "not a whole safetensors file"),
    "endless number": (endless_number, "not a whole safetensors file"),
    "Git-LFS pointer": (
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:68d45e\nsize 440449768\n",
        "Git-LFS pointer.*git lfs pull",
    ),
    "HTML page": (lambda raw: b"<!DOCTYPE html><html><title>503</title></html>", "HTML page"),
    "zipped pickle": (lambda raw: b"PK\x03\x04" + raw, "pickle"),
    "random bytes": (lambda raw: bytes(range(255, 0, -1)) * 9, "not a safetensors file"),
    "JSON": (lambda raw: b'{"logits": [1, 2, 3]}', "not a safetensors file"),
}


@pytest.mark.parametrize(("spoil", "match"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_weights_file(folder, spoil, match):
    path = folder / WEIGHTS
    path.write_bytes(spoil(path.read_bytes()))
    refused(folder, match, mentions=WEIGHTS)


def test_pickle_under_another_name_is_not_opened(folder, tmp_path):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(folder, "pickle under another name", mentions=WEIGHTS)
    assert not (tmp_path / "sprung").exists()


def test_only_a_pickle(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(folder, r"pytorch_model\.bin is a pickle.*[Cc]onvert.*save_file", FileNotFoundError)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap does work


def test_wrong_shape(folder, tensors):
    name = "bert.embeddings.position_embeddings.weight"
    tensors[name] = torch.zeros(17, 32)
    store(folder, tensors)
    refused(folder, rf"{re.escape(name)} has shape \(17, 32\).*\(16, 32\)", mentions=WEIGHTS)


def test_transposed(folder, tensors):
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    tensors[name] = tensors[name].T.contiguous()
    store(folder, tensors)
    refused(folder, rf"{re.escape(name)} has shape \(32, 37\).*\(37, 32\)", mentions=WEIGHTS)


def test_missing_tensors(folder, tensors):
    del tensors["bert.encoder.layer.2.output.dense.bias"]
    store(folder, tensors)
    refused(folder, r"tensor bert\.encoder\.layer\.2\.output\.dense\.bias is missing", mentions=WEIGHTS)
    del tensors[WORD]
    store(folder, tensors)
    refused(folder, r"tensors .*word_embeddings.* are missing", mentions=WEIGHTS)


def test_extra_tensor(folder, tensors):
    tensors["bert.encoder.layer.0.adapter.weight"] = torch.ones(3)
    store(folder, tensors)
    refused(folder, r"tensor bert\.encoder\.layer\.0\.adapter\.weight is not expected", mentions=WEIGHTS)


def test_two_spellings_of_one_tensor(folder, tensors):
    tensors["bert.embeddings.LayerNorm.gamma"] = tensors["bert.embeddings.LayerNorm.weight"]
    store(folder, tensors)
    refused(folder, r"LayerNorm\.(gamma|weight) and .*two spellings", mentions=WEIGHTS)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "I64"), (torch.int8, "I8"), (torch.bool, "BOOL")])
def test_weights_that_are_no_floats(folder, tensors, dtype, name):
    tensors[WORD] = tensors[WORD].to(dtype)
    store(folder, tensors)
    refused(folder, f"{re.escape(WORD)} is {name}", mentions=WEIGHTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, tensors, value):
    tensors["bert.encoder.layer.4.attention.self.key.weight"][31, 31] = value
    store(folder, tensors)
    with pytest.warns(UserWarning, match=r"NaN or infinite weights in layers\.4\.attention\.qkv\.weight") as caught:
        model = BertForMaskedLM.from_pretrained(folder)
    assert str(folder / WEIGHTS) in str(caught[0].message)
    assert caught[0].filename == __file__  # the warning points at the caller
    assert model.load_report.non_finite == ("layers.4.attention.qkv.weight",)


def test_large_finite_weights_are_no_reason_to_warn(folder, tensors):
    tensors[WORD][:] = 3e38  # their sum overflows
    store(folder, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BertForMaskedLM.from_pretrained(folder).load_report.non_finite == ()


def test_config_contradicts_the_tensors(folder):
    change_config(folder, hidden_size=64)
    refused(folder, r"\(99, 32\).*config.json.*\(99, 64\)", mentions=WEIGHTS)
    change_config(folder, hidden_size=32, num_hidden_layers=4)
    refused(folder, r"not expected.*num_hidden_layers in config.json is 4", mentions=WEIGHTS)
    change_config(folder, num_hidden_layers=6)
    refused(folder, r"missing.*num_hidden_layers in config.json is 6", mentions=WEIGHTS)


# --------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00004.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, None]
)
def test_shard_that_is_no_plain_name(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][WORD] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, re.escape(repr(name)), mentions=INDEX)


def test_shard_is_missing(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[1]
    path.unlink()
    refused(sharded, re.escape(path.name), FileNotFoundError)


def test_shard_is_cut_off(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, "not a whole safetensors file", mentions=path.name)


def test_index_that_lies(sharded):
    good = json.loads((sharded / INDEX).read_text())["weight_map"]
    others = set(good.values()) - {good[WORD]}
    for lie in (
        {**good, WORD: min(others)},  # in another shard
        {**good, "bert.embeddings.phantom.weight": good[WORD]},  # in no shard
        {key: name for key, name in good.items() if key != WORD},  # in a shard, not in the index
    ):
        (sharded / INDEX).write_text(json.dumps({"weight_map": lie}))
        refused(sharded, "where the index says", mentions=INDEX)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", "<html>"])
def test_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, "weight_map|JSON", mentions=INDEX)


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    twice = next(iter(load_file(first)))
    store(sharded, {**load_file(second), twice: load_file(first)[twice]}, second.name)
    refused(sharded, re.escape(twice))


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


# ----------------------------------------------------------------------------------------------------------- any damage


@pytest.fixture(scope="module")
def scratch(good, tmp_path_factory):
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("scratch") / "checkpoint"))


quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@quick
@given(st.data())
def test_cut_at_any_byte(good, scratch, data):
    raw = (good / WEIGHTS).read_bytes()
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    cut = data.draw(st.one_of(st.integers(0, length + 8), st.integers(0, len(raw) - 1)), label="cut")
    (scratch / WEIGHTS).write_bytes(raw[:cut])
    refused(scratch, "safetensors file", mentions=WEIGHTS)


@quick
@given(st.data())
def test_any_bytes_of_the_header_changed(good, scratch, ours, data):
    raw = bytearray((good / WEIGHTS).read_bytes())
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    place = st.one_of(st.integers(0, 80), st.integers(0, length - 1))
    printable = st.sampled_from(b'0123456789"{}[],:._FIU')
    changes = st.dictionaries(place, st.one_of(printable, st.integers(0, 255)), min_size=1, max_size=3)
    for position, byte in data.draw(changes, label="changes").items():
        raw[position] = byte
    (scratch / WEIGHTS).write_bytes(raw)
    loads_or_is_refused(scratch, ours)


# -------------------------------------------------------------------------------------------------------------- writing


def test_transformers_reads_it_back(ours, theirs, ids, tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    ours.save_pretrained(tmp_path / "new" / "folder")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = transformers.BertForMaskedLM.from_pretrained(
                tmp_path / "new" / "folder", output_loading_info=True
            )
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert not any(info.values()), info
    assert torch.equal(logits(model, ids), logits(theirs, ids))


def test_what_is_written(ours, tensors, tmp_path):
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = load_file(tmp_path / WEIGHTS)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert_same(BertForMaskedLM.from_pretrained(tmp_path), ours)


def test_half_precision_survives_the_round_trip(good, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = BertForMaskedLM.from_pretrained(good, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same(BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model)
    back = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}


def test_save_into_the_folder_it_came_from(folder, ours):
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.head.bias.add_(1)
    model.save_pretrained(folder)
    assert_same(BertForMaskedLM.from_pretrained(folder), model)


def test_config_survives_the_round_trip(tmp_path):
    config = BertConfig(**SIZES, hidden_act="gelu_new", layer_norm_eps=1e-5, type_vocab_size=3, pad_token_id=None)
    model = BertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    back = BertForMaskedLM.from_pretrained(tmp_path)
    assert back.config == config
    assert_same(back, model)


class Interruption(BaseException):
    """Neither an Exception nor a KeyboardInterrupt, which would end the test run."""


def interrupt_save_file(monkeypatch, error):
    def half(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise error

    monkeypatch.setattr(writing, "save_file", half)


def interrupt_replace(nth):
    def patch(monkeypatch, error):
        replace, calls = os.replace, []

        def stop(source, target):
            calls.append(target)
            if len(calls) == nth:
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)

    return patch


@pytest.mark.parametrize("before", ["nothing", "another model", "another size"])
@pytest.mark.parametrize(
    "interrupt",
    [interrupt_save_file, *(interrupt_replace(nth) for nth in (1, 2, 3))],
    ids=["save", "first", "second", "third"],
)
@pytest.mark.parametrize("error", [OSError("No space left on device"), Interruption()], ids=["full", "killed"])
def test_interrupted_writing(ours, tmp_path, monkeypatch, before, interrupt, error):
    old = None
    if before != "nothing":
        torch.manual_seed(0)
        changed = {"num_hidden_layers": 2} if before == "another size" else {}
        old = BertForMaskedLM(BertConfig(**{**SIZES, **changed}))
        old.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, error)
        try:
            ours.save_pretrained(tmp_path)
            expected = ours  # there was no third file to move
        except type(error):
            expected = old
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", WEIGHTS}  # no temporary file
    if expected is None:
        refused(tmp_path, "config.json", FileNotFoundError)
    else:
        assert_same(BertForMaskedLM.from_pretrained(tmp_path), expected)
    ours.save_pretrained(tmp_path)  # and the next attempt makes it whole
    assert_same(BertForMaskedLM.from_pretrained(tmp_path), ours)


def die_at(moment):
    """Kill this process when it touches the file system for the moment-th time from now."""
    seen = 0

    def hook(event, _):
        nonlocal seen
        if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes a fork to be killed and to look afterwards")
@pytest.mark.parametrize("before", ["one file", "shards", "the same configuration"])
def test_killed_at_any_moment_of_a_save_a_folder_holds_the_old_model_or_the_new(before, good, ours, tmp_path):
    """A model saved over another one with other sizes, or with the same: SIGKILL at every operation on files."""
    changed = {} if before == "the same configuration" else {"num_hidden_layers": 2, "layer_norm_eps": 1e-3}
    old = BertForMaskedLM(BertConfig(**{**SIZES, **changed})).eval()
    found, moment, status = [], 0, None
    while status != 0 and moment < 200:
        folder = tmp_path / str(moment)
        old.save_pretrained(folder)
        if before == "shards":
            index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), "one.safetensors")}
            (folder / WEIGHTS).rename(folder / "one.safetensors")
            (folder / INDEX).write_text(json.dumps(index))
        if (child := os.fork()) == 0:
            die_at(moment)
            ours.save_pretrained(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        loaded = BertForMaskedLM.from_pretrained(folder)
        found.append("new" if loaded.head.bias[0] != 0 else "old")
        assert_same(loaded, ours if found[-1] == "new" else old)
        ours.save_pretrained(folder)  # and the next attempt makes it whole
        assert_same(BertForMaskedLM.from_pretrained(folder), ours)
        moment += 1
    assert status == 0, "there are more moments than this test has tried"
    assert found == sorted(found, reverse=True), "once the new model is there, it stays"
    assert found.count("old") >= 5


def test_a_configuration_that_waits_for_other_weights_is_not_read(ours, tmp_path):
    """What a killed save left is void as soon as somebody else has put other weights there."""
    ours.save_pretrained(tmp_path)
    waiting = {"weights_sha256": "0" * 64, "config": {**ours.config.to_dict(), "layer_norm_eps": 0.5}}
    (tmp_path / hub.NEXT).write_text(json.dumps(waiting))
    assert BertForMaskedLM.from_pretrained(tmp_path).config == ours.config
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / hub.NEXT).exists()


@pytest.mark.parametrize("missing", ["second names", "room", "permission"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(ours, tmp_path, monkeypatch, missing):
    old = BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 2})).eval()
    old.save_pretrained(tmp_path)
    if missing == "second names":  # as on FAT: a save works all the same
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no hard links here")))
        ours.save_pretrained(tmp_path)
        assert_same(BertForMaskedLM.from_pretrained(tmp_path), ours)
        return
    error = OSError(28, "No space left on device") if missing == "room" else PermissionError(13, "Permission denied")
    monkeypatch.setattr("minibert.atomic.tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match=error.strerror):
        ours.save_pretrained(tmp_path)
    assert_same(BertForMaskedLM.from_pretrained(tmp_path), old)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak memory in /proc")
def test_peak_memory_of_loading(tmp_path):
    config = BertConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=7, num_attention_heads=8, intermediate_size=2048
    )
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert 100e6 < size < 120e6
    program = """if True:
        import re, sys, torch, minibert
        def status(key):
            return 1024 * int(re.search(key + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1])
        torch.set_num_threads(1)
        before = status("VmRSS")
        model = minibert.BertForMaskedLM.from_pretrained(sys.argv[1])
        print(status("VmHWM") - before)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    # The weights once, which nobody can do without. The allowance is for the largest single tensor (15 % here, the
    # word embeddings), which is there twice while it is copied out of the file, and a few MB of code that is first
    # run, modules and headers. Holding the file and the model side by side would be 2.0.
    assert size < int(done.stdout) < 1.25 * size


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


def test_others_may_read_what_is_saved(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_full_disk_is_an_os_error(tmp_path):
    code = (
        "import resource, signal, sys; from minibert import *; "
        f"model = BertForMaskedLM(BertConfig(**{SIZES})); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: model.save_pretrained(sys.argv[1])\n"
        "except OSError as error: print('stopped', error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("stopped")
    assert list(tmp_path.iterdir()) == []
