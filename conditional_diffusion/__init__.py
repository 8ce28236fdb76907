"""Class-conditional diffusion in plain PyTorch: network, schedule, samplers, training engine."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .noise_scheduler import CosineNoiseScheduler
from .sampler import (
    SAMPLERS,
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    SDEDPMSolverSampler,
)
from .training_engine import TrainingEngine
from .unet import UNet

__all__ = [
    "CheckpointError",
    "CosineNoiseScheduler",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "SAMPLERS",
    "SDEDPMSolverSampler",
    "TrainingEngine",
    "UNet",
    "load_checkpoint",
    "save_checkpoint",
]
