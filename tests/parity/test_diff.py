"""Comparing traces: no false alarm, the first wrong tensor, and traces that do not fit together."""

from dataclasses import replace

import pytest
import torch
from planted import only
from twins import CONFIGS, make_batch, twins

from minibert.parity import TraceFile, diagnose, diff, trace, yardstick
from minibert.trace import Trace

SIZES = {**CONFIGS["3 heads, gelu_new"], "num_hidden_layers": 1}
WEIGHT = "gradient.bert.encoder.layer.0.intermediate.dense.weight"
BIAS = "gradient.cls.predictions.bias"


@pytest.fixture(scope="module")
def made():
    ours, theirs = twins(SIZES)
    batch = make_batch(SIZES, "right", (3, 5), two_segments=True)
    return trace(ours, **batch, grad=True), trace(theirs, **batch, grad=True), ours


def changed(given, **tensors):
    return Trace({**given.tensors, **tensors}, given.config, given.metadata)


def text(report):
    return "\n".join(report.lines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_correct_port_is_right(dtype):
    ours, theirs = twins(SIZES, dtype=dtype)
    batch = make_batch(SIZES, "left", (3, 5), two_segments=True)
    a, b = trace(ours, **batch, grad=True), trace(theirs, **batch, grad=True)
    report = diff(a, b, ours)
    assert report.ok, text(report)
    assert "both right" in report.summary[0]
    if dtype == torch.float64:  # it has a bound of its own
        bounds = [row.allowed[0].largest for row in report.rows]
        assert 9 * torch.finfo(dtype).eps < max(bounds) < 1e-12  # 8 would be the floor: no rounding was seen
        wrong = changed(b, logits=b.tensors["logits"] * (1 + 1e-12))
        assert diff(a, wrong, ours).rows[-1].verdict == "B is wrong"


def ignored_mask(t):
    scores = torch.where(t["attention_mask"][:, None, None, :] == 1, t["layers.0.scores"], -1.0)
    return {"layers.0.scores": scores, "layers.0.probabilities": scores.softmax(-1)}


def split_otherwise(t):  # B S H K, and ports compute in the padding
    x = t["layers.0.query"].transpose(1, 2)
    return {"layers.0.query": torch.where(t["attention_mask"][:, :, None, None] == 0, 7.0, x)}


def times(name, factor):
    return lambda t: {name: t[name] * factor}


def plus(name, number=1.0):
    return lambda t: {name: t[name] + number}


@pytest.mark.parametrize(
    ("change", "with_model", "without"),
    [
        (
            times("layers.0.context", 1.01),
            ["B is wrong", "first wrong: layers.0.context. The last good one is layers.0.probabilities"],
            [" differs"],
        ),
        (
            ignored_mask,
            ["\nlayers.0.probabilities is the scores after the mask and the softmax over the keys"],
            ["first wrong: layers.0.probabilities"],
        ),
        (
            plus(BIAS),
            [f"\n{BIAS} is the backward pass, from the head to the embeddings, as far as cls.predictions.bias"],
            [],
        ),
        (split_otherwise, *[["layers.0.query", "B is A transposed: axes 1 and 2 are exchanged"]] * 2),
        (
            lambda t: {"layers.0.query": t["layers.0.query"].transpose(1, 2) + 1},
            *[["should be 3 3 5 8: exchange axes 1 and 2 of B"]] * 2,
        ),
        (lambda t: {WEIGHT: t[WEIGHT].T}, *[["B is A transposed: axes 0 and 1 are exchanged"]] * 2),
        (lambda t: {"logits": t["logits"][:, :2]}, *[["3 5 131 in A and 3 2 131 in B"]] * 2),
        (times("loss", float("nan")), ["B has NaN or infinity from loss on"], ["NaN or infinity in B"]),
        (plus("embeddings.sum"), ["B is wrong"], [" differs"]),
    ],
)
def test_the_first_wrong_tensor_and_what_is_said_of_it(made, change, with_model, without):
    a, b, ours = made
    b = changed(b, **change(b.tensors))
    for report, words in ((diff(a, b, ours), with_model), (diff(a, b), without)):
        assert not report.ok
        assert all(each in text(report) for each in words), text(report)
        assert "nan" not in text(report) or "NaN" in text(report)
        assert "are these the weights of --model?" not in text(report)
        assert "are not in" not in text(report)  # it has all tensors


def test_both_wrong_alike(made):
    stale = [changed(each, **plus("embeddings.sum")(each.tensors)) for each in made[:2]]
    assert "are these the weights of --model?" in diff(*stale, made[2]).summary[-1]


def test_what_cannot_be_compared_is_said(made):
    a, b, ours = made
    with pytest.raises(ValueError, match=r"input_ids at \(0, 0\) is .* Trace both on the same inputs"):
        diff(a, changed(b, input_ids=(b.tensors["input_ids"] + 1) % 131))
    fewer = changed(b, mine=torch.ones(2))
    del fewer.tensors["layers.0.query"], fewer.tensors["labels"]
    fewer.config = replace(b.config, layer_norm_eps=1e-5)
    for report in (diff(a, fewer), diff(fewer, fewer), diff(a, fewer, ours)):
        assert report.ok
        assert report.rows[-1].name == "logits"
        assert any("loss and gradients are not compared" in note for note in report.notes)
    for words in ("B does not have labels", "B has mine", "layer_norm_eps is 1e-07 in A's config and 1e-05"):
        assert any(words in note.replace("layers.0.query", "labels") for note in report.notes), words
    assert "no difference in 1 tensor;" in diff(a, only(b, "logits")).summary[0]


def test_what_a_tolerance_hides(made):
    a, b, _ = made
    assert "hides small faults" not in diff(a, b).summary[0]
    half = [Trace(each.tensors, each.config, {**each.metadata, "dtype": "bfloat16"}) for each in (a, b)]
    assert "1.9e-01, which hides small faults: --model, or traces in float32, show more" in diff(*half).summary[0]


def test_small_pieces_make_the_same_report(made, monkeypatch):
    a, b, ours = made
    wrong = {name: b.tensors[name].clone() for name in ("layers.0.probabilities", "logits")}
    wrong["layers.0.probabilities"][0, 1, 2, 3] += 1
    wrong["logits"][1, 0, 130] = float("inf")
    whole = diff(a, changed(b, **wrong), ours, everything=True)
    firsts = {row.name: row.first for row in whole.rows if row.first}
    assert firsts == {"layers.0.probabilities": (0, 1, 2, 3), "logits": (1, 0, 130)}
    monkeypatch.setattr(yardstick, "PIECE", 7)
    for row, other in zip(diff(a, changed(b, **wrong), ours, everything=True).rows, whole.rows, strict=True):
        assert (row.max_abs, row.relative, row.verdict) == (other.max_abs, other.relative, other.verdict)
        for one, two in zip(row.errors, other.errors, strict=True):
            assert one == pytest.approx(two, rel=1e-9)


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
