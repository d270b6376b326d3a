"""What a user asks of a model beside its logits: hidden states, guesses of each layer; and what it refuses to answer in
training mode, where dropout makes answers random.
"""

from contextlib import nullcontext

import pytest
import torch
from twins import CONFIGS, make_batch, twins

from minibert import BertConfig, BertForMaskedLM, FillMask, PackedBatch, prepare_for_inference
from minibert.attention import use_kernel
from minibert.tokenizer import from_vocabulary

SIZES = CONFIGS["batch 13, gelu"]


@pytest.fixture(scope="module")
def pair():
    return twins(SIZES)


@pytest.fixture
def given():
    return make_batch(SIZES, "holes", (13, 7), two_segments=True)


def packed(given):
    return PackedBatch.from_padded(given["input_ids"], given["attention_mask"], given["token_type_ids"])


def test_hidden_states_are_those_of_transformers(pair, given):
    ours, theirs = pair
    batch = packed(given)
    states = ours.hidden_states(batch)
    given = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    expected = theirs(**given, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == SIZES["num_hidden_layers"] + 1
    for got, wanted in zip(states, expected, strict=True):
        torch.testing.assert_close(got, batch.pack(wanted), rtol=0, atol=1e-5)  # sums in other orders
    assert torch.equal(states[-1], ours.encode(batch))


def test_layer_guesses_end_in_the_answer(pair, given):
    ours, _ = pair
    batch, positions = packed(given), torch.tensor([3, 0, 8])
    guesses = ours.layer_guesses(batch, positions)
    assert guesses.shape == (SIZES["num_hidden_layers"] + 1, 3, SIZES["vocab_size"])
    assert torch.equal(guesses[-1], ours.predict(batch, positions))
    for got, state in zip(guesses, ours.hidden_states(batch), strict=True):
        assert torch.equal(got, ours.head(state[positions], ours.embeddings.word.weight))
    with pytest.raises(ValueError, match="count packed tokens"):
        ours.layer_guesses(batch, torch.tensor([batch.num_tokens]))
    with pytest.raises(ValueError, match="token id 99999 is unknown"):
        ours.hidden_states(PackedBatch.from_lists([[99999]]))


def test_a_prepared_model_has_them_too(pair, given):
    ours, _ = pair
    fast, batch, positions = prepare_for_inference(ours), packed(given), torch.tensor([3, 0, 8])
    for got, wanted in zip(fast.hidden_states(batch), ours.hidden_states(batch), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # as above
    torch.testing.assert_close(
        fast.layer_guesses(batch, positions), ours.layer_guesses(batch, positions), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_has_an_empty_answer(pair, training):
    model = pair[0].train(training)
    assert model(torch.zeros(0, 4, dtype=torch.int64)).logits.shape == (0, 4, SIZES["vocab_size"])
    assert model(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, SIZES["vocab_size"])
    assert model.encode(PackedBatch.from_lists([])).shape == (0, SIZES["hidden_size"])
    model.eval()


@pytest.mark.parametrize("layers", [[], [5], [-1], [0, 9]])
def test_maps_of_layers_that_are_not_there_are_refused(layers, pair, given):
    with pytest.raises(ValueError, match="0 to 4"):
        pair[0].attention_maps(packed(given), layers)


# -------------------------------------------------------------------------------------------------------- training mode

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(20))]
TEXT = "w3 [MASK] w5"


@pytest.fixture
def model():
    return twins({**CONFIGS["batch 13, gelu"], "vocab_size": len(WORDS)})[0]


def test_fill_mask_refuses_a_model_in_training_mode(model):
    fill = FillMask(model, from_vocabulary(WORDS))
    expected = fill(TEXT)
    model.train()
    with pytest.raises(ValueError, match=r"training mode .*dropout of 0\.1.* call model\.eval\(\)"):
        fill(TEXT)
    assert model.training, "it is not touched: another thread may be training it"
    assert fill.model.eval()
    assert fill(TEXT) == expected


def test_fill_mask_notices_it_in_the_middle_of_a_stream(model, monkeypatch):
    monkeypatch.setattr("minibert.fill_mask.WINDOW", 1)
    answers = FillMask(model, from_vocabulary(WORDS)).stream([TEXT, TEXT])
    next(answers)
    model.layers[0].train()  # one part is enough
    with pytest.raises(ValueError, match=r"layers\.0\..*dropout"):
        next(answers)


def test_without_dropout_training_mode_does_no_harm(model):
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    fill = FillMask(model, from_vocabulary(WORDS))
    expected = fill(TEXT)
    model.train()
    assert fill(TEXT) == expected


@pytest.mark.parametrize("kernel", ["sdpa", "sequences", "formula", None])
def test_attention_weights_are_dropped_in_training(kernel):
    """By each kernel; and, without one, where the padding stays, since somebody looks at the hidden states."""
    sizes = {**CONFIGS["batch 13, gelu"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    model, ids = BertForMaskedLM(BertConfig(**sizes)).train(), torch.arange(5, 12).expand(2, 7)
    with use_kernel(kernel) if kernel else nullcontext():
        first, second = (model(ids, output_hidden_states=kernel is None).logits for _ in range(2))
        model.eval()
        assert not torch.equal(first, second)
        assert torch.equal(*(model(ids, output_hidden_states=kernel is None).logits for _ in range(2)))
