"""FillMask against transformers' fill-mask pipeline, and `minibert fill-mask`."""

import json

import pytest
import torch
from forms import form_or_skip
from small import LONG, LONGEST, VOCAB, assert_same_answers
from transformers import BertTokenizer, FillMaskPipeline

from minibert import BertForMaskedLM, FillMask, load_tokenizer
from minibert.cli import main
from minibert.cli.masks import WORTH_PREPARING
from minibert.inference import prepare_for_inference
from minibert.tokenizer import from_vocabulary


@pytest.fixture(scope="module")
def pipeline(folder, hub_model):
    return FillMaskPipeline(model=hub_model, tokenizer=BertTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    "text",
    [
        "un[MASK]able rain, isn't it!",
        "The [MASK] of [MASK] is paris.",
        "[MASK][MASK] , [MASK] !",
        "the [PAD] rain [SEP] in [MASK]",
        "the [PAD] rain [SEP] [MASK] [MASK]",
        ["the rain in [MASK].", "the [MASK] stays [MASK] in the plain, playing.", "[MASK]"],
    ],
)
def test_answers_are_the_pipelines(fill, pipeline, text):
    targets = ["paris", "Spain", "rain", "##ing", "paris"]
    for options in ({"top_k": 1}, {}, {"top_k": len(VOCAB)}, {"targets": targets}, {"targets": targets, "top_k": 2}):
        assert_same_answers(fill(text, **options), pipeline(text, **options))
        # By the pipeline's names; and as the question of a FillMask that was made for it.
        assert_same_answers(
            fill(inputs=text, batch_size=2, tokenizer_kwargs={"padding": True}, **options), fill(text, **options)
        )
        assert_same_answers(FillMask(fill.model, fill.tokenizer, **options)(text), fill(text, **options))
    if isinstance(text, list):
        assert_same_answers(fill(text), [fill(one) for one in text])


def test_shapes_of_the_answers(fill):
    one, several = "the [MASK]", "[MASK] [MASK] [MASK]"
    assert_same_answers(fill([one]), fill(one))
    assert_same_answers(list(fill.stream([one])), [fill(one)])
    assert [len(rows) for rows in fill([several, one], top_k=4)] == [3, 4]
    assert fill([]) == []
    assert len(fill(one, top_k=10**6)) == len(VOCAB), "no more answers than words"
    assert sum(row["score"] for row in fill(one, top_k=len(VOCAB))) == pytest.approx(1)


def test_a_long_text_is_cut_on_demand_and_no_mask_with_it(fill):
    cut = fill(f"[MASK] {' '.join(LONG.split()[: LONGEST - 3])}")
    assert_same_answers(fill(f"[MASK] {LONG}", truncate=True), cut)
    assert_same_answers(fill(f"[MASK] {LONG}", tokenizer_kwargs={"truncation": True}), cut)
    for text in (f"{LONG} [MASK]", f"[MASK] {LONG} [MASK]"):
        with pytest.raises(ValueError, match=r"1 \[MASK\] in .* would be cut off"):
            fill(text, truncate=True)


@pytest.mark.parametrize(
    ("error", "text", "options", "words"),
    [
        (ValueError, ["a [MASK]", "the rain"], {}, r"no \[MASK\] in 'the rain'"),
        (ValueError, "[MASK]", {"top_k": 0}, "top_k must be at least 1, not 0"),
        (ValueError, "[MASK]", {"targets": []}, "a word or a list of words"),
        (ValueError, "[MASK]", {"targets": ["quark"]}, r"'quark' .* it became \[UNK\]"),
        (ValueError, "[MASK]", {"targets": [" "]}, "it became nothing"),
        (TypeError, 5, {}, "text must be a str, or a list of them, not int 5"),
        (TypeError, ["the [MASK]", 5], {}, "a text must be a str, not int 5"),
        (TypeError, None, {}, r"text once: fill\(text\), or fill\(inputs=text\)"),
        (TypeError, "[MASK]", {"inputs": "[MASK]"}, "text once"),
        (TypeError, "[MASK]", {"tokenizer_kwargs": {"max_length": 5}}, "truncation and padding only, not max_length"),
    ],
)
def test_fill_mask_says_what_is_wrong(fill, error, text, options, words):
    with pytest.raises(error, match=words):
        fill(text, **options)


def test_what_fill_mask_is_made_of(fill):
    with pytest.raises(ValueError, match=r"several texts, not 'the \[MASK\]' alone: put it into a list"):
        next(fill.stream("the [MASK]"))
    with pytest.raises(ValueError, match=f"the tokenizer has {len(VOCAB) + 1} tokens and the model {len(VOCAB)}"):
        FillMask(fill.model, from_vocabulary([*VOCAB, "more"]))
    dropping = BertForMaskedLM(fill.model.config).train()
    with pytest.raises(ValueError, match="training mode"):
        FillMask(dropping, fill.tokenizer)("[MASK]")


@pytest.mark.parametrize("rows", [len(VOCAB) + 3, 64])
def test_rows_without_a_word_are_no_answers(folder, rows):
    """A vocabulary that is filled up to a multiple of 8 or 64, with rows that nobody trained."""
    model = BertForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        model.head.bias[len(VOCAB) :] = 30.0
    fill = FillMask(model, load_tokenizer(folder))
    found = fill("the [MASK] is", top_k=100)
    assert {each["token"] for each in found} == set(range(len(VOCAB)))
    assert fill("the [MASK] is", targets=["rain"])[0]["token"] == VOCAB.index("rain")


