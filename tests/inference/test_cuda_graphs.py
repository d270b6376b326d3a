"""A prepared model on CUDA, as far as that can be seen without a GPU, and on one where there is one."""

from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import CONFIGS, on_a_fake_gpu, twins

import minibert.attention
import minibert.checks
from minibert import BertConfig, BertForMaskedLM, PackedBatch
from minibert.attention import attention, use_kernel
from minibert.inference import cuda_graphs, prepare_for_inference
from minibert.inference import prepared as prepare
from minibert.inference.cuda_graphs import CapturedPredict, Graphs, _round_up

SIZES = {**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128}
MIXES = [[5, 9], [9, 5], [1, 1, 1, 1], [20, 5, 9], [3], [12] * 5, [70, 2], [30, 100, 7], [11] * 9, [64, 64], [128]]


def random_batch(lengths):
    rows, types = ([torch.randint(*ids, (n,)).tolist() for n in lengths] for ids in ((5, 99), (0, 2)))
    return PackedBatch.from_lists(rows, types)


def eager_capture(run, graphs):
    """In place of a CUDA graph: a replay runs everything again, into the same result."""
    result = run().clone()
    return lambda: result.copy_(run()), result


def flash_attention_reads(query, key, value, batch):
    """In place of flash attention: it knows `cu_seqlens` and the longest length, and writes no token outside them."""
    context = torch.full_like(query, torch.nan)
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        assert 0 <= stop - start <= batch.max_seqlen
        if stop > start:
            q, k, v = (x[None, start:stop].transpose(1, 2) for x in (query, key, value))
            context[start:stop] = nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    return context


def test_graphs_of_rounded_sizes_give_the_same_logits(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", eager_capture)
    monkeypatch.setattr(minibert.attention, "varlen", flash_attention_reads)
    monkeypatch.setattr(prepare, "attention_at", lambda q, k, v, b, at: attention(q, k, v, b)[at])
    monkeypatch.setattr(cuda_graphs, "GRAPHS", 6)
    replays, answer = [], CapturedPredict.__call__
    monkeypatch.setattr(CapturedPredict, "__call__", lambda *given: replays.append(1) or answer(*given))
    ours = twins(SIZES)[0]
    fast = prepare_for_inference(ours, linear="torch")
    fast._graphs = graphs = Graphs(torch.device("cpu"))
    kept = []
    for mix in MIXES * 3:
        batch = random_batch(mix)
        positions = torch.randperm(batch.num_tokens)[: max(1, batch.num_tokens // 3)]
        kept.append((fast.predict(batch, positions), ours.predict(batch, positions)))
    for got, expected in kept:  # also after later batches have gone through the same graph
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert len(graphs.captured) == 6, "no more than GRAPHS, though there were more sizes"
    before = len(replays)
    assert before > len(MIXES)
    batch = PackedBatch.from_lists([[7] * 5, [8] * 9])
    with use_kernel("formula"):
        fast.predict(batch, torch.tensor([0]))
    assert len(replays) == before, "a kernel that the user asked for is not replaced"
    with pytest.raises(ValueError, match="unknown"):
        fast.predict(PackedBatch.from_lists([[99999] * 5, [1] * 9]), torch.tensor([0]))
    monkeypatch.setattr(minibert.checks, "require_positions", lambda *given: None)  # as on CUDA: no host check
    with pytest.raises(IndexError):
        fast.predict(batch, torch.tensor([0, 14, 2, 3]))


def test_rounding_adds_little_and_makes_few_sizes():
    rounded = [_round_up(number) for number in range(1, 4097)]
    assert all(0 <= size - number < max(64, number / 8) for number, size in enumerate(rounded, start=1))
    assert len(set(rounded)) < 64


def test_compiled_once_for_all_lengths(monkeypatch):
    """Twenty mixes of lengths, all layers: two functions, each compiled whole and once."""
    counter, compile_it = torch._dynamo.testing.CompileCounter(), torch.compile
    monkeypatch.setattr(prepare, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(prepare, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda run, **o: compile_it(run, backend=counter, fullgraph=True, **o))
    torch._dynamo.reset()
    ours = twins(SIZES)[0]
    fast = prepare_for_inference(ours, linear="torch")
    with torch.inference_mode():
        for number in range(20):
            batch = random_batch(torch.randint(3, 129, (number % 8 + 1,)).tolist())
            positions = torch.arange(0, batch.num_tokens, 3)
            for got, expected in (
                (fast.predict(batch, positions), ours.predict(batch, positions)),
                (fast.encode(batch), ours.encode(batch)),
            ):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert counter.frame_count == 2
        for position in (3, 5):  # a single [MASK]: torch compiles a length of 1 apart, once
            fast.predict(PackedBatch.from_lists([[7] * 9]), torch.tensor([position]))
        assert counter.frame_count == 3


def test_nothing_in_the_layers_asks_the_device(monkeypatch):
    """Prepared or not. On fake CUDA tensors whatever would wait for a number from the device is an error."""
    called, real = [], minibert.attention.varlen
    monkeypatch.setattr(minibert.attention, "varlen", lambda *given: called.append(1) or real(*given))
    monkeypatch.setattr(prepare, "COMPILED_ON", ())
    monkeypatch.setattr(prepare, "has_flash_attention", lambda *arguments: False)  # so no graphs
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**{**SIZES, "hidden_size": 48, "num_attention_heads": 3})).eval()
    batch = random_batch([3, 1, 4])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        weights = {name: torch.empty_like(x, device="cuda") for name, x in model.bfloat16().state_dict().items()}
        model.load_state_dict(weights, assign=True)
        for form in (prepare_for_inference(model), model):
            hidden = form.encode(on_a_fake_gpu(batch))
            assert (hidden.shape, hidden.dtype, hidden.device.type) == ((8, 48), torch.bfloat16, "cuda")
    assert len(called) == 2 * 5, "each layer went through flash attention on packed tokens"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prepared_on_a_gpu(dtype):
    """Compiled, and from the second batch of a size on as a graph: the same logits every time."""
    ours = twins({**SIZES, "hidden_size": 128, "num_attention_heads": 2})[0].cuda()
    fast, kept = prepare_for_inference(ours, dtype), []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for mix in MIXES * 2:
                batch = random_batch(mix).to("cuda")
                positions = torch.arange(0, batch.num_tokens, 3, device="cuda")
                kept.append((fast.predict(batch, positions).float(), ours.predict(batch, positions)))
                kept.append((fast.encode(batch).float(), ours.encode(batch)))
    for got, expected in kept:
        torch.testing.assert_close(got, expected, rtol=0, atol=0.15)
    assert fast._graphs.captured
    in_double = prepare_for_inference(ours, torch.float64)
    for _ in range(3):
        got = in_double.predict(batch, positions).float()
        torch.testing.assert_close(got, ours.predict(batch, positions), rtol=0, atol=1e-2)  # TF32 may be on
