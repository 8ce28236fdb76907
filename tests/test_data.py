"""Data: where it is found, what is refused, how it is prepared and batched."""

import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.testing import assert_close

import cifar10
import data
from cifar10 import DataError
from config import CLASS_NAMES, DataConfig
from data import Split, TrainingBatches
from pictograms import PICTOGRAMS, pictogram_dataset

REAL_DATA = os.environ.get("TEST_DATA_DIR", "")
CONFIG = DataConfig(image_size=16)


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Prepared data land in a directory of the test's own; the search path is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "SEARCH_PATH", (Path("data/cifar10-128x128"),))


SEARCH_PATH = cifar10.SEARCH_PATH  # before any test replaces it


def png(color, size=(8, 8), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + checksum + b"\0\0\x10\0IDAT"


def nothing_prepared(folder: Path) -> bool:
    return [path.name for path in (folder / "data" / "prepared").iterdir()] == ["run.lock"]


def shade(split: str, label: int, index: int) -> tuple[int, int, int]:
    """A colour that says which picture it is."""
    return (label * 20, index * 10, 200 if split == "test" else 50)


def class_tree(folder_name=lambda label: CLASS_NAMES[label], counts=(("train", 3), ("test", 1))):
    """{relative path: content} of a small, complete source."""
    return {
        f"{split}/{folder_name(label)}/picture {index}.png".lstrip("/"): png(
            shade(split, label, index)
        )
        for split, count in counts
        for label in range(10)
        for index in range(count)
    }


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def load(say=None, **changes) -> tuple[dict[str, Split], list[str]]:
    said: list[str] = []
    config = replace(CONFIG, **changes)
    splits = data.load_splits(
        config, seed=0, progress=lambda items, total, what: items, say=say or said.append
    )
    return splits, said


def load_twice(waiting: threading.Event, **changes) -> list[dict[str, Split]]:
    """Two at once; one of them sets the event when it waits for the other."""
    def say(line: str) -> None:
        if line.endswith("waiting for it"):
            waiting.set()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda _: load(say, **changes)[0], range(2)))


def expected(split: str, count: int) -> np.ndarray:
    return np.array([shade(split, label, i) for label in range(10) for i in range(count)])


def assert_small_source(splits):
    for split, count in (("train", 3), ("test", 1)):
        assert splits[split].images.shape == (10 * count, 3, 8, 8)
        assert splits[split].labels.tolist() == [c for c in range(10) for _ in range(count)]
        np.testing.assert_array_equal(splits[split].images[:, :, 3, 4], expected(split, count))


def test_folders_named_by_class(tmp_path):
    splits, said = load(data_dir=str(write_tree(tmp_path / "pictures", class_tree())))
    assert_small_source(splits)
    assert any("train 30 pictures: airplane 3, automobile 3" in line for line in said)


def test_folders_named_by_index(tmp_path):
    source = write_tree(tmp_path / "pictures", class_tree("class{}".format))
    assert_small_source(load(data_dir=str(source))[0])


def test_zip_file_and_folder_of_zips(tmp_path):
    files = class_tree()
    whole = write_zip(tmp_path / "one" / "all.zip", files)
    assert_small_source(load(data_dir=str(whole))[0])
    for split in ("train", "test"):
        part = {name: content for name, content in files.items() if name.startswith(split)}
        ending = {"train": "zip", "test": "ZIP"}[split]
        write_zip(tmp_path / "parts" / f"{split}.{ending}", part)
    assert_small_source(load(data_dir=str(tmp_path / "parts"))[0])


def test_without_a_split_one_in_ten_is_held_out(tmp_path):
    source = write_tree(tmp_path / "pictures", class_tree(counts=(("", 20),)))
    splits, _ = load(data_dir=str(source))
    assert (len(splits["train"]), len(splits["test"])) == (180, 20)
    assert torch.bincount(splits["test"].labels).tolist() == [2] * 10


def test_search_begins_where_the_first_user_keeps_the_data_and_ends_with_the_archive(monkeypatch):
    assert [str(place) for place in SEARCH_PATH] == [
        "/home/azureuser/Diffusion/data/cifar10-128x128", "data/cifar10-128x128"]
    monkeypatch.setattr(cifar10, "SEARCH_PATH", (Path("first"), Path("second")))
    archive = "data/cifar-10-python.tar.gz"
    for file, found in ((archive, archive), ("second/a.png", "second"), ("first/a.png", "first")):
        Path(file).parent.mkdir()
        Path(file).touch()
        assert cifar10.find_source("") == Path(found)


def test_search_path_is_used_and_data_dir_wins(tmp_path):
    files = class_tree()
    write_tree(tmp_path / "data" / "cifar10-128x128", files)
    assert_small_source(load()[0])
    other = write_tree(tmp_path / "other", class_tree(counts=(("train", 2), ("test", 1))))
    assert len(load(data_dir=str(other))[0]["train"]) == 20


