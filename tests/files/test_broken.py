"""Checkpoints that are broken are refused by the real cause: cut files, pickles, shards that lie, any damage."""

import json
import os
import pickle
import re
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import (
    BIAS,
    INDEX,
    WEIGHTS,
    WORD,
    change_config,
    loads_or_is_refused,
    refused,
    store,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minibert import BertForMaskedLM

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
    "truncated in the header": (lambda raw: raw[:500], "not a whole safetensors file"),
    "truncated in the length": (lambda raw: raw[:5], "not a whole safetensors file"),
    "too long": (lambda raw: raw + b"\0\0\0\0", "not a whole safetensors file"),
    "empty": (lambda raw: b"", "it is empty"),
    "corrupt header": (lambda raw: raw[:8] + b"x" + raw[9:], "not a whole safetensors file"),
    "duplicate key": (duplicate_key, f"{re.escape(BIAS)}.* 2 times"),
    "oversized header": (lambda raw: struct.pack("<Q", 2**63) + raw[8:], "not a whole safetensors file"),
    "deeply nested header": (nested_header, "not a whole safetensors file"),
    "endless number": (endless_number, "not a whole safetensors file"),
    "Git-LFS pointer": (
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:68d45e\nsize 440449768\n",
        "Git-LFS pointer.*git lfs pull",
    ),
    "HTML page": (lambda raw: b"<!DOCTYPE html><html><title>503</title></html>", "HTML page"),
    "zipped pickle": (lambda raw: b"PK\x03\x04" + raw, "pickle"),
    "random bytes": (lambda raw: bytes(range(255, 0, -1)) * 9, "not a whole safetensors file"),
    "JSON": (lambda raw: b'{"logits": [1, 2, 3]}', "not a whole safetensors file"),
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
