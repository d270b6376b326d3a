"""How far right pairs are apart, for the constants in yardstick.py and comparison.py: in roundings and in eps. By hand:

PYTHONPATH=.:tests:tests/parity python tests/parity/calibrate.py
"""

from collections import defaultdict

import torch
from independent import RoundedOnce
from test_false_alarms import DTYPES, deep_pair, random_pair

from minibert.parity import trace
from minibert.parity.yardstick import Yardstick
from minibert.trace import standard_inputs
from minibert.trace.table import GRADIENT, dtype_name, hide_padding, row_of


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
    rounding()
