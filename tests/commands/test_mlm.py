"""The notebook as a function, and `minibert mlm`: losses and guesses are those of transformers."""

import json
import re
from dataclasses import replace

import pytest
import torch
from small import LONG, LONGEST, TEXT, VOCAB

from minibert import BertForMaskedLM, load_tokenizer, mask_tokens
from minibert.cli import main
from minibert.mlm import mask_and_guess
from minibert.tokenizer import from_vocabulary


def mlm(run, *arguments):
    return json.loads(run("mlm", *arguments, "--json"))


def hub_loss(hub_model, input_ids, labels):
    with torch.no_grad():
        return hub_model(torch.tensor([input_ids]), labels=torch.tensor([labels])).loss.item()


def test_the_notebooks_loss_scores_every_position(run, hub_model, folder):
    """Some positions replaced by [MASK], and all the original ids as labels."""
    text = f"{TEXT} {TEXT}"
    result = mlm(run, text, "--positions", "9,18,34", "--score", "all")
    ids = load_tokenizer(folder).encode(text).ids
    masked = [4 if place in (9, 18, 34) else token for place, token in enumerate(ids)]
    assert result["ids"] == ids
    assert result["input_ids"] == masked
    assert result["count"] == len(result["scored"]) == len(ids)
    assert result["loss"] == pytest.approx(hub_loss(hub_model, masked, ids), abs=1e-5)
    assert [row["position"] for row in result["scored"] if row["outcome"] == "mask"] == [9, 18, 34]


def test_positions_score_the_masked_ones(run, hub_model):
    result = mlm(run, TEXT, "--positions", "0,3,3,21")
    labels = [token if place in (0, 3, 21) else -100 for place, token in enumerate(result["ids"])]
    assert result["count"] == 3
    assert result["loss"] == pytest.approx(hub_loss(hub_model, result["input_ids"], labels), abs=1e-5)
    assert result["input_ids"][0] == 4, "named positions may be [CLS]"


@pytest.mark.parametrize("score", ["masked", "all"])
@pytest.mark.parametrize("recipe", ["bert", "plain", "whole-word"])
def test_every_recipes_loss_is_transformers(run, hub_model, recipe, score):
    for seed in range(3):
        result = mlm(run, TEXT, "--recipe", recipe, "--score", score, "--seed", str(seed), "--probability", "0.5")
        chosen = {row["position"] for row in result["scored"] if row["outcome"] in ("mask", "random", "kept")}
        assert chosen
        labels = [token if score == "all" or place in chosen else -100 for place, token in enumerate(result["ids"])]
        assert result["loss"] == pytest.approx(hub_loss(hub_model, result["input_ids"], labels), abs=1e-5)
        assert result["count"] == sum(label != -100 for label in labels) == len(result["scored"])
        mean = sum(row["loss"] for row in result["scored"]) / result["count"]
        assert result["loss"] == pytest.approx(mean, abs=1e-5)


def test_a_row_tells_what_happened_and_what_was_guessed(run, hub_model):
    result = mlm(run, TEXT, "--probability", "0.9", "--seed", "0")
    with torch.no_grad():
        odds = hub_model(torch.tensor([result["input_ids"]])).logits[0].softmax(-1)
    for row in result["scored"]:
        place, seen = row["position"], row["seen"]
        assert row["token"] == result["tokens"][place] == VOCAB[result["ids"][place]]
        assert seen == VOCAB[result["input_ids"][place]]
        assert row["outcome"] in ("mask", "random", "kept")
        assert row["outcome"] != "mask" or seen == "[MASK]"
        assert row["outcome"] != "kept" or seen == row["token"]
        truth = odds[place, result["ids"][place]].item()
        assert row["probability_of_token"] == pytest.approx(truth, abs=1e-6)
        assert row["loss"] == pytest.approx(-torch.log(torch.tensor(truth)).item(), abs=1e-4)
        scores, tokens = odds[place].topk(5)
        assert [guess["token_str"] for guess in row["predictions"]] == [VOCAB[token] for token in tokens]
        assert [guess["score"] for guess in row["predictions"]] == pytest.approx(scores.tolist(), abs=1e-6)
    assert len({row["outcome"] for row in result["scored"]}) == 3, "a seed that shows all three"