def test_prepared_once_and_again_when_the_source_changes(tmp_path, monkeypatch):
    source = write_tree(tmp_path / "pictures", class_tree())
    load(data_dir=str(source))
    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "decode", None)  # a second preparation would need it
        splits, said = load(data_dir=str(source))
    assert_small_source(splits)
    assert "prepared in" in said[0]
    (source / "train" / "cat" / "new.png").write_bytes(png((1, 2, 3)))
    assert len(load(data_dir=str(source))[0]["train"]) == 31


@pytest.mark.parametrize("left", [0, 1000, None])
def test_prepared_data_that_were_damaged_are_named(tmp_path, left):
    source = write_tree(tmp_path / "pictures", class_tree())
    load(data_dir=str(source))
    (array,) = (tmp_path / "data" / "prepared").glob("*/train_images.npy")
    array.unlink() if left is None else os.truncate(array, left)
    with pytest.raises(DataError, match=f"{array.name} is damaged .*remove .*{array.parent.name}"):
        load(data_dir=str(source))


def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    source = write_tree(tmp_path / "pictures", class_tree())
    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "write_info", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(data_dir=str(source))
    assert nothing_prepared(tmp_path)
    assert_small_source(load(data_dir=str(source))[0])


def test_prepared_data_of_which_a_part_was_deleted_are_prepared_anew(tmp_path):
    source = write_tree(tmp_path / "pictures", class_tree())
    load(data_dir=str(source))
    (info,) = Path("data/prepared").glob("*/info.json")
    info.unlink()
    assert_small_source(load(data_dir=str(source))[0])
    assert info.exists()


@pytest.mark.parametrize("kind, name", [(np, "save"), (Path, "write_text")])
def test_a_disk_that_fills_up_while_preparing_is_named(tmp_path, monkeypatch, kind, name):
    source = write_tree(tmp_path / "pictures", class_tree())

    def full(file, array):
        raise OSError("3145728 requested and 8192 written")  # as numpy says it

    monkeypatch.setattr(kind, name, full)
    with pytest.raises(DataError, match="data/prepared/.* cannot be written .3145728 requested"):
        load(data_dir=str(source))
    assert nothing_prepared(Path())


def test_who_waits_for_a_preparation_whose_lock_is_removed_waits_for_the_next(monkeypatch):
    """As `make clean-all` removes it."""
    flock, taken = cifar10.fcntl.flock, []

    def late(lock, how):
        if not taken:
            cifar10.PREPARED.rename("data/removed")
        taken.append(flock(lock, how))

    monkeypatch.setattr(cifar10.fcntl, "flock", late)
    with cifar10.only_one(pytest.fail), open(cifar10.PREPARED / "run.lock") as lock:
        with pytest.raises(BlockingIOError):
            flock(lock, cifar10.fcntl.LOCK_EX | cifar10.fcntl.LOCK_NB)
    assert len(taken) == 2


def test_what_a_killed_preparation_left_goes_with_the_next(tmp_path):
    source = write_tree(tmp_path / "pictures", class_tree())
    left = tmp_path / "data" / "prepared" / ".unfinished"
    left.mkdir(parents=True)
    (left / "train_images.npy").write_bytes(b"half")
    assert_small_source(load(data_dir=str(source))[0])
    assert not left.exists()


def test_two_processes_prepare_once(tmp_path, monkeypatch):
    """The second waits for the first and takes what it made."""
    source = write_tree(tmp_path / "pictures", class_tree())
    calls, waiting, write_info = [], threading.Event(), cifar10.write_info

    def once_the_other_waits(*arguments):
        calls.append(arguments)
        assert waiting.wait(60)
        write_info(*arguments)

    monkeypatch.setattr(cifar10, "write_info", once_the_other_waits)
    for splits in load_twice(waiting, data_dir=str(source)):
        assert_small_source(splits)
    assert len(calls) == 1


def test_large_and_odd_pictures_become_squares_of_the_image_size(tmp_path):
    files = class_tree()
    # Cut to its central square, which is grey; the filter reaches three pixels beyond its edge.
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((90, 90, 90), (32, 0, 64, 32))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    files["train/cat/picture 0.png"] = buffer.getvalue()
    files["train/cat/picture 1.png"] = png(7, size=(64, 64), mode="L")
    splits, _ = load(data_dir=str(write_tree(tmp_path / "pictures", files)))
    cats = splits["train"].images[splits["train"].labels == CLASS_NAMES.index("cat")]
    assert cats.shape == (3, 3, 16, 16)
    assert (cats[0, :, 4:-4, 4:-4] == 90).all()
    assert (cats[1] == 7).all()


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_odd_modes_become_what_a_viewer_shows(tmp_path):
    files = class_tree()
    clear = Image.new("RGBA", (8, 8), (0, 255, 0, 0))  # green that nobody sees
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0] * 256)
    ramp = np.full((8, 8), 128 * 256, np.uint16)
    tall = Image.new("RGB", (8, 8), (10, 10, 10))
    tall.paste((200, 200, 200), (0, 0, 8, 4))  # light above, which the tag turns to the right
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files["train/cat/picture 0.png"] = encoded(clear)
    files["train/cat/picture 1.png"] = encoded(palette, transparency=0)
    files["train/cat/picture 2.png"] = encoded(Image.fromarray(ramp))
    files["train/cat/turned.png"] = encoded(tall, exif=exif)
    splits, _ = load(data_dir=str(write_tree(tmp_path / "pictures", files)))
    cats = splits["train"].images[splits["train"].labels == CLASS_NAMES.index("cat")]
    assert (cats[0] == 255).all() and (cats[1] == 255).all() and (cats[2] == 128).all()
    assert (cats[3, :, :, :4] == 10).all() and (cats[3, :, :, 4:] == 200).all()