def test_probabilities_of_a_model_in_half_precision_are_exact(folder):
    """In bfloat16 each would be rounded by up to a 256th."""
    model = BertForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    scores = [each["score"] for each in FillMask(model, load_tokenizer(folder))("the [MASK] is", top_k=100)]
    assert sum(scores) == pytest.approx(1, abs=1e-6)
    assert torch.tensor(scores).bfloat16().tolist() != scores


# --------------------------------------------------------------------------------------------------------- the command


def test_what_is_printed(run, fill):
    one, several = "the capital of france is [MASK].", "the [MASK] is [MASK]"
    lines = run("fill-mask", one, several).splitlines()
    expected = [one, *(f"{row['score']:.2%} {row['token_str']}" for row in fill(one)), several]
    for number, rows in enumerate(fill(several), start=1):
        expected += [f"[MASK] number {number}", *(f"{row['score']:.2%} {row['token_str']}" for row in rows)]
    assert [" ".join(line.split()) for line in lines] == expected
    results = json.loads(run("fill-mask", one, several, "--top-k", "3", "--json"))
    assert [result["text"] for result in results] == [one, several]
    assert_same_answers([result["answers"] for result in results], fill([one, several], top_k=3))


def test_targets_are_words_with_commas_between(run, fill):
    (result,) = json.loads(run("fill-mask", "the rain in [MASK]", "--targets", "paris, spain,London", "--json"))
    assert_same_answers(result["answers"], fill("the rain in [MASK]", targets=["paris", "spain", "london"]))


def test_texts_from_standard_input(run, fill, given):
    given("paris [MASK]\n\n[MASK] france\n")
    results = json.loads(run("fill-mask", "-", "the [MASK]", "--json"))
    assert [result["text"] for result in results] == ["paris [MASK]", "[MASK] france", "the [MASK]"]
    assert_same_answers(results[1]["answers"], fill("[MASK] france"))


def test_many_texts_take_the_fast_form_and_answer_the_same(run, fill, prepared):
    texts = [f"{'the ' * (number % 5)}[MASK]" for number in range(WORTH_PREPARING)]
    run("fill-mask", *texts[1:], "--json")
    assert not prepared, "for a few texts that would take longer than it saves"
    results = json.loads(run("fill-mask", *texts, "--json"))
    assert_same_answers([result["answers"] for result in results], fill(texts))
    assert prepared == [torch.float32], "on a GPU too: without --dtype the answers are the CPU's"


BUNDLED = "minibert-uncased"
# Of a probability p, as a part of it. float32: rounding. bfloat16 and int8: a logit of order 10 is rounded by up to a
# 200th and a 20th in all, and p follows it as exp does.
FACTOR = {"float32": 1 + 1e-4, "bfloat16": 1.1, "int8": 1.6}


@pytest.mark.parametrize("dtype", FACTOR)
def test_a_dtype_answers_nearly_the_same(dtype, capsys):
    """Also a few texts alone, with targets and several masks. It is that type: its last digits are others."""
    form_or_skip({"float32": "torch", "bfloat16": "bfloat16 torch", "int8": "int8"}[dtype])
    texts = ["The capital of France is [MASK].", "The [MASK] of France is [MASK]."]
    targets = ["paris", "france", "capital", "sand"]
    options = ["--targets", ",".join(targets), "--dtype", dtype, "--json"]
    assert main(["fill-mask", *texts, *options, "--model", BUNDLED]) == 0
    results = [result["answers"] for result in json.loads(capsys.readouterr().out)]
    model, tokenizer = BertForMaskedLM.from_pretrained(BUNDLED), load_tokenizer(BUNDLED)
    for row, plain in zip(results[0][:2], FillMask(model, tokenizer)(texts[0], targets=targets), strict=False):
        assert row["token_str"] == plain["token_str"]
        assert 1 / FACTOR[dtype] < row["score"] / plain["score"] < FACTOR[dtype]
        assert (abs(row["score"] / plain["score"] - 1) > 1e-5) == (dtype != "float32")
    assert [rows[0]["token_str"] for rows in results[1]] == ["capital", "paris"]
    prepared = FillMask(prepare_for_inference(model, getattr(torch, dtype)), tokenizer)
    assert_same_answers(results, prepared(texts, targets=targets))
    # Computed in float32: in bfloat16, each of the 30,522 would be rounded by up to a 256th, and be one of few values.
    scores = [row["score"] for row in prepared(texts[0], top_k=10**6)]
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert scores[0] != torch.tensor(scores[0]).bfloat16().item()


@pytest.mark.parametrize("command", ["fill-mask", "score"])
def test_a_dtype_that_the_processor_has_not_is_one_line(command, fails, folder, monkeypatch):
    monkeypatch.setattr("minibert.inference.prepare.has_bfloat16", lambda: False)
    monkeypatch.setattr("minibert.inference.prepare.has_int8", lambda: False)
    for dtype, said in (("bfloat16", "no instructions for bfloat16"), ("int8", "cannot multiply 8-bit numbers")):
        assert said in fails(command, "the [MASK]", "--dtype", dtype, "--model", str(folder))
    assert "'float16'" in fails(command, "the [MASK]", "--dtype", "float16", "--model", str(folder))
