"""Whatever is written: whole or not at all, on the disk, where its name leads, with its mode, and nothing beside it."""

import json
import os
import shutil
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, SIZES, WEIGHTS, assert_same, refused
from hub_server import VOCABULARY
from safetensors.torch import load_file

from minibert import BertConfig, BertForMaskedLM
from minibert.checkpoint import files, hub, reading
from minibert.cli import main
from minibert.parity import trace
from minibert.study import study
from minibert.tokenizer import from_vocabulary


def holds(folder, model):
    loaded = BertForMaskedLM.from_pretrained(folder)
    assert loaded.config == model.config
    assert_same(loaded, model)


def write_text(path):
    with files.whole_file(path) as new:
        new.write_text("text " * 100)


@pytest.fixture(params=["model", "file"])
def write(request, ours, tmp_path):
    """A function that writes one file, and the file. (Traces, pages and all other files are written by whole_file.)"""
    if request.param == "model":
        return lambda: ours.save_pretrained(tmp_path), tmp_path / WEIGHTS
    return lambda: write_text(tmp_path / "file"), tmp_path / "file"


def mode(path):
    return stat.filemode(os.lstat(path).st_mode)


def what_is_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode(write, tmp_path):
    job, path = write
    before = os.umask(0o027)
    try:
        job()
        with files.whole_folder(tmp_path / "folder") as folder:
            (folder / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    assert mode(path) == mode(tmp_path / "folder" / "private") == "-rw-r-----"
    for kept in (0o600, 0o664, 0o444):
        path.chmod(kept)
        job()
        assert stat.S_IMODE(path.stat().st_mode) == kept


def test_a_link_is_followed_and_stays(write, tmp_path):
    job, path = write
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "real"
    path.symlink_to(Path("elsewhere", "real"))  # that is not there yet
    for _ in range(2):
        job()
        assert mode(path).startswith("l")
        assert real.stat().st_size > 100
        assert [each.name for each in real.parent.iterdir()] == ["real"]


def test_what_is_no_ordinary_file_is_not_replaced(write):
    job, path = write
    os.mkfifo(path)
    with pytest.raises(OSError, match=rf"{path.name} is a pipe, a device"):
        job()
    assert mode(path).startswith("p")
    for target, cause in ((path.name, "link to itself"), ("/dev/null", "a device")):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(OSError, match=cause):
            job()
    assert mode("/dev/null").startswith("c")


def test_a_command_refuses_a_pipe_before_it_computes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(BertForMaskedLM, "encode", lambda *_: pytest.fail("it was computed"))
    pipe = tmp_path / "pipe.pt2"
    os.mkfifo(pipe)
    for command in ("trace", "study|the [MASK]", "study|the [MASK]|--force", "export"):
        assert main([*command.split("|"), "--out", str(pipe)]) == 2
        assert "is a pipe" in capsys.readouterr().err
        assert mode(pipe).startswith("p")


@pytest.fixture
def done(monkeypatch):
    """What is brought to the disk, and (old, new) of what is renamed, one after the other."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("which file a descriptor is of, Linux tells in /proc")
    done, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), sync(number)))
    for name in ("replace", "rename"):
        move = getattr(os, name)
        monkeypatch.setattr(os, name, lambda old, new, move=move: (done.append((str(old), str(new))), move(old, new)))
    return done


def test_what_is_written_would_survive_a_power_cut(write, tmp_path, done):
    """The bytes are on the disk before the file has its name, and the name before the writer says that it is done."""
    job, path = write
    job()
    moved = [each for each in done if isinstance(each, tuple)]
    assert str(path) in [new for _, new in moved]
    for old, new in moved:
        assert {old, str(Path(old).parent)} <= set(done[: done.index((old, new))]), "its bytes, and its first name"
    assert str(tmp_path) in done[done.index(moved[-1]) :], "its last name"


def test_a_folder_would_survive_a_power_cut(tmp_path, done):
    with files.whole_folder(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert [Path(each).name for each in done if isinstance(each, str)] == ["file", "new", tmp_path.name]
    assert isinstance(done[2], tuple)


def test_an_error_after_the_new_content_is_in_place_says_so(write, tmp_path, monkeypatch):
    job, path = write
    to_disk = files.to_disk

    def fails_at_last(folder, **options):
        if options:
            raise OSError(5, "Input/output error")
        to_disk(folder)

    monkeypatch.setattr(files, "to_disk", fails_at_last)
    with pytest.raises(files.NotOnDisk, match=r"written, but not known to be on the disk.*Input/output error"):
        job()
    assert path.exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("kind", ["model", "trace", "page"])
def test_a_write_that_fails_leaves_what_was_there(ours, tmp_path, kind):
    resource = pytest.importorskip("resource")
    job = ours.save_pretrained
    if kind == "trace":
        job = trace(ours, torch.ones(1, 3, dtype=torch.int64)).save
    elif kind == "page":
        job = study(ours, from_vocabulary(VOCABULARY.split()), "the [MASK]").save
    path = tmp_path if kind == "model" else tmp_path / f"one.{'html' if kind == 'page' else 'safetensors'}"
    job(path)
    before, limits = what_is_in(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=r"."):
            job(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert what_is_in(tmp_path) == before


# ------------------------------------------------------------------------------------ interrupted, killed, disk full


def filled(value, **changed):
    """A model with this value in all its weights."""
    model = BertForMaskedLM(BertConfig(**{**SIZES, **changed})).eval()
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


class Moment:
    """From now on, the number-th time that this process touches the file system: it is killed, or the disk is full."""

    def __init__(self, number, how):
        self.left, self.how = number, how
        sys.addaudithook(self)

    def __call__(self, event, _):
        if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            self.left -= 1
            if self.left == -1 and self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.left == -1:
                raise OSError(28, "No space left on device")


def left_by_a_killed_save(folder, first, second):
    """The weights of the first are in place, and its configuration is not."""
    first.save_pretrained(folder)
    waiting = {"weights_sha256": files.sha256(folder / WEIGHTS), "config": first.config.to_dict()}
    (folder / hub.NEXT).write_text(json.dumps(waiting))
    (folder / "config.json").write_text(json.dumps(second.config.to_dict()))
    holds(folder, first)


SLOW = ["nothing full", "shards full", "another model killed", "the same killed", "a killed save killed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes a fork to be killed and to look afterwards")
@pytest.mark.parametrize("case", ["another model full", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
def test_at_any_moment_of_a_save_a_folder_holds_the_old_model_or_the_new(case, tmp_path, monkeypatch):
    """A model saved over another one: the process is killed at every operation on files, or the disk is full."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    before, _, how = case.rpartition(" ")
    small, start, folder = {"num_hidden_layers": 1}, tmp_path / "start", tmp_path / "folder"
    ours, old = filled(2, **small), filled(1, **small, layer_norm_eps=1e-12 if "same" in before else 1e-3)
    start.mkdir()
    if before == "a killed save":
        left_by_a_killed_save(start, old, filled(3, **small, num_attention_heads=2))
    elif before != "nothing":
        old.save_pretrained(start)
    if before == "shards":
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(start / WEIGHTS), "one.safetensors")}
        (start / WEIGHTS).rename(start / "one.safetensors")
        (start / INDEX).write_text(json.dumps(index))
    found, done = [], False
    while not done and len(found) < 200:
        shutil.copytree(start, folder)
        if (child := os.fork()) == 0:
            moment = Moment(len(found) * (3 if how == "full" else 1), how)  # for the time that it takes
            with suppress(OSError):
                ours.save_pretrained(folder)
            os._exit(moment.left < 0)
        done = os.waitpid(child, 0)[1] == 0
        if (folder / "config.json").exists():
            found.append("new" if BertForMaskedLM.from_pretrained(folder).head.bias[0] == 2 else "old")
            holds(folder, ours if found[-1] == "new" else old)
        else:
            found.append("old")
            assert before == "nothing"
            refused(folder, "config.json", FileNotFoundError)
        ours.save_pretrained(folder)  # and the next attempt makes it whole
        holds(folder, ours)
        shutil.rmtree(folder)
    assert done, "there are more moments than this test has tried"
    assert how == "full" or found == sorted(found, reverse=True), "once the new model is there, it stays"
    assert found.count("old") >= 3
    assert found[-1] == "new"


