"""Recognising that memory ran out, so that work goes on in smaller parts; batches that fit."""

import ctypes
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

logger = logging.getLogger("conditional_diffusion")
# torch's allocator of the GPU has a RuntimeError of its own; what else allocates says it in words.
MEMORY_ERRORS = (RuntimeError, MemoryError)
MEMORY_WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
# What torch says where none of cuDNN's kernels works or a library cannot begin, for want of memory
# or for other reasons.
PERHAPS_MEMORY = ("unable to find an engine", "STATUS_NOT_INITIALIZED")
FULL = 0.05  # free share of the GPU, below which they are taken for memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MEMORY_SHARE = 0.8  # of what is free; the rest is for fragmentation and for other programs
TRIALS = (8, 4, 2, 1)  # pictures; with few the peak may lie where the network alone counts
LARGEST_BATCH = 256  # a GPU is long busy by then, and an interruption loses the batch
# On a CPU larger batches are not faster: pictures of 128 pixels cost the same from 8 at a time.
CPU_BATCH_PIXELS = 16 * 128**2
CPU_BYTES_PER_PIXEL = 4096  # twice what guided pictures took with the default model


class OutOfMemory(MemoryError):
    """Memory ran out even with the smallest part of the work; the message says what to change."""


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    if any(words in text for words in PERHAPS_MEMORY):
        return gpu_is_full()
    return any(words in text for words in MEMORY_WORDS)


def gpu_is_full() -> bool:
    free, total = torch.cuda.mem_get_info()
    return free < FULL * total


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next allocation, where the C library is glibc.

    By default glibc maps every large tensor anew, page by page: a tenth of a CPU's training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions refuse more than 32 MiB; without the first setting the second would do harm.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def in_parts(
    work: Callable[[slice], Result], count: int, size: int, what: str
) -> Iterator[Result]:
    """work(part), one after the other, for slices of at most `size` that cover range(count).

    Where memory runs out the parts become half as large, said in the log with `what` they are.
    Raises OutOfMemory if a single item is too much.
    """
    start, size = 0, min(size, count)
    while start < count:
        try:
            result = work(slice(start, start + size))
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
        else:
            yield result
            start += size
            continue
        # Out here nothing holds on to the memory of the attempt any more.
        torch.cuda.empty_cache()
        if size == 1:
            raise OutOfMemory(f"out of memory with {what} one at a time; use another device")
        size //= 2
        logger.warning("out of memory: %s go %d at a time from here", what, size)


def available_cpu_memory() -> int:
    """Bytes that a process can still take without swapping, as Linux estimates them."""
    meminfo = Path("/proc/meminfo").read_text()
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1])


def peak_memory(trial: Callable[[int], object], pictures: int, device: torch.device) -> int:
    """Bytes of tensors on the GPU at most while trial(pictures) runs."""
    torch.cuda.reset_peak_memory_stats(device)
    trial(pictures)
    return torch.cuda.max_memory_allocated(device)


def fitting_batch_size(
    trial: Callable[[int], object], pixels: int, device: torch.device, largest: int = LARGEST_BATCH
) -> int:
    """How many pictures of so many pixels to work on together on this device, from 1 to `largest`.

    On CUDA the measure is what trial(n), which works on n pictures, needs for one more.
    """
    if device.type != "cuda":
        affordable = MEMORY_SHARE * available_cpu_memory() / CPU_BYTES_PER_PIXEL
        return int(min(max(1, min(CPU_BATCH_PIXELS, affordable) / pixels), largest))
    trial(1)  # what libraries take once
    for count in TRIALS:
        try:
            peak, peak_of_twice = (peak_memory(trial, n, device) for n in (count, 2 * count))
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            continue
        torch.cuda.empty_cache()  # or the trial's own memory would not count as free
        free, _ = torch.cuda.mem_get_info(device)
        left = MEMORY_SHARE * free - (peak - torch.cuda.memory_allocated(device))
        one_more = max(1, (peak_of_twice - peak) / count)
        return int(min(max(1, count + left / one_more), largest))
    return 1
