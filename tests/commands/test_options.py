"""Every command's options: they are there where they should be, and reach what they are for."""

import argparse
import json

import pytest
import torch
from small import LONG, LONGEST, TEXT

from minibert import BertForMaskedLM, load_tokenizer
from minibert.checks import find_device
from minibert.cli import COMMANDS, build_parser, main
from minibert.tokenizer import encode


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

    def answer(options):
        words = [files.get(word, word) for word in options.split()]
        status = main([command, *([files.get(text, text)] if text else []), *words, "--model", str(folder)])
        out, err = capsys.readouterr()
        assert status in (0, 2), err
        return status, out

    without = option.removesuffix(" --row 1") if "--row" in option else option.removesuffix(" --force")
    plain, changed = answer("" if without == option else without), answer(option)
    assert changed[0] == 0
    assert changed != plain


@pytest.mark.parametrize("option", ["--top-k 2", "--targets rain,spain"])
def test_study_takes_its_options_for_a_trace_too(option, words, tmp_path, run, capsys):
    main([*words("trace"), "--text", "the [MASK]", "--out", str(tmp_path / "t")])
    capsys.readouterr()
    shown = run("study", "--trace", str(tmp_path / "t"), "--json")
    assert run("study", "--trace", str(tmp_path / "t"), "--json", *option.split()) != shown


def test_no_option_is_without_such_a_line():
    for command in ("fill-mask", "mlm", "score", "study", "info"):
        tried = {word for name, _, option in CHANGE if name == command for word in option.split() if word[:2] == "--"}
        assert options_of(command) == tried | (EVERYWHERE & options_of(command)), command


@pytest.mark.parametrize("pair", [False, True])
def test_what_is_cut_off_is_the_same_in_every_command(pair, folder, run, fails):
    """At the end of the text; of two, at the end of the longer one."""
    text, second = f"the rain {LONG}", "paris is in france" if pair else None
    kept = encode(load_tokenizer(folder), text, LONGEST, pair=second, truncate=True)
    cut = {
        "study": [text, *(["--pair", second] if pair else [])],
        "score": [second, "--given", text] if pair else [text],
    }
    if not pair:
        cut["mlm"] = [text, "--positions", "1"]
    for command, arguments in cut.items():
        assert f"and the model takes {LONGEST}" in fails(command, *arguments, "--model", str(folder))
        found = json.loads(run(command, *arguments, "--truncate", "--json"))
        if command == "score":
            sentence = int(pair)
            scored = [token for token, one in zip(kept.tokens, kept.sequence_ids, strict=True) if one == sentence]
            assert [token["token"] for token in found[0]["tokens"]] == scored
        else:
            assert (found["tokens"] if command == "mlm" else found["reading"]["pieces"]) == kept.tokens


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
    line = fails(*words(command), "--revision", "v1")
    assert "revision 'v1'" in line
    assert "revisions are the hub's" in line
    assert not (tmp_path / "out").is_file()


def test_a_revision_reaches_the_tokenizer_and_transformers_too(words, folder, tmp_path, fails, monkeypatch, capsys):
    assert "'v1'" in fails(*words("trace"), "--backend", "transformers", "--revision", "v1")
    asked = []
    load, model = load_tokenizer, BertForMaskedLM.from_pretrained(folder)
    monkeypatch.setattr("minibert.BertForMaskedLM.from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(
        "minibert.tokenizer.load_tokenizer", lambda name, revision: asked.append(revision) or load(name)
    )
    for command in ("fill-mask", "mlm", "score", "study", "info"):
        assert main([*words(command), "--revision", "v1"]) == 0
    assert asked == ["v1"] * 5


@pytest.mark.parametrize("command", ["diff a b", "bench", "study --trace a"])
def test_a_revision_of_no_model_is_an_error(command, tmp_path, fails, words, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        assert main([*words("trace"), "--out", name]) == 0
    capsys.readouterr()
    assert "no --model was given" in fails(*command.split(), "--revision", "v1")


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


def test_what_would_be_ignored_is_refused(fails, folder):
    tokenizer = ["--tokenizer", str(folder / "tokenizer.json")]
    for option in (["--dtype", "float16"], ["--device", "cuda"]):
        assert f"{option[0]} is for comparing models" in fails("parity", *tokenizer, *option, "--model", str(folder))
