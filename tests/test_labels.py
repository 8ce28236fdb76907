"""That a class stays itself from the folder of its pictures to what is drawn, named and scored."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_FLAGS
from PIL import Image

import evaluate_samples
import generate_samples
import train_model
from config import CLASS_NAMES

pytestmark = pytest.mark.usefixtures("own_directory")
CLASSES = list(range(len(CLASS_NAMES)))


def pattern(label: int) -> np.ndarray:
    """Four quadrants (16, 16, 3), dark or light by the bits of the class."""
    bits = np.array([label >> bit & 1 for bit in range(4)], np.uint8).reshape(2, 2)
    return (60 + 140 * bits).repeat(8, 0).repeat(8, 1)[..., None].repeat(3, 2)


def shown(picture) -> int:
    """The class that a picture (16, 16, 3) shows."""
    light = np.asarray(picture).reshape(2, 8, 2, 8, 3).mean((1, 3, 4)).ravel() > 130
    return sum(1 << bit for bit, value in enumerate(light) if value)


def test_what_was_memorised_is_drawn_named_and_scored_as_its_class(call, monkeypatch):
    for label, name in enumerate(CLASS_NAMES):
        for split in ("train", "test"):
            folder = Path("pictures", split, name)
            folder.mkdir(parents=True)
            Image.fromarray(pattern(label)).save(folder / "1.png")
    status, said = call(train_model, "--overfit", *TINY_FLAGS, "--data-dir", "pictures",
                        "--train.learning_rate", 1e-2, "--epochs", 15)
    assert status == 0, said
    status, said = call(generate_samples, "--samples", 1, "--device", "cpu")
    assert status == 0, said
    files = [Path("generated_images", f"{name}_0000.png") for name in CLASS_NAMES]
    assert [shown(Image.open(file)) for file in files] == CLASSES

    scored = []

    class Keeper:
        records = ()

        def __init__(self, *arguments):
            pass

        def add(self, pictures, *facts):
            scored.append(pictures)

    monkeypatch.setattr(evaluate_samples, "Scorer", Keeper)
    status, said = call(evaluate_samples, "--samples", 2, "--device", "cpu")
    assert status == 0, said
    (pictures,) = scored
    assert pictures.labels.tolist() == 2 * CLASSES
    assert [shown(image.permute(1, 2, 0)) for image in pictures.images] == 2 * CLASSES
