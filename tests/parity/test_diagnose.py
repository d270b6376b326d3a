"""`diagnose`: known faults are named, at the right tensor; other faults are described truly, and never given a name."""

import pytest
import torch
from numpy_port import NumpyBert
from planted import KNOWN, PLANTED, SIZES, given_by, norms, only, place_of, planted, port
from strange import STRANGE
from torch import nn
from twins import make_batch, twins

from minibert.parity import TraceFile, diagnose, diff, trace
from minibert.parity.yardstick import Yardstick
from minibert.trace import standard_inputs

ONE_OF_EACH_KIND = ("positions off by one", "LayerNorm eps 1e-5", "pre-LayerNorm", "decoder untied", "dropout left on")


def strange(title, dtype=torch.float32, sizes=SIZES[1]):
    """Our model, and the trace of transformers' with a fault outside the catalogue."""
    ours, theirs, _ = port(sizes)
    return ours.to(dtype), planted(STRANGE[title], theirs.to(dtype), standard_inputs(ours.config))


def said_of(given, model):
    return "\n".join(diagnose(given, model).lines)


@pytest.mark.parametrize("title", ONE_OF_EACH_KIND)
def test_a_known_fault_is_named(title):
    """test_counts.py tries all of them."""
    for sizes in SIZES:
        ours, given = given_by(title, sizes=sizes)
        diagnosis = diagnose(given, ours)
        assert diagnosis.first_wrong == place_of(title)
        assert diagnosis.found == [[title]], "\n".join(diagnosis.lines)


@pytest.mark.slow
@pytest.mark.parametrize("title", STRANGE)
def test_a_strange_fault_is_not_named_from_logits_in_bfloat16(title):
    ours, given = strange(title, torch.bfloat16, SIZES[0])
    diagnosis = diagnose(only(given, "logits"), ours)
    assert not diagnosis.found, "\n".join(diagnosis.lines)


@pytest.mark.parametrize(
    ("title", "place"), [("query bias missing", "layers.0.query"), ("row 0's types for all", "embeddings.sum")]
)
def test_the_right_tensor_in_bfloat16(title, place):
    """Small errors everywhere, which no single entry shows."""
    ours, given = strange(title, torch.bfloat16)
    assert diagnose(given, ours).first_wrong == place


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("scores scaled twice", ["it is 0.35 times the right values, everywhere"]),
        ("query bias missing", ["bert.encoder.layer.0.attention.self.query.bias is missing"]),
        ("no activation in the encoder", ["it equals layers.0.intermediate: the activation is missing"]),
        ("logits of the last words are 0", ["only in words 90 to 98 of 99"]),
        ("row 0's mask for all", ["only in rows 2, 3 of 4", "only in keys 14, 15 of 16"]),
        (
            "first layer for all",
            [
                "the first wrong tensor is layers.1.query ",
                f"none of the known faults, alone, in one place or in pairs: {len(KNOWN)} were tried",
                "look at what computes it: layers.1.query is the query projection",
            ],
        ),
    ],
)
def test_what_is_said_of_an_unknown_fault(title, words):
    ours, given = strange(title)
    diagnosis = diagnose(given, ours)
    assert (diagnosis.ok, diagnosis.found) == (False, [])
    for each in words:
        assert each in "\n".join(diagnosis.lines), diagnosis.lines
    if title == "query bias missing":  # diff says it too
        right = trace(ours, **standard_inputs(ours.config))
        said = "\n".join(diff(right, given, ours).lines())
        assert "B: bert.encoder.layer.0.attention.self.query.bias is missing" in said
        assert "A: " not in said
        assert "B beside A: the same vector is added at every token: a bias" in "\n".join(diff(right, given).lines())


def test_a_pair_and_one_fault_too_many():
    ours, theirs, batch = port(SIZES[0])
    PLANTED["tanh-GELU"](theirs, None)
    PLANTED["MLM bias missing"](theirs, None)
    assert sorted(diagnose(trace(theirs, **batch), ours).found[0]) == ["MLM bias missing", "tanh-GELU"]
    theirs.bert.encoder.layer[0].output.dense.bias.data += 0.1
    assert not diagnose(trace(theirs, **batch), ours).found


def test_a_fault_that_leaves_too_much_is_the_nearest_and_no_name():
    """tanh-GELU, and one logit off by as much as float32 may just do: together no known fault."""
    ours, theirs, batch = port(SIZES[0])
    given = planted(PLANTED["tanh-GELU"], theirs, batch)
    assert diagnose(given, ours).found == [["tanh-GELU"]]
    measure = next(each for each in Yardstick(ours, given, grad=False).measures() if each.name == "logits")
    given.tensors["logits"] = given.tensors["logits"].clone()
    place = tuple(batch["attention_mask"].nonzero()[0].tolist())
    given.tensors["logits"][(*place, 0)] += 0.6 * measure.limits.largest
    diagnosis = diagnose(given, ours)
    assert not diagnosis.found, diagnosis.lines
    assert any("the nearest is tanh-GELU, which is not near enough for a name" in line for line in diagnosis.lines)


