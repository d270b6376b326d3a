"""A model that somebody has changed is refused: prepared, it would be what its configuration says."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from twins import CONFIGS, twins

from minibert import BertForMaskedLM, PackedBatch, prepare_for_inference


def another_activation(model):
    model.layers[1].feed_forward.activation = nn.Tanh()


def another_eps(model):
    model.layers[0].attention_LayerNorm.eps = 1e-3


def another_head(model):
    model.head.activation = torch.relu


def other_heads(model):
    model.layers[0].attention.num_heads = 2


def another_encode(model):
    class Zero(BertForMaskedLM):
        def encode(self, batch):
            return super().encode(batch) * 0

    model.__class__ = Zero


@pytest.mark.parametrize("change", [another_activation, another_eps, another_head, other_heads, another_encode])
@pytest.mark.parametrize("config", ["batch 13, gelu", "3 heads, gelu_new"])
def test_what_was_changed_is_named(change, config):
    model = twins(CONFIGS[config])[0]
    prepare_for_inference(deepcopy(model))
    change(model)
    with pytest.raises(ValueError, match="is not as the configuration has it"):
        prepare_for_inference(model)


def test_activation_checkpointing_changes_no_number():
    model = twins(CONFIGS["batch 13, gelu"])[0]
    batch, positions = PackedBatch.from_lists([[1, 2, 3]]), torch.tensor([1])
    expected = model.predict(batch, positions)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(prepare_for_inference(model).predict(batch, positions), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_cannot_be_put_in():
    model = twins(CONFIGS["batch 13, gelu"])[0]
    fast = prepare_for_inference(model)
    with pytest.raises(ValueError, match="stays as it is"):
        fast.layers.insert(0, model.layers[0])
