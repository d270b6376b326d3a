"""A run as a whole: as a function, killed with its workers, and where something is missing."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from types import SimpleNamespace

import pytest
from tiny import SETTINGS, metrics, weights
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from minibert import BertForMaskedLM
from minibert.cli import main
from minibert.training import Settings, data, run, saving, train
from minibert.training.tokens import token_files


def test_the_function_does_what_the_command_does(tiny, tmp_path, capsys):
    settings = Settings(**SETTINGS | {"steps": 5})
    where = dict(init=str(tiny.start), out=tmp_path / "one", tokens=tiny.tokens, device="cpu")
    result = train([str(tiny.text)], settings=settings, **where)
    assert tiny.train(tmp_path / "two", "--steps", "5") == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert (result.ended, result.first) == ("finished", True)
    assert result.figures == metrics(tmp_path / "one")[-1]["held_out"] == metrics(tmp_path / "two")[-1]["held_out"]
    printed = capsys.readouterr().out.splitlines()[-1].split()
    found = result.figures["all"]
    assert printed == ["all", f"{found['masked_tokens']:.0f}", f"{found['loss']:.3f}", f"{found['top1']:.1%}"]
    again = train([], settings=settings, resume=True, **where)
    assert (again.ended, again.figures) == ("was finished", None)


def test_what_a_run_starts_from_is_of_the_revision_and_on_the_device(tiny, tmp_path, monkeypatch):
    asked = []
    model, tokenizer, _ = tiny.load()
    monkeypatch.setattr(BertForMaskedLM, "from_pretrained", lambda name, **more: asked.append((name, more)) or model)
    monkeypatch.setattr(run, "load_tokenizer", lambda name, **more: asked.append((name, more)) or tokenizer)
    where = {"out": tmp_path / "out", "tokens": tiny.tokens, "device": "cpu"}
    train([str(tiny.text)], init="some/model", revision="v2", settings=Settings(**SETTINGS | {"steps": 1}), **where)
    assert asked == [
        ("some/model", {"revision": "v2"}),
        ("some/model", {"device": "cpu", "revision": "v2", "init_missing_head": True}),
    ]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["init"] == "some/model at v2"
    where["out"] = tmp_path / "other"
    with pytest.raises(ValueError, match=r"'v2' was given, but start\.json is a file"):
        train([str(tiny.text)], init="start.json", revision="v2", settings=Settings(steps=1), **where)


def test_the_speed_is_in_tokens_a_second(tiny, tmp_path, monkeypatch):
    clock = count(step=4)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert tiny.train(tmp_path / "out", "--steps", "3") == 0
    for line in metrics(tmp_path / "out"):
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / 4, abs=0.5)


@pytest.mark.parametrize(("given", "workers"), [(0, None), (3, 3)])
def test_texts_are_tokenized_by_as_many_as_asked(given, workers, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "token_files", lambda *_, workers: exit(f"{workers} workers"))
    with pytest.raises(SystemExit, match=f"{workers} workers"):
        tiny.train(tmp_path / "out", "--workers", given)


@pytest.mark.parametrize("command", ["train", "bench"])
def test_the_commands_keep_freed_memory(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.training.processes.keep_freed_memory", lambda: exit(77))
    arguments = tiny.arguments(tmp_path / "out") if command == "train" else ["bench", "--peers", "none"]
    with pytest.raises(SystemExit, match="77"):
        main(arguments)


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock_and_no_worker_behind(tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "minibert", *tiny.arguments(out, "--steps", "5000", "--workers", "2")]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not saving.checkpoints(out) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with open(f"/proc/{running.pid}/task/{running.pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    running.kill()
    running.wait()
    with saving.folder_of_run(out, resume=True):  # at once
        pass
    assert len(children) >= 2, "it was killed while it trained"
    killed = time.monotonic()
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < killed + 30:
        time.sleep(0.02)
    assert time.monotonic() - killed < 3, "torch's own workers look for their parent every 5 seconds"


@pytest.mark.parametrize("workers", [(), ("--workers", "1")])
def test_an_error_where_batches_are_made_is_one_line(workers, tiny, tmp_path, monkeypatch, capsys):
    def examples(*_):
        raise ValueError("no examples today")

    monkeypatch.setattr(data.Corpus, "examples", examples)
    assert tiny.train(tmp_path / "out", *workers) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "minibert train: no examples today"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_where_a_text_is_tokenized_says_so(workers, tiny, tmp_path):
    broken = Tokenizer(WordPiece({"a": 0}, unk_token="[UNK]"))  # the library finds out when it meets another word
    with pytest.raises(ValueError, match=r"^the tokenizer fails on the text: .*\[UNK\]"):
        token_files([str(tiny.text)], broken, tmp_path / "tokens", workers=workers)


@pytest.mark.parametrize("missing", ["[CLS]", "[SEP]", "[MASK]"])
def test_special_tokens_are_looked_for_before_the_text_is_read(missing, tiny, tmp_path, capsys):
    values = json.loads((tiny.start / "tokenizer.json").read_text(encoding="utf-8"))
    values["post_processor"] = None
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != missing]
    values["model"]["vocab"][missing.strip("[]")] = values["model"]["vocab"].pop(missing)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((tiny.start / name).read_bytes())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    options = ("--init", tmp_path / "model", "--tokens", tmp_path / "tokens")
    assert tiny.train(tmp_path / "out", *options, texts=[tmp_path / "no such text.txt"]) == 2
    assert f"has no {missing} token" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "tokens").exists()


def test_a_worker_that_is_killed_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.Corpus, "examples", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert tiny.train(tmp_path / "out", "--workers", "1") == 2
    assert "a worker process ended before its work was done" in capsys.readouterr().err.splitlines()[-1]


WITHOUT_FCNTL = """
import importlib, pkgutil, sys

for name in ("fcntl", "resource"):
    sys.modules[name] = None  # an import of it fails

import minibert

for module in pkgutil.walk_packages(minibert.__path__, "minibert."):
    if module.name != "minibert.__main__":
        importlib.import_module(module.name)
from minibert.cli import main

assert main(["fill-mask", "[MASK]", "--model", sys.argv[1]]) == 0
sys.exit(main(["train", sys.argv[2], "--init", sys.argv[1], "--out", sys.argv[3], "--steps", "1", "--device", "cpu"]))
"""


@pytest.mark.slow
def test_where_there_is_no_fcntl_only_training_is_missing(tiny, tmp_path):
    command = [sys.executable, "-c", WITHOUT_FCNTL, str(tiny.start), str(tiny.text), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "fcntl" in done.stderr
    assert "WSL" in done.stderr
    assert "[MASK]" in done.stdout
