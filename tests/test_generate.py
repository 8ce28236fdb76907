"""Pictures as a user draws them: files, facts, batches that fit, trajectories, bad input."""

import json
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_identical, assert_one_sentence, make_checkpoint
from PIL import Image

import drawing
import generate_samples
from conditional_diffusion import UNet, memory
from conditional_diffusion.memory import fitting_batch_size
from config import CLASS_NAMES
from data import to_arrays
from drawing import file_hash
from run_directory import acquire_lock

pytestmark = pytest.mark.usefixtures("own_directory")
OUT = Path("generated_images")
GIB = 2**30


@pytest.fixture
def checkpoint(own_directory) -> Path:
    return make_checkpoint("run", **{"train.class_dropout_prob": "0.1"})


def test_a_second_call_for_one_folder_is_refused(call, checkpoint):
    """The pictures of both would lie there, under facts of one."""
    OUT.mkdir()
    with acquire_lock(OUT):
        status, said = call(generate_samples, checkpoint, "--samples", 1)
    assert status == 1
    assert_one_sentence(said, "generated_images is in use by another process")
    assert not list(OUT.glob("*.png"))
    assert call(generate_samples, checkpoint, "--samples", 1, "--grid-only")[0] == 0


def test_noise_that_a_sampler_does_not_know_is_refused(call, checkpoint):
    status, said = call(generate_samples, checkpoint, "--sample.eta", 0.5)
    assert status == 1
    assert_one_sentence(said, "--sample.eta means nothing to ddpm", "--sampler ddim")


def test_only_the_pictures_of_the_grid_are_kept():
    OUT.mkdir()
    seeds = list(range(100))
    album = generate_samples.Album(
        OUT, ["cat"], seeds, [1], {}, processes=generate_samples.Processes(), single=False,
        trajectory=False,
    )
    for _ in range(10):
        album.add(np.zeros((10, 4, 4, 3), dtype=np.uint8))
    assert [len(images) for images in album.batches] == 5 * [10]  # 50 rows
    assert all(images.base is None for images in album.batches)


def test_pictures_in_python_as_readme_shows_them():
    make_checkpoint("checkpoints", **{"train.class_dropout_prob": "0.1", "train.device": "cpu"})
    readme = (Path(generate_samples.__file__).parent / "README.md").read_text()
    names: dict = {}
    code = readme[readme.index("    import torch\n") :].partition("\n## ")[0]
    exec(textwrap.dedent(code), names)
    assert names["pictures"].shape == (2, 3, 16, 16)
    assert names["drawing"].config.sample.guidance_scale == 3
    again = drawing.Drawing("checkpoints", {"sample.guidance_scale": 3})
    torch.testing.assert_close(again.draw(torch.tensor([5]), [1]), names["pictures"][1:])


def test_best_is_drawn_from_where_nothing_else_was_kept(monkeypatch):
    path = make_checkpoint("run")
    path.rename("run/best.pt")
    assert drawing.open_checkpoint("run")[0] == Path("run/best.pt")
    monkeypatch.setenv("HOME", os.getcwd())
    assert drawing.open_checkpoint("~/run")[0] == Path("run/best.pt").absolute()


def test_a_checkpoint_brings_its_own_classes(call):
    """Drawing needs no CLASS_NAMES that fit, only as many as the checkpoint was trained on."""
    path = make_checkpoint("shapes", ("circle", "square"))
    assert call(generate_samples, path, "--device", "cpu", "--samples", 1)[0] == 0
    assert {path.name for path in OUT.glob("*_0000.png")} == {"circle_0000.png", "square_0000.png"}


@pytest.fixture
def draw(call, checkpoint):
    """draw(*arguments) -> what was said, of a call that has to succeed."""

    def run(*arguments) -> str:
        status, said = call(generate_samples, checkpoint, "--device", "cpu", *arguments)
        assert status == 0, said
        return said

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def text(path) -> dict:
    """The text chunks of a PNG; those that are JSON, read."""
    with Image.open(path) as image:
        chunks = dict(image.text)
    names = ("class", "file", "checkpoint", "hash", "weights", "sampler", "precision", "device",
             "torch")
    return {key: value if key in names else json.loads(value) for key, value in chunks.items()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()} - {"run.lock"}


