"""Token files: found, made once, kept through a kill, and never trusted when they are not what was written."""

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from minibert.cli import main
from minibert.tokenizer import from_vocabulary
from minibert.training import tokens
from minibert.training.tokens import find_texts, is_held_out, token_files

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = from_vocabulary([*SPECIAL, "the", "a", *(f"word{number}" for number in range(400))])


def lines_of(lines):
    """Lines or a TokenFile as lists of ids."""
    return [lines.line(number).tolist() for number in range(len(lines))]


def ids_of(line):
    return TOKENIZER.encode(line, add_special_tokens=False).ids


def some_lines(count=400, start=0):
    return [f"the word{number % 400} a word{number // 400}" for number in range(start, start + count)]


@pytest.fixture
def write(tmp_path):
    def write(name, lines):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(line + "\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tokens"


@pytest.fixture
def make(folder):
    """The token files of these texts, in `folder`."""
    return lambda *paths, tokenizer=TOKENIZER, **more: token_files(
        [str(path) for path in paths], tokenizer, folder, **more
    )


def test_each_line_is_there_once_and_a_hundredth_is_held_out(write, make):
    lines = some_lines(1000)
    (file,) = make(write("text.txt", [*lines, "", "   ", *lines[:50]]))
    assert lines_of(file) == [ids_of(line) for line in lines if not is_held_out(line)]
    assert lines_of(file.held_out) == [ids_of(line) for line in lines if is_held_out(line)]
    assert 0 < len(file.held_out) < 30
    assert (file.name, file.weight) == ("text", 1.0)


def test_gzip_and_several_processes_give_the_same(write, make, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.training.tokens.CHUNK", 500)  # so that there is more than one for each process
    lines = some_lines(600)
    make(write("text.txt", lines), write("more.txt.gz", lines), workers=2)
    token_files([str(tmp_path / "text.txt")], TOKENIZER, tmp_path / "alone", workers=1)
    (alone,) = (tmp_path / "alone").glob("text-*")
    for place in folder.glob("*-*"):
        for name in tokens.FILES:
            assert (place / name).read_bytes() == (alone / name).read_bytes()


def test_little_text_is_tokenized_by_one_process_and_much_by_one_a_core(write, make, monkeypatch):
    asked = []
    monkeypatch.setattr(tokens, "tokenizing", lambda _, workers: asked.append(workers) or 1 / 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(tokens, "WORTH_A_WORKER", 1000)
    little, much = write("little.txt", some_lines(20)), write("much.txt", some_lines(1000))
    for path, workers in ((little, None), (much, None), (much, 2)):
        with pytest.raises(ZeroDivisionError):
            make(path, workers=workers)
    assert asked == [1, 3, 2]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.uint32)])
def test_ids_take_two_bytes_if_they_fit(size, dtype, write, make, folder):
    words = [*SPECIAL, *(f"word{number}" for number in range(len(SPECIAL), size))]
    path = write("text.txt", ["word5 " + words[-1]])
    for _ in range(2):  # made, and found again
        (file,) = make(path, tokenizer=from_vocabulary(words))
        assert file.tokens.dtype == dtype
        assert file.tokens.tolist() == [5, size - 1]
    assert next(folder.glob("text-*/train.tokens")).stat().st_size == 2 * dtype.itemsize


def test_what_is_there_is_not_made_again_and_a_changed_text_is(write, make, folder):
    def inodes(stem):
        return {place: place.stat().st_ino for place in folder.glob(f"{stem}-*")}

    paths = [write("one.txt", some_lines(50)), write("two.txt", some_lines(50, 50))]
    make(*paths)
    before = inodes("*")
    make(*paths)
    assert inodes("*") == before
    age = os.stat(paths[0])
    write("one.txt", ["the word7", *some_lines(50)[1:]])
    os.utime(paths[0], ns=(age.st_atime_ns, age.st_mtime_ns))  # no clock is trusted
    one, two = make(*paths)
    assert one.line(0).tolist() == ids_of("the word7")
    assert lines_of(two) == [ids_of(line) for line in some_lines(50, 50) if not is_held_out(line)]
    assert inodes("two").items() <= before.items()


