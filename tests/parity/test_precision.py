"""Lower precision inside a float32 trace has a name; what is something else has not."""

import pytest
import torch
import torch.nn.functional as F
from planted import SIZES, port, tanh_gelu
from torch.overrides import TorchFunctionMode
from twins import twins

from minibert.parity import Trace, diagnose, diff, trace
from minibert.trace import standard_inputs
from minibert.trace.table import INPUTS


def tf32(x, truncated=False):
    """float32 without the last 13 bits of its significand, as tensor cores read it."""
    bits = x.view(torch.int32)
    return ((bits if truncated else bits + 2**12) & ~(2**13 - 1)).view(torch.float32)


class Accelerator(TorchFunctionMode):
    """Rounds the operands of every product."""

    def __init__(self, rounded):
        self.rounded = rounded
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = (self.rounded(args[0].contiguous()), self.rounded(args[1].contiguous()), *args[2:])
        return func(*args, **(kwargs or {}))


ROUNDED = {
    "the products were in TF32": tf32,
    "the products were in TF32 ": lambda x: tf32(x, truncated=True),
    "the products were in bfloat16": lambda x: x.bfloat16().float(),
}


def sparse(given):
    kept = {name: x for name, x in given.tensors.items() if name in INPUTS or name.endswith(("_norm", "s.norm"))}
    return Trace(kept, given.config, given.metadata)


@pytest.mark.parametrize("title", ROUNDED)
@pytest.mark.parametrize("keep", [lambda given: given, sparse], ids=["all tensors", "sparse"])
def test_rounded_operands_are_recognised(title, keep):
    ours, theirs = twins(SIZES[1])
    batch = standard_inputs(ours.config)
    with Accelerator(ROUNDED[title]):
        given = keep(trace(theirs, **batch))
    report, diagnosis = diff(trace(ours, **batch), given, ours), diagnose(given, ours)
    assert not report.ok
    assert not diagnosis.ok
    assert diagnosis.found[0][0].startswith(title.strip())
    for said in ("\n".join(report.summary), "\n".join(diagnosis.lines)):
        assert f"is as if {title.strip()}" in said
        assert "set_float32_matmul_precision" in said
        assert "it explains the size of every error" in said
        assert "--quantised" not in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_went_through_half_precision(dtype):
    ours, theirs = twins(SIZES[1])
    given = trace(theirs.to(dtype).float(), **standard_inputs(ours.config))
    assert diagnose(given, ours).found == [[f"the weights had been rounded to {str(dtype)[6:]}"]]


def test_autocast():
    ours, _ = twins(SIZES[1])
    batch = standard_inputs(ours.config)
    with torch.autocast("cpu", torch.bfloat16):  # trace() itself switches it off
        out = ours(**batch)
        dense = ours.layers[0].feed_forward.intermediate
        x = trace(ours, **batch).tensors["layers.0.attention_norm"]
        found = dense(x).float()
    assert out.logits.dtype == torch.bfloat16
    given = trace(ours, **batch)
    given.tensors["layers.0.intermediate"] = found
    assert "as if the products were in bfloat16" in "\n".join(diff(trace(ours, **batch), given, ours).summary)


def test_a_second_cause_is_not_covered_up(monkeypatch):
    ours, theirs, _ = port(SIZES[1])
    tanh_gelu(theirs, monkeypatch)
    theirs.bert.encoder.layer[1].output.dense.bias.data += 1
    with Accelerator(tf32):
        given = trace(theirs, **standard_inputs(ours.config))
    assert "it does not explain the error of layers.1.feed_forward:" in "\n".join(diagnose(given, ours).lines)


def test_what_is_no_rounding_is_not_called_so(monkeypatch):
    ours, theirs, _ = port(SIZES[1])
    batch = standard_inputs(ours.config)
    tanh_gelu(theirs, monkeypatch)
    for given in (trace(theirs, **batch), sparse(trace(theirs, **batch))):
        assert "as if" not in "\n".join(diff(trace(ours, **batch), given, ours).summary)
