"""The processes that work together on one run: which of them this is, and what they agree on.

torch.distributed does the work (gloo for tensors on the CPU, NCCL for those on GPUs). A process
that is alone needs no process group, and everything here then returns what it was given.
"""

import ctypes
import inspect
import os
import re
import signal
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")

# After which a process that is alive but silent counts as lost. Long, because the others wait while
# one prepares the data or trains a classifier; of one that dies gloo tells at once, and of NCCL's
# the launcher.
TIMEOUT = timedelta(minutes=60)
MEETING = timedelta(minutes=10)  # for all to start
START_AGAIN = "start the same command again on every machine"
LAUNCHED_BY = "TORCHELASTIC_RUN_ID"  # in the environment of processes that torchrun started
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


class NoMeeting(RuntimeError):
    """Processes that should work together have not come; waiting again would not bring them."""


class Processes:
    """One of world_size processes, rank 0 .. world_size - 1; by default the only one.

    Args:
        local_rank: its number on its own machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.wishes: tuple[Tensor, dist.Work] | None = None  # on their way between the processes

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def share(self, count: int) -> slice:
        """This process's part of range(count); their lengths differ by at most one.

        The first is never the smaller one, so that it has an item wherever there is one.
        """
        start, stop = (-(-count * rank // self.world_size) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def extreme(self, value: int, *, largest: bool) -> int:
        """The largest or smallest of all processes' values."""
        values = torch.tensor(value)
        if self.several:
            dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN)
        return int(values)

    def from_leader(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the process that leads, tensors on the CPU; the others wait."""
        values = [work() if self.leads else None]
        if self.several:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """In the process that leads, every process's value in order; elsewhere nothing."""
        if not self.several:
            return [value]
        values = [None] * self.world_size if self.leads else None
        dist.gather_object(value, values)
        return values or []

    def agree(self, *wishes: bool) -> list[bool]:
        """For each wish whether any process has it; every process hears the same at the same step.

        Between several processes the answer is that of the call before, so that nobody waits.
        """
        if not self.several:
            return list(wishes)
        sent = torch.tensor(wishes, dtype=torch.uint8)
        answers = self.answers() or [False] * len(wishes)
        self.wishes = sent, dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True)
        return answers

    def answers(self) -> list[bool]:
        """To the wishes on their way, which are then settled; none if there are none."""
        if self.wishes is None:
            return []
        (sent, work), self.wishes = self.wishes, None
        work.wait()
        return sent.bool().tolist()


def average_gradients(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over all processes in every backward pass.

    Once per model: what an earlier call has attached to its parameters stays there.
    """
    # Of dimensions of length one, of which 1x1 convolutions have two; it means nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # The buffers are constants, the same everywhere; torch 2.14 has renamed the setting.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False})


def join(launcher: int | None = None) -> Processes:
    """The processes that the environment speaks of, as torchrun sets it; else this one alone.

    Args:
        launcher: number of the process that started this one, where it is known.

    Raises NoMeeting where they do not find each other, or the launcher has ended.
    """
    if LAUNCHED_BY in os.environ:
        # A launcher that is killed cannot end its processes: the system asks them to save and stop.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # Stopped while it starts others, torch's forgets those that it has started.
    if launcher not in (None, os.getppid()):
        raise NoMeeting("launch.py ended while this process was starting")
    world_size = number_in_environment("WORLD_SIZE", 1)
    if world_size == 1:
        return Processes()
    missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise NoMeeting(f"WORLD_SIZE is {world_size} in the environment, but {min(missing)} is not "
                        "set: unset it for one process, or start several with GPUS=")
    rank, local_rank = number_in_environment("RANK"), number_in_environment("LOCAL_RANK", 0)
    store = meet(common_store(rank, world_size), rank, world_size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, rank=rank, world_size=world_size, timeout=TIMEOUT, store=store
    )
    return Processes(rank, world_size, local_rank)


def number_in_environment(name: str, default: int | None = None) -> int:
    """NoMeeting where it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise NoMeeting(f"{name} is {text!r} in the environment, which is no number; unset it")
    return int(text)


def common_store(rank: int, world_size: int) -> dist.Store:
    """The launcher's store or, without a launcher, the first process's; NoMeeting without either.
    """
    host, port = os.environ["MASTER_ADDR"], number_in_environment("MASTER_PORT")
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps_it = rank == 0 and not launched
    try:
        return dist.TCPStore(
            host, port, world_size, is_master=keeps_it, timeout=MEETING, wait_for_workers=False
        )
    except dist.DistNetworkError:
        problem = "this process cannot listen" if keeps_it else "nobody answers"
        raise NoMeeting(f"{problem} at {host}:{port}; {START_AGAIN}") from None


def meet(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """The part of the common store for this start, once all processes have come to it.

    The store still holds what the processes before a restart wrote. Raises NoMeeting where some do
    not come, as when another machine has given up.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"restart_{restart}", store)
    store.set(f"process_{rank}", "here")
    try:
        store.wait([f"process_{other}" for other in range(world_size)], MEETING)
    except dist.DistStoreError:
        raise NoMeeting(
            f"not all {world_size} processes came within {MEETING.total_seconds():g} seconds; "
            + START_AGAIN
        ) from None
    store.set_timeout(TIMEOUT)
    return store


def loss_of_another(error: Exception) -> str:
    """What is said where an error means that another process is gone; else an empty string."""
    text = str(error).strip()
    if isinstance(error, dist.DistBackendError):  # NCCL's, which has many troubles of its own
        lost = "ncclRemoteError" in text
    else:
        lost = "gloo" in text or isinstance(error, dist.DistError)
    if not lost:
        return ""
    # Without the place in its source.
    return re.sub(r"^\[\S+\] ", "", text.partition("\n")[0]).partition(". ")[0]


def leave() -> None:
    """Close what join opened, once all processes are through: none may find another one gone."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(()))
        dist.destroy_process_group()
