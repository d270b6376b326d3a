"""int8: linear layers beside an independent reference, each text by itself, outliers, memory, refusals."""

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
SIZES = [(37, 99), (3072, 17), (1, 1)]
pytestmark = pytest.mark.usefixtures("exact_products")


def whole_tensor(x, *, spare=False):
    """The fault that is planted in place of `to_int8`: one step for all rows."""
    step = (x.abs().max() / 127).expand(len(x), 1).contiguous()
    return (x / step).round().to(torch.int8), step


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


def reference(x, weight, bias):
    """What the layer should give before its activation, float64."""
    (numbers, steps), (weights, weight_steps) = quantised(x), quantised(weight)
    return (numbers @ weights.T) * steps * weight_steps.T + bias.double()  # sums of whole numbers below 2^53: exact


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", REFERENCE)
@torch.inference_mode()
def test_it_is_the_product_of_rounded_numbers(size, activation):
    inputs, outputs = size
    weight, bias = rows(outputs, inputs) / 50, torch.randn(outputs)
    linear = Int8Linear(weight, bias, activation)
    for tokens in (0, 1, 2, 13, 100):
        x = rows(tokens, inputs)
        given = x.clone()
        got = linear(x)
        plain = reference(given, weight, bias)
        assert (got.shape, got.dtype) == ((tokens, outputs), torch.float32)
        # The sum is exact. Then come a dozen roundings of 2^-24, of the product, of the bias, and in the activation.
        product = (plain - bias.double()).abs()
        near = 12 * 2**-24 * (product + bias.abs())
        assert ((got - REFERENCE[activation](plain)).abs() <= near).all()
        assert torch.equal(x, given), "the input stays as it is"


@pytest.mark.parametrize("amx", [True, False])
@torch.inference_mode()
def test_whole_numbers_and_halves(amx, monkeypatch):
    """Where the largest is 127, the step is 1. So whole numbers stay, and halves go to the even number. 3072 times
    127 · 127 is the largest sum; with one that was kept in 16 bits it would not come out.
    """
    monkeypatch.setattr(onednn, "has_amx", lambda: amx)  # then the product takes numbers with a sign
    x = torch.randint(-127, 128, (5, 3072)).float()
    x[:, 0], x[0], x[1] = 127, 127, -127
    halves = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5])
    even = torch.tensor([127.0, 0, 2, 2, 0, -2, -126, 126])
    assert torch.equal(Int8Linear(torch.eye(8) * 127, torch.zeros(8))(halves[None])[0], 127 * even)
    weight = torch.full((3, 3072), 127.0)
    weight[1], weight[2] = -127, x[2]
    got = Int8Linear(weight, torch.zeros(3))(x)
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=1e-6, atol=0)


@torch.inference_mode()
def test_rows_of_zeros_give_the_bias():
    weight, bias, x = torch.randn(99, 37), torch.randn(99), torch.randn(4, 37)
    x[2], weight[5] = 0, 0
    got = Int8Linear(weight, bias)(x)
    assert torch.equal(got[2], bias)
    assert torch.equal(got[:, 5], bias[5].expand(4))
    assert got.isfinite().all()


def ordinary(y):
    """0 does not count: it is what an activation may make of −∞."""
    return y.isfinite() & (y != 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", REFERENCE)
@torch.inference_mode()
def test_what_is_no_number_does_not_become_one(bad, activation):
    """Nor does it touch the other tokens; in a weight, the other outputs."""
    weight, bias, x = torch.randn(99, 37), torch.randn(99), torch.randn(4, 37)
    linear = Int8Linear(weight, bias, activation)
    expected = linear(x)
    broken = x.clone()
    broken[2, 11] = bad
    got = linear(broken)
    assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])
    assert not ordinary(got[2]).any()
    if bad != bad or activation == NONE:
        assert not got[2].isfinite().any()
    weight[5, 3] = bad
    got = Int8Linear(weight, bias, activation)(x)
    assert torch.equal(got[:, :5], expected[:, :5])
    assert not ordinary(got[:, 5]).any()


# ------------------------------------------------------------------------------------------ what else is in the batch


def alone_and_together(linear, x):
    """Whether each row, and some rows, give the same alone as among all."""
    together = linear(x)
    parts = [slice(number, number + 1) for number in range(len(x))] + [slice(3, 20), slice(1, None)]
    return all(torch.equal(linear(x[part]), together[part]) for part in parts)


