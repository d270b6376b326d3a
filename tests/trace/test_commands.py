"""The commands trace, diff and diagnose."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from traced import stored, traced

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
        ({"input_ids": [[1, 2], [3]]}, "row 1 of input_ids has 1 entries, row 0 2"),
        ({"input_ids": [[0.5]]}, "input_ids at (0, 0) is 0.5, and must be a whole number"),
        ({"input_ids": [[1], [None]]}, "at (1, 0) is null"),
        ({"input_ids": [[1]], "attention_mask": [[True]]}, "attention_mask at (0, 0) is true"),
        ({"input_ids": [[2**63]]}, "at (0, 0) is 9223372036854775808"),
        ({"input_ids": [[]]}, "none of them empty"),
        ({"input_ids": [1, 2]}, "a list of rows"),
        ({"input_ids": [[7, 7]], "labels": [[-100, 40000]]}, "the label at (0, 1) is 40000"),
        ({"input_ids": [[99999999]]}, "99999999"),
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
        (["--out", "FOLDER"], "is a folder"),
        (["--out", "FOLDER/t", "--device", "meta:x"], "cpu is everywhere"),
        (["--out", "FOLDER/t", "--ids", "FOLDER"], "is a folder, and should be a JSON file of ids"),
        (["--revision", "v1", "--out", "FOLDER/t"], "revision 'v1' was given, but minibert-uncased"),
        (["--out", "FOLDER/ids.json"], "is no trace: choose another name"),
    ],
)
def test_options_that_are_wrong(tmp_path, fails, options, words):
    (tmp_path / "ids.json").write_text("{}")
    assert words in fails("trace", *(option.replace("FOLDER", str(tmp_path)) for option in options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a trace of it by each backend: a.safetensors and b.safetensors. Nobody may change it."""
    path = tmp_path_factory.mktemp("made")
    traced(grad=False)[2].save_pretrained(path / "model")
    for backend, name in (("minibert", "a"), ("transformers", "b")):
        words = ["--model", str(path / "model"), "--backend", backend, "--out", str(path / f"{name}.safetensors")]
        assert main(["trace", "--grad", *words]) == 0
    return path


@pytest.fixture
def model(folder):
    return ["--model", str(folder / "model")]


@pytest.fixture
def files(folder):
    return [str(folder / f"{name}.safetensors") for name in "ab"]


def with_changes(file, path, **factors):
    """The trace with some tensors multiplied, and the first entry of others made wrong."""
    tensors = load_file(file)
    for name, factor in factors.items():
        tensors[name.replace("__", ".")].view(-1)[: None if name == "logits" else 1] *= factor
    save_file(tensors, path, metadata=TraceFile(file).metadata)
    return str(path)


def test_two_right_traces(files, model, capsys):
    assert any(name.startswith("gradient.") for name in TraceFile(files[0]).names)
    assert main(["diff", *files, *model]) == 0
    assert "both right for float32" in capsys.readouterr().out
    assert main(["diff", files[1], *model]) == 0  # beside what --model computes
    assert "gradient.bert.embeddings" in capsys.readouterr().out
    assert main(["diagnose", files[1], *model, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["first_wrong"], report["found"]) == (True, None, [])


def test_diff_in_json_and_to_the_end(files, model, tmp_path, capsys):
    pair = [files[0], with_changes(files[1], tmp_path / "b.safetensors", layers__1__query=9.0)]
    assert main(["diff", *pair, *model, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    last = report["rows"][-1]
    assert (report["ok"], report["first_wrong"]) == (False, last["name"]) == (False, "layers.1.query")
    assert (last["ok"], last["first"], report["rows"][0]["ok"]) == (False, [0, 0, 0, 0], True)
    assert report["titles"] == {"A": f"{pair[0]} (minibert, float32)", "B": TraceFile(pair[1]).title}
    for kind in ("largest", "rms"):
        assert last["errors"]["A"][kind] < last["allowed"]["A"][kind]
        assert last["errors"]["B"][kind] > last["allowed"]["B"][kind]
    assert main(["diff", *pair, "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.endswith(" ok") or " differs" in line]
    assert len(rows) == len(load_file(files[1])) - len(INPUTS)  # it goes on to the end, and still says what was first
    assert [line.split()[0] for line in rows if " differs" in line] == ["layers.1.query"]
    assert any("first wrong: layers.1.query. The last good one is layers.0.feed_forward_norm" in line for line in lines)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["diff", "A", "FOLDER/none"], "none: no such file; it should be a trace"),
        (["diff", "A", "FOLDER/model"], "is a folder without .npy files, and should be a trace"),
        (["diff", "A"], "give --model, or a second trace"),
        (["diff", "A", "--quantised"], "give --model, or a second trace"),
        (["diff", "A", "OTHER"], "were asked different things"),
        (["diff", "A", "B", "--revision", "v1"], "no --model was given"),
        (["diff", "A", "B", "--model", "FOLDER/model", "--quantised"], "leave B and --all out"),
        (["diff", "A", "--all", "--model", "FOLDER/model", "--quantised"], "leave B and --all out"),
        (["diff", "A", "--model", "FOLDER/model", "--revision", "v1"], "revision 'v1' was given"),
        (["diagnose", "A", "--model", "FOLDER/model", "--revision", "v1"], "revision 'v1' was given"),
        (["diagnose", "A"], "is of a model with vocab_size 131, and --model has"),
    ],
)
def test_what_does_not_fit_together(folder, files, tmp_path, fails, command, words):
    given = traced(grad=False)[0]
    stored(tmp_path / "other", given, {"input_ids": given.tensors["input_ids"].roll(1, 1)})
    places = {"A": files[0], "B": files[1], "OTHER": str(tmp_path / "other")}
    assert words in fails(*(places.get(word, word).replace("FOLDER", str(folder)) for word in command))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_diagnose_tells_how_far_it_is(files, model, tmp_path, monkeypatch, terminal):
    wrong = with_changes(files[1], tmp_path / "b.safetensors", logits=2.0)
    monkeypatch.setattr("minibert.cli.printing.PATIENCE", 0)
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["diagnose", wrong, *model]) == 1
    assert ("faults: " in terminal.getvalue()) == terminal.isatty()


def test_what_is_wrong_in_markdown(files, model, tmp_path, capsys):
    wrong = with_changes(files[1], tmp_path / "b.safetensors", logits=2.0)
    for command in ("diff", "diagnose"):
        assert main([command, wrong, *model, "--format", "markdown"]) == 1
        out = capsys.readouterr().out
        assert "\n- " in out
        assert "it is 2 times the right values, everywhere" in out
        assert ("\n| logits | " in out) == (command == "diff")


def test_diagnose_names_the_fault(model, tmp_path, capsys):
    ours = traced(grad=False)[2]
    ours.head.bias.data *= 2
    ours.save_pretrained(tmp_path / "doubled")
    file = str(tmp_path / "t.safetensors")
    assert main(["trace", "--model", str(tmp_path / "doubled"), "--out", file]) == 0
    capsys.readouterr()
    assert main(["diagnose", file, *model, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["first_wrong"], report["found"]) == (False, "logits", [["MLM bias doubled"]])
    assert any("add it once" in line for line in report["lines"])
