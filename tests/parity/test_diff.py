"""Comparing traces: no false alarm, the first wrong tensor, and traces that do not fit together."""

from dataclasses import replace

import pytest
import torch
from planted import only
from twins import CONFIGS, make_batch, twins

from minibert.parity import TraceFile, diagnose, diff, trace, yardstick
from minibert.trace import Trace

SIZES = {**CONFIGS["3 heads, gelu_new"], "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def made():
    ours, theirs = twins(SIZES)
    batch = make_batch(SIZES, "right", (3, 5), two_segments=True)
    return trace(ours, **batch, grad=True), trace(theirs, **batch, grad=True), ours


def changed(given, **tensors):
    return Trace({**given.tensors, **tensors}, given.config, given.metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_correct_port_is_right(dtype):
    ours, theirs = twins(SIZES, dtype=dtype)
    batch = make_batch(SIZES, "left", (3, 5), two_segments=True)
    report = diff(trace(ours, **batch, grad=True), trace(theirs, **batch, grad=True), ours)
    assert report.ok, "\n".join(report.lines())
    assert "both right" in report.summary[0]


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
    with pytest.raises(ValueError, match=r"input_ids at \(1, 0\) is .* Trace both on the same inputs"):
        diff(a, changed(b, input_ids=ids))
    fewer = changed(b, mine=torch.ones(2))
    del fewer.tensors["layers.0.query"]
    report = diff(a, fewer)
    assert report.ok
    assert any("B does not have layers.0.query" in note for note in report.notes)
    assert any("B has mine" in note for note in report.notes)
    other = Trace(b.tensors, replace(b.config, layer_norm_eps=1e-5), b.metadata)
    assert "note: layer_norm_eps is 1e-07 in A's config and 1e-05 in B's" in diff(a, other).notes


def test_float64_has_a_bound_of_its_own():
    ours, theirs = twins(SIZES, dtype=torch.float64)
    batch = make_batch(SIZES, "left", (3, 5), two_segments=True)
    a, b = trace(ours, **batch, grad=True), trace(theirs, **batch, grad=True)
    report = diff(a, b, ours, everything=True)
    assert report.ok, "\n".join(report.lines())
    bounds = [row.allowed[0].largest for row in report.rows]
    assert 9 * torch.finfo(torch.float64).eps < max(bounds) < 1e-12  # 8 would be the floor: no rounding was seen
    gelu = changed(b, logits=b.tensors["logits"] * (1 + 1e-12))
    assert diff(a, gelu, ours).rows[-1].verdict == "B is wrong"


def unlabelled(given):
    return Trace({name: x for name, x in given.tensors.items() if name != "labels"}, given.config, given.metadata)


def test_without_labels_the_rest_is_compared(made):
    a, b, ours = made
    for pair in ((a, unlabelled(b), ours), (unlabelled(a), b), (unlabelled(a), unlabelled(b))):
        report = diff(*pair)
        assert report.ok
        assert report.rows[-1].name == "logits"
        assert any("loss and gradients are not compared" in note for note in report.notes)
    assert "no difference in 1 tensor;" in diff(a, only(b, "logits")).summary[0]


def test_exchanged_axes_are_named(made):
    a, b, ours = made
    name = "layers.0.query"
    stored = b.tensors[name].transpose(1, 2).contiguous()  # B S H K
    noise = torch.where(b.tensors["attention_mask"][:, :, None, None] == 0, 7.0, stored)  # ports compute in the padding
    for model in (None, ours):
        row = diff(a, changed(b, **{name: noise}), model).rows[-1]
        assert (row.name, row.verdict) == (name, "B is A transposed: axes 1 and 2 are exchanged")
    report = diff(a, changed(b, **{name: stored + 1}))
    assert report.rows[-1].verdict.endswith("should be 3 3 5 8: exchange axes 1 and 2 of B")
    assert "nan" not in "\n".join(report.lines())


def test_what_is_said_of_a_fault(made):
    a, b, ours = made
    seen = b.tensors["attention_mask"][:, None, None, :] == 1
    scores = torch.where(seen, b.tensors["layers.0.scores"], -1.0)  # a mask that hides nothing
    soft = {"layers.0.scores": scores, "layers.0.probabilities": scores.softmax(-1)}
    said = diff(a, changed(b, **soft), ours).summary
    assert "first wrong: layers.0.probabilities" in said[0]
    assert said[1] == "layers.0.probabilities is the scores after the mask and the softmax over the keys"
    stale = [changed(each, **{"embeddings.sum": each.tensors["embeddings.sum"] + 1}) for each in (a, b)]
    assert "are these the weights of --model?" in diff(*stale, ours).summary[-1]
    one_wrong = diff(a, stale[1], ours)
    assert "are these" not in " ".join(one_wrong.summary)
    broken = b.tensors["logits"].clone()
    broken[0, 0, 0] = float("nan")
    said = " ".join(diff(a, changed(b, logits=broken), ours).summary)
    assert "B has NaN or infinity from logits on" in said
    assert "inf times" not in said
    gradient = "gradient.cls.predictions.bias"
    said = diff(a, changed(b, **{gradient: b.tensors[gradient] + 1})).summary[1]
    assert said == f"{gradient} is the backward pass, from the head to the embeddings, as far as cls.predictions.bias"
    assert "hides small faults" not in diff(a, b).summary[0]
    half = [Trace(each.tensors, each.config, {**each.metadata, "dtype": "bfloat16"}) for each in (a, b)]
    assert "1.9e-01, which hides small faults: --model, or traces in float32, show more" in diff(*half).summary[0]


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
    monkeypatch.setattr(yardstick, "PIECE", 7)
    for row, other in zip(diff(*files, model, everything=True).rows, whole.rows, strict=True):
        same = ("name", "shape", "max_abs", "relative", "first", "verdict")
        assert [repr(getattr(row, key)) for key in same] == [repr(getattr(other, key)) for key in same]
        for one, two in zip(row.errors or (), other.errors or (), strict=True):
            assert one == pytest.approx(two, rel=1e-9, nan_ok=True)
        # Sums in float32 depend on where they are cut.
        assert row.cosine == pytest.approx(other.cosine, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(("rows", "stored"), [(1, "B H S K"), (3, "B S H K")])
def test_as_many_positions_as_heads(rows, stored, tmp_path):
    """The shape is that of two layouts: either is right, and the report says which was taken."""
    sizes = {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 1}
    ours, theirs = twins(sizes)
    batch = make_batch(sizes, "right", (rows, sizes["num_attention_heads"]), two_segments=True)
    a, b = trace(ours, **batch), trace(theirs, **batch)
    for name in ("query", "key", "value"):
        x = b.tensors[f"layers.0.{name}"]
        x = x.transpose(1, 2) if stored == "B S H K" else x
        b.tensors[f"layers.0.{name}"] = x[0] if rows == 1 else x
    b.save(tmp_path / "b.safetensors")
    for model in (ours, None):
        report = diff(a, TraceFile(tmp_path / "b.safetensors"), model)
        assert report.ok, "\n".join(report.lines())
        [note] = [note for note in report.notes if "two layouts" in note]
        assert f"as {stored[2 if rows == 1 else 0 :]}, not" in note
    assert diagnose(TraceFile(tmp_path / "b.safetensors"), ours).ok
    b.tensors["layers.0.key"] = b.tensors["layers.0.key"] + 1
    b.save(tmp_path / "b.safetensors")
    said = "\n".join(diff(a, TraceFile(tmp_path / "b.safetensors"), ours).lines())
    assert "first wrong: layers.0.key" in said
    assert "the same vector is added at every token" in said


def test_an_acquittal_says_what_it_covers(made):
    a, b, ours = made
    for said in (diff(a, b).summary, diff(a, b, ours).summary, diagnose(b, ours).lines):
        assert "positions 0 to 4 of 11, token types 0, 1 of 3, rows of 3 to 5 tokens" in "\n".join(said)
        assert "from 5 on would not show" in "\n".join(said)


def test_what_a_sparse_trace_does_not_show(made):
    a, b, ours = made
    few = only(b, "embeddings.norm", "layers.0.feed_forward_norm")
    few.tensors["layers.0.feed_forward_norm"] = few.tensors["layers.0.feed_forward_norm"] * 1.01
    for said in (diff(a, few, ours).summary, diff(a, few).summary, diagnose(few, ours).lines):
        said = "\n".join(said)
        assert "between embeddings.norm and layers.0.feed_forward_norm, 11 tensors are not in " in said
        assert "layers.0.query, layers.0.key, " in said
        assert "write layers.0.context into " in said
    few.tensors["layers.0.context"] = b.tensors["layers.0.context"]
    assert "write layers.0.intermediate into B next" in "\n".join(diff(a, few, ours).summary)
    assert "are not in" not in "\n".join(diff(a, changed(b, **{"layers.0.key": a.tensors["layers.0.key"] + 1})).summary)


@pytest.mark.parametrize(("kind", "words"), [("log_softmax", "log-probabilities"), ("softmax", "probabilities")])
def test_probabilities_for_logits(made, kind, words):
    a, b, ours = made
    given = changed(b, logits=getattr(b.tensors["logits"], kind)(-1))
    for said in (diff(a, given, ours).summary, diff(a, given).summary, diagnose(given, ours).lines):
        assert f"these are {words}" in "\n".join(said)
        assert "bias" not in "\n".join(said).replace("embeddingsᵀ + bias", "").split("nearest")[0]


def one_entry_off(given, name, by):
    """The trace with one entry of a tensor wrong, by so much of its largest entry."""
    x = given.tensors[name].clone()
    x.view(-1)[0] += by * x.abs().max()
    return changed(given, **{name: x})


def test_how_far_from_rounding_is_wrong(made):
    """float32 explains about two roundings of 1.2e-7 in these tensors: three pass, twenty do not."""
    a, b, ours = made
    name = "layers.0.feed_forward_norm"
    assert diff(a, one_entry_off(b, name, 3 * 1.2e-7), ours).ok
    assert diff(a, one_entry_off(b, name, 20 * 1.2e-7), ours).rows[-1].verdict == "B is wrong"
    # Without a model, 64 roundings are let pass, and as many more for each layer before.
    assert diff(a, one_entry_off(b, "embeddings.norm", 40 * 1.2e-7)).ok
    assert diff(a, one_entry_off(b, "embeddings.norm", 90 * 1.2e-7)).rows[-1].verdict == "differs"
    everywhere = torch.where(torch.rand_like(b.tensors[name]) < 0.5, 1.0, -1.0) * 5e-7 * b.tensors[name].abs().max()
    assert diff(a, changed(b, **{name: b.tensors[name] + everywhere}), ours).rows[-1].verdict == "B is wrong"


def test_a_small_gradient_is_judged_by_its_own_size(made):
    """It is a twentieth of the largest one, and wrong in its fourth digit. One that is all rounding has no size."""
    a, b, ours = made
    name = "gradient.bert.encoder.layer.0.intermediate.dense.bias"
    assert b.tensors[name].abs().max() < 0.1 * b.tensors["gradient.cls.predictions.bias"].abs().max()
    row = diff(a, one_entry_off(b, name, 1e-4), ours).rows[-1]
    assert (row.name, row.verdict) == (name, "B is wrong")
    key = "gradient.bert.encoder.layer.0.attention.self.key.bias"  # 0, but for rounding: a softmax sees no shift
    assert diff(a, one_entry_off(b, key, 2.0), ours).ok


def test_half_precision_is_measured_with_several_roundings():
    """One computation may be exact by luck. Before a bfloat16 trace is called wrong, the model computes in others."""
    for dtype, more in ((torch.bfloat16, True), (torch.float32, False)):
        ours, _ = twins(SIZES, dtype=dtype)
        given = trace(ours, **make_batch(SIZES, "right", (3, 5)))
        stick = yardstick.Yardstick(ours, given, grad=False)
        pairs = [(measure.allowed, stick.shaken(measure).allowed) for measure in stick.measures()]
        assert all(shaken.largest >= alone.largest and shaken.rms >= alone.rms for alone, shaken in pairs)
        assert any(shaken.largest > 1.01 * alone.largest for alone, shaken in pairs) == more
