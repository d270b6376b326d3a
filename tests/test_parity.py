"""minibert against transformers: every submodule, logits, loss, gradients and optimizer steps."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from needs import lacking
from twins import (
    CONFIGS,
    MASKS,
    SIZES,
    assert_same_gradients,
    assert_same_logits_and_loss,
    assert_same_submodules,
    compare,
    make_batch,
    pack,
    twins,
)

from minibert import BertConfig, BertForMaskedLM, masked_lm_loss
from minibert.attention import use_kernel
from minibert.model import ACTIVATIONS

every_shape = pytest.mark.parametrize("mask", MASKS)
THIRTEEN = CONFIGS["batch 13, gelu"]


@pytest.mark.parametrize("name", CONFIGS)
@every_shape
@pytest.mark.parametrize(("two_segments", "attention"), [(False, "eager"), (True, "sdpa")], ids=["eager", "sdpa"])
def test_submodules_logits_loss_and_gradients(name, mask, two_segments, attention):
    ours, theirs = twins(CONFIGS[name], attention)
    batch = make_batch(CONFIGS[name], mask, SIZES[name], two_segments)
    assert_same_submodules(ours, theirs, batch)
    assert_same_logits_and_loss(ours, theirs, batch)
    assert_same_gradients(ours, theirs, batch)
    with use_kernel("formula" if attention == "eager" else "sdpa"):  # like with like
        assert_same_logits_and_loss(ours, theirs, batch)
        assert_same_gradients(ours, theirs, batch)


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_every_activation(hidden_act):
    ours, theirs = twins({**CONFIGS["1 head, relu"], "hidden_act": hidden_act})
    assert_same_logits_and_loss(ours, theirs, make_batch(CONFIGS["1 head, relu"], "dense", (2, 9)))


def test_a_new_model_starts_as_bert_did():
    """A normal distribution cut off at two standard deviations, which leaves it 0.8796 of its own. Biases are 0."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**THIRTEEN, initializer_range=0.1))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    numbers = torch.cat([matrix.flatten() for matrix in matrices])  # 40,000
    assert numbers.abs().max() <= 0.2
    assert numbers.std().item() == pytest.approx(0.08796, rel=0.02)  # five standard errors
    assert all(matrix.abs().max() > 0.1 for matrix in matrices)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if name.lower().endswith("norm.weight") else 0.0)).all(), name


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 adds in another order")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_dense_batch_is_equal_bit_for_bit(attention):
    ours, theirs = twins(THIRTEEN, attention)
    batch = make_batch(THIRTEEN, "dense", (13, 7))
    with use_kernel("formula" if attention == "eager" else "sdpa"), torch.no_grad():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


@every_shape
def test_the_fast_door_gives_what_the_padded_door_gives(mask):
    ours, theirs = twins(THIRTEEN, "sdpa")
    batch = make_batch(THIRTEEN, mask, (13, 7), two_segments=True)
    packed = pack(batch)
    targets = packed.pack(batch["labels"])
    positions = (targets != -100).nonzero().flatten()
    logits = ours.predict(packed, positions)
    expected = theirs(**batch)
    wanted = expected.logits[batch["labels"] != -100]  # row by row: the packed order
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(masked_lm_loss(logits, targets[positions]).mean, expected.loss, rtol=0, atol=2e-6)


def test_positions_of_your_own():
    ours, theirs = twins(THIRTEEN)
    batch = make_batch(THIRTEEN, "right", (13, 7))
    batch["position_ids"] = torch.arange(7).flip(0).expand(13, 7)
    assert_same_logits_and_loss(ours, theirs, batch)


@pytest.mark.parametrize(("mask", "attention"), [("dense", "eager"), ("right", "sdpa"), ("holes", "sdpa")])
def test_twenty_steps_of_adamw_give_the_same_losses(mask, attention):
    ours, theirs = twins(THIRTEEN, attention)
    batch = make_batch(THIRTEEN, mask, (13, 7), two_segments=True)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        history = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    assert losses[1][-1] < 0.8 * losses[1][0], "it learns, or the comparison means nothing"
    # Adam divides by the root of the squared gradient: where a gradient is nothing but rounding, its direction
    # is too.
    compare("losses of 20 AdamW steps", losses[0], losses[1], 1e-4)