def tanh_in_the_encoder(theirs):
    PLANTED["tanh-GELU"](theirs, None)
    theirs.cls.predictions.transform.transform_act_fn = nn.GELU()


def tanh_in_layer_1(theirs):
    tanh_in_the_encoder(theirs)
    theirs.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.GELU()


def eps(norm, value):
    return lambda theirs: setattr(norms(theirs)[norm], "eps", value)


@pytest.mark.parametrize(
    ("plant", "found", "words"),
    [
        (tanh_in_the_encoder, "tanh-GELU, in the encoder alone", ""),
        (tanh_in_layer_1, "tanh-GELU, in layer 1 alone", ""),
        # and no second name for it
        (eps(-1, 1e-5), "LayerNorm eps 1e-5, in the head alone", "LayerNorm eps fits 1.0e-05 here"),
        # estimated
        (eps(2, 3e-4), "LayerNorm eps 3.0e-04, at layers.0.feed_forward_norm alone", "LayerNorm eps fits 3.0e-04 here"),
    ],
)
def test_a_fault_in_one_place_is_named_with_the_place(plant, found, words):
    ours, theirs, _ = port()
    plant(theirs)
    diagnosis = diagnose(trace(theirs, **standard_inputs(ours.config)), ours)
    assert diagnosis.found == [[found]], diagnosis.lines
    assert words in "\n".join(diagnosis.lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_what_it_hides(dtype):
    ours, theirs = twins(SIZES[1], dtype=dtype)
    given = trace(theirs, **standard_inputs(ours.config))
    for said in (said_of(given, ours), "\n".join(diff(given, given, ours).lines())):
        assert "would hide these faults, in this model and on these inputs: " in said
        assert "LayerNorm eps 1e-6" in said
        assert "MLM bias missing" not in said
        assert "repeat it in float32 to be sure" in said


def test_exchanged_axes_are_named_before_any_fault():
    ours, theirs, batch = port()
    given = trace(theirs, **batch)
    key = given.tensors["layers.1.key"].transpose(1, 2)
    for wrong, words in ((key, r"axes 1 and 2 are exchanged"), (key[:, :, 1:], r"this model's is \(5, 3, 7, 8\)\. No")):
        given.tensors["layers.1.key"] = wrong
        with pytest.raises(ValueError, match=rf"layers\.1\.key is .*{words}"):
            diagnose(given, ours)


def test_without_a_fault_the_steps_give_what_the_models_give():
    for mask in ("dense", "holes"):
        models = twins(SIZES[1])
        batch = make_batch(SIZES[1], mask, (5, 7), two_segments=True)
        for model in models:
            diagnosis = diagnose(trace(model, **batch, grad=True), models[0])
            assert diagnosis.ok
            assert "hide" not in "\n".join(diagnosis.lines)


@pytest.mark.parametrize(
    ("quirks", "place", "found"),
    [
        (dict(merged_heads=False), None, []),
        # a port in jax, whose gelu is the tanh form
        (dict(tanh=True, merged_heads=False), "layers.0.feed_forward_norm", [["tanh-GELU"]]),
        # keras-hub#642: Keras' own eps in the layers, BERT's in the embeddings and in the head
        (dict(eps=1e-5), "layers.0.feed_forward_norm", [["LayerNorm eps 1e-5, in the layers alone"]]),
        # codertimo/BERT-pytorch: torch's std in LayerNorm, which comes before each block
        (dict(sample_std=True, pre_norm=True), "embeddings.norm", [["LayerNorm divides by n - 1", "pre-LayerNorm"]]),
    ],
    ids=["right", "jax", "keras", "codertimo"],
)
def test_a_port_in_numpy(tmp_path, quirks, place, found):
    """It has nothing to do with us or transformers, writes a .npz, and is right, or has the quirks of public ones."""
    ours, _ = twins(SIZES[1])
    inputs = standard_inputs(ours.config)
    NumpyBert(ours, **quirks).write(tmp_path / "theirs.npz", inputs)
    theirs = TraceFile(tmp_path / "theirs.npz")
    diagnosis = diagnose(theirs, ours)
    assert (diagnosis.first_wrong, [sorted(each) for each in diagnosis.found]) == (place, found), diagnosis.lines
    report = diff(trace(ours, **inputs), theirs, None if not found else ours, everything=True)
    assert report.ok == (not found), "\n".join(report.lines())
    assert {"layers.1.query", "logits"} <= {row.name for row in report.rows}
