"""The fast form of a model: the same answers through the padded and the packed call, on every shape of batch."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from forms import FORMS, TOLERANCE, form_or_skip
from twins import CONFIGS, MASKS, SIZES, make_batch, pack, twins

from minibert import FillMask, PackedBatch
from minibert.attention import use_kernel
from minibert.inference import prepare_for_inference
from minibert.inference.prepare import WAYS, _choose_way, linear_layer
from minibert.tokenizer import from_vocabulary

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture
def ours():
    return twins({**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128})[0]


@pytest.fixture(params=WAYS)
def fast(request, ours):
    """With linear layers as torch has them, and in the two ways of oneDNN."""
    return prepare_for_inference(ours, linear=form_or_skip(request.param)[1])


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_both_calls_give_the_same_answers(name, mask, form):
    dtype, way = form_or_skip(form)
    ours, theirs = twins(CONFIGS[name], "sdpa")
    given = make_batch(CONFIGS[name], mask, SIZES[name], two_segments=True)
    fast = prepare_for_inference(ours, dtype, linear=way)
    assert type(fast.layers[-1].feed_forward.output).__name__ == (linear_layer(way, dtype) or torch.nn.Linear).__name__
    seen = given["attention_mask"].bool()
    close(fast(**given).logits[seen].float(), theirs(**given).logits[seen], TOLERANCE[dtype])
    batch = pack(given)
    positions = (batch.pack(given["labels"]) != -100).nonzero().flatten().flip(0)  # in an order of our own
    close(fast.predict(batch, positions).float(), ours.predict(batch, positions), TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_was_made_in_inference_mode(form):
    dtype, way = form_or_skip(form)
    with torch.inference_mode():
        ours = twins(CONFIGS["batch 13, gelu"])[0]
        expected = ours(torch.tensor([[5, 6, 7]])).logits
    got = prepare_for_inference(ours, dtype, linear=way)(torch.tensor([[5, 6, 7]])).logits
    close(got.float(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", [None, "formula", "sdpa", "sequences"])
@torch.no_grad()
def test_batches_that_are_filled_up(kernel, ours, fast):
    """Numbers of tokens that fit no kernel, of one length and of several, through every attention. Asked for are no
    position, one twice, and all.
    """
    for lengths in ([13] * 7, [1], [101], [3, 0, 70, 1, 29]):
        batch = PackedBatch.from_lists([[1 + number % 90 for number in range(length)] for length in lengths])
        last = batch.num_tokens - 1
        with use_kernel(kernel) if kernel else nullcontext():
            for asked in ([], [last, 0, last], list(range(batch.num_tokens))):
                positions = torch.tensor(asked, dtype=torch.int64)
                close(fast.predict(batch, positions), ours.predict(batch, positions))
            close(fast.layer_guesses(batch, positions), ours.layer_guesses(batch, positions))
            states, right = (torch.stack([*m.hidden_states(batch), m.encode(batch)]) for m in (fast, ours))
            close(states, right)
            maps, right = (m.attention_maps(batch, [0, 1]) for m in (fast, ours))
            close(maps, right)


def test_several_threads_may_ask_at_once(fast):
    batches = [PackedBatch.from_lists([[7] * length, [8] * (length // 2 + 1)]) for length in range(1, 41)]
    alone = [fast.predict(batch, torch.tensor([0])) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: fast.predict(batch, torch.tensor([0])), batches * 2))
    close(torch.cat(together), torch.cat(alone * 2), 1e-6)


def test_linear_layers_can_be_chosen(ours, fast):
    batch, positions = PackedBatch.from_lists([[5, 6, 7]]), torch.tensor([1])
    again = prepare_for_inference(ours, linear=fast.linear)
    assert again.linear == fast.linear
    assert torch.equal(again.predict(batch, positions), fast.predict(batch, positions)), "named, so rounded alike"


@pytest.mark.parametrize(
    ("dtype", "linear", "words"),
    [
        (torch.int16, "auto", r"torch.int8 or a floating-point type .* not torch.int16"),
        ("int8", "auto", "not 'int8'"),
        (torch.float32, "mkl", "one of auto, .*compiled, not 'mkl'"),
        (torch.float64, "product", r"'product' cannot be had in torch\.float64 on this cpu: .*torch"),
        (torch.float64, "compiled", r"'compiled' cannot be had in torch\.float64 on this cpu: .*torch"),
        (torch.float16, "product", r"'product' cannot be had in torch\.float16 on this cpu: .*torch"),
        (torch.bfloat16, "convolution", r"'convolution' cannot be had in torch\.bfloat16 on this cpu: .*torch"),
        (torch.int8, "torch", r"'torch' cannot be had in torch\.int8 .* choose one of auto, product"),
    ],
)
def test_types_and_ways_that_are_not_there_are_refused(dtype, linear, words, ours):
    with pytest.raises(ValueError, match=words):
        prepare_for_inference(ours, dtype, linear=linear)


def test_types_and_ways_of_this_device(ours, monkeypatch):
    assert prepare_for_inference(ours).linear in WAYS
    assert prepare_for_inference(ours, torch.float64).linear == "torch"
    for dtype in (torch.float64, torch.float32):
        assert prepare_for_inference(ours.to(dtype)).dtype == dtype, "its own"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="no instructions for bfloat16"):
        prepare_for_inference(ours, torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.int8 is for CPUs, and the model is on meta: use torch\.bfloat16"):
        prepare_for_inference(ours.to("meta"), torch.int8)
    with pytest.raises(ValueError, match=r"'product' cannot be had in .* on this cuda: .* auto, torch"):
        _choose_way("product", torch.bfloat16, torch.device("cuda"))
    assert _choose_way("auto", torch.bfloat16, torch.device("cuda")) == "torch"


def test_many_texts_come_back_in_order(monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(40)), "."]
    tokenizer = from_vocabulary(words)
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "vocab_size": len(words)})
    texts = [" ".join(["w1"] * (number * 7 % 13) + [f"w{number % 40}", "[MASK]"]) for number in range(50)]
    alone = [FillMask(ours, tokenizer)(text, top_k=2) for text in texts]
    monkeypatch.setattr("minibert.fill_mask.WINDOW", 8)
    monkeypatch.setattr("minibert.fill_mask.BATCH_TOKENS", 30)
    taken = []
    reading = (taken.append(text) or text for text in texts)
    stream = FillMask(prepare_for_inference(ours), tokenizer).stream(reading, top_k=2)
    together = [next(stream)]
    assert len(taken) == 8, "the first answer comes when one window has been read"
    together += stream
    for got, expected in zip(together, alone, strict=True):
        assert [row["sequence"] for row in got] == [row["sequence"] for row in expected]
        assert [row["score"] for row in got] == pytest.approx([row["score"] for row in expected], abs=1e-6)