def test_facts_agree_everywhere_and_redraw_the_picture(draw, checkpoint):
    draw("--samples", 2, "--classes", "cat,9", "--seed", 9999, "--sampler", "ddim", "--steps", 6,
         "--sample.eta", 0.5, "--guidance", 1.5, "--sample.guidance_interval", "0,0.8",
         "--sample.clip_x_start", "false")
    wanted = {"cat_9999.png", "truck_9999.png", "cat_10000.png", "truck_10000.png"}
    assert names(OUT) == wanted | {"grid.png", "samples.json"}
    facts = json.loads((OUT / "samples.json").read_text())
    pictures = facts.pop("pictures")
    expected = {
        "checkpoint": str(checkpoint), "hash": file_hash(checkpoint), "step": 12,
        "images_seen": 120, "weights": "EMA", "sampler": "ddim", "num_inference_steps": 6,
        "eta": 0.5, "guidance_scale": 1.5, "guidance_interval": [0, 0.8],
        "clip_x_start": False, "image_size": 16, "precision": "fp32", "device": "cpu",
        "torch": torch.__version__,
        "classes": ["cat", "truck"], "seeds": [9999, 10000],
    }
    assert facts == expected == text(OUT / "grid.png")
    del facts["classes"], facts["seeds"]
    assert {picture["file"] for picture in pictures} == wanted
    for picture in pictures:
        assert text(OUT / picture["file"]) == {**picture, **facts}

    # What one file says about itself is enough to draw it again, alone.
    known = text(OUT / "truck_10000.png")
    draw("--samples", 1, "--classes", known["class"], "--seed", known["seed"],
         "--sampler", known["sampler"], "--steps", known["num_inference_steps"],
         "--sample.eta", known["eta"], "--guidance", known["guidance_scale"],
         "--sample.guidance_interval", ",".join(map(str, known["guidance_interval"])),
         "--sample.clip_x_start", str(known["clip_x_start"]), "--output", "again")
    # (a level, from float rounding in other batch shapes)
    assert abs(pixels(OUT / "truck_10000.png") - pixels("again/truck_10000.png")).max() <= 1
    assert abs(pixels(OUT / "truck_10000.png") - pixels(OUT / "truck_9999.png")).max() > 1


def test_settings_left_out_are_the_checkpoints(draw):
    draw("--samples", 1, "--classes", "dog")
    facts = text(OUT / "dog_0000.png")
    assert facts["sampler"] == "ddpm" and facts["num_inference_steps"] == 5
    assert "eta" not in facts, "it means nothing to ddpm"
    draw("--samples", 1, "--classes", "dog", "--raw", "--output", "raw")
    assert text("raw/dog_0000.png")["weights"] == "raw"
    assert abs(pixels("raw/dog_0000.png") - pixels(OUT / "dog_0000.png")).max() > 1


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver++"])
def test_batch_size_does_not_change_pictures(draw, sampler):
    for size in (1, 4, 100):
        said = draw("--samples", 2, "--classes", "0,1,2", "--sampler", sampler, "--guidance", 2,
                    "--batch-size", size, "--output", f"by_{size}")
        assert f"{size} at a time" in said
        for path in Path("by_1").glob("*.png"):
            assert abs(pixels(path) - pixels(f"by_{size}/{path.name}")).max() <= 1


def test_batch_size_is_chosen_only_where_none_is_given(draw, monkeypatch):
    def chosen(trial, size, device):
        trial(2)
        assert size == 16 * 16 and device.type == "cpu"
        return 3

    monkeypatch.setattr(drawing, "fitting_batch_size", chosen)
    assert "3 at a time" in draw("--samples", 1, "--guidance", 2)
    assert "5 at a time" in draw("--samples", 1, "--batch-size", 5)
    assert "3 at a time" in draw("--samples", 1, "--batch-size", "auto")