def test_dropout_in_training_draws_what_transformers_draws():
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    ours, theirs = twins({**THIRTEEN, **rates}, "eager")
    batch = make_batch(THIRTEEN, "dense", (13, 7))
    results = []
    with use_kernel("formula"):
        for model in (ours.train(), theirs.train()):
            torch.manual_seed(3)
            results.append(model(**batch).logits)
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)
        assert not torch.allclose(ours(**batch).logits, ours(**batch).logits), "dropout is on"
    ours.eval()
    assert torch.equal(ours(**batch).logits, ours(**batch).logits), "and off again"


@every_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_near_the_truth_as_transformers_is(mask, dtype):
    # The truth is float64 with the same rounded weights. Both make errors of some roundings of 2^-8 (bfloat16)
    # or 2^-11 (float16) of the logits, in another order: neither may be more than half as far again from the
    # truth as the other.
    batch = make_batch(THIRTEEN, mask, (13, 7))
    ours, theirs = twins(THIRTEEN, "sdpa", dtype)
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        low, their_low = ours(**batch), theirs(**batch)
        high, their_high = ours.double()(**batch), theirs.double()(**batch)
    torch.testing.assert_close(high.logits[seen], their_high.logits[seen], rtol=0, atol=1e-12)
    truth = high.logits[seen]
    ours_error = (low.logits[seen] - truth).square().mean().sqrt()
    theirs_error = (their_low.logits[seen] - truth).square().mean().sqrt()
    assert ours_error <= 1.5 * theirs_error
    assert low.loss.dtype == torch.float32
    assert abs(low.loss - high.loss) <= 0.03 * high.loss


@pytest.mark.slow
def test_bert_base_at_full_size():
    # 12 layers of 768 add up more roundings than the small models, on logits of order 5.
    ours, theirs = twins({}, "sdpa")
    batch = make_batch({"vocab_size": 30522}, "right", (3, 37), two_segments=True)
    label = "bert-base size"
    with torch.no_grad():
        assert_same_submodules(ours, theirs, batch, tolerance=5e-5, label=label)
        assert_same_logits_and_loss(ours, theirs, batch, logits=5e-5, loss=1e-5, label=label)
    assert_same_gradients(ours, theirs, batch, tolerance=5e-5, label=label)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() == 109_514_298


# ---------------------------------------------------------------------------------------------------- the notebook

LINCOLN = json.loads((Path(__file__).parent / "lincoln.json").read_text())


def test_the_notebooks_shapes():
    model = BertForMaskedLM(BertConfig(num_hidden_layers=1, hidden_size=24)).eval()
    ids = torch.tensor([LINCOLN["ids"]])
    with torch.no_grad():
        out = model(ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
        assert (tuple(out.keys()), out.loss) == (("logits",), None)
        assert out.logits.shape == out["logits"].shape == out[0].shape == (1, 62, 30522)
        out = model(ids, labels=ids)
        assert (tuple(out.keys()), out.loss.shape) == (("loss", "logits"), ())


def real_weights():
    from huggingface_hub import try_to_load_from_cache

    from minibert.checkpoint import hub

    for folder in hub.BUNDLED:
        if (folder / "bert-base-uncased" / "model.safetensors").is_file():
            return
    repo = hub.SHORT_NAMES["bert-base-uncased"]
    if not isinstance(try_to_load_from_cache(repo, "model.safetensors", revision=hub.PINNED_REVISION[repo]), str):
        lacking("real-weights", "bert-base-uncased is neither in the hub's cache nor in weights/")


@pytest.mark.real_weights
def test_the_notebooks_loss():
    real_weights()
    model = BertForMaskedLM.from_pretrained("bert-base-uncased", local_files_only=True)
    labels = torch.tensor([LINCOLN["ids"]])
    ids = labels.clone()
    ids[0, [9, 18, 34, 37, 40, 41, 43, 44, 48]] = 103
    with torch.no_grad():
        loss = model(ids, labels=labels).loss  # over all 62 tokens, as the notebook has it
    assert loss.item() == pytest.approx(1.1912, abs=1e-4)


@pytest.mark.real_weights
def test_the_real_checkpoint_against_transformers():
    real_weights()
    ours = BertForMaskedLM.from_pretrained("bert-base-uncased", local_files_only=True)
    theirs = transformers.BertForMaskedLM.from_pretrained(ours.load_report.files[0].parent).eval()
    batch = make_batch({"vocab_size": 30522}, "right", (3, 37), two_segments=True)
    with torch.no_grad():
        # Real weights give logits of order 10.
        assert_same_logits_and_loss(ours, theirs, batch, logits=2e-4, loss=2e-5, label="bert-base-uncased")
