"""Every command's options: they are there where they should be, and reach what they are for."""

import argparse
import json
from math import log

import pytest
import torch
from forms import form_or_skip
from small import LONG, TEXT

from minibert import BertForMaskedLM
from minibert.checks import find_device
from minibert.cli import COMMANDS, build_parser, main
from minibert.cli.texts import MANY_MASKS, MANY_SCORES


def parsers():
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


def options_of(command):
    return {name for name in parsers()[command]._option_string_actions if name.startswith("--")}


def test_every_command_is_there_and_explains_its_options():
    assert list(parsers()) == list(COMMANDS)
    for command, parser in parsers().items():
        assert parser.description.endswith(".")
        assert {"--help", "--traceback", "--revision"} <= options_of(command)
        assert {"--model", "--init"} & options_of(command)


MASKED, ASKED, PIECES = "the rain in [MASK]", "the rain in spain is plain", "unbelievable rain"
# (command, text, an option): what the option gives is another answer than what the text alone gives. Files: TRACE has
# two texts, PAIRS two lines, and NOTES is a file that is no page.
CHANGE = [
    ("fill-mask", MASKED, "--top-k 2"),
    ("fill-mask", MASKED, "--targets rain,spain"),
    ("fill-mask", f"[MASK] {LONG}", "--truncate"),
    ("mlm", TEXT, "--seed 3"),
    ("mlm", TEXT, "--positions 2"),
    ("mlm", TEXT, "--probability 0.9"),
    ("mlm", TEXT, "--recipe plain"),
    ("mlm", TEXT, "--score all"),
    ("mlm", MASKED, "--layers"),
    ("mlm", LONG, "--truncate"),
    ("score", "", "--pairs PAIRS"),
    ("score", ASKED, "--given paris"),
    ("score", PIECES, "--within-word original"),
    ("score", LONG, "--truncate"),
    ("study", MASKED, "--pair paris"),
    ("study", MASKED, "--top-k 2"),
    ("study", MASKED, "--targets rain,spain"),
    ("study", f"[MASK] {LONG}", "--truncate"),
    ("study", "", "--trace TRACE --row 1"),
    ("study", "", "--trace TRACE --row 1 --top-k 2"),
    ("study", "", "--trace TRACE --row 1 --targets rain,spain"),
    ("study", MASKED, "--out PAGE"),
    ("study", MASKED, "--out NOTES --force"),
]
CHANGE += [(command, "the rain [MASK]", "--json") for command in ("fill-mask", "mlm", "study")]
CHANGE += [("score", ASKED, "--json"), ("info", "", "--json")]
CHANGE += [(command, "TRACE", f"--format {form}") for command in ("diff", "diagnose") for form in ("markdown", "json")]
EVERYWHERE = {"--help", "--traceback", "--model", "--revision", "--device", "--dtype"}  # each has a test of its own


@pytest.mark.parametrize(("command", "text", "option"), CHANGE)
def test_an_option_changes_the_answer(command, text, option, folder, tmp_path, capsys):
    files = {name: str(tmp_path / name) for name in ("PAIRS", "NOTES", "PAGE", "TRACE")}
    (tmp_path / "PAIRS").write_text("the rain\train the\nparis\tlondon\n")
    (tmp_path / "NOTES").write_text("notes")
    if "TRACE" in (text, *option.split()):
        main(["trace", "--text", "a [MASK]", "--text", "[MASK] !", "--model", str(folder), "--out", files["TRACE"]])
        capsys.readouterr()

    def answer(options):
        words = [files.get(word, word) for word in options.split()]
        status = main([command, *([files.get(text, text)] if text else []), *words, "--model", str(folder)])
        out, err = capsys.readouterr()
        assert status in (0, 2), err
        return status, out

    without = option.rpartition("--")[0] if option.count("--") > 1 else ""
    plain, changed = answer(without), answer(option)
    assert changed[0] == 0
    assert changed != plain


def test_no_option_is_without_such_a_line():
    for command in ("fill-mask", "mlm", "score", "study", "info"):
        tried = {word for name, _, option in CHANGE if name == command for word in option.split() if word[:2] == "--"}
        assert options_of(command) == tried | (EVERYWHERE & options_of(command)), command


WITH_A_MODEL = {  # with what each needs to get as far as the model
    "fill-mask": "[MASK]",
    "mlm": "rain",
    "score": "rain",
    "study": "[MASK]",
    "info": "",
    "train": "no.txt --steps 1 --out OUT",
    "parity": "",
    "trace": "--out OUT",
    "diff": "TRACE TRACE",
    "diagnose": "TRACE",
    "export": "--out OUT.pt2",
    "bench": "--shapes 1x8",
}


@pytest.fixture
def words(folder, tmp_path, capsys):
    """The words of a command in WITH_A_MODEL, with its model."""

    def words(command):
        typed = WITH_A_MODEL[command]
        if "TRACE" in typed:
            assert main(["trace", "--text", "rain", "--model", str(folder), "--out", str(tmp_path / "t")]) == 0
            capsys.readouterr()
        typed = typed.replace("OUT", str(tmp_path / "out")).replace("TRACE", str(tmp_path / "t"))
        return [command, *typed.split(), "--init" if command == "train" else "--model", str(folder)]

    return words


