"""What programs written for transformers ask a model: another vocabulary, activation checkpointing, state dicts."""

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


def test_new_tokens_start_as_the_mean_of_the_old_ones_train_and_are_saved(pair, tmp_path):
    ours, theirs = pair
    rows, bias = ours.embeddings.word.weight.detach().clone(), ours.head.bias.detach().clone()
    ours.embeddings.word.requires_grad_(False)
    for model in pair:
        model.resize_token_embeddings(120)
    word = ours.embeddings.word
    assert (word.num_embeddings, word.padding_idx, word.weight.requires_grad) == (120, 0, False)
    torch.testing.assert_close(word.weight[99:], rows.mean(0).expand(21, 32))
    torch.testing.assert_close(ours.head.bias[99:], bias.mean().expand(21))
    near = theirs.get_input_embeddings().weight[99:]  # drawn around the mean, and very near to it
    torch.testing.assert_close(word.weight[99:], near, rtol=0, atol=1e-3)

    ids = torch.tensor([[0, 110, 119, 3]])
    ours(ids, labels=ids).loss.backward()
    assert ours.head.bias.grad.shape == (120,)
    ours.save_pretrained(tmp_path)
    again, theirs = (kind.from_pretrained(tmp_path).eval() for kind in (BertForMaskedLM, transformers.BertForMaskedLM))
    assert again.config == ours.config
    assert torch.equal(again(ids).logits, ours(ids).logits)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)  # sums in other orders
    assert ours.resize_token_embeddings(121, pad_to_multiple_of=64) is word
    assert ours.config.vocab_size == 128


@pytest.mark.parametrize(("size", "said"), [(98, "pad_token_id 98 is not an id below"), (0, "vocab"), (9.5, "vocab")])
def test_a_vocabulary_that_cannot_be_is_refused_and_nothing_is_changed(size, said):
    model = BertForMaskedLM(BertConfig(**SIZES, pad_token_id=98))
    with pytest.raises(ValueError, match=said):
        model.resize_token_embeddings(size)
    assert model.config.vocab_size == len(model.embeddings.word.weight) == len(model.head.bias) == 99


def gradients(model, given):
    model.zero_grad()
    torch.manual_seed(0)
    model(**given).loss.backward()
    return [x.grad.clone() for x in model.parameters()]


def same(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_checkpointed_layers_have_the_same_gradients_and_keep_less(pair):
    ours, given, kept, found = pair[0].train(), make_batch(SIZES, "right", (13, 7)), [], []  # with dropout

    def keep(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for on in (False, True, False):
        ours.gradient_checkpointing_enable({"use_reentrant": False}) if on else ours.gradient_checkpointing_disable()
        assert ours.is_gradient_checkpointing == on
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(gradients(ours, given))
    assert same(found[0], found[1])
    assert kept[1] < 0.6 * kept[0] == 0.6 * kept[2]
    calls = []
    ours.gradient_checkpointing_enable()
    handle = ours.layers[1].register_forward_hook(lambda *_: calls.append(1))
    gradients(ours, given)
    handle.remove()
    assert calls == [1], "the second time is no call of the layer"
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert model.is_gradient_checkpointing
        assert same(gradients(model, given), found[0])


def test_a_state_dict_of_transformers_is_translated(pair):
    ours, theirs = pair
    for prefix in ("", "module.", "base_model.model."):
        fresh = BertForMaskedLM(ours.config)
        fresh.load_state_dict(
            from_transformers({prefix + name: tensor for name, tensor in theirs.state_dict().items()})
        )
        assert same(fresh.state_dict().values(), ours.state_dict().values())


def test_a_state_dict_that_is_not_this_model_is_one_sentence(pair):
    ours, state = pair[0], pair[1].state_dict()
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"is a name of transformers.*from_transformers"):
            ours.load_state_dict(state, strict=strict)
    key = "bert.encoder.layer.3.attention.self.key.bias"
    for wrong, said in (
        ({name: x for name, x in state.items() if name != key}, rf"tensor {key} is missing: layers.3.attention.qkv"),
        ({**state, "bert.elephant.weight": torch.zeros(3)}, r"bert\.elephant\.weight is no tensor of BERT"),
        ({**state, "cls.predictions.decoder.bias": torch.zeros(99)}, "must be the same tensor, but they differ"),
    ):
        with pytest.raises(ValueError, match=said):
            from_transformers(wrong)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(from_transformers({name: x for name, x in state.items() if ".layer.1." not in name}))
