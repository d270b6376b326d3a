"""Whatever is written: whole or not at all, on the disk, where its name leads, with its mode, and nothing beside it."""

import json
import os
import shutil
import signal
import stat
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from checkpoints import INDEX, SIZES, WEIGHTS, assert_same, refused
from safetensors.torch import load_file, save_file

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.checkpoint import files, hub, reading, writing
from minibert.cli import main
from minibert.parity import trace
from minibert.study import study

CONFIG = BertConfig(**SIZES)


def holds(folder, model):
    loaded = BertForMaskedLM.from_pretrained(folder)
    assert loaded.config == model.config
    assert_same(loaded, model)


@pytest.fixture(scope="module")
def page():
    return study(BertForMaskedLM.from_pretrained("minibert-uncased"), load_tokenizer("minibert-uncased"), "the [MASK]")


@pytest.fixture(params=["model", "trace", "page"])
def write(request, ours, page, tmp_path):
    """A function that writes one file, and the file."""
    if request.param == "model":
        return lambda: ours.save_pretrained(tmp_path), tmp_path / "model.safetensors"
    if request.param == "trace":
        path, given = tmp_path / "t.safetensors", trace(ours, torch.ones(1, 3, dtype=torch.int64))
        return lambda: given.save(path), path
    return lambda: page.save(tmp_path / "page.html"), tmp_path / "page.html"


def mode(path):
    return stat.filemode(os.lstat(path).st_mode)


def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode(write):
    job, path = write
    before = os.umask(0o027)
    try:
        job()
    finally:
        os.umask(before)
    assert mode(path) == "-rw-r-----"
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


def test_what_is_no_ordinary_file_is_not_replaced(write, tmp_path):
    job, path = write
    os.mkfifo(path)
    with pytest.raises(OSError, match=rf"{path.name} is a pipe, a device"):
        job()
    assert mode(path).startswith("p")
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(OSError, match="link to itself"):
        job()
    path.unlink()
    path.symlink_to("/dev/null")
    with pytest.raises(OSError, match="a device"):
        job()
    assert mode("/dev/null").startswith("c")


@pytest.mark.parametrize(
    "command",
    [
        ["trace", "--out", "PIPE"],
        ["study", "the [MASK]", "--out", "PIPE"],
        ["study", "the [MASK]", "--out", "PIPE", "--force"],
        ["export", "--out", "PIPE"],
    ],
    ids=" ".join,
)
def test_a_command_refuses_a_pipe_before_it_computes(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(BertForMaskedLM, "encode", lambda *_: pytest.fail("it was computed"))
    pipe = tmp_path / "pipe.pt2"
    os.mkfifo(pipe)
    assert main([str(pipe) if each == "PIPE" else each for each in command]) == 2
    assert "is a pipe" in capsys.readouterr().err
    assert mode(pipe).startswith("p")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="which file a descriptor is of, Linux tells in /proc")
def test_what_is_written_would_survive_a_power_cut(write, tmp_path, monkeypatch):
    """The bytes are on the disk before the file has its name, and the name before the writer says that it is done."""
    job, path = write
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append((str(old), str(new))), replace(old, new)))
    job()
    moved = [each for each in done if isinstance(each, tuple)]
    assert str(path) in [new for _, new in moved]
    for old, new in moved:
        assert old in done[: done.index((old, new))], "its bytes"
        assert str(Path(old).parent) in done[: done.index((old, new))], "its first name"
    assert str(tmp_path) in done[done.index(moved[-1]) :], "its last name"


def test_a_folder_would_survive_a_power_cut_and_follows_the_umask(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), sync(number)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append("renamed"), rename(old, new)))
    with files.whole_folder(tmp_path / "new") as folder:
        (folder / "private").touch(mode=0o600)
    assert [Path(each).name for each in done] == ["private", "new", "renamed", tmp_path.name]
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert mode(tmp_path / "new" / "private") == mode(fresh)


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
    assert [each for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_a_write_that_fails_leaves_what_was_there(write, tmp_path):
    resource = pytest.importorskip("resource")
    job, path = write
    job()
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=r"."):
            job()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


# ------------------------------------------------------------------------------------ interrupted, killed, disk full


class Interruption(BaseException):
    """Neither an Exception nor a KeyboardInterrupt, which would end the test run."""


def fail_at(monkeypatch, moment, error):
    """While the weights are written (moment 0), or instead of the moment-th file that is moved."""
    replace, moved = os.replace, []

    def half(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        if moment == 0:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise error

    def stop(source, target):
        moved.append(target)
        if len(moved) == moment:
            raise error
        replace(source, target)

    monkeypatch.setattr(writing, "save_file", half)
    monkeypatch.setattr(os, "replace", stop)


def smaller(**changed):
    return BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 1, **changed})).eval()