@pytest.mark.parametrize("activation", REFERENCE)
@torch.inference_mode()
def test_a_token_has_the_same_answer_in_every_batch(activation, monkeypatch):
    """Bit for bit, where the width is a multiple of 16: else torch's activations round the last bit by the place that
    a number has in memory.
    """
    x = torch.randn(40, 37)
    x[7] *= 1000
    linear = Int8Linear(torch.randn(64, 37), torch.randn(64), activation)
    assert alone_and_together(linear, x)
    assert alone_and_together(Int8Linear(torch.randn(99, 37), torch.randn(99)), x)
    monkeypatch.setattr(int8, "to_int8", whole_tensor)
    assert not alone_and_together(linear, x), "with one step for all tokens it is seen"


OUTLIER = 7  # the token that has them
FLAG, SPIKES = 2, [5, 9]  # channels of the residual stream: what tells that token, and where its large numbers are
LARGE = dict(
    vocab_size=97,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=80,
)


def with_outliers(gain=30):
    """Random weights, with what Bondarenko, Nagel and Blankevoort (2021, arXiv 2109.12948) found in BERT: in the last
    layers, the feed-forward network writes large numbers into few channels, for few tokens such as [SEP]. Here the
    weights of LayerNorm make them still larger. As in a trained model, what reads these channels has small weights.
    """
    model = twins(LARGE)[0]
    with torch.no_grad():
        for part in (model.embeddings.word, model.embeddings.position, model.embeddings.token_type):
            part.weight[:, [FLAG, *SPIKES]] = 0
        model.embeddings.word.weight[OUTLIER, FLAG] = 1
        norms = [model.embeddings.LayerNorm]
        for layer in model.layers:
            norms += [layer.attention_LayerNorm, layer.feed_forward_LayerNorm]
            for linear in (layer.attention.output, layer.feed_forward.output):
                linear.weight[[FLAG, *SPIKES]] = 0
                linear.bias[[FLAG, *SPIKES]] = 0
        for norm in norms:
            norm.weight[[FLAG, *SPIKES]] = 1
            norm.bias[[FLAG, *SPIKES]] = 0
        for layer, reader in zip(model.layers[-2:], (model.layers[-1].attention.qkv, model.head.dense), strict=True):
            network = layer.feed_forward
            network.intermediate.weight[:2] = 0
            network.intermediate.weight[:2, FLAG] = 10
            network.intermediate.bias[:2] = -10
            network.output.weight[SPIKES, :2] = torch.tensor([[1.0], [-1.0]])
            layer.feed_forward_LayerNorm.weight[SPIKES] = gain
            reader.weight[:, SPIKES] /= gain
    return model


@pytest.fixture(scope="module")
def outliers():
    """The model; 8 sequences of 30 tokens; and which of them are the outliers, the last of each."""
    torch.manual_seed(0)
    ids = torch.randint(8, LARGE["vocab_size"], (240,))
    ids[29::30] = OUTLIER
    return with_outliers(), PackedBatch.from_flat(ids, [30] * 8), ids == OUTLIER


@torch.inference_mode()
def test_a_text_has_the_same_answer_in_every_batch(outliers, monkeypatch):
    """Alone, among others of other lengths, and beside one of huge activations. With attention on one kernel, the
    answer is the same bit for bit: the sizes are multiples of 16.
    """
    prepared = prepare_for_inference(outliers[0], torch.int8)
    texts = [[11, 12, 13, 14], [15] * 9, [20, OUTLIER, 21, OUTLIER], list(range(30, 70))]

    def answer(number, beside):
        batch = PackedBatch.from_lists([texts[number], *(texts[other] for other in beside)])
        return prepared.predict(batch, torch.arange(len(texts[number])))

    def independent():
        with use_kernel("sequences"):
            return all(
                torch.equal(answer(number, ()), answer(number, beside))
                for number in range(len(texts))
                for beside in ([1], [2], [3, 2, 0, 1], [3] * 9)
            )

    assert independent()
    monkeypatch.setattr(int8, "to_int8", whole_tensor)
    assert not independent(), "with one step for all tokens it is seen"


@torch.inference_mode()
def test_outliers_cost_the_other_tokens_little(outliers, monkeypatch):
    model, batch, special = outliers
    largest = model.hidden_states(batch)[-2].abs().amax(1)  # of each token
    assert 50 < largest[special].min() / largest[~special].median() < 100, "or the test would show nothing"
    everywhere = torch.arange(batch.num_tokens)
    expected = model.predict(batch, everywhere)
    prepared = prepare_for_inference(model, torch.int8)

    def errors():
        """Of the logits beside their size, in the median: of the other tokens, and of the outliers."""
        error = (prepared.predict(batch, everywhere) - expected).norm(dim=1) / expected.norm(dim=1)
        return error[~special].median(), error[special].median()

    # 0.05 and 0.26 were measured; with gain=1, so without outliers, 0.02 and 0.02. With one step for all it was 0.4.
    others, of_outliers = errors()
    assert others < 0.1
    assert of_outliers < 0.5
    monkeypatch.setattr(int8, "to_int8", whole_tensor)
    assert errors()[0] > 4 * others, "with one step for all tokens it is seen"


