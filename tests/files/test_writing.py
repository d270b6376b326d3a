"""Whatever is written: whole or not at all, on the disk, where its name leads, with its mode, and nothing beside it."""

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

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


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BertForMaskedLM(CONFIG).eval()


@pytest.fixture(scope="module")
def page():
    return study(BertForMaskedLM.from_pretrained("minibert-uncased"), load_tokenizer("minibert-uncased"), "the [MASK]")


@pytest.fixture(params=["model", "trace", "page"])
def write(request, model, page, tmp_path):
    """A function that writes one file, and the file."""
    if request.param == "model":
        return lambda: model.save_pretrained(tmp_path), tmp_path / "model.safetensors"
    if request.param == "trace":
        path = tmp_path / "t.safetensors"
        return lambda: trace(model, torch.ones(1, 3, dtype=torch.int64)).save(path), path
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


def interrupt_save_file(monkeypatch, error):
    def half(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise error

    monkeypatch.setattr(writing, "save_file", half)


def interrupt_replace(nth):
    def patch(monkeypatch, error):
        replace, calls = os.replace, []

        def stop(source, target):
            calls.append(target)
            if len(calls) == nth:
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)

    patch.nth = nth
    return patch


@pytest.mark.parametrize("before", ["nothing", "another model", "another size"])
@pytest.mark.parametrize(
    "interrupt",
    [interrupt_save_file, *(interrupt_replace(nth) for nth in (1, 2, 3))],
    ids=["save", "first", "second", "third"],
)
@pytest.mark.parametrize("error", [OSError("No space left on device"), Interruption()], ids=["full", "killed"])
def test_interrupted_writing(ours, tmp_path, monkeypatch, before, interrupt, error):
    old = None
    if before != "nothing":
        torch.manual_seed(0)
        changed = {"num_hidden_layers": 2} if before == "another size" else {}
        old = BertForMaskedLM(BertConfig(**{**SIZES, **changed}))
        old.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, error)
        try:
            ours.save_pretrained(tmp_path)
            raised = False
        except type(error):
            raised = True
    # A first model is moved in two steps, one over the same configuration in one, one over another in three.
    steps = {"nothing": 2, "another model": 1, "another size": 3}[before]
    assert raised == (interrupt is interrupt_save_file or interrupt.nth <= steps)
    expected = old if raised else ours
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", WEIGHTS}  # no temporary file
    if expected is None:
        refused(tmp_path, "config.json", FileNotFoundError)
    else:
        assert_same(BertForMaskedLM.from_pretrained(tmp_path), expected)
    ours.save_pretrained(tmp_path)  # and the next attempt makes it whole
    assert_same(BertForMaskedLM.from_pretrained(tmp_path), ours)


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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes a fork to be killed and to look afterwards")
@pytest.mark.parametrize("before", ["one file", "shards", "the same configuration"])
def test_killed_at_any_moment_of_a_save_a_folder_holds_the_old_model_or_the_new(before, good, ours, tmp_path):
    """A model saved over another one with other sizes, or with the same: SIGKILL at every operation on files."""
    changed = {} if before == "the same configuration" else {"num_hidden_layers": 2, "layer_norm_eps": 1e-3}
    old = BertForMaskedLM(BertConfig(**{**SIZES, **changed})).eval()
    found, moment, status = [], 0, None
    while status != 0 and moment < 200:
        folder = tmp_path / str(moment)
        old.save_pretrained(folder)
        if before == "shards":
            index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), "one.safetensors")}
            (folder / WEIGHTS).rename(folder / "one.safetensors")
            (folder / INDEX).write_text(json.dumps(index))
        if (child := os.fork()) == 0:
            die_at(moment)
            ours.save_pretrained(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        loaded = BertForMaskedLM.from_pretrained(folder)
        found.append("new" if loaded.head.bias[0] != 0 else "old")
        assert_same(loaded, ours if found[-1] == "new" else old)
        ours.save_pretrained(folder)  # and the next attempt makes it whole
        assert_same(BertForMaskedLM.from_pretrained(folder), ours)
        moment += 1
    assert status == 0, "there are more moments than this test has tried"
    assert found == sorted(found, reverse=True), "once the new model is there, it stays"
    assert found.count("old") >= 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes a fork to be killed and to look afterwards")
@pytest.mark.parametrize("fails", [pytest.param("killed", marks=pytest.mark.slow), "refused"])
def test_a_save_that_fails_after_a_killed_save(ours, tmp_path, monkeypatch, fails):
    """The first save was killed when its weights were in place, and its configuration was not."""
    first = BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 2})).eval()
    second = BertForMaskedLM(BertConfig(**{**SIZES, "num_attention_heads": 2})).eval()
    seen = 0
    for moment in range(200):
        folder = tmp_path / str(moment)
        first.save_pretrained(folder)
        waiting = {"weights_sha256": files.sha256(folder / WEIGHTS), "config": first.config.to_dict()}
        (folder / hub.NEXT).write_text(json.dumps(waiting))
        (folder / "config.json").write_text(json.dumps(second.config.to_dict()))
        assert_same(BertForMaskedLM.from_pretrained(folder), first)
        if fails == "refused":
            with monkeypatch.context() as patch:
                interrupt_replace(3)(patch, OSError("full"))  # after the first save's configuration, and NEXT
                with pytest.raises(OSError, match="full"):
                    ours.save_pretrained(folder)
            assert_same(BertForMaskedLM.from_pretrained(folder), first)
            return
        if (child := os.fork()) == 0:
            die_at(moment)
            ours.save_pretrained(folder)
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        loaded = BertForMaskedLM.from_pretrained(folder)
        assert_same(loaded, ours if loaded.config == ours.config else first)
        seen += loaded.config == first.config
        if ended == 0:
            break
    assert ended == 0
    assert seen > 5


