"""The notebook as a function, and `minibert mlm`: losses and guesses are those of transformers."""

import json
import re
from dataclasses import replace

import pytest
import torch
from small import LONG, TEXT, VOCAB

from minibert import BertForMaskedLM, load_tokenizer, mask_tokens
from minibert.mlm import mask_and_guess
from minibert.tokenizer import from_vocabulary


def mlm(run, *arguments):
    return json.loads(run("mlm", *arguments, "--json"))


def require_loss(result, hub_model, labelled):
    """The loss is transformers', with labels at these places, and the mean of those that are shown."""
    labels = [token if place in labelled else -100 for place, token in enumerate(result["ids"])]
    with torch.no_grad():
        expected = hub_model(torch.tensor([result["input_ids"]]), labels=torch.tensor([labels])).loss.item()
    assert result["loss"] == pytest.approx(expected, abs=1e-5)
    shown = [row["loss"] for row in result["scored"] if row["loss"] is not None]
    assert result["loss"] == pytest.approx(sum(shown) / len(labelled), abs=1e-5)
    assert result["count"] == len(labelled)


@pytest.mark.parametrize("score", ["masked", "all"])
@pytest.mark.parametrize("recipe", ["bert", "plain", "whole-word", None])
def test_the_loss_is_transformers(run, hub_model, folder, recipe, score):
    """Over what was chosen, or over all: the notebook masks some positions, and has all the original ids as labels."""
    draw = "--positions 0,9,9,18" if recipe is None else f"--recipe {recipe} --probability 0.5 --seed 1"
    result = mlm(run, TEXT, "--score", score, *draw.split())
    chosen = {row["position"] for row in result["scored"] if row["outcome"] in ("mask", "random", "kept")}
    assert chosen
    require_loss(result, hub_model, range(len(result["ids"])) if score == "all" else chosen)
    if recipe is None:
        ids = load_tokenizer(folder).encode(TEXT).ids
        assert chosen == {0, 9, 18}, "named positions may be [CLS]"
        assert result["ids"] == ids
        assert result["input_ids"] == [4 if place in chosen else token for place, token in enumerate(ids)]


def test_a_row_tells_what_happened_and_what_was_guessed(run, hub_model):
    result = mlm(run, TEXT, "--probability", "0.9", "--seed", "0")
    with torch.no_grad():
        odds = hub_model(torch.tensor([result["input_ids"]])).logits[0].softmax(-1)
    for row in result["scored"]:
        place, seen = row["position"], row["seen"]
        assert row["token"] == result["tokens"][place] == VOCAB[result["ids"][place]]
        assert seen == VOCAB[result["input_ids"][place]]
        assert row["outcome"] != "mask" or seen == "[MASK]"
        assert row["outcome"] != "kept" or seen == row["token"]
        truth = odds[place, result["ids"][place]].item()
        assert row["probability_of_token"] == pytest.approx(truth, abs=1e-6)
        assert row["loss"] == pytest.approx(-torch.log(torch.tensor(truth)).item(), abs=1e-4)
        scores, tokens = odds[place].topk(5)
        assert [guess["token_str"] for guess in row["predictions"]] == [VOCAB[token] for token in tokens]
        assert [guess["score"] for guess in row["predictions"]] == pytest.approx(scores.tolist(), abs=1e-6)
    assert {row["outcome"] for row in result["scored"]} == {"mask", "random", "kept"}, "a seed that shows all three"


def test_what_is_drawn(run):
    """The tokens of mask_tokens with that seed: 15 % by BERT's recipe, and the same ones each time."""
    special = len([word for word in VOCAB if word.startswith("[")])
    for seed, probability in ((0, 0.15), (5, 0.4)):
        options = [] if seed == 0 else ["--seed", str(seed), "--probability", str(probability)]
        result = mlm(run, TEXT, *options)
        ids, sizes = torch.tensor([result["ids"]]), {"vocab_size": len(VOCAB), "mask_token_id": 4}
        draw = torch.Generator().manual_seed(seed)
        expected = mask_tokens(ids, ids < special, **sizes, probability=probability, generator=draw)
        assert result["input_ids"] == expected.input_ids[0].tolist()
    bert, plain = (mlm(run, TEXT, "--probability", "1", "--recipe", recipe) for recipe in ("bert", "plain"))
    last = len(bert["ids"]) - 1
    assert [row["position"] for row in bert["scored"]] == list(range(1, last)), "no special tokens"
    assert plain["input_ids"] == [4] * (last + 1)
    seen = set()
    for seed in range(6):
        result = mlm(run, TEXT, "--recipe", "whole-word", "--probability", "0.5", "--seed", str(seed))
        pieces = {result["tokens"].index(piece) for piece in ("un", "##believ", "##able")}
        seen.add(len(pieces & {row["position"] for row in result["scored"]}))
    assert seen == {0, 3}


def test_probability_0_asks_nothing_and_says_so(run):
    result = mlm(run, TEXT, "--probability", "0")
    assert result["input_ids"] == result["ids"]
    assert (result["loss"], result["count"], result["scored"]) == (0, 0, [])
    assert "--probability" in run("mlm", TEXT, "--probability", "0")


