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
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def ours():
    return twins(SIZES)[0]


@pytest.fixture
def fast(ours):
    """With words in two orders: one to look them up, one for the head."""
    return prepare_for_inference(ours, linear=form_or_skip("product")[1])


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
    expected, before = answers(fast), answers(ours)
    for name in ours.state_dict():
        data = ours.get_parameter(name).data
        data.copy_(torch.randn_like(data))  # not a constant: LayerNorm would take that off again
        after = answers(ours)
        assert not equal(after, before), f"the edit of {name} has no effect on the original either"
        assert equal(answers(fast), expected), name
        before = after
    assert not equal(answers(prepare_for_inference(ours, dtype, linear=linear)), expected), "prepared anew"


def test_prepared_in_inference_mode_and_used_outside_it(ours):
    expected = answers(prepare_for_inference(ours, linear="torch"))
    with torch.inference_mode():
        fast = prepare_for_inference(ours, linear="torch")
    assert fast(IDS).logits.shape == (1, 3, 99)
    assert equal(answers(fast), expected)


def test_preparing_twice_gives_it_back(ours):
    for dtype, other in ((torch.float32, torch.int8), (torch.int8, torch.float32)):
        fast = prepare_for_inference(ours, dtype)
        assert prepare_for_inference(fast) is prepare_for_inference(fast, dtype, linear=fast.linear) is fast
        with pytest.raises(ValueError, match=rf"in {dtype} with .*: for {other} .*, prepare the one it was made from"):
            prepare_for_inference(fast, other)
    with pytest.raises(ValueError, match="prepare the one it was made from"):
        prepare_for_inference(prepare_for_inference(ours, torch.float64), linear="product")


REFUSED = {
    "train": (lambda fast: fast.train(), "train the one"),
    "requires_grad_": (lambda fast: fast.requires_grad_(), "train the one"),
    "checkpointing": (lambda fast: fast.gradient_checkpointing_enable(), "train the one"),
    "optimizer": (lambda fast: torch.optim.AdamW(fast.parameters()), "ask the one"),
    "num_parameters": (lambda fast: fast.num_parameters(), "ask the one"),
    "state_dict": (lambda fast: fast.state_dict(), "ask the one"),
    "a part's state_dict": (lambda fast: fast.layers.state_dict(), "ask the one"),
    "a part's half": (lambda fast: fast.head.half(), "convert the one"),
    "load_state_dict": (lambda fast: fast.load_state_dict({}), "load them into the one"),
    "resize": (lambda fast: fast.resize_token_embeddings(9), "resize the one"),
    "save_pretrained": (lambda fast: fast.save_pretrained("nowhere"), "save the one"),
    "pickle": (lambda fast: pickle.dumps(fast), "copy or save the one"),
    "deepcopy": (lambda fast: copy.deepcopy(fast), "copy or save the one"),
    "to": (lambda fast: fast.to("cpu"), "move or convert the one"),
    "half": (lambda fast: fast.half(), "move or convert the one"),
    "a hook on a layer": (lambda fast: fast.layers[0].register_forward_hook(print), "register it on the one"),
    "a hook before attention": (lambda fast: fast.layers[0].attention.register_forward_pre_hook(print), "on the one"),
    "a recording": (lambda fast: torch.jit.trace(fast, IDS, strict=False), "export or trace the one"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_refuses_says_where_it_works(what, fast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = answers(fast)
    attempt, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        attempt(fast)
    assert equal(answers(fast), expected), "it is what it was"
    assert not list(tmp_path.iterdir())


def test_what_still_works(ours, fast):
    assert isinstance(fast, PreparedBert)
    assert fast.eval() is fast.train(False) is fast.requires_grad_(False) is fast
    assert (fast.config, fast.load_report) == (ours.config, ours.load_report)
    assert (fast.device.type, len(fast.layers[:1])) == ("cpu", 1)
    expected = answers(fast)
    for part in fast.children():
        part.train()
    assert equal(answers(fast), expected), "nothing is dropped, whatever happens to a part"
    called = []
    fast.register_forward_hook(lambda *given: called.append(1))
    fast(IDS)
    assert called, "a hook on the whole model is called, and stays allowed"


def test_word_embeddings_that_were_changed_are_noticed(fast):
    """The head has a copy of them in another order: it would still answer with the old words."""
    with torch.no_grad():
        fast.embeddings.word.weight[7] += 1
    with pytest.raises(ValueError, match="change them in the model it was made from"):
        fast.predict(BATCH, POSITIONS)


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
    "a hook": lambda model: model.layers[1].feed_forward.register_forward_hook(lambda *given: 2 * given[-1]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("config", ["batch 13, gelu", "3 heads, gelu_new"])
def test_what_was_changed_is_named(change, config):
    """Prepared, it would be what its configuration says."""
    model = copy.deepcopy(twins(CONFIGS[config])[0])
    prepare_for_inference(model)
    CHANGES[change](model)
    sentence = r"1\.feed_forward has a forward hook" if change == "a hook" else "is not as the configuration has it"
    with pytest.raises(ValueError, match=sentence):
        prepare_for_inference(model)


def test_training_and_activation_checkpointing_change_no_number(ours):
    expected = answers(prepare_for_inference(ours.train(), linear="torch"))
    assert ours.training, "it stays in its mode"
    ours.gradient_checkpointing_enable()
    assert equal(answers(prepare_for_inference(ours, linear="torch")), expected)
