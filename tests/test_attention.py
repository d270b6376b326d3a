"""The kernels against the formula, the choice of the kernel, and attention maps."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import CONFIGS, make_batch, twins

from minibert import PackedBatch
from minibert import attention as module
from minibert.attention import attention, choose_kernel, formula, use_kernel
from minibert.training.step import QuickDropout, quick_dropout

UNEVEN, UNIFORM = (5, 1, 9, 3), (6, 6, 6)
lengths_given = pytest.mark.parametrize("lengths", [UNEVEN, UNIFORM, (4, 0, 3)], ids=["uneven", "uniform", "empty"])
# The largest error of a mean of values of order 1, after weights that were rounded once: some roundings of each dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def packed(lengths):
    return PackedBatch.from_lists([[1] * length for length in lengths])


def random_qkv(batch, dtype=torch.float32, heads=3, head_size=8, device="cpu", requires_grad=False):
    shape = (batch.num_tokens, heads, head_size)
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_(requires_grad) for _ in range(3)]


def by_hand(query, key, value, lengths):
    """Equation 1 in float64, one sequence, one head and one query at a time."""
    query, key, value = (x.detach().double().cpu() for x in (query, key, value))
    result, start = torch.zeros_like(query), 0
    for length in lengths:
        for head in range(query.shape[1]):
            k, v = key[start : start + length, head], value[start : start + length, head]
            for token in range(start, start + length):
                weights = torch.exp(k @ query[token, head] / query.shape[-1] ** 0.5)
                result[token, head] = (weights / weights.sum()) @ v
        start += length
    return result


@pytest.fixture
def fused(monkeypatch):
    """The queries and the mask of each call of torch's fused attention."""
    calls, real = [], module.F.scaled_dot_product_attention

    def record(query, *others, attn_mask=None, **more):
        calls.append((query.shape[-2], attn_mask))
        return real(query, *others, attn_mask=attn_mask, **more)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", record)
    return calls


@lengths_given
@pytest.mark.parametrize("kernel", ["formula", "sdpa", "sequences", "jagged"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_each_kernel_is_equation_1(lengths, kernel, dtype):
    batch = packed(lengths)
    qkv = random_qkv(batch, dtype)
    with use_kernel(kernel):
        got = attention(*qkv, batch)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), by_hand(*qkv, lengths), rtol=0, atol=TOLERANCE[dtype])


@lengths_given
@pytest.mark.parametrize("kernel", ["sdpa", "sequences", "jagged"])
def test_gradients_agree_with_the_formula(lengths, kernel):
    batch, gradients = packed(lengths), []
    for name in ("formula", kernel):
        torch.manual_seed(0)
        qkv = random_qkv(batch, requires_grad=True)
        with use_kernel(name):
            attention(*qkv, batch).square().sum().backward()
        gradients.append([x.grad for x in qkv])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["formula", "sdpa", "sequences", "jagged"])
def test_dropout_drops_whole_weights_and_keeps_the_mean(kernel):
    batch = packed((40, 25))
    query, key, _ = random_qkv(batch)
    with use_kernel(kernel):
        got = attention(query.requires_grad_(), key, torch.ones_like(key), batch, torch.nn.Dropout(0.5))
    assert got.std() > 0.05, "nothing was dropped"
    # 65 tokens × 3 heads: a mean of 195 sums, each 1 on average; 5 sigma.
    assert abs(got[..., 0].mean() - 1) < 5 * got[..., 0].std() / 195**0.5