def test_what_a_killed_save_left_is_void_with_other_weights(ours, tmp_path):
    left_by_a_killed_save(
        tmp_path, filled(1, num_hidden_layers=1), filled(1, num_hidden_layers=1, num_attention_heads=2)
    )
    ours.save_pretrained(tmp_path / "other")
    for name in (WEIGHTS, "config.json"):
        (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    holds(tmp_path, ours)
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / hub.NEXT).exists()


def test_a_save_where_a_file_has_one_name_only(ours, tmp_path, monkeypatch):
    """As on FAT."""

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    filled(1, num_hidden_layers=1).save_pretrained(tmp_path)
    monkeypatch.setattr(os, "link", denied)
    ours.save_pretrained(tmp_path)
    holds(tmp_path, ours)


# -------------------------------------------------------------------------------------------------- ended in the middle


def writer(folder, kind):
    """A process that is within the block when this returns."""
    within, say = os.pipe()
    if (child := os.fork()) == 0:
        status = 0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background ignores it
        try:
            with getattr(files, kind)(folder / "target"):
                os.write(say, b"within")
                time.sleep(60)
        except (SystemExit, KeyboardInterrupt) as end:
            status = end.code if isinstance(end, SystemExit) else 130
        finally:
            os._exit(status)
    os.read(within, 6)
    return child