@pytest.mark.parametrize("command", COMMANDS)
def test_a_revision_reaches_the_model_that_is_loaded(command, words, tmp_path, fails):
    """A folder has no revisions: a command that dropped the option would not notice."""
    assert "revision 'v1'" in fails(*words(command), "--revision", "v1")
    assert not (tmp_path / "out").is_file()


def test_a_revision_reaches_the_tokenizer_and_transformers_too(words, folder, tmp_path, fails, monkeypatch, capsys):
    assert "'v1'" in fails(*words("trace"), "--backend", "transformers", "--revision", "v1")
    model = BertForMaskedLM.from_pretrained(folder)
    monkeypatch.setattr("minibert.BertForMaskedLM.from_pretrained", lambda *_, **__: model)
    for command in ("fill-mask", "mlm", "score", "study"):
        assert "'v1'" in fails(*words(command), "--revision", "v1")
    assert main([*words("info"), "--revision", "v1"]) == 0
    assert "it cannot be read: " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["diff a b", "bench", "study --trace a"])
def test_a_revision_of_no_model_is_an_error(command, fails):
    assert "--model" in fails(*command.split(), "--revision", "v1")


@pytest.mark.parametrize("command", [name for name in COMMANDS if "--device" in options_of(name)])
def test_a_device_that_is_not_there_is_one_line_with_what_there_is(command, words, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, remedy in (("abacus", "there is cpu and no cuda"), ("cuda:7", "no cuda"), ("meta", "choose auto, cpu")):
        line = fails(*words(command), "--device", device)
        assert device in line
        assert remedy in line
    assert not list(tmp_path.glob("out*.*"))


@pytest.mark.parametrize("command", ["fill-mask", "mlm", "score", "study", "trace", "parity"])
def test_the_model_goes_where_it_is_asked_to(command, words, fails, monkeypatch):
    def load(name, *, device=None, **_):
        raise ValueError(f"loaded on {device}")

    monkeypatch.setattr(BertForMaskedLM, "from_pretrained", load)
    monkeypatch.setattr("minibert.checks.find_device", torch.device)  # any device is there
    assert "loaded on cuda:7" in fails(*words(command), "--device", "cuda:7")


@pytest.mark.parametrize("there", [False, True])
def test_auto_is_cuda_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert find_device("auto").type == ("cuda" if there else "cpu")


# ----------------------------------------------------------------------------------------------- prepared for inference


def log_probabilities(printed):
    """Of the answers of fill-mask, or of the tokens of score."""
    results = [row for one in json.loads(printed) for row in one.get("answers", one.get("tokens"))]
    return [log(row["score"]) if "score" in row else row["log_probability"] for row in results]


@pytest.mark.parametrize(
    ("command", "text", "many"),
    [("fill-mask", "the [MASK]", MANY_MASKS), ("score", "the rain", MANY_SCORES)],
)
def test_many_texts_take_the_fast_form_and_answer_the_same(command, text, many, run, prepared):
    few = log_probabilities(run(command, *[text] * (many - 1), "--json"))
    assert not prepared, "for a few texts that would take longer than it saves"
    found = log_probabilities(run(command, *[text] * many, "--json"))
    assert prepared == [torch.float32], "on a GPU too: without --dtype the answers are the CPU's"
    assert len(found) > len(few)
    assert found[: len(few)] == pytest.approx(few, abs=1e-4)


# nats, of a log-probability of the bundled model: rounding; some tens of roundings to 2^-8 of logits of order 10; and
# of roundings to a 254th of the largest number of a row.
NATS = {"float32": 1e-3, "bfloat16": 0.2, "int8": 0.6}


@pytest.mark.parametrize("dtype", NATS)
def test_a_dtype_answers_nearly_the_same(dtype, capsys):
    """Also few texts, and it is that type: the last digits are others than those of float32."""
    form_or_skip({"float32": "torch", "bfloat16": "bfloat16 torch", "int8": "int8"}[dtype])
    for typed in (["fill-mask", "The capital of France is [MASK]."], ["score", "She has gone home."]):
        answers = []
        for options in ([], ["--dtype", dtype]):
            assert main([*typed, *options, "--json", "--model", "minibert-uncased"]) == 0
            answers.append(log_probabilities(capsys.readouterr().out))
        assert answers[1] == pytest.approx(answers[0], abs=NATS[dtype])
        assert (answers[1] == pytest.approx(answers[0], abs=NATS["float32"])) == (dtype == "float32")


@pytest.mark.parametrize("command", ["fill-mask", "score"])
def test_a_dtype_that_the_processor_has_not_is_one_line(command, fails, folder, monkeypatch):
    monkeypatch.setattr("minibert.inference.prepare.has_bfloat16", lambda: False)
    monkeypatch.setattr("minibert.inference.prepare.has_int8", lambda: False)
    for dtype, said in (("bfloat16", "no instructions for bfloat16"), ("int8", "cannot multiply 8-bit numbers")):
        assert said in fails(command, "the [MASK]", "--dtype", dtype, "--model", str(folder))
