"""What all tests share: no network, the options that turn a skip into a failure, and the pair of models to compare."""

import os
import shutil
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub and transformers are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: one thread each, or they wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import needs
import pytest
import torch


def pytest_addoption(parser):
    for kind, what in needs.REQUIRED.items():
        parser.addoption(f"--require-{kind}", action="store_true", help=f"fail, do not skip, tests that need {what}")


def pytest_configure(config):
    needs.required.update(kind for kind in needs.REQUIRED if config.getoption(f"--require-{kind}"))


def pytest_sessionfinish(session):
    """With pytest -n, each process has measured a part of the parity table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured"] = needs.MEASURED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for what, measured in getattr(node, "workeroutput", {}).get("measured", {}).items():
        needs.measured(what, *measured)


def pytest_terminal_summary(terminalreporter):
    """The parity table of the README: the largest difference that each kind of check has seen in this run; and what was
    skipped and why.
    """
    if needs.MEASURED:
        terminalreporter.section("parity with transformers, as measured")
        for what, (difference, tolerance) in needs.MEASURED.items():
            terminalreporter.write_line(f"{what:<50} {difference:.1e}   (tolerance {tolerance:.0e})")
    terminalreporter.write_line(needs.what_was_skipped(terminalreporter.stats.get("skipped", [])))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture: the browser is one of them."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        needs.lacking("gpu", "no NVIDIA GPU on this machine")
    if item.get_closest_marker("browser") and (missing := missing_for_a_browser()):
        needs.lacking("browser", missing)


def missing_for_a_browser():
    """What the tests of the page miss here: selenium, Chromium or its driver. None if all are there."""
    if find_spec("selenium") is None:
        return "selenium is not installed"
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"there is no {missing[0]} on this machine" if missing else None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def exact_products():
    """int8 and bfloat16 are tested on any CPU: the products behind them are exact ones, of ordinary operations."""
    from exact import use_exact_products

    from minibert.inference.prepare import fastest_way, working_ways

    with pytest.MonkeyPatch.context() as patch:
        use_exact_products(patch)
        for asked in (fastest_way, working_ways):
            asked.cache_clear()
        yield
    for asked in (fastest_way, working_ways):
        asked.cache_clear()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A text, a tiny model to start from, and where the text's token files are."""
    from tiny import Tiny

    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model and its tokenizer (tests/small.py). Nobody may change it: copy it for that."""
    from small import LONGEST, VOCAB

    from minibert import BertConfig, BertForMaskedLM
    from minibert.tokenizer import from_vocabulary

    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = dict(hidden_size=20, num_hidden_layers=2, num_attention_heads=5, intermediate_size=37)
    # A wide range: predictions that differ clearly.
    config = BertConfig(vocab_size=len(VOCAB), max_position_embeddings=LONGEST, initializer_range=0.3, **sizes)
    BertForMaskedLM(config).save_pretrained(path)
    from_vocabulary(VOCAB).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def run(checkpoint, capsys):
    """The command with the tiny model: what it printed. It must succeed and say nothing on stderr."""

    from minibert.cli import main

    def call(command, *arguments):
        assert main([command, *arguments, "--model", str(checkpoint)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


@pytest.fixture
def fails(capsys):
    """The command must fail with status 2, nothing on stdout and one line on stderr: that line."""

    from minibert.cli import main

    def call(*arguments):
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("minibert")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        return err.strip()

    return call
