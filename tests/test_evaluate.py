"""Scores: the evaluator on known pictures, then checkpoints and folders as a user scores them."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PICTOGRAMS, assert_one_sentence, make_checkpoint
from matplotlib.figure import Figure
from PIL import ExifTags, Image

import data
import evaluate_samples
import evaluation
import train_model
from cifar10 import DataError
from classifier import Recipe, cached_classifier, look_at
from conditional_diffusion.processes import Processes
from config import CLASS_NAMES, DataConfig
from data import enlarge
from evaluate_samples import at_n_floor, parse_scales, read_folder
from evaluation import Evaluator, Pictures
from inception_scores import InceptionUnavailable
from run_directory import acquire_lock
from scores import Neighbours, frechet_distance

pytestmark = pytest.mark.usefixtures("own_directory")
FULL = ["--full", *PICTOGRAMS, "--epochs", "2", "--samples", "10", "--batch-size", "10",
        "--train.learning_rate", "1e-2", "--train.warmup_steps", "1"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch, classifiers):
    """A small classifier, and a small set of pictograms where all are asked for."""
    recipe = Recipe(widths=(8, 16, 16), epochs=6, batch_size=50)
    quick = functools.partial(cached_classifier, recipe=recipe, folder=classifiers)
    monkeypatch.setattr(evaluation, "cached_classifier", quick)
    for module in (data, evaluate_samples):
        monkeypatch.setattr(module, "PICTOGRAMS_PER_CLASS", 30)


@pytest.fixture(scope="module")
def splits():
    wanted = DataConfig(dataset="pictograms", image_size=32, samples_per_class=60)
    return data.draw_pictograms(wanted, seed=0)


@pytest.fixture
def evaluator(splits):
    return Evaluator(splits, 32, torch.device("cpu"))


def test_training_pictures_score_as_copies_of_themselves(evaluator, splits):
    train = splits["train"]
    report = evaluator.scores(Pictures(train.images, train.labels)).report
    assert report["n"] == 600 and report["n_floor"] == 60
    assert report["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert report["frechet_distance_floor"] > 0.01
    assert report["near_copies_features"] == report["near_copies_pixels"] == 1
    assert report["near_copies_pixels_floor"] < 1
    for part in ("mean", "std"):
        assert report["colour"][part] == pytest.approx(report["colour_data"][part])
    by_class = report["agreement_by_class"]
    assert list(by_class) == list(CLASS_NAMES)
    assert report["agreement"] == pytest.approx(sum(by_class.values()) / 10)


def test_pictures_larger_than_the_data_are_compared_with_enlarged_data(splits):
    """A model that drew the data as it sees them would score as the data do."""
    evaluator = Evaluator(splits, 64, torch.device("cpu"))
    for split in splits.values():
        report = evaluator.scores(Pictures(enlarge(split.images, 64), split.labels)).report
        if split is splits["test"]:
            for name in ("frechet_distance", "near_copies_features", "near_copies_pixels"):
                assert report[name] == pytest.approx(report[f"{name}_floor"])
            assert report["agreement"] == pytest.approx(evaluator.judge.accuracy)
        else:
            assert report["frechet_distance"] == pytest.approx(0, abs=1e-4)
            assert report["near_copies_features"] == report["near_copies_pixels"] == 1


def test_noise_scores_badly(evaluator, splits):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (60, 3, 32, 32), generator=generator).byte()
    labels = torch.arange(60) % 10
    report = evaluator.scores(Pictures(noise, labels)).report
    assert report["frechet_distance"] > 5 * report["frechet_distance_floor"]
    assert report["near_copies_pixels"] == 0
    assert report["agreement"] < 0.35  # guessing gets 0.1; 60 pictures: up to 0.25 by chance
    assert report["colour"]["mean"] == pytest.approx([127.5] * 3, abs=2)


def test_a_mirrored_copy_is_found_and_lies_beside_its_original(evaluator, splits, tmp_path):
    chosen = [3, 333, 599]
    pictures = Pictures(splits["train"].images[chosen].flip(-1), None)
    scores = evaluator.scores(pictures)
    assert scores.by_pixels.index[:, 0].tolist() == chosen
    assert scores.by_pixels.distances[:, 0].tolist() == pytest.approx([0] * 3, abs=1e-3)
    assert "agreement" not in scores.report and scores.confusion is None
    evaluator.draw_pairs(pictures, scores, tmp_path / "nearest.png")
    with Image.open(tmp_path / "nearest.png") as grid:
        assert grid.width > 3 * 64 and grid.height > 4 * 64  # twice two rows of three pictures


def save(path: Path, color, size=(8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_folder_of_pictures_with_classes_in_names_or_folders(tmp_path):
    save(tmp_path / "cat_0000.png", (1, 2, 3))
    save(tmp_path / "ship" / "anything.png", (4, 5, 6))
    save(tmp_path / "class9" / "x.png", (7, 8, 9))
    save(tmp_path / "grid.png", (0, 0, 0), (50, 20))  # has no class: no sample
    save(tmp_path / "earlier_1" / "dog_0.png", (0, 0, 0))  # of another call
    (tmp_path / "samples.json").write_text("{}")
    pictures = read_folder(tmp_path)
    assert pictures.labels.tolist() == [3, 9, 8]
    assert pictures.images[:, :, 0, 0].tolist() == [[1, 2, 3], [7, 8, 9], [4, 5, 6]]
    assert pictures.images.shape == (3, 3, 8, 8) and pictures.images.dtype == torch.uint8


def test_class_names_may_hold_capitals_and_underscores(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate_samples.CLASS_NAMES", ("bear", "Bear_polar", "dog"))
    for name in ("bear_0000.png", "bear_polar_0000.png", "Dog_0.png"):
        save(tmp_path / name, "red")
    assert sorted(read_folder(tmp_path).labels.tolist()) == [0, 1, 2]


def test_folder_of_pictures_without_classes(tmp_path):
    save(tmp_path / "00000.png", (1, 2, 3))
    save(tmp_path / "00001.png", (4, 5, 6))
    pictures = read_folder(tmp_path)
    assert pictures.labels is None and len(pictures.images) == 2


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no pictures"):
        read_folder(tmp_path)
    save(tmp_path / "cat_0000.png", "red")
    save(tmp_path / "cat_0001.png", "red", (9, 9))
    with pytest.raises(DataError, match=r"cat_0001\.png is 9x9, not 8x8"):
        read_folder(tmp_path)
    (tmp_path / "cat_0001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cat_0001\.png cannot be read"):
        read_folder(tmp_path)


def test_pictures_are_drawn_of_every_class_from_seeds_that_follow_each_other():
    asked = {}

    class Recorder:
        def draw_parts(self, labels, seeds):
            asked.update(labels=labels.tolist(), seeds=seeds)
            yield torch.zeros(len(labels), 3, 4, 4)

    pictures = evaluate_samples.draw(Recorder(), 2, 5, Processes())
    assert asked == {"labels": 2 * list(range(10)), "seeds": list(range(5, 25))}
    assert pictures.labels.tolist() == asked["labels"] and len(pictures.images) == 20


def test_scales_of_a_sweep():
    assert parse_scales("2,1,1.5,1") == [1.0, 1.5, 2.0]


def read_scores(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "scores.jsonl").read_text().splitlines()]


def test_a_sweep_over_a_checkpoint_then_its_pictures_from_a_folder(call, monkeypatch):
    attempts = []

    def unavailable(*pictures, **options):
        attempts.append(options)
        assert [len(images) for images in pictures[1:]] == [300, 30]  # training, held-out
        raise InceptionUnavailable("no network")

    monkeypatch.setattr(evaluate_samples, "inception_scores", unavailable)
    status, said = call(train_model, *FULL)
    assert status == 0, said
    arguments = ["--samples", 2, "--sampler", "ddim", "--steps", 4, "--seed", 5, "--device", "cpu"]
    status, said = call(evaluate_samples, *arguments, "--sweep", "1,3")
    assert status == 0, said
    assert "class agreement" in said and "held-out" in said and "no network" in said
    assert len(attempts) == 1
    records = read_scores("checkpoints/evaluation")
    assert [record["guidance_scale"] for record in records] == [1, 3]
    for record in records:
        assert record["n"] == 20 and record["sampler"] == "ddim" and record["seed"] == 5
        assert record["num_inference_steps"] == 4 and record["weights"] == "EMA"
        assert len(record["hash"]) == 16 and record["reference"]["train"] == 300
    assert records[0]["colour"] != records[1]["colour"]
    for name in ("confusion_guidance_1", "nearest_guidance_3", "guidance_sweep",
                 "samples_guidance_3"):
        with Image.open(f"checkpoints/evaluation/{name}.png") as picture:
            assert min(picture.size) > 100

    # The same pictures again, whatever the batch size.
    _, said = call(evaluate_samples, *arguments, "--guidance", 3, "--batch-size", 7,
                   "--no-inception")
    assert "--no-inception" in said and len(attempts) == 1
    again = read_scores("checkpoints/evaluation")[2]
    for part in ("mean", "std"):
        assert again["colour"][part] == pytest.approx(records[1]["colour"][part], abs=0.01)

    for name in ("cat", "dog"):
        save(Path("mine", f"{name}_0.png"), "red", (18, 18))  # a size no model needs
    status, said = call(evaluate_samples, "--pictures", "mine", "--dataset", "pictograms",
                        "--no-inception", "--device", "cpu")
    assert status == 0, said
    (record,) = read_scores("mine/evaluation")
    assert record["pictures"] == "mine" and record["colour"]["mean"] == [255, 0, 0]


def test_pictures_are_scored_as_their_exif_turns_them():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    Path("mine").mkdir()
    Image.fromarray(pixels).save("mine/cat_0.png", exif=exif)
    found = read_folder(Path("mine")).images[0].permute(1, 2, 0)
    assert np.array_equal(found, pixels[::-1, ::-1])


def test_links_to_class_folders_are_followed():
    save(Path("elsewhere", "1.png"), "red", (16, 16))
    Path("mine").mkdir()
    Path("mine", "cat").symlink_to(Path("elsewhere").resolve())
    assert read_folder(Path("mine")).labels.tolist() == [CLASS_NAMES.index("cat")]


def test_scores_need_held_out_pictures(call):
    for name in CLASS_NAMES:
        save(Path("single", name, "1.png"), "red", (16, 16))
        save(Path("mine", f"{name}_1.png"), "red", (16, 16))
    status, said = call(evaluate_samples, "--pictures", "mine", "--data-dir", "single",
                        "--no-inception", "--device", "cpu")
    assert status == 1
    assert_one_sentence(said, "held-out pictures", "test/")


def test_distances_stand_beside_those_of_as_many_held_out_pictures(evaluator, splits):
    """Where fewer are held out than drawn, a score of as many drawn ones is shown as well."""
    images, labels = splits["train"].images[:300], splits["train"].labels[:300]
    report = evaluator.scores(Pictures(images, labels)).report
    assert report["n"] == 300 and report["n_floor"] == 60
    some = torch.cat([(labels == label).nonzero()[::5, 0] for label in range(10)])
    fewer = evaluator.scores(Pictures(images[some], labels[some])).report
    assert report["frechet_distance_at_n_floor"] == pytest.approx(fewer["frechet_distance"])
    assert at_n_floor(report, "frechet_distance").startswith("of 60 pictures ")
    assert at_n_floor(report, "agreement") == ""
    assert at_n_floor(fewer, "frechet_distance") == ""


def test_every_score_stands_beside_its_own_floor():
    record = {
        "n": 20, "n_floor": 10, "agreement": 0.91, "frechet_distance": 1.5,
        "frechet_distance_floor": 2.5, "frechet_distance_at_n_floor": 3.5,
        "agreement_by_class": {name: 0.1 * i for i, name in enumerate(CLASS_NAMES)},
        "near_copies_features": 0.01, "near_copies_features_floor": 0.02,
        "near_copies_pixels": 0.03, "near_copies_pixels_floor": 0.04,
        "colour": {"mean": [1, 2, 3], "std": [4, 5, 6]},
        "colour_data": {"mean": [11, 12, 13], "std": [14, 15, 16]},
        "inception": {"n": 20, "n_floor": 10, "fid": 7.5, "fid_at_n_floor": 8.5, "precision": 0.5,
                      "floor": {"fid": 9.5, "precision": 0.6}},
        "reference": {"train": 300, "image_size": 32, "classifier_accuracy": 0.88},
    }
    assert [line.strip() for line in evaluate_samples.report_lines(record)] == [
        "class agreement    91.0 %, lowest airplane 0 %, automobile 10 %, bird 20 %",
        "Frechet distance   1.5 in the classifier's features (of 10 pictures 3.5, held-out "
        "pictures 2.5)",
        "near copies        1.0 % by features (held-out 2.0 %), 3.0 % by pixels (held-out 4.0 %)",
        "colour, samples    mean 1.0 2.0 3.0, std 4.0 5.0 6.0 (0 to 255)",
        "colour, data       mean 11.0 12.0 13.0, std 14.0 15.0 16.0 (0 to 255)",
        "FID                7.5 (of 10 pictures 8.5, held-out pictures 9.5)",
        "precision          0.5 (held-out pictures 0.6)",
        "n 20 (held-out 10); reference: 300 pictures at 32x32; the classifier is right on 88.0 % "
        "of held-out pictures",
    ]


def test_a_checkpoint_of_other_classes_is_refused(call, monkeypatch):
    make_checkpoint("checkpoints")
    monkeypatch.setattr(evaluate_samples, "CLASS_NAMES", ("boat", *CLASS_NAMES[1:]))
    status, said = call(evaluate_samples, "--no-inception")
    assert status == 1
    assert_one_sentence(said, "was trained on the classes airplane, ", "CLASS_NAMES")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--samples", "0"], "from 1 to"),
        (["--sweep", "1,two"], "--sweep"),
        (["--sampler", "ddmp"], "ddpm"),
        (["--steps", "51"], "exceeds the 50"),
        (["--pictures", "absent"], "no folder"),
        (["--pictures", "absent", "--sweep", "1,2"], "--sweep would draw pictures"),
        (["--pictures", "absent", "--guidance", "3"], "--sample.guidance_scale would draw"),
        (["--pictures", "absent", "--seed", "0"], "--seed would draw"),
        (["--inception-weights", "absent.pth"], "absent.pth is no file"),
        (["--sweep", "1,2", "--guidance", "3"], "exclude each other"),
        (["--seed", str(2**63 - 5)], "--seed"),
        (["--device", "warp"], "warp"),
        (["--data.image_size", "32"], "unknown argument"),
    ],
)
def test_bad_input_is_one_sentence(call, arguments, word):
    make_checkpoint("checkpoints", **{"train.class_dropout_prob": "0.1"})
    status, said = call(evaluate_samples, *arguments, "--no-inception")
    assert status == (2 if word == "unknown argument" else 1)
    assert_one_sentence(said, word)


def test_a_sweep_is_drawn_of_what_was_measured(tmp_path):
    """With a single held-out picture there is no Frechet distance."""
    records = [{"guidance_scale": scale, "agreement": 0.5, "inception": {},
                "reference": {"classifier_accuracy": 0.9}} for scale in (1, 2)]
    evaluate_samples.draw_sweep(records, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as one:
        width = one.width
    both = [record | {"frechet_distance": 3.0, "frechet_distance_floor": 1.0} for record in records]
    evaluate_samples.draw_sweep(both, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as two:
        assert two.width == 2 * width


def test_a_place_that_takes_no_scores_is_found_out_before_drawing(call):
    make_checkpoint("checkpoints")
    Path("taken").write_text("a file")
    status, said = call(evaluate_samples, "--output", "taken", "--no-inception")
    assert status == 1
    assert_one_sentence(said, "--output taken is a file; name a folder")


@pytest.mark.parametrize("scored", ["drawn", "given"])
def test_a_second_call_for_one_folder_is_refused(call, scored):
    make_checkpoint("checkpoints")
    Path("scores").mkdir()
    save(Path("pictures/cat_0.png"), (9, 9, 9))
    given = ["--pictures", "pictures"] if scored == "given" else []
    with acquire_lock(Path("scores")):
        status, said = call(evaluate_samples, *given, "--output", "scores", "--no-inception")
    assert status == 1
    assert_one_sentence(said, "scores is in use by another process")


def test_no_checkpoint_is_one_sentence(call):
    status, said = call(evaluate_samples)
    assert status == 1
    assert_one_sentence(said, "no usable checkpoint")


def test_floors_are_of_held_out_pictures_spread_over_all_classes(evaluator, splits):
    report = evaluator.scores(Pictures(splits["train"].images[:20], None)).report
    # Of six held-out pictures of each class, which take turns, the first and the fourth.
    chosen = torch.arange(60).view(6, 10)[[0, 3]].flatten()
    features, _ = look_at(evaluator.judge.model, splits["test"].images[chosen])
    floor = frechet_distance(features, evaluator.judge.train)
    assert report["n_floor"] == 20
    assert report["frechet_distance_floor"] == pytest.approx(floor, rel=1e-4)


def test_pixel_distance_is_the_root_mean_square_in_units_of_x_start():
    levels = torch.tensor([100, 140, 240], dtype=torch.uint8)
    grey = levels.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    found = evaluation.pixel_neighbours(grey[:1] + 10, grey, "cpu")
    assert found.index[0, 0] == 0
    assert found.distances[0, 0].item() == pytest.approx(10 / 127.5, rel=1e-4)


def test_pairs_are_the_nearest_ones_each_above_its_original(monkeypatch, tmp_path):
    def neighbours(first: int) -> Neighbours:
        """Picture i is at distance 12 - i from original first + i."""
        return Neighbours(torch.arange(12)[:, None] + first, 12.0 - torch.arange(12)[:, None])

    kept = []
    monkeypatch.setattr(
        evaluation, "labelled_grid",
        lambda images, *args: kept.append(images) or Image.new("RGB", (1, 1)),
    )
    levels = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.train = data.Split(levels + 100, torch.zeros(40).long())
    scores = evaluation.Scores({}, None, neighbours(0), neighbours(20))
    evaluator.draw_pairs(Pictures(levels[:12], None), scores, tmp_path / "pairs.png")
    nearest = list(range(11, 1, -1))
    assert kept[0][:, 0, 0, 0].reshape(4, 10).tolist() == [
        nearest, [100 + i for i in nearest], nearest, [120 + i for i in nearest],
    ]


@pytest.fixture
def figures(monkeypatch):
    """What matplotlib would have written."""
    kept = []

    def keep(figure, path, **options):
        kept.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_confusion_is_drawn_by_row_of_the_class_wanted(figures, tmp_path):
    confusion = torch.diag(torch.full((10,), 4))
    confusion[3] = 0
    confusion[3, 3], confusion[3, 5] = 1, 3  # of four cats wanted three look like dogs
    evaluation.draw_confusion(confusion, tmp_path / "confusion.png")
    (axes,) = figures[0].axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(texts) == 11 and texts[5, 3] == "75" and texts[3, 3] == "25" and texts[5, 5] == "100"
    assert axes.images[0].get_array()[3, 5] == 75
    assert axes.get_ylabel() == "class wanted"


def test_a_sweep_draws_scores_at_the_number_of_their_floor(figures, tmp_path):
    records = [
        {"guidance_scale": scale, "agreement": 0.5 + scale / 10, "frechet_distance": 10.0 * scale,
         "frechet_distance_at_n_floor": 20.0 * scale, "frechet_distance_floor": 1.5,
         "inception": {"fid": 5.0 * scale, "fid_at_n_floor": 7.0 * scale, "floor": {"fid": 2.5}},
         "reference": {"classifier_accuracy": 0.9}}
        for scale in (1, 2)
    ]
    evaluation.draw_sweep(records, tmp_path / "sweep.png")
    drawn = {axes.get_title(): [list(line.get_ydata()) for line in axes.lines]
             for axes in figures[0].axes}
    assert drawn == {
        "class agreement": [[0.6, 0.7], [0.9, 0.9]], "Frechet distance": [[20.0, 40.0], [1.5, 1.5]],
        "FID": [[7.0, 14.0], [2.5, 2.5]],
    }
    assert all(list(axes.lines[0].get_xdata()) == [1, 2] for axes in figures[0].axes)
