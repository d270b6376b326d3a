"""What programs written for transformers ask of a model: another vocabulary, gradients, state dicts, names, order."""

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap
from twins import CONFIGS, make_batch, twins

import minibert
from minibert import BertConfig, BertForMaskedLM, FillMask, PackedBatch
from minibert.checkpoint.names import from_transformers
from minibert.mlm import mask_and_guess
from minibert.study import study
from minibert.tokenizer import from_vocabulary

SIZES = {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 2}
GIVEN = make_batch(SIZES, "right", (3, 7))
IDS, MASK = GIVEN["input_ids"], GIVEN["attention_mask"]
ONES, ZEROS = torch.ones_like(IDS), torch.zeros_like(IDS)
full_and_padded = pytest.mark.parametrize("mask", [ONES, MASK], ids=["full", "padded"])


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
    key = "bert.encoder.layer.1.attention.self.key.bias"
    for wrong, said in (
        ({name: x for name, x in state.items() if name != key}, rf"tensor {key} is missing: layers.1.attention.qkv"),
        ({**state, "bert.elephant.weight": torch.zeros(3)}, r"bert\.elephant\.weight is no tensor of BERT"),
        ({**state, "cls.predictions.decoder.bias": torch.zeros(99)}, "must be the same tensor, but they differ"),
    ):
        with pytest.raises(ValueError, match=said):
            from_transformers(wrong)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(from_transformers({name: x for name, x in state.items() if ".layer.1." not in name}))


# ---------------------------------------------------------------------------------------------------------- offloading


