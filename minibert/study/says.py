"""The sentence of each view: what to look for, with numbers that are true of this text."""

from minibert.study.facts import Facts


def percent(share: float) -> str:
    """0.4636 → "46 %", 0.0171 → "1.7 %", 0.00031 → "0.03 %"."""
    value = 100 * share
    digits = 0 if value >= 9.95 else 1 if value >= 0.095 else 2
    return f"{value:.{digits}f} %" if value >= 0.005 else "< 0.01 %"


def says(study: Facts) -> dict[str, list[str]]:
    return {}
