"""What a setting does to a step: what is multiplied in which type, what is clipped, what decays, what is dropped."""

from dataclasses import fields
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from products import Products
from tiny import SETTINGS, metrics, weights
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from minibert import BertForMaskedLM, masked_lm
from minibert.cli import build_parser
from minibert.cli.runs import read_settings
from minibert.training import Settings, data, run, step
from minibert.training.data import ALONE, Ranks, Share, Shares, ahead
from minibert.training.run import train_steps
from minibert.training.step import LossSum, accumulate, evaluate, make_optimizer, masked_lines, take_step
from minibert.training.tokens import Lines, TokenFile


@pytest.fixture
def model(tiny):
    return tiny.load()[0].train()


@pytest.fixture
def share(tiny):
    """The first step of a run."""
    corpus = tiny.corpus()
    return Shares(corpus, ALONE, None)[0, 0, next(corpus.steps(0))]


def taken(model, share, number=0, ranks=ALONE, **settings):
    settings = Settings(**{**SETTINGS, **settings})
    return take_step(LossSum(model), make_optimizer(model, settings), share, number, settings, ranks)


def length_of_gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()


def test_a_gradient_that_is_longer_than_clip_is_made_that_long(model, share):
    model.eval()  # no dropout: the gradient of both steps is the same one
    long = taken(model, share, clip=1e-3, learning_rate=1e-20)["gradient_norm"]
    assert length_of_gradient(model) == pytest.approx(1e-3, rel=1e-3)
    assert long > 0.01, "what is reported is its length before"
    assert taken(model, share, clip=1e9)["gradient_norm"] == pytest.approx(long, rel=1e-4)
    assert length_of_gradient(model) == pytest.approx(long, rel=1e-4)  # sums of float32
    assert Settings(steps=1).clip == 1.0


@pytest.mark.parametrize(("given", "decay"), [({}, 0.01), ({"weight_decay": 0.5}, 0.5), ({"weight_decay": 0.0}, 0.0)])
def test_matrices_decay_and_vectors_do_not(given, decay, model, share):
    """Where nothing is asked there is no gradient, and what moves a weight is its decay."""
    nothing = Share(0, 0, share.tokens, [step.Example(one.batch, one.positions[:0], one.targets[:0])
                                         for one in share.passes])  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert taken(model, nothing, number=6, learning_rate=0.1, **given)["loss"] is None
    rate = Settings(**{**SETTINGS, "learning_rate": 0.1}).rate(6)
    assert 0.01 < rate < 0.09, "that of this step"
    for name, parameter in model.named_parameters():
        kept = 1 - rate * decay if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0, msg=name)


def test_adam_has_berts_epsilon(model):
    """The first step of Adam is lr · g / (|g| + ε): half of lr where g is ε = 1e-6."""
    settings = Settings(**SETTINGS, weight_decay=0.0)
    optimizer = make_optimizer(model, settings)
    before = model.head.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    optimizer.step()
    torch.testing.assert_close(before - model.head.bias.detach(), torch.full_like(before, 5e-3 / 2), rtol=1e-3, atol=0)


def test_each_step_seed_and_rank_drops_others_and_the_same_step_the_same(model, share):
    """The learning rate is so small that the weights stay: what differs is dropout."""

    def loss(number=0, rank=0, **settings):
        return taken(model, share, number, Ranks(rank, 1), learning_rate=1e-30, **settings)["loss"]

    assert loss() == loss()
    assert len({loss(), loss(number=1), loss(number=2), loss(seed=1), loss(rank=1)}) == 5
    model.eval()
    assert loss() == loss(number=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_are_multiplied_in_the_type_that_was_asked_for(dtype, model, share):
    with Products() as products:
        taken(model, share, dtype=dtype)
    assert products.dtypes == {getattr(torch, dtype)}, "forward and backward"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_gradients_go_over_the_wire_once_a_step(model, tiny, tmp_path):
    corpus = tiny.corpus()
    passes = Shares(corpus, ALONE, 60)[0, 0, next(corpus.steps(0))].passes
    assert len(passes) > 2
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        objective = DistributedDataParallel(LossSum(model), bucket_cap_mb=1000)
        sent = []

        def hook(_, bucket):
            sent.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        objective.register_comm_hook(None, hook)
        accumulate(objective, passes, 10, "float32", ALONE)
    finally:
        dist.destroy_process_group()
    assert sum(sent) == sum(parameter.numel() for parameter in model.parameters())


def test_nothing_is_asked_of_the_device_before_the_optimizer_is_under_way(model, share, monkeypatch):
    """.item() and .tolist() wait for a GPU."""
    asked, real = [], torch.optim.AdamW.step

    class Questions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in function.__name__ or function.__name__.startswith("nonzero"):
                asked.append(function)
            return function(*args, **(kwargs or {}))

    def step_(*arguments, **settings):
        assert not asked
        return real(*arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_)
    monkeypatch.setattr("minibert.checks.require_positions", lambda *_: None)  # it asks the CPU only
    with Questions():
        torch.ones(1).item()
        assert asked.pop(), "or it would notice nothing"
        taken(model, share)


def test_batches_are_sent_before_they_are_needed_and_in_order(share, tiny):
    """On a device other than the CPU: "meta" here, which has no numbers."""
    corpus = tiny.corpus()
    made = []

    def steps():
        for number, numbers in enumerate(islice(corpus.steps(0), 4)):
            made.append(number)
            yield Shares(corpus, ALONE, 100)[0, number, numbers]

    for number, sent in enumerate(ahead(steps(), torch.device("meta"))):
        assert sent.step_in_epoch == number
        assert len(made) == min(number + 2, 4)
        for example in sent.passes:
            tensors = (example.positions, example.targets, example.batch.input_ids, example.batch.cu_seqlens)
            assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert next(ahead(iter([share]), torch.device("cpu"))) is share


@pytest.mark.parametrize(
    ("asked", "device", "workers"), [(0, "cpu", 0), (2, "cpu", 2), (0, "cuda:0", 1), (3, "cuda:0", 3), (0, "mps", 0)]
)
def test_on_cuda_rows_are_made_while_the_step_is_computed(asked, device, workers, tiny, monkeypatch):
    made = []
    monkeypatch.setattr(data, "DataLoader", lambda *_, num_workers, **more: made.append(num_workers) or ())
    assert not list(data.shares(tiny.corpus(), Settings(steps=1, workers=asked), (0, 0), 1, Ranks(device=device)))
    assert made == [workers]


def test_cuda_fetches_from_pinned_memory_and_nobody_waits(share, monkeypatch):
    pinned, waited = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking=False: waited.append(not non_blocking) or x)
    share.passes[0].to(torch.device("cuda"))
    assert len(pinned) == len(waited) == 2 + 5, "positions, targets, and what a packed batch has"
    assert not any(waited)
    pinned.clear()
    share.passes[0].to(torch.device("mps"))
    assert not pinned, "that is CUDA's alone"


