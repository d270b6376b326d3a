"""A prepared model stays what it is: no change of the original reaches it, and it refuses what it cannot do."""

import copy
import pickle

import pytest
import torch
from forms import FORMS, floating, form_or_skip
from torch import nn
from twins import CONFIGS, twins

from minibert import BertForMaskedLM, PackedBatch
from minibert.inference import PreparedBert, prepare_for_inference

pytestmark = pytest.mark.usefixtures("exact_products")
SIZES = {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 2}
BATCH = PackedBatch.from_lists([[5, 6, 7, 8], [9, 10]], [[0, 0, 1, 1], [1, 0]])
POSITIONS = torch.tensor([1, 5])
NAMES = list(BertForMaskedLM(twins(SIZES)[0].config).state_dict())


def answers(model):
    with torch.no_grad():
        return model.predict(BATCH, POSITIONS).clone(), model.encode(BATCH).clone()


def equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_an_edit_of_any_tensor_does_not_reach_it(form):
    """`.data` is the hard one: torch does not count such edits."""
    dtype, linear = form_or_skip(form)
    ours = twins(SIZES, dtype=floating(dtype))[0]
    fast = prepare_for_inference(ours, dtype, linear=linear)
    expected = answers(fast)
    before = answers(ours)
    for name in NAMES:
        data = ours.get_parameter(name).data
        data.copy_(torch.randn_like(data))  # not a constant: LayerNorm would take that off again
        after = answers(ours)
        assert not equal(after, before), f"the edit of {name} has no effect on the original either"
        assert equal(answers(fast), expected), name
        before = after


def assign(ours, other):
    ours.load_state_dict({name: tensor.detach() for name, tensor in other.state_dict().items()}, assign=True)


def train_on(ours, other):
    optimizer = torch.optim.AdamW(ours.train().parameters(), 1e-1)
    for _ in range(2):
        ours(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[8, 9, 10]])).loss.backward()
        optimizer.step()
    ours.eval()


@pytest.mark.parametrize("change", [assign, train_on])
@pytest.mark.parametrize("form", FORMS)
def test_other_weights_do_not_reach_it(form, change):
    dtype, linear = form_or_skip(form)
    ours, other = twins(SIZES, dtype=floating(dtype))[0], BertForMaskedLM(twins(SIZES)[0].config).to(floating(dtype))
    fast = prepare_for_inference(ours, dtype, linear=linear)
    before, expected = answers(ours), answers(fast)
    change(ours, other)
    assert not equal(answers(ours), before)
    assert equal(answers(fast), expected)
    anew = prepare_for_inference(ours, dtype, linear=linear)
    assert not equal(answers(anew), expected)


def test_prepared_in_inference_mode_and_used_outside_it():
    ours = twins(SIZES)[0]
    expected = answers(prepare_for_inference(ours, linear="torch"))
    with torch.inference_mode():
        fast = prepare_for_inference(ours, linear="torch")
    assert fast(torch.tensor([[5, 6]])).logits.shape == (1, 2, 99)
    assert equal(answers(fast), expected)


def test_an_original_in_training_mode_stays_in_it():
    ours = twins(SIZES)[0].train()
    fast = prepare_for_inference(ours)
    assert ours.training
    assert equal(answers(fast), answers(fast)), "no dropout"


def test_preparing_twice_gives_it_back():
    ours = twins(SIZES)[0]
    fast = prepare_for_inference(ours)
    assert prepare_for_inference(fast) is fast
    assert prepare_for_inference(fast, torch.float32, linear=fast.linear) is fast
    with pytest.raises(ValueError, match=r"in torch\.float32 with .*: for torch\.float64 .* the one it was made from"):
        prepare_for_inference(fast, torch.float64)
    with pytest.raises(ValueError, match="prepare the one it was made from"):
        prepare_for_inference(prepare_for_inference(ours, torch.float64), linear="product")


