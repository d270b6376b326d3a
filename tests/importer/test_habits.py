"""What transformers' users do by habit: offloading, attribution, torch.func, order, sizes, names, arguments."""

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


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("on_disk", ["none", "all", "embeddings", "head"])
def test_weights_that_accelerate_keeps_elsewhere_give_the_same_answers(on_disk, buffers, pair, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ours, cpu, batch = pair[0].requires_grad_(False), torch.device("cpu"), PackedBatch.from_padded(IDS, MASK)

    def answers():
        return [*ours(**GIVEN).to_tuple(), ours.predict(batch, torch.tensor([3]))]

    expected = answers()
    if on_disk == "none":
        accelerate.cpu_offload(ours, cpu, offload_buffers=buffers)
    elif on_disk == "all":
        accelerate.disk_offload(ours, tmp_path, cpu, offload_buffers=buffers)
    else:
        places = {"embeddings": "cpu", "layers": "cpu", "head": "cpu", on_disk: "disk"}
        accelerate.dispatch_model(ours, places, main_device="cpu", offload_dir=tmp_path, offload_buffers=buffers)
    assert any(x.is_meta for x in ours.state_dict().values())
    for got, wanted in zip(answers(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # sums in other orders: hooks


# ----------------------------------------------------------------------------------------------- gradients, attribution

PLACES = {"embeddings": "embeddings", "embeddings.word": "embeddings.word_embeddings", "layers.0": "encoder.layer.0"}


def integrated(model, place, mask):
    """Integrated gradients (Sundararajan 2017) from zeros, through a hook that replaces what the place gives."""
    seen, total = [], 0
    part = model.get_submodule(place if isinstance(model, BertForMaskedLM) else f"bert.{PLACES[place]}")
    handle = part.register_forward_hook(lambda _, __, output: seen.append(output))
    model(IDS, attention_mask=mask)
    handle.remove()
    is_tuple = isinstance(seen[0], tuple)  # of a layer, in transformers 4
    value = (seen[0][0] if is_tuple else seen[0]).detach()
    steps = [0.1, 0.5, 0.9]
    for step in steps:
        point = (step * value).requires_grad_()
        handle = part.register_forward_hook(lambda *_, point=point: (point,) if is_tuple else point)
        answer = model(IDS, attention_mask=mask).logits[:, 0].log_softmax(-1)[:, 7].sum()
        total = total + torch.autograd.grad(answer, point)[0]
        handle.remove()
    return value * total / len(steps)


@full_and_padded
@pytest.mark.parametrize("place", PLACES)
def test_an_answer_is_attributed_to_tokens_as_in_transformers(place, mask, pair):
    got, expected = (integrated(model, place, mask)[mask.bool()] for model in pair)
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

    rows = [
        torch.autograd.grad(ours(IDS[[n]], mask[[n]], labels=labels[[n]]).loss, list(ours.parameters()))
        for n in range(3)
    ]
    given, over = (weights, IDS, mask, labels), (None, 0, 0, 0)
    one = grad(loss)(weights, IDS[0], mask[0], labels[0])
    both, values = vmap(grad_and_value(loss), over)(*given)
    assert values.shape == (3,)
    for got in (vmap(grad(loss), over)(*given), both):
        for name, *expected in zip(weights, *rows, strict=True):
            torch.testing.assert_close(got[name], torch.stack(expected), rtol=1e-4, atol=1e-5, msg=name)
            torch.testing.assert_close(one[name], expected[0], rtol=1e-4, atol=1e-5, msg=name)
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


def test_the_usual_loop_with_weight_decay_and_a_frozen_layer_trains_as_in_transformers(pair):
    losses = []
    for model in pair:
        no_decay, frozen = CHOICES["no_decay"], CHOICES["layer 0"]
        for name, x in model.named_parameters():
            x.requires_grad = not frozen(name)
        groups = [
            {"params": [x for name, x in model.named_parameters() if no_decay(name) == no], "weight_decay": decay}
            for no, decay in ((False, 0.5), (True, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # the decay of the norms alone makes 0.06


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


# ---------------------------------------------------------------------------------------------------------------- hints


def loads(under="cpu", **how):
    def load(_, folder):
        with torch.device(under):
            return BertForMaskedLM.from_pretrained(folder, **how)

    return load


def saves(**how):
    return lambda m, f: m.save_pretrained(f / "other", **how)


# What is typed, and what the error names as the remedy. Arguments with one value that holds: tests/test_packing.py.
TYPED = {
    "num_labels": (loads(num_labels=2), "has no classifier"),
    "device_map='auto'": (loads(device_map="auto"), 'give device="cuda"'),
    "two devices": (loads(device_map="cpu", device="cuda"), "give one of the two"),
    "two dtypes": (loads(dtype=torch.bfloat16, torch_dtype=torch.float64), r"bfloat16.*float64.*give one"),
    "no such device": (loads(device="abacus"), "device abacus cannot be used here, where there is cpu and"),
    "state_dict": (loads(state_dict={}), "load_state_dict"),
    "layer_norm_eps": (loads(layer_norm_eps=1e-5), "what the file says"),
    "a config": (loads(config=BertConfig(**SIZES)), r"BertForMaskedLM\(config\)"),
    "a slip": (loads(local_file_only=True), "did you mean local_files_only"),
    "length": (loads(length=3), "its docstring lists"),
    "under meta": (loads("meta"), r"BertForMaskedLM\(config\)"),
    "device_map='meta'": (loads(device_map="meta"), r"BertForMaskedLM\(config\)"),
    "max_shard_size": (saves(max_shard_size="5GB"), "takes no argument 'max_shard_size': one file"),
    "tokeniser": (saves(tokeniser=1), "did you mean tokenizer"),
    "masked_lm_labels": (lambda m, f: m(IDS, masked_lm_labels=IDS), "called labels"),
    "attention_masks": (lambda m, f: m(IDS, attention_masks=MASK), "did you mean attention_mask"),
    "logits_to_keep": (lambda m, f: m(IDS, logits_to_keep=1), "predict"),
    "model(enc)": (lambda m, f: m(transformers.BatchEncoding({"input_ids": IDS})), r"model\(\*\*"),
    "a list": (lambda m, f: m([[1, 2, 3]]), "input_ids must be a tensor, not list: torch.tensor"),
    "an array": (lambda m, f: m(IDS, MASK.numpy()), "attention_mask must be a tensor, not ndarray: torch.from_numpy"),
    "nothing": (lambda m, f: m(), "input_ids is missing"),
    "by place": (lambda m, f: m(IDS, MASK, ZEROS, None, None, None), "minibert export"),
    "FillMask(their model)": (lambda m, f: FillMask(twins(SIZES)[1], TOKENIZER), r"from_pretrained\(folder\)"),
    "FillMask(folder)": (lambda m, f: FillMask(str(f), TOKENIZER), r"from_pretrained\(folder\)"),
    "BertForMaskedLM(name)": (lambda m, f: BertForMaskedLM("bert-base-uncased"), "from_pretrained"),
    "mean_resizing=False": (lambda m, f: m.resize_token_embeddings(100, mean_resizing=False), "word.weight"),
    "enable_input_require_grads": (lambda m, f: m.enable_input_require_grads, "gradient_checkpointing_enable"),
    "set_attn_implementation": (lambda m, f: m.set_attn_implementation, "use_kernel"),
    "push_to_hub": (lambda m, f: m.push_to_hub, "save_pretrained"),
    "bert.pooler": (lambda m, f: m.bert.pooler, "output_hidden_states"),
    "elephants": (lambda m, f: m.elephants, "BertForMaskedLM has no 'elephants'"),
}
WORKS = dict(device_map="cpu", token=False, attn_implementation="eager", low_cpu_mem_usage=False, subfolder="",
             from_tf=False, use_cache=False, is_decoder=False, tie_word_embeddings=True, resume_download=True,
             trust_remote_code=False, cache_dir=None)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("habits")
    twins(SIZES)[0].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_typed_by_habit_names_what_to_type(typed, pair, folder):
    call, remedy = TYPED[typed]
    with pytest.raises((TypeError, ValueError, AttributeError), match=remedy):
        call(pair[0], folder)
    assert not (folder / "other").exists()


def test_what_is_harmless_is_taken_and_what_loading_was_told_holds_in_each_call(pair, folder):
    model = loads(**WORKS, output_attentions=True, output_hidden_states=True)(None, folder)
    asked = model(IDS, use_cache=False)
    assert torch.equal(asked.logits, pair[0](IDS, output_attentions=True).logits)
    assert (len(asked.attentions), len(asked.hidden_states)) == (2, 3)
    model = loads(return_dict=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)(None, folder)
    assert type(model(IDS)) is tuple
    assert torch.equal(model.train()(IDS)[0], model(IDS)[0])
    assert BertForMaskedLM(transformers.BertConfig(**SIZES)).config == BertForMaskedLM(SIZES).config
