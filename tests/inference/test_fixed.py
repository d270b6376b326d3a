"""A prepared model stays what it is: no change of the original reaches it, and it refuses what it cannot do."""

import copy
import io
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


def noise_like(tensor):
    return torch.randn_like(tensor)  # not a constant: LayerNorm would take that off again


def in_place(model, name):
    with torch.no_grad():
        model.state_dict()[name].add_(noise_like(model.state_dict()[name]))


def through_data(model, name):
    parameter = model.get_parameter(name)
    parameter.data.copy_(noise_like(parameter))


@pytest.mark.parametrize("edit", [in_place, through_data])
@pytest.mark.parametrize("form", FORMS)
def test_an_edit_of_any_tensor_does_not_reach_it(form, edit):
    """`.data` is the hard one: torch does not count such edits."""
    dtype, linear = form_or_skip(form)
    ours = twins(SIZES, dtype=floating(dtype))[0]
    fast = prepare_for_inference(ours, dtype, linear=linear)
    expected = answers(fast)
    before = answers(ours)
    for name in NAMES:
        edit(ours, name)
        after = answers(ours)
        assert not equal(after, before), f"the edit of {name} has no effect on the original either"
        assert equal(answers(fast), expected), name
        before = after


def load(ours, other):
    ours.load_state_dict(other.state_dict())


def assign(ours, other):
    ours.load_state_dict({name: tensor.detach() for name, tensor in other.state_dict().items()}, assign=True)


def point_elsewhere(ours, other):
    for name, parameter in ours.named_parameters():
        parameter.data = other.get_parameter(name).data


def train_on(ours, other):
    optimizer = torch.optim.AdamW(ours.train().parameters(), 1e-1)
    for _ in range(2):
        ours(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[8, 9, 10]])).loss.backward()
        optimizer.step()
    ours.eval()


@pytest.mark.parametrize("change", [load, assign, point_elsewhere, train_on])
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
    "train": (lambda fast, _: fast.train(), "train the one"),
    "train a part": (lambda fast, _: fast.embeddings.train(), "train the one"),
    "requires_grad_": (lambda fast, _: fast.requires_grad_(), "train the one"),
    "optimizer": (lambda fast, _: torch.optim.AdamW(fast.parameters()), "ask the one"),
    "count": (lambda fast, _: sum(x.numel() for x in fast.parameters()), "ask the one"),
    "named_parameters": (lambda fast, _: dict(fast.named_parameters()), "ask the one"),
    "state_dict": (lambda fast, _: fast.state_dict(), "ask the one"),
    "state_dict of a part": (lambda fast, _: fast.layers[0].state_dict(), "ask the one"),
    "load_state_dict": (lambda fast, ours: fast.load_state_dict(ours.state_dict()), "load them into the one"),
    "from_pretrained": (lambda fast, _: fast.from_pretrained("minibert-uncased"), "BertForMaskedLM.from_pretrained"),
    "save_pretrained": (lambda fast, _: fast.save_pretrained("nowhere"), "save the one"),
    "save": (lambda fast, _: torch.save(fast, io.BytesIO()), "copy or save the one"),
    "pickle": (lambda fast, _: pickle.dumps(fast), "copy or save the one"),
    "deepcopy": (lambda fast, _: copy.deepcopy(fast), "copy or save the one"),
    "copy": (lambda fast, _: copy.copy(fast), "copy or save the one"),
    "deepcopy of a part": (lambda fast, _: copy.deepcopy(fast.head), "copy or save the one"),
    "to": (lambda fast, _: fast.to("cpu"), "move or convert the one"),
    "half": (lambda fast, _: fast.half(), "move or convert the one"),
    "double": (lambda fast, _: fast.double(), "move or convert the one"),
    "cuda": (lambda fast, _: fast.cuda(), "move or convert the one"),
    "half of a part": (lambda fast, _: fast.layers[1].half(), "move or convert the one"),
    "share_memory": (lambda fast, _: fast.share_memory(), "move or convert the one"),
    "compile": (lambda fast, _: fast.compile(), "compile the one"),
    "forward hook": (lambda fast, _: fast.layers[0].register_forward_hook(print), "register it on the one"),
    "forward pre-hook": (lambda fast, _: fast.layers[0].attention.register_forward_pre_hook(print), "on the one"),
    "backward hook": (lambda fast, _: fast.head.register_full_backward_hook(print), "register it on the one"),
    "another head": (lambda fast, ours: setattr(fast, "head", ours.head), "change 'head' of the one"),
    "another layer": (lambda fast, ours: fast.layers.__setitem__(0, ours.layers[0]), "change '0' of the one"),
    "another tensor": (
        lambda fast, ours: setattr(fast.embeddings.LayerNorm, "weight", ours.embeddings.LayerNorm.weight),
        "change 'weight' of the one",
    ),
    "no layer": (lambda fast, _: delattr(fast, "layers"), "change 'layers' of the one"),
    "add_module": (lambda fast, _: fast.add_module("adapter", nn.Identity()), "change 'adapter' of the one"),
    "append": (lambda fast, ours: fast.layers.append(ours.layers[0]), "change '2' of the one"),
    "buffer": (lambda fast, _: fast.register_buffer("more", torch.ones(1)), "change 'more' of the one"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("form", ["product", "torch"])
def test_what_it_refuses_says_where_it_works(what, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dtype, linear = form_or_skip(form)
    ours = twins(SIZES)[0]
    fast = prepare_for_inference(ours, dtype, linear=linear)
    expected = answers(fast)
    attempt, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        attempt(fast, ours)
    assert equal(answers(fast), expected), "it is what it was"
    assert not list(tmp_path.iterdir())


def test_what_still_works(each_linear):
    ours = twins(SIZES)[0]
    fast = prepare_for_inference(ours, linear=each_linear)
    assert isinstance(fast, PreparedBert)
    assert fast.eval() is fast
    assert fast.train(False) is fast
    assert fast.requires_grad_(False) is fast
    assert fast.config == ours.config
    assert fast.load_report is ours.load_report
    assert fast.embeddings.word.weight.device.type == "cpu"
    assert "PreparedBert" in repr(fast)
    assert len(fast.layers[:1]) == 1
    called = []
    handle = fast.register_forward_hook(lambda *given: called.append(1))
    fast(torch.tensor([[5, 6]]))
    handle.remove()
    assert called, "a hook on the whole model is called, and stays allowed"


@pytest.fixture(params=["product", "torch"])
def each_linear(request):
    return form_or_skip(request.param)[1]


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
