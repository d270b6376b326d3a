"""The fast form of a model: the same answers through both doors, on every shape of batch, and without touching
the original.
"""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import CONFIGS, MASKS, SIZES, make_batch, twins

import minibert.checks
import minibert.inference
import minibert.kernels
from minibert import BertConfig, BertForMaskedLM, FillMask, PackedBatch
from minibert.inference import (
    CapturedPredict,
    ConvolvedLinear,
    Graphs,
    PrepackedLinear,
    PreparedBert,
    _round_up,
    prepare_for_inference,
)
from minibert.kernels import attention, attention_at, use_kernel
from minibert.tokenizer import from_vocabulary

has_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bfloat16"
)
# bfloat16 rounds to 2^-8: some roundings of that, on logits of order 3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.15}


@pytest.fixture(params=[PrepackedLinear, ConvolvedLinear, None], ids=["product", "convolution", "plain"])
def each_way(request, monkeypatch):
    """With oneDNN's prepacked linear layers, as products or as convolutions, and with the fallback to plain modules."""
    monkeypatch.setattr(minibert.inference, "fastest_linear", lambda dtype: request.param)
    return request.param or nn.Linear


@pytest.fixture
def asked_anew():
    """What was found to be the fastest is forgotten, before and after."""
    minibert.inference.fastest_linear.cache_clear()
    yield
    minibert.inference.fastest_linear.cache_clear()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=has_bfloat16)], ids=str)
def test_both_doors_give_the_same_answers(name, mask, dtype, each_way):
    if each_way is ConvolvedLinear and dtype != torch.float32:
        pytest.skip("convolutions are for float32")
    ours, theirs = twins(CONFIGS[name], "sdpa")
    given = make_batch(CONFIGS[name], mask, SIZES[name], two_segments=True)
    fast = prepare_for_inference(ours, dtype)
    assert isinstance(fast.layers[-1].feed_forward.output, each_way)
    seen = given["attention_mask"].bool()
    expected = theirs(**given)
    got = fast(**given)
    torch.testing.assert_close(got.logits[seen].float(), expected.logits[seen], rtol=0, atol=TOLERANCE[dtype])
    batch = PackedBatch.from_padded(given["input_ids"], given["attention_mask"], given["token_type_ids"])
    positions = (batch.pack(given["labels"]) != -100).nonzero().flatten().flip(0)  # in an order of our own
    logits = fast.predict(batch, positions)
    torch.testing.assert_close(logits.float(), ours.predict(batch, positions), rtol=0, atol=TOLERANCE[dtype])


def test_asking_for_no_position_one_twice_and_all(each_way):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    fast = prepare_for_inference(ours)
    batch = PackedBatch.from_lists([[5, 6, 7], [], [8], [9, 10, 11, 12]])
    for positions in ([], [3], [7, 3, 7], list(range(8))):
        wanted = torch.tensor(positions, dtype=torch.long)
        torch.testing.assert_close(fast.predict(batch, wanted), ours.predict(batch, wanted), rtol=0, atol=1e-5)


def test_attention_at_is_attention_there():
    batch = PackedBatch.from_lists([[1] * 5, [1], [1] * 9])
    query, key, value = (torch.randn(15, 3, 8) for _ in range(3))
    positions = torch.tensor([14, 0, 5, 4, 0])
    expected = attention(query, key, value, batch)[positions]
    torch.testing.assert_close(attention_at(query, key, value, batch, positions), expected, rtol=0, atol=1e-6)


def test_the_original_stays_as_it_is(each_way):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    fast = prepare_for_inference(ours, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert isinstance(ours.layers[0].attention.qkv, nn.Linear)
    assert fast.config == ours.config


def test_it_cannot_be_trained_saved_or_moved(tmp_path):
    fast = prepare_for_inference(twins(CONFIGS["batch 13, gelu"])[0])
    with pytest.raises(ValueError, match="train the one it was made from"):
        fast.train()
    with pytest.raises(ValueError, match="save the one it was made from"):
        fast.save_pretrained(tmp_path)
    for move in (lambda: fast.to("cpu"), fast.half, fast.double, fast.cuda):
        with pytest.raises(ValueError, match="prepare that"):
            move()
    assert fast.eval() is fast


def test_wrong_dtypes_are_refused(monkeypatch):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    with pytest.raises(ValueError, match="int8"):
        prepare_for_inference(ours, torch.int8)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="no instructions for bfloat16"):
        prepare_for_inference(ours, torch.bfloat16)