# ----------------------------------------------------------------------------------------------------- quick dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1e-9, 1 - 1e-9])
def test_quick_dropout_drops_its_share_and_scales_the_rest(p, dtype):
    x = torch.ones(301, 333, dtype=dtype, requires_grad=True)  # not a multiple of four elements
    torch.manual_seed(0)
    drop = QuickDropout(p)
    y = drop(x)
    share = min(max(p, 2**-16), 1 - 2**-16)
    expected, spread = share * x.numel(), (share * (1 - share) * x.numel()) ** 0.5
    assert abs((y == 0).sum() - expected) <= 5 * spread + 1
    # p is rounded by up to 2^-17, and the factor to the dtype.
    kept = y[y > 0].unique()
    assert kept.numel() == 1
    assert kept.item() == pytest.approx(1 / (1 - share), rel=2**-17 / (1 - share) + torch.finfo(dtype).eps)
    y.float().sum().backward()
    assert torch.equal(x.grad, y), "the gradient passes where the value did, with the same factor"
    torch.manual_seed(0)
    assert torch.equal(drop(x), y)
    assert not torch.equal(drop(x), y) or p in (1e-9, 1 - 1e-9)
    assert QuickDropout(0.0)(x) is drop.eval()(x) is x
    dropped = (y.flatten() == 0).float()  # each on its own, though four of them come from one number
    for distance in range(1, 9):
        together = (dropped[:-distance] * dropped[distance:]).mean()
        assert together == pytest.approx(share**2, abs=5 * share / len(dropped) ** 0.5 + 1e-4)


def test_quick_dropout_is_for_one_block():
    """There other elements are dropped; afterwards those of nn.Dropout again, in the mode that was set last."""
    model = twins(CONFIGS["1 head, relu"])[0].train()

    def logits():
        torch.manual_seed(0)
        with use_kernel("formula"):
            return model(torch.tensor([[5, 6, 7]])).logits

    plain = logits()
    with quick_dropout(model):
        assert not torch.equal(logits(), plain)
    assert torch.equal(logits(), plain)

    @quick_dropout(model)
    def fails():
        model.eval()
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not any(part.training for part in model.modules())
    assert {type(part) for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {torch.nn.Dropout}


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("lengths", "dtype", "device", "more", "kernel"),
    [
        (UNIFORM, torch.float32, "cpu", {}, "sdpa"),
        (UNEVEN, torch.float32, "cpu", {}, "sequences"),
        (UNIFORM, torch.float32, "cpu", dict(training=True, dropout=True), "sequences"),
        (UNIFORM, torch.bfloat16, "cpu", {}, "sdpa"),  # short
        (UNIFORM, torch.bfloat16, "cpu", dict(training=True), "formula"),
        (UNEVEN, torch.bfloat16, "cuda", {}, "varlen"),
        (UNEVEN, torch.float16, "cuda", {}, "varlen"),
        (UNIFORM, torch.bfloat16, "cuda", {}, "sdpa"),  # flash attention without a mask
        (UNEVEN, torch.float32, "cuda", {}, "sdpa"),  # the varlen kernel has half precision only
        (UNEVEN, torch.bfloat16, "cuda", dict(dropout=True), "sdpa"),  # nor dropout
        (UNEVEN, torch.bfloat16, "cuda", dict(head_size=12), "sdpa"),  # nor heads of other than multiples of 8
    ],
)
def test_the_choice(lengths, dtype, device, more, kernel):
    batch = packed(lengths)
    with FakeTensorMode():
        query = torch.empty(18, 3, more.get("head_size", 64), dtype=dtype, device=device)
        query.requires_grad_(more.get("training", False))
    assert choose_kernel(query, batch, more.get("dropout", False)) == kernel


@pytest.mark.parametrize(("amx", "kernels"), [(True, "sdpa sdpa sdpa"), (False, "sdpa sequences sequences")])
def test_without_amx_equation_1_is_for_long_sequences_in_bfloat16(amx, kernels, monkeypatch, fused):
    monkeypatch.setattr(module, "has_amx", lambda: amx)
    query = torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    assert [choose_kernel(query, packed((n, n)), 0.0) for n in (32, 128, 400)] == kernels.split()
    assert [choose_kernel(query.float(), packed((n, n)), 0.0) for n in (32, 128, 400)] == ["sdpa"] * 3
    batch = packed((300, 20, 64))  # 300: more than are written out at once
    qkv = random_qkv(batch, torch.bfloat16)
    got = attention(*qkv, batch)
    assert [queries for queries, _ in fused] == ([300, 20, 64] if amx else [20])
    torch.testing.assert_close(got.double(), by_hand(*qkv, batch.lengths), rtol=0, atol=TOLERANCE[torch.bfloat16])
    attention(*random_qkv(packed(UNIFORM)), packed(UNIFORM))
    assert fused[-1] == (6, None), "no mask is needed"


