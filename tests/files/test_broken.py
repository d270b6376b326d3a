"""Checkpoints that are broken are refused by the real cause: cut files, pickles, shards that lie, any damage."""

import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
from checkpoints import BIAS, INDEX, WEIGHTS, WORD, assert_same, refused, store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minibert import BertForMaskedLM


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


WHOLE = "not a whole safetensors file"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:68d45e\nsize 440449768\n"
BROKEN = {
    "cut in the data": (lambda raw: raw[:-5], WHOLE),
    "cut in the header": (lambda raw: raw[:500], WHOLE),
    "cut in the length": (lambda raw: raw[:5], WHOLE),
    "too long": (lambda raw: raw + b"\0\0\0\0", WHOLE),
    "empty": (lambda raw: b"", "it is empty"),
    "corrupt header": (lambda raw: raw[:8] + b"x" + raw[9:], WHOLE),
    "duplicate key": (duplicate_key, f"{re.escape(BIAS)}.* 2 times"),
    "oversized header": (lambda raw: struct.pack("<Q", 2**63) + raw[8:], WHOLE),
    "deeply nested header": (lambda raw: with_header("[" * 100_000, header_of(raw)[1]), WHOLE),
    "Git-LFS pointer": (lambda raw: LFS, "Git-LFS pointer.*git lfs pull"),
    "HTML page": (lambda raw: b"<!DOCTYPE html><html><title>503</title></html>", "HTML page"),
    "zipped pickle": (lambda raw: b"PK\x03\x04" + raw, "pickle"),
    "JSON": (lambda raw: b'{"logits": [1, 2, 3]}', WHOLE + r".*it starts with b'\{\"logits"),
}


@pytest.mark.parametrize(("spoil", "match"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_weights_file(folder, spoil, match):
    path = folder / WEIGHTS
    path.write_bytes(spoil(path.read_bytes()))
    refused(folder, match, mentions=WEIGHTS)


def test_a_pickle_is_not_opened(folder, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (folder / WEIGHTS).write_bytes(trap)
    refused(folder, "pickle under another name", mentions=WEIGHTS)
    (folder / WEIGHTS).unlink()
    refused(folder, "no such file", FileNotFoundError, mentions=WEIGHTS)
    (folder / "pytorch_model.bin").write_bytes(trap)
    refused(folder, r"pytorch_model\.bin is a pickle.*[Cc]onvert.*save_file", FileNotFoundError)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # the trap does work


# --------------------------------------------------------------------------------------------------------------- shards


def test_sharded(sharded, ours):
    model = BertForMaskedLM.from_pretrained(sharded)
    assert_same(model, ours)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert list(model.load_report.files) == shards
    assert model.load_report.sha256.keys() == {path.name for path in shards}


def test_index_that_lies(sharded):
    good = json.loads((sharded / INDEX).read_text())["weight_map"]
    others, elsewhere = set(good.values()) - {good[WORD]}, "where the index says"
    names = ("../model-00001-of-00004.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, None)
    for lie, match in (
        ({**good, WORD: min(others)}, elsewhere),  # in another shard
        ({**good, "bert.embeddings.phantom.weight": good[WORD]}, elsewhere),  # in no shard
        ({key: name for key, name in good.items() if key != WORD}, elsewhere),  # not in the index
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
        *(({**good, WORD: name}, re.escape(repr(name))) for name in names),
    ):
        (sharded / INDEX).write_text(json.dumps({"weight_map": lie}))
        refused(sharded, match, mentions=INDEX)
    (sharded / INDEX).write_text("<html>")
    refused(sharded, "HTML", mentions=INDEX)


def test_shards_that_are_not_whole(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    raw, twice = second.read_bytes(), next(iter(load_file(first)))
    second.write_bytes(raw[:-1])
    refused(sharded, WHOLE, mentions=second.name)
    second.write_bytes(raw)
    store(sharded, {**load_file(second), twice: load_file(first)[twice]}, second.name)
    refused(sharded, rf"{re.escape(twice)} is also in {first.name}", mentions=second.name)
    second.unlink()
    refused(sharded, re.escape(second.name), FileNotFoundError)


# ----------------------------------------------------------------------------------------------------------- any damage


@pytest.fixture(scope="module")
def scratch(good, tmp_path_factory):
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("scratch") / "checkpoint"))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_of_the_header_changed_or_cut_anywhere(good, scratch, ours, data):
    raw = bytearray((good / WEIGHTS).read_bytes())
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    place = st.one_of(st.integers(0, 80), st.integers(0, length - 1))
    printable = st.sampled_from(b'0123456789"{}[],:._FIU')
    changes = st.dictionaries(place, st.one_of(printable, st.integers(0, 255)), max_size=3)
    for position, byte in data.draw(changes, label="changes").items():
        raw[position] = byte
    cut = data.draw(st.none() | st.integers(0, length + 8) | st.integers(0, len(raw) - 1), label="cut")
    (scratch / WEIGHTS).write_bytes(raw[:cut])
    try:
        model = BertForMaskedLM.from_pretrained(scratch)
    except (ValueError, FileNotFoundError) as error:  # never another exception, never other weights
        said = str(error)
    else:
        assert_same(model, ours)
        return
    assert str(scratch) in said
