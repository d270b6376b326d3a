"""The `minibert` command as such: info, its mistakes, its options, its exit status."""

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from small import LONG, LONGEST, TEXT, VOCAB, assert_same_answers

import minibert
from minibert import BertForMaskedLM, load_tokenizer
from minibert.checkpoint.files import read_lines
from minibert.cli import main


def test_info_counts_what_transformers_counts(run, hub_model, folder):
    result = json.loads(run("info", "--json"))
    unique = {parameter.data_ptr(): parameter.numel() for parameter in hub_model.parameters()}
    budget = result["parameters"]
    assert budget["total"] == sum(unique.values())
    assert budget["total"] == sum(number for name, number in budget.items() if name != "total")
    assert result["config"]["vocab_size"] == len(VOCAB)
    report = result["load_report"]
    assert report["files"] == [str(folder / "model.safetensors")]
    assert re.fullmatch("[0-9a-f]{64}", report["sha256"]["model.safetensors"])
    assert report["initialised"] == report["non_finite"] == []

    tokenizer = result["tokenizer"]
    assert tokenizer["files"] == [str(folder / "tokenizer.json")]

    text = run("info")
    assert f"{budget['total']:,}" in text
    assert report["sha256"]["model.safetensors"] in text
    assert re.search(r"hidden_size +20\n", text)
    assert text.endswith("".join(f"  {line}\n" for line in (*tokenizer["files"], *tokenizer["notes"])))