def test_without_the_private_operator_plain_modules_serve(monkeypatch, asked_anew):
    monkeypatch.setattr(
        minibert.inference.PrepackedLinear, "__init__", lambda *arguments: torch.ops.mkldnn.no_such_thing
    )
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    fast = prepare_for_inference(ours)
    assert isinstance(fast, PreparedBert)
    assert isinstance(fast.layers[0].attention.qkv, nn.Linear)


@pytest.mark.parametrize("fault", ["another activation", "wrong with many tokens", "a little wrong"])
def test_a_way_that_gives_something_else_is_not_taken(fault, monkeypatch, asked_anew):
    def multiply(self, x):
        y = nn.functional.linear(x, WEIGHTS[id(self)], self.bias)
        if fault == "another activation":
            return y.relu()
        y = nn.functional.gelu(y)
        return y * 1.01 if fault == "a little wrong" else y * (len(x) < 20)

    WEIGHTS = {}
    for kind in (ConvolvedLinear, PrepackedLinear):
        monkeypatch.setattr(kind, "multiply", multiply)
        monkeypatch.setattr(kind, "pack", lambda self, weight: WEIGHTS.update({id(self): weight}))
    assert minibert.inference.fastest_linear(torch.float32) is None


@pytest.mark.parametrize(("inputs", "outputs"), [(37, 99), (768, 768), (3072, 768), (768, 5000)])
@torch.inference_mode()
def test_convolutions_for_every_number_of_tokens(inputs, outputs):
    """They are the linear layer; and no number of tokens wants the weights in another order, which would be slow."""
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    linear = ConvolvedLinear(weight, bias)
    describe = torch.ops.mkldnn._get_mkldnn_serialized_md
    for tokens in (*range(20), 31, 64, 100, 129, 300, 759, 1065):
        x = torch.randn(tokens, inputs)
        # results of order 5, each a sum of up to 3072 products, added up in another order
        torch.testing.assert_close(linear(x), nn.functional.linear(x, weight, bias), rtol=0, atol=5e-5)
        if tokens and torch.backends.cpu.get_cpu_capability() == "AVX2":  # the CPUs that they are for
            height = linear.height(tokens)
            wanted = minibert.inference._order_for_images(weight, -(-tokens // height), height)
            assert torch.equal(describe(wanted), describe(linear.weight)), (tokens, height)


@pytest.mark.parametrize("kernel", [None, "formula", "sdpa", "sequences"])
def test_batches_that_are_filled_up(kernel, each_way):
    """Numbers of tokens that fit no kernel, of one length and of several, through every attention."""
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128})
    fast = prepare_for_inference(ours)
    for lengths in ([13] * 7, [1], [101], [3, 0, 70, 1, 29]):
        batch = PackedBatch.from_lists(
            [list(range(1, length % 90 + 1)) + [7] * (length // 90 * 90) for length in lengths]
        )
        assert batch.num_tokens == sum(lengths)
        positions = torch.tensor([batch.num_tokens - 1, 0])
        with torch.no_grad(), use_kernel(kernel) if kernel else nullcontext():
            torch.testing.assert_close(fast.encode(batch), ours.encode(batch), rtol=0, atol=1e-5)
            got, expected = fast.predict(batch, positions), ours.predict(batch, positions)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            maps, right = (model.attention_maps(batch, [1])[1] for model in (fast, ours))
            torch.testing.assert_close(maps, right, rtol=0, atol=1e-5)


def test_many_texts_come_back_in_order(each_way, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(40)), "."]
    tokenizer = from_vocabulary(words)
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "vocab_size": len(words)})
    texts = [" ".join(["w1"] * (number * 7 % 13) + [f"w{number % 40}", "[MASK]"]) for number in range(50)]
    alone = [FillMask(ours, tokenizer)(text, top_k=2) for text in texts]
    monkeypatch.setattr("minibert.fill_mask.WINDOW", 8)
    monkeypatch.setattr("minibert.fill_mask.BATCH_TOKENS", 30)
    taken = []

    def reading():
        for text in texts:
            taken.append(text)
            yield text

    stream = FillMask(prepare_for_inference(ours), tokenizer).stream(reading(), top_k=2)
    together = [next(stream)]
    assert len(taken) == 8, "the first answer comes when one window has been read"
    together += stream
    for got, expected in zip(together, alone, strict=True):
        assert [row["sequence"] for row in got] == [row["sequence"] for row in expected]
        assert [row["score"] for row in got] == pytest.approx([row["score"] for row in expected], abs=1e-6)


