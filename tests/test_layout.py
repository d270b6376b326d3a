"""The rooms of the house: imports go downward, the core does without transformers, and importing minibert is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minibert

PACKAGE = Path(minibert.__file__).parent
# Each room may import those above it in this list. Rooms with the same number do not import each other.
ORDER = {
    "atomic": 0,
    "files": -3,
    "names": -3,
    "config_keys": -3,
    "hub": -2,
    "config": -1,
    "loss": 0,
    "memory": 0,
    "checks": 1,
    "checkpoint": 1,
    "masking": 1,
    "packing": 2,
    "tokenizer": 2,
    "attention": 3,
    "kernels": 4,
    "model": 5,
    "masked_lm": 6,
    "fill_mask": 7,
    "inference": 7,
    "__init__": 8,
    "training.__init__": 9,
    "training.workers": 10,
    "training.ranks": 10,
    "training.saving": 10,
    "training.start": 10,
    "training.tokens": 11,
    "training.data": 12,
    "training.loop": 13,
    "parity.trace": 10,
    "parity.record": 11,
    "parity.steps": 11,
    "parity.yardstick": 12,
    "parity.faults": 12,
    "parity.diff": 13,
    "parity.diagnose": 14,
    "parity.check": 14,
    "parity.__init__": 15,
    "parity.golden": 16,
    "parity.commands": 17,
    "study.reading": 7,
    "study.sums": 7,
    "study.guesses": 7,
    "study.words": 7,
    "study.maps": 7,
    "study.changes": 7,
    "study.cost": 7,
    "study.heads": 8,
    "study.facts": 9,
    "study.says": 10,
    "study.text": 11,
    "study.page": 11,
    "study.row": 11,
    "study.views": 12,
    "study.result": 13,
    "study.__init__": 14,
    "study.picture": 15,
    "cli": 18,
    "__main__": 19,
    "bench.__init__": 9,
    "bench.contenders": 14,
    "bench.run": 15,
}


def room(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {room(path): path for path in PACKAGE.rglob("*.py")}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            if node.module == "minibert":
                yield from (f"minibert.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_file_is_in_the_order():
    assert set(FILES) == set(ORDER)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_downward(name):
    for module in imported(FILES[name]):
        other = module.removeprefix("minibert.")
        if module.startswith("minibert.") and other in ORDER:
            assert ORDER[other] < ORDER[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_core_does_without_transformers(name):
    if name.split(".")[0] not in ("parity", "bench"):
        assert not [module for module in imported(FILES[name]) if module.split(".")[0] == "transformers"]


def test_importing_minibert_imports_nothing_heavy_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); from minibert import *; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    names = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not names & {"transformers", "huggingface_hub", "requests", "httpx", "tqdm", "onnxruntime", "sympy"}


def test_help_does_not_wait_for_torch():
    code = "import sys, minibert.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("room", ["config", "hub", "names", "tokenizer"])
def test_names_and_tokenizers_do_without_torch(room):
    code = f"import sys, minibert.{room}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_processes_that_tokenize_do_without_torch():
    code = "import sys, minibert.training.workers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'BertModel'"):
        _ = minibert.BertModel


def test_no_pickle_is_opened_anywhere():
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text
        assert "import pickle" not in text


def test_the_top_level_is_as_the_readme_says():
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nobody knows which files are the project's")
    top = {name.split("/")[0] for name in listed.stdout.splitlines() if not name.startswith(".")}
    assert top == {
        *("minibert", "weights", "tests", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"),
    }


def test_public_surface():
    assert set(minibert.__all__) == {
        *(
            "BertConfig",
            "BertForMaskedLM",
            "PackedBatch",
            "load_tokenizer",
            "mask_tokens",
            "masked_lm_loss",
            "FillMask",
        ),
        "prepare_for_inference",
    }
    assert set(minibert.__all__) <= set(dir(minibert)), "an editor completes them"
    for name in minibert.__all__:
        assert getattr(minibert, name).__doc__
