"""A run as a whole: it learns, it starts from what it was given, it computes what it was told; and what goes wrong."""

import json
import math
import re
import shutil
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SETTINGS, metrics, weights

from minibert import BertForMaskedLM, load_tokenizer, masked_lm
from minibert.tokenizer import from_vocabulary, own_token
from minibert.training import Settings, run, saving, step, train
from minibert.training.run import train_steps
from minibert.training.step import evaluate


@pytest.fixture(scope="module")
def scratch(tiny, tmp_path_factory):
    """A config.json with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("scratch")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny.start / name, folder / name)
    return folder / "config.json"


@pytest.fixture
def steps_of(tiny, tmp_path):
    """A run of 4 steps with these settings, from Python: the lines of its metrics.jsonl."""

    def call(**settings):
        model, tokenizer, files = tiny.load()
        (tmp_path / "out").mkdir()
        train_steps(model, tokenizer, files, tmp_path / "out", Settings(**{**SETTINGS, "steps": 4, **settings}))
        return metrics(tmp_path / "out")

    return call


# ---------------------------------------------------------------------------------------------- learning, and starting


@pytest.mark.slow
def test_from_random_weights_the_loss_on_real_text_goes_down(tiny, scratch, tmp_path, capsys):
    out = tmp_path / "out"
    assert tiny.train(out, "--init", scratch, "--steps", "120", "--evaluate-every", "30", "--no-dropout") == 0
    lines = metrics(out)
    losses = [line["loss"] for line in lines]
    vocabulary = math.log(tiny.config.vocab_size)
    assert losses[0] == pytest.approx(vocabulary, abs=0.1), "at first, all words are about equally likely"
    assert sum(losses[-20:]) / 20 < vocabulary - 1, "the least that it takes to have learnt something"
    looks = [line["held_out"]["all"] for line in lines if "held_out" in line]
    assert len(looks) == 4
    # What is printed and saved is what was learnt.
    printed = capsys.readouterr().out.splitlines()[-1].split()
    last = looks[-1]
    assert printed == ["all", f"{last['masked_tokens']:.0f}", f"{last['loss']:.3f}", f"{last['top1']:.1%}"]
    _, tokenizer, files = tiny.load()
    for folder, loss in ((out, last["loss"]), (out / "best", min(look["loss"] for look in looks))):
        again = evaluate(BertForMaskedLM.from_pretrained(folder), tokenizer, files, max_length=24)
        assert again["all"]["loss"] == pytest.approx(loss, abs=1e-6)  # float32, saved and read: no difference expected


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(tiny, scratch, tmp_path):
    for name, options in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 1))):
        assert tiny.train(tmp_path / name, "--init", scratch, "--steps", "3", *options) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_an_encoder_without_a_head_can_be_trained(tiny, tmp_path):
    encoder, out = tmp_path / "encoder", tmp_path / "out"
    shutil.copytree(tiny.start, encoder)
    tensors = load_file(tiny.start / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if not name.startswith("cls.")}, encoder / "model.safetensors")
    assert tiny.train(out, "--init", encoder, "--steps", "1") == 0
    assert not BertForMaskedLM.from_pretrained(out).load_report.initialised


def test_from_scratch_with_the_tokenizer_of_another_model(tiny, tmp_path, capsys):
    config = tmp_path / "small.json"
    shutil.copy(tiny.start / "config.json", config)
    assert tiny.train(tmp_path / "out", "--init", config, "--steps", "1") == 2
    assert "--tokenizer" in capsys.readouterr().err.splitlines()[-1]
    assert tiny.train(tmp_path / "out", "--init", config, "--tokenizer", tiny.start, "--steps", "1") == 0
    assert load_tokenizer(tmp_path / "out").to_str() == load_tokenizer(tiny.start).to_str()


def test_the_tokenizer_that_is_saved_is_the_one_that_was_used(tiny, tmp_path):
    """Also by transformers, and with case, and a mask of another name."""
    from transformers import AutoTokenizer

    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(tiny.start, start)
    words = [token for token, _ in sorted(load_tokenizer(start).get_vocab().items(), key=lambda pair: pair[1])]
    words[words.index("[MASK]")], words[words.index("bennet")] = "@@", "Bennet"
    settings = {"mask_token": "@@", "do_lower_case": False}
    from_vocabulary(words, settings).save(str(start / "tokenizer.json"))
    (start / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    assert tiny.train(out, "--init", start, "--tokens", tmp_path / "tokens", "--steps", "1") == 0
    text = "my dear Mr. Bennet @@ bennet."
    ids = load_tokenizer(start).encode(text).ids
    assert {words.index("Bennet"), words.index("@@"), words.index("[UNK]")} <= set(ids)
    saved, theirs = load_tokenizer(out), AutoTokenizer.from_pretrained(out)
    assert saved.encode(text).ids == theirs(text)["input_ids"] == ids
    assert own_token(saved, "[MASK]") == theirs.mask_token == "@@"


def test_what_a_run_starts_from_is_of_the_revision_and_on_the_device(tiny, tmp_path, monkeypatch):
    asked = []
    model, tokenizer, _ = tiny.load()
    monkeypatch.setattr(BertForMaskedLM, "from_pretrained", lambda name, **more: asked.append((name, more)) or model)
    monkeypatch.setattr(run, "load_tokenizer", lambda name, **more: asked.append((name, more)) or tokenizer)
    where = {"out": tmp_path / "out", "tokens": tiny.tokens, "device": "cpu"}
    train([str(tiny.text)], init="some/model", revision="v2", settings=Settings(**SETTINGS | {"steps": 1}), **where)
    assert asked == [
        ("some/model", {"revision": "v2"}),
        ("some/model", {"device": "cpu", "revision": "v2", "init_missing_head": True}),
    ]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["init"] == "some/model at v2"
    where["out"] = tmp_path / "other"
    with pytest.raises(ValueError, match=r"'v2' was given, but start\.json is a file"):
        train([str(tiny.text)], init="start.json", revision="v2", settings=Settings(steps=1), **where)


# -------------------------------------------------------------------------------------------------- step after step


def test_a_run_has_the_rows_that_its_settings_say(tiny, steps_of):
    shape = dict(short_fraction=1.0, max_length=20, tokens_per_step=100, seed=3)

    def expected(**other):
        corpus = tiny.corpus(**{**shape, **other})
        return [sum(corpus.lengths(0, numbers)) for numbers in islice(corpus.steps(0), 4)]

    found = [line["tokens"] for line in steps_of(**shape)]
    assert found == expected()
    for other in ({"short_fraction": 0.3}, {"max_length": 24}, {"tokens_per_step": 200}, {"seed": 0}):
        assert found != expected(**other), other


@pytest.mark.parametrize("dropout", [True, False])
def test_a_look_at_the_held_out_lines_leaves_dropout_as_it_was(dropout, tiny, steps_of, tmp_path, monkeypatch):
    modes, real = [], step.accumulate
    monkeypatch.setattr(
        step, "accumulate", lambda objective, *rest: modes.append(objective.model.training) or real(objective, *rest)
    )
    looks = [line["held_out"]["all"] for line in steps_of(dropout=dropout, evaluate_every=1, max_length=9)]
    assert modes == [dropout] * 4
    _, tokenizer, files = tiny.load()
    model = BertForMaskedLM.from_pretrained(tmp_path / "out")
    last, longer = (evaluate(model, tokenizer, files, max_length=length)["all"] for length in (9, 24))
    assert {look["masked_tokens"] for look in looks} == {last["masked_tokens"]}
    assert last["masked_tokens"] < longer["masked_tokens"], "rows of the length of the run's"
    assert looks[-1]["loss"] == pytest.approx(last["loss"]), "the look itself has no dropout"


def test_best_is_the_model_with_the_least_loss_on_held_out_lines(steps_of, tmp_path, monkeypatch):
    losses, seen = iter([3.0, 2.0, 2.5, 4.0]), []

    def figures(model, *_, **__):
        seen.append(model.head.bias.detach().clone())
        return {"all": {"loss": next(losses), "top1": 0.5, "masked_tokens": 7}}

    monkeypatch.setattr(run, "evaluate", figures)
    steps_of(evaluate_every=1)
    best = BertForMaskedLM.from_pretrained(tmp_path / "out" / "best").head.bias
    assert [torch.equal(best, bias) for bias in seen] == [False, True, False, False]


def test_the_command_compiles_every_layer_or_computes_it_again_if_asked(tiny, tmp_path, monkeypatch):
    compiled, again, real = [], [], masked_lm.computed_again

    def compile(function, **_):
        return lambda *arguments: compiled.append(id(function.__self__)) or function(*arguments)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(masked_lm, "computed_again", lambda *x, **named: again.append(x) or real(*x, **named))
    layers = tiny.config.num_hidden_layers
    for name, expected in (("plain", (0, False)), ("compile", (layers, False)), ("checkpoint-activations", (0, True))):
        assert tiny.train(tmp_path / name, "--steps", "1", *([] if name == "plain" else [f"--{name}"])) == 0
        assert (len(set(compiled)), bool(again)) == expected
        compiled.clear()


def test_without_dropout_a_run_does_not_depend_on_how_its_steps_are_cut_into_passes(tiny, tmp_path):
    runs = []
    for name, options in (("one", ()), ("many", ("--micro-tokens", "60"))):
        assert tiny.train(tmp_path / name, "--no-dropout", "--steps", "3", *options) == 0
        runs.append(metrics(tmp_path / name))
    for one, many in zip(*runs, strict=True):
        assert (one["masked_tokens"], one["tokens"]) == (many["masked_tokens"], many["tokens"])
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)  # float32: 1e-7, which steps may enlarge
    assert weights(tmp_path / "one") != weights(tmp_path / "many"), "there was only one pass"


def test_the_speed_and_the_figures_of_each_text(tiny, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text("\n".join(tiny.text.read_text().splitlines()[::-1]))
    clock = count(step=4)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert tiny.train(out, "--steps", "2", texts=[tiny.text, f"{other}:0.5"]) == 0
    for line in metrics(out):
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / 4, abs=0.5)
    held_out = metrics(out)[-1]["held_out"]
    assert list(held_out) == ["prose", "other", "all"]
    assert held_out["all"]["masked_tokens"] == held_out["prose"]["masked_tokens"] + held_out["other"]["masked_tokens"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["held", "prose", "other", "all"]
    assert json.loads((out / "run.json").read_text())["text 2"].startswith("other:0.5")


@pytest.mark.filterwarnings("always")
def test_with_nothing_held_out_there_is_no_figure_and_no_best(tiny, tmp_path, capsys):
    text, out = tmp_path / "one.txt", tmp_path / "out"
    text.write_text("a wife must not be the daughter\n")
    assert tiny.train(out, "--steps", "2", texts=[text]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1:] == [f"{name:<20} {0:>13} {'–':>7} {'–':>7}" for name in ("one", "all")]
    assert "no line is held out" in said.err
    assert metrics(out)[-1]["held_out"]["all"] == {"loss": None, "top1": None, "masked_tokens": 0}
    assert not (out / "best").exists()


@pytest.mark.filterwarnings("ignore:the texts are so short")
def test_a_step_in_which_nothing_is_masked_has_no_loss(tiny, tmp_path):
    text, out = tmp_path / "short.txt", tmp_path / "out"
    text.write_text("\n".join(["the", "must", "be", "not"]))  # a row is one word or a few, and at 15 % often unmasked
    assert tiny.train(out, "--max-length", "3", "--tokens-per-step", "3", texts=[text]) == 0
    lines = metrics(out)
    assert {line["masked_tokens"] for line in lines} == {0, 1}
    assert all((line["loss"] is None) == (line["masked_tokens"] == 0) for line in lines)


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_run_before_the_weights_are_touched(what, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    real, seen = step.accumulate, []

    def accumulate(objective, *arguments):
        loss = real(objective, *arguments)
        if len(metrics(out)) == 4:  # in the fifth step
            seen.append((objective.model, {name: x.clone() for name, x in objective.model.state_dict().items()}))
            if what == "loss":
                return loss * math.inf
            next(objective.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(step, "accumulate", accumulate)
    assert tiny.train(out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step 5: .*what was saved before stands.*learning rate of 0.005", error)
    assert ("the loss is inf" in error) == (what == "loss")
    assert ("gradient nan" in error) == (what == "gradient")
    assert [path.name for path in saving.checkpoints(out)] == ["checkpoint-3"]
    assert len(metrics(out)) == 4
    ((model, before),) = seen
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps must be at least 1, not 0"),
        ("--evaluate-every -1", "evaluate_every must be at least 1"),
        ("--max-length 2", "max_length must be at least 3"),
        ("--max-length 41", "41.*40 positions"),
        ("--micro-tokens 10", "micro_tokens is 10: a row of max_length 24"),
        ("--learning-rate nan", "learning_rate must be a number above 0, not nan"),
        ("--warmup 2", "warmup is a share, from 0 to 1, not 2"),
        ("--schedule sudden", "invalid choice: 'sudden'"),
        (f"--seed {2**70}", "seed must fit in 64 bits"),
        ("--device cuda:77", "cuda:77"),
        ("--init no/such.json", "no/such.json"),
        ("--init no/such/model", "no/such/model"),
        ("--tokenizer minibert-uncased", "tokenizer has 30522 tokens, the model"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_2(options, message, tiny, tmp_path, fails):
    assert re.search(message, fails(*tiny.arguments(tmp_path / "out", *options.split())))
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("missing", ["[CLS]", "[SEP]", "[MASK]"])
def test_special_tokens_are_looked_for_before_the_text_is_read(missing, tiny, tmp_path, fails):
    start = tmp_path / "model"
    shutil.copytree(tiny.start, start)
    values = json.loads((start / "tokenizer.json").read_text(encoding="utf-8"))
    values["post_processor"] = None
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != missing]
    values["model"]["vocab"][missing.strip("[]")] = values["model"]["vocab"].pop(missing)
    (start / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    where = ("--init", start, "--tokens", tmp_path / "tokens")
    message = fails(*tiny.arguments(tmp_path / "out", *where, texts=[tmp_path / "no such text.txt"]))
    assert f"has no {missing} token" in message
    assert not (tmp_path / "tokens").exists()
