"""The processes of a run, in torch's words its ranks: one alone, or several that torchrun started.

Each holds a whole copy of the model and computes a share of every batch (data parallelism); torch's
DistributedDataParallel adds up the gradients. Over nccl on GPUs, gloo on CPUs.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minibert.checks import find_device


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are. The first one writes the files."""

    rank: int = 0  # number of this process, from 0
    size: int = 1
    device: str = "cpu"  # of this process

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each of the numbers, added up over all ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        result: list[float] = totals.tolist()
        return result

    def wait(self) -> None:
        """Wait until all ranks have come to this point."""
        self.sum(0.0)


ALONE = Ranks()


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this run, for as long as the block lasts. device: as `checks.find_device` has it. Raises
    ValueError for a device that is not there.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    where = find_device(device)
    if size == 1:
        yield Ranks(device=str(where))
        return
    if where.type == "cuda":
        if where.index is not None:
            raise ValueError(f"--device {device} names one GPU, and there are {size} processes: say --device cuda")
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), str(where))
    dist.destroy_process_group()  # not after an error: the others may be waiting for us, and would do so for ever
    # gloo's threads still hold the last tensors, and need Python to let go of them. Without a pause they may ask for it
    # when Python is shutting down already, which ends the process with SIGABRT (one run in twelve did, torch 2.13).
    time.sleep(0.1)