@pytest.mark.parametrize(
    "free, per_picture, expected",
    [(10 * GIB, 50 * 2**20, 163), (10 * GIB, 2 * GIB, 4), (GIB // 8, GIB, 1),
     (100 * GIB, 2**20, memory.LARGEST_BATCH)],
)
def test_cuda_batch_takes_its_share_of_free_memory(monkeypatch, free, per_picture, expected):
    """Library memory (300 MiB, once) and the trial's own cached blocks must not count."""
    state = {"used": GIB, "peak": 0, "cached": 0}

    def trial(count):
        libraries = 300 * 2**20 if state["used"] == GIB else 0
        state["used"] += libraries
        if count > 1 and count * per_picture > free:
            raise torch.OutOfMemoryError("out of memory")
        state["peak"] = max(state["peak"], state["used"] + count * per_picture)
        state["cached"] = count * per_picture

    fakes = {
        "memory_allocated": lambda device: state["used"],
        "max_memory_allocated": lambda device: state["peak"],
        "reset_peak_memory_stats": lambda device: state.update(peak=state["used"]),
        "empty_cache": lambda: state.update(cached=0),
        "mem_get_info": lambda device: (free - state["cached"], 200 * GIB),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert fitting_batch_size(trial, 128**2, torch.device("cuda")) == expected


@pytest.mark.parametrize(
    "available, size, expected",
    [(64 * GIB, 128, 16), (64 * GIB, 32, 256), (64 * GIB, 8, 256), (GIB // 4, 128, 3), (1, 128, 1)],
)
def test_cpu_batch_is_bounded_by_available_memory(monkeypatch, available, size, expected):
    monkeypatch.setattr(memory, "available_cpu_memory", lambda: available)
    assert fitting_batch_size(None, size**2, torch.device("cpu")) == expected


def test_available_memory_is_known():
    assert 2**20 < memory.available_cpu_memory() < 2**50


class Bar:
    """Stands for a progress bar and holds it to its total."""

    latest: "Bar"

    def __init__(self, *, total, **_):
        self.n, self.total = 0, total
        Bar.latest = self

    def update(self, amount):
        self.n += amount
        assert -1e-6 < self.n < self.total + 1e-6

    def close(self):
        assert self.n == pytest.approx(self.total)


def test_memory_that_runs_out_changes_neither_pictures_nor_the_bar(draw, monkeypatch):
    flags = ["--samples", 1, "--trajectory", "--guidance", 2]
    draw(*flags, "--output", "whole")
    forward, calls = UNet.forward, []

    def limited(self, x_t, *rest):
        calls.append(len(x_t))
        if len(calls) > 3 and len(x_t) > 2 * 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, x_t, *rest)

    monkeypatch.setattr(UNet, "forward", limited)
    monkeypatch.setattr(generate_samples, "tqdm", Bar)
    draw(*flags, "--batch-size", 7, "--output", "parts")
    assert calls[:5] == [14, 14, 14, 14, 6] and Bar.latest.n == pytest.approx(10)
    assert names(Path("whole")) == names(Path("parts"))
    for path in Path("whole").glob("*.png"):
        assert abs(pixels(path) - pixels(f"parts/{path.name}")).max() <= 1, path


def test_bar_is_silent_where_there_is_no_terminal(draw):
    assert len(draw("--samples", 1).splitlines()) == 2


def test_interruption_keeps_what_is_finished(call, checkpoint, monkeypatch):
    forward, calls = UNet.forward, []

    def interrupted(self, *inputs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(self, *inputs)

    monkeypatch.setattr(UNet, "forward", interrupted)
    status, _ = call(generate_samples, checkpoint, "--samples", 1, "--batch-size", 4)
    assert status == 130
    assert names(OUT) == {f"{name}_0000.png" for name in CLASS_NAMES[:4]}


def test_trajectory_goes_from_noise_to_the_pictures(draw, monkeypatch):
    states, on_step = {}, generate_samples.Album.on_step

    def noting(album, done, x_t, x_start):
        states.setdefault(done, (to_arrays(x_t[:2]).copy(), to_arrays(x_start[:2]).copy()))
        on_step(album, done, x_t, x_start)

    monkeypatch.setattr(generate_samples.Album, "on_step", noting)
    said = draw("--samples", 2, "--classes", "frog,cat", "--seed", 3, "--steps", 32,
                "--trajectory", "--grid-only")
    assert "trajectory.gif" in said
    assert names(OUT) == {"grid.png", "samples.json", "trajectory.png", "trajectory.gif"}
    assert all("file" not in p for p in json.loads((OUT / "samples.json").read_text())["pictures"])
    draw("--samples", 1, "--classes", "frog,cat", "--seed", 3, "--steps", 32, "--output", "alone")

    side = 64  # of the enlarged pictures, 4 pixels apart
    strip, facts = pixels(OUT / "trajectory.png"), text(OUT / "trajectory.png")
    assert strip.shape[1] > 17 * (side + 4)  # 8 states, a gap, 8 predictions
    assert facts["seeds"] == [3] and facts["classes"] == ["frog", "cat"]
    last_x_start = strip.shape[1] - (side + 4)
    last_x_t = last_x_start - 9 * (side + 4)
    for row, name in enumerate(facts["classes"]):
        top = strip.shape[0] - (2 - row) * (side + 4)
        picture = pixels(f"alone/{name}_0003.png").repeat(4, axis=0).repeat(4, axis=1)
        for left in (last_x_t, last_x_start):  # the last step ends at its prediction
            assert abs(strip[top : top + side, left : left + side] - picture).max() <= 1
        for expected, last in zip(states[1], (last_x_t, last_x_start)):
            first = strip[top : top + side, last - 7 * (side + 4) :][:, :side]
            expected = expected[row].astype(int).repeat(4, axis=0).repeat(4, axis=1)
            assert abs(first - expected).max() <= 1 and abs(first - picture).max() > 30
    assert abs(states[1][0].astype(int) - states[1][1]).max() > 30

    with Image.open(OUT / "trajectory.gif") as animation:
        assert animation.n_frames == 30 and animation.info["loop"] == 0
        assert animation.width > 2 * (side + 4) and animation.height > 2 * (side + 4)
        assert json.loads(animation.info["comment"])["classes"] == ["frog", "cat"]
        ordinary = animation.info["duration"]
        animation.seek(29)
        assert animation.info["duration"] > 5 * ordinary


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_trajectory_of_few_steps(draw, steps):
    draw("--samples", 1, "--classes", "0", "--steps", steps, "--trajectory")
    with Image.open(OUT / "trajectory.gif") as animation:
        assert animation.n_frames == steps


def test_a_class_whose_name_begins_like_another_ones_is_moved_aside_once(tmp_path):
    for name in ("boeing_0000.png", "boeing_747_0000.png", "mine.png"):
        (tmp_path / name).touch()
    generate_samples.set_aside(tmp_path, ("boeing", "boeing_747"))
    assert {path.name for path in tmp_path.iterdir()} == {"earlier_1", "mine.png"}
    assert len(list((tmp_path / "earlier_1").iterdir())) == 2


def test_earlier_pictures_are_moved_aside_not_lost(draw):
    draw("--samples", 1, "--classes", "cat,dog")
    earlier = {name: (OUT / name).read_bytes() for name in names(OUT)}
    (OUT / "cat_drawing.png").write_text("the user's own")
    for number in (1, 2):
        said = draw("--samples", 1, "--classes", "cat", "--guidance", 3)
        assert f"moved to {OUT / f'earlier_{number}'}" in said
        assert names(OUT) == {"cat_0000.png", "grid.png", "samples.json", "cat_drawing.png"}
    assert {p.name: p.read_bytes() for p in (OUT / "earlier_1").iterdir()} == earlier
    assert names(OUT / "earlier_2") == {"cat_0000.png", "grid.png", "samples.json"}


def test_long_grids_end(draw, monkeypatch):
    monkeypatch.setattr(generate_samples, "GRID_ROWS", 2)
    draw("--samples", 3, "--classes", "cat")
    assert text(OUT / "grid.png")["seeds"] == [0, 1]
    assert json.loads((OUT / "samples.json").read_text())["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["no usable checkpoint", "make demo"]),
        (["nowhere.pt"], ["nowhere.pt does not exist"]),
        (["--samples", "0"], ["--samples", "from 1 to"]),
        (["--samples", "10001"], ["--samples", "from 1 to 10000"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", "x"], ["--seed", "whole number"]),
        (["--seed", str(2**63 - 1)], ["--seed", str(2**63 - 4)]),
        (["--sample", "3"], ["--sample", "--samples"]),
    ],
)
def test_bad_input_is_refused(call, arguments, words):
    status, said = call(generate_samples, *arguments)
    assert status in (1, 2)
    assert_one_sentence(said, *words)
    assert not OUT.exists()


def test_unusable_checkpoints_and_settings_are_refused(call):
    good = make_checkpoint("run")
    Path("half.pt").write_bytes(good.read_bytes()[:5000])
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    Path("empty").mkdir()
    for arguments, words in [
        (["half.pt"], ["half.pt is damaged"]),
        (["other.pt"], ["other.pt is a torch file, but not a checkpoint"]),
        (["empty"], ["no usable checkpoint in empty/"]),
        ([good, "--classes", "cat,dgo"], ["'dgo'", "'dog'"]),
        ([good, "--classes", "12"], ["'12'", "0..9"]),
        ([good, "--classes", ","], ["no class given"]),
        ([good, "--guidance", "3"], ["guidance", "null label"]),
        ([good, "--steps", "51"], ["50 diffusion timesteps"]),
        ([good, "--steps", "0"], ["num_inference_steps", "at least 1"]),
        ([good, "--sampler", "dimm"], ["'dimm'", "'ddim'"]),
        ([good, "--sample.eta", "2"], ["sample.eta", "at most 1"]),
        ([good, "--batch-size", "0"], ["batch_size", "at least 1"]),
        ([good, "--output", good], [f"--output {good} is a file"]),
        ([good, "--output", good / "below"], ["below"]),
        ([good, "--output", "/proc/below"], ["/proc/below"]),
    ]:
        status, said = call(generate_samples, *arguments)
        assert status == 1, said
        assert_one_sentence(said, *words)
    assert not OUT.exists()


def test_folder_that_refuses_files_is_found_out_before_drawing(call, checkpoint, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(drawing.tempfile, "TemporaryFile", refuse)
    status, said = call(generate_samples, checkpoint)
    assert status == 1 and "drawing" not in said
    assert_one_sentence(said, "generated_images", "Permission denied")


@pytest.mark.parametrize("raw, part", [(True, "model"), (False, "ema")])
def test_raw_weights_and_their_average_are_those_of_the_file(own_directory, raw, part):
    path = make_checkpoint("run")
    state = torch.load(path, weights_only=True)
    assert any(not torch.equal(state["model"][name], state["ema"][name]) for name in state["ema"])
    overrides = {"train.device": "cpu", "sample.batch_size": 1}
    drawn = drawing.Drawing(str(path), overrides, raw=raw)
    assert_identical(drawn.model.state_dict(), state[part])


@pytest.mark.parametrize(
    "quick, overrides, expected",
    [
        (False, {}, ("ddpm", 5)),
        (True, {}, ("sde-dpm-solver++", 3)),
        (True, {"sample.num_inference_steps": 4}, ("sde-dpm-solver++", 4)),
        (True, {"sample.sampler": "ddim"}, ("ddim", 3)),
    ],
)
def test_quick_drawing_takes_sampler_and_steps_of_grids(own_directory, quick, overrides, expected):
    overrides = {"train.device": "cpu", "sample.batch_size": 1, **overrides}
    facts = drawing.Drawing(str(make_checkpoint("run")), overrides, quick=quick).facts()
    assert (facts["sampler"], facts["num_inference_steps"]) == expected


def test_hash_is_the_beginning_of_sha256sum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea"
