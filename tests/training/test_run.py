"""What a run asks of the system: workers, locks, memory that is kept; and several processes under torchrun."""

import ctypes
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from minibert.cli import main
from minibert.training import data, run, saving
from minibert.training.data import ALONE, join
from minibert.training.processes import keep_freed_memory
from minibert.training.tokens import token_files

# -------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize(("given", "workers"), [(0, None), (3, 3)])
def test_texts_are_tokenized_by_as_many_as_asked(given, workers, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "token_files", lambda *_, workers: exit(f"{workers} workers"))
    with pytest.raises(SystemExit, match=f"{workers} workers"):
        tiny.train(tmp_path / "out", "--workers", given)


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock_and_no_worker_behind(tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "minibert", *tiny.arguments(out, "--steps", "5000", "--workers", "2")]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not saving.checkpoints(out) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with open(f"/proc/{running.pid}/task/{running.pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    running.kill()
    running.wait()
    with saving.folder_of_run(out, resume=True):  # at once
        pass
    assert len(children) >= 2, "it was killed while it trained"
    killed = time.monotonic()
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < killed + 30:
        time.sleep(0.02)
    assert time.monotonic() - killed < 3, "torch's own workers look for their parent every 5 seconds"


def no_examples(*_):
    raise ValueError("no examples today")


@pytest.mark.parametrize(
    ("examples", "workers", "message"),
    [
        (no_examples, 0, "minibert train: no examples today"),
        (no_examples, 1, "minibert train: no examples today"),
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), 1, "a worker process ended before its work was done"),
    ],
)
def test_an_error_where_batches_are_made_is_one_line(examples, workers, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.Corpus, "examples", examples)
    assert tiny.train(tmp_path / "out", "--workers", workers) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_where_a_text_is_tokenized_says_so(workers, tiny, tmp_path):
    broken = Tokenizer(WordPiece({"a": 0}, unk_token="[UNK]"))  # the library finds out when it meets another word
    with pytest.raises(ValueError, match=r"^the tokenizer fails on the text: .*\[UNK\]"):
        token_files([str(tiny.text)], broken, tmp_path / "tokens", workers=workers)


WITHOUT_FCNTL = """
import importlib, pkgutil, sys

sys.modules["fcntl"] = sys.modules["resource"] = None  # an import of it fails
import minibert

for module in pkgutil.walk_packages(minibert.__path__, "minibert."):
    module.name.endswith("__main__") or importlib.import_module(module.name)
sys.exit(minibert.cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_where_there_is_no_fcntl_only_training_is_missing(tiny, tmp_path):
    command = [sys.executable, "-c", WITHOUT_FCNTL, *tiny.arguments(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch("minibert train: .*fcntl.*WSL\n", done.stderr)


# --------------------------------------------------------------------------------------------------------------- memory


KEPT = """
import resource, sys
from minibert.training.processes import keep_freed_memory
import torch
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(2):  # a block is found again only once those beside it are free too: the first few are new
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16_000_000)  # 64 MB, freed at once
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc")
def test_freed_memory_is_kept():
    def faults(how):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, env=environment)
        return float(done.stdout)

    assert faults("kept") < 0.1 * faults("as it was")  # for each tensor: on pages of 4 kB 15,625


@pytest.mark.parametrize(
    ("largest", "variables", "expected"),
    [
        (2**40, {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**25, {}, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),  # as before glibc 2.35
        (0, {}, [(-3, 2**30), (-3, 2**25)]),  # no second threshold without the first: it would be slower than neither
        (2**40, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}, []),  # the user's own wish stands
        (2**40, {"MALLOC_MMAP_THRESHOLD_": "33554432"}, []),
        (2**40, {"MALLOC_TRIM_THRESHOLD_": "67108864"}, []),
    ],
)
def test_glibc_is_asked_for_what_it_can_and_only_if_nobody_else_has_asked(largest, variables, expected, monkeypatch):
    asked = []

    def mallopt(what, value):
        asked.append((what, value))
        return int(value <= largest or what == -1)

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert asked == expected


@pytest.mark.parametrize("command", ["train", "bench"])
def test_the_commands_keep_freed_memory(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.training.processes.keep_freed_memory", lambda: exit(77))
    arguments = tiny.arguments(tmp_path / "out") if command == "train" else ["bench", "--peers", "none"]
    with pytest.raises(SystemExit, match="77"):
        main(arguments)


# ---------------------------------------------------------------------------------------------------- several processes


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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=300)


def require_same_run(out, alone):
    """Both without dropout, which each rank draws for itself. Sums in another order differ by 1e-7 in float32; Adam
    divides by what may be small, and twelve steps go by. (Measured: 2e-7, 2e-7 and 1e-6.)
    """
    lines = [metrics(folder) for folder in (out, alone)]
    assert [line["step"] for line in lines[0]] == list(range(1, 13))
    for two, one in zip(*lines, strict=True):
        for key in ("epoch", "tokens", "masked_tokens", "learning_rate"):
            assert two[key] == one[key], key
        assert two["loss"] == (one["loss"] and pytest.approx(one["loss"], rel=5e-6))  # None: nothing was masked
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)
        if "held_out" in one:
            assert two["held_out"]["all"] == pytest.approx(one["held_out"]["all"], rel=1e-5)
    weights = [load_file(folder / "model.safetensors") for folder in (out, alone)]
    for name, tensor in weights[1].items():
        assert (weights[0][name] - tensor).abs().max() < 1e-5, name  # twelve steps moved them by up to 0.03


@pytest.mark.slow
def test_two_processes_are_the_same_run_as_one_also_if_one_of_them_dies(tiny, tmp_path):
    """After step 7 of two processes the run is over; two of them end it, and so does one."""
    alone, out, again = tmp_path / "alone", tmp_path / "out", tmp_path / "again"
    options = ("--no-dropout", "--tokens-per-step", "24")  # often a single row, and then one of two ranks has none
    assert tiny.train(alone, *options) == 0
    assert {1, 2} <= {len(numbers) for numbers in islice(tiny.corpus(tokens_per_step=24).steps(0), 12)}
    script = tmp_path / "rank_1_dies.py"
    script.write_text(RANK_1_DIES)
    assert torchrun(str(script), *tiny.arguments(out, *options)).returncode != 0
    assert [path.name for path in saving.checkpoints(out)] == ["checkpoint-6"]
    assert len(metrics(out)) == 7
    shutil.copytree(out, again)
    ended = torchrun("-m", "minibert", *tiny.arguments(out, *options, "--micro-tokens", "24", "--resume"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("held out") == 1, "one of them speaks"
    require_same_run(out, alone)
    assert tiny.train(again, *options, "--resume") == 0
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
    monkeypatch.delenv("WORLD_SIZE")
    with join("cpu") as ranks:
        assert ranks == ALONE
        assert ranks.first
        assert ranks.sum(1, 2.5) == [1, 2.5]
