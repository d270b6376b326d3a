"""What an acquittal in half precision cannot promise: the faults that are smaller than its rounding."""

from collections.abc import Iterator

import torch

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.confined import first_section
from minibert.parity.faults import CATALOGUE
from minibert.parity.steps import Steps
from minibert.parity.yardstick import Measure, Yardstick, converted
from minibert.trace.inputs import hide_padding
from minibert.trace.table import dtype_name, row_of

VISIBLE = 1e-6  # A fault that changes less than this, relative to the scale, is no fault for this model and batch.


def hidden_faults(yardstick: Yardstick, measured: dict[str, Measure]) -> Iterator[str]:
    """A sentence that names the known faults that these tensors would not show, if the dtype is float16 or bfloat16.

    measured: the measures, without a fault, of the tensors that are there.
    """
    dtype = yardstick.given.dtype
    if torch.finfo(dtype).eps < 1e-4:
        return
    model = converted(yardstick.exact, torch.float32)
    plain = Steps(model, yardstick.inputs, yardstick.given)
    for _ in plain.run():
        pass
    found = []
    for fault in CATALOGUE:
        start = first_section(fault, model.config.num_hidden_layers)
        read = plain.read[: start + 1] if start else None
        if _is_hidden(fault, model, yardstick, measured, read):
            found.append(fault.title)
    name = dtype_name(dtype)
    if found:
        yield f"{name} would hide these faults, in this model and on these inputs: {', '.join(found)}"
    yield "small faults that are not in this list may be hidden too: repeat it in float32 to be sure"


def _is_hidden(
    fault: type[Steps],
    model: BertForMaskedLM,
    yardstick: Yardstick,
    measured: dict[str, Measure],
    read: list[torch.Tensor | None] | None,
) -> bool:
    """Whether a fault changes something, and nothing by more than rounding may."""
    mask = yardstick.inputs.attention_mask.bool()
    right, faulty = (kind(model, yardstick.inputs, yardstick.given) for kind in (Steps, fault))
    changed = False
    expected = right.run(read)
    for name, y in faulty.run(read):
        x = next(x for other, x in expected if other == name)  # a fault may leave steps out
        if name not in measured:
            continue
        x, y = (hide_padding(row_of(name), each, mask) for each in (x, y))
        measure = measured[name]._replace(truth=x)
        error = measure.error(y)
        if not measure.accepts(error):
            return False
        changed = changed or error.largest > VISIBLE
    return changed