def end(child, number):
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_a_writer_that_is_ended_leaves_nothing_for_good(tmp_path, name, status, kind):
    (tmp_path / ".new-somebody-elses").mkdir()
    child, living = writer(tmp_path, kind), writer(tmp_path, kind)
    assert end(child, getattr(signal, name)) == status
    assert len(hidden(tmp_path)) == (3 if name == "SIGKILL" else 2)
    write_text(tmp_path / "other")
    assert len(hidden(tmp_path)) == 2, "what the living one is writing"
    end(living, signal.SIGKILL)
    write_text(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-somebody-elses", "other"]


def test_a_handler_of_sigterm_is_not_touched(tmp_path):
    before, called = signal.getsignal(signal.SIGTERM), []
    for handler in (lambda *_: called.append(1), before):
        signal.signal(signal.SIGTERM, handler)
        with files.whole_file(tmp_path / "target") as new:
            new.touch()
            if handler is not before:
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == handler
    assert called == [1]
    assert (tmp_path / "target").exists()


# --------------------------------------------------------------------------------------------- two processes, one model


@pytest.mark.parametrize("change", [{}, {"layer_norm_eps": 0.5}, {"num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("moment", ["config_of", "weight_files", "read_names", "_require_shapes", "hub_names"])
def test_what_is_loaded_while_another_process_saves_is_one_model(tmp_path, monkeypatch, change, moment):
    """moment: what from_pretrained is about to call when the other model appears."""
    from minibert import masked_lm

    first, second = filled(1), filled(2, **change)
    first.save_pretrained(tmp_path)
    room = masked_lm if moment == "config_of" else reading
    call, waiting = getattr(room, moment), [second]

    def saved_before(*arguments, **options):
        if waiting:
            waiting.pop().save_pretrained(tmp_path)
        return call(*arguments, **options)

    monkeypatch.setattr(room, moment, saved_before)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    expected = first if loaded.head.bias[0] == 1 else second
    assert loaded.config == expected.config
    assert_same(loaded, expected)


def test_weights_that_are_written_over_while_they_are_read_are_refused(tmp_path, monkeypatch):
    """By a program that does not write whole files."""
    filled(1).save_pretrained(tmp_path)
    filled(2).save_pretrained(tmp_path / "other")
    new = (tmp_path / "other" / WEIGHTS).read_bytes()
    fill, waits = reading.SafetensorsFile.fill, [0.02, 0]  # the file system's clock is not exact

    def written_over(*arguments):
        if waits:
            time.sleep(waits.pop(0))
            (tmp_path / WEIGHTS).write_bytes(new)
        fill(*arguments)

    monkeypatch.setattr(reading.SafetensorsFile, "fill", written_over)
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was read: try again"):
        BertForMaskedLM.from_pretrained(tmp_path)
    new, waits = new[:2000], [0]
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_two_that_save_in_one_folder_come_one_after_the_other(tmp_path):
    first, second = filled(1), filled(2)
    first.save_pretrained(tmp_path)
    saving = threading.Thread(target=second.save_pretrained, args=[tmp_path])
    with files.locked(tmp_path, wait=True):  # as the first of them would hold it
        saving.start()
        saving.join(0.2)
        assert saving.is_alive()
        holds(tmp_path, first)
    saving.join()
    holds(tmp_path, second)


def test_a_folder_that_never_stands_still_is_refused(good, monkeypatch):
    monkeypatch.setattr(reading, "TRIES", 3)
    clock = iter(range(99))
    monkeypatch.setattr(reading, "_stamps", lambda _: next(clock))
    with pytest.raises(OSError, match="another process writes there all the time: try again"):
        BertForMaskedLM.from_pretrained(good)