# -------------------------------------------------------------------------------------------------------------- memory


PROPORTIONS = BertConfig(
    vocab_size=4000, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, intermediate_size=1024
)


def tensors(model):
    """All that its modules hold, oneDNN's too, each once."""
    held = {}
    for part in model.modules():
        for value in (*vars(part).values(), *part._parameters.values(), *part._buffers.values()):
            if isinstance(value, torch.Tensor):
                held[id(value)] = value
    return list(held.values())


def held_bytes(model):
    """oneDNN's tensors have no storage that torch knows of."""
    return sum(torch.ops.mkldnn._nbytes(x) if x.is_mkldnn else x.untyped_storage().nbytes() for x in tensors(model))


def test_it_holds_less_than_a_third_and_nothing_of_the_original():
    """The matrices take a quarter. The words are there twice, to be looked up and for the head."""
    model = BertForMaskedLM(PROPORTIONS)
    full = 4 * model.num_parameters()
    assert held_bytes(model) == full
    originals = [StorageWeakRef(x.untyped_storage()) for x in model.state_dict().values()]
    prepared = prepare_for_inference(model, torch.int8)
    assert 0.25 * full < held_bytes(prepared) <= 0.32 * full
    assert sum(x.dtype == torch.int8 for x in tensors(prepared)) == 4 * 8 + 3, "so they were counted"
    assert not any(storage.expired() for storage in originals)
    del model
    assert all(storage.expired() for storage in originals), "nothing keeps the original's numbers"
    assert prepared(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


# ----------------------------------------------------------------------------------------- refusals, and what it says


def no_instructions(patch):
    patch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    patch.setattr(torch.cpu, "get_capabilities", dict)


def no_operator(patch):
    patch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda *given: torch.ops.onednn.no_such_thing)


def another_result(patch):
    patch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda *given: exact.linear_int8(*given) / 2)


@pytest.mark.parametrize("lacking", [no_instructions, no_operator, another_result])
def test_what_cannot_multiply_8_bit_numbers_is_refused(lacking, monkeypatch):
    lacking(monkeypatch)
    working_ways.cache_clear()
    with pytest.raises(ValueError, match="cannot multiply 8-bit numbers: leave dtype out, or use float32"):
        prepare_for_inference(twins(CONFIGS["batch 13, gelu"])[0], torch.int8)
    working_ways.cache_clear()


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_attention_is_in_bfloat16_where_the_cpu_has_it(has_bfloat16, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    model = twins(CONFIGS["batch 13, gelu"])[0]
    prepared, batch = prepare_for_inference(model, torch.int8), PackedBatch.from_lists([[5, 6, 7], [8]])
    types = {x.dtype for x in prepared.layers[0].attention.split_heads(torch.randn(4, 32))}
    assert types == {torch.bfloat16 if has_bfloat16 else torch.float32}
    got, expected = (each.predict(batch, torch.arange(4)) for each in (prepared, model))
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[torch.int8])


def test_what_a_prepared_model_says_of_itself():
    model = twins(CONFIGS["batch 13, gelu"])[0]
    prepared = prepare_for_inference(model, torch.int8)
    assert (prepared.dtype, prepared.device) == (torch.int8, torch.device("cpu"))
    assert (prepared.linear, model.dtype) == ("product", torch.float32)
    assert prepare_for_inference(prepared, torch.int8) is prepared
    assert prepare_for_inference(prepared) is prepared
    with pytest.raises(ValueError, match=r"already, in torch\.int8 .*: for torch\.float32 .* the one it was made from"):
        prepare_for_inference(prepared, torch.float32)
    with pytest.raises(ValueError, match=r"already, in torch\.float32 .*: for torch\.int8 .* the one it was made from"):
        prepare_for_inference(prepare_for_inference(model), torch.int8)
    with pytest.raises(ValueError, match=r"'torch' cannot be had in torch\.int8 .* choose one of auto, product"):
        prepare_for_inference(model, torch.int8, linear="torch")
    with pytest.raises(ValueError, match=r"torch\.int8 is for CPUs, and the model is on meta: use torch\.bfloat16"):
        prepare_for_inference(model.to("meta"), torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_original_of_another_type(dtype):
    """It is as if its numbers were loaded in float32 first."""
    model, batch = twins(CONFIGS["batch 13, gelu"], dtype=dtype)[0], PackedBatch.from_lists([[5, 6, 7], [8]])
    got = prepare_for_inference(model, torch.int8).predict(batch, torch.arange(4))
    expected = prepare_for_inference(model.float(), torch.int8).predict(batch, torch.arange(4))
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
