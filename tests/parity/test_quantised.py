"""A quantised port: right ones pass, whatever they round; faults are seen at their step, and known ones named."""

import json
from copy import deepcopy

import pytest
from independent import RIGHT, eight_bits
from planted import PLANTED, SIZES, place_of, port
from strange import STRANGE
from twins import twins

from minibert.cli import main
from minibert.parity import diagnose, diff, trace
from minibert.parity.fewer_bits import quantised
from minibert.trace import Trace, standard_inputs
from minibert.trace.table import INPUTS


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_port_passes(kind):
    ours, _ = twins(SIZES[1])
    given = trace(eight_bits(ours, **RIGHT[kind]), **standard_inputs(ours.config))
    report = quantised(given, ours)
    assert report.ok, "\n".join(report.lines())
    assert report.more["top1"] > 0.8
    assert any("covered: positions 0 to 15 of 19" in line for line in report.summary)
    alone = Trace({k: x for k, x in given.tensors.items() if k in (*INPUTS, "logits")}, given.config, given.metadata)
    assert quantised(alone, ours).ok


@pytest.mark.parametrize("title", ["attention mask ignored", "pre-LayerNorm", "square weights transposed"])
def test_a_fault_of_a_quantised_port_is_named(title, monkeypatch):
    ours, theirs, _ = port(SIZES[1])
    theirs = eight_bits(theirs)
    PLANTED[title](theirs, monkeypatch)
    report = quantised(trace(theirs, **standard_inputs(ours.config)), ours)
    assert (report.ok, report.first_wrong) == (False, place_of(title))
    assert [line.split(":")[0] for line in report.summary if "with this fault" in line] == [title], report.summary


@pytest.mark.parametrize(
    ("title", "place"),
    [
        ("relu", "layers.0.activation"),
        ("row 0's mask for all", "layers.0.scores"),
        ("query bias missing", "layers.0.query"),
        ("no residual around attention", "layers.0.attention_norm"),
        ("head norm missing", "head.norm"),
    ],
)
def test_an_unknown_fault_is_seen_at_its_step(title, place, monkeypatch):
    ours, theirs, _ = port(SIZES[1])
    theirs = eight_bits(theirs)
    STRANGE[title](theirs, monkeypatch)
    report = quantised(trace(theirs, **standard_inputs(ours.config)), ours)
    said = "\n".join(report.summary)
    assert (report.ok, report.first_wrong) == (False, place), said
    assert "with this fault" not in said
    assert ("this is no quantisation, but a fault" in said) == (not place.endswith("query"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)])
def test_numbers_that_are_none_are_wrong(number, rows):
    ours, _ = twins(SIZES[1])
    given = trace(ours, **standard_inputs(ours.config))
    given.tensors["logits"] = given.tensors["logits"].clone()
    given.tensors["logits"][rows] = number
    report = quantised(given, ours)
    assert (report.ok, report.first_wrong) == (False, "logits")
    assert any("NaN or infinite" in line for line in report.summary)


def test_answers_that_no_task_accepts():
    ours, _ = twins(SIZES[1])
    given = trace(ours, **standard_inputs(ours.config))
    logits = given.tensors["logits"].clone()
    logits[1] = -logits[1]
    alone = Trace({**{name: given.tensors[name] for name in INPUTS}, "logits": logits}, given.config, given.metadata)
    report = quantised(alone, ours)
    assert not report.ok
    assert any("row 1: the likeliest word is nowhere the same" in line for line in report.summary)


@pytest.mark.parametrize("confined", ["a position", "two words", "a row", "all"])
def test_the_hint_is_for_quantised_ports_only(confined):
    ours, _ = twins(SIZES[1])
    wrong, inputs = deepcopy(ours), standard_inputs(ours.config)
    pair = inputs["input_ids"][0, :2].tolist()
    words, positions = wrong.embeddings.word.weight.data, wrong.embeddings.position.weight.data
    if confined == "two words":
        words[pair] = words[pair[::-1]]
    elif confined == "a position":
        positions[3] += 0.001
    elif confined == "all":
        wrong = eight_bits(ours)
    given = trace(wrong, **inputs)
    if confined == "a row":
        given.tensors["embeddings.sum"][1] += 0.0003
    for said in (diff(trace(ours, **inputs), given, ours).summary, diagnose(given, ours).lines):
        assert ("--quantised" in "\n".join(said)) == (confined == "all"), said


def test_the_command(tmp_path, capsys):
    ours, _ = twins(SIZES[1])
    ours.save_pretrained(tmp_path / "model")
    trace(eight_bits(ours), **standard_inputs(ours.config)).save(tmp_path / "a.safetensors")
    command = ["diff", str(tmp_path / "a.safetensors"), "--model", str(tmp_path / "model")]
    assert main([*command, "--quantised"]) == 0
    said = capsys.readouterr().out
    assert "no step is wrong by more than 8 bits explain" in said
    assert "the likeliest word is the same at " in said
    assert main([*command, "--quantised", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["divergence"] < 0.1
    assert 0.8 < report["top1"] <= 1
    assert main(["diff", command[1], *command[1:], "--quantised"]) == 2