def test_token_files_of_another_tokenizer_are_refused(write, make, tmp_path):
    path = write("text.txt", some_lines(50))
    (file,) = make(path)
    words = [f"word{number}" for number in range(400)]
    with pytest.raises(ValueError, match="another tokenizer"):
        make(path, tokenizer=from_vocabulary([*SPECIAL, "a", "the", *words]))
    cutting = from_vocabulary([*SPECIAL, "the", "a", *words])
    cutting.enable_truncation(3)
    assert lines_of(make(path, tokenizer=cutting)[0]) == lines_of(file), "whatever its caller has set"
    assert lines_of(token_files([str(path)], cutting, tmp_path / "fresh")[0]) == lines_of(file)


def _flip(place):
    content = bytearray((place / "train.tokens").read_bytes())
    content[4] ^= 1
    (place / "train.tokens").write_bytes(content)


def _change(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: os.truncate(place / "train.tokens", 10),
        _flip,
        lambda place: (place / "held_out.starts").unlink(),
        lambda place: (place / "about.json").write_text("[]"),
        lambda place: (place / "about.json").unlink(),
        lambda place: _change(place / "about.json", text_sha256=None),
    ],
    ids=["truncated", "a bit flipped", "a file missing", "other JSON", "nothing about it", "no digest"],
)
def test_damaged_token_files_are_noticed_and_made_again(harm, write, make, folder):
    path = write("text.txt", some_lines(50))
    expected = lines_of(make(path)[0])
    harm(next(folder.glob("text-*")))
    with pytest.warns(UserWarning, match="damaged"):
        (file,) = make(path)
    assert lines_of(file) == expected
    make(path)  # without a warning, which would be an error


KILLED = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from minibert.training import tokens

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tokens.CHUNK = 2000
    tokens.token_files([str(folder / "texts")], Tokenizer.from_file(str(folder / "tokenizer.json")), folder / "tokens",
                       workers=2)
