"""The `minibert` command as such: info, mistakes, lines of text, streams, exit status."""

import io
import json
import re
import subprocess
import sys
import tracemalloc

import pytest
import torch
from small import TEXT, VOCAB

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
    assert re.search(rf"\n  loaded +{len(report['loaded'])} tensors\n", text)
    assert all(line in text for line in (*tokenizer["files"], *tokenizer["notes"]))


@pytest.mark.parametrize(
    ("files", "option", "said"),
    [
        ({}, "", " none\n"),
        ({}, "--json", '"tokenizer": null\n'),
        (
            {"vocab.txt": "[PAD]\n", "tokenizer_config.json": '{"tokenizer_class": "BertJapaneseTokenizer"}'},
            "",
            "Japanese",
        ),
        ({"tokenizer_config.json": '{"mask_token": "[MASK]"}', "tokenizer.json": None}, "", "[MASK]\n"),
        ({"tokenizer_config.json": '{"mask_token": "[MASK]"}', "tokenizer.json": None}, "--json", '"mask": "[MASK]"'),
    ],
)
def test_info_of_other_tokenizers(files, option, said, folder, tmp_path, capsys):
    """None, one that is unknown, and one with roles. None of them keeps info from telling about the model."""
    for name, text in {"config.json": None, "model.safetensors": None, **files}.items():
        (tmp_path / name).write_bytes((folder / name).read_bytes() if text is None else text.encode())
    assert main(["info", *option.split(), "--model", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "words"),
    [  # the last part of what is typed is one argument, as a text is
        ("fill-mask|the rain", r"'the rain': write \[MASK\]"),
        ("fill-mask|caf\udce9 [MASK]", "not UTF-8"),
        (f"mlm --positions 99|{TEXT}", r"position 99 .* 24 tokens: 0 \[CLS\], 1 the, 2 capital, .*, 23 \[SEP\]$"),
        ("mlm the --positions|1,x", "whole numbers from 0, .* '1,x'"),
        ("mlm the --positions|-1", "whole numbers from 0"),
        ("mlm the --probability|1.5", "between 0 and 1, not 1.5"),
        (f"mlm the --seed|{2**64}", "seed must fit in 64 bits"),
        ("mlm| ", "no token to mask in ' '"),
        ("trace --out x --text|", "no token in the text ''"),
        ("info --model|nowhere", "'nowhere' is no folder"),
        ("parity --tokenizer FILE --dtype|float16", "--dtype is for comparing models"),
        # what argparse finds, which is one line too, and points to the help
        ("|nonsense", "invalid choice: 'nonsense'.*fill-mask.*mlm.*info.*train.*--help"),
        ("|fill-mask", "required: TEXT .*--help"),
        ("info --mod|x", "unrecognized arguments: --mod x .*--help"),
        ("study [MASK]|another", "unrecognized arguments: another .*--help"),
        ("mlm the --seed 1 --positions|1", "--positions: not allowed with argument --seed .*--help"),
        ("fill-mask [MASK] --top-k|many", "--top-k.*'many'.*--help"),
    ],
)
def test_a_mistake_is_one_line(folder, fails, tmp_path, monkeypatch, typed, words):
    monkeypatch.chdir(tmp_path)
    options, last = typed.replace("FILE", str(folder / "tokenizer.json")).split("|")
    arguments = [*options.split(), last]
    line = fails(*arguments, *([] if "--model" in arguments else ["--model", str(folder)]))
    assert line.startswith(f"minibert {arguments[0]}: " if arguments[0] in COMMANDS else "minibert: ")
    assert re.search(words, line)
    assert not list(tmp_path.iterdir())


