"""The processes of one run, as torchrun started them, or this one alone: who writes, and how answers come together."""

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.deterministic
from torch import distributed

from chexnet_deploy.errors import SpecError, require_linux

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # glibc's malloc.h


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: 0 writes and speaks; the others only compute.
        count: of processes.
        device: where this one computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def my_shards(self, shards: int) -> range:
        """Return the numbers of the shards of a batch that this process computes.

        Raises:
            SpecError: they can't be dealt out evenly.
        """
        if shards % self.count:
            raise SpecError(f"{shards} shards can't be dealt to {self.count} processes. Give a multiple by --shards.")
        each = shards // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            distributed.barrier()


def join_processes() -> Processes:
    """Return this process's place: torchrun's, or alone on the first GPU, or on the CPU.

    Raises:
        UnsupportedSystemError: torchrun started it, and this is not Linux.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        # The same run gives the same bytes on a GPU too, where its libraries can (PyTorch's notes on reproducibility).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if "RANK" not in os.environ:  # torchrun's contract
        return Processes(device=torch.device("cuda", 0) if has_gpu else torch.device("cpu"))
    require_linux("training on several processes")
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if has_gpu else "gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size(), device)


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors free, and take it in huge pages.

    A step on a CPU frees gigabytes and takes them again, page by page. torch listens before its first tensor only, and
    glibc alone has mallopt; elsewhere nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def leave_processes(processes: Processes) -> None:
    """Say goodbye to the others."""
    if processes.count > 1:
        distributed.destroy_process_group()
