"""What other projects' test-suites check of a model like this one, each a row: the same is asked of ours and of
transformers' model, and the answers are equal; or ours refuses and says what to type. The cookbook has the count.

Read for it, and written anew: transformers (the tests that all its models share, its ConfigTester, its tests of BERT
and of the Trainer), google-research/bert, flash-attention's tests of its BERT, PEFT, accelerate, PyTorch's own of
torch.func, torch.export and state dicts, and captum.
"""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree
from twins import CONFIGS, make_batch, twins

import minibert
from minibert import BertForMaskedLM

SIZES = {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 2}
GIVEN = make_batch(SIZES, "dense", (3, 7))
IDS, LABELS = GIVEN["input_ids"], GIVEN["labels"]
ALL = dict(output_hidden_states=True, output_attentions=True)
RIGHT, LEFT = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[0, 0, 5, 6, 7]])


def with_gradient(model, **more):
    model.zero_grad()
    model(**GIVEN, **more).loss.backward()
    return model


def gradient(model):
    return with_gradient(model).get_input_embeddings().weight.grad


def by_states_and_maps(model):
    out = model(**GIVEN, **ALL)
    kept = [out.hidden_states[0], out.hidden_states[-1], out.attentions[0]]
    for x in kept:
        x.retain_grad()
    out.logits[0].sum().backward()
    return [x.grad for x in kept]


def stepped(model, count=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(count):
        with_gradient(model)
        optimizer.step()
    return model(**GIVEN).loss


def saved(model, folder, dtype="float32", **how):
    model.save_pretrained(folder, **how)
    again = type(model).from_pretrained(folder, dtype=dtype)
    return [again(IDS).logits, again.training, again.dtype, again.config.vocab_size]


def resized(model, size):
    word = model.resize_token_embeddings(size)
    ids = IDS.clamp(max=size - 1)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [word is model.get_input_embeddings(), word.weight.shape, model.config.vocab_size, word.weight.grad.shape]


def shrunk(model):
    model.resize_token_embeddings(50)
    return model(IDS.clamp(max=49)).logits


def another_word(model):
    """The head reads the words' own vectors."""
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    return model(IDS).logits[..., 7]


def tied_after_a_step(model):
    with_gradient(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return another_word(model)


def checkpointed(model):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = [model.is_gradient_checkpointing]
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    found.append(gradient(model))
    model.gradient_checkpointing_disable()
    return [*found, model.is_gradient_checkpointing]


def frozen(model):
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return [gradient(model), model.num_parameters(only_trainable=True)]


def hooked(model):
    calls = []
    for part in model.bert.encoder.layer:
        part.register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    return len(calls)


def recorded(model):
    return torch.export.export(model, (IDS,), {"labels": IDS}, strict=False).module()(IDS, labels=IDS)["logits"]


def functional(model):
    weights = {name: x.detach() for name, x in model.named_parameters()}
    found = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (), GIVEN).loss)(weights)
    return sum(x.square().sum() for x in found.values())


def rows_alone(model):
    return torch.cat([model(row[None], attention_mask=torch.ones_like(row)[None]).logits for row in IDS])


def of_mask(model, ids, **more):
    mask = (ids > 0).long()
    return model(ids, attention_mask=mask, **more).logits[mask.bool()]


def decayed(model):
    """What the Trainer's choice of names gives."""
    return sum(x.numel() for name, x in model.named_parameters() if "bias" not in name and "LayerNorm" not in name)


def loaded(**how):
    return BertForMaskedLM.from_pretrained("minibert-uncased", **how)


