"""What CUDA would refuse, tried without one: on tensors that have a device but no numbers.

torch's FakeTensorMode raises where tensors of two devices meet, and where the host asks for a
number that only the GPU has. Backward passes, and copies that wait, need a real one.
"""

import weakref
from unittest.mock import patch

import pytest
import torch
from conftest import TINY
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from classifier import Classifier, augmented, look_at
from conditional_diffusion import SAMPLERS, CosineNoiseScheduler, TrainingEngine, UNet
from conditional_diffusion.processes import Processes
from config import DataConfig
from data import Split, TrainingBatches, to_x_start
from evaluation import pixel_neighbours
from scores import nearest_images

GPU = torch.device("cuda:0")
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class FakeGenerator:
    def __init__(self, device):
        self.device = torch.device(device)

    def manual_seed(self, seed):
        return self


def pin_memory(tensor):
    assert tensor.device.type == "cpu", "only what is on the CPU can be pinned"
    return tensor


@pytest.fixture
def gpu():
    """gpu.free: bytes that are free on it."""
    class Memory:
        free = 8 * 2**30

    with (
        patch("torch.cuda.mem_get_info", lambda device: (Memory.free, 16 * 2**30)),
        patch("torch.Tensor.pin_memory", pin_memory),
        # Without a GPU torch would leave autocast out.
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield Memory


def network() -> tuple[UNet, CosineNoiseScheduler]:
    with GPU:
        scheduler = CosineNoiseScheduler(50, image_size=64, reference_size=32)
        return UNet(scheduler.alphas_cumprod, **TINY), scheduler


def test_what_several_processes_need_later_is_held_free_in_the_rehearsal(gpu):
    model, scheduler = network()
    engine = TrainingEngine(model, scheduler, total_steps=9, learning_rate=1e-3,
                            processes=Processes(0, 2))
    weights, empty = sum(parameter.nbytes for parameter in model.parameters()), torch.empty
    made, held = [], []

    def kept(*size, **options):
        made.append(weakref.ref(tensor := empty(*size, **options)))
        return tensor

    def compute(*arguments):
        held.extend(tensor for known in made if (tensor := known()) is not None)

    with patch("torch.empty", kept), patch.object(engine, "_compute_gradients_in_parts", compute):
        engine.rehearse(None, None)
    (reserve,) = held
    assert reserve.nbytes > weights and reserve.device.type == "cuda"


def some_images(count: int, size: int = 8) -> torch.Tensor:
    return torch.zeros(count, 3, size, size, dtype=torch.uint8)


def test_the_mode_notices_what_it_is_here_for(gpu):
    on_gpu = torch.zeros(3, device=GPU)
    with pytest.raises(RuntimeError, match="cuda:0.*cpu"):
        on_gpu + torch.zeros(3)
    with pytest.raises(DataDependentOutputException):
        float(on_gpu.sum())
    with pytest.raises(AssertionError, match="pinned"):
        on_gpu.pin_memory()


@pytest.mark.parametrize("free", [8 * 2**30, 0])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_on_the_gpu_wherever_the_images_are(gpu, free, device, flip):
    gpu.free = free
    split = Split(some_images(40), torch.zeros(40, dtype=torch.long))
    source = TrainingBatches(split, DataConfig(image_size=16, horizontal_flip=flip), 4, 0, device)
    assert source.images.device.type == ("cuda" if free else "cpu")
    x_start, labels = source.batch(torch.arange(4), 0)
    assert x_start.shape == (4, 3, 16, 16) and x_start.device == labels.device == GPU


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("parts, optimizer", [(1, "muon"), (3, "muon"), (1, "adamw")])
def test_no_training_step_asks_for_a_number(gpu, dtype, parts, optimizer):
    model, scheduler = network()
    engine = TrainingEngine(model, scheduler, total_steps=9, learning_rate=1e-3,
                            autocast_dtype=dtype, optimizer=optimizer)
    engine.micro_batches = parts

    dtypes = set()
    model.stem.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))

    def backward(loss):
        assert loss.device == GPU and loss.dtype == torch.float32
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def adamw(weights, *arguments, lr, found_inf, **options):  # which fake tensors do not know
        assert lr.device == found_inf.device == GPU and weights

    batch = torch.zeros(4, 3, 16, 16, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)
    with patch("torch.Tensor.backward", backward), patch("torch._fused_adamw_", adamw):
        for _ in range(2):
            engine.train_step(*batch)
    assert engine.step == 2 and dtypes == {dtype or torch.float32}
    # A validation asks for one number, which is its last act.
    with pytest.raises(DataDependentOutputException), patch.object(
        engine.processes, "sum", side_effect=lambda losses: losses
    ) as summed:
        engine.validation_loss(engine.ema_model, *batch, 3)
    assert summed.call_count == 1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_no_sampling_step_asks_for_a_number(gpu, name, guidance):
    model, scheduler = network()
    with patch.object(SAMPLERS[name], "kept_timesteps", lambda self: [49, 24, 0]):
        sampler = SAMPLERS[name](scheduler, num_inference_steps=3, guidance_scale=guidance)
    labels, randn = torch.zeros(3, dtype=torch.long, device=GPU), torch.randn

    def drawn(shape, *, generator, device):
        assert generator.device == torch.device(device)
        return randn(shape, device=device)

    with patch("torch.Generator", FakeGenerator), patch("torch.randn", drawn):
        pictures = sampler.sample(model, labels, (3, 16, 16), [1, 2, 3], batch_size=2)
    assert pictures.device == GPU and pictures.dtype == torch.float32


def test_scores_and_their_classifier_go_to_the_gpu_and_back(gpu):
    with GPU:
        model = Classifier((8, 16))
    for found in look_at(model, some_images(5)):
        assert found.device.type == "cpu"
    images = to_x_start(some_images(5).to(GPU), 32)
    assert augmented(images, 2).device == GPU
    for neighbours in (pixel_neighbours(some_images(5), some_images(9), GPU).index,
                       nearest_images(images, images)[0]):
        assert neighbours.device.type == "cpu"