def test_info_of_a_model_without_a_tokenizer(folder, tmp_path, capsys):
    BertForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert main(["info", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("tokenizer\n  there is none\n")
    assert main(["info", "--json", "--model", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] is None


def test_info_of_a_model_with_a_tokenizer_that_minibert_does_not_have(folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}', encoding="utf-8")
    assert main(["info", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "tensors loaded" in said
    assert re.search(r"tokenizer\n  it cannot be read: .*BertJapaneseTokenizer", said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fill-mask", "the rain"], r"no \[MASK\] in 'the rain': write \[MASK\]"),
        (["fill-mask", ""], r"no \[MASK\] in ''"),
        (["fill-mask", "line\none"], r"no \[MASK\]"),
        (["fill-mask", "the [MASK]", "--targets", "paris,unbelievable"], "became un ##believ ##able"),
        (["fill-mask", "the [MASK]", "--targets", ","], "a word or a list of words"),
        (["fill-mask", "the [MASK]", "--top-k", "0"], "top_k must be at least 1"),
        (["fill-mask", f"[MASK] {LONG}"], f"123 tokens long and the model takes {LONGEST}"),
        (["fill-mask", "caf\udce9 [MASK]"], "not UTF-8"),
        (["mlm", LONG], f"122 tokens long and the model takes {LONGEST}"),
        (["mlm", "caf\udce9"], "not UTF-8"),
        (["mlm", TEXT, "--positions", "1", "--recipe", "plain"], "recipe plain .* positions names .* one of the two"),
        (["mlm", TEXT, "--positions", "1", "--probability", "0.2"], "probability 0.2 .* positions names"),
        (
            ["mlm", TEXT, "--positions", "99"],
            r"position 99 .* which is 24 tokens: 0 \[CLS\], 1 the, 2 capital, .*, 23 \[SEP\]$",
        ),
        (["mlm", TEXT, "--positions", "1,x"], "whole numbers from 0, with commas between, not '1,x'"),
        (["mlm", TEXT, "--positions", "-1"], "whole numbers from 0"),
        (["mlm", TEXT, "--positions", ""], "whole numbers from 0"),
        (["mlm", TEXT, "--probability", "1.5"], "probability must be between 0 and 1, not 1.5"),
        (["mlm", TEXT, "--probability", "nan"], "probability .* nan"),
        (["mlm", TEXT, "--seed", str(2**64)], "seed must fit in 64 bits"),
        (["mlm", ""], "no token to mask in ''"),
        (["mlm", " "], "no token to mask"),
        (["mlm", "the [MASK]", "--seed", "0"], r"seed 0 .* \[MASK\] of its own"),
        (["mlm", "the [MASK]", "--recipe", "bert"], r"recipe bert .* \[MASK\] of its own"),
        (["mlm", f"{LONG} [MASK]", "--truncate"], r"1 \[MASK\] in .* would be cut off"),
        (["mlm", "the " * 61, "--positions", "70"], r"which is 63 tokens: .* 59 the, … 62 \[SEP\]"),
    ],
)
def test_a_mistake_is_one_line(folder, fails, arguments, words):
    line = fails(*arguments, "--model", str(folder))
    assert line.startswith(f"minibert {arguments[0]}: ")
    assert re.search(words, line)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'.*fill-mask.*mlm.*info.*train"),
        (["fill-mask"], "required: TEXT"),
        (["info", "--nonsense"], "--nonsense"),
        (["mlm", "a", "--recipe", "nonsense"], "'nonsense'"),
        (["mlm", "a", "--seed", "x"], "--seed.*'x'"),
        (["mlm", "a", "--seed", "1", "--positions", "1"], "--positions: not allowed with argument --seed"),
        (["fill-mask", "[MASK]", "--top-k", "many"], "--top-k.*'many'"),
    ],
)
def test_a_wrong_option_is_one_line_that_points_to_help(fails, arguments, words):
    line = fails(*arguments)
    assert re.search(words, line)
    assert "--help" in line


@pytest.mark.parametrize("command", [["fill-mask", "[MASK]"], ["mlm", "a"], ["info"]])
def test_a_model_that_is_not_there(fails, tmp_path, command):
    assert "'nowhere' is no folder" in fails(*command, "--model", "nowhere")
    assert "there is no config.json" in fails(*command, "--model", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in fails(*command, "--model", str(tmp_path))


def test_traceback_shows_where(folder):
    with pytest.raises(ValueError, match=r"no \[MASK\] in"):
        main(["fill-mask", "the rain", "--traceback", "--model", str(folder)])


@pytest.mark.parametrize("command", [[], ["fill-mask"], ["mlm"], ["info"], ["train"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert f"usage: {' '.join(['minibert', *command])}" in capsys.readouterr().out


def process(*arguments, given=b""):
    return subprocess.run(
        [sys.executable, "-m", "minibert", *arguments],
        input=given,
        capture_output=True,
        cwd=Path(minibert.__file__).parent.parent,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def test_python_m_minibert(folder, fill):
    done = process("fill-mask", "the [MASK] is paris", "--json", "--model", str(folder))
    assert (done.returncode, done.stderr) == (0, b"")
    assert_same_answers(json.loads(done.stdout)[0]["answers"], fill("the [MASK] is paris"))


def test_python_m_minibert_with_a_mistake(folder):
    done = process("mlm", b"caf\xe9 is no UTF-8", "--model", str(folder))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"minibert mlm: ")
    done = process("nonsense")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)


SHORT = "the [MASK] is"
ENDS = {"Windows": ("", "\r\n"), "a byte-order mark": ("\ufeff", "\n"), "both": ("\ufeff", "\r\n"), "none": ("", "\n")}


@pytest.mark.parametrize("ends", ENDS)
def test_a_line_is_its_text(ends, folder, given, run, tmp_path):
    """In every command that takes texts, from standard input, from a file and on the command line."""
    mark, end = ENDS[ends]
    given(f"{mark}{SHORT}{end}{end}a [MASK] .{end}")
    assert [one["text"] for one in json.loads(run("fill-mask", "-", "--json"))] == [SHORT, "a [MASK] ."]
    given(f"{mark}the rain{end}{end}is{end}")
    assert [one["text"] for one in json.loads(run("score", "-", "--json"))] == ["the rain", "", "is"]
    (tmp_path / "pairs").write_bytes(f"{mark}the rain\tthe is{end}is\tthe{end}".encode())
    results = json.loads(run("score", "--pairs", str(tmp_path / "pairs"), "--json"))["results"]
    assert [(one["good"], one["bad"]) for one in results] == [("the rain", "the is"), ("is", "the")]
    for command, text in (("fill-mask", SHORT), ("mlm", SHORT), ("study", SHORT), ("score", "the rain is")):
        plain = run(command, text, "--json")
        assert run(command, f"{mark}{text}{end}", "--json") == plain
        given(f"{mark}{text}{end}")
        assert run(command, "-", "--json") == plain


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"the [MASK]\nthe caf\xe9 [MASK]\n", "standard input, line 2 is not UTF-8: 'the caf\\xe9 [MASK]'"),
        (b"the [MASK]\n\nthe\0 [MASK]", "standard input, line 3 has a NUL"),
        (b"\xff\xfet\0h\0e\0\n\0", "line 1 is not UTF-8"),
        (b"the [MASK]\nab" + b"\xed\xa0\x80", "line 2 is not UTF-8"),
        (b"the [MASK]\n" + b"the " * 300, "line 2 is longer than 1000 bytes"),
        (b"", "no line on standard input"),
        (b"\n \r\n", "no line on standard input"),
        (None, "standard input is closed"),
    ],
)
def test_a_line_that_is_no_text_is_named(raw, said, fails, folder, given, monkeypatch):
    monkeypatch.setattr("minibert.checkpoint.files.LONGEST_LINE", 1000)
    given(raw)
    command = "fill-mask" if raw is None or not raw.strip() else "score"
    assert said in fails(command, "-", "--model", str(folder))


def test_lines_are_read_in_constant_memory():
    class Endless(io.RawIOBase):
        left = 400

        def readable(self):
            return True

        def readinto(self, buffer):
            self.left -= 1
            line = "the café 北 [MASK] .\r\n".encode() * 4000
            buffer[: len(buffer)] = line[: len(buffer)]
            return len(buffer) if self.left >= 0 else 0

    tracemalloc.start()
    longest = sum(len(lines) for lines in read_lines(io.BufferedReader(Endless()), "endless"))
    assert longest > 100_000
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_answers_come_while_lines_are_still_to_come(folder, monkeypatch, capsys):
    """As for somebody who types, or a program that waits for each answer."""
    printed = []

    class Typed(io.BytesIO):
        def read1(self, size=-1):
            printed.append(capsys.readouterr().out)
            return self.readline()

    text = b"the [MASK]\na [MASK]\nis [MASK]\n"
    for options, expected in (([], ["", "the [MASK]\n", "a [MASK]\n", "is [MASK]\n"]), (["--json"], None)):
        printed.clear()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Typed(text)))
        assert main(["fill-mask", "-", "--model", str(folder), *options]) == 0
        assert len(printed) == 4
        if expected:
            assert [one[: len(line)] for one, line in zip(printed, expected, strict=True)] == expected
            assert all(one.count("\n") == 6 for one in printed[1:])
        else:
            assert len(json.loads("".join(printed) + capsys.readouterr().out)) == 3