def test_a_seed_gives_the_masks_of_mask_tokens(run):
    for seed in (0, 5):
        result = mlm(run, TEXT, "--seed", str(seed), "--probability", "0.4")
        ids = torch.tensor([result["ids"]])
        expected = mask_tokens(
            ids,
            ids < 5,
            vocab_size=len(VOCAB),
            mask_token_id=4,
            probability=0.4,
            generator=torch.Generator().manual_seed(seed),
        )
        assert result["input_ids"] == expected.input_ids[0].tolist()


def test_the_same_command_gives_the_same_answer(run):
    assert run("mlm", TEXT) == run("mlm", TEXT) == run("mlm", TEXT, "--seed", "0", "--recipe", "bert")
    assert run("mlm", TEXT, "--seed", "1") != run("mlm", TEXT, "--seed", "2")


def test_bert_never_masks_special_tokens_and_plain_does(run):
    bert = mlm(run, TEXT, "--probability", "1")
    last = len(bert["ids"]) - 1
    assert [row["position"] for row in bert["scored"]] == list(range(1, last))
    assert (bert["input_ids"][0], bert["input_ids"][last]) == (2, 3)
    plain = mlm(run, TEXT, "--probability", "1", "--recipe", "plain")
    assert plain["input_ids"] == [4] * (last + 1)
    assert plain["count"] == last + 1


def test_whole_word_takes_all_pieces_of_a_word(run):
    seen = set()
    for seed in range(12):
        result = mlm(run, TEXT, "--recipe", "whole-word", "--probability", "0.5", "--seed", str(seed))
        pieces = {result["tokens"].index(piece) for piece in ("un", "##believ", "##able")}
        chosen = pieces & {row["position"] for row in result["scored"]}
        assert chosen in (set(), pieces)
        seen.add(len(chosen))
    assert seen == {0, 3}


def test_probability_0_asks_nothing_and_says_so(run, hub_model):
    result = mlm(run, TEXT, "--probability", "0")
    assert result["input_ids"] == result["ids"]
    assert (result["loss"], result["count"], result["scored"]) == (0, 0, [])
    assert "no token was chosen" in run("mlm", TEXT, "--probability", "0")
    everything = mlm(run, TEXT, "--probability", "0", "--score", "all")
    assert everything["loss"] == pytest.approx(hub_loss(hub_model, everything["ids"], everything["ids"]), abs=1e-5)


def test_mlm_prints_a_table(run):
    result = mlm(run, TEXT, "--positions", "2,5")
    text = run("mlm", TEXT, "--positions", "2,5")
    assert " ".join(VOCAB[token] for token in result["input_ids"]) in text
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d", line)]
    assert [row[:3] for row in rows] == [["2", "capital", "mask"], ["5", "is", "mask"]]
    assert [row[-1] for row in rows] == [f"{row['loss']:.3f}" for row in result["scored"]]
    right = sum(row["token"] == row["predictions"][0]["token_str"] for row in result["scored"])
    assert text.endswith(f"loss {result['loss']:.4f} over 2 tokens (masked), {right} guessed right\n")


def test_mlm_truncates_on_demand(run):
    result = mlm(run, LONG, "--truncate")
    assert len(result["ids"]) == LONGEST
    assert result["tokens"][-1] == "[SEP]"


def test_a_mask_of_the_texts_own_is_guessed_and_has_no_loss(run, fill):
    text = "the capital of [MASK] is paris [MASK]"
    result = mlm(run, text)
    assert [row["position"] for row in result["scored"]] == [4, 7]
    for row, answers in zip(result["scored"], fill(text), strict=True):
        assert (row["token"], row["seen"], row["outcome"]) == ("[MASK]", "[MASK]", "in the text")
        assert row["loss"] is row["probability_of_token"] is None
        assert [VOCAB.index(guess["token_str"]) for guess in row["predictions"]] == [one["token"] for one in answers]
    assert (result["loss"], result["count"]) == (0, 0)
    assert run("mlm", text).splitlines()[-1].startswith("no loss: ")


def test_a_mask_of_the_texts_own_beside_named_ones(run, hub_model):
    for options in (["--positions", "2"], ["--positions", "2", "--score", "all"]):
        result = mlm(run, "the capital of [MASK] is paris", *options)
        labels = [-100 if place == 4 or (len(options) == 2 and place != 2) else token
                  for place, token in enumerate(result["ids"])]  # fmt: skip
        assert result["input_ids"][2] == result["input_ids"][4] == 4
        assert result["loss"] == pytest.approx(hub_loss(hub_model, result["input_ids"], labels), abs=1e-5)
        assert 4 in [row["position"] for row in result["scored"]]