def test_zips_named_by_split_and_folders_named_val(tmp_path):
    files = class_tree(counts=(("", 3),))
    for name in ("train.zip", "test.zip"):
        write_zip(tmp_path / "zips" / name, files)
    splits, _ = load(data_dir=str(tmp_path / "zips"))
    assert (len(splits["train"]), len(splits["test"])) == (30, 30)
    renamed = {name.replace("test/", "val/"): c for name, c in class_tree().items()}
    assert_small_source(load(data_dir=str(write_tree(tmp_path / "val", renamed)))[0])


def test_a_zip_beside_what_it_held_does_not_count_twice(tmp_path):
    files = class_tree(counts=(("", 20),))
    write_tree(tmp_path / "alone", files)

    def counts(name: str) -> list[int]:
        return [len(split) for split in load(data_dir=str(tmp_path / name))[0].values()]

    expected = counts("alone")
    for name, unpacked in (("beside", ""), ("in a folder", "pictures/")):
        source = write_tree(tmp_path / name, {unpacked + key: c for key, c in files.items()})
        write_zip(source / "pictures.zip", files)
        assert counts(name) == expected
    # What was not unpacked counts.
    for name in files:
        if name.startswith(CLASS_NAMES[3]):
            (source / "pictures" / name).unlink()
    assert counts("in a folder") == expected


def test_zips_whose_names_windows_has_written(tmp_path):
    files = {name.replace("/", "\\"): content for name, content in class_tree().items()}
    assert_small_source(load(data_dir=str(write_zip(tmp_path / "windows.zip", files)))[0])


def test_a_folder_that_is_closed_to_us_is_named(tmp_path, monkeypatch):
    source, scandir = write_tree(tmp_path / "pictures", class_tree()), os.scandir

    def closed(path):
        if Path(path).name == "test":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match="pictures/test cannot be read .Permission denied.; change"):
        load(data_dir=str(source))


def test_a_closed_place_of_the_search_is_named_and_not_passed_over(monkeypatch):
    place, scandir = Path("data/cifar10-128x128"), os.scandir
    write_tree(place, class_tree())

    def closed(path):
        if Path(path) == place:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    for data_dir in ("", str(place)):
        with pytest.raises(DataError, match=f"{place} cannot be read .Permission denied.; change"):
            cifar10.find_source(data_dir)