def test_control_characters_are_shown(folder, run, fails, tmp_path):
    """A terminal would obey them."""
    evil = "the \x1b]0;mine\x07 \x9b31m [MASK] \x7f\r x"
    for command in (["fill-mask"], ["mlm"], ["study"], ["fill-mask", "--json"]):
        out = run(*command, evil)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out), command
        if "--json" in command:
            assert json.loads(out)[0]["text"] == evil
    assert "\\x1b]0;mine\\x07" in run("fill-mask", evil)
    for arguments in (
        ["diff", "no\x1b[31mfile", "b"],
        ["mlm", "the", "--model", "no\x1bmodel"],
        ["score", "a", "--\x1b"],
    ):
        assert r"\x1b" in fails(*arguments)


@pytest.mark.slow
def test_closed_streams_are_one_line(folder, tmp_path):
    out = tmp_path / "trace.safetensors"
    for arguments, closed, status in (
        ("fill-mask -", "<&-", 2),
        ("score --pairs -", "<&-", 2),
        ("mlm the", ">&-", 2),
        (f"trace --text the --out {out}", ">&- <&-", 0),
        ("fill-mask [MASK]", "2>&-", 0),
        ("fill-mask no", "2>&-", 2),
        ("info --json", "> /dev/full", 2),
    ):
        command = f"exec {sys.executable} -m minibert {arguments} --model {folder} {closed}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
        assert done.returncode == status, (arguments, done.stderr)
        assert done.stderr.count("\n") == (status == 2 and closed != "2>&-"), done.stderr
    assert out.stat().st_size


@pytest.mark.filterwarnings("always")
def test_weights_that_are_not_numbers(folder, tmp_path, capsys):
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    model.save_pretrained(tmp_path)
    load_tokenizer(folder).save(str(tmp_path / "tokenizer.json"))
    assert main(["fill-mask", "[MASK]", "--json", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    assert "minibert: warning:" in err
    assert "head.bias" in err


def test_options_are_not_abbreviated(fails):
    assert "--mod" in fails("info", "--mod", "x")


def test_a_reader_that_has_seen_enough(folder):
    command = f"{sys.executable} -m minibert fill-mask '[MASK]' --top-k 30 --model {folder} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[MASK]\n"
    assert done.stderr == ""


def test_a_pipe_that_is_not_utf_8(folder):
    done = subprocess.run(
        [sys.executable, "-m", "minibert", "mlm", "--help"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    assert done.returncode == 0


def test_what_a_stranger_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("my own text")
    for arguments, said in (
        (["fill-mask", "Paris is [MASK].", "--topk", "3"], "see minibert fill-mask --help"),
        (["study", "A [MASK].", "B [MASK]."], "minibert study: unrecognized arguments"),
        (["trace", "--text", "", "--out", "x"], "no token in the text ''"),
        (["study", "no mask here", "--targets", "tea"], "the text has none"),
        (["trace", "--out", "mine.txt"], "is no trace"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    assert (tmp_path / "mine.txt").read_text() == "my own text"
