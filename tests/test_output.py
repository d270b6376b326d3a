"""The output of the padded call, as programs written for transformers read it."""

import copy
import dataclasses
import io
import pickle
from collections.abc import Mapping

import pytest
import torch
import transformers
from torch.utils import _pytree
from twins import CONFIGS, MASKS, make_batch, twins

from minibert.tokenizer import from_vocabulary

SIZES = CONFIGS["batch 13, gelu"]
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def pair():
    return twins(SIZES)


def test_entries_and_attributes_are_one_thing(pair):
    """tests/importer/test_peers_checks.py reads it as transformers' own."""
    out = pair[0](IDS, labels=IDS)
    assert isinstance(out, Mapping)
    assert all(one is other for one, other in zip(out.to_tuple(), out[:], strict=True))
    assert out["logits"] is out.logits is out[-1]
    assert (out.attentions, out.get("attentions", 5)) == (None, 5)
    out["logits"] = out.logits[:, :1]
    assert out.logits.shape == out[-1].shape == (2, 1, SIZES["vocab_size"])
    out.loss = None
    assert (list(out), out.loss, len(out)) == (["logits"], None, 1)
    with pytest.raises(AttributeError, match="logits"):
        out.elephants  # noqa: B018


def walked(value, change=lambda x: x):
    """Rebuilt as accelerate, Lightning and torchinfo do it: a Mapping from its entries, a tuple from its elements."""
    if isinstance(value, Mapping):
        return type(value)({name: walked(x, change) for name, x in value.items()})
    return tuple(walked(x, change) for x in value) if isinstance(value, tuple) else change(value)


def saved_and_loaded(out):
    torch.save(out, kept := io.BytesIO())
    return torch.load(io.BytesIO(kept.getvalue()), weights_only=False)


def unflattened(out):
    leaves, form = _pytree.tree_flatten(out)
    return _pytree.tree_unflatten(leaves, _pytree.treespec_loads(_pytree.treespec_dumps(form)))


REBUILT = {
    "mapping": walked,
    "pairs": lambda out: type(out)((name, out[name]) for name in out),  # DataParallel's gather
    "names": lambda out: type(out)(**out),
    "pytree": unflattened,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda out: pickle.loads(pickle.dumps(out)),
    "saved": saved_and_loaded,
    "replace": dataclasses.replace,
}


@pytest.mark.parametrize("labels", [None, IDS], ids=["no loss", "loss"])
@pytest.mark.parametrize("how", REBUILT)
def test_libraries_rebuild_it_with_all_that_it_holds(how, labels, pair):
    with torch.no_grad():  # a deep copy of what has a gradient is refused by torch
        out = pair[0](IDS, labels=labels, output_hidden_states=True, output_attentions=True)
    back = REBUILT[how](out)
    assert (type(back), list(back)) == (type(out), list(out))
    assert back.attentions[1].shape == out.attentions[1].shape
    for one, other in zip(_pytree.tree_leaves(back), _pytree.tree_leaves(out), strict=True):
        assert torch.equal(one, other)
    assert (back.loss is None) == (labels is None)


def test_dataparallel_gathers_it_and_accelerate_converts_it(pair, monkeypatch):
    from torch.nn.parallel import scatter_gather

    operations = pytest.importorskip("accelerate.utils.operations")

    class Gather:  # torch's own copies tensors of a GPU only
        apply = staticmethod(lambda _, dim, *parts: torch.cat([x.reshape(-1) if x.dim() == 0 else x for x in parts]))

    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    halves = [pair[0](row[None], labels=row[None]) for row in IDS]
    both = scatter_gather.gather(halves, 0)
    assert (type(both), both.loss.shape) == (type(halves[0]), (2,))
    torch.testing.assert_close(both.logits, pair[0](IDS).logits, rtol=0, atol=1e-5)  # sums in other orders
    assert operations.convert_to_fp32(walked(both, torch.Tensor.half)).logits.dtype == torch.float32


@pytest.mark.parametrize("gradients", [True, False])  # without, the padding is not computed
@pytest.mark.parametrize("mask", MASKS)
def test_hidden_states_and_attentions_are_those_of_transformers(mask, gradients, pair):
    given = make_batch(SIZES, mask, (5, 7))
    seen = given["attention_mask"].bool()
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.set_grad_enabled(gradients):
        out, expected = (model(given["input_ids"], given["attention_mask"], **asked) for model in pair)
    both = (seen[:, None, :, None] & seen[:, None, None, :]).expand(-1, SIZES["num_attention_heads"], -1, -1)
    for name, there in (("hidden_states", seen), ("attentions", both)):
        for got, wanted in zip(out[name], expected[name], strict=True):
            torch.testing.assert_close(got[there], wanted[there], rtol=0, atol=1e-5)  # sums in other orders
            assert not got[~there].any()


def test_what_a_tokenizer_of_transformers_gives_may_be_passed_on(pair):
    roles = dict(pad_token="[PAD]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=from_vocabulary(words), **roles)
    every = dict(return_special_tokens_mask=True, return_offsets_mapping=True, return_length=True, padding=True)
    given = tokenizer(["a cat sat", "a [MASK]"], return_tensors="pt", **every)
    assert len(given) >= 5
    expected = pair[0](given["input_ids"], given["attention_mask"], given["token_type_ids"])
    assert torch.equal(pair[0](**given).logits, expected.logits)
