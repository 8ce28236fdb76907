"""Work that a GPU repeats, recorded once as a CUDA graph, which the host launches as a whole.

A fast GPU computes the kernels of these small networks in less time than it takes to launch them
one by one.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

# How far a recording may be from the plain work: of the norm of what that does, or of what it does
# differently the next time, where kernels add up in another order each time.
TOLERANCE, NOISE = 0.1, 3.0

Tensors = Sequence[Tensor]


class RecordingError(RuntimeError):
    """Work cannot be recorded, or its recording does something else; the message says why."""


@lru_cache
def recording_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings, because libraries keep memory for every stream that they work on."""
    return torch.cuda.Stream(device)


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """An error where the host waits for the GPU."""
    warnings.filterwarnings("ignore", "Synchronization debug mode")  # that it may miss some
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class Recording:
    """work(*inputs) as a CUDA graph of the current GPU; a call launches it on inputs like these.

    Whatever else the work reads or changes has to stay where it is. The answers lie in one place,
    where the next call writes over them. Random numbers are those that the plain work would draw
    from the default generator as it is before the call, which a call does not move on.
    """

    def __init__(self, work: Callable[..., Tensors], inputs: Tensors):
        self.inputs = [value.clone() for value in inputs]
        device = torch.cuda.current_device()
        self.default_random = torch.cuda.default_generators[device]
        # The random state of its own that the graph is bound to, because a recording that fails
        # leaves in torch 2.11 a state that is of no use to anybody.
        self.random = self.default_random.clone_state()
        default_state = self.default_random.graphsafe_get_state()
        self.default_random.graphsafe_set_state(self.random)
        stream = recording_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                # What libraries do once cannot be recorded. And torch 2.11 does not recover from
                # a recording in which something waits, so that is found out before.
                with waiting_forbidden():
                    work(*self.inputs)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=stream):
                    self.answers = work(*self.inputs)
        finally:
            self.default_random.graphsafe_set_state(default_state)
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> Tensors:
        for own, value in zip(self.inputs, inputs, strict=True):
            if own.shape != value.shape:  # or a single image would be taken for all
                raise ValueError(f"recorded for {tuple(own.shape)}, not {tuple(value.shape)}")
            own.copy_(value)
        self.random.set_state(self.default_random.get_state())
        self.graph.replay()
        return self.answers


def are_same(found: Tensor, expected: Tensor, allowed: Tensor | float = 0.0) -> bool:
    """Whether two vectors are nearly the same, or their difference has at most the allowed norm.

    What is not finite has to be at the same places.
    """
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    found, expected = (vector.nan_to_num(0.0, 0.0, 0.0) for vector in (found, expected))
    allowed = (TOLERANCE * expected.norm()).clamp(min=allowed)
    return bool((found - expected).norm() <= allowed)


class Trial:
    """Tries work on some inputs and puts back what that changes.

    Args:
        prepare: called before; sets what the work reads beside its inputs.
        state: the tensors that `prepare` and the work change in place, by kind; those that the work
            makes at its first call begin at zero.
    """

    def __init__(self, inputs: Tensors, prepare: Callable[[], None],
                 state: Callable[[], dict[str, Tensors]]):
        self.inputs, self.prepare, self.state = inputs, prepare, state
        self.originals = self._copies()

    def _copies(self) -> dict[int, Tensor]:
        return {id(tensor): tensor.detach().clone()
                for kind in self.state().values() for tensor in kind}

    def of(self, work: Callable[..., Tensors]) -> list[Tensor]:
        """The answers, and the changes of each kind, as vectors."""
        self.prepare()
        before = self._copies()
        kinds = [work(*self.inputs), *self.state().values()]
        vectors = [
            torch.cat([(tensor.detach() - before.get(id(tensor), 0)).flatten().float()
                       for tensor in kind]) for kind in kinds if kind
        ]
        self.put_back()
        return vectors

    @torch.no_grad()
    def put_back(self) -> None:
        for kind in self.state().values():
            for tensor in kind:
                if id(tensor) in self.originals:
                    tensor.copy_(self.originals[id(tensor)])
                else:
                    tensor.zero_()


def record(
    work: Callable[..., Tensors],
    inputs: Tensors,
    trial_inputs: Tensors,
    *,
    prepare: Callable[[], None] = lambda: None,
    state: Callable[[], dict[str, Tensors]] = dict,
    memory_share: float = 1.0,
) -> Recording:
    """A recording of the work, made on `inputs`, that does in a Trial what the work itself does.

    Raises RecordingError if there is none. Nothing is changed either way.

    Args:
        trial_inputs: of the same shapes, but others, so that nothing of the first goes unnoticed.
        memory_share: of the GPU's free memory, which the recording may keep for itself.
    """
    trial = Trial(trial_inputs, prepare, state)
    try:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        expected = trial.of(work)
        taken = torch.cuda.memory_reserved() - reserved
        torch.cuda.empty_cache()
        if taken > memory_share * free:
            raise RecordingError(f"{taken / 2**30:.1f} GiB would be for that alone")
        recording = Recording(work, inputs)
        trial.put_back()
        found = trial.of(recording)
        if not all(map(are_same, found, expected)):
            noise = [NOISE * (again - vector).nan_to_num(0.0, 0.0, 0.0).norm()
                     for again, vector in zip(trial.of(work), expected)]
            if not all(map(are_same, found, expected, noise)):
                raise RecordingError("a trial did not do the same")
        return recording
    except RecordingError:
        raise
    except Exception as error:  # torch's, the driver's, a compiler's: of any kind
        # What went wrong first spoils the recording's end as well.
        reason = str(error.__context__ or error).partition("\n")[0] or type(error).__name__
        raise RecordingError(reason) from error
    finally:
        trial.put_back()
