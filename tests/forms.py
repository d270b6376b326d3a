"""The forms that a prepared model can have on a CPU."""

import pytest
import torch
from needs import lacking

from minibert.inference import onednn
from minibert.inference.prepare import working_ways

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
    """(dtype, linear) for `prepare_for_inference`. Skips the test where this CPU or this torch has no such form. Where
    both have all it takes and it is not taken all the same, the test fails: a product must be wrong.
    """
    dtype, linear = FORMS[name]
    if dtype == torch.bfloat16 and not onednn.has_bfloat16():
        lacking("bfloat16", "this CPU has no instructions for it")
    if dtype == torch.int8 and not onednn.has_int8():
        lacking("int8", "this CPU has no instructions for products of 8-bit numbers")
    missing = [operator for operator in OPERATORS[dtype == torch.int8, linear] if not has_operator(operator)]
    if missing:
        reason = f"this torch has no {missing[0]}"
        lacking("int8", reason) if dtype == torch.int8 else pytest.skip(reason)
    assert linear in working_ways(dtype), "it gives something else than nn.Linear, or an operator takes other arguments"
    return dtype, linear


OPERATORS = {
    (False, "torch"): [],
    (False, "product"): ["mkldnn._linear_pointwise", "mkldnn._reorder_linear_weight"],
    (False, "convolution"): ["mkldnn._convolution_pointwise", "mkldnn._get_mkldnn_serialized_md"],
    (True, "product"): ["onednn.qlinear_pointwise", "onednn.qlinear_prepack"],
}


def has_operator(operator):
    library, name = operator.split(".")
    return torch.backends.mkldnn.is_available() and hasattr(getattr(torch.ops, library), name)
