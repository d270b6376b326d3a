"""The fast form of a model: the same answers through the padded and the packed call, on every shape of batch."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from forms import FORMS, TOLERANCE, form_or_skip
from twins import CONFIGS, MASKS, SIZES, make_batch, twins

from minibert import FillMask, PackedBatch
from minibert.attention import use_kernel
from minibert.inference import prepare_for_inference
from minibert.inference.onednn import has_bfloat16
from minibert.inference.prepare import WAYS, _choose_way, linear_layer
from minibert.tokenizer import from_vocabulary

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(params=WAYS)
def each_way(request):
    """Linear layers as torch has them, and in the two ways of oneDNN."""
    return form_or_skip(request.param)[1]


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
    expected = theirs(**given)
    got = fast(**given)
    torch.testing.assert_close(got.logits[seen].float(), expected.logits[seen], rtol=0, atol=TOLERANCE[dtype])
    batch = PackedBatch.from_padded(given["input_ids"], given["attention_mask"], given["token_type_ids"])
    positions = (batch.pack(given["labels"]) != -100).nonzero().flatten().flip(0)  # in an order of our own
    logits = fast.predict(batch, positions)
    torch.testing.assert_close(logits.float(), ours.predict(batch, positions), rtol=0, atol=TOLERANCE[dtype])


def test_asking_for_no_position_one_twice_and_all(each_way):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    fast = prepare_for_inference(ours, linear=each_way)
    batch = PackedBatch.from_lists([[5, 6, 7], [], [8], [9, 10, 11, 12]])
    for positions in ([], [3], [7, 3, 7], list(range(8))):
        wanted = torch.tensor(positions, dtype=torch.long)
        torch.testing.assert_close(fast.predict(batch, wanted), ours.predict(batch, wanted), rtol=0, atol=1e-5)


def test_wrong_dtypes_are_refused(monkeypatch):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    with pytest.raises(ValueError, match=r"torch.int8 or a floating-point type .* not torch.int16"):
        prepare_for_inference(ours, torch.int16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="no instructions for bfloat16"):
        prepare_for_inference(ours, torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_was_made_in_inference_mode(form):
    dtype, way = form_or_skip(form)
    with torch.inference_mode():
        ours = twins(CONFIGS["batch 13, gelu"])[0]
        expected = ours(torch.tensor([[5, 6, 7]])).logits
    got = prepare_for_inference(ours, dtype, linear=way)(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_what_int8_shows_has_the_type_of_its_answers():
    """numpy has no bfloat16, and whole numbers without their steps mean nothing."""
    form_or_skip("int8")
    fast = prepare_for_inference(twins(CONFIGS["batch 13, gelu"])[0], torch.int8)
    ids = torch.tensor([[5, 6, 7]])
    out = fast(ids, output_attentions=True, output_hidden_states=True)
    maps = fast.attention_maps(PackedBatch.from_lists([[5, 6, 7]]), [0])
    assert {x.dtype for x in (out.logits, *out.attentions, *out.hidden_states, *maps.values())} == {torch.float32}
    # rows of probabilities that were rounded to 2^-8 each
    assert all((x.sum(-1) - 1).abs().max() < 0.02 for x in out.attentions)
    assert fast.embeddings.word(ids).dtype == torch.float32
    with pytest.raises(ValueError, match=r"whole numbers: call model\.embeddings\.word\(ids\)"):
        fast.get_input_embeddings()
    for model in (fast, twins(CONFIGS["batch 13, gelu"])[0]):
        with pytest.raises(ValueError, match="not 'int8'"):
            prepare_for_inference(model, "int8")


@pytest.mark.parametrize("kernel", [None, "formula", "sdpa", "sequences"])
def test_batches_that_are_filled_up(kernel, each_way):
    """Numbers of tokens that fit no kernel, of one length and of several, through every attention."""
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128})
    fast = prepare_for_inference(ours, linear=each_way)
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
            maps, right = (model.attention_maps(batch, [0, 1]) for model in (fast, ours))
            for number in (0, 1):
                torch.testing.assert_close(maps[number], right[number], rtol=0, atol=1e-5)
            for one, other in zip(fast.hidden_states(batch), ours.hidden_states(batch), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
            guesses, right = (model.layer_guesses(batch, positions) for model in (fast, ours))
            torch.testing.assert_close(guesses, right, rtol=0, atol=1e-5)


def test_several_threads_may_ask_at_once(each_way):
    ours, _ = twins({**CONFIGS["batch 13, gelu"], "max_position_embeddings": 128})
    fast = prepare_for_inference(ours, linear=each_way)
    batches = [PackedBatch.from_lists([[7] * length, [8] * (length // 2 + 1)]) for length in range(1, 41)]
    alone = [fast.predict(batch, torch.tensor([0])) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: fast.predict(batch, torch.tensor([0])), batches * 3))
    for got, expected in zip(together, alone * 3, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_linear_layers_can_be_chosen(each_way):
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    fast = prepare_for_inference(ours, linear=each_way)
    assert fast.linear == each_way
    batch, positions = PackedBatch.from_lists([[5, 6, 7]]), torch.tensor([1])
    again = prepare_for_inference(ours, linear=fast.linear).predict(batch, positions)
    assert torch.equal(again, fast.predict(batch, positions)), "named, so rounded alike"
    assert prepare_for_inference(ours).linear in WAYS


def test_ways_that_are_not_there_are_refused():
    ours, _ = twins(CONFIGS["batch 13, gelu"])
    with pytest.raises(ValueError, match=r"one of auto, .*compiled, not 'mkl'"):
        prepare_for_inference(ours, linear="mkl")
    for dtype, linear in ((torch.float64, "product"), (torch.bfloat16, "convolution"), (torch.float16, "product")):
        if dtype != torch.bfloat16 or has_bfloat16():
            with pytest.raises(ValueError, match=f"linear='{linear}' cannot be had in {dtype} on this cpu: .*torch"):
                prepare_for_inference(ours, dtype, linear=linear)
    assert prepare_for_inference(ours, torch.float64).linear == "torch"
    assert prepare_for_inference(ours).dtype == torch.float32
    assert prepare_for_inference(ours.double()).dtype == torch.float64, "its own"
    with pytest.raises(ValueError, match=r"'product' cannot be had in .* on this cuda: .* auto, torch"):
        _choose_way("product", torch.bfloat16, torch.device("cuda"))
    assert _choose_way("auto", torch.bfloat16, torch.device("cuda")) == "torch"


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

    stream = FillMask(prepare_for_inference(ours, linear=each_way), tokenizer).stream(reading(), top_k=2)
    together = [next(stream)]
    assert len(taken) == 8, "the first answer comes when one window has been read"
    together += stream
    for got, expected in zip(together, alone, strict=True):
        assert [row["sequence"] for row in got] == [row["sequence"] for row in expected]
        assert [row["score"] for row in got] == pytest.approx([row["score"] for row in expected], abs=1e-6)
