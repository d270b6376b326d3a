"""The rooms of the house: imports go downward, the core does without transformers, and importing minibert is cheap."""

import ast
import io
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minibert

PACKAGE = Path(minibert.__file__).parent
# What is asked of BERT, or done with it. None of BERT itself imports one of these rooms.
AROUND = {"bench", "cli", "parity", "study", "trace", "training"}


FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imported_files(name):
    """Those of this package, wherever in the file the import stands. `from minibert.study import text` is the file
    study/text.py, and `from minibert.study import study` is study/__init__.py.
    """
    names = [name.removeprefix("minibert.") for name in imported(name)]
    parts = {name for name in names if name in FILES or f"{name}.__init__" in FILES}
    of_a_part = {name.rpartition(".")[0] for name in parts}
    taken = {name for name in parts if name in FILES or name not in of_a_part}
    return {name if name in FILES else f"{name}.__init__" for name in taken}


IMPORTS = {name: imported_files(name) for name in FILES}


def test_imports_go_downward():
    """There is an order of the files, and one of the rooms, in which each imports only what stands before it."""
    rooms = {}
    for name, others in IMPORTS.items():
        own = name.split(".")[0]
        rooms.setdefault(own, set()).update({other.split(".")[0] for other in others} - {own})
    for graph in (IMPORTS, rooms):
        list(TopologicalSorter(graph).static_order())  # a CycleError names those that import each other


def test_bert_itself_imports_neither_what_is_done_with_it_nor_transformers():
    for name, others in IMPORTS.items():
        own = name.split(".")[0]
        if own not in AROUND | {"__main__", "__init__"}:  # __init__ gives names, when they are first used
            assert not {other.split(".")[0] for other in others} & AROUND, name
        if own not in ("parity", "bench"):
            assert "transformers" not in {module.split(".")[0] for module in imported(name)}, name


def code_lines(name):
    """How many lines have code: neither blank, nor comment, nor docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(FILES[name].read_text(encoding="utf-8")).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_bert_is_short():
    counts = {name: code_lines(name) for name in ("model", "attention", "packing", "config")}
    assert sum(counts.values()) <= 400, counts
    assert counts["model"] <= 150, counts


def test_no_file_over_500_lines_and_no_function_over_60():
    for name, path in FILES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, name
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"


def test_a_module_is_not_hidden_behind_a_name():
    """`import minibert.parity.diff as d` gives the module, also where the package has a function of that name."""
    for name in FILES:
        if name not in ("__init__", "__main__") and not name.endswith(".__init__"):
            package, _, last = f"minibert.{name}".rpartition(".")
            code = f"import {package}.{last} as m, types; assert isinstance(m, types.ModuleType), '{name}'"
            exec(code, {})


TORCH = {"torch"}
HEAVY = {"transformers", "huggingface_hub", "requests", "httpx", "tqdm", "onnxruntime", "sympy"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        pytest.param("import torch; before = set(sys.modules); from minibert import *", HEAVY, id="minibert"),
        pytest.param("from minibert.cli import build_parser; build_parser()", TORCH, id="--help"),
        pytest.param("import minibert.training.processes", TORCH, id="the processes that tokenize"),
        *((f"import minibert.{name}", TORCH) for name in ("config", "checkpoint.hub", "tokenizer")),
    ],
)
def test_what_is_not_imported(code, absent):
    code = f"import sys; before = set(); {code}; print(*{{name.split('.')[0] for name in set(sys.modules) - before}})"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "minibert" in names
    assert not set(names) & absent


def test_no_pickle_is_opened_anywhere():
    for name, tree in TREES.items():
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "torch.load" not in called, name
        assert "pickle" not in {module.split(".")[0] for module in imported(name)}, name


def test_the_top_level_is_as_the_readme_says():
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nobody knows which files are the project's")
    top = {name.split("/")[0] for name in listed.stdout.splitlines() if not name.startswith(".")}
    assert top == {"minibert", "weights", "tests", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}


def test_the_readme_names_every_entry_of_the_package():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    tree = readme.split("```\nminibert/\n")[1].split("```")[0]
    named = [word for line in tree.splitlines() for word in line.split("   ")[0].split()]
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    left_out = {"__init__.py", "__main__.py", "__pycache__/"}
    assert sorted(named) == sorted(there - left_out)


def test_public_surface():
    assert set(minibert.__all__) == {
        *("BertConfig", "BertForMaskedLM", "PackedBatch", "load_tokenizer", "mask_tokens", "masked_lm_loss"),
        *("parameter_groups", "FillMask", "prepare_for_inference", "pseudo_log_likelihood"),
    }
    assert set(minibert.__all__) <= set(dir(minibert)), "an editor completes them"
    for name in minibert.__all__:
        assert getattr(minibert, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'BertModel'"):
        _ = minibert.BertModel
