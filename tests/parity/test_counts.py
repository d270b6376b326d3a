"""How well the instrument does, counted: the table in minibert/parity/README.md is made here. To write it anew:

PYTHONPATH=.:tests:tests/parity python tests/parity/test_counts.py
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from independent import RIGHT, eight_bits
from planted import KNOWN, SIZES, given_by, place_of, port
from strange import STRANGE
from test_false_alarms import random_pair

from minibert.parity import diagnose, diff, trace
from minibert.parity.fewer_bits import quantised
from minibert.trace import standard_inputs

README = Path(__file__).parents[2] / "minibert" / "parity" / "README.md"
COLUMNS = ("float32", "bfloat16", "8 bits")
RIGHT_PORTS = 60
ROWS = {
    "known faults seen": "known",
    "… of these, the first wrong tensor is the right one": "seen",
    "… of these, named rightly": "seen",
    "other faults seen": "other",
    "faults that were given a wrong name": "all",
    "right ports called wrong": "right",
}


def verdict(given, ours, column):
    """(whether it is right, the first wrong tensor, the names of faults that were given)"""
    if column == "8 bits":
        report = quantised(given, ours)
        names = [line.split(": with this fault")[0] for line in report.summary if ": with this fault" in line]
        return report.ok, report.first_wrong, [[name] for name in names]
    diagnosis = diagnose(given, ours)
    return diagnosis.ok, diagnosis.first_wrong, diagnosis.found


def counted(column):
    counts, wrong = Counter(), []
    for title in KNOWN:
        ok, place, names = verdict(*reversed(given_by(title, column)), column)
        counts["known"] += 1
        counts["known faults seen"] += not ok
        counts["… of these, the first wrong tensor is the right one"] += place == place_of(title)
        counts["… of these, named rightly"] += names == [[title]]
        wrong += [f"{title}, {column}: {names}"] if names and names != [[title]] else []
    for title, plant in STRANGE.items():
        ours, theirs, _ = port(SIZES[1])
        if column == "bfloat16":
            ours, theirs = ours.bfloat16(), theirs.bfloat16()
        if column == "8 bits":
            theirs = eight_bits(theirs)
        with pytest.MonkeyPatch.context() as patch:
            plant(theirs, patch)
            given = trace(theirs, **standard_inputs(ours.config))
        ok, _, names = verdict(given, ours, column)
        counts["other"] += 1
        counts["other faults seen"] += not ok
        wrong += [f"{title}, {column}: {names}"] if names else []
    counts["all"], counts["faults that were given a wrong name"] = counts["known"] + counts["other"], len(wrong)
    for seed in range(RIGHT_PORTS):
        ours, theirs, batch = random_pair(seed)
        dtype = torch.bfloat16 if column == "bfloat16" else torch.float32
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        if column == "8 bits":
            kind = list(RIGHT)[seed % len(RIGHT)]
            ok = quantised(trace(eight_bits(theirs, **RIGHT[kind]), **batch), ours).ok
        else:
            ok = diff(trace(ours, **batch), trace(theirs, **batch), ours).ok
        counts["right"] += 1
        counts["right ports called wrong"] += not ok
        wrong += [] if ok else [f"the right port of seed {seed}, {column}"]
    counts["seen"] = counts["known faults seen"]
    return counts, wrong


def table():
    columns, wrong = zip(*map(counted, COLUMNS), strict=True)
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
    for row, of in ROWS.items():
        lines.append(f"| {row} | {' | '.join(f'{counts[row]} of {counts[of]}' for counts in columns)} |")
    return "\n".join(lines), [each for column in wrong for each in column]


@pytest.mark.slow
def test_the_table_of_the_readme():
    made, wrong = table()
    assert not wrong
    assert made in README.read_text(encoding="utf-8"), f"{made}\n\nwrite it anew: {__doc__}"


if __name__ == "__main__":
    made, wrong = table()
    before, _, after = README.read_text(encoding="utf-8").partition(f"| | {' | '.join(COLUMNS)} |\n")
    rest = after.split("\n\n", 1)[1] if after else ""
    README.write_text(f"{before}{made}\n\n{rest}", encoding="utf-8")
    print(made, *wrong, sep="\n")