def test_a_table_and_the_best_guess_after_each_layer(run, hub_model):
    typed = [TEXT, "--positions", "2,5", "--layers"]
    result, text = mlm(run, *typed), run("mlm", *typed)
    plain = mlm(run, *typed[:-1])
    assert {**result, "scored": [{**row, "layers": None} for row in result["scored"]]} == plain
    with torch.no_grad():
        states = hub_model(torch.tensor([result["input_ids"]]), output_hidden_states=True).hidden_states
        expected = [hub_model.cls(state)[0].softmax(-1).max(-1) for state in states]  # of each (S,)
    assert " ".join(VOCAB[token] for token in result["input_ids"]) in text
    heading, *rows = [line for line in text.splitlines() if re.match(r" +\d| *position +token", line)]
    assert heading.split() == "position token outcome its guess probability true token loss".split()
    for line, row in zip(rows, result["scored"], strict=True):
        best = row["predictions"][0]
        percents = [f"{p:.1%}" for p in (best["score"], row["probability_of_token"])]
        words = [row["token"], "mask", best["token_str"]]
        assert line.split() == [str(row["position"]), *words, *percents, f"{row['loss']:.3f}"]
        start = text.splitlines().index(f"position {row['position']}, seen as [MASK]: the best guess after")
        for number, (guess, best) in enumerate(zip(row["layers"], expected, strict=True)):
            assert guess["token_str"] == VOCAB[best.indices[row["position"]]]
            assert guess["score"] == pytest.approx(best.values[row["position"]].item(), abs=1e-6)
            shown = text.splitlines()[start + 1 + number].split()
            name = ["layer", str(number)] if number else ["embeddings"]
            assert shown == [*name, guess["token_str"], f"{guess['score']:.1%}"]
    right = sum(row["token"] == row["predictions"][0]["token_str"] for row in result["scored"])
    assert text.endswith(f"loss {result['loss']:.4f} over 2 tokens (masked), {right} guessed right\n")


def test_a_mask_of_the_texts_own_is_guessed_and_has_no_loss(run, fill, hub_model):
    text = "the capital of [MASK] is paris [MASK]"
    result = mlm(run, text)
    assert [row["position"] for row in result["scored"]] == [4, 7]
    for row, answers in zip(result["scored"], fill(text), strict=True):
        assert (row["token"], row["seen"], row["outcome"]) == ("[MASK]", "[MASK]", "in the text")
        assert row["loss"] is row["probability_of_token"] is None
        assert [VOCAB.index(guess["token_str"]) for guess in row["predictions"]] == [one["token"] for one in answers]
    assert (result["loss"], result["count"]) == (0, 0)
    assert run("mlm", text).splitlines()[-1].startswith("no loss: ")
    for options, labelled in (([], {2}), (["--score", "all"], {0, 1, 2, 3, 5, 6, 8})):  # beside one that is named
        result = mlm(run, text, "--positions", "2", *options)
        assert result["input_ids"][2] == result["input_ids"][4] == 4
        require_loss(result, hub_model, labelled)
        assert 4 in [row["position"] for row in result["scored"]]


def test_ids_without_a_word_are_no_answer(folder, fill):
    """A vocabulary that was filled up, as to a multiple of 64: the model is sure of a row that is no token."""
    larger = BertForMaskedLM.from_pretrained(folder)
    larger.resize_token_embeddings(64)
    with torch.no_grad():
        larger.head.bias[len(VOCAB) :] = 50.0
    for seed in range(5):
        result = mask_and_guess(larger, fill.tokenizer, TEXT, probability=0.9, seed=seed, layers=True, top_k=100)
        same = mask_and_guess(fill.model, fill.tokenizer, TEXT, probability=0.9, seed=seed)
        assert result.input_ids == same.input_ids, "a random token is one of the tokenizer's"
        for row in result.scored:
            assert sorted(guess.token_str for guess in row.predictions) == sorted(VOCAB)
            assert {guess.token_str for guess in row.layers} <= set(VOCAB)
    with pytest.raises(ValueError, match=f"{len(VOCAB)} tokens and the model 20"):
        mask_and_guess(BertForMaskedLM(replace(fill.model.config, vocab_size=20)).eval(), fill.tokenizer, TEXT)
    with pytest.raises(ValueError, match="training mode"):
        mask_and_guess(larger.train(), fill.tokenizer, TEXT)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (TEXT, {"score": "some"}, "masked, all, not 'some'"),
        (TEXT, {"recipe": "mine"}, "bert, plain, whole-word, not 'mine'"),
        (TEXT, {"top_k": 0}, "at least 1, not 0"),
        (TEXT, {"positions": [-1]}, "position -1 .* 24 tokens"),
        (f"{LONG} [MASK]", {"truncate": True}, "would be cut off"),
        ("the rain", {"positions": [1], "probability": 0.5}, r"probability 0.5 .* positions"),
        ("the rain", {"positions": [1], "recipe": "plain"}, r"recipe plain .* positions"),
        ("the [MASK]", {"seed": 3}, r"seed 3 .* \[MASK\]"),
    ],
)
def test_arguments_that_do_not_fit(fill, text, options, words):
    with pytest.raises(ValueError, match=words):
        mask_and_guess(fill.model, fill.tokenizer, text, **options)


def test_a_mask_of_another_name(fill):
    """The text may say [MASK] all the same; what the model saw is shown under the tokenizer's own name."""
    words = ["<mask>" if token == "[MASK]" else token for token in VOCAB]
    tokenizer = from_vocabulary(words, {"mask_token": "<mask>"})
    for text in ("the [MASK] is paris", "the <mask> is paris"):
        result = mask_and_guess(fill.model, tokenizer, text)
        assert [row.seen for row in result.scored] == ["<mask>"]
        assert result.scored[0].predictions[0].token_str == fill("the [MASK] is paris")[0]["token_str"]
    assert mask_and_guess(fill.model, tokenizer, TEXT, positions=[2]).input_ids[2] == VOCAB.index("[MASK]")