@pytest.mark.parametrize(
    ("asked", "device", "triton", "compiled"),
    [(None, "cuda", True, True), (None, "cuda", False, False), (None, "cpu", True, False), (None, "mps", True, False),
     (True, "cpu", False, True), (False, "cuda", True, False)],
)  # fmt: skip
def test_layers_are_compiled_on_cuda_with_triton_unless_something_else_is_said(
    asked, device, triton, compiled, monkeypatch
):
    monkeypatch.setattr(step, "find_spec", lambda name: object() if triton else None)
    assert step.compiles(Settings(steps=1, compile=asked), torch.device(device)) is compiled


def test_of_several_ranks_gradients_are_a_sum_though_their_mean_is_taken(model, share):
    model.eval()
    lengths = []
    for ranks in (ALONE, Ranks(0, 3)):
        model.zero_grad()
        accumulate(LossSum(model), share.passes, 10, "float32", ranks)
        lengths.append(length_of_gradient(model))
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=1e-5)  # sums of float32


# ------------------------------------------------------------------------------------------- what a run does with them


def run_of(tiny, out, **settings):
    model, tokenizer, files = tiny.load()
    out.mkdir()
    train_steps(model, tokenizer, files, out, Settings(**{**SETTINGS, "steps": 4, **settings}))
    return metrics(out)


@pytest.mark.parametrize("dropout", [True, False])
def test_a_look_at_the_held_out_lines_leaves_dropout_as_it_was(dropout, tiny, tmp_path, monkeypatch):
    modes, real = [], step.accumulate
    monkeypatch.setattr(
        step, "accumulate", lambda objective, *rest: modes.append(objective.model.training) or real(objective, *rest)
    )
    lines = run_of(tiny, tmp_path / "out", dropout=dropout, evaluate_every=1, max_length=9)
    assert modes == [dropout] * 4
    model, tokenizer, files = tiny.load()
    shown = evaluate(model, tokenizer, files, max_length=9)["all"]["masked_tokens"]
    assert {line["held_out"]["all"]["masked_tokens"] for line in lines} == {shown}
    assert shown < evaluate(model, tokenizer, files)["all"]["masked_tokens"], "rows of the length of the run's"
    last = evaluate(BertForMaskedLM.from_pretrained(tmp_path / "out"), tokenizer, files, max_length=9)
    assert lines[-1]["held_out"]["all"]["loss"] == pytest.approx(last["all"]["loss"]), "the look itself has no dropout"


def test_best_is_the_model_with_the_least_loss_on_held_out_lines(tiny, tmp_path, monkeypatch):
    losses, seen = iter([3.0, 2.0, 2.5, 4.0]), []

    def figures(model, *_, **__):
        seen.append(model.head.bias.detach().clone())
        return {"all": {"loss": next(losses), "top1": 0.5, "masked_tokens": 7}}

    monkeypatch.setattr(run, "evaluate", figures)
    run_of(tiny, tmp_path / "out", evaluate_every=1)
    best = BertForMaskedLM.from_pretrained(tmp_path / "out" / "best").head.bias
    assert [torch.equal(best, bias) for bias in seen] == [False, True, False, False]


