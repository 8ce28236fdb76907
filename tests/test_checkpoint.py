"""Checkpoints: complete or absent, refused with a sentence, never executed."""

import errno
import io
import math
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import assert_identical

from conditional_diffusion import checkpoint
from conditional_diffusion.checkpoint import (
    CheckpointError,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    require_classes,
    require_weights,
    save_checkpoint,
)


def state(step: int = 7) -> dict:
    """Made-up contents with every kind of value that a run stores."""
    generator = torch.Generator().manual_seed(step)
    weights = {"out.weight": torch.randn(4, 3, generator=generator)}
    return {
        "config": {"mode": "full", "model": {"channel_mult": [1, 2]}, "train": {"seed": 0}},
        "class_names": ["cat", "dog"],
        "step": step,
        "images_seen": 100 * step,
        "model": weights,
        "ema": {"out.weight": weights["out.weight"] / 2},
        "optimizers": [{
            "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(4, 3)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0]}],
        }],
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(path: Path) -> str:
    """The message of the refusal, which has to name the file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_round_trip_returns_every_value_bit_for_bit(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "folder", state(), keep=3)
    assert path == tmp_path / "new" / "folder" / "checkpoint_00000007.pt"
    loaded = load_checkpoint(path)
    assert_identical({key: loaded[key] for key in state()}, state())
    assert loaded["torch"] == str(torch.__version__)
    assert names(path.parent) == [path.name]


def test_saving_the_same_step_again_replaces_the_file(tmp_path):
    save_checkpoint(tmp_path, state(), keep=3)
    path = save_checkpoint(tmp_path, {**state(), "images_seen": 1}, keep=3)
    assert load_checkpoint(path)["images_seen"] == 1
    assert names(tmp_path) == [path.name]


def test_keep_prunes_the_oldest_and_nothing_else(tmp_path):
    for other in ("checkpoint_best.pt", "notes.txt", "checkpoint_00000001.pt.bak"):
        (tmp_path / other).write_text("mine")
    for step in (1, 2, 30, 4):
        save_checkpoint(tmp_path, state(step), keep=3)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, s) for s in (2, 4, 30)]
    assert {"checkpoint_best.pt", "notes.txt", "checkpoint_00000001.pt.bak"} <= set(names(tmp_path))


def test_the_checkpoint_just_written_is_never_the_one_pruned(tmp_path):
    """A later but damaged file outnumbers it when a run has resumed from an older one."""
    checkpoint_path(tmp_path, 30).write_bytes(b"damaged")
    path = save_checkpoint(tmp_path, state(20), keep=1)
    assert load_checkpoint(path)["step"] == 20


def test_list_is_by_step_and_an_absent_folder_has_none(tmp_path):
    for step in (100, 9, 20_000):
        checkpoint_path(tmp_path, step).touch()
    checkpoint_path(tmp_path, 8).with_suffix(".tmp").touch()
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, s) for s in (9, 100, 20_000)]
    (tmp_path / "best.pt").touch()  # the last resort
    assert list_checkpoints(tmp_path)[0] == tmp_path / "best.pt"
    assert list_checkpoints(tmp_path / "absent") == []


def test_a_folder_that_is_closed_to_us_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", closed)
    with pytest.raises(PermissionError):
        list_checkpoints(tmp_path)


# Writing


def fail_half_way(error: BaseException):
    def save(contents, file):
        file.write(b"half a checkpoint")
        raise error

    return save


def assert_old_one_intact(folder: Path):
    assert names(folder) == ["checkpoint_00000001.pt"]
    assert_identical(load_checkpoint(checkpoint_path(folder, 1))["model"], state(1)["model"])


@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_a_write_that_fails_half_way_leaves_the_old_checkpoint(tmp_path, monkeypatch, step):
    save_checkpoint(tmp_path, state(1), keep=1)
    monkeypatch.setattr(torch, "save", fail_half_way(RuntimeError("unexpected pos 64 vs 0")))
    with pytest.raises(CheckpointError, match="unexpected pos") as caught:
        save_checkpoint(tmp_path, state(step), keep=1)
    assert str(checkpoint_path(tmp_path, step)) in str(caught.value)
    assert_old_one_intact(tmp_path)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), keep=1)
    monkeypatch.setattr(torch, "save", fail_half_way(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(2), keep=1)
    assert_old_one_intact(tmp_path)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def chained_full_disk() -> RuntimeError:
    """As torch.save reports it: a RuntimeError raised while the OSError was handled."""
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    error.__context__ = full_disk()
    return error


@pytest.mark.parametrize("error", [full_disk, chained_full_disk])
def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path, state(1), keep=1)
    monkeypatch.setattr(torch, "save", fail_half_way(error()))
    with pytest.raises(CheckpointError, match="full") as caught:
        save_checkpoint(tmp_path, state(2), keep=1)
    assert str(checkpoint_path(tmp_path, 2)) in str(caught.value)
    assert_old_one_intact(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_named(tmp_path):
    """/dev/full refuses every byte with ENOSPC, through all of torch's own error handling."""
    save_checkpoint(tmp_path, state(1), keep=1)
    checkpoint_path(tmp_path, 2).with_suffix(".tmp").symlink_to("/dev/full")
    large = {**state(2), "model": {"weight": torch.zeros(1 << 20)}}
    with pytest.raises(CheckpointError, match="full"):
        save_checkpoint(tmp_path, large, keep=1)
    assert_old_one_intact(tmp_path)


def test_a_full_disk_is_named_even_where_the_folder_could_not_be_made(tmp_path, monkeypatch):
    def mkdir(*args, **options):
        raise full_disk()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(CheckpointError, match="full"):
        save_checkpoint(tmp_path / "new", state(), keep=1)


def test_a_file_in_place_of_the_folder_is_reported(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.write_text("a file")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, state(), keep=1)
    assert str(folder) in str(caught.value)
    assert folder.read_text() == "a file"


# Reading


def test_missing_file_and_directory_are_refused(tmp_path):
    assert "does not exist or is not a file" in refusal(tmp_path / "absent.pt")
    folder = tmp_path / "checkpoint_00000001.pt"
    folder.mkdir()
    assert "does not exist or is not a file" in refusal(folder)


def test_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    path = checkpoint.save_checkpoint(tmp_path, state(1), keep=1)

    def run_out(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(torch, "load", run_out)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_checkpoint(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, state(), keep=1)
    contents = path.read_bytes()
    for length in [*range(0, len(contents), 97), len(contents) - 1]:
        path.write_bytes(contents[:length])
        assert "damaged" in refusal(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes_are_refused_whatever_they_start_with(tmp_path):
    """The first byte selects a code path of the unpickler, each with its own way of failing."""
    generator, path, escaped = random.Random(0), tmp_path / "checkpoint_00000001.pt", {}
    for first in range(256):
        for length in (0, 60):
            path.write_bytes(bytes([first]) + generator.randbytes(length))
            try:
                load_checkpoint(path)
                escaped[first, length] = "loaded"
            except CheckpointError as error:
                assert str(path) in str(error)
            except Exception as error:
                escaped[first, length] = repr(error)
    assert escaped == {}


def test_a_text_file_and_a_page_of_zeros_are_refused(tmp_path):
    path = tmp_path / "checkpoint_00000001.pt"
    for contents in (b"<!DOCTYPE html>\n<html>", bytes(4096), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(contents)
        assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    "contents",
    [{"state_dict": {}}, {"format": "other", "version": 1}, {}, torch.zeros(3), [1, 2], 5],
    ids=["other dict", "other format", "empty dict", "tensor", "list", "number"],
)
def test_a_torch_file_of_something_else_is_refused(tmp_path, contents):
    path = tmp_path / "other.pt"
    torch.save(contents, path)
    assert "not a checkpoint of this program" in refusal(path)


@pytest.mark.parametrize(
    "version", [0, 1, checkpoint.FORMAT_VERSION - 1, checkpoint.FORMAT_VERSION + 1, "5"]
)
def test_another_format_version_is_refused_by_number(tmp_path, version):
    path = tmp_path / "checkpoint_00000001.pt"
    torch.save({**state(), "format": checkpoint.FORMAT, "version": version}, path)
    assert f"version {version}" in refusal(path)


@pytest.mark.parametrize(
    "lost",
    ["config", "class_names", "step", "images_seen", "model", "ema", "optimizers", "version"],
)
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, lost):
    path = save_checkpoint(tmp_path, state(), keep=1)
    contents = torch.load(path, weights_only=True)
    del contents[lost]
    torch.save(contents, path)
    assert lost in refusal(path)


class Malicious:
    """Unpickled, it would make a directory."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch file", "bare pickle"])
def test_code_in_a_file_is_not_executed(tmp_path, kind):
    path, trace = tmp_path / "checkpoint_00000001.pt", tmp_path / "executed"
    contents = {**state(), "format": checkpoint.FORMAT, "version": checkpoint.FORMAT_VERSION,
                "extra": Malicious(trace)}
    buffer = io.BytesIO()
    if kind == "torch file":
        torch.save(contents, buffer)
    else:
        pickle.dump({"extra": Malicious(trace)}, buffer)
    path.write_bytes(buffer.getvalue())
    refusal(path)
    assert not trace.exists()
    # The trap is a real one: an unguarded load springs it.
    if kind == "torch file":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(buffer.getvalue())
    assert trace.exists()


# Finding


def test_newest_is_the_highest_step_of_the_first_folder_that_has_one(tmp_path):
    full, overfit, absent = tmp_path / "full", tmp_path / "overfit", tmp_path / "absent"
    for folder, step in [(full, 5), (full, 12), (overfit, 900)]:
        save_checkpoint(folder, state(step), keep=3)
    warnings = []
    path, loaded = load_newest([absent, full, overfit], warn=warnings.append)
    assert (path, loaded["step"]) == (checkpoint_path(full, 12), 12)
    assert load_newest([overfit, full], warn=warnings.append)[1]["step"] == 900
    assert warnings == []


def test_a_damaged_newest_is_passed_over_with_a_warning(tmp_path):
    for step in (1, 2, 3):
        path = save_checkpoint(tmp_path, state(step), keep=3)
    path.write_bytes(path.read_bytes()[:-100])
    warnings = []
    path, loaded = load_newest([tmp_path], warn=warnings.append)
    assert (path, loaded["step"]) == (checkpoint_path(tmp_path, 2), 2)
    assert len(warnings) == 1 and str(checkpoint_path(tmp_path, 3)) in warnings[0]


def test_a_folder_with_only_damaged_ones_gives_way_to_the_next(tmp_path):
    full, overfit = tmp_path / "full", tmp_path / "overfit"
    save_checkpoint(full, state(5), keep=1).write_bytes(b"")
    save_checkpoint(overfit, state(2), keep=1)
    warnings = []
    path, _ = load_newest([full, overfit], warn=warnings.append)
    assert path == checkpoint_path(overfit, 2)
    assert len(warnings) == 1 and str(checkpoint_path(full, 5)) in warnings[0]


def test_no_checkpoint_anywhere_is_none(tmp_path):
    warnings = []
    (tmp_path / "empty").mkdir()
    assert load_newest([tmp_path / "absent", tmp_path / "empty"], warn=warnings.append) is None
    assert load_newest([], warn=warnings.append) is None
    assert warnings == []


def test_no_cut_or_flipped_byte_ever_loads_other_values(tmp_path):
    """Fifty lengths and fifty flips: a refusal, or exactly what was written."""
    original = state(3)
    path = save_checkpoint(tmp_path, original, keep=1)
    content, chance = path.read_bytes(), random.Random(0)
    damaged = [content[: chance.randrange(len(content))] for _ in range(50)]
    for _ in range(50):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for candidate in damaged:
        path.write_bytes(candidate)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # a byte between the records, which nothing reads
            for key in original:
                assert_identical(loaded[key], original[key])
    assert refused >= 50


def test_best_is_kept_when_the_newest_push_it_out(tmp_path):
    save_checkpoint(tmp_path, state(1), keep=1, best=True)
    save_checkpoint(tmp_path, state(2), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "checkpoint_00000002.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1
    save_checkpoint(tmp_path, state(3), keep=1, best=True)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 3


def test_best_is_a_copy_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def hardlink_to(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    path = save_checkpoint(tmp_path, state(1), keep=1, best=True)
    assert (tmp_path / "best.pt").read_bytes() == path.read_bytes()
    assert names(tmp_path) == ["best.pt", "checkpoint_00000001.pt"]


def test_a_write_that_the_disk_garbles_is_noticed_before_the_old_one_goes(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), keep=1)
    write = torch.save

    def garble(contents, file):
        write(contents, file)
        file.seek(file.tell() // 2)
        file.write(b"garbled" * 20)

    monkeypatch.setattr(torch, "save", garble)
    with pytest.raises(CheckpointError, match="checkpoint_00000002.pt"):
        save_checkpoint(tmp_path, state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000001.pt"]
    assert load_checkpoint(tmp_path / "checkpoint_00000001.pt")["step"] == 1


def test_space_is_looked_at_before_every_write(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), keep=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)  # bytes; the tensors take more
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(torch, "save", lambda *arguments: pytest.fail("began to write"))
    with pytest.raises(CheckpointError, match="MiB free, but a checkpoint needs"):
        save_checkpoint(tmp_path, state(2), keep=1)
    assert_old_one_intact(tmp_path)


@pytest.mark.parametrize("part", ["model", "ema", "optimizers"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_never_saved(tmp_path, part, value):
    save_checkpoint(tmp_path, state(1), keep=1, best=True)
    poisoned = state(2)
    moments = poisoned["optimizers"][0]["state"][0]["exp_avg"]
    (moments if part == "optimizers" else poisoned[part]["out.weight"])[1, 2] = value
    with pytest.raises(CheckpointError, match=f"step 2 is not saved.*{part}.*not finite"):
        save_checkpoint(tmp_path, poisoned, keep=1, best=True)
    assert names(tmp_path) == ["best.pt", "checkpoint_00000001.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1


def test_the_order_of_classes_counts():
    with pytest.raises(CheckpointError, match="in this order"):
        require_classes(Path("x.pt"), ("cat", "dog"), ("dog", "cat"))


def test_weights_of_another_shape_are_refused():
    model = torch.nn.Linear(2, 3)
    require_weights("x", model.state_dict(), model)
    with pytest.raises(CheckpointError, match="weight"):
        require_weights("x", torch.nn.Linear(4, 3).state_dict(), model)


@pytest.mark.parametrize("links", [True, False])
def test_names_follow_contents_to_the_disk(tmp_path, monkeypatch, links):
    """With links best.pt is the file that is on the disk already."""
    events, sizes, fsync, replace = [], [], os.fsync, os.replace

    def traced_fsync(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        kind = "folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file"
        events.append(f"fsync {kind}")
        fsync(descriptor)

    def traced_replace(old, new):
        events.append(f"replace {Path(new).name}")
        assert_identical(load_checkpoint(Path(old))["model"], state()["model"])  # complete
        replace(old, new)

    def no_links(self, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    before = len(os.listdir("/proc/self/fd"))
    path = save_checkpoint(tmp_path, state(), keep=1, best=True)
    # The best first: a checkpoint that knows of its loss may not exist without it.
    assert events == ["fsync file", *([] if links else ["fsync file"]), "replace best.pt",
                      f"replace {path.name}", "fsync folder"]
    assert set(sizes[:-1]) == {path.stat().st_size}  # torch.save flushes what it wrote
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_member_that_claims_to_be_compressed_is_damage(tmp_path):
    path = save_checkpoint(tmp_path, state(), keep=1)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the central directory; its method is 10 bytes on
    while b"/data/" not in content[entry + 46 : entry + 120]:
        entry = content.index(b"PK\x01\x02", entry + 1)
    assert content[entry + 10] == zipfile.ZIP_STORED
    content[entry + 10] = zipfile.ZIP_DEFLATED
    path.write_bytes(content)
    refusal(path)


def test_best_is_never_older_than_what_a_checkpoint_says(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(tmp_path, state(step=1), keep=2, best=True)
    monkeypatch.setattr(Path, "hardlink_to", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_checkpoint(tmp_path, state(step=2), keep=2, best=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "best.pt", "checkpoint_00000001.pt",
    ]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))
