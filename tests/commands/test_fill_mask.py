"""FillMask against transformers' fill-mask pipeline, and what `minibert fill-mask` prints."""

import json

import pytest
import torch
from small import LONG, LONGEST, VOCAB, assert_same_answers
from transformers import BertTokenizer, FillMaskPipeline

from minibert import BertForMaskedLM, FillMask
from minibert.tokenizer import from_vocabulary


@pytest.fixture(scope="module")
def pipeline(folder, hub_model):
    return FillMaskPipeline(model=hub_model, tokenizer=BertTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    "text",
    [
        "un[MASK]able rain, isn't it!",
        "the [PAD] rain [SEP] in [MASK]",
        "the [PAD] rain [SEP] [MASK] [MASK]",
        ["the rain in [MASK].", "the [MASK] stays [MASK] in the plain, playing.", "[MASK]"],
    ],
)
def test_answers_are_the_pipelines(fill, pipeline, text):
    targets = ["paris", "Spain", "rain", "##ing", "paris"]
    for options in ({"top_k": 1}, {}, {"top_k": len(VOCAB)}, {"targets": targets}, {"targets": targets, "top_k": 2}):
        found = fill(text, **options)
        assert_same_answers(found, pipeline(text, **options))
        # By the pipeline's names; and as the question of a FillMask that was made for it.
        assert_same_answers(fill(inputs=text, batch_size=2, tokenizer_kwargs={"padding": True}, **options), found)
        assert_same_answers(FillMask(fill.model, fill.tokenizer, **options)(text), found)


def test_shapes_of_the_answers(fill):
    one, several = "the [MASK]", "[MASK] [MASK] [MASK]"
    assert_same_answers(fill([one]), fill(one))
    assert_same_answers(list(fill.stream([one])), [fill(one)])
    assert [len(rows) for rows in fill([several, one], top_k=4)] == [3, 4]
    assert fill([]) == []
    assert len(fill(one, top_k=10**6)) == len(VOCAB), "no more answers than words"


def test_a_long_text_is_cut_on_demand_and_no_mask_with_it(fill):
    cut = fill(f"[MASK] {' '.join(LONG.split()[: LONGEST - 3])}")
    for options in ({"truncate": True}, {"tokenizer_kwargs": {"truncation": True}}):
        assert_same_answers(fill(f"[MASK] {LONG}", **options), cut)
    with pytest.raises(ValueError, match=r"1 \[MASK\] in .* would be cut off"):
        fill(f"[MASK] {LONG} [MASK]", truncate=True)


@pytest.mark.parametrize(
    ("error", "text", "options", "words"),
    [
        (ValueError, ["a [MASK]", "the rain"], {}, r"no \[MASK\] in 'the rain'"),
        (ValueError, "[MASK]", {"top_k": 0}, "at least 1, not 0"),
        (ValueError, "[MASK]", {"targets": []}, "a list of words"),
        (ValueError, "[MASK]", {"targets": ["quark"]}, r"'quark' .* \[UNK\]"),
        (ValueError, "[MASK]", {"targets": [" "]}, "nothing"),
        (TypeError, ["the [MASK]", 5], {}, "str, not int 5"),
        (TypeError, 5, {}, "str, or a list of them, not int 5"),
        (TypeError, None, {}, r"fill\(text\), or fill\(inputs=text\)"),
        (TypeError, "[MASK]", {"inputs": "[MASK]"}, r"fill\(text\), or fill\(inputs=text\)"),
        (TypeError, "[MASK]", {"tokenizer_kwargs": {"max_length": 5}}, "truncation and padding only, not max_length"),
    ],
)
def test_what_is_refused(fill, error, text, options, words):
    with pytest.raises(error, match=words):
        fill(text, **options)


def test_what_it_is_made_of(fill):
    with pytest.raises(ValueError, match=r"not 'the \[MASK\]' alone: put it into a list"):
        next(fill.stream("the [MASK]"))
    with pytest.raises(ValueError, match=f"{len(VOCAB) + 1} tokens and the model {len(VOCAB)}"):
        FillMask(fill.model, from_vocabulary([*VOCAB, "more"]))
    with pytest.raises(ValueError, match="training mode"):
        FillMask(BertForMaskedLM(fill.model.config).train(), fill.tokenizer)("[MASK]")


def test_rows_without_a_word_are_no_answers(folder, fill):
    """A vocabulary that is filled up to a multiple of 64, with rows that nobody trained."""
    model = BertForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(64)
    with torch.no_grad():
        model.head.bias[len(VOCAB) :] = 30.0
    larger = FillMask(model, fill.tokenizer)
    assert {each["token"] for each in larger("the [MASK] is", top_k=100)} == set(range(len(VOCAB)))
    assert larger("the [MASK] is", targets=["rain"])[0]["token"] == VOCAB.index("rain")


def test_probabilities_of_a_model_in_half_precision_are_exact(folder, fill):
    """In bfloat16 each would be rounded by up to a 256th."""
    model = BertForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    scores = [each["score"] for each in FillMask(model, fill.tokenizer)("the [MASK] is", top_k=100)]
    assert sum(scores) == pytest.approx(1, abs=1e-6)
    assert torch.tensor(scores).bfloat16().tolist() != scores


def test_what_is_printed(run, fill):
    one, several = "the capital of france is [MASK].", "the [MASK] is [MASK]"
    lines = run("fill-mask", one, several).splitlines()
    expected = [one, *(f"{row['score']:.2%} {row['token_str']}" for row in fill(one)), several]
    for number, rows in enumerate(fill(several), start=1):
        expected += [f"[MASK] number {number}", *(f"{row['score']:.2%} {row['token_str']}" for row in rows)]
    assert [" ".join(line.split()) for line in lines] == expected
    results = json.loads(run("fill-mask", one, several, "--targets", "paris, spain,London", "--json"))
    assert [result["text"] for result in results] == [one, several]
    answers = fill([one, several], targets=["paris", "spain", "london"])
    assert_same_answers([result["answers"] for result in results], answers)
