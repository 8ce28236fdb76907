"""Class-conditional diffusion in plain PyTorch: network, schedule, sampler, training engine."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .noise_scheduler import CosineNoiseScheduler
from .sampler import DDPMSampler
from .training_engine import TrainingEngine
from .unet import UNet

__all__ = [
    "CheckpointError",
    "CosineNoiseScheduler",
    "DDPMSampler",
    "TrainingEngine",
    "UNet",
    "load_checkpoint",
    "save_checkpoint",
]