# What is asked of both, and answered alike.
SAME = {
    # transformers: outputs
    "forward begins with input_ids": lambda m, _: list(inspect.signature(m.forward).parameters)[:2],
    "names of the outputs": lambda m, _: list(m(**GIVEN, **ALL)),
    "names without labels": lambda m, _: list(m(IDS)),
    "values of all outputs": lambda m, _: m(**GIVEN, **ALL).to_tuple(),
    "a tuple has what the mapping has": lambda m, _: m(**GIVEN, **ALL, return_dict=False),
    "the loss is first": lambda m, _: m(**GIVEN)[0],
    "slices of the output": lambda m, _: m(**GIVEN)[:1],
    "how many states and maps": lambda m, _: [len(x) for x in m(**GIVEN, **ALL).to_tuple()[2:]],
    "shapes of states and maps": lambda m, _: [x.shape for x in _pytree.tree_leaves(list(m(IDS, **ALL).values()))],
    "asked twice, the same": lambda m, _: torch.equal(m(IDS).logits, m(IDS).logits),
    "dropout in training": lambda m, _: torch.equal(m.train()(IDS).logits, m(IDS).logits),
    "training, and back": lambda m, _: [m.train(True).training, m.train(False)(IDS).logits],
    "gradients by states and maps": lambda m, _: by_states_and_maps(m),
    "a row alone, and in a batch": lambda m, _: rows_alone(m),
    "padding on the right": lambda m, _: of_mask(m, RIGHT),
    "padding on the left": lambda m, _: of_mask(m, LEFT),
    "positions by hand": lambda m, _: of_mask(m, LEFT, position_ids=torch.tensor([[0, 0, 0, 1, 2]])),
    "token types": lambda m, _: m(IDS, token_type_ids=(torch.arange(7) > 3).long().expand(3, 7)).logits,
    "a mask of floats": lambda m, _: m(IDS, attention_mask=torch.ones(3, 7)).logits,
    "ids of 32 bits": lambda m, _: m(IDS.int()).logits,
    "the longest sequence": lambda m, _: m(torch.arange(19)[None]).logits,
    "labels of -100 are left out": lambda m, _: m(IDS, labels=LABELS).loss,
    "None for what is left out": lambda m, _: m(IDS, attention_mask=None, token_type_ids=None, labels=None).logits,
    # transformers: training
    "every parameter has a gradient": lambda m, _: all(x.grad is not None for x in with_gradient(m).parameters()),
    "the gradient of the words": lambda m, _: gradient(m),
    "three steps of training": lambda m, _: stepped(m),
    "activation checkpointing": lambda m, _: checkpointed(m),
    "all frozen but the words": lambda m, _: frozen(m),
    "weights that decay": lambda m, _: decayed(m),
    # transformers: weights and sizes
    "number of parameters": lambda m, _: m.num_parameters(),
    "without the embeddings": lambda m, _: m.num_parameters(exclude_embeddings=True),
    "input embeddings": lambda m, _: m.get_input_embeddings().weight,
    "more tokens": lambda m, _: resized(m, 109),
    "fewer tokens": lambda m, _: resized(m, 50),
    "answers with fewer tokens": lambda m, _: shrunk(m),
    "as many tokens as before": lambda m, _: m.resize_token_embeddings(99).weight is m.resize_token_embeddings().weight,
    "tokens up to a multiple": lambda m, _: m.resize_token_embeddings(100, pad_to_multiple_of=64).weight.shape,
    "the head is tied": lambda m, _: another_word(m),
    "and stays so": lambda m, _: tied_after_a_step(m),
    "tie_weights changes nothing": lambda m, _: [m.tie_weights(), m(IDS).logits][1],
    # transformers: files
    "saved and loaded": saved,
    "saved as safetensors": lambda m, folder: saved(m, folder, safe_serialization=True),
    "saved from a state dict": lambda m, folder: saved(m, folder, state_dict=m.state_dict()),
    "saved in bfloat16": lambda m, folder: saved(m.bfloat16(), folder, "auto")[1:],
    "the configuration, there and back": lambda m, _: type(m.config).from_dict(m.config.to_dict()).hidden_size,
    "a copy of the configuration is equal": lambda m, _: copy.deepcopy(m.config) == m.config,
    # torch and what builds on it
    "a deep copy": lambda m, _: copy.deepcopy(m)(IDS).logits,
    "pickled": lambda m, _: pickle.loads(pickle.dumps(m))(IDS).logits,
    "its own state dict": lambda m, _: [str(m.load_state_dict(m.state_dict())), m(IDS).logits],
    "in float64": lambda m, _: m.double()(IDS).logits,
    "in float16": lambda m, _: m.half()(IDS).logits.dtype,
    "moved and converted": lambda m, _: [m.to("cpu", torch.bfloat16).dtype, m.device],
    "on the meta device": lambda m, _: m.to("meta").device,
    "hooks on layers are called once": lambda m, _: hooked(m),
    "torch.jit.trace": lambda m, _: torch.jit.trace(m, IDS, strict=False)(IDS)["logits"],
    "torch.export": lambda m, _: recorded(m),
    "torch.compile": lambda m, _: torch.compile(m, backend="eager")(IDS).logits,
    "torch.func": lambda m, _: functional(m),
    "DataParallel": lambda m, _: nn.DataParallel(m)(IDS).logits,
    "an average of models": lambda m, _: torch.optim.swa_utils.AveragedModel(m)(IDS).logits,
    "clipping gradients": lambda m, _: nn.utils.clip_grad_norm_(with_gradient(m).parameters(), 1.0),
    "autocast": lambda m, _: torch.autocast("cpu", torch.bfloat16)(m)(IDS).logits.dtype,
    "inference mode": lambda m, _: torch.inference_mode()(m)(IDS).logits,
}

