"""The course: course.md is run by tests/readme, and course.ipynb is made from it. Both are what a reader may type."""

import ast
import re
from pathlib import Path

from readme.fill import BLOCK, notebook

import minibert

COURSE = Path(minibert.__file__).parent / "course.md"
TEXT = COURSE.read_text(encoding="utf-8")


def test_the_notebook_is_the_course():
    """To mend it: python tests/readme/fill.py minibert/course.md"""
    kept = COURSE.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert kept == notebook(TEXT)


def test_every_exercise_shows_something_and_has_a_solution():
    lessons, exercises = TEXT.split("## Exercises")
    exercises, solutions = exercises.split("## Solutions")
    assert re.findall(r"^## (\d)\.", lessons, re.MULTILINE) == [str(number) for number in range(1, 10)]
    numbers = re.findall(r"^\*\*(\d)\. ", exercises, re.MULTILINE)
    assert numbers == re.findall(r"^\*\*(\d)\.\*\* ", solutions, re.MULTILINE) == ["1", "2", "3", "4", "5"]
    for part in (exercises, solutions):
        blocks = list(BLOCK.finditer(part))
        assert len(blocks) == len(numbers)
        assert all(block[2].strip() for block in blocks)


def test_no_step_changes_torch_for_those_after_it():
    """A reader may begin at any step. Step 3 once switched gradients off, and nothing could be trained after it."""
    tree = ast.parse("\n".join(block[1] for block in BLOCK.finditer(TEXT)))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {name for name in calls if re.fullmatch(r"torch\.(set_\w+|manual_seed)", name)}