REFUSED = {
    "train": (lambda fast: fast.train(), "train the one"),
    "requires_grad_": (lambda fast: fast.requires_grad_(), "train the one"),
    "optimizer": (lambda fast: torch.optim.AdamW(fast.parameters()), "ask the one"),
    "num_parameters": (lambda fast: fast.num_parameters(), "ask the one"),
    "state_dict": (lambda fast: fast.state_dict(), "ask the one"),
    "state_dict of a part": (lambda fast: fast.layers[0].state_dict(), "ask the one"),
    "load_state_dict": (lambda fast: fast.load_state_dict({}), "load them into the one"),
    "resize": (lambda fast: fast.resize_token_embeddings(9), "resize the one"),
    "checkpointing": (lambda fast: fast.gradient_checkpointing_enable(), "train the one"),
    "save_pretrained": (lambda fast: fast.save_pretrained("nowhere"), "save the one"),
    "pickle": (lambda fast: pickle.dumps(fast), "copy or save the one"),
    "deepcopy": (lambda fast: copy.deepcopy(fast), "copy or save the one"),
    "deepcopy of a part": (lambda fast: copy.deepcopy(fast.head), "copy or save the one"),
    "to": (lambda fast: fast.to("cpu"), "move or convert the one"),
    "half": (lambda fast: fast.half(), "move or convert the one"),
    "half of a part": (lambda fast: fast.layers[1].half(), "move or convert the one"),
    "a hook on a layer": (lambda fast: fast.layers[0].register_forward_hook(print), "register it on the one"),
    "a hook before attention": (lambda fast: fast.layers[0].attention.register_forward_pre_hook(print), "on the one"),
    "a recording": (
        lambda fast: torch.jit.trace(fast, torch.tensor([[5, 6]]), strict=False),
        "export or trace the one",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_refuses_says_where_it_works(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast = prepare_for_inference(twins(SIZES)[0], linear=form_or_skip("product")[1])
    expected = answers(fast)
    attempt, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        attempt(fast)
    assert equal(answers(fast), expected), "it is what it was"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["product", "torch"])
def test_what_still_works(form):
    ours = twins(SIZES)[0]
    fast = prepare_for_inference(ours, linear=form_or_skip(form)[1])
    assert isinstance(fast, PreparedBert)
    assert fast.eval() is fast.train(False) is fast.requires_grad_(False) is fast
    assert fast.config == ours.config
    assert fast.load_report is ours.load_report
    assert fast.embeddings.word.weight.device.type == "cpu"
    assert len(fast.layers[:1]) == 1
    called = []
    fast.register_forward_hook(lambda *given: called.append(1))
    fast(torch.tensor([[5, 6]]))
    assert called, "a hook on the whole model is called, and stays allowed"
    expected = answers(fast)
    fast.embeddings.train()
    assert equal(answers(fast), expected), "there is no dropout to turn on"


def test_word_embeddings_that_were_changed_are_noticed():
    """The head has a copy of them in another order: it would still answer with the old words."""
    fast = prepare_for_inference(twins(SIZES)[0], linear=form_or_skip("product")[1])
    with torch.no_grad():
        fast.embeddings.word.weight[7] += 1
    with pytest.raises(ValueError, match="change them in the model it was made from"):
        fast.predict(BATCH, POSITIONS)


def test_hooks_of_the_original_would_be_lost():
    ours = twins(SIZES)[0]
    handle = ours.layers[1].feed_forward.register_forward_hook(lambda part, given, result: 2 * result)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward has a forward hook"):
        prepare_for_inference(ours)
    handle.remove()
    prepare_for_inference(ours)


# ------------------------------------------------------------------------- a model that somebody has changed is refused


class Zero(BertForMaskedLM):
    def encode(self, batch):
        return super().encode(batch) * 0


CHANGES = {
    "activation": lambda model: setattr(model.layers[1].feed_forward, "activation", nn.Tanh()),
    "eps": lambda model: setattr(model.layers[0].attention_LayerNorm, "eps", 1e-3),
    "head": lambda model: setattr(model.head, "activation", torch.relu),
    "heads": lambda model: setattr(model.layers[0].attention, "num_heads", 2),
    "encode": lambda model: setattr(model, "__class__", Zero),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("config", ["batch 13, gelu", "3 heads, gelu_new"])
def test_what_was_changed_is_named(change, config):
    """Prepared, it would be what its configuration says."""
    model = copy.deepcopy(twins(CONFIGS[config])[0])
    prepare_for_inference(model)
    CHANGES[change](model)
    with pytest.raises(ValueError, match="is not as the configuration has it"):
        prepare_for_inference(model)


def test_activation_checkpointing_changes_no_number():
    model = twins(SIZES)[0]
    expected = answers(prepare_for_inference(model, linear="torch"))
    model.gradient_checkpointing_enable()
    assert equal(answers(prepare_for_inference(model, linear="torch")), expected)
