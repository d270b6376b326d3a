"""The training loop: it learns, and however a step is computed, it is the same step."""

import json
import math
import re
import shutil
from functools import partial
from itertools import chain, islice

import pytest
import torch
from tiny import metrics, weights

from minibert import BertForMaskedLM, load_tokenizer
from minibert.tokenizer import from_vocabulary, own_token
from minibert.training import Settings, saving, step
from minibert.training.data import ALONE, Ranks, Shares
from minibert.training.run import train_steps
from minibert.training.step import LossSum, accumulate, evaluate, wrapped_layers
from minibert.training.tokens import token_files

# ------------------------------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def scratch(tiny, tmp_path_factory):
    """A config.json with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("scratch")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny.start / name, folder / name)
    return folder / "config.json"


@pytest.mark.slow
def test_from_random_weights_the_loss_on_real_text_goes_down(tiny, scratch, tmp_path, capsys):
    out = tmp_path / "out"
    assert tiny.train(out, "--init", scratch, "--steps", "120", "--evaluate-every", "30", "--no-dropout") == 0
    lines = metrics(out)
    losses = [line["loss"] for line in lines]
    assert len(losses) == 120
    vocabulary = math.log(tiny.config.vocab_size)
    assert losses[0] == pytest.approx(vocabulary, abs=0.1), "at first, all words are about equally likely"
    assert sum(losses[-20:]) / 20 < vocabulary - 1, "the least that it takes to have learnt something"
    held_out = [line["held_out"]["all"]["loss"] for line in lines if "held_out" in line]
    assert len(held_out) == 4
    # What is printed and saved is what was learnt.
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert printed == ["all", f"{lines[-1]['held_out']['all']['masked_tokens']:.0f}", f"{held_out[-1]:.3f}",
                       f"{lines[-1]['held_out']['all']['top1']:.1%}"]  # fmt: skip
    _, tokenizer, files = tiny.load()
    for folder, loss in ((out, held_out[-1]), (out / "best", min(held_out))):
        again = evaluate(BertForMaskedLM.from_pretrained(folder), tokenizer, files, max_length=24)
        assert again["all"]["loss"] == pytest.approx(loss, abs=1e-6)  # float32, saved and read: no difference expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_and_falls(schedule, tiny, tmp_path):
    settings = Settings(steps=200, learning_rate=5e-3, schedule=schedule, warmup=0.05)
    rates = [settings.rate(step) for step in range(200)]
    assert rates[:10] == pytest.approx([5e-3 * step / 10 for step in range(1, 11)])
    assert rates[10] == pytest.approx(5e-3)
    assert rates[10 + 95] == pytest.approx(2.5e-3), "a line and half a cosine are both at half their height"
    quarter = {"linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2}[schedule]
    assert rates[10 + 47] == pytest.approx(5e-3 * quarter, rel=0.01)  # 47 of 190 is about a quarter
    assert 0 < rates[-1] < 1e-4
    assert tiny.train(tmp_path / "out", "--schedule", schedule, "--warmup", "0.5") == 0
    short = Settings(steps=12, learning_rate=5e-3, schedule=schedule, warmup=0.5)
    assert [line["learning_rate"] for line in metrics(tmp_path / "out")] == [short.rate(step) for step in range(12)]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(tiny, scratch, tmp_path):
    for name, options in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 1))):
        assert tiny.train(tmp_path / name, "--init", scratch, "--steps", "3", *options) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_random_weights_are_those_of_the_seed(tiny, scratch, tmp_path):
    options = ("--init", scratch, "--seed", 1, "--steps", 1, "--learning-rate", "1e-30")  # so small that they stay
    assert tiny.train(tmp_path / "out", *options) == 0
    torch.manual_seed(1)
    expected = BertForMaskedLM(tiny.config).layers[0].attention.qkv.weight
    assert torch.equal(BertForMaskedLM.from_pretrained(tmp_path / "out").layers[0].attention.qkv.weight, expected)


def test_an_encoder_without_a_head_can_be_trained(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

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


# ------------------------------------------------------------------------------------------- one step, however computed


@pytest.fixture
def corpus(tiny):
    return tiny.corpus(tokens_per_step=2000)


def gradients(model, passes, targets):
    model.zero_grad()
    loss = accumulate(LossSum(model), passes, targets, "float32", ALONE)
    return loss.item() / targets, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_accumulation_is_exact(tiny, corpus):
    """One pass of 64 rows, and four of 16, in float64: what is left is its rounding, and not a mean of means."""
    model = tiny.load()[0].double()
    numbers = list(range(64))
    at_once = [corpus.examples(0, numbers)]
    in_four = [corpus.examples(0, numbers[at : at + 16]) for at in range(0, 64, 16)]
    counts = [len(example.targets) for example in in_four]
    assert sum(counts) == len(at_once[0].targets)
    assert len(set(counts)) > 1, "with equal counts a mean of means would be right too"
    loss, expected = gradients(model, at_once, sum(counts))
    again, found = gradients(model, in_four, sum(counts))
    assert again == pytest.approx(loss, rel=1e-14)
    for name, gradient in expected.items():
        # Rounding of float64 is 1e-16; a sum over a thousand tokens, relative to the largest entry, loses a few digits.
        assert (found[name] - gradient).abs().max() <= 1e-13 * gradient.abs().max(), name
    logits = model.predict(at_once[0].batch, at_once[0].positions)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, at_once[0].targets).item(), rel=1e-12)


def test_the_passes_of_all_ranks_are_the_step(corpus):
    for number, numbers in enumerate(islice(corpus.steps(0), 3)):
        lengths, targets = [], 0
        for rank in range(3):
            share = Shares(corpus, Ranks(rank, 3), 100)[0, number, numbers]
            assert all(example.batch.num_tokens <= 100 for example in share.passes)
            assert len(share.passes) > 1
            targets += sum(len(example.targets) for example in share.passes)
            lengths.append([length for example in share.passes for length in example.batch.lengths])
        whole = corpus.examples(0, numbers)
        assert sorted(chain(*lengths)) == sorted(whole.batch.lengths)
        assert targets == len(whole.targets)
        assert max(map(sum, lengths)) - min(map(sum, lengths)) <= 24, "the ranks have about the same to do"


def test_a_rank_without_rows_takes_part_with_a_gradient_of_nothing(tiny, corpus):
    share = Shares(corpus, Ranks(2, 3), None)[0, 0, next(corpus.steps(0))[:2]]
    loss, found = gradients(tiny.load()[0], share.passes, 10)
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


def test_in_training_elements_are_dropped_at_the_models_rate(tiny, corpus):
    """The stand-in for nn.Dropout on the CPU: in training only, and everywhere the model has dropout."""
    model = tiny.load()[0].train()
    batch = corpus.examples(0, range(20)).batch
    drawn = []
    with wrapped_layers(model):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout) and not name.endswith("attention.dropout"):  # for each sequence
                module.register_forward_hook(lambda module, _, y: drawn.append((y == 0).float().mean().item()))
        model.encode(batch)
        # 5 places, of some 400 tokens × 32
        assert len(drawn) == 1 + 2 * 2
        assert all(share == pytest.approx(0.1, abs=5 * (0.09 / (batch.num_tokens * 32)) ** 0.5) for share in drawn)
        assert not torch.equal(model.encode(batch), model.encode(batch))
        model.eval()
        drawn.clear()
        assert torch.equal(model.encode(batch), model.encode(batch))
        assert max(drawn) < 1e-3


def test_activations_computed_again_give_the_same_gradients_and_keep_less(tiny, corpus):
    model = tiny.load()[0].train()  # dropout too
    passes = [corpus.examples(0, range(20))]
    results = []
    for again in (False, True):
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        torch.manual_seed(0)
        with (
            wrapped_layers(model, checkpoint_activations=again),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            results.append((*gradients(model, passes, 50), kept))
    (loss, plain, plain_kept), (loss_again, found, found_kept) = results
    assert loss == loss_again
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert found_kept < 0.6 * plain_kept
    assert not any("forward" in vars(module) for module in model.modules()), "the model is as it was"


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tiny, corpus, monkeypatch):
    # The back end that needs no C++ compiler, and no minute: what is tested is what torch makes graphs of.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = tiny.load()[0]
    for batch in range(4):
        passes = [corpus.examples(0, range(10 * batch, 10 * batch + 7 + batch))]
        loss, expected = gradients(model, passes, 50)
        with wrapped_layers(model, compile=True, checkpoint_activations=batch % 2 == 1):
            again, found = gradients(model, passes, 50)
        assert again == pytest.approx(loss, rel=1e-6)  # float32
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_run_before_the_weights_are_touched(what, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    real = step.accumulate

    def accumulate(objective, *arguments):
        loss = real(objective, *arguments)
        if len(metrics(out)) == 4:  # in the fifth step
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
    assert all(x.isfinite().all() for x in BertForMaskedLM.from_pretrained(out / "checkpoint-3").state_dict().values())


def test_weights_that_are_not_numbers_stop_at_the_first_step(tiny, tmp_path):
    model, tokenizer, files = tiny.load()
    with torch.no_grad():
        model.head.bias[0] = math.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "out").mkdir()
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan"):
        train_steps(model, tokenizer, files, tmp_path / "out", Settings(steps=2, max_length=24, tokens_per_step=200))
    assert all(torch.equal(x.nan_to_num(), before[name].nan_to_num()) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps must be at least 1, not 0"),
        ("--save-every 0", "save_every must be at least 1"),
        ("--evaluate-every -1", "evaluate_every must be at least 1"),
        ("--max-length 2", "max_length must be at least 3"),
        ("--max-length 41", "41.*40 positions"),
        ("--tokens-per-step 23", "tokens_per_step is 23: a row of max_length 24"),
        ("--micro-tokens 10", "micro_tokens is 10: a row of max_length 24"),
        ("--learning-rate nan", "learning_rate must be a number above 0, not nan"),
        ("--warmup 2", "warmup is a share, from 0 to 1, not 2"),
        ("--schedule sudden", "invalid choice: 'sudden'"),
        ("--workers -1", "workers must be at least 0, not -1"),
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("clip", 0), ("clip", math.inf), ("weight_decay", -1), ("short_fraction", 1.5), ("dtype", "float16")],
)
def test_settings_without_an_option_are_checked_too(key, value):
    with pytest.raises(ValueError, match=f"{key}.* not .?{value}"):
        Settings(steps=1, **{key: value})


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
    model, tokenizer, _ = tiny.load()
    figures = evaluate(model, tokenizer, token_files([str(text)], tokenizer, tiny.tokens))
    assert figures["all"]["top1"] is None


@pytest.mark.filterwarnings("ignore:the texts are so short")
def test_a_step_in_which_nothing_is_masked_has_no_loss(tiny, tmp_path):
    text, out = tmp_path / "short.txt", tmp_path / "out"
    text.write_text("\n".join(["the", "must", "be", "not"]))  # a row is one word or a few, and at 15 % often unmasked
    assert tiny.train(out, "--max-length", "3", "--tokens-per-step", "3", texts=[text]) == 0
    lines = metrics(out)
    assert {line["masked_tokens"] for line in lines} == {0, 1}
    assert all((line["loss"] is None) == (line["masked_tokens"] == 0) for line in lines)


def test_figures_of_each_text(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text("\n".join(tiny.text.read_text().splitlines()[::-1]))
    assert tiny.train(out, "--steps", "2", texts=[tiny.text, f"{other}:0.5"]) == 0
    held_out = metrics(out)[-1]["held_out"]
    assert list(held_out) == ["prose", "other", "all"]
    assert held_out["all"]["masked_tokens"] == held_out["prose"]["masked_tokens"] + held_out["other"]["masked_tokens"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["held", "prose", "other", "all"]
    assert json.loads((out / "run.json").read_text())["text 2"].startswith("other:0.5")
