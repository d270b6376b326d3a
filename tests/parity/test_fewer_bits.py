"""Lower precision inside a float32 trace has a name, and what is something else has not. A quantised port: right ones
pass, whatever they round; faults are seen at their step, and known ones named.
"""

import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from independent import RIGHT, eight_bits
from planted import PLANTED, SIZES, only, place_of, planted, port
from strange import STRANGE
from torch.overrides import TorchFunctionMode
from twins import twins

from minibert.cli import main
from minibert.parity import diagnose, diff, trace
from minibert.parity.fewer_bits import quantised
from minibert.trace import standard_inputs


def tf32(x, truncated=False):
    """float32 without the last 13 bits of its significand, as tensor cores read it."""
    bits = x.view(torch.int32)
    return ((bits if truncated else bits + 2**12) & ~(2**13 - 1)).view(torch.float32)


class Accelerator(TorchFunctionMode):
    """Rounds the operands of every product."""

    def __init__(self, rounded):
        self.rounded = rounded
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = (self.rounded(args[0].contiguous()), self.rounded(args[1].contiguous()), *args[2:])
        return func(*args, **(kwargs or {}))


def sparse(given):
    return only(given, *(name for name in given.names if name.endswith(("_norm", "s.norm"))))


@pytest.mark.parametrize(
    ("title", "rounded", "keep"),
    [
        ("the products were in TF32", tf32, sparse),
        ("the products were in TF32", lambda x: tf32(x, truncated=True), lambda given: given),
        ("the products were in bfloat16", lambda x: x.bfloat16().float(), sparse),
    ],
)
def test_rounded_operands_are_recognised(title, rounded, keep):
    ours, theirs = twins(SIZES[1])
    batch = standard_inputs(ours.config)
    with Accelerator(rounded):
        given = keep(trace(theirs, **batch))
    report, diagnosis = diff(trace(ours, **batch), given, ours), diagnose(given, ours)
    assert (report.ok, diagnosis.ok) == (False, False)
    assert diagnosis.found[0][0].startswith(title)
    for said in ("\n".join(report.summary), "\n".join(diagnosis.lines)):
        assert f"is as if {title}" in said
        assert "set_float32_matmul_precision" in said
        assert "it explains the size of every error" in said
        assert "--quantised" not in said


def test_weights_and_results_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = twins(SIZES[1])
        given = trace(theirs.to(dtype).float(), **standard_inputs(ours.config))
        assert diagnose(given, ours).found == [[f"the weights had been rounded to {str(dtype)[6:]}"]]
    given = trace(ours, **standard_inputs(ours.config))
    with torch.autocast("cpu", torch.bfloat16):  # trace() itself switches it off
        given.tensors["layers.0.intermediate"] = (
            ours.layers[0].feed_forward.intermediate(given.tensors["layers.0.attention_norm"]).float()
        )
    assert "as if the products were in bfloat16" in "\n".join(diagnose(given, ours).lines)


def test_a_second_cause_is_not_covered_up():
    ours, theirs, _ = port()
    theirs.bert.encoder.layer[1].output.dense.bias.data += 1
    with Accelerator(tf32):
        given = trace(theirs, **standard_inputs(ours.config))
    assert "it does not explain the error of layers.1.feed_forward:" in "\n".join(diagnose(given, ours).lines)


def test_what_is_no_rounding_is_not_called_so():
    ours, theirs, _ = port()
    batch = standard_inputs(ours.config)
    given = planted(PLANTED["tanh-GELU"], theirs, batch)
    for each in (given, sparse(given)):
        assert "as if" not in "\n".join(diff(trace(ours, **batch), each, ours).summary)


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_quantised_port_passes(kind):
    ours, _ = twins(SIZES[1])
    given = trace(eight_bits(ours, **RIGHT[kind]), **standard_inputs(ours.config))
    report = quantised(given, ours)
    assert report.ok, "\n".join(report.lines())
    assert report.more["top1"] > 0.8
    assert 0 < report.more["divergence"] < 0.1
    assert any("covered: positions 0 to 15 of 19" in line for line in report.summary)
    assert quantised(only(given, "logits"), ours).ok


@pytest.mark.parametrize(
    ("title", "place"),
    [
        ("attention mask ignored", None),
        ("square weights transposed", None),
        ("relu", "layers.0.activation"),
        ("query bias missing", "layers.0.query"),
        ("head norm missing", "head.norm"),
    ],
)
def test_a_fault_of_a_quantised_port_is_seen_at_its_step(title, place):
    ours, theirs, _ = port()
    given = planted({**PLANTED, **STRANGE}[title], eight_bits(theirs), standard_inputs(ours.config))
    report = quantised(given, ours)
    place = place or place_of(title)
    assert (report.ok, report.first_wrong) == (False, place), report.summary
    named = [line.split(":")[0] for line in report.summary if "with this fault" in line]
    assert named == ([title] if title in PLANTED else []), report.summary
    fault = "this is no quantisation, but a fault" in "\n".join(report.summary)
    assert fault == place.endswith(("activation", "norm", "scores", "probabilities"))


def negative(x):
    return -x


@pytest.mark.parametrize(
    ("rows", "change", "words"),
    [
        (slice(1, 2), lambda x: x * float("nan"), "NaN or infinite"),
        (slice(1, 2), negative, "row 1: the likeliest word is nowhere the same"),
        (slice(None), negative, "8 bits everywhere leave it the same"),
    ],
)
def test_answers_that_no_task_accepts(rows, change, words):
    ours, _ = twins(SIZES[1])
    given = only(trace(ours, **standard_inputs(ours.config)), "logits")
    given.tensors["logits"] = given.tensors["logits"].clone()
    given.tensors["logits"][rows] = change(given.tensors["logits"][rows])
    report = quantised(given, ours)
    assert (report.ok, report.first_wrong) == (False, "logits")
    assert words in "\n".join(report.summary)


@pytest.mark.parametrize("confined", ["a position", "two words", "a row", None])
def test_the_hint_is_for_quantised_ports_only(confined):
    ours, _ = twins(SIZES[1])
    wrong, inputs = deepcopy(ours), standard_inputs(ours.config)
    pair = inputs["input_ids"][0, :2].tolist()
    words, positions = wrong.embeddings.word.weight.data, wrong.embeddings.position.weight.data
    if confined == "two words":
        words[pair] = words[pair[::-1]]
    elif confined == "a position":
        positions[3] += 0.001
    elif confined is None:
        wrong = eight_bits(ours)
    given = trace(wrong, **inputs)
    if confined == "a row":
        given.tensors["embeddings.sum"][1] += 0.0003
    for said in (diff(trace(ours, **inputs), given, ours).summary, diagnose(given, ours).lines):
        assert ("--quantised" in "\n".join(said)) == (confined is None), said


def test_the_command(tmp_path, capsys):
    ours, _ = twins(SIZES[1])
    ours.save_pretrained(tmp_path / "model")
    trace(eight_bits(ours), **standard_inputs(ours.config)).save(tmp_path / "a.safetensors")
    command = ["diff", str(tmp_path / "a.safetensors"), "--model", str(tmp_path / "model"), "--quantised"]
    assert main(command) == 0
    assert "no step is wrong by more than 8 bits explain" in capsys.readouterr().out
    assert main([*command, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["worst"]
