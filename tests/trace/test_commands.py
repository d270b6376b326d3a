"""The commands trace, diff and diagnose."""

import io
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from traced import stored, traced

from minibert import load_tokenizer
from minibert.cli import main
from minibert.parity import TraceFile
from minibert.trace.table import INPUTS


def test_trace_of_a_text(tmp_path, capsys):
    file, text = tmp_path / "t.safetensors", ["Paris is the capital of France.", "Two cups of tea"]
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
    assert not any(name.startswith("gradient.") for name in read.names)  # without --grad


def test_trace_of_ids(tmp_path):
    asked = {"input_ids": [[101, 103, 102], [101, 2054, 102]], "labels": [[-100, 7592, -100], [-100, 2054, -100]]}
    (tmp_path / "ids.json").write_text(json.dumps(asked))
    out = str(tmp_path / "t.safetensors")
    assert main(["trace", "--ids", str(tmp_path / "ids.json"), "--out", out, "--backend", "transformers"]) == 0
    read = TraceFile(out)
    assert {name: read.read(name).tolist() for name in asked} == asked
    assert read.metadata["backend"].startswith("transformers ")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ids": [[1]]}, "there is no input_ids"),
        ({"input_ids": [[1]], "mask": [[1]]}, "the key 'mask' is not known"),
        ({"input_ids": [[1, 2], [3]]}, "row 1 of input_ids has 1 entries, row 0 2"),
        ({"input_ids": [[0.5]]}, "input_ids at (0, 0) is 0.5, and must be a whole number"),
        ({"input_ids": [[1]], "attention_mask": [[True]]}, "attention_mask at (0, 0) is true"),
        ({"input_ids": [[2**63]]}, "at (0, 0) is 9223372036854775808"),
        ({"input_ids": [[]]}, "none of them empty"),
        ({"input_ids": [[7, 7]], "labels": [[-100, 40000]]}, "the label at (0, 1) is 40000"),
    ],
)
def test_ids_that_are_wrong(tmp_path, fails, wrong, words):
    (tmp_path / "ids.json").write_text(json.dumps(wrong))
    assert words in fails("trace", "--ids", str(tmp_path / "ids.json"), "--out", str(tmp_path / "t.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "a " * 600, "--out", "FOLDER/t"], "truncate"),  # too long for the model
        (["--out", "FOLDER/none/t"], "there is no folder"),
        (["--out", "FOLDER/t", "--ids", "FOLDER"], "is a folder, and should be a JSON file of ids"),
        (["--out", "FOLDER/ids.json"], "is no trace: choose another name"),
    ],
)
def test_options_that_are_wrong(tmp_path, fails, options, words):
    (tmp_path / "ids.json").write_text("{}")
    assert words in fails("trace", *(option.replace("FOLDER", str(tmp_path)) for option in options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and traces of it: by us (a), and by transformers: right, with one wrong entry (query), with the logits
    doubled, and asked something else (other). Nobody may change them.
    """
    path = tmp_path_factory.mktemp("made")
    traced(grad=False)[2].save_pretrained(path / "model")
    os.mkfifo(path / "pipe")
    for backend, name in (("minibert", "a"), ("transformers", "right")):
        words = ["--model", str(path / "model"), "--backend", backend, "--out", str(path / f"{name}.safetensors")]
        assert main(["trace", "--grad", *words]) == 0
    right = TraceFile(path / "right.safetensors")
    right.tensors = load_file(path / "right.safetensors")
    query = right.tensors["layers.1.query"].clone()
    query[0, 0, 0, 0] *= 9
    stored(path / "query.safetensors", right, {"layers.1.query": query})
    stored(path / "doubled.safetensors", right, {"logits": right.tensors["logits"] * 2})
    stored(path / "other.safetensors", right, {"input_ids": right.tensors["input_ids"].roll(1, 1)})
    return path


@pytest.fixture
def run(folder, capsys):
    """`run(command, names of traces, options)`: its exit status, and what it prints."""

    def run(*words):
        traces = {file.stem: str(file) for file in folder.glob("*.safetensors")}
        status = main([traces.get(word, word).replace("FOLDER", str(folder)) for word in words])
        out = capsys.readouterr().out
        return status, json.loads(out) if "--json" in words else out

    return run


def test_two_right_traces(run):
    status, out = run("diff", "a", "right", "--model", "FOLDER/model")
    assert (status, "both right for float32" in out) == (0, True)
    status, out = run("diff", "right", "--model", "FOLDER/model")  # beside what --model computes
    assert (status, "gradient.bert.embeddings" in out) == (0, True)
    status, report = run("diagnose", "right", "--model", "FOLDER/model", "--json")
    assert (status, report["ok"], report["first_wrong"], report["found"]) == (0, True, None, [])


def test_diff_in_json_and_to_the_end(run, folder):
    status, report = run("diff", "a", "query", "--model", "FOLDER/model", "--json")
    last = report["rows"][-1]
    assert (status, report["ok"], report["first_wrong"], last["name"]) == (1, False, *["layers.1.query"] * 2)
    assert (last["ok"], last["first"], report["rows"][0]["ok"]) == (False, [0, 0, 0, 0], True)
    assert report["titles"]["A"] == f"{folder}/a.safetensors (minibert, float32)"
    for kind in ("largest", "rms"):
        assert last["errors"]["A"][kind] < last["allowed"]["A"][kind]
        assert last["errors"]["B"][kind] > last["allowed"]["B"][kind]
    status, out = run("diff", "a", "query", "--all")
    rows = [line for line in out.splitlines() if line.endswith(" ok") or " differs" in line]
    assert len(rows) == len(TraceFile(folder / "a.safetensors").names) - len(INPUTS)  # it goes on to the end
    assert [line.split()[0] for line in rows if " differs" in line] == ["layers.1.query"]
    assert "first wrong: layers.1.query. The last good one is layers.0.feed_forward_norm" in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("diff a FOLDER/none", "none: no such file; it should be a trace"),
        ("diff a FOLDER/model", "is a folder without .npy files, and should be a trace"),
        ("diff FOLDER/pipe FOLDER/pipe", "is a pipe or a device"),  # and it does not hang
        ("diff a", "give --model, or a second trace"),
        ("diff a other", "were asked different things"),
        ("diff a right --revision v1", "no --model was given"),
        ("diff a right --model FOLDER/model --quantised", "leave B and --all out"),
        ("diff a --model FOLDER/model --revision v1", "revision 'v1' was given"),
        ("diagnose a --model FOLDER/model --revision v1", "revision 'v1' was given"),
        ("diagnose a", "is of a model with vocab_size 131, and --model has"),
    ],
)
def test_what_does_not_fit_together(folder, fails, command, words):
    traces = {file.stem: str(file) for file in folder.glob("*.safetensors")}
    assert words in fails(*(traces.get(word, word).replace("FOLDER", str(folder)) for word in command.split()))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_diagnose_tells_how_far_it_is(run, monkeypatch, terminal):
    monkeypatch.setattr("minibert.cli.options.PATIENCE", 0)
    monkeypatch.setattr("sys.stderr", terminal)
    status, out = run("diagnose", "doubled", "--model", "FOLDER/model", "--format", "markdown")
    assert (status, "\n- " in out, "it is 2 times the right values, everywhere" in out) == (1, True, True)
    assert ("faults: " in terminal.getvalue()) == terminal.isatty()


def test_diff_in_markdown(run):
    status, out = run("diff", "doubled", "--model", "FOLDER/model", "--format", "markdown")
    assert (status, "\n| logits | " in out) == (1, True)
    assert "\n- B: it is 2 times the right values, everywhere" in out


def test_diagnose_names_the_fault(run, tmp_path):
    ours = traced(grad=False)[2]
    ours.head.bias.data *= 2
    ours.save_pretrained(tmp_path / "doubled")
    file = str(tmp_path / "t.safetensors")
    assert run("trace", "--model", str(tmp_path / "doubled"), "--out", file)[0] == 0
    status, report = run("diagnose", file, "--model", "FOLDER/model", "--json")
    assert (status, report["ok"], report["first_wrong"]) == (1, False, "logits")
    assert report["found"] == [["MLM bias doubled"]]
    assert any("add it once" in line for line in report["lines"])
