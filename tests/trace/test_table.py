"""The table of a trace: in the code, in the README, and in what both models record."""

from pathlib import Path

import pytest
import torch
from traced import traced

from minibert.trace.table import TABLE, as_markdown, expected_names, explain, row_of

README = Path(__file__).parents[2] / "minibert" / "parity" / "README.md"


def test_the_readme_has_the_table_of_the_code():
    assert as_markdown() in README.read_text(encoding="utf-8"), (
        "the table has changed: replace it with what `from minibert.trace.table import as_markdown` gives"
    )


def test_every_tensor_is_explained():
    a, _, ours = traced()
    assert {row_of(name) for name in expected_names(ours.config)} == {name for name, _, _ in TABLE}
    assert all(explain(name) for name in a.names)


@pytest.mark.parametrize("name", ["trace", "diff", "diagnose"])
def test_no_function_hides_a_module(name):
    import minibert.parity

    assert callable(getattr(minibert.parity, name))
    with pytest.raises(ModuleNotFoundError):
        __import__(f"minibert.parity.{name}")


def test_inputs_outside_a_model_are_refused_by_their_values():
    from minibert.trace.inputs import check_inputs

    _, _, ours = traced(grad=False)
    with pytest.raises(ValueError, match="an id in the padding is not an id below 131"):
        check_inputs(ours.config, torch.tensor([[1, 200]]), torch.tensor([[1, 0]]))
