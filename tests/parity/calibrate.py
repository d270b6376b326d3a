"""How well the instrument does, in numbers. Run by hand, for minibert/parity/README.md and for the constants in
yardstick.py, judge.py and search.py:

    export PYTHONPATH=.:tests:tests/parity
    python tests/parity/calibrate.py names       faults planted, known and strange: how many are seen and named
    python tests/parity/calibrate.py rounding    right pairs: times rounding, and eps apart
"""

import sys
from collections import Counter, defaultdict

import pytest
import torch
from independent import RoundedOnce
from planted import PLANTED, SIZES, port
from strange import STRANGE
from test_false_alarms import DTYPES, deep_pair, random_pair

from minibert.parity import Trace, diagnose, trace
from minibert.parity.yardstick import Yardstick
from minibert.trace import standard_inputs
from minibert.trace.inputs import hide_padding
from minibert.trace.table import GRADIENT, INPUTS, dtype_name, row_of


def planted_trace(title, plant, sizes, dtype, strange):
    ours, theirs, batch = port(sizes, "" if strange else title)
    if title == "fp16 softmax overflow":  # it is of one dtype only
        dtype = torch.float16
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    batch = standard_inputs(ours.config) if strange else batch
    with pytest.MonkeyPatch.context() as patch:
        plant(theirs, patch)
        return ours, trace(theirs, **batch, grad=title == "decoder untied")


def names():
    for strange in (False, True):
        faults = STRANGE if strange else {title: plant for title, (plant, _) in PLANTED.items()}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for alone in (False, True):
                counts = Counter()
                for sizes in SIZES:
                    for title, plant in faults.items():
                        ours, given = planted_trace(title, plant, sizes, dtype, strange)
                        if alone:
                            kept = {k: x for k, x in given.tensors.items() if k in INPUTS or k == "logits"}
                            given = Trace(kept, given.config, given.metadata)
                        found = diagnose(given, ours)
                        right = found.found == [[title]]
                        counts["planted"] += 1
                        counts["seen"] += not found.ok
                        counts["named rightly"] += right
                        counts["named wrongly"] += bool(found.found) and not right
                        if found.found and not right:
                            print("    ", title, "→", found.found)
                what = "strange faults" if strange else "catalogue"
                print(
                    f"{what}, {dtype_name(dtype)}, {'logits alone' if alone else 'whole trace'}: {dict(counts)}",
                    flush=True,
                )


def rounding():
    worst, apart = defaultdict(float), defaultdict(float)

    def measure(kind, ours, theirs, batch, grad):
        a = trace(ours, **batch, grad=grad)
        with RoundedOnce():
            b = trace(theirs, **batch, grad=grad)
        mask, loudest = batch["attention_mask"].bool(), 0.0
        eps = torch.finfo(a.dtype).eps
        for stick in Yardstick(ours, a, grad=grad).measures():
            row, name = row_of(stick.name), stick.name
            one, two = (hide_padding(row, side.tensors[name].double(), mask) for side in (a, b))
            scale = max(one.abs().max().item(), two.abs().max().item())
            if name.startswith(GRADIENT):
                scale = loudest = max(loudest, scale)
            part = "gradients" if name.startswith(GRADIENT) else "forward"
            key = (kind, dtype_name(a.dtype), part)
            apart[key] = max(apart[key], (one - two).abs().max().item() / (scale or 1) / eps)
            for side in (one, two):
                error = stick.error(side)
                worst[(*key, "largest")] = max(worst[(*key, "largest")], error.largest / stick.explained.largest)
                worst[(*key, "rms")] = max(worst[(*key, "rms")], error.rms / stick.explained.rms)

    for seed in range(450):
        ours, theirs, batch = random_pair(seed)
        measure("450 random models", ours, theirs, batch, seed % 2 == 0)
    for layers in (12, 24):
        for dtype in DTYPES:
            ours, theirs = deep_pair(layers, dtype)
            measure(f"{layers} layers", ours, theirs, standard_inputs(ours.config), False)
    for key, times in sorted(worst.items()):
        print(f"{', '.join(key)}: {times:.2f} times rounding")
    for key, times in sorted(apart.items()):
        print(f"{', '.join(key)}: {times:.1f} eps apart")


if __name__ == "__main__":
    {"names": names, "rounding": rounding}[sys.argv[1]]()