@pytest.mark.parametrize("missing", ["second names", "room", "permission"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(ours, tmp_path, monkeypatch, missing):
    old = BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 2})).eval()
    old.save_pretrained(tmp_path)
    if missing == "second names":  # as on FAT: a save works all the same
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no hard links here")))
        ours.save_pretrained(tmp_path)
        assert_same(BertForMaskedLM.from_pretrained(tmp_path), ours)
        return
    error = OSError(28, "No space left on device") if missing == "room" else PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: (_ for _ in ()).throw(error) if ".new-" in path.name else None)
    with pytest.raises(OSError, match=error.strerror):
        ours.save_pretrained(tmp_path)
    assert_same(BertForMaskedLM.from_pretrained(tmp_path), old)


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


def two_models(change):
    models = []
    for value in (1.0, 2.0):
        models.append(BertForMaskedLM(BertConfig(**{**SIZES, **(change if value == 2 else {})})))
        for parameter in models[-1].parameters():
            parameter.data.fill_(value)
    return models


@pytest.mark.parametrize("change", [{}, {"layer_norm_eps": 0.5}, {"num_attention_heads": 2}], ids=str)
@pytest.mark.parametrize("moment", ["config_of", "weight_files", "read_names", "_require_shapes", "hub_names"])
def test_what_is_loaded_while_another_process_saves_is_one_model(tmp_path, monkeypatch, change, moment):
    """moment: what from_pretrained is about to call when the other model appears."""
    from minibert import masked_lm

    first, second = two_models(change)
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
    first, second = two_models({})
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


def test_a_folder_that_never_stands_still_is_refused(tmp_path, monkeypatch):
    two_models({})[0].save_pretrained(tmp_path)
    monkeypatch.setattr(reading, "TRIES", 3)
    clock = iter(range(99))
    monkeypatch.setattr(reading, "_stamps", lambda _: next(clock))
    with pytest.raises(OSError, match="another process writes there all the time: try again"):
        BertForMaskedLM.from_pretrained(tmp_path)
