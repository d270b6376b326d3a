"""A run that is killed, stopped or out of disk goes on where its last checkpoint was, bit for bit."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from itertools import count
from threading import Event

import pytest
import torch
from tiny import SETTINGS, metrics, weights

from minibert import BertForMaskedLM, load_tokenizer
from minibert.tokenizer import from_vocabulary
from minibert.training import Result, Settings, saving, step, train
from minibert.training.run import describe, train_steps
from minibert.training.step import make_optimizer

KILLED_AT = """
import os, signal, sys
from minibert.cli import main

def hook(event, paths):
    if event == "os.rename" and str(paths[1]).endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert tiny.train(out) == 0
    return out


def require_same(out, whole):
    assert weights(out) == weights(whole)
    assert weights(out / "best") == weights(whole / "best")
    lines = [[{**line, "tokens_per_second": 0} for line in metrics(folder)] for folder in (out, whole)]
    assert lines[0] == lines[1]
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_leaves_what_its_page_lists(whole, tiny, tmp_path):
    assert {path.name for path in whole.iterdir()} == {
        *("run.json", "metrics.jsonl", ".lock", "best", "config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for folder in (whole, whole / "best"):
        assert BertForMaskedLM.from_pretrained(folder).config == tiny.config
        assert load_tokenizer(folder).to_str() == load_tokenizer(tiny.start).to_str()
    assert [line["step"] for line in metrics(whole)] == list(range(1, 13))
    assert [line["step"] for line in metrics(whole) if "held_out" in line] == [4, 8, 12]
    # And so does the function, which then says how it ended.
    where = dict(init=str(tiny.start), out=tmp_path / "out", tokens=tiny.tokens, device="cpu")
    result = train([str(tiny.text)], settings=Settings(**SETTINGS), **where)
    require_same(tmp_path / "out", whole)
    assert result == Result("finished", metrics(whole)[-1]["held_out"], first=True)
    assert train([], settings=Settings(**SETTINGS), resume=True, **where) == Result("was finished", None, first=True)


@pytest.mark.slow
def test_a_run_killed_by_sigkill_goes_on_bit_for_bit(tiny, whole, tmp_path, capsys):
    out = tmp_path / "out"
    # At the worst moment: the new checkpoint is written, and has not got its name yet.
    command = [sys.executable, "-c", KILLED_AT, "checkpoint-6", *tiny.arguments(out)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert [path.name for path in saving.checkpoints(out)] == ["checkpoint-3"]
    assert len(metrics(out)) == 6
    assert {path.suffix for path in (out / "checkpoint-3").iterdir()} == {".json", ".safetensors"}
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # what a power cut may leave
    assert tiny.train(out) == 2
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert tiny.train(out, "--resume") == 0
    require_same(out, whole)


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save_the_newest_checkpoint_is_whole(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # that is for power cuts, and slow
    model, tokenizer, _ = tiny.load()
    optimizer = make_optimizer(model, Settings(**SETTINGS))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before, out = tmp_path / "before", tmp_path / "out"

    def save(folder, number):
        with torch.no_grad():
            model.head.bias.fill_(number)
        saving.save_model(folder / "best", model, tokenizer)
        saving.save_checkpoint(folder, model, tokenizer, optimizer, saving.Progress(step=number))

    before.mkdir()
    save(before, 1)
    newest_steps, best_steps = set(), set()
    for moment in range(0, 500, 3):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        if (child := os.fork()) == 0:
            _die_at(moment)
            save(out, 2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        newest = saving.checkpoints(out)[-1]
        again = BertForMaskedLM.from_pretrained(newest)
        progress = saving.restore(newest, again, make_optimizer(again, Settings(**SETTINGS)))
        assert newest.name == f"checkpoint-{progress.step}"
        assert again.head.bias[0] == progress.step
        newest_steps.add(progress.step)
        best_steps.add(BertForMaskedLM.from_pretrained(out / "best").head.bias[0].item())
        if status == 0:
            break
    assert status == 0, "there are more moments than this test has tried"
    assert moment > 30
    assert newest_steps == best_steps == {1, 2}


EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.chmod")


def _die_at(moment):
    """Kill this process when it touches the file system for the moment-th time from now."""
    seen = count()

    def hook(event, _):
        if event in EVENTS and next(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stands(tiny, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    real = saving.save_file
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_room_left(*arguments):  # for files of more than 20,000 bytes, from the second checkpoint on
        if saving.checkpoints(out):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(saving, "save_file", no_room_left)
    assert tiny.train(out) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-6 could not be written" in message
    assert "File too large" in message
    assert "checkpoint-3 stands" in message
    assert sorted(path.name for path in out.iterdir() if "6" in path.name) == []
    monkeypatch.undo()
    assert tiny.train(out, "--resume") == 0
    require_same(out, whole)


def test_a_folder_that_cannot_be_written_is_found_before_any_work(tiny, tmp_path, fails):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/minibert"):
        message = fails(*tiny.arguments(out, "--init", tmp_path / "no model"))  # which would have been looked for
        assert message.startswith(f"minibert train: --out {out}: nothing can be written")
    assert "--out needs" in fails(*tiny.arguments(" "))


@pytest.mark.parametrize(("name", "workers"), [("SIGINT", 1), ("SIGTERM", 0)])
def test_a_signal_saves_and_stops(name, workers, tiny, whole, tmp_path, monkeypatch, capsys):
    """Ctrl-C reaches the processes that make batches too."""
    out = tmp_path / "out"
    real = step.accumulate

    def accumulate(*arguments):
        if len(metrics(out)) == 4:  # in the fifth step
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, getattr(signal, name))
            assert signal.getsignal(getattr(signal, name)) == signal.SIG_DFL, "the second one ends the run"
        return real(*arguments)

    monkeypatch.setattr(step, "accumulate", accumulate)
    before = signal.getsignal(signal.SIGTERM)
    assert tiny.train(out, "--workers", workers) == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in saving.checkpoints(out)] == ["checkpoint-5"]
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert tiny.train(out, "--resume") == 0
    require_same(out, whole)


@pytest.fixture
def stopped(tiny, tmp_path):
    """The folder of a run that was stopped after its first step."""
    out = tmp_path / "out"
    model, tokenizer, files = tiny.load()
    settings = Settings(**SETTINGS)
    out.mkdir()
    saving.open_run(out, describe(str(tiny.start), model.config, tokenizer, files, settings))
    stop = Event()
    stop.set()
    assert train_steps(model, tokenizer, files, out, settings, stop=stop) is None
    assert [path.name for path in saving.checkpoints(out)] == ["checkpoint-1"]
    return out


def test_a_run_goes_on_only_as_what_it_is(stopped, tiny, tmp_path, capsys):
    text, vocabulary = tiny.text.read_text(), load_tokenizer(tiny.start).get_vocab()
    assert "fortune" in text
    (tmp_path / "prose.txt").write_text(text.replace("fortune", "daughter"))  # as many tokens as before
    words = sorted(vocabulary, key=vocabulary.get)
    from_vocabulary([*words[:-2], words[-1], words[-2]]).save(str(tmp_path / "tokenizer.json"))
    for options, texts, begun, now in (
        (["--learning-rate", "1e-3"], [], "learning_rate 0.005", "0.001"),
        (["--schedule", "cosine"], [], "schedule linear", "cosine"),
        (["--init", "minibert-uncased", "--tokenizer", tiny.start], [], "start", "minibert-uncased"),
        ([], [f"{tiny.text}:2"], "prose:1", "prose:2"),
        ([], [tmp_path / "prose.txt"], "prose:1", "prose:1"),
        (["--tokenizer", tmp_path, "--tokens", tmp_path / "tokens"], [], "tokenizer SHA-256", "SHA-256"),
    ):
        assert tiny.train(stopped, "--resume", *options, texts=texts) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert re.search(f"was begun with .*{begun}.*, and now it is {now}.*choose another --out", message)
    assert [path.name for path in saving.checkpoints(stopped)] == ["checkpoint-1"]


@pytest.mark.slow
def test_what_only_says_how_to_compute_may_change(stopped, tiny, whole):
    assert tiny.train(stopped, "--resume", "--workers", "2", "--micro-tokens", "100", "--checkpoint-activations") == 0
    losses = [[line["loss"] for line in metrics(out)] for out in (stopped, whole)]
    # Two passes draw other dropout than one, so only the first step is bound to agree.
    assert losses[0][0] == losses[1][0]
    assert len(losses[0]) == 12


def test_what_is_there_is_not_written_over(tiny, whole, capsys):
    for out, options, message in (
        (whole, [], "holds a finished run"),
        (tiny.start, [], "holds a model already"),
        (tiny.start, ["--resume"], "holds a model already"),
    ):
        before = weights(out)
        with warnings.catch_warnings(action="ignore"):  # there is no run to go on with
            assert tiny.train(out, *options) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert weights(out) == before
    assert tiny.train(whole, "--resume", texts=["a text that is gone by now.txt"]) == 0
    assert "finished" in capsys.readouterr().out
    assert tiny.train(whole, "--resume", "--steps", "13") == 2
    assert "steps 12, and now it is 13" in capsys.readouterr().err.splitlines()[-1]


def test_a_configuration_that_has_changed_is_noticed(tiny, tmp_path, monkeypatch, capsys):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny.start / name, tmp_path / name)
    config, out = tmp_path / "config.json", tmp_path / "out"
    monkeypatch.setattr(step, "accumulate", lambda *_: os.kill(os.getpid(), signal.SIGINT) or torch.zeros(()))
    assert tiny.train(out, "--init", config) == 130
    monkeypatch.undo()
    config.write_text(config.read_text().replace('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0.2'))
    assert tiny.train(out, "--init", config, "--resume") == 2
    assert "hidden_dropout_prob 0.1, and now it is 0.2" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.filterwarnings("always:there is no run in")
def test_to_go_on_where_nothing_is_is_to_begin(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert tiny.train(out, "--resume", "--steps", "1") == 0
    assert "no run" in capsys.readouterr().err.splitlines()[0]


def test_a_damaged_checkpoint_is_an_error_that_names_it(stopped, tiny, capsys):
    for name, harm in (
        ("progress.json", lambda raw: raw.replace(b'"step": 1', b'"step": "1"')),
        *((name, lambda raw: raw[:-10]) for name in ("progress.json", "optimizer.safetensors", "model.safetensors")),
    ):
        path = stopped / "checkpoint-1" / name
        path.write_bytes(harm(path.read_bytes()))
        assert tiny.train(stopped, "--resume") == 2
        assert str(path) in capsys.readouterr().err.splitlines()[-1]


def test_two_runs_in_one_folder_at_a_time_are_one_too_many(stopped, tiny, capsys):
    ready, held = os.pipe()
    model, tokenizer, _ = tiny.load()
    if (child := os.fork()) == 0:
        with saving.folder_of_run(stopped, resume=True):
            saving.save_model(stopped / "best", model, tokenizer)  # which opens and closes what is in the folder
            os.write(held, b"x")
            signal.pause()
    os.close(held)
    assert os.read(ready, 1) == b"x"
    try:
        for options in (["--resume"], []):
            assert tiny.train(stopped, *options) == 2
            assert "another process is training there" in capsys.readouterr().err.splitlines()[-1]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert tiny.train(stopped, "--resume") == 0, "the lock goes with the process that held it"


def test_a_run_killed_when_it_was_just_finished_is_finished(tiny, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for leftover in (
        "checkpoint-9",
        ".old-checkpoint-6",
        ".new-checkpoint-12",
        "best/.new-model",
        "checkpoint-of-mine",
    ):
        (out / leftover).mkdir()
    assert tiny.train(out, "--resume") == 0
    assert "finished" in capsys.readouterr().out
    (out / "checkpoint-of-mine").rmdir()  # the user's own is left alone
    require_same(out, whole)
