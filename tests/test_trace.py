"""Traces of our model and of transformers', their files, and files that are no traces."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import CONFIGS, MASKS, SIZES, make_batch, twins

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.cli import main
from minibert.parity import TraceFile, trace
from minibert.parity.trace import INPUTS, expected_names

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


def write_raw(path, header, size=0, metadata=None):
    """A safetensors file byte by byte, with `size` bytes of zeros behind the header that take no room on the disk."""
    text = header if isinstance(header, bytes) else json.dumps({"__metadata__": metadata, **header}).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def entry(shape, start=0, dtype="F32"):
    size = math.prod(shape) * {"F32": 4, "I64": 8}[dtype]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}


def test_hostile_files_are_one_clear_error(tmp_path, capsys):
    a, _, ours = traced(grad=False)
    path, good = tmp_path / "a.safetensors", tmp_path / "good.safetensors"
    ours.save_pretrained(tmp_path / "model")
    a.save(path)
    a.save(good)
    whole, tensors = path.read_bytes(), dict(a.tensors)

    def refused(words):
        commands = [["diff", str(path), str(good)], ["diff", str(good), str(path)]]
        for command in [*commands, ["diagnose", str(path), "--model", str(tmp_path / "model")]]:
            assert main(command) == 2
            said = capsys.readouterr().err
            assert re.search(words, said), said
            assert str(path) in said
            assert said.count("\n") == 1

    def refuses(words, changes=None, **metadata):
        save_file({**tensors, **(changes or {})}, path, metadata={**a.metadata, **metadata})
        refused(words)

    for cut in (0, 5, 8, 100, len(whole) - 5):
        path.write_bytes(whole[:cut])
        refused("not a whole safetensors file")
    path.write_text('{"input_ids": [[1, 2, 3]], "text": "not a trace"}')
    refused("not a safetensors file: it starts with")
    path.write_bytes((2**60).to_bytes(8, "little") + whole[8:])
    refused("its header claims 1152921504606846976 bytes")
    path.write_bytes(whole[:8] + b"\xff" * (len(whole) - 8))
    refused("not a whole safetensors file")

    twice = '{"__metadata__": %s, "logits": %s, "logits": %s}'
    same = json.dumps(entry((1,)))
    write_raw(path, (twice % (json.dumps(a.metadata), same, same)).encode(), 4)
    refused("'logits' stands there 2 times")
    write_raw(path, {"logits": entry((2**20, 2**20))}, 4, a.metadata)  # terabytes, in a small file
    refused("not a whole safetensors file")
    write_raw(path, {"logits": entry((4,))}, 16, {**a.metadata, "config": 3})
    refused("not a whole safetensors file")
    write_raw(path, b" " * (2**24 + 1))
    refused("no trace has so many tensors")
    many = {**json.loads(a.metadata["config"]), "num_hidden_layers": 2**30}
    refuses("num_hidden_layers 1073741824", config=json.dumps(many))
    # 0.5 GB that agree with the config: one row of 2^27 logits
    huge = {**json.loads(a.metadata["config"]), "vocab_size": 2**27}
    header = {"input_ids": entry((1, 1), 0, "I64"), "logits": entry((1, 1, 2**27), 8)}
    write_raw(path, header, 8 + 4 * 2**27, {**a.metadata, "config": json.dumps(huge)})
    refused("logits has the shape .1, 1, 134217728.")

    refuses("logits is I32", {"logits": torch.ones(3, dtype=torch.int32)})
    refuses("input_ids is F32", {"input_ids": torch.ones(3, 11)})
    refuses("input_ids", {"input_ids": torch.ones(3, dtype=torch.int64)})
    refuses("input_ids", {"input_ids": torch.ones(3, 4, 5, dtype=torch.int64)})
    refuses("attention_mask", {"attention_mask": torch.ones(3, 10, dtype=torch.int64)})
    refuses("attention_mask", {"attention_mask": torch.full((3, 11), 7)})
    refuses("labels", {"labels": torch.ones(3, 10, dtype=torch.int64)})
    refuses("logits is empty", {"logits": torch.ones(0, 4)})
    refuses("unknown", {"input_ids": torch.full((3, 11), 10**6)})
    refuses("embeddings.sum has the shape .1, 5000000, 24.", {"input_ids": torch.ones(1, 5000000, dtype=torch.int64)})
    refuses("position", {name: torch.ones(1, 50, dtype=torch.int64) for name in INPUTS})
    refuses("format", format="other")
    refuses("version", version="9")
    for config in ("[1]", "", "{", "[" * 10**5, '{"vocab_size": NaN}', '{"hidden_size": 1e999}'):
        refuses("config", config=config)
    refuses("dtype", dtype="int4")
    refuses("dtype in its metadata is 'torch.float32', and must be", dtype="torch.float32")
    for key in ("config", "dtype"):
        save_file(tensors, path, metadata={name: said for name, said in a.metadata.items() if name != key})
        refused(f"there is no {key} in its metadata")
    del tensors["input_ids"]
    refuses("there is no input_ids")


def test_what_is_wrong_in_a_readable_trace_is_a_verdict(tmp_path, capsys):
    a, _, ours = traced(grad=False)
    a.save(tmp_path / "a.safetensors")
    ours.save_pretrained(tmp_path / "model")
    for value, words in (("nan", "NaN or infinity in B"), ("inf", "NaN or infinity in B"), ("1e30", "B is wrong")):
        tensors = dict(a.tensors)
        tensors["layers.0.context"] = tensors["layers.0.context"].clone()
        tensors["layers.0.context"][0, 0, 0] = float(value)
        tensors["mine"] = torch.ones(0, 3, dtype=torch.int32)  # nobody asked for it, and nobody minds
        save_file(tensors, tmp_path / "b.safetensors", metadata=a.metadata)
        files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
        assert main(["diff", *files, "--model", str(tmp_path / "model")]) == 1
        out = capsys.readouterr().out
        assert f"{words}, first at (0, 0, 0)" in out
        assert "first wrong: layers.0.context. The last good one is layers.0.probabilities" in out
        assert main(["diff", *files, "--model", str(tmp_path / "model"), "--json"]) == 1
        json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    assert main(["diagnose", files[1], "--model", str(tmp_path / "model")]) == 1
    assert "none of the known faults" in capsys.readouterr().out


def test_small_integers_are_ids_too(tmp_path):
    a, _, _ = traced(grad=False)
    kinds = dict(zip(INPUTS, (torch.int16, torch.bool, torch.uint8, torch.int32), strict=True))
    small = {name: a.tensors[name].to(kind) for name, kind in kinds.items()}
    save_file({**a.tensors, **small}, tmp_path / "a.safetensors", metadata=a.metadata)
    inputs, _ = TraceFile(tmp_path / "a.safetensors").inputs()
    for name, got in zip(kinds, inputs, strict=True):
        assert torch.equal(got, a.tensors[name])


def test_a_trace_of_inputs_that_the_model_does_not_take(tmp_path, capsys):
    a, _, ours = traced(grad=False)
    small = BertForMaskedLM(replace(ours.config, max_position_embeddings=5))
    small.save_pretrained(tmp_path / "model")
    a.save(tmp_path / "a.safetensors")
    assert main(["diagnose", str(tmp_path / "a.safetensors"), "--model", str(tmp_path / "model")]) == 2
    assert "--model does not take its inputs" in capsys.readouterr().err


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """Peak memory of `diff`, in a process of its own: far below the trace, with a model as without."""
    sizes = dict(vocab_size=64, hidden_size=128, num_hidden_layers=40, num_attention_heads=4, intermediate_size=256)
    torch.manual_seed(0)
    ours = BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=64)).eval()
    ours.save_pretrained(tmp_path / "model")
    trace(ours, torch.randint(64, (8, 64))).save(tmp_path / "a.safetensors")
    # and a gradient of 0.5 GB, which is sparse on the disk
    wide = json.dumps({**sizes, "vocab_size": 2**20})
    header = {"input_ids": entry((1, 1), 0, "I64"), "labels": entry((1, 1), 8, "I64")}
    header["gradient.bert.embeddings.word_embeddings.weight"] = entry((2**20, 128), 16)
    metadata = {"format": "minibert-trace", "version": "1", "dtype": "float32", "config": wide}
    write_raw(tmp_path / "b.safetensors", header, 16 + 2**29, metadata)
    code = """
