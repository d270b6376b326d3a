"""The peak memory of each contender, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from minibert.bench.contenders import build, lineup
from minibert.bench.machine import peak_resident, synchronize
from minibert.bench.report import Row, progress
from minibert.bench.settings import Settings
from minibert.bench.workloads import make_workload
from minibert.config import BertConfig
from minibert.memory import keep_freed_memory


def measure_memory(rows: list[Row], folder: Path, settings: Settings) -> None:
    """Peak memory of each contender, in a process of its own that loads it and runs the workloads once, the smaller
    ones first: what stands beside a workload is the peak up to it."""
    for task in settings.tasks:
        for name, precision in lineup(task, settings.peers, settings.precisions):
            mine = [
                row
                for row in rows
                if (row.task, row.key, row.precision) == (task, name, precision) and row.median is not None
            ]
            if not mine:
                continue
            shapes = ",".join(row.shape for row in mine)
            code = "import sys; from minibert.bench.peak_memory import print_peaks; print_peaks(*sys.argv[1:])"
            command = [sys.executable, "-c", code, str(folder), name, precision, task, settings.device, shapes]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
            peaks = json.loads(done.stdout.splitlines()[-1])
            for row in mine:
                row.peak_memory_bytes = peaks[row.shape]
            progress(f"memory of {name} {precision}: done")


def print_peaks(folder: str, name: str, precision: str, task: str, device: str, shapes: str) -> None:
    """Run in a process of its own: prints {shape: bytes}. On the CPU the peak resident memory of the whole process,
    Python and libraries included; on CUDA what torch allocated at most."""
    keep_freed_memory()  # as the command that started this one does
    config = BertConfig.from_dict(json.loads((Path(folder) / "config.json").read_text()))
    works = [make_workload(shape, config, device, everywhere=task == "inference") for shape in shapes.split(",")]
    contender = build(name, precision, task, Path(folder), device)
    peaks = {}
    for work in sorted(works, key=lambda work: work.input_ids.numel()):
        contender.run(work)
        synchronize(device)
        peaks[work.name] = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_resident()
    print(json.dumps(peaks))
