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
from minibert import BertForMaskedLM, FillMask

SIZES = {**CONFIGS["batch 13, gelu"], "num_hidden_layers": 2}
GIVEN = make_batch(SIZES, "dense", (3, 7))
IDS, LABELS = GIVEN["input_ids"], GIVEN["labels"]
ALL = dict(output_hidden_states=True, output_attentions=True)
RIGHT, LEFT = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[0, 0, 5, 6, 7]])


def with_gradient(model):
    model.zero_grad()
    model(**GIVEN).loss.backward()
    return model


def gradient(model):
    return with_gradient(model).get_input_embeddings().weight.grad


def stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        with_gradient(model)
        optimizer.step()
    return model(**GIVEN).loss


def saved(model, folder, dtype="float32", **how):
    model.save_pretrained(folder, **how)
    again = type(model).from_pretrained(folder, dtype=dtype)
    return [again(IDS).logits, again.training, again.dtype, again.config.vocab_size]


def shrunk(model):
    model.resize_token_embeddings(50)
    return model(IDS.clamp(max=49)).logits


def another_word(model):
    """The head reads the words' own vectors, after training too."""
    stepped(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    return model(IDS).logits[..., 7]


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


def of_mask(model, ids, **more):
    mask = (ids > 0).long()
    return model(ids, attention_mask=mask, **more).logits[mask.bool()]


def loads(under="cpu", **how):
    def load(_, folder):
        with torch.device(under):
            return BertForMaskedLM.from_pretrained(folder, **how)

    return load


# What is asked of both, and answered alike.
SAME = {
    # transformers: outputs
    "forward begins with input_ids": lambda m, _: list(inspect.signature(m.forward).parameters)[:2],
    "the output as a mapping": lambda m, _: [dict(m(**GIVEN)), len(m(IDS)), "loss" in m(IDS), m(IDS).get("x", 5)],
    "its slices": lambda m, _: [m(**GIVEN)[:1], m(**GIVEN)[-1], m(**GIVEN)["loss"], m(**GIVEN).get("loss")],
    "a tuple has what the mapping has": lambda m, _: m(**GIVEN, **ALL, return_dict=False),
    "dropout in training": lambda m, _: torch.equal(m.train()(IDS).logits, m(IDS).logits),
    "training, and back": lambda m, _: [m.train(True).training, m.train(False)(IDS).logits],
    "a row alone, and in a batch": lambda m, _: torch.cat([m(row[None]).logits for row in IDS]),
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
    "all frozen but the words": lambda m, _: frozen(m),
    # transformers: weights and sizes
    "number of parameters": lambda m, _: m.num_parameters(),
    "without the embeddings": lambda m, _: m.num_parameters(exclude_embeddings=True),
    "input embeddings": lambda m, _: m.get_input_embeddings().weight,
    "answers with fewer tokens": lambda m, _: shrunk(m),
    "as many tokens as before": lambda m, _: m.resize_token_embeddings(99).weight is m.resize_token_embeddings().weight,
    "tokens up to a multiple": lambda m, _: m.resize_token_embeddings(100, pad_to_multiple_of=64).weight.shape,
    "the head is tied": lambda m, _: another_word(m),
    "tie_weights changes nothing": lambda m, _: [m.tie_weights(), m(IDS).logits][1],
    # transformers: files
    "saved and loaded": saved,
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
    "torch.export": lambda m, _: torch.export.export(m, (IDS,), strict=False).module()(IDS)["logits"],
    "torch.compile": lambda m, _: torch.compile(m, backend="eager")(IDS).logits,
    "DataParallel": lambda m, _: nn.DataParallel(m)(IDS).logits,
    "an average of models": lambda m, _: torch.optim.swa_utils.AveragedModel(m)(IDS).logits,
    "clipping gradients": lambda m, _: nn.utils.clip_grad_norm_(with_gradient(m).parameters(), 1.0),
    "autocast": lambda m, _: torch.autocast("cpu", torch.bfloat16)(m)(IDS).logits.dtype,
    "inference mode": lambda m, _: torch.inference_mode()(m)(IDS).logits,
}

# What is typed by habit or in those checks and refused here; and what the error names as the remedy. (Arguments that
# have one value here: tests/test_packing.py.)
REFUSED = {
    "head_mask": (lambda m, f: m(IDS, head_mask=torch.ones(2, 4)), "attention.output.weight"),
    "inputs_embeds": (lambda m, f: m(inputs_embeds=torch.ones(3, 7, 32)), "register_forward_hook"),
    "a mask for each query": (lambda m, f: m(IDS, attention_mask=torch.ones(3, 7, 7)), "input_ids is"),
    "cross attention": (lambda m, f: m(IDS, encoder_hidden_states=torch.ones(3, 7, 32)), "encoder"),
    "a decoder": (lambda m, f: BertForMaskedLM(transformers.BertConfig(**SIZES, is_decoder=True)), "is_decoder"),
    "the output embeddings": (lambda m, f: m.get_output_embeddings(), "word_embeddings"),
    "other input embeddings": (lambda m, f: m.set_input_embeddings(nn.Embedding(9, 32)), "embeddings.word"),
    "reentrancy": (lambda m, f: m.gradient_checkpointing_enable({"use_reentrant": True}), "use_reentrant=False"),
    "writing on": (lambda m, f: m.generate(IDS), "FillMask"),
    "the encoder called by itself": (lambda m, f: m.bert(IDS), "output_hidden_states=True"),
    "a constant number in the loss": (lambda m, f: m(IDS, labels=IDS, num_items_in_batch=9), "accepts_loss_kwargs"),
    "device_map='auto'": (loads(device_map="auto"), 'give device="cuda"'),
    "two devices": (loads(device_map="cpu", device="cuda"), "give one of the two"),
    "two dtypes": (loads(dtype=torch.bfloat16, torch_dtype=torch.float64), r"bfloat16.*float64.*give one"),
    "no such device": (loads(device="abacus"), "device abacus cannot be used here, where there is cpu and"),
    "under meta": (loads("meta"), r"BertForMaskedLM\(config\)"),
    "tokeniser": (lambda m, f: m.save_pretrained(f / "other", tokeniser=1), "did you mean tokenizer"),
    "masked_lm_labels": (lambda m, f: m(IDS, masked_lm_labels=IDS), "called labels"),
    "attention_masks": (lambda m, f: m(IDS, attention_masks=IDS), "did you mean attention_mask"),
    "model(enc)": (lambda m, f: m(transformers.BatchEncoding({"input_ids": IDS})), r"model\(\*\*"),
    "a list": (lambda m, f: m([[1, 2, 3]]), "input_ids must be a tensor, not list: torch.tensor"),
    "an array": (lambda m, f: m(IDS, IDS.numpy()), "attention_mask must be a tensor, not ndarray: torch.from_numpy"),
    "nothing": (lambda m, f: m(), "input_ids is missing"),
    "by place": (lambda m, f: m(IDS, None, None, None, None, None), "minibert export"),
    "FillMask(their model)": (lambda m, f: FillMask(twins(SIZES)[1], None), r"from_pretrained\(folder\)"),
    "BertForMaskedLM(name)": (lambda m, f: BertForMaskedLM("bert-base-uncased"), "from_pretrained"),
    "mean_resizing=False": (lambda m, f: m.resize_token_embeddings(100, mean_resizing=False), "word.weight"),
    "enable_input_require_grads": (lambda m, f: m.enable_input_require_grads, "gradient_checkpointing_enable"),
    "push_to_hub": (lambda m, f: m.push_to_hub, "save_pretrained"),
    "bert.pooler": (lambda m, f: m.bert.pooler, "output_hidden_states"),
    "elephants": (lambda m, f: m.elephants, "BertForMaskedLM has no 'elephants'"),
    "config.to_json_string": (lambda m, f: m.config.to_json_string(), r"json.dumps\(config.to_dict\(\)\)"),
    "config.update": (lambda m, f: m.config.update({"hidden_size": 8}), "dataclasses.replace"),
    "config.use_cache": (lambda m, f: m.config.use_cache, "BertConfig has no 'use_cache'.*hidden_size"),
}  # fmt: skip
WORKS = dict(device_map={"": "cpu"}, token=False, attn_implementation="eager", low_cpu_mem_usage=False, subfolder="",
             from_tf=False, use_cache=False, is_decoder=False, tie_word_embeddings=True, resume_download=True,
             trust_remote_code=False, cache_dir=None)  # fmt: skip


def close(got, expected):
    (got, form), (expected, form_expected) = map(_pytree.tree_flatten, (got, expected))
    assert form == form_expected
    for one, wanted in zip(got, expected, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=2e-5)  # sums in other orders
        else:
            assert one == wanted


@pytest.fixture
def pair():
    return twins(SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    twins(SIZES)[0].save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # of torch, about what it will change
@pytest.mark.parametrize("check", [pytest.param(x, marks=[pytest.mark.slow] * x.startswith("torch.")) for x in SAME])
def test_it_holds_as_for_transformers_own(check, pair, tmp_path):
    answers = []
    for number, model in enumerate(pair):
        torch.manual_seed(0)
        answers.append(SAME[check](model, tmp_path / str(number)))
    close(*answers)


@pytest.mark.parametrize("typed", REFUSED)
def test_what_is_refused_says_what_to_type(typed, pair, folder):
    call, remedy = REFUSED[typed]
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


def test_the_cookbook_has_the_count():
    page = (Path(minibert.__file__).parent / "cookbook.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d+) checks that", page) == [str(len(SAME))]
