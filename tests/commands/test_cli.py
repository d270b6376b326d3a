"""The `minibert` command as such: info, mistakes, lines of text, streams, exit status."""

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc

import pytest
import torch
from small import LONG, LONGEST, TEXT, VOCAB, assert_same_answers

from minibert import BertForMaskedLM, load_tokenizer
from minibert.checkpoint.files import read_lines
from minibert.cli import COMMANDS, main


def test_info_counts_what_transformers_counts(run, hub_model, folder):
    result, text = json.loads(run("info", "--json")), run("info")
    budget, report, tokenizer = result["parameters"], result["load_report"], result["tokenizer"]
    unique = {parameter.data_ptr(): parameter.numel() for parameter in hub_model.parameters()}
    assert budget["total"] == sum(unique.values())
    assert budget["total"] == sum(number for name, number in budget.items() if name != "total")
    assert result["config"]["vocab_size"] == len(VOCAB)
    assert report["files"] == [str(folder / "model.safetensors")]
    assert re.fullmatch("[0-9a-f]{64}", report["sha256"]["model.safetensors"])
    assert report["initialised"] == report["non_finite"] == []
    assert tokenizer["files"] == [str(folder / "tokenizer.json")]
    assert f"{budget['total']:,}" in text
    assert report["sha256"]["model.safetensors"] in text
    assert re.search(r"\n  hidden_size +20\n", text)
    assert f"tensors loaded (in the file: {len(report['loaded'])} × F32), held as float32" in text
    assert text.endswith("".join(f"  {line}\n" for line in (*tokenizer["files"], *tokenizer["notes"])))


def test_info_of_other_tokenizers_none_one_that_is_unknown_and_one_with_roles(folder, tmp_path, capsys):
    BertForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
    for options, said in (([], "tokenizer\n  there is none\n"), (["--json"], '"tokenizer": null\n}\n')):
        assert main(["info", *options, "--model", str(tmp_path)]) == 0
        assert capsys.readouterr().out.endswith(said)
    (tmp_path / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}', encoding="utf-8")
    assert main(["info", "--model", str(tmp_path)]) == 0
    assert re.search(r"tensors loaded.*tokenizer\n  it cannot be read: .*Japanese", capsys.readouterr().out, re.DOTALL)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "[MASK]"}', encoding="utf-8")
    for options, said in (
        ([], "\n  special tokens: mask [MASK]\n"),
        (["--json"], '"roles": {\n      "mask": "[MASK]"\n'),
    ):
        assert main(["info", *options, "--model", str(tmp_path)]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fill-mask", "the rain"], r"no \[MASK\] in 'the rain': write \[MASK\]"),
        (["fill-mask", "line\none"], r"no \[MASK\]"),
        (["fill-mask", "the [MASK]", "--targets", "paris,unbelievable"], "became un ##believ ##able"),
        (["fill-mask", "the [MASK]", "--targets", ","], "a word or a list of words"),
        (["fill-mask", "the [MASK]", "--top-k", "0"], "top_k must be at least 1"),
        (["fill-mask", f"[MASK] {LONG}"], f"123 tokens long and the model takes {LONGEST}"),
        (["fill-mask", "caf\udce9 [MASK]"], "not UTF-8"),
        (["mlm", TEXT, "--positions", "1", "--recipe", "plain"], "recipe plain .* positions names .* one of the two"),
        (
            ["mlm", TEXT, "--positions", "99"],
            r"position 99 .* which is 24 tokens: 0 \[CLS\], 1 the, 2 capital, .*, 23 \[SEP\]$",
        ),
        (["mlm", "the " * 61, "--positions", "70"], r"which is 63 tokens: .* 59 the, … 62 \[SEP\]"),
        (["mlm", TEXT, "--positions", "1,x"], "whole numbers from 0, with commas between, not '1,x'"),
        (["mlm", TEXT, "--positions", "-1"], "whole numbers from 0"),
        (["mlm", TEXT, "--positions", ""], "whole numbers from 0"),
        (["mlm", TEXT, "--probability", "1.5"], "probability must be between 0 and 1, not 1.5"),
        (["mlm", TEXT, "--probability", "nan"], "probability .* nan"),
        (["mlm", TEXT, "--seed", str(2**64)], "seed must fit in 64 bits"),
        (["mlm", " "], "no token to mask in ' '"),
        (["mlm", f"{LONG} [MASK]", "--truncate"], r"1 \[MASK\] in .* would be cut off"),
        (["study", "[MASK]", "--top-k", "21"], "top_k must be 1 to 20, not 21"),
        (["study", "no mask here", "--targets", "rain"], "the text has none"),
        (["study", "--trace", ""], "should be a trace"),
        (["trace", "--text", "", "--out", "x"], "no token in the text ''"),
        (["info", "--model", "nowhere"], "'nowhere' is no folder"),
        (["info", "--model", "."], "there is no config.json"),
        # what argparse finds, which is one line too, and points to the help
        ([], "required: COMMAND .*--help"),
        (["nonsense"], "invalid choice: 'nonsense'.*fill-mask.*mlm.*info.*train.*--help"),
        (["fill-mask"], "required: TEXT .*--help"),
        (["info", "--mod", "x"], "unrecognized arguments: --mod x .*--help"),
        (["study", "A [MASK].", "B [MASK]."], "unrecognized arguments: B .*--help"),
        (["mlm", "a", "--recipe", "nonsense"], "'nonsense'.*--help"),
        (["mlm", "a", "--seed", "1", "--positions", "1"], "--positions: not allowed with argument --seed .*--help"),
        (["fill-mask", "[MASK]", "--top-k", "many"], "--top-k.*'many'.*--help"),
    ],
)
def test_a_mistake_is_one_line(folder, fails, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments or not arguments else ["--model", str(folder)]
    line = fails(*arguments, *model)
    assert line.startswith(f"minibert {arguments[0]}: " if arguments and arguments[0] in COMMANDS else "minibert: ")
    assert re.search(words, line)
    assert not list(tmp_path.iterdir())


def test_traceback_shows_where(folder):
    with pytest.raises(ValueError, match=r"no \[MASK\] in"):
        main(["fill-mask", "the rain", "--traceback", "--model", str(folder)])


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert f"usage: {' '.join(['minibert', *command])}" in capsys.readouterr().out


def test_python_m_minibert(folder, fill):
    """In a process, with its own streams and exit status."""

    def process(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "minibert", *arguments], capture_output=True, env={**os.environ, **environment}
        )

    done = process("fill-mask", "the [MASK] is paris", "--json", "--model", str(folder), PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stderr) == (0, b"")
    assert_same_answers(json.loads(done.stdout)[0]["answers"], fill("the [MASK] is paris"))
    done = process("mlm", b"caf\xe9 is no UTF-8", "--model", str(folder))
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert done.stderr.startswith(b"minibert mlm: ")
    assert process("mlm", "--help", PYTHONIOENCODING="ascii").returncode == 0, "a pipe that is not UTF-8"


