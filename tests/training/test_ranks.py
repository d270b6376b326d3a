"""Several processes under torchrun: the same run as one process, and an end if one of them dies."""

import os
import subprocess
import sys
from itertools import islice

import pytest
from safetensors.torch import load_file
from tiny import metrics

from minibert.training import saving
from minibert.training.data import ALONE, join

# `python -m minibert`, but one of the processes is killed at the beginning of its eighth optimizer step.
RANK_1_DIES = """
import os, signal, sys
import torch
from minibert.cli import main

real, steps = torch.optim.AdamW.step, 0

def step(*arguments, **options):
    global steps
    steps += 1
    if steps == 8 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

torch.optim.AdamW.step = step
sys.exit(main())
"""


def torchrun(*command):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def require_same_run(out, alone):
    """Both without dropout, which each rank draws for itself. Sums in another order differ by 1e-7 in float32; Adam
    divides by what may be small, and twelve steps go by. (Measured: 2e-7, 2e-7 and 1e-6.)
    """
    lines = [metrics(folder) for folder in (out, alone)]
    assert [line["step"] for line in lines[0]] == list(range(1, 13))
    for two, one in zip(*lines, strict=True):
        assert {key: two[key] for key in ("epoch", "tokens", "masked_tokens", "learning_rate")} == {
            key: one[key] for key in ("epoch", "tokens", "masked_tokens", "learning_rate")
        }
        assert two["loss"] == (one["loss"] and pytest.approx(one["loss"], rel=5e-6))  # None: nothing was masked
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)
        if "held_out" in one:
            assert two["held_out"]["all"] == pytest.approx(one["held_out"]["all"], rel=1e-5)
    weights = [load_file(folder / "model.safetensors") for folder in (out, alone)]
    for name, tensor in weights[1].items():
        assert (weights[0][name] - tensor).abs().max() < 1e-5, name  # twelve steps moved them by up to 0.03


# A step of 24 tokens is often a single row, and then one of two ranks has none.
OPTIONS = ("--no-dropout", "--tokens-per-step", "24")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    assert tiny.train(out, *OPTIONS) == 0
    corpus = tiny.corpus(tokens_per_step=24)
    assert {1, 2} <= {len(numbers) for numbers in islice(corpus.steps(0), 12)}
    return out


@pytest.mark.slow
def test_two_processes_are_the_same_run_as_one(tiny, alone, tmp_path):
    out = tmp_path / "out"
    ended = torchrun("-m", "minibert", *tiny.arguments(out, *OPTIONS, "--micro-tokens", "24"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("held out") == 1, "one of them speaks"
    require_same_run(out, alone)


@pytest.mark.slow
def test_a_process_that_dies_stops_the_run_which_another_number_of_them_ends(tiny, alone, tmp_path):
    out, script = tmp_path / "out", tmp_path / "rank_1_dies.py"
    script.write_text(RANK_1_DIES)
    assert torchrun(str(script), *tiny.arguments(out, *OPTIONS)).returncode != 0
    assert [path.name for path in saving.checkpoints(out)] == ["checkpoint-6"]
    assert len(metrics(out)) == 7
    assert tiny.train(out, *OPTIONS, "--resume") == 0
    require_same_run(out, alone)


def test_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as ranks:
        assert ranks == ALONE
        assert ranks.first
        assert ranks.sum(1, 2.5) == [1, 2.5]
        ranks.wait()