import resource, sys
from minibert import BertForMaskedLM
from minibert.parity import TraceFile, diff
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
a, b = (TraceFile(f"{sys.argv[1]}/{name}.safetensors") for name in "ab")
before = peak()
assert diff(a, a).ok and diff(b, b).ok
alone = peak()
assert diff(a, a, BertForMaskedLM.from_pretrained(sys.argv[1] + "/model")).ok
print(alone - before, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    alone, with_model = (int(number) for number in run.stdout.split())
    trace_size = (tmp_path / "a.safetensors").stat().st_size
    assert trace_size > 160e6
    assert alone < 60e6  # some pieces of 2^20 float32, of either side, and what lies between
    assert with_model < 130e6  # the model in float32 and float64 is 64 MB of that


def test_trace_of_a_text_and_of_ids(tmp_path, capsys):
    file = tmp_path / "t.safetensors"
    text = ["Paris is the capital of France.", "Two cups of tea"]
    assert main(["trace", "--text", text[0], "--text", text[1], "--out", str(file), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{file}: {len(TraceFile(file).names)} tensors of minibert, bfloat16\n"
    read = TraceFile(file)
    ids, mask, types, labels = (read.read(name) for name in INPUTS)
    tokenizer = load_tokenizer("minibert-uncased")
    assert [row[row != 0].tolist() for row in ids] == [tokenizer.encode(each).ids for each in text]
    assert torch.equal(mask, (ids != 0).long())
    assert not types.any()
    assert torch.equal(labels, torch.where(mask == 1, ids, -100))
    assert (read.dtype, read.read("logits").dtype) == (torch.bfloat16, torch.bfloat16)

    asked = {"input_ids": [[101, 103, 102], [101, 2054, 102]], "labels": [[-100, 7592, -100], [-100, 2054, -100]]}
    (tmp_path / "ids.json").write_text(json.dumps(asked))
    command = ["trace", "--ids", str(tmp_path / "ids.json"), "--out", str(file), "--backend", "transformers"]
    assert main(command) == 0
    read = TraceFile(file)
    assert read.read("input_ids").tolist() == asked["input_ids"]
    assert read.read("labels").tolist() == asked["labels"]
    assert read.metadata["backend"].startswith("transformers ")
    capsys.readouterr()
    for wrong, words in (
        ({"ids": [[1]]}, "there is no input_ids"),
        ({"input_ids": [[1]], "mask": [[1]]}, "the key 'mask' is not known"),
        ({"input_ids": [[1, 2], [3]]}, "row 1 has 1 entries, row 0 2"),
        ({"input_ids": [[0.5]]}, "input_ids at (0, 0) is 0.5, and must be a whole number"),
        ({"input_ids": [[1, "a"]]}, 'at (0, 1) is "a"'),
        ({"input_ids": [[1], [None]]}, "at (1, 0) is null"),
        ({"input_ids": [[True]]}, "at (0, 0) is true"),
        ({"input_ids": [[1]], "attention_mask": [[True]]}, "attention_mask at (0, 0) is true"),
        ({"input_ids": [[2**63]]}, "at (0, 0) is 9223372036854775808"),
        ({"input_ids": []}, "none of them empty"),
        ({"input_ids": [[]]}, "none of them empty"),
        ({"input_ids": [1, 2]}, "a list of rows"),
        ({"input_ids": [[7, 7]], "labels": [[-100, 40000]]}, "the label at (0, 1) is 40000"),
        ({"input_ids": [[99999999]]}, "99999999"),
        ({"input_ids": [[7]], "labels": [[-100]]}, "Leave labels out"),
    ):
        (tmp_path / "ids.json").write_text(json.dumps(wrong))
        assert main(command) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert main(["trace", "--text", "a " * 600, "--out", str(file)]) == 2  # too long for the model
    assert "truncate" in capsys.readouterr().err
    for wrong, words in (
        (["--out", str(tmp_path / "none" / "t")], "there is no such folder"),
        (["--out", ""], "needs the name of a file"),
        (["--out", str(tmp_path)], "needs the name of a file"),
        (["--out", str(file), "--device", "meta:x"], "--device cpu is everywhere"),
        (["--out", str(file), "--ids", str(tmp_path)], "is a folder, and should be a JSON file of ids"),
        (["--out", str(file), "--ids", str(tmp_path / "none")], "no such file; it should be a JSON file of ids"),
    ):
        assert main(["trace", *wrong]) == 2
        assert words in capsys.readouterr().err
    assert main(["trace", "--text", "a", "--device", "moon", "--out", str(file)]) == 2
    assert "--device moon" in capsys.readouterr().err


def write_ids(folder):
    path = folder / "ids.json"
    path.write_text(json.dumps({"input_ids": [[5, 6, 7]]}))
    return path


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
    assert main(["diff", *files, "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.endswith(" ok") or " differs" in line]
    assert len(rows) == len(tensors) - len(INPUTS)  # it goes on to the end, and still says what was first
    assert [line.split()[0] for line in rows if " differs" in line] == ["layers.1.query"]
    assert any("first wrong: layers.1.query. The last good one is layers.0.feed_forward_norm" in line for line in lines)
    capsys.readouterr()
    assert main(["diff", files[0], str(tmp_path / "none")]) == 2
    assert "none: no such file; it should be a trace" in capsys.readouterr().err
    assert main(["diff", files[0], str(folder)]) == 2
    assert f"{folder} is a folder, and should be a trace" in capsys.readouterr().err
    assert main(["trace", "--model", str(folder), "--ids", str(write_ids(tmp_path)), "--out", files[1]]) == 0
    capsys.readouterr()
    assert main(["diff", *files]) == 2
    assert "were asked different things" in capsys.readouterr().err

    ours.head.bias.data *= 2
    ours.save_pretrained(tmp_path / "doubled")
    assert main(["trace", "--model", str(tmp_path / "doubled"), "--out", files[1]]) == 0
    capsys.readouterr()
    assert main(["diagnose", files[1], "--model", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["first_wrong"], report["found"]) == (False, "logits", [["MLM bias doubled"]])
    assert any("add it once" in line for line in report["lines"])
    assert main(["diagnose", files[0], "--model", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["first_wrong"], report["found"]) == (True, None, [])
