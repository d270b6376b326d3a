"""oneDNN's linear layers: the same results as torch's, for every number of tokens, and which of them is chosen."""

import pytest
import torch
from needs import lacking
from torch import nn
from twins import CONFIGS, twins

from minibert.inference import onednn, prepare_for_inference, ways
from minibert.inference.onednn import ConvolvedLinear, PrepackedLinear


@pytest.fixture
def asked_anew():
    """What was found to work, and to be the fastest, is forgotten, before and after."""
    for function in (ways.working_ways, ways.fastest_way):
        function.cache_clear()
    yield
    for function in (ways.working_ways, ways.fastest_way):
        function.cache_clear()


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        (("order_for_product", "order_for_images"), ("torch",)),
        (("multiply", "convolve"), ("torch",)),
        (("order_for_product",), ("torch", "convolution")),
        (("describe_order",), ("torch", "product")),
    ],
    ids=str,
)
def test_without_a_private_operator_the_other_ways_serve(missing, left, monkeypatch, asked_anew):
    """Another torch may lack any of them."""
    if "convolution" not in ways.working_ways(torch.float32):
        pytest.skip("this torch or this CPU has no convolutions")
    ways.working_ways.cache_clear()
    onednn._best_height.cache_clear()
    onednn._order_fits.cache_clear()
    onednn._wanted_order.cache_clear()
    for name in missing:
        monkeypatch.setattr(onednn, name, lambda *arguments: torch.ops.mkldnn.no_such_thing)
    assert ways.working_ways(torch.float32) == left
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    fast = prepare_for_inference(ours)
    assert fast.linear in left
    if left == ("torch",):
        assert isinstance(fast.layers[0].attention.qkv, nn.Linear)
    with pytest.raises(ValueError, match="cannot be had"):
        prepare_for_inference(ours, linear="product" if "product" not in left else "convolution")


def test_a_torch_that_cannot_tell_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: torch.ops.mkldnn.no_such_thing)
    assert not onednn.has_bfloat16()


@pytest.mark.parametrize("fault", ["another activation", "wrong with many tokens", "a little wrong"])
def test_a_way_that_gives_something_else_is_not_taken(fault, monkeypatch, asked_anew):
    def compute(self, x):
        y = nn.functional.linear(x, WEIGHTS[id(self)], self.bias)
        if fault == "another activation":
            return y.relu()
        y = nn.functional.gelu(y)
        return y * 1.01 if fault == "a little wrong" else y * (len(x) < 20)

    WEIGHTS = {}
    for kind in (ConvolvedLinear, PrepackedLinear):
        monkeypatch.setattr(kind, "compute", compute)
        monkeypatch.setattr(kind, "pack", lambda self, weight: WEIGHTS.update({id(self): weight}))
    assert ways.working_ways(torch.float32) == ("torch",)
    assert ways.fastest_way(torch.float32) == "torch"


@pytest.mark.parametrize(("inputs", "outputs"), [(37, 99), (768, 768), (3072, 768), (768, 5000)])
@torch.inference_mode()
def test_convolutions_for_every_number_of_tokens(inputs, outputs):
    """They are the linear layer; and no number of tokens wants the weights in another order, which would be slow."""
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    linear = ConvolvedLinear(weight, bias)
    for tokens in (*range(20), 31, 64, 100, 129, 300, 759, 1065):
        x = torch.randn(tokens, inputs)
        # results of order 5, each a sum of up to 3072 products, added up in another order
        torch.testing.assert_close(linear(x), nn.functional.linear(x, weight, bias), rtol=0, atol=5e-5)
        if tokens and torch.backends.cpu.get_cpu_capability() == "AVX2":  # the CPUs that they are for
            height = linear.height(tokens)
            wanted = onednn.order_for_images(weight, -(-tokens // height), height)
            assert onednn.describe_order(wanted) == onednn.describe_order(linear.weight), (tokens, height)


@pytest.mark.parametrize("tokens", [1, 499, 500, 769, 1280, 1281])
@pytest.mark.parametrize("size", [(768, 3072), (768, 768)])
@torch.inference_mode()
def test_products_in_pieces(tokens, size, monkeypatch):
    """All rows, in their order; only where there are several threads, and only of the size that gains."""
    if "product" not in ways.working_ways(torch.bfloat16):
        lacking("bfloat16", "no product in this torch or on this CPU")
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    sizes = []
    whole = onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda x, *others: sizes.append(len(x)) or whole(x, *others))
    weight, bias = (torch.randn(size) / size[1] ** 0.5).bfloat16(), torch.randn(768).bfloat16()
    x = torch.randn(tokens, size[1]).bfloat16()
    linear = PrepackedLinear(weight, bias)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sizes.clear()
        # results of order 1, rounded to 2^-8 each
        torch.testing.assert_close(linear(x), nn.functional.linear(x, weight, bias), rtol=2e-2, atol=2e-2)
        assert sum(sizes) == tokens
        assert (len(sizes) > 1) == (threads > 1 and 500 <= tokens <= 1280 and size == (768, 3072))
        assert len(sizes) == 1 or max(sizes) <= 384
