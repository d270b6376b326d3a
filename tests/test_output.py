"""The output of the padded call, as programs written for transformers read it."""

import pytest
import torch
from torch.utils import _pytree
from twins import CONFIGS, MASKS, make_batch, twins

SIZES = CONFIGS["batch 13, gelu"]


@pytest.fixture(scope="module")
def pair():
    return twins(SIZES)


def test_it_is_read_as_transformers_reads_its_own(pair):
    ours, theirs = pair
    given = make_batch(SIZES, "right", (3, 7))
    for labels in (given["labels"], None):
        out, expected = (model(given["input_ids"], given["attention_mask"], labels=labels) for model in (ours, theirs))
        assert list(out.keys()) == list(expected.keys())
        assert len(out) == len(expected)
        assert [name for name, _ in out.items()] == [name for name, _ in expected.items()]
        assert list(dict(out)) == list(dict(expected))
        assert ("loss" in out, "logits" in out, "elephants" in out) == ("loss" in expected, True, False)
        assert all(one is other for one, other in zip(out.to_tuple(), out[:], strict=True))
        assert out[0] is out.to_tuple()[0]
        assert out.get("loss") is out.loss
        assert out.get("elephants", 5) == 5
        assert out["logits"] is out.logits
        torch.testing.assert_close(out[-1][given["attention_mask"] == 1], expected[-1][given["attention_mask"] == 1])
        with pytest.raises(KeyError, match="only"):
            out["elephants"]


def test_it_can_be_taken_apart(pair):
    given = make_batch(SIZES, "dense", (3, 7))
    loss, logits = pair[0](given["input_ids"], labels=given["labels"]).to_tuple()
    assert loss.dim() == 0
    assert logits.shape == (3, 7, SIZES["vocab_size"])
    out = pair[0](given["input_ids"], labels=given["labels"], return_dict=False)
    assert type(out) is tuple
    assert torch.equal(out[0], loss)


def test_it_is_a_pytree(pair):
    out = pair[0](torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    leaves, form = _pytree.tree_flatten(out)
    assert len(leaves) == 1 + SIZES["num_hidden_layers"] + 1
    back = _pytree.tree_unflatten(leaves, form)
    assert type(back) is type(out)
    assert back.loss is None
    assert back.hidden_states[2] is out.hidden_states[2]


@pytest.mark.parametrize("mask", MASKS)
def test_hidden_states_and_attentions_are_those_of_transformers(pair, mask):
    ours, theirs = pair
    given = make_batch(SIZES, mask, (5, 7))
    seen = given["attention_mask"].bool()
    asked = {"output_hidden_states": True, "output_attentions": True}
    out, expected = (model(given["input_ids"], given["attention_mask"], **asked) for model in (ours, theirs))
    assert list(out.keys()) == list(expected.keys())
    assert len(out.hidden_states) == len(expected.hidden_states)
    for got, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(got[seen], wanted[seen], rtol=0, atol=1e-5)  # sums in other orders
        assert not got[~seen].any()
    both = (seen[:, None, :, None] & seen[:, None, None, :]).expand(-1, SIZES["num_attention_heads"], -1, -1)
    for got, wanted in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(got[both], wanted[both], rtol=0, atol=1e-6)
        assert not got[~both].any()


def test_what_a_tokenizer_of_transformers_gives_may_be_passed_on(pair):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    every = dict(return_special_tokens_mask=True, return_offsets_mapping=True, return_length=True, padding=True)
    given = tokenizer(["a cat sat", "a [MASK]"], return_tensors="pt", **every)
    assert len(given) >= 5
    expected = pair[0](given["input_ids"], given["attention_mask"], given["token_type_ids"])
    assert torch.equal(pair[0](**given).logits, expected.logits)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("head_mask", "set the head's columns"),
        ("inputs_embeds", "model.embeddings.word.register_forward_hook"),
        ("encoder_hidden_states", "BERT is an encoder"),
        ("attention_masks", "did you mean attention_mask"),
        ("elephants", "its docstring lists"),
    ],
)
def test_other_arguments_are_refused_with_what_to_use(pair, argument, said):
    with pytest.raises(TypeError, match=said):
        pair[0](torch.tensor([[1, 2, 3]]), **{argument: torch.ones(1, 3)})


def test_what_is_no_tensor_is_refused_with_how_to_make_one(pair):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"input_ids must be a tensor, not list: torch.tensor"):
        pair[0]([[1, 2, 3]])
    with pytest.raises(TypeError, match=r"attention_mask must be a tensor, not ndarray: torch.from_numpy"):
        pair[0](torch.tensor([[1, 2]]), numpy.ones((1, 2)))
    with pytest.raises(TypeError, match="input_ids is missing"):
        pair[0](None)
