"""CUDA graphs without a GPU: a tape of torch's operations, played back, in the place of one.

As a graph does, it repeats operations on the tensors that they were recorded with, and no Python.
"""

import copy
import math

import pytest
import torch
from conftest import assert_identical
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conditional_diffusion import SAMPLERS, TrainingEngine, cuda_graphs, sampler
from conditional_diffusion.cuda_graphs import RecordingError, are_same, record


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storages(tree) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(tree)}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        answer = function(*args, **kwargs)
        changes = function._schema.is_mutable
        if changes or not storages(answer) <= storages((args, kwargs)):  # else a view
            self.calls.append((function, args, kwargs, [] if changes else tensors(answer)))
        return answer

    def replay(self):
        # What autograd and autocast had to do has been done.
        with torch._C._AutoDispatchBelowAutograd(), torch.autocast("cpu", enabled=False):
            for function, args, kwargs, answers in self.calls:
                for old, new in zip(answers, tensors(function(*args, **kwargs))):
                    old.copy_(new)


class TapeRecording(cuda_graphs.Recording):
    def __init__(self, work, inputs):
        self.inputs = [value.clone() for value in inputs]
        self.random = self.default_random = torch.default_generator
        work(*self.inputs)
        with Tape() as self.graph:
            self.answers = work(*self.inputs)


@pytest.fixture
def gpu(monkeypatch):
    """gpu.reserved: GiB of 10 that torch has, one number a question."""
    class Memory:
        reserved = [0, 0]

    def memory_reserved():
        Memory.reserved.append(Memory.reserved[0])
        return Memory.reserved.pop(0) * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", memory_reserved)
    monkeypatch.setattr(cuda_graphs, "Recording", TapeRecording)
    return Memory


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_start = torch.rand(6, 3, 16, 16, generator=generator) * 2 - 1
    return x_start, torch.randint(10, (6,), generator=generator)


