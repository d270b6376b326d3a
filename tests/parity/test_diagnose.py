"""Faults planted in transformers' own model, by patching it, are found at the right tensor and named."""

import pytest
from planted import KNOWN, SIZES, given_by, no_bias, place_of, port, tanh_gelu
from twins import make_batch, twins

from minibert.parity import diagnose, trace
from minibert.parity.yardstick import Yardstick

ONE_OF_EACH_KIND = (
    "positions off by one",
    "LayerNorm eps 1e-5",
    "pre-LayerNorm",
    "key and value swapped",
    "attention mask added as 0 and 1",
    "decoder untied",
    "dropout left on",
    "log-softmax over the logits",
)


SLOW = [pytest.param(title, marks=pytest.mark.slow) for title in list(KNOWN) if title not in ONE_OF_EACH_KIND]


@pytest.mark.parametrize("title", [*ONE_OF_EACH_KIND, *SLOW])
def test_a_known_fault_is_named(title):
    for sizes in SIZES:
        ours, given = given_by(title, sizes=sizes)
        diagnosis = diagnose(given, ours)
        assert diagnosis.first_wrong == place_of(title)
        assert diagnosis.found == [[title]], "\n".join(diagnosis.lines)


def test_a_pair_and_an_unknown_fault(monkeypatch):
    ours, theirs, batch = port(SIZES[0])
    tanh_gelu(theirs, monkeypatch)
    no_bias(theirs, monkeypatch)
    assert sorted(diagnose(trace(theirs, **batch), ours).found[0]) == ["MLM bias missing", "tanh-GELU"]
    theirs.bert.encoder.layer[0].output.dense.bias.data += 0.1
    diagnosis = diagnose(trace(theirs, **batch), ours)
    assert not diagnosis.found
    assert any("none of the known faults" in line for line in diagnosis.lines)
    assert any(f"look at what computes it: {diagnosis.first_wrong} is " in line for line in diagnosis.lines)


def test_exchanged_axes_are_named_before_any_fault():
    ours, theirs, batch = port(SIZES[1])
    given = trace(theirs, **batch)
    given.tensors["layers.1.key"] = given.tensors["layers.1.key"].transpose(1, 2)
    with pytest.raises(ValueError, match=r"layers\.1\.key is .*: axes 1 and 2 are exchanged"):
        diagnose(given, ours)
    given.tensors["layers.1.key"] = given.tensors["layers.1.key"][:, :, 1:]
    with pytest.raises(ValueError, match=r"No fault is sought") as error:
        diagnose(given, ours)
    assert "exchanged" not in str(error.value)


@pytest.mark.parametrize("mask", ["dense", "right", "left", "holes"])
def test_without_a_fault_the_steps_give_what_the_model_gives(mask):
    ours, theirs = twins(SIZES[1])
    batch = make_batch(SIZES[1], mask, (5, 7), two_segments=True)
    for model in (ours, theirs):
        assert diagnose(trace(model, **batch, grad=True), ours).ok


def test_a_fault_that_leaves_too_much_is_the_nearest_and_no_name(monkeypatch):
    """tanh-GELU, and one logit off by as much as float32 may just do: together no known fault."""
    ours, theirs, batch = port(SIZES[0])
    tanh_gelu(theirs, monkeypatch)
    given = trace(theirs, **batch)
    assert diagnose(given, ours).found == [["tanh-GELU"]]
    measures = Yardstick(ours, given, grad=False).measures()
    measure = next(each for each in measures if each.name == "logits")
    logits = given.tensors["logits"].clone()
    place = tuple(batch["attention_mask"].nonzero()[0].tolist())
    logits[(*place, 0)] += 0.6 * measure.allowed.largest * measure.scale
    given.tensors["logits"] = logits
    diagnosis = diagnose(given, ours)
    assert not diagnosis.found, diagnosis.lines
    assert any("the nearest is tanh-GELU, which is not near enough for a name" in line for line in diagnosis.lines)