# What others check and ours refuses: what is typed, and what the error names.
REFUSED = {
    "head_mask": (lambda m: m(IDS, head_mask=torch.ones(2, 4)), "attention.output.weight"),
    "inputs_embeds": (lambda m: m(inputs_embeds=torch.ones(3, 7, 32)), "register_forward_hook"),
    "pruned heads": (lambda m: m.prune_heads({0: [1]}), "attention.output.weight"),
    "a mask for each query": (lambda m: m(IDS, attention_mask=torch.ones(3, 7, 7)), "input_ids is"),
    "cross attention": (lambda m: m(IDS, encoder_hidden_states=torch.ones(3, 7, 32)), "encoder"),
    "a cache": (lambda m: m(IDS, past_key_values=()), "encoder"),
    "a decoder": (lambda m: BertForMaskedLM(transformers.BertConfig(**SIZES, is_decoder=True)), "is_decoder"),
    "untied embeddings": (lambda m: loaded(tie_word_embeddings=False), "True only"),
    "the output embeddings": (lambda m: m.get_output_embeddings(), "word_embeddings"),
    "other input embeddings": (lambda m: m.set_input_embeddings(nn.Embedding(9, 32)), "embeddings.word"),
    "mismatched sizes": (lambda m: loaded(ignore_mismatched_sizes=True), "False only"),
    "a pickle": (lambda m: m.save_pretrained("nowhere", safe_serialization=False), "safetensors"),
    "reentrancy": (lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}), "use_reentrant=False"),
    "writing on": (lambda m: m.generate(IDS), "FillMask"),
    "the pooler": (lambda m: m(IDS).pooler_output, "hidden_states"),
    "the encoder called by itself": (lambda m: m.bert(IDS), "output_hidden_states=True"),
    "a constant number in the loss": (lambda m: m(IDS, labels=IDS, num_items_in_batch=9), "accepts_loss_kwargs"),
}  # fmt: skip


def close(got, expected):
    assert type(got) is type(expected) or isinstance(got, tuple | list | torch.Tensor)
    if isinstance(got, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)  # sums in other orders
    elif isinstance(got, tuple | list) and not isinstance(got, torch.Size):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            close(one, other)
    else:
        assert got == expected


@pytest.mark.filterwarnings("ignore")  # of torch, about what it will change
@pytest.mark.parametrize("check", [pytest.param(x, marks=[pytest.mark.slow] * x.startswith("torch.")) for x in SAME])
def test_it_holds_as_for_transformers_own(check, tmp_path):
    ours, theirs = twins(SIZES)
    answers = []
    for number, model in enumerate((ours, theirs)):
        torch.manual_seed(0)
        answers.append(SAME[check](model, tmp_path / str(number)))
    close(*answers)


@pytest.mark.parametrize("check", REFUSED)
def test_what_is_refused_says_what_to_type(check):
    typed, remedy = REFUSED[check]
    with pytest.raises((TypeError, ValueError, AttributeError), match=remedy):
        typed(twins(SIZES)[0])


def test_the_cookbook_has_the_count():
    page = (Path(minibert.__file__).parent / "cookbook.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"Of (\d+) checks .*?, (\d+) hold", page, re.DOTALL)
    assert found == (str(len(SAME) + len(REFUSED)), str(len(SAME)))
