"""Programs recorded from the model: right for other batches too, or refused."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from twins import CONFIGS, twins

from minibert import PackedBatch, prepare_for_inference

SIZES = CONFIGS["batch 13, gelu"]
SHAPES = [(1, 1), (1, 7), (2, 5), (3, 5), (3, 19), (4, 2), (7, 11), (13, 7), (2, 18), (5, 13)]


@pytest.fixture(scope="module")
def model():
    return twins(SIZES)[0].requires_grad_(False)


def batches(shapes=SHAPES):
    """With padding on the right, on the left, with holes, and one row without a token."""
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate(shapes):
        ids = torch.randint(0, SIZES["vocab_size"], shape, generator=generator)
        column, lengths = torch.arange(shape[1]), torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        masks = [column < lengths, column >= shape[1] - lengths, torch.rand(shape, generator=generator) < 0.6]
        mask = masks[number % 3].long()
        if number == 4:
            mask[1] = 0
        yield ids, mask, torch.randint(0, 2, shape, generator=generator)


@pytest.mark.filterwarnings("ignore")  # torch's, of what it records; ours, of rows without a token
def test_a_jit_trace_is_right_for_other_lengths_and_shapes(model):
    class Logits(torch.nn.Module):
        def forward(self, *given):
            return model(*given).logits

    traced = torch.jit.trace(Logits(), next(batches([(3, 7)])), check_trace=False)
    for given in batches():
        torch.testing.assert_close(traced(*given), model(*given).logits, rtol=0, atol=1e-5)  # sums in other orders
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="would make constants of the lengths"):
        torch.jit.trace(lambda ids: model.encode(PackedBatch.from_padded(ids)), ids)
    fast = prepare_for_inference(model)
    with pytest.raises(ValueError, match="export or trace the one it was made from"):
        torch.jit.trace(lambda ids: fast(ids).logits, ids)


@pytest.mark.slow
def test_compiled_whole_and_once_for_all_shapes(model):
    """Ten shapes, one graph; a batch or a length of 1 is a constant to torch.compile, and gives one of its own."""
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for given in batches([shape for shape in SHAPES if min(shape) > 1]):
        got, expected = compiled(*given).logits, model(*given).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # sums in other orders
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_what_stands_in_the_padding_does_not_matter_to_a_recorded_program(model):
    ids, mask, types = next(batches([(3, 7)]))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    other, labels = ids.masked_fill(mask == 0, -1), ids.masked_fill(mask == 0, -100)
    torch.testing.assert_close(compiled(other, mask, types).logits, model(ids, mask, types).logits, rtol=0, atol=1e-5)
    loss = compiled(ids, mask, types, labels=ids).loss  # labels under padding are left out
    torch.testing.assert_close(loss, model(ids, mask, types, labels=labels).loss, rtol=0, atol=2e-6)
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="attention_mask is"):
        compiled(ids, mask[:, :1])
    torch._dynamo.reset()
