"""Every command's options: they are there where they should be, and reach what they are for."""

import argparse

import pytest
import torch

from minibert import BertForMaskedLM
from minibert.checks import find_device
from minibert.cli import COMMANDS, build_parser, main


def parsers():
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


def test_every_command_is_there_and_explains_its_options():
    assert list(parsers()) == list(COMMANDS)
    for parser in parsers().values():
        assert parser.description.endswith(".")
        assert {"--help", "--traceback"} <= parser._option_string_actions.keys()


def test_what_takes_a_model_takes_a_revision_of_it():
    taking = [
        name for name, parser in parsers().items() if {"--model", "--init"} & parser._option_string_actions.keys()
    ]
    assert taking == list(COMMANDS)
    for name in taking:
        assert "--revision" in parsers()[name]._option_string_actions, name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_revision_reaches_the_model_that_is_loaded(command, folder, tmp_path, fails, capsys):
    """A folder has no revisions: a command that dropped the option would not notice."""
    trace, out = tmp_path / "trace", tmp_path / "out"
    if command in ("diff", "diagnose"):
        assert main(["trace", "--text", "the rain", "--model", str(folder), "--out", str(trace)]) == 0
        capsys.readouterr()
    arguments = {
        "fill-mask": ["[MASK]"],
        "mlm": ["the rain"],
        "score": ["the rain"],
        "study": ["the [MASK]"],
        "train": ["no.txt", "--steps", "1", "--out", str(out)],
        "trace": ["--out", str(out)],
        "diff": [str(trace), str(trace)],
        "diagnose": [str(trace)],
        "bench": ["--shapes", "1x8"],
    }
    model = "--init" if command == "train" else "--model"
    required = [action for action in parsers()[command]._actions if action.required]
    others = [word for action in required for word in (*action.option_strings[:1], str(out))]  # a command added since
    line = fails(command, *arguments.get(command, others), model, str(folder), "--revision", "v1")
    assert "revision 'v1'" in line
    assert "revisions are the hub's" in line
    assert not out.exists() or command == "train"


COMPUTING = {  # with what it needs to get as far as the device
    "fill-mask": ["[MASK]"],
    "mlm": ["the rain"],
    "score": ["the rain"],
    "study": ["the [MASK]"],
    "trace": ["--out", "OUT"],
    "parity": [],
    "export": ["--out", "OUT.pt2"],
    "bench": ["--shapes", "1x8"],
    "train": ["no.txt", "--steps", "1", "--out", "OUT"],
}


@pytest.mark.parametrize("command", COMPUTING)
def test_a_device_that_is_not_there_is_one_line_with_what_there_is(command, folder, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [word.replace("OUT", str(tmp_path / "out")) for word in COMPUTING[command]]
    given += ["--init" if command == "train" else "--model", str(folder)]
    for device, remedy in (("abacus", "there is cpu and no cuda"), ("cuda:7", "no cuda"), ("meta", "choose auto, cpu")):
        line = fails(command, *given, "--device", device)
        assert device in line
        assert remedy in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("command", ["fill-mask", "mlm", "score", "study", "trace", "parity"])
def test_the_model_goes_where_it_is_asked_to(command, folder, tmp_path, fails, monkeypatch):
    def load(name, *, device=None, **_):
        raise ValueError(f"loaded on {device}")

    monkeypatch.setattr(BertForMaskedLM, "from_pretrained", load)
    monkeypatch.setattr("minibert.checks.find_device", torch.device)  # any device is there
    given = [word.replace("OUT", str(tmp_path / "out")) for word in COMPUTING[command]]
    assert "loaded on cuda:7" in fails(command, *given, "--model", str(folder), "--device", "cuda:7")


@pytest.mark.parametrize("there", [False, True])
def test_auto_is_cuda_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert find_device("auto").type == ("cuda" if there else "cpu")


def test_trace_by_transformers_takes_the_revision_too(folder, tmp_path, fails):
    out = str(tmp_path / "out")
    assert "'v1'" in fails(
        "trace", "--backend", "transformers", "--model", str(folder), "--revision", "v1", "--out", out
    )


@pytest.mark.parametrize("command", [["diff", "a", "b"], ["bench"]])
def test_a_revision_of_no_model_is_an_error(command, tmp_path, fails, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        assert main(["trace", "--text", "the rain", "--model", str(folder), "--out", name]) == 0
    capsys.readouterr()
    assert "no --model was given" in fails(*command, "--revision", "v1")
