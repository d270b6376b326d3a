"""FillMask against transformers' fill-mask pipeline, and `minibert fill-mask`."""

import io
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


@pytest.mark.parametrize("top_k", [1, 5, len(VOCAB)])
@pytest.mark.parametrize(
    "text",
    [
        "the capital of france is [MASK].",
        "[MASK]",
        "un[MASK]able rain, isn't it!",
        "The [MASK] of [MASK] is paris.",
        "[MASK][MASK] , [MASK] !",
        "the [PAD] rain [SEP] in [MASK]",
        "the [PAD] rain [SEP] [MASK] [MASK]",
    ],
)
def test_answers_are_the_pipelines(fill, pipeline, text, top_k):
    assert_same_answers(fill(text, top_k=top_k), pipeline(text, top_k=top_k))


def test_a_list_of_texts_is_the_pipelines(fill, pipeline):
    texts = ["the rain in [MASK].", "the [MASK] stays [MASK] in the plain, playing.", "[MASK]"]
    assert_same_answers(fill(texts), pipeline(texts))
    assert_same_answers(fill(texts), [fill(text) for text in texts])


@pytest.mark.parametrize("text", ["the rain in [MASK].", "the [MASK] in [MASK]."])
@pytest.mark.parametrize("top_k", [2, 5])
def test_targets_are_the_pipelines(fill, pipeline, text, top_k):
    targets = ["paris", "Spain", "rain", "##ing", "paris"]
    assert_same_answers(fill(text, targets=targets, top_k=top_k), pipeline(text, targets=targets, top_k=top_k))


def test_shapes_of_the_answers(fill):
    one, several = "the [MASK]", "[MASK] [MASK] [MASK]"
    assert [row["token_str"] for row in fill(one, top_k=2)] == [row["token_str"] for row in fill([one], top_k=2)]
    assert [len(rows) for rows in fill(several, top_k=2)] == [2, 2, 2]
    assert [len(rows) for rows in fill([several, one], top_k=4)] == [3, 4]
    assert fill([]) == []
    assert len(fill(one, top_k=10**6)) == len(VOCAB), "no more answers than words"
    assert sum(row["score"] for row in fill(one, top_k=len(VOCAB))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("the rain", {}, r"no \[MASK\] in 'the rain'"),
        ("", {}, r"no \[MASK\] in ''"),
        (["a [MASK]", "the rain"], {}, r"no \[MASK\] in 'the rain'"),
        ("[MASK]", {"top_k": 0}, "top_k must be at least 1, not 0"),
        ("[MASK]", {"targets": []}, "a word or a list of words"),
        ("[MASK]", {"targets": ["unbelievable"]}, "'unbelievable' .* it became un ##believ ##able"),
        ("[MASK]", {"targets": ["quark"]}, r"'quark' .* it became \[UNK\]"),
        ("[MASK]", {"targets": [" "]}, "it became nothing"),
        (f"{LONG} [MASK]", {}, f"123 tokens long and the model takes {LONGEST}"),
    ],
)
def test_fill_mask_says_what_is_wrong(fill, text, options, words):
    with pytest.raises(ValueError, match=words):
        fill(text, **options)


def test_what_is_no_text_gets_a_sentence(fill):
    with pytest.raises(TypeError, match="text must be a str, or a list of them, not int 5"):
        fill(5)
    with pytest.raises(TypeError, match="a text must be a str, not int 5"):
        fill(["the [MASK]", 5])
    with pytest.raises(ValueError, match=r"several texts, not 'the \[MASK\]' alone: put it into a list"):
        next(fill.stream("the [MASK]"))


def test_a_mask_beyond_the_cut_is_an_error_that_says_so(fill):
    with pytest.raises(ValueError, match=r"\[MASK\].*(cut|truncat)"):
        fill(f"{LONG} [MASK]", truncate=True)


def test_a_tokenizer_of_another_model_is_refused(fill):
    with pytest.raises(ValueError, match=f"the tokenizer has {len(VOCAB) + 1} tokens and the model {len(VOCAB)}"):
        FillMask(fill.model, from_vocabulary([*VOCAB, "more"]))


def test_fill_mask_prints_text_and_answers(run, fill):
    text = "the capital of france is [MASK]."
    lines = run("fill-mask", text).splitlines()
    assert lines[0] == text
    answers = fill(text)
    assert [line.split() for line in lines[1:]] == [[f"{row['score']:.2%}", row["token_str"]] for row in answers]
    assert len(lines) == 6


def test_fill_mask_numbers_several_masks(run):
    lines = run("fill-mask", "the [MASK] is [MASK]", "[MASK] !", "--top-k", "2").splitlines()
    assert [line.strip() for line in lines if "number" in line] == ["[MASK] number 1", "[MASK] number 2"]
    assert lines[0] == "the [MASK] is [MASK]"
    assert lines[7] == "[MASK] !"
    assert len(lines) == 1 + 2 * 3 + 1 + 2


def test_fill_mask_json(run, fill):
    texts = ["the [MASK] is [MASK]", "[MASK] !"]
    result = json.loads(run("fill-mask", *texts, "--top-k", "3", "--json"))
    assert [one["text"] for one in result] == texts
    assert_same_answers([one["answers"] for one in result], fill(texts, top_k=3))


def test_fill_mask_targets(run):
    result = json.loads(run("fill-mask", "the rain in [MASK]", "--targets", "paris, spain,London", "--json"))
    answers = result[0]["answers"]
    assert sorted(row["token_str"] for row in answers) == ["london", "paris", "spain"]
    assert [row["score"] for row in answers] == sorted((row["score"] for row in answers), reverse=True)


