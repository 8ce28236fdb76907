"""The files of a run directory: records, locks, and what stops them being written."""

import fcntl
import os

import pytest

from run_directory import (
    RunInUse,
    acquire_lock,
    append_record,
    claim,
    naming,
    read_records,
    replacing,
)


def test_a_record_survives_the_one_before_that_was_cut_short(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"b":')
    append_record(path, {"c": 2})
    append_record(path, {"d": 3})
    assert read_records(path) == [{"a": 1}, {"c": 2}, {"d": 3}]
    assert path.read_text().count("\n") == 4


def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """As `make clean` does between our opening and our locking it."""
    path, flock, taken = tmp_path / "run.lock", fcntl.flock, []

    def late(lock, how):
        if not taken:
            path.unlink()
            path.touch()
        taken.append(flock(lock, how))

    monkeypatch.setattr(fcntl, "flock", late)
    with acquire_lock(tmp_path) as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), path.stat()) and len(taken) == 2


def test_what_a_full_disk_stops_is_named(tmp_path):
    path = tmp_path / "picture.png"
    for writing in (naming, replacing):
        with pytest.raises(OSError) as failure, writing(path), open("/dev/full", "w") as full:
            full.write("x")
        assert failure.value.filename == str(path)
    with pytest.raises(OSError, match="^8 written$"), naming(path):
        raise OSError("8 written")
    with pytest.raises(OSError) as failure, naming(path):
        open(tmp_path / "absent")
    assert failure.value.filename == str(tmp_path / "absent"), "which named itself"


def test_a_run_directory_on_a_disk_that_is_not_mounted_is_named(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.symlink_to(tmp_path / "disk" / "runs")
    with pytest.raises(RunInUse, match="disk/runs, which is not there"):
        claim(folder)
