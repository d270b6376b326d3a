"""The products behind int8 and bfloat16, made of ordinary operations and exact, in place of torch's operators: so that
what is around them (the steps, the table, the head, the calls) runs on any CPU. test_onednn.py compares the two.
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    ("none", ""): lambda y: y,
    ("gelu", "none"): F.gelu,
    ("gelu", "tanh"): lambda y: F.gelu(y, approximate="tanh"),
    ("relu", ""): F.relu,
    ("swish", ""): F.silu,
}


def linear(x, weight, bias, name, scalars, algorithm):
    """mkldnn._linear_pointwise"""
    y = ACTIVATIONS[name, algorithm](F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    return y.to(x.dtype)


def linear_int8(x, x_step, x_zero, weight, steps, zeros, bias, step, zero, dtype, name, scalars, algorithm):
    """onednn.qlinear_pointwise, as far as it is called: whole numbers are added up exactly below 2^53."""
    assert (x.dtype, x_zero) in ((torch.int8, 0), (torch.uint8, 128))
    assert (weight.dtype, step, zero, name) == (torch.int8, 1.0, 0, "none")
    y = (x.double() - x_zero) @ (weight.double() - zeros[:, None]).T * x_step * steps
    return (y if bias is None else y + bias).to(dtype)


def use_exact_products(patch):
    """From now on a CPU seems to have the instructions, and torch the operators."""
    patch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    patch.setattr(torch.ops.onednn, "qlinear_prepack", lambda weight, shape: weight.clone(), raising=False)
    patch.setattr(torch.ops.onednn, "qlinear_pointwise", linear_int8, raising=False)
    for name, exact in (("_linear_pointwise", linear), ("_reorder_linear_weight", lambda weight: weight.clone())):
        real = getattr(torch.ops.mkldnn, name, None)
        patch.setattr(
            torch.ops.mkldnn,
            name,
            lambda x, *more, exact=exact, real=real: (exact if x.dtype == torch.bfloat16 else real)(x, *more),
            raising=False,
        )
