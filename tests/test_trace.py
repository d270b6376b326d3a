"""Traces of our model and of transformers', their files, and files that are no traces."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import CONFIGS, MASKS, SIZES, make_batch, twins

from minibert.cli import main
from minibert.parity import TraceFile, trace
from minibert.parity.trace import expected_names

NAME = "3 heads, gelu_new"


def traced(mask="right", grad=True):
    ours, theirs = twins(CONFIGS[NAME], "sdpa")
    batch = make_batch(CONFIGS[NAME], mask, SIZES[NAME], two_segments=True)
    return trace(ours, **batch, grad=grad), trace(theirs, **batch, grad=grad), ours


@pytest.mark.parametrize("mask", MASKS)
def test_both_models_fill_the_table_alike(mask):
    a, b, ours = traced(mask)
    assert a.names == b.names == expected_names(ours.config)
    for name in a.names:
        torch.testing.assert_close(a.tensors[name], b.tensors[name], rtol=0, atol=1e-5)


def test_a_trace_comes_back_from_its_file(tmp_path):
    a, _, _ = traced()
    a.save(tmp_path / "a.safetensors")
    read = TraceFile(tmp_path / "a.safetensors")
    assert (read.names, read.config, read.dtype) == (a.names, a.config, torch.float32)
    assert all(torch.equal(read.read(name), a.tensors[name]) for name in a.names)
    assert json.loads(read.metadata["settings"])["float32_matmul_precision"] == "highest"


def test_hostile_files_are_one_clear_error(tmp_path):
    a, _, _ = traced(grad=False)
    path = tmp_path / "a.safetensors"
    a.save(path)
    whole, tensors = path.read_bytes(), load_file(path)

    def refuses(words, changes=None, **metadata):
        if changes is not None:
            save_file({**tensors, **changes}, path, metadata={**a.metadata, **metadata})
        with pytest.raises(ValueError, match=words):
            TraceFile(path)

    path.write_bytes(whole[:-5])
    refuses("not a whole safetensors file")
    refuses("logits is I32", {"logits": torch.ones(3, dtype=torch.int32)})
    refuses("input_ids is F32", {"input_ids": torch.ones(3, 11)})
    refuses("logits is empty", {"logits": torch.ones(0, 4)})
    refuses("unknown", {"input_ids": torch.full((3, 11), 10**6)})
    refuses("format", {}, format="other")
    refuses("version", {}, version="9")
    refuses("config", {}, config="[1]")
    refuses("dtype", {}, dtype="int4")


def test_the_commands(tmp_path, capsys):
    _, _, ours = traced(grad=False)
    folder = tmp_path / "model"
    ours.save_pretrained(folder)
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for backend, file in zip(("minibert", "transformers"), files, strict=True):
        assert main(["trace", "--model", str(folder), "--backend", backend, "--grad", "--out", file]) == 0
    assert main(["diff", *files, "--model", str(folder)]) == 0
    assert "both right for float32" in capsys.readouterr().out
    assert main(["diagnose", files[1], "--model", str(folder)]) == 0
    tensors = load_file(files[1])
    tensors["layers.1.query"][0, 0, 1, 0] += 1
    save_file(tensors, files[1], metadata=TraceFile(files[0]).metadata)
    capsys.readouterr()
    assert main(["diff", *files, "--model", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"][-1]["name"], report["rows"][-1]["first"]) == ("layers.1.query", [0, 0, 1, 0])
    assert main(["diff", files[0], str(tmp_path / "none")]) == 2