# What was there before, and in how many steps a model is moved to that place.
@pytest.mark.parametrize(("before", "steps"), [("nothing", 2), ("another model", 1), ("another size", 3)])
@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("error", [OSError("No space left on device"), Interruption()], ids=["full", "killed"])
def test_interrupted_writing(ours, tmp_path, monkeypatch, before, steps, moment, error):
    old = None
    if before != "nothing":
        old = BertForMaskedLM(CONFIG) if before == "another model" else smaller()
        old.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, moment, error)
        with pytest.raises(type(error)) if moment <= steps else nullcontext():
            ours.save_pretrained(tmp_path)
    expected = old if moment <= steps else ours
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", WEIGHTS}  # no temporary file
    if expected is None:
        refused(tmp_path, "config.json", FileNotFoundError)
    else:
        holds(tmp_path, expected)
    ours.save_pretrained(tmp_path)  # and the next attempt makes it whole
    holds(tmp_path, ours)


def die_at(moment):
    """Kill this process when it touches the file system for the moment-th time from now."""
    seen = 0

    def hook(event, _):
        nonlocal seen
        if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def left_by_a_killed_save(folder, first, second):
    """The weights of the first are in place, and its configuration is not."""
    first.save_pretrained(folder)
    waiting = {"weights_sha256": files.sha256(folder / WEIGHTS), "config": first.config.to_dict()}
    (folder / hub.NEXT).write_text(json.dumps(waiting))
    (folder / "config.json").write_text(json.dumps(second.config.to_dict()))
    holds(folder, first)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes a fork to be killed and to look afterwards")
@pytest.mark.parametrize("before", ["one file", "shards", "the same configuration", "a killed save"])
def test_killed_at_any_moment_of_a_save_a_folder_holds_the_old_model_or_the_new(before, tmp_path):
    """A model saved over another one with other sizes, or with the same: SIGKILL at every operation on files."""
    ours, old = smaller(), smaller(**({} if before == "the same configuration" else {"layer_norm_eps": 1e-3}))
    ours.head.bias.data.fill_(1)
    found, moment, status = [], 0, None
    while status != 0 and moment < 200:
        folder = tmp_path / str(moment)
        old.save_pretrained(folder)
        if before == "shards":
            index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), "one.safetensors")}
            (folder / WEIGHTS).rename(folder / "one.safetensors")
            (folder / INDEX).write_text(json.dumps(index))
        elif before == "a killed save":
            left_by_a_killed_save(folder, old, smaller(num_attention_heads=2))
        if (child := os.fork()) == 0:
            die_at(moment)
            ours.save_pretrained(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        loaded = BertForMaskedLM.from_pretrained(folder)
        found.append("new" if loaded.head.bias[0] != 0 else "old")
        assert loaded.config == (ours if found[-1] == "new" else old).config
        assert_same(loaded, ours if found[-1] == "new" else old)
        ours.save_pretrained(folder)  # and the next attempt makes it whole
        holds(folder, ours)
        shutil.rmtree(folder)
        moment += 1
    assert status == 0, "there are more moments than this test has tried"
    assert found == sorted(found, reverse=True), "once the new model is there, it stays"
    assert found.count("old") >= 5


def test_a_save_that_fails_after_a_killed_save(ours, tmp_path, monkeypatch):
    first = smaller()
    left_by_a_killed_save(tmp_path, first, smaller(num_attention_heads=2))
    with monkeypatch.context() as patch:
        fail_at(patch, 3, OSError("full"))  # after the first save's configuration, and NEXT
        with pytest.raises(OSError, match="full"):
            ours.save_pretrained(tmp_path)
    holds(tmp_path, first)
    left_by_a_killed_save(tmp_path, first, smaller(num_attention_heads=2))
    ours.save_pretrained(tmp_path / "other")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    (tmp_path / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    holds(tmp_path, ours)  # what it left is void: other weights are there
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / hub.NEXT).exists()


def test_a_save_where_a_folder_cannot_be_made_or_a_file_has_one_name_only(ours, tmp_path, monkeypatch):
    old = smaller()
    old.save_pretrained(tmp_path)
    for error in (OSError(28, "No space left on device"), PermissionError(13, "Permission denied")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", Mock(side_effect=error))
            with pytest.raises(OSError, match=error.strerror):
                ours.save_pretrained(tmp_path)
        holds(tmp_path, old)
    monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError("no hard links here")))  # as on FAT
    ours.save_pretrained(tmp_path)
    holds(tmp_path, ours)