# ---------------------------------------------------------------------------------------------------- lines and streams

SHORT = "the [MASK] is"
ENDS = {"Windows": ("", "\r\n"), "a byte-order mark": ("\ufeff", "\n"), "both": ("\ufeff", "\r\n"), "none": ("", "\n")}


@pytest.mark.parametrize("ends", ENDS)
def test_a_line_is_its_text(ends, given, run, tmp_path):
    """In every command that takes texts, from standard input, from a file and on the command line."""
    mark, end = ENDS[ends]
    given(f"{mark}{SHORT}{end}{end}a [MASK] .{end}")
    assert [one["text"] for one in json.loads(run("fill-mask", "-", "--json"))] == [SHORT, "a [MASK] ."]
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
        left = 40

        def readable(self):
            return True

        def readinto(self, buffer):
            self.left -= 1
            line = "the café 北 [MASK] .\r\n".encode() * 4000
            buffer[: len(buffer)] = line[: len(buffer)]
            return len(buffer) if self.left >= 0 else 0

    tracemalloc.start()
    count = sum(len(lines) for lines in read_lines(io.BufferedReader(Endless(), 2**16), "endless"))
    assert count > 50_000
    assert tracemalloc.get_traced_memory()[1] < 2_000_000, "65 kB at a time, of 2.6 MB"
    tracemalloc.stop()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_answers_come_while_lines_are_still_to_come(options, folder, monkeypatch, capsys):
    """As for somebody who types, or a program that waits for each answer."""
    printed = []

    class Typed(io.BytesIO):
        def read1(self, size=-1):
            printed.append(capsys.readouterr().out)
            return self.readline()

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Typed(b"the [MASK]\na [MASK]\nis [MASK]\n")))
    assert main(["fill-mask", "-", "--model", str(folder), *options]) == 0
    assert ["[MASK]" in one for one in printed] == [False, True, True, True]
    if options:
        assert len(json.loads("".join(printed) + capsys.readouterr().out)) == 3


def test_control_characters_are_shown(run, fails):
    """A terminal would obey them."""
    evil = "the \x1b]0;mine\x07 \x9b31m [MASK] \x7f\r x"
    for command in (["fill-mask"], ["mlm"], ["study"], ["fill-mask", "--json"]):
        out = run(*command, evil)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out), command
        if "--json" in command:
            assert json.loads(out)[0]["text"] == evil
    assert "\\x1b]0;mine\\x07" in run("fill-mask", evil)
    for arguments in (["diff", "no\x1b[31mfile", "b"], ["mlm", "the", "--model", "no\x1b"], ["score", "a", "--\x1b"]):
        assert r"\x1b" in fails(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "streams", "status"),
    [
        ("fill-mask -", "<&-", 2),
        ("score --pairs -", "<&-", 2),
        ("mlm the", ">&-", 2),
        ("trace --text the --out OUT", ">&- <&-", 0),
        ("fill-mask [MASK]", "2>&-", 0),
        ("fill-mask no", "2>&-", 2),
        ("info --json", "> /dev/full", 2),
        ("fill-mask [MASK] --top-k 30", "| head -1", 0),  # a reader that has seen enough
    ],
)
def test_streams_that_are_closed_or_full(arguments, streams, status, folder, tmp_path):
    out = tmp_path / "trace.safetensors"
    command = f"{sys.executable} -m minibert {arguments.replace('OUT', str(out))} --model {folder} {streams}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == (status == 2 and streams != "2>&-"), done.stderr
    assert out.exists() == ("OUT" in arguments)
    assert "head" not in streams or done.stdout == "[MASK]\n"


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