def test_traceback_shows_where():
    with pytest.raises(ValueError, match="whole numbers"):
        main(["mlm", "the rain", "--positions", "x", "--traceback"])


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command, monkeypatch):
    """Also into a pipe that is not UTF-8."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", pipe)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    pipe.flush()
    assert stop.value.code == 0
    assert f"usage: {' '.join(['minibert', *command])}" in pipe.buffer.getvalue().decode()


def test_python_m_minibert():
    """In a process, whose arguments are bytes, with its own streams and exit status."""
    done = subprocess.run([sys.executable, "-m", "minibert", "mlm", b"caf\xe9 is no UTF-8"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert done.stderr.startswith(b"minibert mlm: ")


# ---------------------------------------------------------------------------------------------------- lines and streams


def test_a_line_is_its_text(given, run, tmp_path):
    """As Windows writes it: with a byte-order mark, and \\r\\n at its end. In every command that takes texts, from
    standard input, from a file and on the command line.
    """
    given("\ufeffthe [MASK] is\r\n\r\na [MASK] .\r\n")
    results = json.loads(run("fill-mask", "paris [MASK]", "-", "the [MASK]", "--json"))
    assert [one["text"] for one in results] == ["paris [MASK]", "the [MASK] is", "a [MASK] .", "the [MASK]"]
    given("\ufeffrain\r\n\r\n  \r\nthe play\n")
    results = json.loads(run("score", "a", "-", "plain", "--json"))
    assert [one["text"] for one in results] == ["a", "rain", "", "  ", "the play", "plain"]
    pairs = "\ufeffthe rain\tthe is\r\nis\tthe\r\n".encode()
    (tmp_path / "pairs").write_bytes(pairs)
    given(pairs)
    for file in (str(tmp_path / "pairs"), "-"):
        results = json.loads(run("score", "--pairs", file, "--json"))["results"]
        assert [(one["good"], one["bad"]) for one in results] == [("the rain", "the is"), ("is", "the")]
    for command in ("fill-mask", "mlm", "study", "score"):
        text = "the rain is" if command == "score" else "the [MASK] is"
        plain = run(command, text, "--json")
        assert run(command, f"\ufeff{text}\r\n", "--json") == plain
        given(f"\ufeff{text}\r\n")
        assert run(command, "-", "--json") == plain


@pytest.mark.parametrize(
    ("command", "raw", "said"),
    [
        ("score", b"the [MASK]\nthe caf\xe9 [MASK]\n", r"standard input, line 2 is not UTF-8: 'the caf\xe9 [MASK]'"),
        ("score", b"the [MASK]\n\nthe\0 [MASK]", "standard input, line 3 has a NUL"),
        ("score", b"\xff\xfet\0h\0e\0\n\0", "line 1 is not UTF-8"),
        ("score", b"the [MASK]\n" + b"the " * 300, "line 2 is longer than 1000 bytes"),
        ("score", b"", "lines on standard input"),
        ("fill-mask", b"\n \r\n", "no line on standard input"),
        ("fill-mask", None, "standard input is closed"),
        ("mlm", b"the\nrain\n", "2 lines"),
    ],
)
def test_a_line_that_is_no_text_is_named(command, raw, said, fails, folder, given, monkeypatch):
    monkeypatch.setattr("minibert.checkpoint.files.LONGEST_LINE", 1000)
    given(raw)
    assert said in fails(command, "-", "--model", str(folder))


def test_lines_are_read_in_constant_memory():
    file = io.BytesIO("the café 北 [MASK] .\r\n".encode() * 50_000)
    tracemalloc.start()
    assert sum(len(lines) for lines in read_lines(file, "many")) == 50_000
    assert tracemalloc.get_traced_memory()[1] < 1_000_000, "65 kB at a time, of 1.3 MB"
    tracemalloc.stop()


@pytest.mark.parametrize("option", ["", "--json"])
def test_answers_come_while_lines_are_still_to_come(option, folder, monkeypatch, capsys):
    """As for somebody who types, or a program that waits for each answer."""
    printed = []

    class Typed(io.BytesIO):
        def read1(self, size=-1):
            printed.append(capsys.readouterr().out)
            return self.readline()

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Typed(b"the [MASK]\na [MASK]\nis [MASK]\n")))
    assert main(["fill-mask", "-", "--model", str(folder), *option.split()]) == 0
    assert ["[MASK]" in one for one in printed] == [False, True, True, True]
    assert not option or len(json.loads("".join(printed) + capsys.readouterr().out)) == 3


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
