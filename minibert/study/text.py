"""The views as text, for a terminal."""

from minibert.study.facts import Facts


def to_text(facts: Facts) -> str:
    return ""
