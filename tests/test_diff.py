"""Comparing traces: no false alarm, the first wrong tensor, and traces that do not fit together."""

import pytest
import torch
from twins import CONFIGS, make_batch, twins

from minibert.parity import TraceFile, diff, trace, yardstick
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


@pytest.mark.parametrize("with_model", [False, True])
def test_small_pieces_make_the_same_report(made, with_model, monkeypatch, tmp_path):
    a, b, ours = made
    wrong = {name: b.tensors[name].clone() for name in ("layers.0.probabilities", "logits")}
    wrong["layers.0.probabilities"][0, 1, 2, 3] += 1
    wrong["logits"][1, 0, 130] = float("inf")
    b = changed(b, **wrong)
    a.save(tmp_path / "a.safetensors")
    b.save(tmp_path / "b.safetensors")
    files = [TraceFile(tmp_path / f"{name}.safetensors") for name in "ab"]
    model = ours if with_model else None
    whole = diff(a, b, model, everything=True)
    firsts = {row.name: row.first for row in whole.rows if row.first}
    assert (firsts["layers.0.probabilities"], firsts["logits"]) == ((0, 1, 2, 3), (1, 0, 130))
    for piece in (7, 100):
        monkeypatch.setattr(yardstick, "PIECE", piece)
        report = diff(*files, model, everything=True)
        for row, other in zip(report.rows, whole.rows, strict=True):
            same = ("name", "shape", "max_abs", "relative", "first", "verdict", "errors", "allowed")
            assert [repr(getattr(row, key)) for key in same] == [repr(getattr(other, key)) for key in same]
            # Sums in float32 depend on where they are cut.
            assert row.cosine == pytest.approx(other.cosine, abs=1e-5, nan_ok=True)
