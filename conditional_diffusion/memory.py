"""Recognising that memory ran out, so that the work can go on in smaller parts."""

import logging

import torch

logger = logging.getLogger("conditional_diffusion")
# CUDA has an exception of its own; the CPU allocator raises a bare RuntimeError.
MEMORY_ERRORS = (torch.OutOfMemoryError, RuntimeError, MemoryError)
CPU_MESSAGE = "can't allocate memory"


class OutOfMemory(Exception):
    """Memory ran out even with the smallest part of the work; the message says what to change."""


def reraise_unless_out_of_memory(error: Exception) -> None:
    """Return if error means that memory ran out; raise it again if it is any other error."""
    expected = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not expected and CPU_MESSAGE not in str(error):
        raise error
