"""What all tests share: no network, the options that turn a skip into a failure, and the pair of models to compare."""

import os
import shutil
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub and transformers are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, do not skip, the tests that need an NVIDIA GPU")
    parser.addoption(
        "--require-real-weights", action="store_true", help="fail, do not skip, the tests on the real bert-base-uncased"
    )

    parser.addoption("--require-browser", action="store_true", help="fail, do not skip, the tests that need Chromium")


def pytest_terminal_summary(terminalreporter):
    """The parity table of the README: the largest difference that each kind of check has seen in this run."""
    import twins

    if twins.MEASURED:
        terminalreporter.section("parity with transformers, as measured")
        for what, (difference, tolerance) in twins.MEASURED.items():
            terminalreporter.write_line(f"{what:<50} {difference:.1e}   (tolerance {tolerance:.0e})")


@pytest.fixture(autouse=True)
def _skip_or_fail(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        (pytest.fail if request.config.getoption("--require-gpu") else pytest.skip)("no NVIDIA GPU on this machine")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture: the browser is one of them."""
    if item.get_closest_marker("browser") and (missing := missing_for_a_browser()):
        (pytest.fail if item.config.getoption("--require-browser") else pytest.skip)(missing)


def missing_for_a_browser():
    """What the tests of the page miss here: selenium, Chromium or its driver. None if all are there."""
    if find_spec("selenium") is None:
        return "selenium is not installed"
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"there is no {programs[0]} on this machine" if programs else None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A text, a tiny model to start from, and where the text's token files are."""
    from tiny import Tiny

    return Tiny(tmp_path_factory.mktemp("tiny"))