"""


@pytest.mark.slow
def test_a_kill_loses_only_the_text_it_was_at(write, make, tmp_path, folder):
    small, large = write("texts/a.txt", some_lines(100)), write("texts/b.txt", some_lines(150_000))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".new-*/b-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = file.read().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    (done,) = folder.glob("a-*")
    assert not list(folder.glob("b-*"))
    assert list(folder.glob(".new-*/b-*")), "it was killed while it was at the second text"
    inode = done.stat().st_ino

    for file, path in zip(make(tmp_path / "texts", workers=1), (small, large), strict=True):
        assert len(file) + len(file.held_out) == len(path.read_text().splitlines())
    assert done.stat().st_ino == inode
    assert not list(folder.glob(".new-*"))
    while any(map(_runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    assert not any(map(_runs, children)), "its workers must not outlive it"


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_who_comes_second_waits_and_makes_nothing_again(write, make, tmp_path, folder):
    path = write("text.txt", some_lines(50))
    token_files([str(path)], TOKENIZER, tmp_path / "elsewhere")
    folder.mkdir()
    second = threading.Thread(target=make, args=[path])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        second.join(0.5)
        assert second.is_alive()
        (made,) = (tmp_path / "elsewhere").glob("text-*")
        inode = made.stat().st_ino
        made.rename(folder / made.name)
    second.join(30)
    assert not second.is_alive()
    assert (folder / made.name).stat().st_ino == inode


def test_a_text_that_grows_while_it_is_read_is_refused(write, make, folder, monkeypatch):
    path, digest = write("text.txt", some_lines(50)), tokens.sha256

    def grown_after(read):
        found = digest(read)
        with open(path, "a") as file:
            file.write("one line more\n")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "sha256", grown_after)
        with pytest.raises(ValueError, match=r"text\.txt was changed while it was read"):
            make(path)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert len(make(path)[0]) > 40


def test_folders_globs_weights_and_names(write, tmp_path):
    for name in ("a/wiki.txt", "a/deep/facts.txt.gz", "b/wiki.txt", "b/notes.md", "b/all.txt", "b/.hidden.txt"):
        write(name, ["the a"])
    write("b/odd:name.txt", ["the a"])
    texts = find_texts([f"{tmp_path}/a:2.5", f"{tmp_path}/b/*.txt"])
    assert [(text.name.replace(str(tmp_path), "…"), text.weight) for text in texts] == [
        ("facts", 2.5),
        ("…/a/wiki.txt", 2.5),
        ("…/b/all.txt", 1.0),  # the figures over all texts are called "all"
        ("odd:name", 1.0),
        ("…/b/wiki.txt", 1.0),
    ]
    assert [text.path.name for text in texts] == ["facts.txt.gz", "wiki.txt", "all.txt", "odd:name.txt", "wiki.txt"]
    write("c/part:3", ["the a"])  # a path that ends as a weight does
    for spec, name, weight in (
        ("b/odd:name.txt:3", "odd:name", 3),
        ("**/facts*", "facts", 1),
        ("c/part:3", "part:3", 1),
        ("c/part:3:2", "part:3", 2),
        ("c/*:2", "part:3", 2),
    ):
        assert [(text.name, text.weight) for text in find_texts([f"{tmp_path}/{spec}"])] == [(name, weight)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text.txt:abc", "text.txt:abc: no such text file"),
        ("folders/*", "folders/*: no such text file"),
        ("empty", "no .txt or .gz file in this folder"),
        ("text.txt:0", "weight 0 "),
        ("text.txt:inf", "weight inf "),
        ("text.txt:1e12", "an epoch of these weights is"),
        (":2", "is not PATH"),
        ("latin.txt.gz", "latin.txt.gz, line 3 is not UTF-8"),
        ("not.gz", "gzip"),
        ("cut.gz", "gzip"),
        ("rotten.gz", "gzip"),
        ("blank.txt", "blank.txt: there is no text to train on"),
        ("pipe", "pipe is not a file"),
        ("long.txt", "line 1 is longer than 10000000 bytes"),
    ],
)
def test_what_is_no_text_is_one_line_and_status_2(spec, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folders" / "inner").mkdir(parents=True)
    packed = gzip.compress(b"the word1\n" * 100 + os.urandom(2000).hex().encode())
    for name, content in {
        "text.txt": b"the a\n",
        "latin.txt.gz": gzip.compress(b"the\n\ncaf\xe9\nthe\n"),
        "not.gz": b"plain",
        "cut.gz": packed[:-20],
        "rotten.gz": packed[:10] + b"\xff" * 100,  # no such kind of block
        "blank.txt": b"\n \n\n",
        "long.txt": b"the " * 2_500_001,
    }.items():
        (tmp_path / name).write_bytes(content)
    assert main(["train", spec, "--init", "minibert-uncased", "--out", "out", "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not list((tmp_path / "out").rglob(".new-*"))


def test_a_text_named_twice_is_refused(write, tmp_path):
    path = write("texts/wiki.txt", ["the a"])
    (tmp_path / "link.txt").symlink_to(path)
    for again in (tmp_path / "texts", tmp_path / "link.txt"):
        with pytest.raises(ValueError, match="named twice"):
            find_texts([str(path), f"{again}:4"])


def test_the_format_is_what_its_docstring_says(write, make, folder):
    make(write("text.txt", ["the a", "the word1"]))
    (place,) = folder.glob("text-*")
    assert (place / "train.tokens").read_bytes() == b"\x05\0\x06\0\x05\0\x08\0"
    assert (place / "train.starts").read_bytes() == b"".join(n.to_bytes(8, "little") for n in (0, 2, 4))
    about = json.loads((place / "about.json").read_text())
    assert about["train"] == {"lines": 2, "tokens": 4}
    assert about["dtype"] == "uint16"
