"""Texts, models and traces that are unlike the usual ones."""

import json
import re
from dataclasses import replace
from math import exp

import pytest
import torch
from studied import PAIR, SHORT, SIZES, TEXT, VOCABULARY, inputs, pair_of_models, tokenizer

from minibert.study import study, study_trace
from minibert.study.text import percent
from minibert.tokenizer import from_vocabulary
from minibert.trace import TraceFile, trace

VIEWS = ("shares", "guesses", "influence", "looks", "takes", "changes", "cost")
ABOUT_MASKS = {"guesses", "influence"}


def shown(found):
    """The views that are there. Whatever is, can be shown in every way."""
    data = found.to_dict()
    assert found.to_text()
    assert found.to_html() == found.to_html()
    assert set(data["says"]) <= {"answer", "reading", "guesses", "influence", "looks", "changes", "cost"}
    return {view for view in VIEWS if getattr(found, view)}


@pytest.mark.parametrize(
    "sizes",
    [dict(num_attention_heads=1, type_vocab_size=1), dict(num_hidden_layers=24), dict(num_hidden_layers=1)],
    ids=str,
)
def test_models_of_other_sizes(sizes):
    ours, _ = pair_of_models(**sizes)
    found = study(ours, tokenizer(), TEXT)
    assert shown(found) == set(VIEWS)
    assert len(found.guesses[0].steps) == 2 * ours.config.num_hidden_layers + 1


@pytest.mark.parametrize(
    ("text", "absent", "reasons"),
    [
        ("Paris is cold.", ABOUT_MASKS, {"guesses": "no mask", "influence": "no mask"}),
        ("Zyzzyva qwertz", ABOUT_MASKS, {"guesses": "no mask"}),
        ("[MASK] " * 34, {"influence"}, {"influence": "no word"}),
    ],
)
def test_texts_with_less_to_show(model, text, absent, reasons):
    found = study(model, tokenizer(), text)
    assert shown(found) == set(VIEWS) - absent
    for view, reason in reasons.items():
        assert reason in found.left_out[view]
    assert len(found.answers) == text.count("[MASK]")
    assert len(found.guesses) == min(32, len(found.answers))


@pytest.mark.parametrize("text", [TEXT, f"{TEXT} {PAIR}", "Paris is cold.", "[MASK] [MASK]", "paris", "zyzzyva [MASK]"])
def test_every_sentence_says_what_its_numbers_say(model, text):
    found = study(model, tokenizer(), text)
    said = found.to_dict()["says"]
    assert all(re.fullmatch(r"[A-Z“].*\.", sentence) for view in said.values() for sentence in view)
    assert len(said.get("answer", [])) == len(found.answers) == len(found.reading.masks)
    for answer, sentence in zip(found.answers, said.get("answer", []), strict=True):
        best = answer.best[0]
        assert f"“{best.token}”" in sentence
        assert percent(best.probability) in sentence
        assert ("sure of no word" in sentence) == (best.probability < 0.2)
        assert (f"At token {answer.position}: " in sentence) == (len(found.answers) > 1)
    for number, sentence in enumerate(said.get("influence", [])):
        worst = min(word.hidden[number].nats for word in found.influence)
        assert (f"{percent(exp(worst))} of what it was" in sentence) == (worst < 0)
    assert ("little else to look at" in said["looks"][0]) == (found.reading.added.count(False) < 3)


def test_no_name_of_a_special_token_is_taken_for_granted(model):
    names = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
    settings = {f"{usual.strip('[]').lower()}_token": own for usual, own in names.items()}
    other = from_vocabulary([names.get(word, word) for word in VOCABULARY], settings)
    found, usual = study(model, other, TEXT, progress=True), study(model, tokenizer(), TEXT)
    assert (found.reading.ids, found.reading.masks) == (usual.reading.ids, usual.reading.masks)
    assert found.guesses == usual.guesses
    assert {"<s>", "</s>"} <= set(found.looks[0].habits)


def broken_model():
    ours, _ = pair_of_models()
    with torch.no_grad():
        ours.layers[1].feed_forward.output.bias[3] = torch.nan
    return ours


@pytest.mark.parametrize(
    ("model", "texts", "message"),
    [
        (pair_of_models, ("cold \udce9",), "not Unicode"),
        (pair_of_models, ("cold", "cold \ud800"), "not Unicode"),
        (lambda: pair_of_models(type_vocab_size=1), (TEXT, PAIR), "1 segment"),
        (lambda: [pair_of_models(hidden_dropout_prob=0.1)[0].train()], (TEXT,), "training mode"),
        (lambda: [broken_model()], (TEXT,), r"layers\.1\.feed_forward_norm holds numbers that are not finite"),
        (lambda: pair_of_models(vocab_size=50), (TEXT,), "they are not of one checkpoint"),
    ],
)
def test_what_cannot_be_studied(model, texts, message):
    with pytest.raises(ValueError, match=message):
        study(model()[0], tokenizer(), *texts)


def test_a_long_text_is_cut_when_asked(model):
    found = study(model, tokenizer(), "the [MASK] is " + "cold " * 50, "of france", truncate=True)
    assert len(found.reading.ids) == SIZES["max_position_embeddings"]
    assert found.reading.pieces[-3:] == ["of", "france", "[SEP]"]
    assert found.guesses
    with pytest.raises(ValueError, match=r"1 \[MASK\] in .* would be cut off"):
        study(model, tokenizer(), "cold " * 50 + "[MASK]", truncate=True)