def eager_capture(run, graphs):
    """In place of a CUDA graph: a replay runs everything again, into the same result."""
    result = run().clone()

    return lambda: result.copy_(run()), result


def flash_attention_reads(query, key, value, batch):
    """In place of flash attention: it knows `cu_seqlens` and the longest length, and writes no token outside them."""
    context = torch.full_like(query, torch.nan)
    bounds = batch.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        assert 0 <= stop - start <= batch.max_seqlen
        if stop > start:
            q, k, v = (x[None, start:stop].transpose(1, 2) for x in (query, key, value))
            context[start:stop] = nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    return context


MIXES = [[5, 9], [9, 5], [1, 1, 1, 1], [20, 5, 9], [3], [12] * 5, [70, 2], [30, 100, 7], [11] * 9, [64, 64], [128]]


def test_graphs_of_rounded_sizes_give_the_same_logits(monkeypatch):
    monkeypatch.setattr(minibert.inference, "fastest_linear", lambda dtype: None)
    monkeypatch.setattr(minibert.inference, "capture", eager_capture)
    monkeypatch.setattr(minibert.kernels, "varlen", flash_attention_reads)
    monkeypatch.setattr(minibert.inference, "attention_at", lambda q, k, v, b, at: attention(q, k, v, b)[at])
    monkeypatch.setattr(minibert.inference, "GRAPHS", 6)
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128})
    fast = prepare_for_inference(ours)
    fast._graphs = graphs = Graphs(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    replays = []
    answer = CapturedPredict.__call__
    monkeypatch.setattr(CapturedPredict, "__call__", lambda *given: replays.append(1) or answer(*given))
    kept = []
    for mix in MIXES * 3:
        rows = [torch.randint(5, 99, (length,), generator=generator).tolist() for length in mix]
        types = [torch.randint(0, 2, (length,), generator=generator).tolist() for length in mix]
        batch = PackedBatch.from_lists(rows, types)
        positions = torch.randperm(batch.num_tokens, generator=generator)[: max(1, batch.num_tokens // 3)]
        kept.append((fast.predict(batch, positions), ours.predict(batch, positions)))
    for got, expected in kept:  # also after later batches have gone through the same graph
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert len(graphs.captured) == 6, "no more than GRAPHS, though there were more sizes"
    assert len(replays) > len(MIXES)

    before = len(replays)
    batch = PackedBatch.from_lists([[7] * 5, [8] * 9])
    with use_kernel("formula"):
        fast.predict(batch, torch.tensor([0]))
    assert len(replays) == before, "a kernel that the user asked for is not replaced"
    with pytest.raises(ValueError, match="unknown"):
        fast.predict(PackedBatch.from_lists([[99999] * 5, [1] * 9]), torch.tensor([0]))
    monkeypatch.setattr(
        minibert.checks, "require_positions", lambda positions, batch: None
    )  # as on CUDA: no host check
    with pytest.raises(IndexError):
        fast.predict(batch, torch.tensor([0, 14, 2, 3]))


def test_rounding_adds_little_and_makes_few_sizes():
    rounded = [_round_up(number) for number in range(1, 4097)]
    assert all(0 <= size - number < max(64, number / 8) for number, size in enumerate(rounded, start=1))
    assert len(set(rounded)) < 64


def test_compiled_once_for_all_lengths(monkeypatch):
    """Twenty mixes of lengths, all layers: two functions, each compiled whole and once."""
    counter = torch._dynamo.testing.CompileCounter()
    compile_it = torch.compile
    monkeypatch.setattr(minibert.inference, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(minibert.inference, "_can_compile", lambda: True)
    monkeypatch.setattr(minibert.inference, "fastest_linear", lambda dtype: None)
    monkeypatch.setattr(torch, "compile", lambda run, **o: compile_it(run, backend=counter, fullgraph=True, **o))
    torch._dynamo.reset()
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128})
    fast = prepare_for_inference(ours)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(20):
            lengths = torch.randint(3, 129, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)
            batch = PackedBatch.from_lists([[7] * length for length in lengths.tolist()])
            positions = torch.arange(0, batch.num_tokens, 3)
            logits = fast.predict(batch, positions)
            torch.testing.assert_close(logits, ours.predict(batch, positions), rtol=0, atol=1e-5)
            torch.testing.assert_close(fast.encode(batch), ours.encode(batch), rtol=0, atol=1e-5)
        assert counter.frame_count == 2
        for position in (3, 5):  # a single [MASK]: torch compiles a length of 1 apart, once
            fast.predict(PackedBatch.from_lists([[7] * 9]), torch.tensor([position]))
        assert counter.frame_count == 3


def test_nothing_in_the_layers_asks_the_device(monkeypatch):
    """On fake CUDA tensors whatever would wait for a number from the device is an error."""
    monkeypatch.setattr("minibert.kernels.varlen", lambda query, key, value, batch: torch.empty_like(query))
    monkeypatch.setattr(minibert.inference, "COMPILED_ON", ())
    monkeypatch.setattr(minibert.inference, "_has_flash_attention", lambda *arguments: False)  # so no graphs
    config = BertConfig(num_hidden_layers=2, hidden_size=48, num_attention_heads=3, intermediate_size=37, vocab_size=99)

    def cuda(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with torch.device("meta"):
        model = BertForMaskedLM(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: cuda(*tensor.shape, dtype=torch.float32) for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        fast = prepare_for_inference(model)
        assert fast.embeddings.word.weight.dtype == torch.bfloat16
        batch = PackedBatch(
            *(cuda(8) for _ in range(3)),
            cu_seqlens=cuda(4, dtype=torch.int32),
            lengths=(3, 1, 4),
            padded_shape=(3, 4),
            padded_index=cuda(8),
            largest=(12, 0, 3),
        )
        hidden = fast.encode(batch)
        assert (hidden.shape, hidden.dtype, hidden.device.type) == ((8, 48), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prepared_on_a_gpu(dtype):
    """Compiled, and from the second batch of a size on as a graph: the same logits every time."""
    ours, _ = twins(
        {**CONFIGS["batch 13, gelu"], "hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 128}
    )
    fast = prepare_for_inference(ours.cuda(), dtype)
    kept = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for mix in MIXES * 2:
                batch = PackedBatch.from_lists([[7 + length] * length for length in mix], device="cuda")
                positions = torch.arange(0, batch.num_tokens, 3, device="cuda")
                kept.append((fast.predict(batch, positions).float(), ours.predict(batch, positions)))
                kept.append((fast.encode(batch).float(), ours.encode(batch)))
    for got, expected in kept:
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[torch.bfloat16])
    assert fast._graphs is not None
    assert fast._graphs.captured
    in_double = prepare_for_inference(ours, torch.float64)
    for _ in range(3):
        got = in_double.predict(batch, positions).float()
        torch.testing.assert_close(got, ours.predict(batch, positions), rtol=0, atol=1e-2)  # TF32 may be on
