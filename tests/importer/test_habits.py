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
IDS, MASK, LABELS = GIVEN["input_ids"], GIVEN["attention_mask"], GIVEN["labels"]


@pytest.fixture
def pair():
    return twins(SIZES)


# ---------------------------------------------------------------------------------------------------------- offloading


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("on_disk", ["none", "all", "embeddings", "head"])
def test_weights_that_accelerate_keeps_elsewhere_give_the_same_answers(on_disk, buffers, pair, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ours, cpu = pair[0], torch.device("cpu")
    with torch.no_grad():
        expected = ours(**GIVEN)
        batch = PackedBatch.from_padded(IDS, MASK)
        predicted = ours.predict(batch, torch.tensor([3]))
        if on_disk == "none":
            accelerate.cpu_offload(ours, cpu, offload_buffers=buffers)
        elif on_disk == "all":
            accelerate.disk_offload(ours, tmp_path, cpu, offload_buffers=buffers)
        else:
            places = {"embeddings": "cpu", "layers": "cpu", "head": "cpu", on_disk: "disk"}
            where = dict(main_device="cpu", offload_dir=tmp_path, offload_buffers=buffers)
            accelerate.dispatch_model(ours, places, **where)
        assert any(x.is_meta for x in ours.state_dict().values())
        got = ours(**GIVEN)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)  # sums in other orders: hooks
        torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.predict(batch, torch.tensor([3])), predicted, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------- gradients, attribution


def places(model, place):
    ours = {"embeddings": "embeddings", "word": "embeddings.word", "layer": "layers.0"}
    theirs = {"embeddings": "embeddings", "word": "embeddings.word_embeddings", "layer": "encoder.layer.0"}
    is_ours = isinstance(model, BertForMaskedLM)
    return model.get_submodule(ours[place] if is_ours else f"bert.{theirs[place]}")


