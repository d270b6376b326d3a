"""int8: linear layers beside an independent reference, each text by itself, memory, refusals."""

import exact
import pytest
import torch
from forms import TOLERANCE
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import gelu, relu, silu
from twins import CONFIGS, twins

from minibert import BertConfig, BertForMaskedLM, PackedBatch, prepare_for_inference
from minibert.attention import use_kernel
from minibert.inference import int8, onednn
from minibert.inference.int8 import Int8Linear
from minibert.inference.onednn import FUSED, NONE
from minibert.inference.prepare import working_ways

REFERENCE = {
    NONE: lambda y: y,
    FUSED["gelu"]: gelu,
    FUSED["gelu_new"]: lambda y: gelu(y, approximate="tanh"),
    FUSED["relu"]: relu,
    FUSED["silu"]: silu,
}
pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture
def model():
    return twins(CONFIGS["batch 13, gelu"])[0]


# ---------------------------------------------------------------------------------------------------- the linear layer


def rows(number, columns):
    """Rows of very different size. No number is near the middle between two steps, where float32, in which the layer
    divides, may round to another step than float64.
    """
    numbers = torch.randint(-126, 127, (number, columns)) + torch.empty(number, columns).uniform_(-0.4, 0.4)
    largest = torch.randint(columns, (number, 1))
    numbers.scatter_(1, largest, torch.where(torch.rand(number, 1) < 0.5, -127.0, 127.0))
    return numbers * 10 ** torch.empty(number, 1).uniform_(-3, 1)


