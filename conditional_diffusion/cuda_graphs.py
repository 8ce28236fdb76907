"""Work that a GPU repeats, recorded once as a CUDA graph, which the host launches as a whole.

A fast GPU computes the kernels of these small networks in less time than it takes to launch them
one by one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MEMORY_SHARE = 0.5  # of the GPU's free memory at most, because a graph keeps it for itself
# Of the norm of what the plain work does; kernels may add up in another order, and an optimizer
# makes more of that, but with other noise or another learning rate nothing would be right.
TOLERANCE = 0.1

Tensors = Sequence[Tensor]


class RecordingError(RuntimeError):
    """Work cannot be recorded, or its recording does something else; the message says why."""


class Recording:
    """work(*inputs) as a CUDA graph; a call launches it on inputs of the same shapes.

    Whatever else the work reads or changes has to stay where it is. The answers lie in one place,
    where the next call writes over them. Random numbers, of the default generator, are those of
    the plain work, if it is seeded outside of it.
    """

    def __init__(self, work: Callable[..., Tensors], inputs: Tensors):
        self.inputs = [value.clone() for value in inputs]
        # What libraries do once cannot be recorded; nor can anything on the default stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.answers = work(*self.inputs)
        except RuntimeError:
            # In torch 2.11 the generator would wait for the end of the recording for ever.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
            raise

    def __call__(self, *inputs: Tensor) -> Tensors:
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.answers


def are_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two vectors are nearly the same and overflow at the same places."""
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    found, expected = (vector.nan_to_num(0.0, 0.0, 0.0) for vector in (found, expected))
    return bool((found - expected).norm() <= TOLERANCE * expected.norm())


def record(
    work: Callable[..., Tensors],
    inputs: Tensors,
    trial: Tensors,
    *,
    before: Callable[[], None] = lambda: None,
    changing: Callable[[], dict[str, Tensors]] = dict,
) -> Recording:
    """A recording of the work, made on `inputs`, that does on `trial` what the work itself does.

    Raises RecordingError if there is none, or if it would take more than MEMORY_SHARE. Nothing is
    changed either way.

    Args:
        trial: other inputs of the same shapes, so that nothing of the first ones goes unnoticed.
        before: called before each trial; sets what the work reads beside its inputs.
        changing: the tensors that the work changes in place, by kind; those that it makes at its
            first call begin at zero.
    """
    def changed() -> list[Tensor]:
        return [tensor for kind in changing().values() for tensor in kind]

    originals = {id(tensor): tensor.detach().clone() for tensor in changed()}

    @torch.no_grad()
    def put_back() -> None:
        for tensor in changed():
            if id(tensor) in originals:
                tensor.copy_(originals[id(tensor)])
            else:
                tensor.zero_()

    def tried(work: Callable[..., Tensors]) -> list[Tensor]:
        """The answers and the changes of each kind, as vectors."""
        before()
        kinds = [work(*trial), *changing().values()]
        vectors = [
            torch.cat([(tensor.detach() - originals.get(id(tensor), 0)).flatten().float()
                       for tensor in kind]) for kind in kinds if kind
        ]
        put_back()
        return vectors

    try:
        expected = tried(work)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        recording = Recording(work, inputs)
        taken = free - torch.cuda.mem_get_info()[0]
        put_back()
        if taken > MEMORY_SHARE * free:
            raise RecordingError(f"{taken / 2**30:.1f} GiB would be for that alone")
        if not all(map(are_same, tried(recording), expected)):
            raise RecordingError("a trial did not do the same")
        return recording
    except RecordingError:
        raise
    except RuntimeError as error:  # of torch or the driver
        first = error.__context__ or error  # what went wrong spoils the recording's end as well
        raise RecordingError(str(first).partition("\n")[0]) from error
    finally:
        put_back()
