"""The table of a trace, in the code and in the README, and how a model's pass is recorded."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from traced import traced
from twins import CONFIGS, make_batch, twins

from minibert import BertConfig
from minibert.trace import standard_inputs, trace
from minibert.trace.recorder import GIVEN_BY, PLACES
from minibert.trace.table import INPUTS, TABLE, check_inputs, expected_names, explain, row_of

README = Path(__file__).parents[2] / "minibert" / "parity" / "README.md"
SIZES = {**CONFIGS["3 heads, gelu_new"], "num_hidden_layers": 1}
HALF_SUMS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def table_of_the_readme():
    """TABLE with the hub's module that gives or reads each tensor; where there is none, what the tensor is."""
    modules = {name: f"into {module}" for name, side, _, module in PLACES if side == "in"}
    modules |= {name: module + ", in heads" * (".self." in module) for name, module in GIVEN_BY.items()}
    return "\n".join(f"{name:<27}{shape or '-':<9}{modules.get(name, meaning)}" for name, shape, meaning in TABLE)


def test_the_readme_has_the_table_of_the_code():
    assert table_of_the_readme() in README.read_text(encoding="utf-8"), f"put it there:\n{table_of_the_readme()}"


@pytest.mark.parametrize("mask", ["left", "holes"])
def test_both_models_fill_the_table_alike(mask):
    a, b, ours = traced(mask)
    assert a.names == b.names == expected_names(ours.config)
    assert {row_of(name) for name in a.names} == {name for name, _, _ in TABLE}
    assert all(explain(name) for name in a.names)
    for name in a.names:
        # float32 at order 1, some tens of roundings: see twins.LOGITS
        torch.testing.assert_close(a.tensors[name], b.tensors[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["ours", "theirs"])
def test_a_trace_holds_what_the_model_was_asked_and_computes(which):
    model, batch = twins(SIZES)[which], make_batch(SIZES, "left", (3, 11), two_segments=True)
    found = trace(model, **batch, grad=True).tensors
    assert all(torch.equal(found[name], batch[name]) for name in INPUTS)
    out, seen = model(**batch), batch["attention_mask"].bool()
    out.loss.backward()
    torch.testing.assert_close(found["logits"][seen], out.logits[seen], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["loss"], out.loss, rtol=0, atol=1e-5)
    gradient = (model.head if which == 0 else model.cls.predictions).bias.grad.clone()
    torch.testing.assert_close(found["gradient.cls.predictions.bias"], gradient, rtol=0, atol=1e-5)
    for name, letters, _ in TABLE[4:-2]:  # padding: B S …, B H S K, and the keys of B H S S
        x = found[name.replace(".N.", ".0.")]
        x = x.transpose(1, 2) if letters.startswith("B H") else x
        assert not x[~seen].any(), name
        assert letters != "B H S S" or not x.transpose(1, 3)[~seen].any(), name
    assert all(x.untyped_storage().nbytes() == x.nbytes for name, x in found.items() if name.startswith("gradient."))
    alone = trace(model, batch["input_ids"])
    assert "loss" not in alone.tensors
    assert not any(name.startswith("gradient.") for name in alone.tensors)
    assert bool((alone.tensors["attention_mask"] == 1).all())
    # and the model is as it was
    assert torch.equal(gradient, (model.head if which == 0 else model.cls.predictions).bias.grad)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert which == 0 or model.config._attn_implementation == "eager"


def test_a_parameter_that_nothing_reads_has_the_gradient_0():
    _, theirs = twins(SIZES)
    theirs.cls.unread = torch.nn.Parameter(torch.ones(3))
    found = trace(theirs, **make_batch(SIZES, "dense", (2, 7)), grad=True).tensors
    assert found["gradient.cls.unread"].tolist() == [0, 0, 0]


def test_dropout_is_recorded_where_the_model_trains():
    for model in twins(SIZES):
        batch = make_batch(SIZES, "dense", (2, 7))
        quiet, loud = trace(model, **batch).tensors, trace(model.train(), **batch).tensors
        assert model.training
        for name in ("embeddings.norm", "layers.0.probabilities", "layers.0.attention_output", "layers.0.feed_forward"):
            assert bool((loud[name] == 0).any()), name
            assert not bool((quiet[name] == 0).any()), name


@pytest.fixture
def loose():
    """A user's own settings: TF32 and sums in half precision are allowed."""
    matmul = torch.backends.cuda.matmul
    before = [(name, getattr(matmul, name)) for name in HALF_SUMS]
    torch.set_float32_matmul_precision("medium")
    for name in HALF_SUMS:
        setattr(matmul, name, True)
    yield
    torch.set_float32_matmul_precision("highest")
    for name, value in before:
        setattr(matmul, name, value)


@pytest.mark.parametrize("which", [0, 1], ids=["ours", "theirs"])
@pytest.mark.parametrize("fails", [False, True])
def test_exact_arithmetic_and_only_in_the_trace(which, fails, loose):
    """No TF32, no sums in half precision, no autocast; afterwards, and after an error, all is as the user had it."""
    model, batch, seen = twins(SIZES, "sdpa")[which], make_batch(SIZES, "right", (2, 11)), []

    def settings():
        half = [getattr(torch.backends.cuda.matmul, name) for name in HALF_SUMS]
        return torch.get_float32_matmul_precision(), *half, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()

    def look(*_):
        seen.append(settings())
        if fails:
            raise KeyError

    exact, before = trace(model, **batch).tensors["logits"], settings()
    norm = "embeddings.LayerNorm" if which == 0 else "bert.embeddings.LayerNorm"
    model.get_submodule(norm).register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError) if fails else nullcontext():
        assert torch.equal(trace(model, **batch).tensors["logits"], exact)
    assert settings() == before == ("medium", True, True, False, True)
    assert seen == [("highest", False, False, False, False)]  # and no graph, where no gradient is asked for
    assert which == 0 or model.config._attn_implementation == "sdpa"


