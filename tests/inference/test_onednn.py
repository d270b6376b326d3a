"""oneDNN's linear layers: the same results as torch's, for every number of tokens, and which of them is chosen."""

import subprocess
import sys
import time
from pathlib import Path

import exact
import pytest
import torch
from forms import form_or_skip
from torch import nn
from twins import CONFIGS, twins

from minibert import BertConfig, BertForMaskedLM, load_tokenizer
from minibert.inference import onednn, prepare_for_inference
from minibert.inference import prepare as ways
from minibert.inference.onednn import FUSED, NONE, ConvolvedLinear, PrepackedLinear
from minibert.training.step import evaluate
from minibert.training.tokens import Lines, TokenFile


def forget():
    """What was found to work, and to be the fastest."""
    for function in (ways.working_ways, ways.fastest_way, onednn._best_height, onednn._wanted_order):
        function.cache_clear()


@pytest.fixture
def asked_anew():
    forget()
    yield
    forget()


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
    form_or_skip("convolution")
    forget()
    for name in missing:
        monkeypatch.setattr(onednn, name, lambda *arguments: torch.ops.mkldnn.no_such_thing)
    assert ways.working_ways(torch.float32) == left
    assert prepare_for_inference(twins(CONFIGS["batch 13, gelu"])[0]).linear in left
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


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        (dict(torch=(1.0, 9.0), product=(2.0, 8.0), convolution=(3.0, 7.0)), "torch"),
        (dict(torch=(1.0, 1.0), product=(2.0, 0.4), convolution=(0.5, 3.0)), "product"),
        (dict(torch=(1.0, 1.0), product=(0.9, 0.9), convolution=(0.8, 0.8)), "convolution"),
        (dict(torch=(1.0, 1.0), product=(1.05, 1.05), convolution=(9.0, 9.0)), "product"),  # not by a tenth
    ],
)
def test_the_fastest_way_is_taken(seconds, taken, monkeypatch, asked_anew):
    """With few tokens and with many."""
    clock = [0.0]

    def trial(few, many):
        return lambda x: clock.__setitem__(0, clock[0] + (few if len(x) < 100 else many))

    monkeypatch.setattr(ways, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ways, "_trials", lambda dtype: {way: trial(*both) for way, both in seconds.items()})
    assert ways.fastest_way(torch.float32) == taken


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


@pytest.mark.parametrize(("tokens", "pieces"), [(1, 1), (499, 1), (500, 2), (1280, 4), (1281, 1)])
@torch.inference_mode()
def test_products_in_pieces(tokens, pieces, monkeypatch):
    """All rows, in their order; only of the size that gains, and where there are several threads."""
    form_or_skip("bfloat16 product")
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    whole, sizes = onednn.multiply, []
    monkeypatch.setattr(onednn, "multiply", lambda x, *others: sizes.append(len(x)) or whole(x, *others))
    for outputs, inputs, threads in ((768, 3072, 2), (768, 3072, 1), (768, 768, 2)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        weight, bias = (torch.randn(outputs, inputs) / inputs**0.5).bfloat16(), torch.randn(outputs).bfloat16()
        x = torch.randn(tokens, inputs).bfloat16()
        sizes.clear()
        # results of order 1, rounded to 2^-8 each
        expected = nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(PrepackedLinear(weight, bias)(x), expected, rtol=2e-2, atol=2e-2)
        assert (len(sizes), sum(sizes)) == (pieces if inputs == 3072 and threads > 1 else 1, tokens)


# -------------------------------------------------------------------- the real products of int8 and bfloat16


@pytest.mark.parametrize("form", ["int8", "bfloat16 product"])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 37, 99), (13, 3072, 17), (300, 768, 64)])
@torch.inference_mode()
def test_the_real_products_are_the_exact_ones(form, tokens, inputs, outputs):
    """All other tests of int8 and bfloat16 run on exact.py."""
    form_or_skip(form)
    if form == "int8":
        x, weight = (torch.randint(-127, 128, (number, inputs), dtype=torch.int8) for number in (tokens, outputs))
        factor, zeros = torch.rand(outputs), torch.zeros(outputs, dtype=torch.int32)
        got = onednn.multiply_int8(x, onednn.order_int8(weight), factor, zeros)
        expected = exact.linear_int8(x, 1.0, 0, weight, factor, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        torch.testing.assert_close(got, expected, rtol=2 * 2**-24, atol=0)  # the sum and the product, rounded once each
        return
    weight, bias = (torch.randn(outputs, inputs) / inputs**0.5).bfloat16(), torch.randn(outputs).bfloat16()
    x = torch.randn(tokens, inputs).bfloat16()
    for activation in (NONE, *FUSED.values()):
        got = onednn.multiply(x, onednn.order_for_product(weight), bias, activation)
        expected = exact.linear(x, weight, bias, activation[0], [], activation[1])
        # rounded to 2^-8; and the activation may have read a rounded sum
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


def test_the_product_of_8_bit_numbers_is_a_fast_one():
    """Where oneDNN has no kernel for two types, its reference serves, which takes a thousand times as long."""
    form_or_skip("int8")
    x, weight = (torch.randint(-127, 128, (number, 768), dtype=torch.int8) for number in (64, 1536))
    ordered, factor, zeros = onednn.order_int8(weight), torch.rand(1536), torch.zeros(1536, dtype=torch.int32)
    plain, wide, seconds = x.float(), weight.float(), []
    for run in (lambda: nn.functional.linear(plain, wide), lambda: onednn.multiply_int8(x, ordered, factor, zeros)):
        run()
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    assert seconds[1] < 20 * seconds[0]


@pytest.mark.slow
def test_loading_and_preparing_in_int8_peaks_no_higher_than_in_float32(tmp_path):
    form_or_skip("int8")
    sizes = dict(vocab_size=4000, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, intermediate_size=1024)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path)
    code = """
import sys, torch
from minibert import BertForMaskedLM, prepare_for_inference
from minibert.bench.report import peak_resident
dtype = getattr(torch, sys.argv[2])
prepare_for_inference(BertForMaskedLM.from_pretrained(sys.argv[1]), dtype, linear="product")
print(peak_resident())
"""

    def peak(dtype):
        command = [sys.executable, "-c", code, str(tmp_path), dtype]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak("int8") <= peak("float32")


@pytest.mark.slow
def test_quality_of_int8_on_the_bundled_weights():
    """464 lines, 1,100 masked tokens. The two see the same masks, so the difference is known to 0.003 nats and 0.3 %
    (one standard error).
    """
    form_or_skip("int8")
    model, tokenizer = BertForMaskedLM.from_pretrained("minibert-uncased"), load_tokenizer("minibert-uncased")
    lines = (Path(__file__).parents[1] / "prose.txt").read_text(encoding="utf-8").splitlines()
    encoded = [torch.tensor(tokenizer.encode(line, add_special_tokens=False).ids) for line in lines]
    text = Lines(torch.cat(encoded), torch.tensor([0, *map(len, encoded)]).cumsum(0))
    file = TokenFile(text.tokens, text.starts, "prose", 1.0, text, "")
    plain, rounded = (
        evaluate(prepare_for_inference(model, dtype), tokenizer, [file], lines=len(text), seed=0)["all"]
        for dtype in (torch.float32, torch.int8)
    )
    assert plain["masked_tokens"] == rounded["masked_tokens"] > 1000
    assert rounded["loss"] - plain["loss"] <= 0.02
    assert plain["top1"] - rounded["top1"] <= 0.012
