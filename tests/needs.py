"""What a test needs and a machine may lack. Such a test skips and says of which kind that is; with `--require-KIND` it
fails. The last line of a run counts the kinds. And what the tests have measured, for the table at the end.
"""

import re
from collections import defaultdict

import pytest

REQUIRED = {  # kind → what the tests need that --require-KIND makes fail
    "gpu": "an NVIDIA GPU",
    "browser": "Chromium",
    "real-weights": "the real bert-base-uncased",
    "int8": "products of 8-bit numbers in this CPU and this torch",
    "bfloat16": "instructions for bfloat16 in this CPU",
}
KINDS = (*REQUIRED, "peers", "hub")
required = set()  # filled by conftest.py
MEASURED = {}  # what was compared → the largest difference that passed, and the tolerance


def measured(what, difference, tolerance):
    MEASURED[what] = (max(difference, MEASURED.get(what, (0.0, 0.0))[0]), tolerance)


def lacking(kind, reason):
    """Skip this test, since something of that kind is not here; or fail it, if that kind was required."""
    assert kind in KINDS, f"{kind} is none of {', '.join(KINDS)}"
    (pytest.fail if kind in required else pytest.skip)(f"{kind}: {reason}")


def what_was_skipped(reports):
    """One line: how many tests skipped, by kind, and why."""
    kinds = defaultdict(list)
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = re.sub(r"^(Skipped: )?(could not import )?|: No module named .*", "", reason)
        kind, colon, rest = reason.partition(": ")
        if colon and kind in KINDS:
            kinds[kind].append(rest)
        else:
            kinds["packages" if reason.startswith("'") else "other"].append(reason)
    parts = (f"{len(why)} {kind} ({'; '.join(sorted(set(why)))})" for kind, why in sorted(kinds.items()))
    return "skipped: " + (", ".join(parts) or "none")