def quantised(x):
    """x (N, columns) as whole numbers and steps (N, 1), in float64. torch.round takes halves to the even number."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    return torch.where(step > 0, x.double() / step, 0).round(), step


@pytest.mark.parametrize("amx", [True, False])  # then the product takes numbers with a sign
@pytest.mark.parametrize("size", [(37, 99), (3072, 17), (1, 1)], ids=str)
@pytest.mark.parametrize("activation", REFERENCE)
@torch.inference_mode()
def test_it_is_the_product_of_rounded_numbers(size, activation, amx, monkeypatch):
    monkeypatch.setattr(onednn, "has_amx", lambda: amx)
    inputs, outputs = size
    weight, bias = rows(outputs, inputs) / 50, torch.randn(outputs)
    weight[1:2] = 0
    linear = Int8Linear(weight, bias, activation)
    for tokens in (0, 1, 2, 13, 100):
        x = rows(tokens, inputs)
        x[1:2] = 0  # gives the bias
        given = x.clone()
        got = linear(x)
        (numbers, steps), (weights, weight_steps) = quantised(given), quantised(weight)
        product = (numbers @ weights.T) * steps * weight_steps.T  # sums of whole numbers below 2^53: exact
        assert (got.shape, got.dtype) == ((tokens, outputs), torch.float32)
        # The sum is exact. Then come a dozen roundings of 2^-24, of the product, of the bias, and in the activation.
        near = 12 * 2**-24 * (product.abs() + bias.abs())
        assert ((got - REFERENCE[activation](product + bias.double())).abs() <= near).all()
        assert torch.equal(x, given), "the input stays as it is"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@torch.inference_mode()
def test_what_is_no_number_does_not_become_one(bad):
    """Nor does it touch the other tokens; in a weight, the other outputs."""
    weight, bias, x = torch.randn(99, 37), torch.randn(99), torch.randn(4, 37)
    expected = Int8Linear(weight, bias)(x)
    broken = x.index_put((torch.tensor(2), torch.tensor(11)), torch.tensor(bad))
    got = Int8Linear(weight, bias)(broken)
    assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])
    assert not got[2].isfinite().any()
    weight[5, 3] = bad
    got = Int8Linear(weight, bias)(x)
    assert torch.equal(got[:, :5], expected[:, :5])
    assert not got[:, 5].isfinite().any()


# ------------------------------------------------------------------------------------------ what else is in the batch


def one_step_for_all(x, *, spare=False):
    """The fault that is planted in place of `to_int8`."""
    step = (x.abs().max() / 127).expand(len(x), 1).contiguous()
    return (x / step).round().to(torch.int8), step


@torch.inference_mode()
def test_a_text_has_the_same_answer_in_every_batch(monkeypatch):
    """Alone, and among others of other lengths. With attention on one kernel, the answer is the same bit for bit: the
    sizes are multiples of 16.
    """
    sizes = dict(hidden_size=128, intermediate_size=256, max_position_embeddings=80)
    fast = prepare_for_inference(twins({**CONFIGS["batch 13, gelu"], **sizes})[0], torch.int8)
    texts = [[11, 12, 13, 14], [15] * 9, [20, 7, 21, 7], list(range(30, 70))]

    def answer(number, beside):
        batch = PackedBatch.from_lists([texts[number], *(texts[other] for other in beside)])
        return fast.predict(batch, torch.arange(len(texts[number])))

    def independent():
        with use_kernel("sequences"):
            return all(
                torch.equal(answer(number, ()), answer(number, beside))
                for number in range(len(texts))
                for beside in ([1], [2], [3, 2, 0, 1], [3] * 9)
            )

    assert independent()
    monkeypatch.setattr(int8, "to_int8", one_step_for_all)
    assert not independent(), "with one step for all tokens it is seen"


# -------------------------------------------------------------------------------------------------------------- memory


def held(model):
    """All tensors of its modules, oneDNN's too, each once, and their bytes; oneDNN's have no storage."""
    values = [value for part in model.modules() for value in (*vars(part).values(), *part._parameters.values())]
    found = list({id(x): x for x in values if isinstance(x, torch.Tensor)}.values())
    return found, sum(torch.ops.mkldnn._nbytes(x) if x.is_mkldnn else x.untyped_storage().nbytes() for x in found)


def test_it_holds_less_than_a_third_and_nothing_of_the_original():
    """The matrices take a quarter. The words are there twice, to be looked up and for the head."""
    sizes = dict(vocab_size=4000, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, intermediate_size=1024)
    model = BertForMaskedLM(BertConfig(**sizes))
    full = 4 * model.num_parameters()
    assert held(model)[1] == full
    originals = [StorageWeakRef(x.untyped_storage()) for x in model.state_dict().values()]
    fast = prepare_for_inference(model, torch.int8)
    tensors, size = held(fast)
    assert 0.25 * full < size <= 0.32 * full
    assert sum(x.dtype == torch.int8 for x in tensors) == 4 * 8 + 3, "so they were counted"
    assert not any(storage.expired() for storage in originals)
    del model
    assert all(storage.expired() for storage in originals), "nothing keeps the original's numbers"


# ----------------------------------------------------------------------------------------- refusals, and what it says


def no_instructions(patch):
    patch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    patch.setattr(torch.cpu, "get_capabilities", dict)


def no_operator(patch):
    patch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda *given: torch.ops.onednn.no_such_thing)


def another_result(patch):
    patch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda *given: exact.linear_int8(*given) / 2)


@pytest.mark.parametrize("lacking", [no_instructions, no_operator, another_result])
def test_what_cannot_multiply_8_bit_numbers_is_refused(lacking, model, monkeypatch):
    lacking(monkeypatch)
    working_ways.cache_clear()
    with pytest.raises(ValueError, match="cannot multiply 8-bit numbers: leave dtype out, or use float32"):
        prepare_for_inference(model, torch.int8)
    working_ways.cache_clear()


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_attention_is_in_bfloat16_where_the_cpu_has_it(has_bfloat16, model, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    fast, batch = prepare_for_inference(model, torch.int8), PackedBatch.from_lists([[5, 6, 7], [8]])
    types = {x.dtype for x in fast.layers[0].attention.split_heads(torch.randn(4, 32))}
    assert types == {torch.bfloat16 if has_bfloat16 else torch.float32}
    got, expected = (each.predict(batch, torch.arange(4)) for each in (fast, model))
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[torch.int8])


def test_what_it_says_of_itself_and_shows(model):
    """numpy has no bfloat16, and whole numbers without their steps mean nothing: so what it shows is float32."""
    fast, ids = prepare_for_inference(model, torch.int8), torch.tensor([[5, 6, 7]])
    assert (fast.dtype, fast.device, fast.linear) == (torch.int8, torch.device("cpu"), "product")
    out = fast(ids, output_attentions=True, output_hidden_states=True)
    maps = fast.attention_maps(PackedBatch.from_lists([[5, 6, 7]]), [0])
    shown = (out.logits, *out.attentions, *out.hidden_states, *maps.values(), fast.embeddings.word(ids))
    assert {x.dtype for x in shown} == {torch.float32}
    # rows of probabilities that were rounded to 2^-8 each
    assert all((x.sum(-1) - 1).abs().max() < 0.02 for x in out.attentions)
    with pytest.raises(ValueError, match=r"whole numbers: call model\.embeddings\.word\(ids\)"):
        fast.get_input_embeddings()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_original_of_another_type(dtype, model):
    """It is as if its numbers were loaded in float32 first."""
    model, batch = model.to(dtype), PackedBatch.from_lists([[5, 6, 7], [8]])
    got = prepare_for_inference(model, torch.int8).predict(batch, torch.arange(4))
    expected = prepare_for_inference(model.float(), torch.int8).predict(batch, torch.arange(4))
    assert torch.equal(got, expected)
