"""What programs written for transformers ask a model: its sizes, another vocabulary, activation checkpointing."""

import copy
import pickle

import pytest
import torch
import transformers
from twins import CONFIGS, make_batch, twins

from minibert import BertConfig, BertForMaskedLM
from minibert.checkpoint.names import from_transformers

SIZES = CONFIGS["batch 13, gelu"]


@pytest.fixture
def pair():
    return twins(SIZES)


def test_new_tokens_start_as_the_mean_of_the_old_ones(pair):
    ours, theirs = pair
    rows, bias = ours.embeddings.word.weight.detach().clone(), ours.head.bias.detach().clone()
    for model in pair:
        model.resize_token_embeddings(103)
    torch.testing.assert_close(ours.embeddings.word.weight[99:], rows.mean(0).expand(4, 32))
    torch.testing.assert_close(ours.head.bias[99:], bias.mean().expand(4))
    near = theirs.get_input_embeddings().weight[99:]  # drawn around the mean, and very near to it
    torch.testing.assert_close(ours.embeddings.word.weight[99:], near, rtol=0, atol=1e-3)
    assert ours.embeddings.word.num_embeddings == 103


def test_a_resized_model_trains_and_is_saved(pair, tmp_path):
    ours, _ = pair
    ours.embeddings.word.requires_grad_(False)
    ours.resize_token_embeddings(120)
    assert not ours.embeddings.word.weight.requires_grad
    ours.requires_grad_(True)
    ids = torch.tensor([[0, 110, 119, 3]])
    ours(ids, labels=ids).loss.backward()
    assert ours.embeddings.word.padding_idx == 0
    assert ours.head.bias.grad.shape == (120,)
    ours.save_pretrained(tmp_path)
    again = BertForMaskedLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again(ids).logits, ours(ids).logits)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


def test_a_vocabulary_that_cannot_be_is_refused_and_nothing_is_changed():
    model = BertForMaskedLM(BertConfig(**SIZES, pad_token_id=98))
    for size, said in (
        (98, "pad_token_id 98 is not an id below vocab_size 98"),
        (0, "vocab_size"),
        (9.5, "vocab_size"),
    ):
        with pytest.raises(ValueError, match=said):
            model.resize_token_embeddings(size)
    assert model.config.vocab_size == len(model.embeddings.word.weight) == len(model.head.bias) == 99


def gradients(model, given):
    model.zero_grad()
    torch.manual_seed(0)
    model(**given).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def test_checkpointed_layers_have_the_same_gradients_and_keep_less(pair):
    ours, _ = pair
    ours.train()  # with dropout
    given, kept = make_batch(SIZES, "right", (13, 7)), []

    def keep(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    found = []
    for on in (False, True, False):
        ours.gradient_checkpointing_enable({"use_reentrant": False}) if on else ours.gradient_checkpointing_disable()
        assert ours.is_gradient_checkpointing == on
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(gradients(ours, given))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    assert kept[1] < 0.6 * kept[0] == 0.6 * kept[2]


def test_a_checkpointed_model_is_copied_pickled_and_hooked_as_before(pair):
    ours, _ = pair
    ours.gradient_checkpointing_enable()
    calls = []
    ours.layers[1].register_forward_hook(lambda *_: calls.append(1))
    given = make_batch(SIZES, "right", (3, 7))
    gradients(ours, given)
    assert calls == [1]
    ours.layers[1]._forward_hooks.clear()
    expected = gradients(ours, given)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert model.is_gradient_checkpointing
        got = gradients(model, given)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------------- state dicts


def test_a_state_dict_of_transformers_is_translated(pair):
    ours, theirs = pair
    fresh = BertForMaskedLM(ours.config).eval()
    for prefix in ("", "module.", "base_model.model."):
        given = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
        fresh.load_state_dict(from_transformers(given))
        assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_a_state_dict_that_is_not_this_model_is_one_sentence(pair):
    ours, theirs = pair
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"is a name of transformers.*from_transformers"):
        ours.load_state_dict(state)
    with pytest.raises(ValueError, match="is a name of transformers"):
        ours.load_state_dict(state, strict=False)
    key = "bert.encoder.layer.3.attention.self.key.bias"
    with pytest.raises(ValueError, match=rf"tensor {key} is missing: layers.3.attention.qkv.bias is made of 3"):
        from_transformers({name: tensor for name, tensor in state.items() if name != key})
    with pytest.raises(ValueError, match=r"bert\.elephant\.weight is no tensor of BERT"):
        from_transformers({**state, "bert.elephant.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="must be the same tensor, but they differ"):
        from_transformers({**state, "cls.predictions.decoder.bias": torch.zeros(99)})
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(from_transformers({key: x for key, x in state.items() if ".layer.1." not in key}))