@pytest.mark.parametrize("parts, optimizer, dtype", [
    (1, "muon", None), (2, "muon", torch.bfloat16), (1, "adamw", torch.float16),
])
def test_recorded_steps_are_those_of_plain_ones(
    gpu, awake_model, schedule, parts, optimizer, dtype
):
    """With all that differs from step to step, a batch that is left out, and records on the way."""
    engines = []
    for _ in range(2):
        engine = TrainingEngine(
            awake_model(dropout=0.3), schedule(), total_steps=8, learning_rate=1e-2, warmup_steps=3,
            weight_decay=0.1, class_dropout_prob=0.5, ema_halflife_images=20, seed=5,
            max_skipped_steps=99, optimizer=optimizer, autocast_dtype=dtype,
        )
        engine.micro_batches = parts
        engines.append(engine)
    plain, recorded = engines
    metrics = [[], []]
    for step in range(8):
        if step in (0, 5):  # at the beginning, and of a run that goes on
            before = copy.deepcopy(recorded.state_dict())
            recorded.record(*batch(99))
            after = recorded.state_dict()
            if step == 0:  # AdamW's moments are there, at zero
                for own, state in zip(before["optimizers"], after["optimizers"]):
                    assert not any(map(torch.Tensor.count_nonzero, tensors(state["state"])))
                    own["state"] = state["state"]
            assert_identical(after, before)
        x_start, class_labels = batch(step)
        if step == 3:
            x_start = x_start * math.inf
        for engine, taken in zip(engines, metrics):
            engine.train_step(x_start, class_labels)
            if step % 3 == 1:
                taken.append(engine.take_metrics())
    assert recorded._recording and not plain._recording
    assert_identical(recorded.state_dict(), plain.state_dict())
    assert recorded.skipped_steps >= 1
    for ours, theirs in zip(*metrics, strict=True):
        for name in ("loss", "loss_quarters", "grad_norm", "skipped_steps", "learning_rate"):
            assert ours[name] == theirs[name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_recorded_steps_on_the_gpu_are_those_of_plain_ones(
    awake_model, schedule, optimizer, dtype
):
    """Nearly, since kernels may add up in another order."""
    plain, recorded = (
        TrainingEngine(
            awake_model(dropout=0.3).cuda(), schedule().cuda(), total_steps=6, learning_rate=1e-3,
            warmup_steps=3, class_dropout_prob=0.5, seed=5, max_skipped_steps=99,
            optimizer=optimizer, autocast_dtype=dtype,
        ) for _ in range(2)
    )
    recorded.record(*(part.cuda() for part in batch(99)))
    for step in range(6):
        for engine in (plain, recorded):
            engine.train_step(*(part.cuda() for part in batch(step)))
    ours, theirs = (engine.take_metrics() for engine in (recorded, plain))
    for name in ("loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.02)
    assert ours["skipped_steps"] == theirs["skipped_steps"]
    start = torch.cat([weight.flatten() for weight in awake_model(dropout=0.3).parameters()])
    moved = [torch.cat([weight.flatten().cpu() for weight in engine.model.parameters()]) - start
             for engine in (recorded, plain)]
    assert moved[1].norm() > 0 and (moved[0] - moved[1]).norm() < 0.1 * moved[1].norm()


def test_what_is_loaded_is_not_stepped_by_a_recording_of_what_was_there(gpu, tiny_model, schedule):
    engines = [TrainingEngine(tiny_model(seed), schedule(), total_steps=3, learning_rate=1e-2)
               for seed in (0, 1)]
    trained, other = engines
    trained.train_step(*batch(0))
    other.record(*batch(0))
    other.load_state_dict(trained.state_dict())
    for engine in engines:
        engine.train_step(*batch(1))
    assert_identical(other.state_dict(), trained.state_dict())


class Deaf(TapeRecording):
    """Does not hear of other inputs."""

    def __call__(self, *inputs):
        return super().__call__(*self.inputs)


class Idle(TapeRecording):
    def __call__(self, *inputs):
        return self.answers


class Waiting(TapeRecording):
    def __init__(self, work, inputs):
        with Tape():
            work(*inputs)[0].sum().item()


def test_a_recording_that_does_something_else_is_refused(gpu, monkeypatch):
    total = torch.zeros(2)

    def work(x: Tensor) -> list[Tensor]:
        total.add_(x)
        return [x + torch.rand(2), 2 * x]

    def attempt():
        return record(work, [torch.ones(2)], [torch.full((2,), 3.0)],
                      prepare=lambda: torch.manual_seed(0), state=lambda: {"total": [total]},
                      memory_share=0.5)

    recording = attempt()
    assert torch.equal(total, torch.zeros(2))
    assert torch.equal(recording(torch.tensor([4.0, 5.0]))[1], torch.tensor([8.0, 10.0]))
    assert torch.equal(total, torch.tensor([4.0, 5.0]))
    with pytest.raises(ValueError, match=r"recorded for \(2,\), not \(1,\)"):
        recording(torch.ones(1))
    for kind, reason in [(Deaf, "not do the same"), (Idle, "not do the same"),
                         (Waiting, "^operation not permitted when stream is capturing$")]:
        monkeypatch.setattr(cuda_graphs, "Recording", kind)
        with pytest.raises(RecordingError, match=reason):
            attempt()
    monkeypatch.setattr(cuda_graphs, "Recording", TapeRecording)
    gpu.reserved = [1, 7]
    with pytest.raises(RecordingError, match="6.0 GiB would be for that alone"):
        attempt()
    assert torch.equal(total, torch.tensor([4.0, 5.0]))


def test_training_goes_on_without_a_recording(gpu, monkeypatch, tiny_model, schedule):
    """As if none had been tried."""
    engines = [TrainingEngine(tiny_model(), schedule(), total_steps=3, learning_rate=1e-2)
               for _ in range(2)]
    for kind in (Deaf, Idle):
        monkeypatch.setattr(cuda_graphs, "Recording", kind)
        with pytest.raises(RecordingError):
            engines[0].record(*batch(7))
        for engine in engines:
            engine.train_step(*batch(1))
    assert_identical(engines[0].state_dict(), engines[1].state_dict())


def test_same_is_what_rounding_makes():
    expected = torch.tensor([3.0, -4.0, 0.0])
    assert are_same(expected + torch.tensor([0.3, 0.0, 0.3]), expected)
    off = expected + torch.tensor([0.4, 0.0, 0.4])
    assert not are_same(off, expected) and are_same(off, expected, 0.6)
    assert are_same(torch.zeros(2), torch.zeros(2)) and not are_same(torch.ones(2), torch.zeros(2))
    for wild in (math.nan, math.inf):
        overflown = torch.tensor([3.0, wild, 0.0])
        assert are_same(overflown, overflown)
        assert not are_same(overflown, expected) and not are_same(expected, overflown)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_work_that_differs_from_itself_may_differ_from_its_recording(gpu, noise):
    generator = torch.Generator().manual_seed(0)  # of no seed that a trial sets

    def work(x: Tensor) -> list[Tensor]:
        return [x + noise * torch.rand(100, generator=generator)]

    recording = record(work, [torch.zeros(100)], [torch.ones(100)])
    assert (recording(torch.ones(100))[0] - 1).abs().max() <= noise


@pytest.fixture
def on_cuda(monkeypatch):
    """Samplers take the CPU for a GPU, and few steps for enough."""
    monkeypatch.setattr(sampler, "worth_recording", lambda device, steps: True)


def drawn(model, scheduler, **options) -> tuple[Tensor, list[int]]:
    """Pictures by a sampler that looks back, and the batch of every call of the network."""
    calls = []
    hook = model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    chain = SAMPLERS["sde-dpm-solver++"](
        scheduler, num_inference_steps=6, guidance_scale=2.0, guidance_interval=(0.2, 0.8),
        **options,
    )
    labels = torch.tensor([3, 1, 4, 1, 5])
    pictures = chain.sample(model, labels, (3, 16, 16), range(5), batch_size=2)
    hook.remove()
    return pictures, calls


@pytest.mark.parametrize("target", ["sample", "v_prediction"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recorded_pictures_are_plain_ones(gpu, on_cuda, awake_model, schedule, dtype, target):
    """Guided at some steps only, in batches of 2, 2 and 1."""
    model, scheduler = awake_model(), schedule(prediction_type=target)
    options = {"autocast_dtype": dtype, "clip_x_start": False}
    plain, calls = drawn(model, scheduler, **options)
    recorded, rest = drawn(model, scheduler, **options, cuda_graphs=True)
    assert torch.equal(recorded, plain)
    # With and without guidance, of two batch sizes: the trial, and twice for the recording.
    assert len(calls) == 3 * 6 and sorted(rest) == sorted(3 * [4, 2, 2, 1])


def test_pictures_are_drawn_without_recordings_where_there_are_none(
    gpu, on_cuda, awake_model, schedule, monkeypatch, caplog
):
    monkeypatch.setattr(cuda_graphs, "Recording", Deaf)
    model, scheduler = awake_model(), schedule()
    plain, _ = drawn(model, scheduler)
    recorded, _ = drawn(model, scheduler, cuda_graphs=True)
    assert torch.equal(recorded, plain)
    assert "sampling goes on without CUDA graphs (a trial did not do the same)" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recorded_pictures_on_the_gpu_are_plain_ones(awake_model, schedule, dtype, caplog):
    model, scheduler = awake_model().cuda(), schedule().cuda()
    labels = torch.arange(4, device="cuda")
    pictures = [
        SAMPLERS["ddpm"](
            scheduler, num_inference_steps=20, guidance_scale=2.0, autocast_dtype=dtype,
            cuda_graphs=cuda_graphs,
        ).sample(model, labels, (3, 16, 16), range(4))
        for cuda_graphs in (False, True)
    ]
    assert "without CUDA graphs" not in caplog.text
    assert (pictures[0] - pictures[1]).abs().mean() < 0.01