def test_models_that_trace_cannot_read():
    ids = torch.tensor([[5, 6]])
    for key, value in (("position_embedding_type", "relative_key"), ("tie_word_embeddings", False)):
        _, theirs = twins(SIZES)
        setattr(theirs.config, key, value)
        with pytest.raises(ValueError, match=f"{key} is .*{value}.*BERT with"):
            trace(theirs, ids)
    small = transformers.BertModel(transformers.BertConfig(**SIZES))
    for other in (small, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=rf"not .*{type(other).__name__}: write the trace from your port"):
            trace(other, ids)
    ours, _ = twins(SIZES)
    with pytest.raises(ValueError, match="give labels too"):
        trace(ours, ids, grad=True)
    with pytest.raises(ValueError, match="requires_grad_"):
        trace(ours.requires_grad_(False), **make_batch(SIZES, "dense", (2, 7)), grad=True)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("an id in the padding is not an id below 131", dict(input_ids=[[1, 200]], attention_mask=[[1, 0]])),
        ("no token to", dict(input_ids=[[1, 2]], attention_mask=[[0, 0]])),
        (r"\(1, 2\).*\(1, 1\)|\(1, 1\).*\(1, 2\)", dict(input_ids=[[1, 2]], labels=[[1]])),
        ("all labels are -100", dict(input_ids=[[1, 2]], labels=[[-100, -100]])),
        ("attention_mask is 0", dict(input_ids=[[1, 2]], attention_mask=[[1, 0]], labels=[[1, 2]])),
        (r"the label at \(0, 1\) is 131", dict(input_ids=[[1, 2]], labels=[[1, 131]])),
        ("11", dict(input_ids=[[1] * 12])),
        ("3", dict(input_ids=[[1, 2]], token_type_ids=[[0, 3]])),
    ],
)
def test_inputs_outside_a_model_are_refused_by_their_values(words, asked):
    with pytest.raises(ValueError, match=words):
        check_inputs(BertConfig(**SIZES), **{name: torch.tensor(x) for name, x in asked.items()})


@pytest.mark.parametrize("longest", [1, 2, 7, 64])
def test_the_standard_inputs_always_have_a_label_and_fit(longest):
    for vocab_size in (2, 99, 30522):
        config = BertConfig(**{**SIZES, "max_position_embeddings": longest, "vocab_size": vocab_size})
        check_inputs(config, **standard_inputs(config))  # a model of this size takes them, and there is a label


def test_the_standard_inputs_differ_in_every_row_and_have_no_size_of_the_model():
    for heads, head_size, inner, longest in ((12, 32, 96, 512), (16, 64, 17, 512), (3, 16, 4, 64), (4, 3, 9, 9)):
        sizes = dict(hidden_size=heads * head_size, num_attention_heads=heads, intermediate_size=inner)
        config = BertConfig(**{**SIZES, **sizes, "max_position_embeddings": longest})
        batch = standard_inputs(config)
        rows, length = batch["input_ids"].shape
        assert not {rows, length} & {heads, head_size, heads * head_size, inner}
        assert rows != length
        for name in ("attention_mask", "token_type_ids"):
            assert len({tuple(row) for row in batch[name].tolist()}) == rows, name
        assert sum(0 in row for row in batch["attention_mask"].tolist()) >= 3
