"""The classifier that judges samples: what it is trained on, cached by and looks at."""

import pytest
import torch
from torch.testing import assert_close

import classifier
from classifier import Classifier, Recipe, augmented, cached_classifier, look_at, to_input
from config import DataConfig
from data import draw_pictograms, enlarge

SMALL = Recipe(widths=(8, 16, 16), epochs=8, batch_size=50)


@pytest.fixture(scope="module")
def splits():
    return draw_pictograms(
        DataConfig(dataset="pictograms", image_size=32, samples_per_class=60), seed=0
    )


def make(splits, folder, said, recipe=SMALL, size=32):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "say", said.append)
        return cached_classifier(splits, size, torch.device("cpu"), recipe=recipe, folder=folder)


def test_it_learns_is_cached_and_says_how_good_it_is(splits, tmp_path, monkeypatch):
    said = []
    random_state = torch.get_rng_state()
    judge = make(splits, tmp_path, said)
    assert torch.equal(torch.get_rng_state(), random_state)
    # Sixty held-out pictures of ten classes: guessing gets a tenth of them.
    assert judge.accuracy > 0.6
    features, found = look_at(judge.model, splits["test"].images)
    assert (found == splits["test"].labels).float().mean().item() == pytest.approx(judge.accuracy)
    assert_close(features, judge.held_out)
    assert len(judge.train) == len(splits["train"])

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "train_classifier", fail)
        again = make(splits, tmp_path, said)
    assert again.accuracy == judge.accuracy and len(said) == 2
    assert_close(look_at(again.model, splits["test"].images)[0], features)
    # At another size it looks at the data anew, but need not learn again.
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "train_classifier", fail)
        larger = make(splits, tmp_path, said, size=64)
    seen = enlarge(splits["test"].images, 64)
    assert_close(larger.held_out, look_at(again.model, seen)[0])
    assert (larger.held_out - judge.held_out).abs().max() > 0.01 and len(said) == 3


def test_other_data_another_recipe_and_a_damaged_file_train_it_anew(splits, tmp_path):
    short, said = Recipe(widths=(8, 8, 8), epochs=1, batch_size=100), []
    make(splits, tmp_path, said, short)
    other = {**splits, "train": splits["train"].first_per_class(50)}
    make(other, tmp_path, said, short)
    make(splits, tmp_path, said, Recipe(widths=(8, 8, 8), epochs=1, batch_size=200))
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(said) == 6
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    make(splits, tmp_path, said, short)
    # What the lost weights said of the data goes with them.
    assert len(said) == 9 and "cannot be read" in said[6] and "training" in said[7]
    make(splits, tmp_path, said, short)
    assert len(said) == 9


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),  # torch's
])
def test_what_cannot_be_kept_is_used_nevertheless(tmp_path, monkeypatch, error):
    def full(content, file):
        raise error

    said = []
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(classifier, "say", said.append)
    assert classifier.cached(tmp_path / "new" / "a.pt", lambda: {"n": 3}) == {"n": 3}
    assert len(said) == 1 and "a.pt cannot be written (" in said[0]
    assert list(tmp_path.rglob("*.*")) == []


def test_first_layer_whitens_patches(splits):
    images = to_input(splits["train"].images[:100], "cpu")
    model = Classifier((8, 8, 8))
    model.fit_whitening(images)
    responses = model.whiten(images)[:, :12].permute(1, 0, 2, 3).flatten(1).double()
    power = responses @ responses.T / responses.shape[1]
    assert_close(power - power.diag().diag(), torch.zeros(12, 12).double(), rtol=0, atol=1e-3)
    # Below one only where there is next to nothing to see.
    assert power.diag().max() <= 1.001 and power.diag().max() > 0.9
    assert_close(model.whiten(images)[:, 12:], -model.whiten(images)[:, :12])


def test_augmented_pictures_are_crops_of_the_padded_ones_or_of_their_mirror_images():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 6, 6)
    places = set()
    for image, moved in zip(images, augmented(images, 2)):
        found = []
        for mirrored in (False, True):
            source = image.flip(-1) if mirrored else image
            padded = torch.nn.functional.pad(source[None], [2] * 4, mode="reflect")[0]
            found += [
                (mirrored, y, x) for y in range(5) for x in range(5)
                if torch.equal(padded[:, y : y + 6, x : x + 6], moved)
            ]
        assert found
        places.update(found)
    assert {mirrored for mirrored, _, _ in places} == {True, False} and len(places) > 15


def test_input_of_any_size_becomes_32_pixels():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert_close(to_input(images, "cpu"), images / 127.5 - 1)
    large = torch.full((2, 3, 128, 128), 200, dtype=torch.uint8)
    assert_close(to_input(large, "cpu"), torch.full((2, 3, 32, 32), 200 / 127.5 - 1))


def test_a_mirrored_picture_looks_the_same(splits):
    model = Classifier((8, 8, 8)).eval()
    images = splits["test"].images[:5]
    assert_close(look_at(model, images)[0], look_at(model, images.flip(-1))[0])


def test_a_large_picture_is_antialiased():
    stripes = ((torch.arange(128) % 4 % 3 > 0) * 255).byte().expand(1, 3, 128, 128)
    found = to_input(stripes, "cpu")[..., 4:-4]  # finer than 32 pixels can show: grey
    assert found.abs().max() < 0.1
