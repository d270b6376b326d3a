"""The rooms of the house: imports go downward, the core does without transformers, and importing minibert is cheap."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import minibert

PACKAGE = Path(minibert.__file__).parent
# Each room may import those in the lines above its own. Rooms in one line do not import each other.
LEVELS = """
    atomic files names config_keys devices memory tracing output shapes
    hub loss state_dicts
    config
    checks checkpoint writing tokenizer_files
    masking packing tokenizer
    attention
    kernels
    model
    recomputing
    masked_lm
    batching
    fill_mask mlm score inference.fixed inference.onednn inference.cuda_graphs
    inference.int8
    inference.ways
    inference.prepare
    inference.__init__
    __init__
    export trace.table
    trace.inputs
    trace.stores
    trace.forms
    trace.files
    trace.given trace.recorder
    trace.__init__
    parity.steps
    parity.yardstick parity.faults.embeddings parity.faults.norms parity.faults.attention parity.faults.head
    parity.faults.__init__ parity.confined parity.report parity.appearance
    parity.hidden parity.search
    parity.judge parity.quantised parity.tokenizers
    parity.comparison parity.diagnosis parity.check
    parity.__init__
    parity.golden
    training.workers training.locks training.settings training.ranks training.start
    training.saving training.tokens
    training.data
    training.batches training.evaluation
    training.step
    training.loop
    training.run
    training.__init__
    study.reading study.vocabulary study.sums study.maps study.changes study.cost
    study.guesses study.words study.heads study.row
    study.facts
    study.says
    study.text study.page study.views
    study.result
    study.__init__
    study.picture
    bench.__init__
    bench.workloads bench.machine
    bench.peers
    bench.ct2
    bench.contenders
    bench.settings
    bench.report
    bench.peak_memory
    bench.run bench.scoring bench.quality
    commands.__init__ commands.options commands.printing
    commands.*
    cli
    __main__
"""


def room(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {room(path): path for path in PACKAGE.rglob("*.py")}
LISTED = {name: level for level, line in enumerate(LEVELS.strip().splitlines()) for name in line.split()}
EACH_COMMAND = LISTED.pop("commands.*")
ORDER = {name: EACH_COMMAND for name in FILES if name.startswith("commands.")} | LISTED


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
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


def code_lines(path):
    """The numbers of the lines with code: neither blank, nor comment, nor docstring."""
    text = path.read_text(encoding="utf-8")
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines |= set(range(token.start[0], token.end[0] + 1)) if token.string.strip() else set()
    for node in ast.walk(ast.parse(text)):
        first = node.body[0] if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines -= set(range(first.lineno, first.end_lineno + 1))
    return lines


def test_bert_is_short():
    counts = {name: len(code_lines(PACKAGE / f"{name}.py")) for name in ("model", "attention", "packing", "config")}
    assert sum(counts.values()) <= 400, counts
    assert counts["model"] <= 150, counts


def test_no_file_over_400_lines_and_no_function_over_60():
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_a_module_is_not_hidden_behind_a_name():
    """`import minibert.parity.diff as d` gives the module, also where the package has a function of that name."""
    for name in FILES:
        if name not in ("__init__", "__main__") and not name.endswith(".__init__"):
            package, _, last = f"minibert.{name}".rpartition(".")
            if package == "minibert.commands":
                continue  # imported by name, one at a time
            code = f"import {package}.{last} as m, types; assert isinstance(m, types.ModuleType), '{name}'"
            exec(code, {})


def test_importing_minibert_imports_nothing_heavy_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); from minibert import *; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    names = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not names & {"transformers", "huggingface_hub", "requests", "httpx", "tqdm", "onnxruntime", "sympy"}


def test_help_does_not_wait_for_torch():
    code = "import sys; from minibert.cli import build_parser; build_parser(); print('torch' in sys.modules)"
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
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "torch.load" not in called, path
        assert "pickle" not in {module.split(".")[0] for module in imported(path)}, path


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
        "pseudo_log_likelihood",
    }
    assert set(minibert.__all__) <= set(dir(minibert)), "an editor completes them"
    for name in minibert.__all__:
        assert getattr(minibert, name).__doc__
