"""A test of the parity tests: each fault that ports of BERT really have, planted in our model, must make a
parity check fail.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import (
    CONFIGS,
    SIZES,
    assert_same_gradients,
    assert_same_logits_and_loss,
    assert_same_submodules,
    make_batch,
    twins,
)

import minibert.model
from minibert.packing import PackedBatch

NAME = "batch 13, gelu"


def checks(ours, theirs, batch):
    """How many of the three parity checks fail."""
    failed = []
    for check in (assert_same_submodules, assert_same_logits_and_loss, assert_same_gradients):
        try:
            check(ours, theirs, batch)
        except AssertionError:
            failed.append(check.__name__)
    return failed


def tanh_gelu(model, monkeypatch):
    for layer in model.layers:
        layer.feed_forward.activation = lambda x: F.gelu(x, approximate="tanh")


def eps_1e_5(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def pre_layer_norm(model, monkeypatch):
    def forward(self, x, batch):
        x = x + self.attention(self.attention_LayerNorm(x), batch)
        return x + self.feed_forward(self.feed_forward_LayerNorm(x))

    monkeypatch.setattr(minibert.model.EncoderLayer, "forward", forward)


def missing_type_embedding(model, monkeypatch):
    nn.init.zeros_(model.embeddings.token_type.weight)


def ignored_mask(model, monkeypatch):
    real = minibert.model.attention

    def neighbours_too(query, key, value, batch, dropout=None):
        one_sequence = PackedBatch.from_lists([[1] * batch.num_tokens])  # no token knows where its own sequence ends
        return real(query, key, value, one_sequence, dropout)

    monkeypatch.setattr(minibert.model, "attention", neighbours_too)


def unscaled_scores(model, monkeypatch):
    real = minibert.model.attention

    def unscaled(query, key, value, batch, dropout=None):
        return real(query * query.shape[-1] ** 0.5, key, value, batch, dropout)

    monkeypatch.setattr(minibert.model, "attention", unscaled)


def doubled_bias(model, monkeypatch):
    real = minibert.model.MLMHead.forward
    monkeypatch.setattr(
        minibert.model.MLMHead, "forward", lambda self, x, embeddings: real(self, x, embeddings) + self.bias
    )


def untied_decoder(model, monkeypatch):
    # The worst kind: a copy. All outputs are right until the first optimizer step, which moves only one of the two.
    real = minibert.model.MLMHead.forward
    monkeypatch.setattr(
        minibert.model.MLMHead, "forward", lambda self, x, embeddings: real(self, x, embeddings.detach().clone())
    )


FAULTS = (
    tanh_gelu,
    eps_1e_5,
    pre_layer_norm,
    missing_type_embedding,
    ignored_mask,
    unscaled_scores,
    doubled_bias,
    untied_decoder,
)


@pytest.fixture
def pair():
    ours, theirs = twins(CONFIGS[NAME])
    return ours, theirs, make_batch(CONFIGS[NAME], "right", SIZES[NAME], two_segments=True)


def test_without_a_fault_nothing_fails(pair):
    assert checks(*pair) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault, pair, monkeypatch):
    ours, theirs, batch = pair
    fault(ours, monkeypatch)
    failed = checks(ours, theirs, batch)
    assert failed, f"{fault.__name__} went unnoticed"
    if fault is untied_decoder:
        assert failed == ["assert_same_gradients"]  # nothing else can see it
    else:
        assert "assert_same_logits_and_loss" in failed


def test_a_fault_of_one_weight_in_one_layer_is_caught(pair):
    ours, theirs, batch = pair
    with torch.no_grad():
        ours.layers[3].attention.output.bias[7] += 1e-3
    assert "assert_same_submodules" in checks(ours, theirs, batch)