def test_a_place_below_a_folder_of_another_user_is_passed_over(monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", closed)
    assert cifar10.find_source("") is None


@pytest.mark.parametrize("orientation", range(9))
def test_pictures_are_turned_as_their_exif_says_even_where_it_is_faulty(orientation):
    image = Image.fromarray(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.open(io.BytesIO(encoded(image, exif=exif)))
    pixels, mirror = np.asarray(image), np.fliplr
    # By Exif 2.3, sec. 4.6.4, the first row and column of what is stored are, from 2 on, top and
    # right, bottom right, bottom left, left top, right top, right bottom, left bottom.
    expected = {2: mirror(pixels), 3: np.rot90(pixels, 2), 4: np.flipud(pixels),
                5: np.rot90(mirror(pixels)), 6: np.rot90(pixels, -1),
                7: np.rot90(mirror(pixels), -1), 8: np.rot90(pixels)}.get(orientation, pixels)
    assert np.array_equal(cifar10.turned(picture), expected)
    # A camera's mistake, which PIL can read but not write: a resolution that is a text.
    entries = struct.pack("<HHIIHHI", 274, 3, 1, orientation, 282, 2, 4) + b"72\0\0"
    faulty = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    picture = Image.open(io.BytesIO(encoded(image, exif=faulty)))
    if orientation > 1:
        with pytest.raises((TypeError, struct.error)):
            ImageOps.exif_transpose(picture)
    assert np.array_equal(cifar10.turned(picture), expected)


def test_damaged_exif_leaves_a_picture_as_it_is():
    image = Image.fromarray(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3))
    for damaged in (b"Exif\0\0II*\0", b"Exif\0\0II*\0\1", b"Exif\0\0rubbish"):
        picture = Image.open(io.BytesIO(encoded(image, exif=damaged)))
        with pytest.raises((struct.error, SyntaxError)):
            picture.getexif()
        picture = Image.open(io.BytesIO(encoded(image, exif=damaged)))
        assert np.array_equal(cifar10.turned(picture), image)


def test_links_are_followed_but_not_in_circles(tmp_path):
    real = write_tree(tmp_path / "real", class_tree())
    source = tmp_path / "linked"
    source.mkdir()
    (source / "train").symlink_to(real / "train")
    (source / "test").symlink_to(real / "test")
    (real / "train" / "cat" / "loop").symlink_to(real / "train")
    assert_small_source(load(data_dir=str(source))[0])
    # Beside what they point to, whose names say more.
    (real / "class3").symlink_to(real / "train" / "cat")
    (real / "all").symlink_to(real / "test")
    assert_small_source(load(data_dir=str(real))[0])
    (real / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="gone.png .a broken link"):
        load(data_dir=str(source))


def test_names_of_any_kind_and_what_macos_adds(tmp_path):
    files = class_tree()
    files["__MACOSX/train/cat/._0.png"] = b"resource fork"
    files["train/cat/.hidden.png"] = b"no picture"
    write_zip(tmp_path / "zips" / "all.zip", files)
    assert_small_source(load(data_dir=str(tmp_path / "zips"))[0])
    odd = os.fsdecode(b"it's a \n \xff \xc3\xa9.png")
    files = class_tree() | {f"train/cat/{odd}": png((1, 2, 3))}
    splits, _ = load(data_dir=str(write_tree(tmp_path / "a 'b' \u00e9", files)))
    assert len(splits["train"]) == 31


def test_a_class_without_a_readable_picture_stops_even_when_skipping(tmp_path):
    files = {name: b"x" if "train/frog" in name else c for name, c in class_tree().items()}
    with pytest.raises(DataError, match="no readable training picture of frog"):
        load(data_dir=str(write_tree(tmp_path / "pictures", files)), skip_unreadable=True)
    assert nothing_prepared(tmp_path)


def test_few_pictures_without_a_split_hold_out_one_per_class(tmp_path):
    source = write_tree(tmp_path / "pictures", class_tree(counts=(("", 3),)))
    splits, _ = load(data_dir=str(source))
    assert (len(splits["train"]), len(splits["test"])) == (20, 10)


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("train/frog/note.png", b"this is a text", "note.png"),
        ("train/frog/half.png", png((9, 9, 9), (64, 64))[:-40], "half.png"),
        ("test/frog/empty.jpg", b"", "empty.jpg"),
        ("train/frog/bomb.png", png_header(30_000, 30_000), "bomb.png.*bomb DOS"),
    ],
    ids=["text", "half", "empty", "bomb"],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_unreadable_picture_stops_or_is_skipped_by_name(tmp_path, name, content, word, zipped):
    files = {**class_tree(), name: content}
    source = tmp_path / "pictures"
    write_zip(source / "a.zip", files) if zipped else write_tree(source, files)
    with pytest.raises(DataError, match=word) as error:
        load(data_dir=str(source))
    assert "1 of 41 pictures" in str(error.value)
    assert nothing_prepared(tmp_path)
    splits, said = load(data_dir=str(source), skip_unreadable=True)
    assert (len(splits["train"]), len(splits["test"])) == (30, 10)
    assert any("1 unreadable" in line for line in said)
    with pytest.raises(DataError, match=word):  # what was prepared without it is not all
        load(data_dir=str(source))


@pytest.mark.parametrize("zipped", [False, True])
def test_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(cifar10, "LARGEST_FILE", 2 * 2**20)
    files = {**class_tree(), "train/frog/zeros.png": bytes(3 * 2**20)}
    source = tmp_path / "pictures"
    write_zip(source / "a.zip", files) if zipped else write_tree(source, files)
    with pytest.raises(DataError, match="zeros.png.*3 MiB, more than any picture"):
        load(data_dir=str(source))


def test_missing_class_is_named(tmp_path):
    files = {name: c for name, c in class_tree().items() if "/horse/" not in name}
    with pytest.raises(DataError, match="no training pictures of horse"):
        load(data_dir=str(write_tree(tmp_path / "pictures", files)))


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_absent_or_empty_folder_is_refused(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(DataError, match="nothing"):
        load(data_dir=str(tmp_path / "nothing"))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_member_with_flipped_bits_is_named(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in class_tree().items():
            archive.writestr(name, content + bytes(4000))
    with zipfile.ZipFile(path) as archive:
        member = archive.infolist()[0]
    content = bytearray(path.read_bytes())
    start = member.header_offset + 30 + len(member.filename)
    content[start + 4 : start + member.compress_size] = b"\xff" * (member.compress_size - 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=member.filename):
        load(data_dir=str(path))


def test_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "pictures.zip").write_bytes(b"PK not really")
    with pytest.raises(DataError, match="pictures.zip is not a readable zip"):
        load(data_dir=str(tmp_path / "pictures.zip"))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small archive in the published format, its checksums put in place of the real ones."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "origin" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    lists = {"train_list": [], "test_list": []}
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 3072), dtype=np.uint8)
    for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        content = pickle.dumps({"data": pixels[i], "labels": [n % 10 for n in range(20)]})
        (folder / name).write_bytes(content)
        key = "test_list" if name == "test_batch" else "train_list"
        lists[key].append([name, hashlib.md5(content).hexdigest()])
    archive = folder.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    for key, entries in lists.items():
        monkeypatch.setattr(CIFAR10, key, entries)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive, pixels


