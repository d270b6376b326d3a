"""The `minibert` command, and FillMask against transformers' fill-mask pipeline, on a tiny random model."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM as HubBert
from transformers import BertTokenizer, FillMaskPipeline

import minibert
from minibert import BertConfig, BertForMaskedLM, FillMask, load_tokenizer, mask_tokens
from minibert.cli import main
from minibert.commands.fill_mask import WORTH_PREPARING
from minibert.inference import prepare_for_inference
from minibert.mlm import mask_and_guess
from minibert.tokenizer import from_vocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the capital of france is paris london berlin rain in spain stays mainly plain play un a . , ! '".split()
VOCAB = [*SPECIAL, *WORDS, "##ing", "##s", "##believ", "##able"]
LONGEST = 64
TEXT = "the capital of france is paris, the unbelievable rain in spain stays mainly in the plain playing."
LONG = "the rain in spain " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=37,
        max_position_embeddings=LONGEST,
        initializer_range=0.3,  # predictions that differ clearly
    )
    BertForMaskedLM(config).save_pretrained(path)
    from_vocabulary(VOCAB).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def fill(folder):
    return FillMask(BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder))


@pytest.fixture(scope="module")
def hub_model(folder):
    return HubBert.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def pipeline(folder, hub_model):
    return FillMaskPipeline(model=hub_model, tokenizer=BertTokenizer.from_pretrained(folder))


@pytest.fixture
def run(folder, capsys):
    """The command with the tiny model: what it printed. It must succeed and say nothing on stderr."""

    def call(command, *arguments):
        assert main([command, *arguments, "--model", str(folder)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


@pytest.fixture
def fails(capsys):
    """The command must fail with status 2, nothing on stdout and one line on stderr: that line."""

    def call(*arguments):
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("minibert")
        assert "Traceback" not in err
        return err.strip()

    return call


# ------------------------------------------------------------------------------------ FillMask against the pipeline


def assert_same_answers(ours, theirs):
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_answers(one, other)
        return
    assert ours.keys() == theirs.keys()
    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
    assert {key: ours[key] for key in ("token", "token_str", "sequence")} == {
        key: theirs[key] for key in ("token", "token_str", "sequence")
    }


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
    assert [row["token_str"] for row in fill(one, top_k=2)] == [row["token_str"] for row in fill([one], top_k=2)[0]]
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
        ("[MASK]", {"targets": []}, "targets must be a list of words"),
        ("[MASK]", {"targets": "paris"}, "targets must be a list of words, not 'paris'"),
        ("[MASK]", {"targets": ["unbelievable"]}, "'unbelievable' .* it became un ##believ ##able"),
        ("[MASK]", {"targets": ["quark"]}, r"'quark' .* it became \[UNK\]"),
        ("[MASK]", {"targets": [" "]}, "it became nothing"),
        (f"{LONG} [MASK]", {}, f"123 tokens long and the model takes {LONGEST}"),
    ],
)
def test_fill_mask_says_what_is_wrong(fill, text, options, words):
    with pytest.raises(ValueError, match=words):
        fill(text, **options)


def test_a_mask_beyond_the_cut_is_an_error_that_says_so(fill):
    with pytest.raises(ValueError, match=r"\[MASK\].*(cut|truncat)"):
        fill(f"{LONG} [MASK]", truncate=True)


def test_a_tokenizer_of_another_model_is_refused(fill):
    with pytest.raises(ValueError, match=f"the tokenizer has {len(VOCAB) + 1} tokens and the model {len(VOCAB)}"):
        FillMask(fill.model, from_vocabulary([*VOCAB, "more"]))


# --------------------------------------------------------------------------------------------------- minibert fill-mask


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


# --------------------------------------------------------------------------------------------------------- minibert mlm


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
    assert "position 5, seen as [MASK]: the guess after" in lines


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
        mask_and_guess(BertForMaskedLM(replace(model.config, vocab_size=20)), tokenizer, TEXT)


@pytest.mark.parametrize("wrong", [{"score": "some"}, {"recipe": "mine"}, {"top_k": 0}, {"positions": [-1]}])
def test_a_wrong_argument_of_the_function(fill, wrong):
    name = "position -1" if "positions" in wrong else next(iter(wrong))
    with pytest.raises(ValueError, match=name):
        mask_and_guess(fill.model, fill.tokenizer, TEXT, **wrong)


# -------------------------------------------------------------------------------------------------------- minibert info


def test_info_counts_what_transformers_counts(run, hub_model, folder):
    result = json.loads(run("info", "--json"))
    unique = {parameter.data_ptr(): parameter.numel() for parameter in hub_model.parameters()}
    budget = result["parameters"]
    assert budget["total"] == sum(unique.values())
    assert budget["total"] == sum(number for name, number in budget.items() if name != "total")
    assert result["config"]["vocab_size"] == len(VOCAB)
    report = result["load_report"]
    assert report["files"] == [str(folder / "model.safetensors")]
    assert re.fullmatch("[0-9a-f]{64}", report["sha256"]["model.safetensors"])
    assert report["initialised"] == report["non_finite"] == []

    text = run("info")
    assert f"{budget['total']:,}" in text
    assert report["sha256"]["model.safetensors"] in text
    assert re.search(r"hidden_size +20\n", text)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fill-mask", "the rain"], r"no \[MASK\] in 'the rain': write \[MASK\]"),
        (["fill-mask", ""], r"no \[MASK\] in ''"),
        (["fill-mask", "line\none"], r"no \[MASK\]"),
        (["fill-mask", "the [MASK]", "--targets", "paris,unbelievable"], "became un ##believ ##able"),
        (["fill-mask", "the [MASK]", "--targets", ""], "became nothing"),
        (["fill-mask", "the [MASK]", "--top-k", "0"], "top_k must be at least 1"),
        (["fill-mask", f"[MASK] {LONG}"], f"123 tokens long and the model takes {LONGEST}"),
        (["fill-mask", "caf\udce9 [MASK]"], "surrogates"),
        (["mlm", LONG], f"122 tokens long and the model takes {LONGEST}"),
        (["mlm", "caf\udce9"], "surrogates"),
        (["mlm", TEXT, "--positions", "1", "--recipe", "plain"], "recipe plain .* positions names .* one of the two"),
        (["mlm", TEXT, "--positions", "1", "--probability", "0.2"], "probability 0.2 .* positions names"),
        (
            ["mlm", TEXT, "--positions", "99"],
            r"position 99 .* which is 24 tokens: 0 \[CLS\], 1 the, 2 capital, .*, 23 \[SEP\]$",
        ),
        (["mlm", TEXT, "--positions", "1,x"], "whole numbers from 0, with commas between, not '1,x'"),
        (["mlm", TEXT, "--positions", "-1"], "whole numbers from 0"),
        (["mlm", TEXT, "--positions", ""], "whole numbers from 0"),
        (["mlm", TEXT, "--probability", "1.5"], "probability must be between 0 and 1, not 1.5"),
        (["mlm", TEXT, "--probability", "nan"], "probability .* nan"),
        (["mlm", TEXT, "--seed", str(2**64)], "seed must fit in 64 bits"),
        (["mlm", ""], "no token to mask in ''"),
        (["mlm", " "], "no token to mask"),
        (["mlm", "the [MASK]", "--seed", "0"], r"seed 0 .* \[MASK\] of its own"),
        (["mlm", "the [MASK]", "--recipe", "bert"], r"recipe bert .* \[MASK\] of its own"),
        (["mlm", f"{LONG} [MASK]", "--truncate"], r"1 \[MASK\] in the text would be cut off"),
        (["mlm", "the " * 61, "--positions", "70"], r"which is 63 tokens: .* 59 the, … 62 \[SEP\]"),
    ],
)
def test_a_mistake_is_one_line(folder, fails, arguments, words):
    line = fails(*arguments, "--model", str(folder))
    assert line.startswith(f"minibert {arguments[0]}: ")
    assert re.search(words, line)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'.*fill-mask.*mlm.*info.*train"),
        (["fill-mask"], "required: TEXT"),
        (["info", "--nonsense"], "--nonsense"),
        (["mlm", "a", "--recipe", "nonsense"], "'nonsense'"),
        (["mlm", "a", "--seed", "x"], "--seed.*'x'"),
        (["mlm", "a", "--seed", "1", "--positions", "1"], "--positions: not allowed with argument --seed"),
        (["fill-mask", "[MASK]", "--top-k", "many"], "--top-k.*'many'"),
    ],
)
def test_a_wrong_option_is_one_line_that_points_to_help(fails, arguments, words):
    line = fails(*arguments)
    assert re.search(words, line)
    assert "--help" in line


@pytest.mark.parametrize("command", [["fill-mask", "[MASK]"], ["mlm", "a"], ["info"]])
def test_a_model_that_is_not_there(fails, tmp_path, command):
    assert "'nowhere' is no folder" in fails(*command, "--model", "nowhere")
    assert "there is no config.json" in fails(*command, "--model", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in fails(*command, "--model", str(tmp_path))


def test_traceback_shows_where(folder):
    with pytest.raises(ValueError, match=r"no \[MASK\] in"):
        main(["fill-mask", "the rain", "--traceback", "--model", str(folder)])


@pytest.mark.parametrize("command", [[], ["fill-mask"], ["mlm"], ["info"], ["train"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert f"usage: {' '.join(['minibert', *command])}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ as a process


def process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "minibert", *arguments],
        capture_output=True,
        cwd=Path(minibert.__file__).parent.parent,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def test_python_m_minibert(folder, fill):
    done = process("fill-mask", "the [MASK] is paris", "--json", "--model", str(folder))
    assert (done.returncode, done.stderr) == (0, b"")
    assert_same_answers(json.loads(done.stdout)[0]["answers"], fill("the [MASK] is paris"))


def test_python_m_minibert_with_a_mistake(folder):
    done = process("mlm", b"caf\xe9 is no UTF-8", "--model", str(folder))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"minibert mlm: ")
    done = process("nonsense")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)


# ------------------------------------------------------------------------------------------- what a first review found


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
    monkeypatch.setattr(
        "minibert.inference.prepare_for_inference", lambda model: prepared.append(1) or prepare_for_inference(model)
    )
    texts = [f"{'the ' * (number % 5)}[MASK]" for number in range(WORTH_PREPARING)]
    run("fill-mask", *texts[1:], "--json")
    assert not prepared, "for a few texts that would take longer than it saves"
    results = json.loads(run("fill-mask", *texts, "--json"))
    for text, result in zip(texts, results, strict=True):
        expected = fill(text)
        assert [row["token"] for row in result["answers"]] == [row["token"] for row in expected]
        assert result["answers"][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-6)
    assert prepared


@pytest.mark.filterwarnings("always")
def test_weights_that_are_not_numbers(folder, tmp_path, capsys):
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    model.save_pretrained(tmp_path)
    load_tokenizer(folder).save(str(tmp_path / "tokenizer.json"))
    assert main(["fill-mask", "[MASK]", "--json", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    assert "minibert: warning:" in err
    assert "head.bias" in err


def test_options_are_not_abbreviated(fails):
    assert "--mod" in fails("info", "--mod", "x")


def test_a_reader_that_has_seen_enough(folder):
    command = f"{sys.executable} -m minibert fill-mask '[MASK]' --top-k 30 --model {folder} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[MASK]\n"
    assert done.stderr == ""


def test_a_pipe_that_is_not_utf_8(folder):
    done = subprocess.run(
        [sys.executable, "-m", "minibert", "mlm", "--help"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    assert done.returncode == 0