def integrated(model, place, mask):
    """Integrated gradients (Sundararajan 2017) from zeros, through a hook that replaces what the place gives."""
    seen, total = [], 0
    part = places(model, place)
    # In transformers 4 a layer gives a tuple.
    handle = part.register_forward_hook(lambda _, __, output: seen.append(output))
    model(IDS, attention_mask=mask)
    handle.remove()
    is_tuple = isinstance(seen[0], tuple)
    value = (seen[0][0] if is_tuple else seen[0]).detach()
    steps = [0.1, 0.5, 0.9]
    for step in steps:
        point = (step * value).requires_grad_()
        handle = part.register_forward_hook(lambda *_, point=point: (point,) if is_tuple else point)
        answer = model(IDS, attention_mask=mask).logits[:, 0].log_softmax(-1)[:, 7].sum()
        total = total + torch.autograd.grad(answer, point)[0]
        handle.remove()
    return value * total / len(steps)


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("place", ["embeddings", "word", "layer"])
def test_an_answer_is_attributed_to_tokens_as_in_transformers(place, mask, pair):
    got, expected = (integrated(model, place, mask) for model in pair)
    assert got.shape == expected.shape == (3, 7, SIZES["hidden_size"])
    seen = torch.ones_like(MASK).bool() if mask is None else mask.bool()
    assert expected[seen].abs().max() > 1e-3
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-3, atol=1e-5)  # sums in other orders


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("name", "number"), [("attentions", 0), ("attentions", 1), *[("hidden_states", n) for n in range(3)]]
)
def test_gradients_by_what_the_call_gave_back_are_those_of_transformers(name, number, mask, pair):
    found = []
    for model in pair:
        out = model(IDS, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        x, answer = getattr(out, name)[number], out.logits[:, 0, 7].sum()
        (by_autograd,) = torch.autograd.grad(answer, x, retain_graph=True)
        x.retain_grad()
        answer.backward()
        assert torch.equal(by_autograd, x.grad)
        found.append(x.grad)
    seen = torch.ones_like(MASK).bool() if mask is None else mask.bool()
    if name == "attentions":
        seen = (seen[:, None, :, None] & seen[:, None, None, :]).expand_as(found[0])
    assert found[1][seen].abs().max() > 0
    torch.testing.assert_close(found[0][seen], found[1][seen], rtol=1e-3, atol=1e-5)  # sums in other orders


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch about vmap over its own attention
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_gradients_of_each_sample_by_torch_func_are_those_of_a_loop(mask, pair):
    ours, mask_of = pair[0], (lambda n: None if mask is None else mask[n : n + 1])
    labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
    weights = {name: x.detach() for name, x in ours.named_parameters()}

    def loss(weights, ids, labels, mask=None):
        named = {"labels": labels[None], "attention_mask": None if mask is None else mask[None]}
        return functional_call(ours, weights, (ids[None],), named).loss

    rows = [
        torch.autograd.grad(ours(IDS[n : n + 1], mask_of(n), labels=labels[n : n + 1]).loss, list(ours.parameters()))
        for n in range(3)
    ]
    given = (weights, IDS, labels) if mask is None else (weights, IDS, labels, mask)
    over = (None, *[0] * (len(given) - 1))
    one = grad(loss)(weights, *(x[0] for x in given[1:]))
    both, values = vmap(grad_and_value(loss), over)(*given)
    assert values.shape == (3,)
    for got in (vmap(grad(loss), over)(*given), both):
        for name, *expected in zip(weights, *rows, strict=True):
            torch.testing.assert_close(got[name], torch.stack(expected), rtol=1e-4, atol=1e-5, msg=name)
            torch.testing.assert_close(one[name], expected[0], rtol=1e-4, atol=1e-5, msg=name)
    logits = vmap(lambda row: functional_call(ours, weights, (row[None],)).logits[0])(IDS)
    torch.testing.assert_close(logits, ours(IDS).logits, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ order and sizes

ONES, ZEROS = torch.ones_like(IDS), torch.zeros_like(IDS)
SECOND = (torch.arange(7) > 3).long().expand(3, 7)
EMPTY_ROW = ONES.clone().index_fill(0, torch.tensor([1]), 0)
# What stands in the places of the mask and the token types; and whether it is an error, a warning, or right.
ORDERS = [
    ((ZEROS, ONES), ValueError),
    ((ZEROS,), ValueError),
    ((SECOND, ONES), UserWarning),
    ((EMPTY_ROW,), UserWarning),
    ((1 - SECOND, SECOND), UserWarning),
    ((-1e4 * (1.0 - SECOND),), ValueError),
    ((ONES, ZEROS), None),
    ((ONES, SECOND), None),
    ((ONES.tril(4),), None),
]


@pytest.mark.parametrize(("rest", "kind"), ORDERS)
@pytest.mark.parametrize("call", ["model", "labels", "from_padded"])
def test_token_types_in_the_place_of_the_mask_are_told(call, rest, kind, pair):
    model = pair[0]
    ask = {
        "model": lambda: model(IDS, *rest),
        "labels": lambda: model(IDS, *rest, labels=torch.full_like(IDS, -100)),
        "from_padded": lambda: PackedBatch.from_padded(IDS, *rest),
    }[call]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if kind is ValueError:
            with pytest.raises(ValueError, match="attention_mask"):
                ask()
        else:
            ask()
    assert [one.category for one in heard] == [kind] * (kind is UserWarning)
    assert all("token_type_ids=" in str(one.message) for one in heard)


TOKENIZER = from_vocabulary([*"[PAD] [UNK] [CLS] [SEP] [MASK] the cat".split(), *(f"w{n}" for n in range(93))])
ASKS = {
    "fill_mask": lambda model: FillMask(model, TOKENIZER)("the [MASK]"),
    "score": lambda model: list(minibert.pseudo_log_likelihood(model, TOKENIZER, ["the cat"])),
    "mlm": lambda model: mask_and_guess(model, TOKENIZER, "the cat the cat"),
    "study": lambda model: study(model, TOKENIZER, "the [MASK]"),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize(
    ("rows", "kind"), [(99, ValueError), (100, None), (104, None), (128, None), (137, UserWarning), (1001, UserWarning)]
)
def test_a_tokenizer_and_a_model_of_other_sizes_are_told(ask, rows, kind):
    model = BertForMaskedLM(BertConfig(**{**SIZES, "vocab_size": rows})).eval()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if kind is ValueError:
            with pytest.raises(ValueError, match=r"100.*99"):
                ASKS[ask](model)
        else:
            ASKS[ask](model)
    if kind is UserWarning:
        assert any("100" in str(one.message) and str(rows) in str(one.message) for one in heard)
    else:
        assert not heard


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
        parts = {
            re.sub(r"\d+", "N", name).removesuffix(".weight").removesuffix(".bias")
            for name, _ in model.named_parameters()
        }
        assert {name.removesuffix(".bias") for name in names} == parts


def test_in_a_module_around_the_model_its_own_names_choose(pair):
    around = nn.ModuleDict({"model": pair[0]})
    for name, x in around.model.named_parameters():
        x.requires_grad = not name.startswith("bert.encoder.layer.0.")
    frozen = {name for name, x in around.named_parameters() if not x.requires_grad}
    assert frozen == {name for name, _ in around.named_parameters() if name.startswith("model.layers.0.")} != set()


# ------------------------------------------------------------------------------------------------------------- by hooks


def test_hooks_see_rows_in_the_padded_call_and_tokens_in_the_packed_one(pair):
    seen = []
    for part in (pair[0].embeddings, pair[0].layers[0]):
        part.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    batch = PackedBatch.from_padded(IDS, MASK)
    assert pair[0](IDS, MASK).logits.shape[:2] == (3, 7)
    pair[0].encode(batch)
    assert seen == [(3, 7, 32)] * 2 + [(batch.num_tokens, 32)] * 2


def test_a_head_is_masked_by_its_columns(pair):
    ours, theirs = pair
    with torch.no_grad():
        ours.layers[1].attention.output.weight[:, 8:16] = 0  # the second of 4 heads of 8
    keeps = torch.ones(32).index_fill(0, torch.arange(8, 16), 0)
    theirs.bert.encoder.layer[1].attention.output.dense.register_forward_pre_hook(lambda _, given: given[0] * keeps)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)  # sums in other orders


# ---------------------------------------------------------------------------------------------------------------- hints


def load(folder, under="cpu", **more):
    with torch.device(under):
        return BertForMaskedLM.from_pretrained(folder, **more)


def its(name):
    return lambda m, f: getattr(m, name)


def loads(**how):
    return lambda m, f: load(f, **how)


def saves(**how):
    return lambda m, f: m.save_pretrained(f / "other", **how)


# What is typed, and what the error names as the remedy.
TYPED = {
    "num_labels": (loads(num_labels=2), "has no classifier"),
    "device_map='auto'": (loads(device_map="auto"), 'give device="cuda"'),
    "two devices": (loads(device_map="cpu", device="cuda"), "give one of the two"),
    "two dtypes": (loads(dtype=torch.bfloat16, torch_dtype=torch.float64), r"bfloat16.*float64.*give one"),
    "attn_implementation='flash'": (loads(attn_implementation="flash"), "use_kernel"),
    "trust_remote_code": (loads(trust_remote_code=True), "trust_remote_code=False only, not True: no code"),
    "use_safetensors=False": (loads(use_safetensors=False), "use_safetensors=True only"),
    "add_pooling_layer": (loads(add_pooling_layer=True), "hidden_states"),
    "state_dict": (loads(state_dict={}), "load_state_dict"),
    "layer_norm_eps": (loads(layer_norm_eps=1e-5), "what the file says"),
    "a config": (loads(config=BertConfig(**SIZES)), r"BertForMaskedLM\(config\)"),
    "a slip": (loads(local_file_only=True), "did you mean local_files_only"),
    "length": (loads(length=3), "its docstring lists"),
    "under meta": (lambda m, f: load(f, "meta"), r"BertForMaskedLM\(config\)"),
    "device='meta'": (loads(device="meta"), r"BertForMaskedLM\(config\)"),
    "device_map='meta'": (loads(device_map="meta"), r"BertForMaskedLM\(config\)"),
    "max_shard_size": (saves(max_shard_size="5GB"), "takes no argument 'max_shard_size': one file"),
    "push_to_hub=True": (saves(push_to_hub=True), "hf upload"),
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
    "enable_input_require_grads": (its("enable_input_require_grads"), "gradient_checkpointing_enable"),
    "activation_checkpointing_enable": (its("activation_checkpointing_enable"), "gradient_checkpointing_enable"),
    "set_attn_implementation": (its("set_attn_implementation"), "use_kernel"),
    "push_to_hub": (its("push_to_hub"), "save_pretrained"),
    "init_weights": (its("init_weights"), r"BertForMaskedLM\(config\)"),
    "pooler": (its("pooler"), "output_hidden_states"),
    "bert.pooler": (lambda m, f: m.bert.pooler, "output_hidden_states"),
    "get_memory_footprint": (its("get_memory_footprint"), "nbytes"),
    "elephants": (its("elephants"), "BertForMaskedLM has no 'elephants'"),
    "last_hidden_state": (lambda m, f: m(IDS).last_hidden_state, "hidden_states"),
}

WORKS = dict(output_attentions=True, output_hidden_states=True, return_dict=False, device_map="cpu", token=False,
             attn_implementation="eager", low_cpu_mem_usage=False, subfolder="", from_tf=False, use_cache=False,
             hidden_dropout_prob=0.0, is_decoder=False, tie_word_embeddings=True, resume_download=True,
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


@pytest.mark.parametrize("name", WORKS)
def test_what_changes_nothing_here_is_taken(name, folder):
    assert load(folder, **{name: WORKS[name]}).config.vocab_size == 99


def test_the_call_takes_use_cache_and_a_configuration_of_transformers_makes_a_model(pair):
    assert torch.equal(pair[0](IDS, use_cache=False).logits, pair[0](IDS).logits)
    assert BertForMaskedLM(transformers.BertConfig(**SIZES)).config == BertForMaskedLM(SIZES).config


def test_what_loading_was_told_holds_in_each_call(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    asked = load(tmp_path, output_attentions=True, output_hidden_states=True)(IDS)
    assert (len(asked.attentions), len(asked.hidden_states)) == (2, 3)
    model = load(tmp_path, return_dict=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert type(model(IDS)) is tuple
    assert torch.equal(model.train()(IDS)[0], model(IDS)[0])
    assert pair[0].resize_token_embeddings(100, pad_to_multiple_of=64) is pair[0].embeddings.word
    assert pair[0].config.vocab_size == 128