def test_the_command_compiles_every_layer_if_asked(tiny, tmp_path, monkeypatch):
    compiled = []

    def compile(function, **_):
        def call(*arguments):
            compiled.append(function)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    assert tiny.train(tmp_path / "plain", "--steps", "1") == 0
    assert not compiled
    assert tiny.train(tmp_path / "compiled", "--steps", "1", "--compile") == 0
    assert len({id(function.__self__) for function in compiled}) == tiny.config.num_hidden_layers


@pytest.mark.parametrize("again", [True, False])
def test_the_command_computes_layers_again_if_asked(again, tiny, tmp_path, monkeypatch):
    calls = []
    real = masked_lm.computed_again
    monkeypatch.setattr(masked_lm, "computed_again", lambda *x, **named: calls.append(x) or real(*x, **named))
    assert tiny.train(tmp_path / "out", "--steps", "1", *(["--checkpoint-activations"] if again else [])) == 0
    assert bool(calls) == again


def test_without_dropout_a_run_does_not_depend_on_how_its_steps_are_cut_into_passes(tiny, tmp_path):
    runs = []
    for name, options in (("one", ()), ("many", ("--micro-tokens", "60"))):
        assert tiny.train(tmp_path / name, "--no-dropout", "--steps", "3", *options) == 0
        runs.append(metrics(tmp_path / name))
    for one, many in zip(*runs, strict=True):
        assert (one["masked_tokens"], one["tokens"]) == (many["masked_tokens"], many["tokens"])
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)  # float32: 1e-7, which steps may enlarge
    assert weights(tmp_path / "one") != weights(tmp_path / "many"), "there was only one pass"


def test_a_run_has_the_rows_that_its_settings_say(tiny, tmp_path):
    shape = dict(short_fraction=1.0, max_length=20, tokens_per_step=100, seed=3)
    lines = run_of(tiny, tmp_path / "out", **shape)
    corpus = tiny.corpus(**shape)
    expected = [sum(corpus.lengths(0, numbers)) for numbers in islice(corpus.steps(0), 4)]
    assert [line["tokens"] for line in lines] == expected
    for other in ({"short_fraction": 0.3}, {"max_length": 24}, {"tokens_per_step": 200}, {"seed": 0}):
        corpus = tiny.corpus(**{**shape, **other})
        assert [sum(corpus.lengths(0, numbers)) for numbers in islice(corpus.steps(0), 4)] != expected, other


def test_figures_are_of_as_many_held_out_lines_as_asked(tiny):
    model, tokenizer, _ = tiny.load()
    ids = torch.randint(5, 100, (310 * 7,)).to(torch.uint16)
    lines = Lines(ids, torch.arange(311) * 7)
    file = TokenFile(ids, lines.starts, "text", 1.0, lines, "")

    def masked(number, **settings):
        return len(masked_lines(file, range(number), tokenizer, **{"max_length": 24, **settings}).positions)

    def found(**settings):
        return evaluate(model, tokenizer, [file], **settings)["all"]

    assert found()["masked_tokens"] == masked(300)
    assert found(lines=10)["masked_tokens"] == masked(10) > 0
    assert found(lines=1000)["masked_tokens"] == masked(310)
    assert found(max_length=5)["masked_tokens"] == masked(300, max_length=5) < masked(300)
    assert found(seed=1)["loss"] != found()["loss"]
    example = masked_lines(file, range(100), tokenizer, max_length=24)
    with torch.no_grad():
        model.head.bias[example.targets[0]] += 50  # so that it is the guess everywhere, and right at a few places
    logits = model.predict(example.batch, example.positions)
    figures = found(lines=100)
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, example.targets).item())
    assert figures["top1"] == pytest.approx((logits.argmax(-1) == example.targets).float().mean().item())
    assert 0 < figures["top1"] < 1
    halves = [evaluate(model, tokenizer, [file], ranks=SimpleNamespace(rank=rank, size=2, sum=lambda *n: list(n)))
              for rank in (0, 1)]  # fmt: skip
    assert sum(half["all"]["masked_tokens"] for half in halves) == found()["masked_tokens"]
    assert min(half["all"]["masked_tokens"] for half in halves) > 0


def test_every_setting_of_the_command_arrives():
    given = dict(steps=7, tokens_per_step=300, max_length=30, learning_rate=0.5, schedule="cosine", warmup=0.25)
    given |= dict(dtype="float32", seed=9, micro_tokens=40, workers=3, save_every=11, evaluate_every=13)
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--no-dropout", "--checkpoint-activations", "--compile"]
    parser = build_parser()
    settings = read_settings(parser.parse_args(["train", "text", "--init", "m", "--out", "o", *words]), Settings)
    given |= dict(dropout=False, checkpoint_activations=True, compile=True)
    assert {name: getattr(settings, name) for name in given} == given
    least = read_settings(parser.parse_args(["train", "text", "--init", "m", "--out", "o", "--steps", "7"]), Settings)
    assert least == Settings(steps=7), "what is not given is as the function has it"
    assert {field.name for field in fields(Settings)} - set(given) == {"short_fraction", "weight_decay", "clip"}
