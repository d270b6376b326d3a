"""The first, plain trainer: text to examples, and a loop that learns and saves what it learnt."""

import json
import random

import pytest
import torch

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.cli import main
from minibert.tokenizer import from_vocabulary
from minibert.training.loop import Settings, evaluate, parameter_groups, train
from minibert.training.tokens import token_files

NOUNS, VERBS, PLACES = ("cat", "dog", "cow", "hen"), ("sat", "ran", "ate", "slept"), ("mat", "hill", "barn", "nest")
WORDS = [*NOUNS, *VERBS, *PLACES, *"the a in on . big small red old".split(), *(f"word{i}" for i in range(40))]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture
def text(tmp_path):
    """Lines in which the noun says which verb and which place follow."""
    draw = random.Random(0)
    path = tmp_path / "farm.txt"
    lines = []
    for number in range(600):
        noun = draw.randrange(4)
        lines.append(f"the {draw.choice(('big', 'small', 'old'))} {NOUNS[noun]} {VERBS[noun]} on the {PLACES[noun]} . "
                     f"word{number % 40} word{number // 40}")  # fmt: skip
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture
def start(tmp_path):
    """A folder with an untrained model and its tokenizer."""
    folder = tmp_path / "start"
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    from_vocabulary(VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


def test_the_loss_goes_down_and_the_result_loads(text, start, tmp_path):
    model, tokenizer = BertForMaskedLM.from_pretrained(start), load_tokenizer(start)
    files = token_files([str(text)], tokenizer, tmp_path / "tokens")
    before = evaluate(model, tokenizer, files, max_length=16)["all"]
    settings = Settings(steps=100, batch_size=32, max_length=16, learning_rate=5e-3, dropout=False, save_every=1000)
    losses = train(model, tokenizer, files, tmp_path / "out", settings)
    assert len(losses) == 100
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    again = BertForMaskedLM.from_pretrained(tmp_path / "out")
    after = evaluate(again, load_tokenizer(tmp_path / "out"), files, max_length=16)["all"]
    assert after["loss"] < 0.8 * before["loss"]
    assert after["top1"] > before["top1"]
    assert not model.training


def test_the_command_prints_the_held_out_figures(text, start, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--init", str(start), "--out", str(out), "--steps", "2", "--batch-size", "4", "--max-length", "16"]
    assert main(["train", f"{text}:2", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "top-1" in printed
    assert "farm" in printed
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(VOCABULARY)


def test_the_same_seed_gives_the_same_weights(text, start, tmp_path):
    results = []
    for out in ("one", "two"):
        model, tokenizer = BertForMaskedLM.from_pretrained(start), load_tokenizer(start)
        train(model, tokenizer, token_files([str(text)], tokenizer, tmp_path / "tokens"), tmp_path / out,
              Settings(steps=3, batch_size=4, max_length=16))  # fmt: skip
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_decay_is_for_matrices(start):
    model = BertForMaskedLM.from_pretrained(start)
    decayed, plain = parameter_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(name.endswith("bias") or "norm" in name for name in (names[id(p)] for p in plain["params"]))
    assert not any(name.endswith("bias") or "norm" in name for name in (names[id(p)] for p in decayed["params"]))
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_a_loss_that_is_not_a_number_stops_and_saves_nothing(text, start, tmp_path):
    model, tokenizer = BertForMaskedLM.from_pretrained(start), load_tokenizer(start)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0"):
        train(
            model,
            tokenizer,
            token_files([str(text)], tokenizer, tmp_path / "tokens"),
            tmp_path / "out",
            Settings(steps=1, max_length=16),
        )
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_model_are_refused(text, start, tmp_path):
    model, tokenizer = BertForMaskedLM.from_pretrained(start), load_tokenizer(start)
    with pytest.raises(ValueError, match=r"41.*40"):
        train(
            model,
            tokenizer,
            token_files([str(text)], tokenizer, tmp_path / "tokens"),
            tmp_path / "o",
            Settings(steps=1, max_length=41),
        )
    with pytest.raises(ValueError, match="steps"):
        Settings(steps=0)


def test_an_out_that_cannot_be_made_is_found_before_training(text, start, tmp_path, capsys):
    for out, message in ((str(text), "File exists"), (" ", "--out needs")):
        assert main(["train", str(text), "--init", str(start), "--out", out, "--steps", "100000"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_with_nothing_held_out_no_figure_is_made_up(start, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("the cat\n")
    tokenizer = load_tokenizer(start)
    figures = evaluate(
        BertForMaskedLM.from_pretrained(start), tokenizer, token_files([str(path)], tokenizer, tmp_path / "tokens")
    )
    assert figures["all"]["masked_tokens"] == 0
    assert figures["all"]["top1"] != figures["all"]["top1"], "not a number"


def test_an_encoder_without_a_head_can_be_trained(text, start, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = {name: x for name, x in load_file(start / "model.safetensors").items() if not name.startswith("cls.")}
    save_file(weights, start / "model.safetensors")
    out = tmp_path / "out"
    assert (
        main(["train", str(text), "--init", str(start), "--out", str(out), "--steps", "1", "--max-length", "16"]) == 0
    )
    assert not BertForMaskedLM.from_pretrained(out).load_report.initialised