def test_a_model_in_half_precision(model):
    ours = pair_of_models()[0].to(torch.bfloat16)
    whole, half = study(model, tokenizer(), TEXT), study(ours, tokenizer(), TEXT)
    assert shown(half) == set(VIEWS)
    for part, values in whole.shares.items():
        assert half.shares[part] == pytest.approx(values, abs=0.02)
    assert half.answers[0].best[0].probability == pytest.approx(whole.answers[0].best[0].probability, rel=0.1)


# --------------------------------------------------------------------------------------------------------------- traces


@pytest.fixture(scope="module")
def recorded(model, found):
    """A trace of two texts: the second is padded, on the left."""
    ids, types = inputs(found.reading).values()
    rows = torch.cat([ids, torch.nn.functional.pad(SHORT, (ids.shape[1] - 5, 0))])
    types = torch.cat([types, torch.zeros_like(ids)])
    mask = torch.ones_like(rows)
    mask[1, :-5] = 0
    return trace(model, rows, mask, types)


def assert_alike(one, other):
    """Two texts with the same words, and nearly the same numbers."""
    number = re.compile(r"-?\d+(?:\.\d+)?(?:e-\d+)?")
    assert number.sub("0", one) == number.sub("0", other)
    numbers = [[float(found) for found in number.findall(text)] for text in (one, other)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-5, rel=1e-4)


def test_a_trace_with_its_model_tells_the_same(model, recorded, found):
    traced = study_trace(recorded, 0, model, tokenizer(), targets=["france", "tea"])
    assert shown(traced) == set(VIEWS) - {"influence"}
    assert "cannot be asked again" in traced.left_out["influence"]
    for view in ("answers", "guesses", "shares", "looks", "takes", "changes", "cost", "targets"):
        assert_alike(*(json.dumps(one.to_dict()[view]) for one in (traced, found)))
    for field in ("ids", "pieces", "segments", "masks", "words", "added"):
        assert getattr(traced.reading, field) == getattr(found.reading, field)


def test_a_padded_row_of_a_trace(model, recorded):
    found = study_trace(recorded, 1, model, tokenizer())
    assert found.reading.pieces == ["[CLS]", "paris", "is", "[MASK]", "[SEP]"]
    start = recorded.tensors["input_ids"].shape[1] - 5
    assert found.reading.positions == list(range(start, start + 5))
    assert "shares" in shown(found)  # the sums are those of these positions
    assert len(found.changes[0].cosine) == found.maps.side == 5


def test_a_trace_alone(model, recorded, tmp_path):
    recorded.save(tmp_path / "t.safetensors")
    found = study_trace(TraceFile(tmp_path / "t.safetensors"), 0)
    assert shown(found) == {"looks", "changes", "cost"}
    assert found.reading.pieces[0] == "#2"
    assert str(tmp_path) not in found.to_html()
    assert all(layer.mixing is None for layer in found.changes)
    assert "give the model" in found.left_out["shares"]
    with pytest.raises(ValueError, match="words can be followed only"):
        study_trace(recorded, 0, targets=["tea"])
    asked = trace(model, SHORT, labels=torch.tensor([[-100, 5, 9, 8, -100]]))
    found = study_trace(asked)
    # It asks where its label is another token.
    assert found.reading.masks == [answer.position for answer in found.answers] == [2, 3]
    less = {name: x for name, x in asked.tensors.items() if name != "logits"}
    assert "#2 #5 […] […] #3\n" in study_trace(replace(asked, tensors=less)).to_text()


@pytest.mark.parametrize(
    ("gone", "absent"),
    [
        ("layers.1.probabilities", {"looks", "takes"}),
        ("layers.1.feed_forward", {"changes"}),
        ("layers.0.value", {"takes"}),
        ("embeddings.norm", {"guesses", "changes"}),
        ("logits", set()),
    ],
)
def test_a_trace_with_less_in_it_shows_less(model, recorded, gone, absent):
    less = replace(recorded, tensors={name: x for name, x in recorded.tensors.items() if name != gone})
    found = study_trace(less, 0, model, tokenizer())
    assert shown(found) == set(VIEWS) - {"influence"} - absent
    assert found.answers


def test_traces_that_are_not_of_these_weights_or_broken(model, recorded):
    with pytest.raises(ValueError, match="the texts 0 to 1, and no text 2"):
        study_trace(recorded, 2)
    broken = replace(recorded, tensors={**recorded.tensors, "layers.0.probabilities": torch.ones(2, 4, 3, 3)})
    with pytest.raises(ValueError, match=r"layers\.0\.probabilities is"):
        study_trace(broken, 0)
    other = replace(recorded, tensors={**recorded.tensors, "embeddings.sum": recorded.tensors["embeddings.sum"] * 2})
    with pytest.raises(ValueError, match="num_hidden_layers is 3, the model's 2"):
        study_trace(recorded, 0, pair_of_models(num_hidden_layers=2)[0], tokenizer())
    assert "not those of this model" in study_trace(other, 0, model, tokenizer()).left_out["shares"]
    zero = {**recorded.tensors, "layers.0.attention_norm": recorded.tensors["layers.0.attention_norm"] * 0}
    found = study_trace(replace(recorded, tensors=zero), 0, model, tokenizer()).to_dict()  # strict JSON: no NaN
    assert "in layers.0 a vector" in found["left_out"]["changes"]
