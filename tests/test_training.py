"""The first, plain trainer: text to examples, and a loop that learns and saves what it learnt."""

import gzip
import json
import random

import pytest
import torch

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.cli import main
from minibert.tokenizer import from_vocabulary
from minibert.training.data import ExampleMaker, is_held_out, read_lines, read_text_file
from minibert.training.loop import Settings, evaluate, parameter_groups, train

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
    files = [read_text_file(str(text), tokenizer)]
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
        train(model, tokenizer, [read_text_file(str(text), tokenizer)], tmp_path / out,
              Settings(steps=3, batch_size=4, max_length=16))  # fmt: skip
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_held_out_lines_are_never_trained_on(text, start):
    tokenizer = load_tokenizer(start)
    file = read_text_file(str(text), tokenizer)
    lines = list(dict.fromkeys(read_lines(text)))
    held_out = [line for line in lines if is_held_out(line)]
    assert 0 < len(held_out) < 0.05 * len(lines)
    assert [tokenizer.decode(ids).replace(".", " .") for ids in file.held_out] == held_out
    trained = {
        tuple(file.tokens[a:b].tolist()) for a, b in zip(file.starts.tolist(), file.starts.tolist()[1:], strict=False)
    }
    assert len(trained) == len(lines) - len(held_out)
    assert not trained & {tuple(ids) for ids in file.held_out}


def test_rows_and_masks_do_not_depend_on_the_batch(text, start):
    tokenizer = load_tokenizer(start)
    maker = ExampleMaker([read_text_file(str(text), tokenizer)], tokenizer, vocab_size=len(VOCABULARY), max_length=16)
    together, alone = maker.examples(range(10)), maker.examples([7])
    begin, end = together.batch.cu_seqlens[7:9].tolist()
    assert together.batch.input_ids[begin:end].tolist() == alone.batch.input_ids.tolist()
    inside = (together.positions >= begin) & (together.positions < end)
    assert (together.positions[inside] - begin).tolist() == alone.positions.tolist()
    assert together.targets[inside].tolist() == alone.targets.tolist()
    assert max(together.batch.lengths) == 16


def test_weights_say_how_often_a_file_is_drawn(tmp_path, start):
    tokenizer = load_tokenizer(start)
    for name, word in (("a", "cat"), ("b", "dog")):
        (tmp_path / f"{name}.txt").write_text(f"{word} {word} {word} {word}\n")
    files = [read_text_file(str(tmp_path / spec), tokenizer) for spec in ("a.txt:3", "b.txt")]
    maker = ExampleMaker(files, tokenizer, vocab_size=len(VOCABULARY))
    cat = tokenizer.token_to_id("cat")
    drawn = sum(cat in maker.row(number) for number in range(400))
    assert 300 - 5 * 8.7 < drawn < 300 + 5 * 8.7  # binomial, 5 sigma


def test_gzip_is_read_like_text(text, start, tmp_path):
    tokenizer = load_tokenizer(start)
    packed = tmp_path / "farm.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    assert torch.equal(read_text_file(str(packed), tokenizer).tokens, read_text_file(str(text), tokenizer).tokens)


def test_decay_is_for_matrices(start):
    model = BertForMaskedLM.from_pretrained(start)
    decayed, plain = parameter_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(name.endswith("bias") or "norm" in name for name in (names[id(p)] for p in plain["params"]))
    assert not any(name.endswith("bias") or "norm" in name for name in (names[id(p)] for p in decayed["params"]))
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing.txt", "no such text file"),
        (lambda folder: _write(folder / "latin.txt", b"caf\xe9\n"), "UTF-8"),
        (lambda folder: _write(folder / "not.gz", b"plain"), "gzip"),
        (lambda folder: _write(folder / "empty.txt", b"\n\n"), "no text"),
    ],
    ids=["missing", "latin-1", "not gzip", "empty"],
)
def test_bad_text_files(make, message, start, tmp_path, capsys):
    path = make(tmp_path)
    assert main(["train", str(path), "--init", str(start), "--out", str(tmp_path / "o"), "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert str(path) in error.splitlines()[-1]
    assert message in error.splitlines()[-1]


def test_a_loss_that_is_not_a_number_stops_and_saves_nothing(text, start, tmp_path):
    model, tokenizer = BertForMaskedLM.from_pretrained(start), load_tokenizer(start)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0"):
        train(
            model, tokenizer, [read_text_file(str(text), tokenizer)], tmp_path / "out", Settings(steps=1, max_length=16)
        )
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_model_are_refused(text, start, tmp_path):
    model, tokenizer = BertForMaskedLM.from_pretrained(start), load_tokenizer(start)
    with pytest.raises(ValueError, match=r"41.*40"):
        train(
            model, tokenizer, [read_text_file(str(text), tokenizer)], tmp_path / "o", Settings(steps=1, max_length=41)
        )
    with pytest.raises(ValueError, match="steps"):
        Settings(steps=0)


def _write(path, content):
    path.write_bytes(content)
    return path


def test_an_out_that_cannot_be_made_is_found_before_training(text, start, tmp_path, capsys):
    for out, message in ((str(text), "File exists"), (" ", "--out needs")):
        assert main(["train", str(text), "--init", str(start), "--out", out, "--steps", "100000"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_texts_of_no_weight_and_no_name(text, start, tmp_path, capsys):
    for spec, message in ((f"{text}:0", "weight 0"), ("", "is not FILE")):
        arguments = ["--init", str(start), "--out", str(tmp_path / "o"), "--steps", "1", "--max-length", "16"]
        assert main(["train", spec, *arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_with_nothing_held_out_no_figure_is_made_up(start, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("the cat\n")
    tokenizer = load_tokenizer(start)
    figures = evaluate(BertForMaskedLM.from_pretrained(start), tokenizer, [read_text_file(str(path), tokenizer)])
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
