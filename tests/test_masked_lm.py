"""What a user asks of a model beside its logits: hidden states, guesses of each layer; and what it refuses to answer in
training mode, where dropout makes answers random.
"""

from contextlib import nullcontext

import pytest
import torch
from twins import CONFIGS, make_batch, pack, twins

from minibert import BertConfig, BertForMaskedLM, FillMask, PackedBatch, prepare_for_inference
from minibert.attention import use_kernel
from minibert.tokenizer import from_vocabulary

SIZES = CONFIGS["batch 13, gelu"]
BATCH = pack(make_batch(SIZES, "holes", (13, 7), two_segments=True))
PLACES = torch.tensor([3, 0, 8])


@pytest.fixture(scope="module")
def model():
    return twins(SIZES)[0]


def test_hidden_states_and_layer_guesses_end_in_the_answer(model):
    states, guesses = model.hidden_states(BATCH), model.layer_guesses(BATCH, PLACES)
    assert torch.equal(states[-1], model.encode(BATCH))
    assert torch.equal(guesses[-1], model.predict(BATCH, PLACES))
    for got, state in zip(guesses, states, strict=True):
        assert torch.equal(got, model.head(state[PLACES], model.word_embeddings))
    fast = prepare_for_inference(model)
    for got, wanted in zip(fast.hidden_states(BATCH), states, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # sums in other orders
    torch.testing.assert_close(fast.layer_guesses(BATCH, PLACES), guesses, rtol=1e-4, atol=1e-5)


def test_what_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match="count packed tokens"):
        model.layer_guesses(BATCH, torch.tensor([BATCH.num_tokens]))
    with pytest.raises(ValueError, match="token id 99999 is unknown"):
        model.hidden_states(PackedBatch.from_lists([[99999]]))
    for layers in ([], [5], [-1], [0, 9]):
        with pytest.raises(ValueError, match="0 to 4"):
            model.attention_maps(BATCH, layers)


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_has_an_empty_answer(training):
    model = BertForMaskedLM(BertConfig(**SIZES)).train(training)
    for shape in ((0, 4), (2, 0)):
        assert model(torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, SIZES["vocab_size"])
    assert model.encode(PackedBatch.from_lists([])).shape == (0, SIZES["hidden_size"])


# -------------------------------------------------------------------------------------------------------- training mode

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(94))]
TEXT = "w3 [MASK] w5"


def test_fill_mask_refuses_a_model_in_training_mode_but_without_dropout(monkeypatch):
    model = twins(SIZES)[0]
    fill = FillMask(model, from_vocabulary(WORDS))
    expected = fill(TEXT)
    model.train()
    with pytest.raises(ValueError, match=r"training mode .*dropout of 0\.1.* call model\.eval\(\)"):
        fill(TEXT)
    assert model.training, "it is not touched: another thread may be training it"
    monkeypatch.setattr("minibert.fill_mask.WINDOW", 1)
    model.eval()
    answers = fill.stream([TEXT, TEXT])
    assert next(answers) == expected
    model.layers[0].train()  # one part is enough, in the middle of a stream, too
    with pytest.raises(ValueError, match=r"layers\.0\..*dropout"):
        next(answers)
    for part in model.train().modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    assert fill(TEXT) == expected


@pytest.mark.parametrize("kernel", ["sdpa", "sequences", "formula", None])
def test_attention_weights_are_dropped_in_training(kernel):
    """By each kernel; and, without one, where the padding stays, since somebody looks at the hidden states."""
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    model, ids = BertForMaskedLM(BertConfig(**sizes)).train(), torch.arange(5, 12).expand(2, 7)
    with use_kernel(kernel) if kernel else nullcontext():
        first, second = (model(ids, output_hidden_states=kernel is None).logits for _ in range(2))
        model.eval()
        assert not torch.equal(first, second)
        assert torch.equal(*(model(ids, output_hidden_states=kernel is None).logits for _ in range(2)))