# -------------------------------------------------------------------------------------------------- ended in the middle


def writer(folder, kind="whole_file"):
    """A process that is within the block when this returns."""
    within, say = os.pipe()
    if (child := os.fork()) == 0:
        status = 0
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
    def left():
        return len([path for path in tmp_path.iterdir() if path.name.startswith(".new-minibert")])

    def write_beside():
        with files.whole_file(tmp_path / "other") as new:
            new.touch()

    (tmp_path / ".new-somebody-elses").mkdir()
    child, living = writer(tmp_path, kind), writer(tmp_path, kind)
    assert end(child, getattr(signal, name)) == status
    assert left() == (2 if name == "SIGKILL" else 1)
    write_beside()
    assert left() == 1, "what the living one is writing"
    end(living, signal.SIGKILL)
    write_beside()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-somebody-elses", "other"]


def test_ctrl_c_while_the_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def interrupted(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), files.whole_file(tmp_path / "target"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_sigterm_is_not_touched(tmp_path):
    before, called = signal.getsignal(signal.SIGTERM), []
    try:
        signal.signal(signal.SIGTERM, lambda *_: called.append(1))
        with files.whole_file(tmp_path / "target") as new:
            os.kill(os.getpid(), signal.SIGTERM)
            new.touch()
        assert called == [1]
        assert (tmp_path / "target").exists()
    finally:
        signal.signal(signal.SIGTERM, before)
    with files.whole_file(tmp_path / "target") as new:
        new.touch()
    assert signal.getsignal(signal.SIGTERM) == before


# --------------------------------------------------------------------------------------------- two processes, one model


def two_models(**change):
    models = [BertForMaskedLM(CONFIG), BertForMaskedLM(BertConfig(**{**SIZES, **change}))]
    for value, model in enumerate(models):
        for parameter in model.parameters():
            parameter.data.fill_(value + 1)
    return models


@pytest.mark.parametrize("change", [{}, {"layer_norm_eps": 0.5}, {"num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("moment", ["config_of", "weight_files", "read_names", "_require_shapes", "hub_names"])
def test_what_is_loaded_while_another_process_saves_is_one_model(tmp_path, monkeypatch, change, moment):
    """moment: what from_pretrained is about to call when the other model appears."""
    from minibert import masked_lm

    first, second = two_models(**change)
    first.save_pretrained(tmp_path)
    room = masked_lm if moment == "config_of" else reading
    call, calls = getattr(room, moment), []

    def saved_before(*arguments, **options):
        if not calls:
            calls.append(1)
            second.save_pretrained(tmp_path)
        return call(*arguments, **options)

    monkeypatch.setattr(room, moment, saved_before)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    expected = first if loaded.config == first.config and loaded.head.bias[0] == 1 else second
    assert loaded.config == expected.config
    assert_same(loaded, expected)


def test_weights_that_are_written_over_while_they_are_read_are_refused(tmp_path, monkeypatch):
    """By a program that does not write whole files."""
    first, second = two_models()
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path / "other")
    new = (tmp_path / "other" / "model.safetensors").read_bytes()
    fill, waits = reading.SafetensorsFile.fill, [0.02, 0]  # the file system's clock is not exact

    def written_over(*arguments):
        if waits:
            time.sleep(waits.pop(0))
            (tmp_path / "model.safetensors").write_bytes(new)
        fill(*arguments)

    monkeypatch.setattr(reading.SafetensorsFile, "fill", written_over)
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was read: try again"):
        BertForMaskedLM.from_pretrained(tmp_path)
    new, waits = new[:2000], [0]
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_two_that_save_in_one_folder_come_one_after_the_other(tmp_path):
    first, second = two_models()
    first.save_pretrained(tmp_path)
    saving = threading.Thread(target=second.save_pretrained, args=[tmp_path])
    with files.locked(tmp_path, wait=True):  # as the first of them would hold it
        saving.start()
        saving.join(0.3)
        assert saving.is_alive()
        holds(tmp_path, first)
    saving.join()
    holds(tmp_path, second)


def test_a_folder_that_never_stands_still_is_refused(tmp_path, monkeypatch):
    two_models()[0].save_pretrained(tmp_path)
    monkeypatch.setattr(reading, "TRIES", 3)
    clock = iter(range(99))
    monkeypatch.setattr(reading, "_stamps", lambda _: next(clock))
    with pytest.raises(OSError, match="another process writes there all the time: try again"):
        BertForMaskedLM.from_pretrained(tmp_path)
