"""How several commands print what they found. Without torch."""

import json
from typing import Any


def as_json(value: Any) -> str:
    """JSON, indented. JSON has no NaN and no infinity: they become the words "nan" and "inf"."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value

    return json.dumps(finite(value), indent=2, allow_nan=False)


def percent(probability: float) -> str:
    """ "12.34%"; what would round to 0 keeps one digit: "3e-05%"."""
    return f"{probability:.2%}" if probability >= 5e-5 else f"{100 * probability:.0e}%"
