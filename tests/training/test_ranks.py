"""Several processes under torchrun: the same run as one process, and an end if one of them dies."""

import os
import shutil
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics

from minibert.training import data, saving
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


@pytest.mark.slow
def test_two_processes_are_the_same_run_as_one_also_if_one_of_them_dies(tiny, tmp_path):
    """After step 7 of two processes the run is over; two of them end it, and so does one."""
    alone, out, again = tmp_path / "alone", tmp_path / "out", tmp_path / "again"
    assert tiny.train(alone, *OPTIONS) == 0
    assert {1, 2} <= {len(numbers) for numbers in islice(tiny.corpus(tokens_per_step=24).steps(0), 12)}
    script = tmp_path / "rank_1_dies.py"
    script.write_text(RANK_1_DIES)
    assert torchrun(str(script), *tiny.arguments(out, *OPTIONS)).returncode != 0
    assert [path.name for path in saving.checkpoints(out)] == ["checkpoint-6"]
    assert len(metrics(out)) == 7
    shutil.copytree(out, again)
    ended = torchrun("-m", "minibert", *tiny.arguments(out, *OPTIONS, "--micro-tokens", "24", "--resume"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("held out") == 1, "one of them speaks"
    require_same_run(out, alone)
    assert tiny.train(again, *OPTIONS, "--resume") == 0
    require_same_run(again, alone)


def test_each_of_several_processes_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(data, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for device, message in (("cuda:1", "cuda:1 names one GPU, and there are 3 processes"),
                            ("cuda", "process 2 of this machine has no GPU: there are 2")):  # fmt: skip
        with pytest.raises(ValueError, match=message), join(device):
            pass
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(data, "dist", SimpleNamespace(
        init_process_group=asked.append, get_rank=lambda: 1, get_world_size=lambda: 3,
        destroy_process_group=lambda: asked.append("ended")))  # fmt: skip
    with join("cuda") as ranks:
        assert (ranks.rank, ranks.size, ranks.device, ranks.first) == (1, 3, "cuda:1", False)
    assert asked == [torch.device("cuda", 1), "nccl", "ended"]


def test_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as ranks:
        assert ranks == ALONE
        assert ranks.first
        assert ranks.sum(1, 2.5) == [1, 2.5]
        ranks.wait()
