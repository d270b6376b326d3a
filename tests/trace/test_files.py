"""Trace files: written, read again, and files that are no traces."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from traced import entry, stored, traced, write_raw

import minibert.trace.tracefile
from minibert import BertConfig, BertForMaskedLM
from minibert.cli.options import as_json
from minibert.parity import TraceFile, diagnose, diff, trace
from minibert.trace.table import INPUTS


def test_a_trace_comes_back_from_its_file(tmp_path):
    a, _, _ = traced()
    a.save(tmp_path / "a.safetensors")
    read = TraceFile(tmp_path / "a.safetensors")
    assert (read.names, read.config, read.dtype) == (a.names, a.config, torch.float32)
    assert all(torch.equal(read.read(name), a.tensors[name]) for name in a.names)
    assert json.loads(read.metadata["settings"])["float32_matmul_precision"] == "highest"
    assert read.title == f"{tmp_path}/a.safetensors (minibert, float32)"


def test_a_write_that_fails_leaves_the_old_trace(tmp_path, monkeypatch):
    a, _, _ = traced(grad=False)
    a.save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    def fails(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(minibert.trace.tracefile, "save_file", fails)
    with pytest.raises(OSError, match="full"):
        a.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


class Hostile:
    """`hostile(words, …)`: the trace at .path, changed, is refused with one line that has `words` and the path."""

    def __init__(self, folder):
        self.given, _, self.ours = traced(grad=False)
        self.path = str(folder / "a.safetensors")
        self.given.save(self.path)

    def refused(self, words):
        with pytest.raises(ValueError, match=words) as error:
            TraceFile(self.path)
        assert self.path in str(error.value)
        assert "\n" not in str(error.value)

    def __call__(self, words, changes=None, **metadata):
        with pytest.raises(ValueError, match=words):
            stored(self.path, self.given, changes, **metadata)
        self.refused(words)


@pytest.fixture
def hostile(tmp_path):
    return Hostile(tmp_path)


def test_both_commands_say_it_in_one_line(hostile, fails):
    hostile("version", version="9")
    for command in (["diff", hostile.path, hostile.path], ["diagnose", hostile.path]):
        said = fails(*command)
        assert "a trace of version '9'; this minibert reads '1'" in said
        assert hostile.path in said


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"",
        lambda whole: whole[:8],
        lambda whole: whole[:-5],
        lambda whole: b'{"input_ids": [[1, 2, 3]]}',
        lambda whole: (2**60).to_bytes(8, "little") + b"{}",
        lambda whole: (100).to_bytes(8, "little") + b"\xff" * 200,
    ],
)
def test_a_file_that_is_not_whole(hostile, damaged):
    whole = Path(hostile.path).read_bytes()
    Path(hostile.path).write_bytes(damaged(whole))
    hostile.refused("not a whole safetensors file")


def test_headers_that_claim_too_much(hostile):
    metadata, config = hostile.given.metadata, json.loads(hostile.given.metadata["config"])
    twice = '{"__metadata__": %s, "logits": %s, "logits": %s}'
    same = json.dumps(entry((1,)))
    write_raw(hostile.path, (twice % (json.dumps(metadata), same, same)).encode(), 4)
    hostile.refused("the key 'logits' stands there 2 times")
    write_raw(hostile.path, {"logits": entry((2**20, 2**20))}, 4, metadata)  # terabytes, in a small file
    hostile.refused("not a whole safetensors file")
    write_raw(hostile.path, {"logits": entry((4,))}, 16, {**metadata, "config": 3})
    hostile.refused("not a whole safetensors file")
    hostile("num_hidden_layers 1073741824", config=json.dumps({**config, "num_hidden_layers": 2**30}))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("logits is I32", {"logits": torch.ones(3, dtype=torch.int32)}),
        ("input_ids is F32", {"input_ids": torch.ones(3, 11)}),
        ("attention_mask", {"attention_mask": torch.ones(3, 10, dtype=torch.int64)}),
        ("attention_mask", {"attention_mask": torch.full((3, 11), 7)}),
        (r"attention_mask is \(11,\), but", {"attention_mask": torch.ones(11, dtype=torch.int64)}),
        ("logits is empty", {"logits": torch.ones(0, 4)}),
        ("unknown", {"input_ids": torch.full((3, 11), 10**6)}),
        ("scores has the shape .1, 3, 5000000, 5000000.", {"input_ids": torch.ones(1, 5000000, dtype=torch.int64)}),
        ("position", {name: torch.ones(1, 50, dtype=torch.int64) for name in INPUTS}),
    ],
)
def test_tensors_that_do_not_fit(hostile, words, changes):
    hostile(words, changes)


@pytest.mark.parametrize(
    ("words", "metadata"),
    [
        ("format", {"format": "other"}),
        ("version", {"version": "9"}),
        *(("config", {"config": text}) for text in ("[1]", "", "[" * 10**5, '{"vocab_size": NaN}')),
        ("dtype in its metadata is 'torch.float32', and must be", {"dtype": "torch.float32"}),
        ("there is no config in its metadata", {"config": None}),
        ("there is no dtype in its metadata", {"dtype": None}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_that_are_wrong(hostile, words, metadata):
    hostile(words, **metadata)


def test_a_trace_without_input_ids(hostile):
    with pytest.raises(ValueError, match="there is no input_ids"):
        stored(hostile.path, hostile.given, without=["input_ids"])


@pytest.mark.parametrize(("value", "verdict"), [("inf", "NaN or infinity in B"), ("1e30", "B is wrong")])
def test_what_is_wrong_in_a_readable_trace_is_a_verdict(tmp_path, value, verdict):
    a, _, ours = traced(grad=False)
    context = a.tensors["layers.0.context"].clone()
    context[0, 0, 0] = float(value)
    b = stored(tmp_path / "b.safetensors", a, {"layers.0.context": context, "extra.mine": torch.ones(0, 3).int()})
    report = diff(a, b, ours)
    last = report.rows[-1]
    assert (report.first_wrong, last.verdict, last.first) == ("layers.0.context", verdict, (0, 0, 0))
    json.loads(as_json(report.to_dict()), parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    assert not diagnose(b, ours).ok


def test_small_integers_are_ids_too(tmp_path):
    a, _, _ = traced(grad=False)
    kinds = dict(zip(INPUTS, (torch.int16, torch.bool, torch.uint8, torch.int32), strict=True))
    small = {name: a.tensors[name].to(kind) for name, kind in kinds.items()}
    save_file({**a.tensors, **small}, tmp_path / "a.safetensors", metadata=a.metadata)
    inputs, _ = TraceFile(tmp_path / "a.safetensors").inputs()
    for name, got in zip(kinds, inputs, strict=True):
        assert torch.equal(got, a.tensors[name])


def test_a_trace_of_inputs_that_the_model_does_not_take():
    a, _, ours = traced(grad=False)
    with pytest.raises(ValueError, match="--model does not take its inputs"):
        diagnose(a, BertForMaskedLM(replace(ours.config, max_position_embeddings=5)))


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """Peak memory of `diff`, in a process of its own: far below the trace, with a model as without."""
    sizes = dict(vocab_size=64, hidden_size=128, num_hidden_layers=40, num_attention_heads=4, intermediate_size=256)
    torch.manual_seed(0)
    ours = BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=64)).eval()
    ours.save_pretrained(tmp_path / "model")
    trace(ours, torch.randint(64, (8, 64))).save(tmp_path / "a.safetensors")
    code = """
import resource, sys
from minibert import BertForMaskedLM
from minibert.parity import TraceFile, diff
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
a, before = TraceFile(sys.argv[1] + "/a.safetensors"), peak()
assert diff(a, a).ok
alone = peak()
assert diff(a, a, BertForMaskedLM.from_pretrained(sys.argv[1] + "/model")).ok
print(alone - before, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    alone, with_model = (int(number) for number in run.stdout.split())
    assert (tmp_path / "a.safetensors").stat().st_size > 160e6
    assert alone < 60e6
    assert with_model < 130e6  # the model in float32 and float64 is 64 MB of that