def test_layers_shows_the_best_guess_after_each(run, hub_model):
    plain, result = (mlm(run, TEXT, "--positions", "2,5", *more) for more in ([], ["--layers"]))
    assert all(row["layers"] is None for row in plain["scored"])
    with torch.no_grad():
        states = hub_model(torch.tensor([result["input_ids"]]), output_hidden_states=True).hidden_states
        expected = [hub_model.cls(state)[0].softmax(-1).max(-1) for state in states]  # of each (S,)
    for row, same in zip(result["scored"], plain["scored"], strict=True):
        assert {**row, "layers": None} == same
        assert len(row["layers"]) == 3, "the embeddings and two layers"
        for guess, best in zip(row["layers"], expected, strict=True):
            assert guess["token_str"] == VOCAB[best.indices[row["position"]]]
            assert guess["score"] == pytest.approx(best.values[row["position"]].item(), abs=1e-6)
        assert row["layers"][-1] == row["predictions"][0]
    lines = run("mlm", TEXT, "--positions", "2,5", "--layers").splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("  layer 2")] == [["layer", "2"]] * 2
    assert "position 5, seen as [MASK]: the best guess after" in lines


def test_ids_without_a_word_are_no_answer(folder, tmp_path):
    """A vocabulary that was filled up, as to a multiple of 64: the model is sure of a row that is no token."""
    model, tokenizer = BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    larger = BertForMaskedLM(replace(model.config, vocab_size=len(VOCAB) + 30))
    state = {name: tensor.clone() for name, tensor in larger.state_dict().items()}
    for name, tensor in model.state_dict().items():
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    state["head.bias"][len(VOCAB) :] = 50.0
    larger.load_state_dict(state)
    for seed in range(5):
        result = mask_and_guess(larger.eval(), tokenizer, TEXT, probability=0.9, seed=seed, layers=True, top_k=100)
        same = mask_and_guess(model, tokenizer, TEXT, probability=0.9, seed=seed)
        assert result.input_ids == same.input_ids, "a random token is one of the tokenizer's"
        for row in result.scored:
            assert sorted(guess.token_str for guess in row.predictions) == sorted(VOCAB)
            assert {guess.token_str for guess in row.layers} <= set(VOCAB)
    larger.save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(["mlm", TEXT, "--model", str(tmp_path)]) == 0
    with pytest.raises(ValueError, match=f"the tokenizer has {len(VOCAB)} tokens and the model 20"):
        mask_and_guess(BertForMaskedLM(replace(model.config, vocab_size=20)).eval(), tokenizer, TEXT)
    with pytest.raises(ValueError, match="training mode"):
        mask_and_guess(larger.train(), tokenizer, TEXT)


@pytest.mark.parametrize("wrong", [{"score": "some"}, {"recipe": "mine"}, {"top_k": 0}, {"positions": [-1]}])
def test_a_wrong_argument_of_the_function(fill, wrong):
    name = "position -1" if "positions" in wrong else next(iter(wrong))
    with pytest.raises(ValueError, match=name):
        mask_and_guess(fill.model, fill.tokenizer, TEXT, **wrong)


def test_a_mask_of_another_name(fill):
    """The text may say [MASK] all the same; what the model saw is shown under the tokenizer's own name."""
    words = ["<mask>" if token == "[MASK]" else token for token in VOCAB]
    tokenizer = from_vocabulary(words, {"mask_token": "<mask>"})
    for text in ("the [MASK] is paris", "the <mask> is paris"):
        result = mask_and_guess(fill.model, tokenizer, text)
        assert [row.seen for row in result.scored] == ["<mask>"]
        assert result.scored[0].predictions[0].token_str == fill("the [MASK] is paris")[0]["token_str"]
    assert mask_and_guess(fill.model, tokenizer, TEXT, positions=[2]).input_ids[2] == VOCAB.index("[MASK]")
    with pytest.raises(ValueError, match="would be cut off"):
        mask_and_guess(fill.model, tokenizer, f"{LONG} [MASK]", truncate=True)


@pytest.mark.parametrize("draw", [{"probability": 0.5}, {"recipe": "plain"}, {"seed": 3}])
def test_how_to_draw_is_refused_where_nothing_is_drawn(folder, draw):
    model, tokenizer = BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    for text, positions in (("the rain is", [1]), ("the [MASK] is", None)):
        with pytest.raises(ValueError, match=f"{next(iter(draw))} .* says how tokens are drawn"):
            mask_and_guess(model, tokenizer, text, positions=positions, **draw)
