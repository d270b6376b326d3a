"""The commands trace, diff and diagnose."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from traced import traced

from minibert import load_tokenizer
from minibert.cli import main
from minibert.parity import TraceFile
from minibert.trace.table import INPUTS


def test_trace_of_a_text(tmp_path, capsys):
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
    assert not any(name.startswith("gradient.") for name in read.names)  # without --grad


def test_trace_of_ids(tmp_path):
    file = tmp_path / "t.safetensors"
    asked = {"input_ids": [[101, 103, 102], [101, 2054, 102]], "labels": [[-100, 7592, -100], [-100, 2054, -100]]}
    (tmp_path / "ids.json").write_text(json.dumps(asked))
    command = ["trace", "--ids", str(tmp_path / "ids.json"), "--out", str(file), "--backend", "transformers"]
    assert main(command) == 0
    read = TraceFile(file)
    assert read.read("input_ids").tolist() == asked["input_ids"]
    assert read.read("labels").tolist() == asked["labels"]
    assert read.metadata["backend"].startswith("transformers ")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
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
    ],
)
def test_ids_that_are_wrong(tmp_path, capsys, wrong, words):
    (tmp_path / "ids.json").write_text(json.dumps(wrong))
    assert main(["trace", "--ids", str(tmp_path / "ids.json"), "--out", str(tmp_path / "t.safetensors")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "a " * 600, "--out", "FOLDER/t"], "truncate"),  # too long for the model
        (["--out", "FOLDER/none/t"], "there is no folder"),
        (["--out", ""], "needs the name of a file"),
        (["--out", "FOLDER"], "needs the name of a file"),
        (["--out", "FOLDER/t", "--device", "meta:x"], "cpu is everywhere"),
        (["--out", "FOLDER/t", "--ids", "FOLDER"], "is a folder, and should be a JSON file of ids"),
        (["--out", "FOLDER/t", "--ids", "FOLDER/none"], "no such file; it should be a JSON file of ids"),
        (["--text", "a", "--device", "moon", "--out", "FOLDER/t"], "the device moon"),
        (["--revision", "v1", "--out", "FOLDER/t"], "revision 'v1' was given, but minibert-uncased"),
        (["--out", "FOLDER/ids.json"], "is no trace: choose another name"),
    ],
)
def test_options_that_are_wrong(tmp_path, capsys, options, words):
    (tmp_path / "ids.json").write_text("{}")
    assert main(["trace", *(option.replace("FOLDER", str(tmp_path)) for option in options)]) == 2
    assert words in capsys.readouterr().err


def write_ids(folder):
    path = folder / "ids.json"
    path.write_text(json.dumps({"input_ids": [[5, 6, 7]]}))
    return path


@pytest.fixture
def made(tmp_path):
    """A folder with a model, and a trace of it by each backend."""
    _, _, ours = traced(grad=False)
    folder = tmp_path / "model"
    ours.save_pretrained(folder)
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for backend, file in zip(("minibert", "transformers"), files, strict=True):
        assert main(["trace", "--model", str(folder), "--backend", backend, "--grad", "--out", file]) == 0
        assert any(name.startswith("gradient.") for name in TraceFile(file).names)
    return ours, folder, files


def test_diff(made, capsys):
    _, folder, files = made
    assert main(["diff", *files, "--model", str(folder)]) == 0
    assert "both right for float32" in capsys.readouterr().out
    tensors = load_file(files[1])
    tensors["layers.1.query"][0, 0, 1, 0] += 1
    save_file(tensors, files[1], metadata=TraceFile(files[0]).metadata)
    capsys.readouterr()
    assert main(["diff", *files, "--model", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    last = report["rows"][-1]
    assert (report["ok"], report["first_wrong"]) == (False, last["name"]) == (False, "layers.1.query")
    assert (last["ok"], last["first"], report["rows"][0]["ok"]) == (False, [0, 0, 1, 0], True)
    assert report["titles"] == {"A": f"{files[0]} (minibert, float32)", "B": TraceFile(files[1]).title}
    assert last["errors"]["A"]["largest"] < last["allowed"]["A"]["largest"]
    assert last["errors"]["B"]["largest"] > last["allowed"]["B"]["largest"]
    assert last["errors"]["B"]["rms"] > last["allowed"]["B"]["rms"]
    assert main(["diff", *files, "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.endswith(" ok") or " differs" in line]
    assert len(rows) == len(tensors) - len(INPUTS)  # it goes on to the end, and still says what was first
    assert [line.split()[0] for line in rows if " differs" in line] == ["layers.1.query"]
    assert any("first wrong: layers.1.query. The last good one is layers.0.feed_forward_norm" in line for line in lines)


def test_diff_of_files_that_do_not_fit(made, capsys, tmp_path):
    _, folder, files = made
    assert main(["diff", files[0], str(tmp_path / "none")]) == 2
    assert "none: no such file; it should be a trace" in capsys.readouterr().err
    assert main(["diff", files[0], str(folder)]) == 2
    assert f"{folder} is a folder without .npy files, and should be a trace" in capsys.readouterr().err
    assert main(["trace", "--model", str(folder), "--ids", str(write_ids(tmp_path)), "--out", files[1]]) == 0
    capsys.readouterr()
    assert main(["diff", *files]) == 2
    assert "were asked different things" in capsys.readouterr().err
    for command, words in (
        (["diff", *files, "--revision", "v1"], "no --model was given"),
        (["diff", *files, "--model", str(folder), "--quantised"], "leave B and --all out"),
        (["diff", files[0], "--model", str(folder), "--revision", "v1"], "revision 'v1' was given"),
        (["diagnose", files[0], "--model", str(folder), "--revision", "v1"], "revision 'v1' was given"),
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_diagnose_tells_how_far_it_is(made, tmp_path, monkeypatch, terminal):
    _, folder, files = made
    tensors = load_file(files[1])
    tensors["logits"] *= 2
    save_file(tensors, files[1], metadata=TraceFile(files[0]).metadata)
    monkeypatch.setattr("minibert.cli.printing.PATIENCE", 0)
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["diagnose", files[1], "--model", str(folder)]) == 1
    assert ("faults: " in terminal.getvalue()) == terminal.isatty()


def test_diagnose(made, capsys, tmp_path):
    ours, folder, files = made
    assert main(["diagnose", files[1], "--model", str(folder)]) == 0
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