@pytest.mark.parametrize("form", ["archive", "folder", "beside"])
def test_published_archive_and_its_folder(published, form):
    archive, pixels = published
    place = {
        "archive": archive,
        "folder": archive.parent / "cifar-10-batches-py",
        "beside": archive.parent,
    }[form]
    splits, _ = load(data_dir=str(place), image_size=32)
    np.testing.assert_array_equal(
        splits["train"].images, pixels[:5].reshape(100, 3, 32, 32)
    )
    np.testing.assert_array_equal(splits["test"].images, pixels[5].reshape(20, 3, 32, 32))
    assert splits["train"].labels.tolist() == 5 * [n % 10 for n in range(20)]
    assert splits["test"].labels.tolist() == [n % 10 for n in range(20)]


def test_published_pictures_larger_than_the_model_are_reduced_by_lanczos(published):
    archive, pixels = published
    splits, _ = load(data_dir=str(archive), image_size=16)
    picture = Image.fromarray(pixels[5, 0].reshape(3, 32, 32).transpose(1, 2, 0))
    small = np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    np.testing.assert_array_equal(splits["test"].images[0], small)


def test_another_archive_is_refused_in_one_line(published):
    archive, _ = published
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(Path(__file__), "cat/1.png")
    with pytest.raises(DataError, match="cannot read data_batch_1 .*unpack it and point DATA_DIR"):
        load(data_dir=str(archive))
    archive.write_text("no archive at all")
    with pytest.raises(DataError, match="cannot read data_batch_1") as caught:
        load(data_dir=str(archive))
    assert "\n" not in str(caught.value)


def test_damaged_archive_is_refused(published):
    archive, _ = published
    batch = archive.parent / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="data_batch_3 is damaged"):
        load(data_dir=str(batch.parent))
    whole = archive.read_bytes()
    for start in range(100, len(whole) - 4096, len(whole) // 20):
        archive.write_bytes(whole[:start] + bytes(4096) + whole[start + 4096 :])
        with pytest.raises(DataError, match="is damaged|cannot read"):
            load(data_dir=str(archive))
    archive.write_bytes(whole[:1000])
    with pytest.raises(DataError, match="cannot read data_batch_1"):
        load(data_dir=str(archive))


@pytest.fixture
def server(published, monkeypatch):
    """Serves the small archive on the loopback address in place of the real download."""
    from torchvision.datasets import CIFAR10

    archive, _ = published

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(archive.parent))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            CIFAR10, "url", f"http://127.0.0.1:{service.server_port}/{CIFAR10.filename}"
        )
        yield
        service.shutdown()


def test_download_is_verified_and_reused(server, published, monkeypatch):
    from torchvision.datasets import CIFAR10

    splits, _ = load(image_size=32)
    np.testing.assert_array_equal(splits["test"].images, published[1][5].reshape(20, 3, 32, 32))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/unreachable")
    assert len(load(image_size=32)[0]["train"]) == 100


def test_two_first_runs_at_once_download_once(server, monkeypatch):
    fetched, waiting, download = [], threading.Event(), cifar10.download

    def once_the_other_waits(root):
        fetched.append(root)
        assert waiting.wait(60)
        return download(root)

    monkeypatch.setattr(cifar10, "download", once_the_other_waits)
    both = load_twice(waiting, image_size=32)
    assert len(fetched) == 1
    assert [len(splits["train"]) for splits in both] == [100, 100]


