"""One step: what each setting does to it; and that it is the same step, however it is computed."""

from dataclasses import fields
from functools import partial
from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from products import Products
from tiny import SETTINGS
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from minibert.cli import build_parser
from minibert.cli.runs import read_settings
from minibert.training import Settings, data, step
from minibert.training.data import ALONE, Example, Ranks, Share, Shares, ahead
from minibert.training.step import (
    LossSum,
    accumulate,
    evaluate,
    make_optimizer,
    masked_lines,
    take_step,
    wrapped_layers,
)
from minibert.training.tokens import Lines, TokenFile


@pytest.fixture
def model(tiny):
    return tiny.load()[0].train()


@pytest.fixture
def share(tiny):
    """The first step of a run."""
    corpus = tiny.corpus()
    return Shares(corpus, ALONE, None)[0, 0, next(corpus.steps(0))]


@pytest.fixture
def corpus(tiny):
    """With large steps."""
    return tiny.corpus(tokens_per_step=2000)


def taken(model, share, number=0, ranks=ALONE, **settings):
    settings = Settings(**{**SETTINGS, **settings})
    return take_step(LossSum(model), make_optimizer(model, settings), share, number, settings, ranks)


def length_of_gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()


def gradients(model, passes, targets):
    model.zero_grad()
    loss = accumulate(LossSum(model), passes, targets, "float32", ALONE)
    return loss.item() / targets, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def require_near(found, expected, tolerance):
    """Each gradient, relative to its largest entry."""
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


# ----------------------------------------------------------------------------------------------- what the settings say


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
    passes = [Example(one.batch, one.positions[:0], one.targets[:0]) for one in share.passes]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert taken(model, Share(0, 0, share.tokens, passes), number=6, learning_rate=0.1, **given)["loss"] is None
    rate = Settings(**{**SETTINGS, "learning_rate": 0.1}).rate(6)
    assert 0.01 < rate < 0.09, "that of this step"
    for name, parameter in model.named_parameters():
        kept = 1 - rate * decay if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0, msg=name)


def test_adam_has_berts_epsilon(model):
    """The first step of Adam is lr · g / (|g| + ε): half of lr where g is ε = 1e-6."""
    optimizer = make_optimizer(model, Settings(**SETTINGS, weight_decay=0.0))
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


def test_in_training_elements_are_dropped_at_the_models_rate(model, corpus):
    """The stand-in for nn.Dropout on the CPU: in training only, and everywhere the model has dropout."""
    batch = corpus.examples(0, range(20)).batch
    drawn = []
    with wrapped_layers(model):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout) and not name.endswith("attention.dropout"):  # for each sequence
                module.register_forward_hook(lambda module, _, y: drawn.append((y == 0).float().mean().item()))
        model.encode(batch)
        assert len(drawn) == 1 + 2 * 2
        # 5 places, of some 400 tokens × 32
        assert all(share == pytest.approx(0.1, abs=5 * (0.09 / (batch.num_tokens * 32)) ** 0.5) for share in drawn)
        assert not torch.equal(model.encode(batch), model.encode(batch))
        model.eval()
        drawn.clear()
        assert torch.equal(model.encode(batch), model.encode(batch))
        assert max(drawn) < 1e-3


def test_the_learning_rate_rises_and_falls():
    for schedule, quarter in (("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2)):
        settings = Settings(steps=200, learning_rate=5e-3, schedule=schedule, warmup=0.05)
        rates = [settings.rate(step) for step in range(200)]
        assert rates[:10] == pytest.approx([5e-3 * step / 10 for step in range(1, 11)])
        assert rates[10] == pytest.approx(5e-3)
        assert rates[10 + 95] == pytest.approx(2.5e-3), "a line and half a cosine are both at half their height"
        assert rates[10 + 47] == pytest.approx(5e-3 * quarter, rel=0.01)  # 47 of 190 is about a quarter
        assert 0 < rates[-1] < 1e-4


def test_every_setting_of_the_command_arrives():
    given = dict(steps=7, tokens_per_step=300, max_length=30, learning_rate=0.5, schedule="cosine", warmup=0.25)
    given |= dict(dtype="float32", seed=9, micro_tokens=40, workers=3, save_every=11, evaluate_every=13)
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--no-dropout", "--checkpoint-activations", "--compile"]
    given |= dict(dropout=False, checkpoint_activations=True, compile=True)

    def read(*words):
        return read_settings(
            build_parser().parse_args(["train", "text", "--init", "m", "--out", "o", *words]), Settings
        )

    settings = read(*words)
    assert {name: getattr(settings, name) for name in given} == given
    assert read("--steps", "7") == Settings(steps=7), "what is not given is as the function has it"
    assert {field.name for field in fields(Settings)} - set(given) == {"short_fraction", "weight_decay", "clip"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("clip", 0), ("clip", float("inf")), ("weight_decay", -1), ("short_fraction", 1.5), ("dtype", "float16")],
)
def test_settings_without_an_option_are_checked_too(key, value):
    with pytest.raises(ValueError, match=f"{key}.* not .?{value}"):
        Settings(steps=1, **{key: value})


# ------------------------------------------------------------------------------------------- one step, however computed


def test_accumulation_is_exact(model, corpus):
    """One pass of 64 rows, and four of 16, in float64: what is left is its rounding, and not a mean of means."""
    model.double().eval()
    numbers = list(range(64))
    at_once = corpus.examples(0, numbers)
    in_four = [corpus.examples(0, numbers[at : at + 16]) for at in range(0, 64, 16)]
    counts = [len(example.targets) for example in in_four]
    assert sum(counts) == len(at_once.targets)
    assert len(set(counts)) > 1, "with equal counts a mean of means would be right too"
    loss, expected = gradients(model, [at_once], sum(counts))
    again, found = gradients(model, in_four, sum(counts))
    assert again == pytest.approx(loss, rel=1e-14)
    # Rounding of float64 is 1e-16; a sum over a thousand tokens, relative to the largest entry, loses a few digits.
    require_near(found, expected, 1e-13)
    logits = model.predict(at_once.batch, at_once.positions)
    assert loss == pytest.approx(cross_entropy(logits, at_once.targets).item(), rel=1e-12)


def test_the_passes_of_all_ranks_are_the_step(model, corpus):
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
    idle = Shares(corpus, Ranks(2, 3), None)[0, 0, next(corpus.steps(0))[:2]]
    loss, found = gradients(model, idle.passes, 10)
    assert loss == 0, "a rank without rows takes part, with a gradient of nothing"
    assert all(not gradient.any() for gradient in found.values())


def test_of_several_ranks_gradients_are_a_sum_though_their_mean_is_taken(model, share):
    model.eval()
    lengths = []
    for ranks in (ALONE, Ranks(0, 3)):
        model.zero_grad()
        accumulate(LossSum(model), share.passes, 10, "float32", ranks)
        lengths.append(length_of_gradient(model))
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=1e-5)  # sums of float32