def test_flash_attention_on_packed_tokens_refuses_dropout():
    batch = packed(UNEVEN)
    with use_kernel("varlen"), pytest.raises(ValueError, match=r"no dropout: .* model\.eval\(\)"):
        attention(*random_qkv(batch), batch, torch.nn.Dropout(0.1))


def test_a_kernel_is_for_one_block_in_one_thread():
    query, batch = torch.zeros(24, 3, 8), packed(UNIFORM)
    with use_kernel("formula"):
        with use_kernel("varlen"):
            assert choose_kernel(query, batch) == "varlen"
        assert choose_kernel(query, batch) == "formula"
        with ThreadPoolExecutor(1) as other:
            assert other.submit(choose_kernel, query, batch).result() == "sdpa"
    assert choose_kernel(query, batch) == "sdpa"
    with pytest.raises(ValueError, match=r"'flash'.*formula, sdpa, sequences, varlen"), use_kernel("flash"):
        pass


# ------------------------------------------------------------------------------------------------------- attention maps


def test_attention_maps_are_those_of_transformers(monkeypatch):
    sizes = CONFIGS["batch 13, gelu"]
    ours, theirs = twins(sizes, "eager")
    given = make_batch(sizes, "right", (13, 7))
    batch = PackedBatch.from_padded(given["input_ids"], given["attention_mask"])
    slow = []
    monkeypatch.setattr("minibert.masked_lm.formula", lambda *a: slow.append(1) or formula(*a))
    maps = ours.attention_maps(batch, [1, 4])
    assert len(slow) == 2, "the other layers stay fused"
    expected = theirs(given["input_ids"], given["attention_mask"], output_attentions=True).attentions
    assert list(maps) == [1, 4]
    seen = given["attention_mask"].bool()
    both = (seen[:, None, :, None] & seen[:, None, None, :]).expand(-1, 4, -1, -1)
    for number, got in maps.items():
        assert got.shape == (13, 4, 7, 7)
        torch.testing.assert_close(got[both], expected[number][both], rtol=0, atol=1e-6)
        assert got[~both].abs().max() == 0


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(5, 1, 90, 33), (64, 64), (3, 0, 17)], ids=str)
@pytest.mark.parametrize("kernel", ["varlen", "jagged"])
def test_flash_attention_on_packed_tokens_is_equation_1(kernel, lengths, dtype):
    batch = packed(lengths).to("cuda")
    qkv = random_qkv(batch, dtype, heads=12, head_size=64, device="cuda", requires_grad=True)
    with use_kernel(kernel):
        got = attention(*qkv, batch)
    torch.testing.assert_close(got.cpu().double(), by_hand(*qkv, lengths), rtol=0, atol=TOLERANCE[dtype])
    got.float().square().sum().backward()
    again = [x.detach().float().requires_grad_() for x in qkv]
    formula(*again, batch)[0].square().sum().backward()
    for one, expected in zip(qkv, again, strict=True):
        torch.testing.assert_close(one.grad.float(), expected.grad, rtol=0, atol=TOLERANCE[dtype] * 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["dense", "right", "left", "holes"])
def test_the_model_on_a_gpu_against_the_cpu_in_float64(dtype, mask):
    sizes = {**CONFIGS["batch 13, gelu"], "hidden_size": 64}
    ours, theirs = twins(sizes, "sdpa", torch.float64)
    given = make_batch(sizes, mask, (13, 7))
    seen = given["attention_mask"].bool()
    with torch.no_grad():
        truth = theirs(**given).logits[seen]
        got = ours.to("cuda", dtype)(**{key: x.to("cuda") for key, x in given.items()}).logits[seen.to("cuda")]
    # Logits of order 3 through five layers: float32 1e-4 (no TF32), half precision some hundredths.
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}[dtype]
    torch.testing.assert_close(got.cpu().double(), truth, rtol=0, atol=tolerance)