@pytest.mark.parametrize("on_disk", ["none", "all", "embeddings", "head"])
def test_weights_that_accelerate_keeps_elsewhere_give_the_same_answers(on_disk, pair, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ours, cpu, batch = pair[0].requires_grad_(False), torch.device("cpu"), PackedBatch.from_padded(IDS, MASK)

    def answers():
        return [*ours(**GIVEN).to_tuple(), ours.predict(batch, torch.tensor([3]))]

    expected = answers()
    if on_disk == "none":
        accelerate.cpu_offload(ours, cpu, offload_buffers=True)
    elif on_disk == "all":
        accelerate.disk_offload(ours, tmp_path, cpu, offload_buffers=True)
    else:
        places = {"embeddings": "cpu", "layers": "cpu", "head": "cpu", on_disk: "disk"}
        accelerate.dispatch_model(ours, places, main_device="cpu", offload_dir=tmp_path)
    assert any(x.is_meta for x in ours.state_dict().values())
    for got, wanted in zip(answers(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # sums in other orders: hooks


# ----------------------------------------------------------------------------------------------- gradients, attribution

PLACES = {"embeddings": "embeddings", "embeddings.word": "embeddings.word_embeddings", "layers.0": "encoder.layer.0"}


def gradient_at(model, place, mask):
    """Of an answer, by what the place gives, where a hook replaces this by a half of it (captum does so in steps)."""
    points = []

    def halved(_, __, output):
        whole = output[0] if isinstance(output, tuple) else output  # a tuple of a layer, in transformers 4
        points.append((0.5 * whole.detach()).requires_grad_())
        return (points[0],) if isinstance(output, tuple) else points[0]

    place = place if isinstance(model, BertForMaskedLM) else f"bert.{PLACES[place]}"
    model.get_submodule(place).register_forward_hook(halved)
    answer = model(IDS, attention_mask=mask).logits[:, 0].log_softmax(-1)[:, 7].sum()
    return torch.autograd.grad(answer, points[0])[0]


@full_and_padded
@pytest.mark.parametrize("place", PLACES)
def test_gradients_at_a_hook_that_replaces_what_it_saw_are_those_of_transformers(place, mask, pair):
    got, expected = (gradient_at(model, place, mask)[mask.bool()] for model in pair)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)  # sums in other orders


@full_and_padded
def test_gradients_by_what_the_call_gave_back_are_those_of_transformers(mask, pair):
    found = []
    for model in pair:
        out = model(IDS, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        asked, answer = [*out.attentions, *out.hidden_states], out.logits[:, 0, 7].sum()
        by_autograd = torch.autograd.grad(answer, asked, retain_graph=True)
        for x in asked:
            x.retain_grad()
        answer.backward()
        assert all(torch.equal(x.grad, wanted) for x, wanted in zip(asked, by_autograd, strict=True))
        found.append(by_autograd)
    seen = mask.bool()
    pairs = (seen[:, None, :, None] & seen[:, None, None, :]).expand_as(found[0][0])
    for got, expected in zip(*found, strict=True):
        there = pairs if got.dim() == 4 else seen
        assert expected[there].abs().max() > 0
        torch.testing.assert_close(got[there], expected[there], rtol=1e-3, atol=1e-5)  # sums in other orders


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch about vmap over its own attention
@full_and_padded
def test_gradients_of_each_sample_by_torch_func_are_those_of_a_loop(mask, pair):
    ours, labels = pair[0], IDS.masked_fill(mask == 0, -100)
    weights = {name: x.detach() for name, x in ours.named_parameters()}

    def loss(weights, *row):
        named = dict(zip(("input_ids", "attention_mask", "labels"), (x[None] for x in row), strict=True))
        return functional_call(ours, weights, (), named).loss

    grads, values = vmap(grad_and_value(loss), (None, 0, 0, 0))(weights, IDS, mask, labels)
    assert values.shape == (3,)
    for n in range(3):
        expected = torch.autograd.grad(ours(IDS[[n]], mask[[n]], labels=labels[[n]]).loss, list(ours.parameters()))
        one = grad(loss)(weights, IDS[n], mask[n], labels[n])
        for (name, got), wanted in zip(grads.items(), expected, strict=True):
            torch.testing.assert_close(got[n], wanted, rtol=1e-4, atol=1e-5, msg=name)
            torch.testing.assert_close(one[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    logits = vmap(lambda row: functional_call(ours, weights, (row[None],)).logits[0])(IDS)
    torch.testing.assert_close(logits, ours(IDS).logits, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ order and sizes


def heard(kind, ask, said):
    """Ask: an error with what is said in it, one warning of all, or nothing at all."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if kind is ValueError:
            with pytest.raises(ValueError, match=said):
                ask()
        else:
            ask()
    assert bool(found) == (kind is UserWarning)
    assert all(re.search(said, str(one.message)) for one in found)


SECOND = (torch.arange(7) > 3).long().expand(3, 7)
# What stands in the places of the mask and the token types; and whether it is an error, a warning, or right.
ORDERS = [
    ((ZEROS, ONES), ValueError),
    ((ZEROS,), ValueError),
    ((-1e4 * (1.0 - SECOND),), ValueError),
    ((SECOND, ONES), UserWarning),
    ((ONES.index_fill(0, torch.tensor([1]), 0),), UserWarning),
    ((1 - SECOND, SECOND), UserWarning),
    ((ONES, ZEROS), None),
    ((ONES, SECOND), None),
    ((ONES.tril(4),), None),
]


@pytest.mark.parametrize(("rest", "kind"), ORDERS)
def test_token_types_in_the_place_of_the_mask_are_told(rest, kind, pair):
    for call in (pair[0], PackedBatch.from_padded):
        heard(kind, lambda call=call: call(IDS, *rest), "attention_mask.*" + "token_type_ids=" * (kind is UserWarning))


TOKENIZER = from_vocabulary([*"[PAD] [UNK] [CLS] [SEP] [MASK] the cat".split(), *(f"w{n}" for n in range(93))])
ASKS = {
    "fill_mask": lambda model: FillMask(model, TOKENIZER)("the [MASK]"),
    "score": lambda model: list(minibert.pseudo_log_likelihood(model, TOKENIZER, ["the cat"])),
    "mlm": lambda model: mask_and_guess(model, TOKENIZER, "the cat the cat"),
    "study": lambda model: study(model, TOKENIZER, "the [MASK]"),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize(("rows", "kind"), [(99, ValueError), (100, None), (128, None), (137, UserWarning)])
def test_a_tokenizer_and_a_model_of_other_sizes_are_told(ask, rows, kind):
    model = BertForMaskedLM(BertConfig(**{**SIZES, "vocab_size": rows})).eval()
    heard(kind, lambda: ASKS[ask](model), f"100.*{rows}")


# ---------------------------------------------------------------------------------------------------------------- names

CHOICES = {
    "no_decay": lambda name: any(part in name for part in ("bias", "LayerNorm.weight")),
    "no_decay, lower case": lambda name: "bias" in name or "norm" in name.lower(),
    "layer 0": lambda name: name.startswith("bert.encoder.layer.0."),
    "embeddings": lambda name: "embeddings" in name,
    "head": lambda name: name.startswith("cls."),
    "all but the head": lambda name: "cls" not in name,
    "encoder": lambda name: "encoder" in name,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_parameters_chosen_by_transformers_names_are_the_same(choice, pair):
    ours, theirs = (sum(x.numel() for name, x in model.named_parameters() if CHOICES[choice](name)) for model in pair)
    assert 0 < ours == theirs < pair[1].num_parameters()


def test_the_cookbooks_table_of_names_is_true(pair):
    page = (Path(minibert.__file__).parent / "cookbook.md").read_text(encoding="utf-8")
    table = page.partition("| transformers | `named_parameters()` |")[2].partition("\n\n")[0]
    found = [set(), set()]
    for line in table.splitlines()[2:]:
        for names, column in zip(found, line.strip("| ").split(" | "), strict=True):
            first, *others = re.findall("`(.*?)`", column)
            names |= {first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)}
    for names, model in zip(found, reversed(pair), strict=True):
        parts = {re.sub(r"\d+", "N", name).rpartition(".")[0] for name, _ in model.named_parameters()}
        assert {name.removesuffix(".bias") for name in names} == parts


def test_in_a_module_around_the_model_its_own_names_choose(pair):
    around = nn.ModuleDict({"model": pair[0]})
    for name, x in around.model.named_parameters():
        x.requires_grad = not name.startswith("bert.encoder.layer.0.")
    frozen = {name for name, x in around.named_parameters() if not x.requires_grad}
    assert frozen == {name for name, _ in around.named_parameters() if name.startswith("model.layers.0.")} != set()
    assert {name for name, _ in around.named_parameters()} == around.state_dict().keys()


# ------------------------------------------------------------------------------------------------------------- by hooks


def test_hooks_see_rows_in_the_padded_call_and_tokens_in_the_packed_one(pair):
    seen, batch = [], PackedBatch.from_padded(IDS, MASK)
    for part in (pair[0].embeddings, pair[0].layers[0]):
        part.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    pair[0](IDS, MASK), pair[0].encode(batch)
    assert seen == [(3, 7, 32)] * 2 + [(batch.num_tokens, 32)] * 2


def test_a_head_is_masked_by_its_columns(pair):
    ours, theirs = pair
    with torch.no_grad():
        ours.layers[1].attention.output.weight[:, 8:16] = 0  # the second of 4 heads of 8
    keeps = torch.ones(32).index_fill(0, torch.arange(8, 16), 0)
    theirs.bert.encoder.layer[1].attention.output.dense.register_forward_pre_hook(lambda _, given: given[0] * keeps)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)  # sums in other orders
