"""The forms that a prepared model can have on a CPU."""

import pytest
import torch
from needs import lacking

from minibert.inference.onednn import has_bfloat16
from minibert.inference.ways import working_ways

FORMS = {
    "product": (torch.float32, "product"),
    "convolution": (torch.float32, "convolution"),
    "torch": (torch.float32, "torch"),
    "bfloat16 product": (torch.bfloat16, "product"),
    "bfloat16 torch": (torch.bfloat16, "torch"),
    "float64": (torch.float64, "torch"),
    "int8": (torch.int8, "product"),
}
# bfloat16 rounds to 2^-8: some roundings of that, on logits of order 3. int8 rounds to 1/254 of the largest number.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.15, torch.int8: 0.25}


def floating(dtype):
    """The type of a model that is prepared in this one."""
    return torch.float32 if dtype == torch.int8 else dtype


def form_or_skip(name):
    """(dtype, linear) for `prepare_for_inference`. Skips the test where this CPU or this torch has no such form."""
    dtype, linear = FORMS[name]
    if dtype == torch.bfloat16 and not has_bfloat16():
        lacking("bfloat16", "this CPU has no instructions for it")
    if linear not in working_ways(dtype):
        kind = {torch.int8: "int8", torch.bfloat16: "bfloat16"}.get(dtype)
        reason = f"no {linear} in this torch or on this CPU"
        lacking(kind, reason) if kind else pytest.skip(reason)
    return dtype, linear
