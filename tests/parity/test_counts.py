"""How well the instrument does, counted: faults seen, placed and named, and right ports left alone."""

import pytest
from independent import RIGHT, eight_bits
from planted import KNOWN, given_by, place_of, planted, port
from strange import STRANGE
from test_false_alarms import random_pair

from minibert.parity import diagnose, trace
from minibert.parity.fewer_bits import quantised
from minibert.trace import standard_inputs

# By column, how many known faults are missed, how many are seen and not named rightly, how many others are missed. They
# are smaller than rounding, or than what 8 bits may do.
MISSED = {"float32": (0, 0, 0), "bfloat16": (5, 0, 5), "8 bits": (6, 1, 4)}


def verdict(given, ours, column):
    """(whether it is right, the first wrong tensor, the names of faults that were given)"""
    if column == "8 bits":
        report = quantised(given, ours)
        names = [line.split(": with this fault")[0] for line in report.summary if ": with this fault" in line]
        return report.ok, report.first_wrong, [[name] for name in names]
    diagnosis = diagnose(given, ours)
    return diagnosis.ok, diagnosis.first_wrong, diagnosis.found


def in_column(column, *models):
    return [model.bfloat16() if column == "bfloat16" else model.float() for model in models]


@pytest.mark.slow
@pytest.mark.parametrize("column", MISSED)
def test_known_faults_are_seen_placed_and_named(column):
    missed, unnamed, wrong = [], [], []
    for title in KNOWN:
        ok, place, names = verdict(*reversed(given_by(title, column)), column)
        if ok:
            missed.append(title)
            continue
        wrong += [f"{title} at {place}"] if place != place_of(title) else []
        wrong += [f"{title} as {names}"] if names and names != [[title]] else []
        unnamed += [title] if not names else []
    assert not wrong
    assert (len(missed), len(unnamed)) == MISSED[column][:2], (missed, unnamed)


@pytest.mark.slow
@pytest.mark.parametrize("column", MISSED)
def test_other_faults_are_seen_and_get_no_name(column):
    missed = []
    for title, plant in STRANGE.items():
        ours, theirs, _ = port()
        ours, theirs = in_column(column, ours, theirs)
        theirs = eight_bits(theirs) if column == "8 bits" else theirs
        ok, _, names = verdict(planted(plant, theirs, standard_inputs(ours.config)), ours, column)
        assert not names, f"{title}: {names}"
        missed += [title] if ok else []
    assert len(missed) == MISSED[column][2], missed


@pytest.mark.slow
def test_right_quantised_ports_are_called_right():
    """test_false_alarms.py has those of other dtypes."""
    for seed in range(60):
        ours, theirs, batch = random_pair(seed)
        kind = RIGHT[list(RIGHT)[seed % len(RIGHT)]]
        report = quantised(trace(eight_bits(theirs.float(), **kind), **batch), ours.float())
        assert report.ok, f"seed {seed}\n" + "\n".join(report.lines())