def test_fill_mask_truncates_on_demand(run, fill):
    text = f"[MASK] {LONG}"
    result = json.loads(run("fill-mask", text, "--truncate", "--json"))
    cut = f"[MASK] {' '.join(LONG.split()[: LONGEST - 3])}"
    assert_same_answers(result[0]["answers"], fill(cut))


def test_some_of_the_masks_beyond_the_cut_are_an_error_too(fill):
    with pytest.raises(ValueError, match=r"1 \[MASK\] in .* would be cut off"):
        fill(f"[MASK] {LONG} [MASK]", truncate=True)


def test_texts_from_standard_input(run, fill, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("paris [MASK]\n\n[MASK] france\n"))
    results = json.loads(run("fill-mask", "-", "the [MASK]", "--json"))
    assert [result["text"] for result in results] == ["paris [MASK]", "[MASK] france", "the [MASK]"]
    assert results[1]["answers"][0]["token"] == fill("[MASK] france")[0]["token"]


def test_nothing_on_standard_input(fails, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no line" in fails("fill-mask", "-", "--model", str(folder))


def test_many_texts_take_the_fast_form_and_answer_the_same(run, fill, monkeypatch):
    prepared = []

    def prepare(model, dtype):
        prepared.append(dtype)
        return prepare_for_inference(model, dtype)

    monkeypatch.setattr("minibert.inference.prepare_for_inference", prepare)
    texts = [f"{'the ' * (number % 5)}[MASK]" for number in range(WORTH_PREPARING)]
    run("fill-mask", *texts[1:], "--json")
    assert not prepared, "for a few texts that would take longer than it saves"
    results = json.loads(run("fill-mask", *texts, "--json"))
    for text, result in zip(texts, results, strict=True):
        expected = fill(text)
        assert [row["token"] for row in result["answers"]] == [row["token"] for row in expected]
        assert result["answers"][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-6)
    assert prepared == [torch.float32], "on a GPU too: without --dtype the answers are the CPU's"


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


# ----------------------------------------------------------------------------------------------- --dtype, real answers

BUNDLED = "minibert-uncased"
QUESTION = "The capital of France is [MASK]."
# Of a probability p, as a part of it. float32: rounding. bfloat16 and int8: a logit of order 10 is rounded by up to a
# 200th and a 20th in all, and p follows it as exp does.
FACTOR = {"float32": 1 + 1e-4, "bfloat16": 1.1, "int8": 1.6}


def needs(dtype):
    """Skip the test where this CPU does not have the type."""
    form_or_skip({"float32": "torch", "bfloat16": "bfloat16 torch", "int8": "int8"}[dtype])


def ask(capsys, *arguments):
    assert main(["fill-mask", *arguments, "--json", "--model", BUNDLED]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize("dtype", FACTOR)
def test_a_dtype_answers_nearly_the_same(capsys, dtype):
    """Also one text alone, and it is that type: the last digits are others than those of float32."""
    needs(dtype)
    (plain,) = ask(capsys, QUESTION, "--top-k", "3")
    (result,) = ask(capsys, QUESTION, "--top-k", "100000", "--dtype", dtype)
    answers = result["answers"]
    assert [row["token_str"] for row in answers[:2]] == ["paris", "france"]
    for row, expected in zip(answers[:2], plain["answers"], strict=False):
        assert 1 / FACTOR[dtype] < row["score"] / expected["score"] < FACTOR[dtype]
        assert (abs(row["score"] / expected["score"] - 1) > 1e-5) == (dtype != "float32")
    # Computed in float32: in bfloat16, each of the 30,522 would be rounded by up to a 256th, and be one of few values.
    assert sum(row["score"] for row in answers) == pytest.approx(1, abs=1e-5)
    assert answers[0]["score"] != torch.tensor(answers[0]["score"]).bfloat16().item()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_dtype_goes_with_targets_and_several_masks(capsys, dtype):
    needs(dtype)
    texts = ["She drank a cup of [MASK] before breakfast.", "The [MASK] of France is [MASK]."]
    targets = ["tea", "coffee", "sand", "paris", "capital"]
    results = ask(capsys, *texts, "--targets", ",".join(targets), "--dtype", dtype)
    assert results[0]["answers"][0]["token_str"] in ("tea", "coffee")
    assert [rows[0]["token_str"] for rows in results[1]["answers"]] == ["capital", "paris"]
    model = prepare_for_inference(BertForMaskedLM.from_pretrained(BUNDLED), getattr(torch, dtype))
    expected = FillMask(model, load_tokenizer(BUNDLED))(texts, targets=targets)
    assert_same_answers([result["answers"] for result in results], expected)


@pytest.mark.parametrize("command", ["fill-mask", "score"])
def test_a_dtype_that_the_processor_has_not_is_one_line(command, fails, folder, monkeypatch):
    monkeypatch.setattr("minibert.inference.prepare.has_bfloat16", lambda: False)
    monkeypatch.setattr("minibert.inference.prepare.has_int8", lambda: False)
    for dtype, said in (("bfloat16", "no instructions for bfloat16"), ("int8", "cannot multiply 8-bit numbers")):
        assert said in fails(command, "the [MASK]", "--dtype", dtype, "--model", str(folder))
    assert "'float16'" in fails(command, "the [MASK]", "--dtype", "float16", "--model", str(folder))