def test_download_with_wrong_checksum_is_refused_and_removed(server, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(DataError, match="download failed"):
        load(image_size=32)
    assert not Path("data", CIFAR10.filename).exists()


def test_no_network_and_no_data_says_the_three_ways(monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/unreachable")
    with pytest.raises(DataError, match="Three ways.*DATA_DIR.*cifar-10-python.tar.gz.*make data"):
        load()


def test_a_server_that_speaks_no_http_counts_as_no_network(monkeypatch):
    from torchvision.datasets import CIFAR10

    with socket.create_server(("127.0.0.1", 0)) as odd:
        def answer():
            connection, _ = odd.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example.org\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{odd.getsockname()[1]}/archive")
        with pytest.raises(DataError, match="Three ways.*220 mail"):
            load()
        thread.join()


def test_a_server_that_says_nothing_counts_as_no_network(monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(cifar10, "CONNECTION_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connects, but never answers
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{mute.getsockname()[1]}/archive")
        with pytest.raises(DataError, match="Three ways.*timed out"):
            load()
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("labels", [torch.arange(500) % 10, torch.arange(500) // 50])
def test_some_pictures_are_of_all_classes_however_they_lie(labels):
    some = data.spread(100, labels)
    assert len(some.unique()) == 100
    assert labels[some].bincount().tolist() == [10] * 10
    for label in range(10):  # every fifth of a class
        of_class = (labels == label).nonzero()[:, 0]
        assert torch.equal(some[labels[some] == label], of_class[::5])
    assert torch.equal(data.spread(500, labels).sort().values, torch.arange(500))
    assert data.spread(0, labels[:0]).tolist() == []


def test_levels_round_to_the_nearest():
    x = torch.tensor([-1.0, -0.999, 0.0, 1.0, 1.7]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    levels = data.to_arrays(x)
    assert levels.shape == (5, 2, 2, 3) and levels.dtype == np.uint8
    # (0.001 * 127.5 = 0.13 -> 0; 127.5 is a tie, which rounds to even)
    assert levels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_first_per_class_keeps_the_order():
    labels = torch.tensor([1, 0, 1, 0, 1])
    split = Split(torch.arange(5)[:, None, None, None].byte(), labels)
    assert split.first_per_class(2).images.flatten().tolist() == [0, 1, 2, 3]
    assert split.first_per_class(0) is split


def test_to_x_start_maps_levels_and_enlarges_within_bounds():
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(
        data.to_x_start(levels, 4)[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0])
    )
    checker = (torch.arange(16).view(1, 1, 4, 4) % 2 * 255).byte()
    enlarged = data.to_x_start(checker, 16)
    assert enlarged.shape == (1, 1, 16, 16)
    assert enlarged.abs().max() <= 1


@pytest.mark.parametrize("size, image_size", [(32, 128), (32, 64), (8, 20)])
def test_enlargement_is_bicubic(size, image_size):
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    expected = torch.nn.functional.interpolate(
        images.double() / 127.5 - 1, size=image_size, mode="bicubic", align_corners=False
    )
    found = data.to_x_start(images, image_size)
    torch.testing.assert_close(found, expected.clamp(-1, 1).float(), rtol=0, atol=2e-6)


def batches(**changes) -> TrainingBatches:
    images = torch.arange(10).byte()[:, None, None, None].expand(10, 3, 4, 4)
    config = replace(DataConfig(image_size=4, horizontal_flip=False), **changes)
    return TrainingBatches(Split(images, torch.arange(10)), config, 4, 0, "cpu")


def take(iterator, count: int) -> list[list[int]]:
    return [next(iterator)[1].tolist() for _ in range(count)]


def test_epochs_are_permutations_that_differ():
    source = batches(repeats=2)
    assert source.steps_per_epoch == 5
    seen = take(source.starting_at(0), 10)
    first, second = sum(seen[:5], []), sum(seen[5:], [])
    for epoch in (first, second):
        assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
    assert first != second


def test_batches_depend_on_the_step_alone():
    source = batches(horizontal_flip=True)
    from_start = source.starting_at(0)
    for _ in range(5):
        next(from_start)
    started_late = source.starting_at(5)
    for _ in range(4):
        (x_start, labels), (other_x_start, other_labels) = next(from_start), next(started_late)
        torch.testing.assert_close(x_start, other_x_start, rtol=0, atol=0)
        assert labels.tolist() == other_labels.tolist()


def test_a_batch_is_what_its_order_and_its_flips_say(monkeypatch):
    """Against plain indexing, image by image; shares of several processes included."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8, generator=generator)
    split = Split(pixels, torch.arange(20) % 10)
    drawn = np.array([True, False, False, True, True, False, True])
    monkeypatch.setattr(TrainingBatches, "mirrored", lambda self, size, step: drawn[:size])
    for share in (slice(0, 7), slice(0, 4), slice(4, 7), slice(2, 2)):
        source = TrainingBatches(split, DataConfig(image_size=4), 7, 0, "cpu", lambda n: share)  # noqa: B023
        x_start, labels = next(source.starting_at(1))
        images = list(zip(source.epoch_order(0)[7:14].tolist(), drawn))
        order = [i for i, flip in images if not flip] + [i for i, flip in images if flip]
        flipped = [i for i, flip in images if flip]
        expected = [pixels[i].flip(-1) if i in flipped else pixels[i] for i in order]
        expected = torch.stack(expected)[share] / 127.5 - 1
        torch.testing.assert_close(x_start, expected, rtol=0, atol=1e-6)
        assert labels.tolist() == split.labels[order].tolist()


def test_flips_mirror_about_half_of_the_images():
    ramp = torch.arange(4).byte().view(1, 1, 1, 4).expand(200, 3, 4, 4)
    split = Split(ramp, torch.zeros(200, dtype=torch.int64))
    source = TrainingBatches(split, DataConfig(image_size=4), 200, 0, "cpu")
    x_start, _ = next(source.starting_at(0))
    mirrored = (x_start[:, 0, 0, 0] > x_start[:, 0, 0, 3]).sum().item()
    assert 65 < mirrored < 135  # binomial(200, 1/2): five standard deviations are 35
    values = torch.stack([x_start[:, 0, 0].min(1).values, x_start[:, 0, 0].max(1).values])
    torch.testing.assert_close(values, torch.tensor([[-1.0], [3 / 127.5 - 1]]).expand(2, 200))


def test_pictograms_are_deterministic_and_split():
    splits, again = (load(dataset="pictograms", samples_per_class=3)[0] for _ in range(2))
    assert splits["train"].images.shape == (30, 3, 16, 16)
    assert torch.equal(splits["train"].images, again["train"].images)
    assert not torch.equal(splits["train"].images[:20], splits["test"].images[:20])
    assert torch.bincount(splits["train"].labels).tolist() == [3] * 10


@pytest.mark.skipif(not REAL_DATA, reason="TEST_DATA_DIR, the real CIFAR-10, is not set")
def test_real_cifar10():
    splits, _ = load(data_dir=REAL_DATA, image_size=128)
    assert splits["train"].images.shape == (50_000, 3, 32, 32)
    assert torch.bincount(splits["train"].labels).tolist() == [5000] * 10
    assert torch.bincount(splits["test"].labels).tolist() == [1000] * 10
    # Channel means of the training set as published with many CIFAR-10 recipes.
    means = splits["train"].images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(
        means, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_a_class_may_have_the_name_of_a_split(tmp_path, monkeypatch):
    names = ("train", "val")
    monkeypatch.setattr(cifar10, "CLASS_NAMES", names)
    monkeypatch.setattr(cifar10, "LABELS", cifar10.folder_labels(names))
    files = {f"{split}/{name}/{n}.png": png((n, 9, 9)) for split, count in
             (("train", 3), ("test", 2)) for name in names for n in range(count)}
    splits, _ = load(data_dir=str(write_tree(tmp_path / "vehicles", files)))
    assert splits["train"].labels.tolist() == 3 * [0] + 3 * [1]
    assert splits["test"].labels.tolist() == 2 * [0] + 2 * [1]


def test_other_classes_need_pictures_of_their_own(tmp_path, published, monkeypatch):
    """Changing CLASS_NAMES is all that other classes take; what shows CIFAR's ten is refused."""
    names = ("apple", "Pear", "plum_tree")
    monkeypatch.setattr(cifar10, "CLASS_NAMES", names)
    monkeypatch.setattr(cifar10, "LABELS", cifar10.folder_labels(names))
    files = {f"{name}/{n}.png": png((n, 9, 9)) for name in names for n in range(11)}
    splits, _ = load(data_dir=str(write_tree(tmp_path / "fruit", files)))
    assert splits["train"].labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    of_their_own = tuple(f"tree{i}" for i in range(10))
    for names in (names, of_their_own, ("car", *CLASS_NAMES[1:]), CLASS_NAMES[::-1]):
        monkeypatch.setattr(cifar10, "CLASS_NAMES", names)
        listed = f"airplane, automobile, .* CLASS_NAMES .* lists {', '.join(names)};"
        with pytest.raises(DataError, match=f"{published[0].name} holds the classes {listed}"):
            load(data_dir=str(published[0]))
        with pytest.raises(DataError, match=f"pictograms show the classes {listed}"):
            load(dataset="pictograms")


def test_accents_may_be_composed_or_not(tmp_path, monkeypatch):
    """macOS takes them apart in the names of folders and in its zips."""
    names = ("\u00c9pic\u00e9a", "ch\u00eane")
    monkeypatch.setattr(cifar10, "CLASS_NAMES", names)
    monkeypatch.setattr(cifar10, "LABELS", cifar10.folder_labels(names))
    files = {f"{unicodedata.normalize('NFD', name)}/{n}.png": png((n, 9, 9))
             for name in names for n in range(3)}
    splits, _ = load(data_dir=str(write_tree(tmp_path / "trees", files)))
    assert splits["train"].labels.tolist() == 2 * [0] + 2 * [1]


def test_the_same_folder_is_prepared_anew_for_other_classes(tmp_path, monkeypatch):
    source = write_tree(tmp_path / "pictures", class_tree())
    load(data_dir=str(source))
    monkeypatch.setattr(cifar10, "CLASS_NAMES", tuple(reversed(CLASS_NAMES)))
    monkeypatch.setattr(cifar10, "LABELS", {n: 9 - label for n, label in cifar10.LABELS.items()})
    splits, said = load(data_dir=str(source))
    assert any("preparing" in line for line in said)
    assert splits["train"].images[0, 0, 3, 4] == 180  # of class 9 before


def test_incomplete_batches_are_left_out():
    source = batches()  # ten images, four at a time
    assert source.steps_per_epoch == 2
    iterator = source.starting_at(0)
    assert [len(next(iterator)[1]) for _ in range(5)] == [4] * 5


def test_without_horizontal_flip_no_picture_is_mirrored():
    ramp = torch.arange(4).byte().view(1, 1, 1, 4).expand(200, 3, 4, 4)
    config = DataConfig(image_size=4, horizontal_flip=False)
    source = TrainingBatches(Split(ramp, torch.zeros(200).long()), config, 200, 0, "cpu")
    assert_close(next(source.starting_at(0))[0], ramp / 127.5 - 1)


def test_labels_are_part_of_the_fingerprint():
    pixels, labels = torch.zeros(4, 3, 2, 2).byte(), torch.arange(4)
    assert Split(pixels, labels).fingerprint != Split(pixels, labels.flip(0)).fingerprint


def test_held_out_pictograms_are_no_other_seeds_training_pictures():
    config = DataConfig(dataset="pictograms", image_size=16, samples_per_class=20)
    first, second = (data.draw_pictograms(config, seed) for seed in (0, 1))
    assert not torch.equal(first["test"].images[:2], second["train"].images[:2])


@pytest.mark.parametrize("later, size", [(10**9, 8), (0, 10)], ids=["time", "size"])
def test_pictures_changed_in_place_are_prepared_anew(tmp_path, later, size):
    def write(value, size):
        picture = encoded(Image.new("RGB", (size, size), (value, 9, 9)), "BMP")
        write_tree(tmp_path / "pictures", {
            f"{split}/{name}/0.bmp": picture for split in ("train", "test") for name in CLASS_NAMES
        })
        (tmp_path / "pictures").touch()

    write(10, 8)
    assert load(data_dir="pictures")[0]["train"].images[0, 0, 0, 0] == 10
    before = [(path, path.stat().st_mtime_ns) for path in Path("pictures").rglob("*")]
    write(20, size)
    for path, written in before:
        os.utime(path, ns=(written, written + later * path.is_file()))
    assert load(data_dir="pictures")[0]["train"].images[0, 0, 0, 0] == 20


def test_another_image_size_is_prepared_apart(tmp_path):
    write_tree(tmp_path / "pictures", {
        f"{split}/{name}/0.png": png((9, 9, 9), (32, 32))
        for split in ("train", "test") for name in CLASS_NAMES
    })
    for size in (16, 24, 16):
        images = load(data_dir="pictures", image_size=size)[0]["train"].images
        assert images.shape[-2:] == (size, size)


def test_an_archive_changed_in_place_is_prepared_anew(published):
    archive, _ = published
    load(data_dir=str(archive))
    written = archive.stat().st_mtime_ns
    os.utime(archive, ns=(written, written + 10**9))
    assert any("preparing" in line for line in load(data_dir=str(archive))[1])


def test_order_and_flips_differ_between_seeds_epochs_and_rounds():
    split = Split(torch.zeros(50, 3, 4, 4).byte(), torch.zeros(50).long())
    config = DataConfig(image_size=4, repeats=2)
    sources = [TrainingBatches(split, config, 10, seed, "cpu") for seed in (0, 1)]
    rounds = {
        tuple(order.tolist())
        for source in sources for epoch in (0, 1) for order in source.epoch_order(epoch).split(50)
    }
    assert len(rounds) == 8  # two of 50! orders are hardly equal by chance
    flips = {tuple(source.mirrored(64, step)) for source in sources for step in (0, 1)}
    assert len(flips) == 4


def test_a_source_is_prepared_once_however_it_is_spelled(tmp_path):
    write_tree(tmp_path / "pictures", class_tree())
    (tmp_path / "link").symlink_to("pictures")
    for name in ("pictures", str(tmp_path / "pictures"), "./link/../pictures", "link"):
        load(data_dir=name)
    assert len(list(Path("data/prepared").glob("[0-9a-f]*"))) == 1


def test_drawings_of_an_evaluated_class_are_no_pictures(tmp_path):
    source = write_tree(tmp_path / "evaluation", class_tree())
    write_tree(source, {"train/cat/evaluation/nearest.png": png((1, 2, 3), (276, 310))})
    assert_small_source(load(data_dir=str(source))[0])


def test_an_unknown_user_in_a_path_is_named():
    with pytest.raises(DataError, match="~nobodyx/pictures does not exist"):
        load(data_dir="~nobodyx/pictures")


def test_every_pictogram_shows_its_class_and_a_larger_set_begins_with_the_smaller_one():
    drawn = [draw.__name__ for draw, _ in PICTOGRAMS]
    assert drawn == [f"draw_{name}" for name in CLASS_NAMES]
    few, many = (pictogram_dataset(count, 16, 3)[0] for count in (1, 2))
    np.testing.assert_array_equal(few, many[:10])
