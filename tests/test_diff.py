"""Comparing traces: no false alarm, the first wrong tensor, and traces that do not fit together."""

import pytest
import torch
from twins import CONFIGS, make_batch, twins

from minibert.parity import diff, trace
from minibert.parity.trace import Trace

SIZES = {**CONFIGS["3 heads, gelu_new"], "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def made():
    ours, theirs = twins(SIZES)
    batch = make_batch(SIZES, "right", (3, 5), two_segments=True)
    return trace(ours, **batch, grad=True), trace(theirs, **batch, grad=True), ours


def changed(given, **tensors):
    return Trace({**given.tensors, **tensors}, given.config, given.metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_port_is_right(dtype):
    ours, theirs = twins(SIZES, dtype=dtype)
    batch = make_batch(SIZES, "left", (3, 5), two_segments=True)
    report = diff(trace(ours, **batch, grad=True), trace(theirs, **batch, grad=True), ours)
    assert report.ok, "\n".join(report.lines())
    assert "both right" in report.summary[-1]


def test_the_first_wrong_tensor_and_who_is_wrong(made):
    a, b, ours = made
    wrong = b.tensors["layers.0.context"] * 1.01
    report = diff(a, changed(b, **{"layers.0.context": wrong}), ours)
    assert report.rows[-1].name == "layers.0.context"
    assert report.rows[-1].verdict == "B is wrong"
    assert "The last good one is layers.0.probabilities" in report.summary[0]
    assert diff(a, changed(b, **{"layers.0.context": wrong})).rows[-1].verdict == "differs"


def test_what_does_not_fit_is_said(made):
    a, b, _ = made
    gradient = "gradient.bert.encoder.layer.0.intermediate.dense.weight"
    turned = changed(b, **{gradient: b.tensors[gradient].T.contiguous()})
    assert diff(a, turned).rows[-1].verdict == "B is A transposed: axes 0 and 1 are exchanged"
    assert "3 5 131 in A and 3 2 131 in B" in diff(a, changed(b, logits=b.tensors["logits"][:, :2])).rows[-1].verdict
    assert "NaN or infinity in B" in diff(a, changed(b, loss=b.tensors["loss"] * float("nan"))).rows[-1].verdict
    ids = b.tensors["input_ids"].clone()
    ids[1, 0] = (ids[1, 0] + 1) % 131
    assert "input_ids at (1, 0)" in diff(a, changed(b, input_ids=ids)).summary[0]
    fewer = changed(b, mine=torch.ones(2))
    del fewer.tensors["layers.0.query"]
    report = diff(a, fewer)
    assert report.ok
    assert any("B does not have layers.0.query" in note for note in report.notes)
    assert any("B has mine" in note for note in report.notes)
