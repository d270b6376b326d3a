"""The fast form of a model: the same answers through both doors, on every shape of batch, and without touching
the original.
"""

import pytest
import torch
from torch import nn
from twins import CONFIGS, MASKS, SIZES, make_batch, twins

import minibert.inference
from minibert import FillMask, PackedBatch
from minibert.attention import attention, attention_at
from minibert.inference import PrepackedLinear, PreparedBert, prepare_for_inference
from minibert.tokenizer import from_vocabulary

has_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bfloat16"
)
# bfloat16 rounds to 2^-8: some roundings of that, on logits of order 3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.15}


@pytest.fixture(params=[True, False], ids=["prepacked", "plain"])
def either_way(request, monkeypatch):
    """With oneDNN's prepacked linear layers, and with the fallback to plain modules."""
    monkeypatch.setattr(minibert.inference, "_prepacking_pays", lambda dtype: request.param)
    return request.param


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=has_bfloat16)], ids=str)
def test_both_doors_give_the_same_answers(name, mask, dtype, either_way):
    ours, theirs = twins(CONFIGS[name], "sdpa")
    given = make_batch(CONFIGS[name], mask, SIZES[name], two_segments=True)
    fast = prepare_for_inference(ours, dtype)
    assert any(isinstance(module, PrepackedLinear) for module in fast.modules()) == either_way
    seen = given["attention_mask"].bool()
    expected = theirs(**given)
    got = fast(**given)
    torch.testing.assert_close(got.logits[seen].float(), expected.logits[seen], rtol=0, atol=TOLERANCE[dtype])
    batch = PackedBatch.from_padded(given["input_ids"], given["attention_mask"], given["token_type_ids"])
    positions = (batch.pack(given["labels"]) != -100).nonzero().flatten().flip(0)  # in an order of our own
    logits = fast.predict(batch, positions)
    torch.testing.assert_close(logits.float(), ours.predict(batch, positions), rtol=0, atol=TOLERANCE[dtype])


def test_asking_for_no_position_one_twice_and_all(either_way):
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


def test_the_original_stays_as_it_is(either_way):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    fast = prepare_for_inference(ours, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert isinstance(ours.layers[0].attention.qkv, nn.Linear)
    assert fast.config == ours.config


def test_it_cannot_be_trained_or_saved(tmp_path):
    fast = prepare_for_inference(twins(CONFIGS["batch 13, gelu"])[0])
    with pytest.raises(ValueError, match="train the one it was made from"):
        fast.train()
    with pytest.raises(ValueError, match="save the one it was made from"):
        fast.save_pretrained(tmp_path)
    assert fast.eval() is fast


def test_wrong_dtypes_are_refused(monkeypatch):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    with pytest.raises(ValueError, match="int8"):
        prepare_for_inference(ours, torch.int8)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="no instructions for bfloat16"):
        prepare_for_inference(ours, torch.bfloat16)


def test_without_the_private_operator_plain_modules_serve(monkeypatch):
    minibert.inference._prepacking_pays.cache_clear()
    monkeypatch.setattr(
        minibert.inference.PrepackedLinear, "__init__", lambda *arguments: torch.ops.mkldnn.no_such_thing
    )
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    fast = prepare_for_inference(ours)
    minibert.inference._prepacking_pays.cache_clear()
    assert isinstance(fast, PreparedBert)
    assert isinstance(fast.layers[0].attention.qkv, nn.Linear)


def test_many_texts_come_back_in_order(either_way, monkeypatch):
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
