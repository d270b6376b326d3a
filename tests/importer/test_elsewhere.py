"""Training by other programs: transformers' Trainer, PEFT, FSDP2, DistributedDataParallel."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from twins import CONFIGS, make_batch, pack, twins

import minibert
from minibert import BertForMaskedLM

SIZES = {
    **CONFIGS["batch 13, gelu"],
    **dict(num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}
GIVEN = make_batch(SIZES, "right", (8, 7))


@pytest.fixture
def pair():
    return twins(SIZES)


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def require_same_gradients(one, other):
    for got, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)  # sums in other orders


# ------------------------------------------------------------------------------------------------ transformers' Trainer


def for_trainer(model):
    """In the class that the cookbook shows."""
    page = (Path(minibert.__file__).parent / "cookbook.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^(class ForTrainer.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = {"torch": torch, "nn": nn}
    exec(block, names)
    return names["ForTrainer"](model)


def trained(model, out, resume=None, **settings):
    """The losses of each step, and the one of the evaluation."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {name: torch.randint(5, 99, (7,), generator=generator) for name in ("input_ids", "labels")} for _ in range(16)
    ]
    arguments = transformers.TrainingArguments(
        str(out),
        **dict(max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-3),
        **dict(lr_scheduler_type="constant", use_cpu=True, report_to=[], disable_tqdm=True, seed=3, **settings),
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6
    return [*losses, trainer.evaluate()["eval_loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}])
def test_the_trainer_trains_as_it_trains_transformers_own(settings, pair, tmp_path):
    ours, theirs = pair
    got = trained(for_trainer(ours), tmp_path / "ours", **settings)
    theirs.accepts_loss_kwargs = False  # the mean of each pass, as for any other model
    expected = trained(theirs, tmp_path / "theirs", **settings)
    assert got == pytest.approx(expected, abs=2e-5)  # six steps of AdamW, whose first ones amplify rounding
    assert got[5] < got[0]


def test_the_trainer_goes_on_where_it_was(pair, tmp_path):
    ours, again = pair[0], copy.deepcopy(pair[0])
    expected = trained(for_trainer(ours), tmp_path)
    assert trained(for_trainer(again), tmp_path, resume=str(tmp_path / "checkpoint-3")) == expected
    assert same(again, ours)


# ----------------------------------------------------------------------------------------------------------------- PEFT

EACH = ["qkv", "attention.output", "feed_forward.intermediate", "feed_forward.output"]


@pytest.mark.parametrize(("targets", "count"), [(EACH, 12), ("all-linear", 13)])
def test_lora_learns_is_saved_and_merged(targets, count, pair, tmp_path):
    peft = pytest.importorskip("peft")
    ours, fresh = pair[0], copy.deepcopy(pair[0])
    before = ours(**GIVEN).loss.item()
    model = peft.get_peft_model(ours, peft.LoraConfig(target_modules=targets, r=2))
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == count
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        model(**GIVEN).loss.backward()
        optimizer.step()
    with torch.no_grad():  # as the adapter that is loaded, which is frozen: with gradients, attention rounds otherwise
        after = model(**GIVEN).loss.item()
    assert after < before
    with pytest.raises(ValueError, match="of an adapter: merge it"):
        ours.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert again(**GIVEN).loss.item() == after
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = BertForMaskedLM.from_pretrained(tmp_path / "merged")
    assert merged(**GIVEN).loss.item() == pytest.approx(after, abs=1e-5)  # one sum in another order


def test_lora_with_activation_checkpointing(pair):
    """PEFT then hooks the embeddings, so the padding is computed too."""
    peft = pytest.importorskip("peft")
    found = []
    for ours in (pair[0], copy.deepcopy(pair[0])):
        if found:
            ours.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model = peft.get_peft_model(ours, peft.LoraConfig(target_modules=["qkv"], r=2))
        model(**GIVEN).loss.backward()
        found.append(nn.ParameterList(x for x in model.parameters() if x.requires_grad))
    require_same_gradients(*found)


# ------------------------------------------------------------------------------------------------ torch's own, for many


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("parts", ["layers model", "layers head model", "layers head"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_fsdp_with_mixed_precision(parts, recomputed, pair, mesh):
    ours, whole = pair[0], copy.deepcopy(pair[0])
    whole(**GIVEN).loss.backward()
    if recomputed:
        ours.gradient_checkpointing_enable()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in parts.split():
        for module in {"layers": ours.layers, "head": [ours.head], "model": [ours]}[part]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    out = ours(**GIVEN)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    for name, parameter in ours.named_parameters():
        got, expected = parameter.grad, whole.get_parameter(name).grad
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        assert parameter.dtype == got.dtype == torch.float32
        # bfloat16 has 8 bits; a gradient is a sum of many products of such numbers.
        assert (got - expected).abs().max() <= 0.1 * expected.abs().max() + 1e-4, name


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fsdp_with_the_packed_call(pair, mesh):
    ours, expected = pair[0], copy.deepcopy(pair[0]).predict(pack(GIVEN), torch.tensor([0, 3]))
    for module in [*ours.layers, ours]:
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(ours, "predict")
    torch.testing.assert_close(ours.predict(pack(GIVEN), torch.tensor([0, 3])), expected)


def test_distributed_data_parallel_has_the_gradients_of_the_model(pair, mesh):
    ours, whole = pair[0], copy.deepcopy(pair[0])
    whole(**GIVEN).loss.backward()
    DistributedDataParallel(ours)(**GIVEN).loss.backward()
    require_same_gradients(ours, whole)


def test_an_optimizers_state_is_set_again_for_a_module_around_the_model(pair):
    models = [for_trainer(pair[0]), for_trainer(copy.deepcopy(pair[0]))]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]

    def step(number):
        optimizers[number].zero_grad()
        models[number](**GIVEN)[0].backward()
        optimizers[number].step()

    step(0)
    weights, state = get_state_dict(models[0], optimizers[0])
    set_state_dict(models[1], optimizers[1], model_state_dict=weights, optim_state_dict=copy.deepcopy(state))
    step(0), step(1)
    assert same(*models)
    with pytest.raises(RuntimeError, match="Missing optimizer state"):  # of the model itself, and not in silence
        set_state_dict(pair[0], optimizers[0], model_state_dict=pair[0].state_dict(), optim_state_dict=state)


# -------------------------------------------------------------------------------------- what explains; other processes


@pytest.mark.slow
def test_captum_shares_an_answer_out_among_the_tokens(pair):
    attr = pytest.importorskip("captum.attr")
    ids, mask = GIVEN["input_ids"], GIVEN["attention_mask"]
    answer = lambda ids, mask: pair[0](ids, attention_mask=mask).logits[:, 0, 7]  # noqa: E731
    shares = attr.LayerIntegratedGradients(answer, pair[0].embeddings).attribute(
        ids, baselines=torch.zeros_like(ids), additional_forward_args=(mask,), n_steps=64
    )
    assert shares.shape == (*ids.shape, SIZES["hidden_size"])
    expected = answer(ids, mask) - answer(torch.zeros_like(ids), mask)
    torch.testing.assert_close(shares.sum((1, 2)).float(), expected, rtol=0.05, atol=0.05)  # 64 steps of an integral


@pytest.mark.slow
def test_a_process_that_is_spawned_has_the_same_answers(pair):
    model, batch, positions = pair[0].requires_grad_(False), pack(GIVEN), torch.arange(3)
    expected = model.predict(batch, positions)  # used before: a fork would not survive that
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(model.predict, (batch, positions)), expected)