def test_gradients_go_over_the_wire_once_a_step(model, tiny, tmp_path):
    corpus = tiny.corpus()
    passes = Shares(corpus, ALONE, 60)[0, 0, next(corpus.steps(0))].passes
    assert len(passes) > 2
    sent = []

    def hook(_, bucket):
        sent.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        objective = DistributedDataParallel(LossSum(model), bucket_cap_mb=1000)
        objective.register_comm_hook(None, hook)
        accumulate(objective, passes, 10, "float32", ALONE)
    finally:
        dist.destroy_process_group()
    assert sum(sent) == sum(parameter.numel() for parameter in model.parameters())


def test_activations_computed_again_give_the_same_gradients_and_keep_less(model, corpus):
    passes = [corpus.examples(0, range(20))]
    results, kept = [], []
    for again in (False, True):
        sizes = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x)
        torch.manual_seed(0)  # dropout too
        with wrapped_layers(model, checkpoint_activations=again), keep:
            results.append(gradients(model, passes, 50))
        kept.append(sum(sizes))
    (loss, plain), (loss_again, found) = results
    assert loss == loss_again
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert kept[1] < 0.6 * kept[0]
    assert not any("forward" in vars(module) for module in model.modules()), "the model is as it was"


@pytest.mark.slow
def test_compiled_layers_compute_the_same(model, corpus, monkeypatch):
    # The back end that needs no C++ compiler, and no minute: what is tested is what torch makes graphs of.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model.eval()
    for batch in range(4):
        passes = [corpus.examples(0, range(10 * batch, 10 * batch + 7 + batch))]
        loss, expected = gradients(model, passes, 50)
        with wrapped_layers(model, compile=True, checkpoint_activations=batch % 2 == 1):
            again, found = gradients(model, passes, 50)
        assert again == pytest.approx(loss, rel=1e-6)  # float32
        require_near(found, expected, 1e-5)


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


# -------------------------------------------------------------------------------------------------------------- on GPUs


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
    corpus, made = tiny.corpus(), []

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


def test_cuda_fetches_from_pinned_memory_and_nobody_waits(share, monkeypatch):
    pinned, waited = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking=False: waited.append(not non_blocking) or x)
    _ = share.passes[0].batch.compact_index  # a model has computed with it: that is not sent
    share.passes[0].to(torch.device("cuda"))
    assert len(pinned) == len(waited) == 2 + 5, "positions, targets, and what a packed batch has"
    assert not any(waited)
    share.passes[0].to(torch.device("mps"))
    assert len(pinned) == 7, "that is CUDA's alone"


@pytest.mark.parametrize(
    ("asked", "device", "workers"), [(0, "cpu", 0), (2, "cpu", 2), (0, "cuda:0", 1), (3, "cuda:0", 3), (0, "mps", 0)]
)
def test_on_cuda_rows_are_made_while_the_step_is_computed(asked, device, workers, tiny, monkeypatch):
    made = []
    monkeypatch.setattr(data, "DataLoader", lambda *_, num_workers, **more: made.append(num_workers) or ())
    assert not list(data.shares(tiny.corpus(), Settings(steps=1, workers=asked), (0, 0), 1, Ranks(device=device)))
    assert made == [workers]


# ------------------------------------------------------------------------------------------------------ held-out lines


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
    halves = [SimpleNamespace(rank=rank, size=2, sum=lambda *numbers: list(numbers)) for rank in (0, 1)]
    counts = [found(ranks=half)["masked_tokens"] for half in halves]
    assert min(counts) > 0
    assert sum(counts) == masked(300), "the ranks share the work"
    example = masked_lines(file, range(100), tokenizer, max_length=24)
    with torch.no_grad():
        model.head.bias[example.targets[0]] += 50  # so that it is the guess everywhere, and right at a few places
    logits = model.predict(example.batch, example.positions)
    figures = found(lines=100)
    assert figures["loss"] == pytest.approx(cross_entropy(logits, example.targets).item())
    assert figures["top1"] == pytest.approx((logits.argmax(-1) == example.targets).float().mean().item())
    assert 0 < figures["top1"] < 1
