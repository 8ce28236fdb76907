"""CIFAR-10 on disk: find it, fetch it, check it and prepare it once.

Prepared data are uint8 arrays under data/prepared/, one folder per source, written atomically and
reused. Square pictures of one size, at most the model's, are stored as they are and enlarged per
batch on the device (bicubic), which takes a sixteenth of the memory for the 32-pixel originals; all
others are cropped to their central square and resized once (Lanczos).
"""

import fcntl
import hashlib
import io
import json
import lzma
import os
import pickle
import shutil
import socket
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from config import CIFAR10_CLASSES, CLASS_NAMES, DataConfig

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = ("train", "test")
# What PIL and zipfile raise for damaged pictures; PIL's PNG reader also uses SyntaxError, and
# zipfile RuntimeError for what is encrypted or compressed in an unknown way.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, zlib.error,
              lzma.LZMAError, zipfile.BadZipFile, Image.DecompressionBombError)
LARGEST_FILE = 256 * 2**20  # bytes, unpacked; what claims more is no picture but a trap
SPLIT_OF = {"train": "train"} | dict.fromkeys(("test", "val", "valid", "validation"), "test")
REPOSITORY_DATA = Path("data")
PREPARED = REPOSITORY_DATA / "prepared"
SEARCH_PATH = (
    Path("/home/azureuser/Diffusion/data/cifar10-128x128"),
    REPOSITORY_DATA / "cifar10-128x128",
)
HELD_OUT = 10  # without a test split, one picture in this many is held out of training
PREPARED_VERSION = 1
CONNECTION_SECONDS = 30  # without an answer from the server, after which there is no network
THREE_WAYS = (
    "no CIFAR-10 was found. Three ways to get it: (1) set DATA_DIR to a folder or zip with one "
    "folder of pictures per class; (2) put cifar-10-python.tar.gz into data/; (3) run `make data` "
    "on a machine with internet access, which leaves that file in data/. `DATASET=pictograms` "
    "trains on the built-in pictograms."
)


def folded(name: str) -> str:
    """As names are compared: in lower case, accents composed, which macOS takes apart."""
    return unicodedata.normalize("NFC", name).lower()


def folder_labels(class_names: tuple[str, ...]) -> dict[str, int]:
    """The class of a folder by its folded name."""
    names = {f"class{label}": label for label in range(len(class_names))}
    return names | {folded(name): label for label, name in enumerate(class_names)}


LABELS = folder_labels(CLASS_NAMES)
Progress = Callable[[Iterable, int, str], Iterable]  # (items, total, what) -> the same items


class DataError(Exception):
    """Data that cannot be used; the message names the file and the cure."""


@dataclass(frozen=True)
class Picture:
    """One picture file of a source: where it belongs and how to read it."""

    split: str  # "train", "test", or "" where the source has no splits
    label: int
    name: str
    size: int  # bytes
    changed: float  # modification time, to notice that a source has changed
    read: Callable[[], bytes]


# ---- finding -------------------------------------------------------------------------------------


def find_source(data_dir: str) -> Path | None:
    """The first place that has pictures: data_dir alone where it is given, else the search path.

    Returns None where nothing is found, so that the caller may download. A data_dir that was
    asked for and cannot be used is a DataError.
    """
    if data_dir:
        path = Path(os.path.expanduser(data_dir))
        if not holds_something(path) and not path.exists():
            raise DataError(f"DATA_DIR {data_dir} does not exist; check the path")
        return path
    candidates = (*SEARCH_PATH, REPOSITORY_DATA / "cifar-10-python.tar.gz",
                  REPOSITORY_DATA / "cifar-10-batches-py")
    return next((path for path in candidates if holds_something(path)), None)


def holds_something(path: Path) -> bool:
    """Whether path is a file or a folder that is not empty; DataError where it is closed to us."""
    try:
        if not path.is_dir():
            return path.exists()
    except PermissionError:  # below a folder of another user, kept from us
        return False
    try:
        with os.scandir(path) as entries:
            return any(entries)
    except PermissionError as error:
        refuse_folder(error)


def published_archive(path: Path) -> Path | None:
    """CIFAR-10 as its authors publish it, packed or not, at path or directly inside it, or None.

    Raises DataError where the classes are meant to be others.
    """
    places = (path, path / "cifar-10-python.tar.gz", path / "cifar-10-batches-py")
    archive = next((place for place in places if (place / "data_batch_1").exists()
                    or place.exists() and place.name.endswith((".tar.gz", ".tgz"))), None)
    if archive:
        refuse_other_classes(f"{archive} holds")
    return archive


def refuse_other_classes(what_shows: str) -> None:
    """DataError where CLASS_NAMES are not those of CIFAR-10 in the order of its labels.

    what_shows: begins the sentence, "cifar-10-python.tar.gz holds".
    """
    if [name.lower() for name in CLASS_NAMES] != list(CIFAR10_CLASSES):
        raise DataError(
            f"{what_shows} the classes {', '.join(CIFAR10_CLASSES)}, in this order, but "
            f"CLASS_NAMES in config.py lists {', '.join(CLASS_NAMES)}; point DATA_DIR to pictures "
            "of those"
        )


def download(root: Path) -> Path:
    """Fetch CIFAR-10's archive into root with its checksum verified, and return its path."""
    # Imported here because torchvision takes a second that only a download needs.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    # A broken or interrupted download must not be taken for the archive next time.
    unfinished = root / "unfinished_download"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with noticing_silence():
            download_url(CIFAR10.url, unfinished, CIFAR10.filename, CIFAR10.tgz_md5)
        os.replace(unfinished / CIFAR10.filename, root / CIFAR10.filename)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(f"{THREE_WAYS} (The download failed: {error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root / CIFAR10.filename


@contextmanager
def noticing_silence() -> Iterator[None]:
    """Inside, a server that says nothing for CONNECTION_SECONDS raises TimeoutError."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECTION_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def list_pictures(source: Path) -> list[Picture]:
    """Every picture under a folder or zip whose folder is named after a class, sorted by name."""
    pictures: list[Picture] = []
    if source.is_file():
        pictures.extend(list_zip(source))
    else:
        for path in files_below(source):
            place = locate(path.relative_to(source))
            if place is not None:
                pictures.append(picture_file(path, place))
        for container in (path for path in source.iterdir() if path.suffix.lower() == ".zip"):
            # Of a zip that was unpacked beside itself the files count.
            for picture in list_zip(container):
                member = picture.name.removeprefix(f"{container}:")
                places = source / member, container.with_suffix("") / member
                if not any(place.is_file() for place in places):
                    pictures.append(picture)
    return sorted(pictures, key=lambda picture: (picture.split, picture.label, picture.name))


def files_below(source: Path) -> Iterator[Path]:
    """Every file in a folder and its folders: links are followed, but nothing is seen twice."""
    visited = set()  # real folders
    for folder, subfolders, names in os.walk(source, followlinks=True, onerror=refuse_folder):
        # Links last, because what they point to may have a name that says more.
        subfolders.sort(key=lambda name: (Path(folder, name).is_symlink(), name))
        if (real := os.path.realpath(folder)) in visited:
            subfolders.clear()
            continue
        visited.add(real)
        yield from (Path(folder, name) for name in names)


def refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}); change its permissions, "
                    "or move it away")


def picture_file(path: Path, place: tuple[str, int]) -> Picture:
    if path.is_file():
        stat = path.stat()
        return Picture(*place, str(path), stat.st_size, stat.st_mtime, path.read_bytes)

    def refuse() -> bytes:
        raise OSError("a broken link, or no ordinary file")

    return Picture(*place, str(path), 0, 0.0, refuse)


def list_zip(container: Path) -> Iterator[Picture]:
    try:
        archive = zipfile.ZipFile(container)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"{container} is not a readable zip file ({error}); pictures come in "
                        "folders, zips or cifar-10-python.tar.gz") from error
    changed = container.stat().st_mtime
    for info in archive.infolist():
        member = info.filename.replace("\\", "/")  # as Windows may have written it
        place = locate(Path(container.stem, member))  # train.zip may hold a training set
        if place is not None:
            yield Picture(*place, f"{container}:{member}", info.file_size, changed,
                          partial(archive.read, info))


def locate(path: Path) -> tuple[str, int] | None:
    """(split, label) of a picture from its path inside the source; None if it has no class.

    The innermost folder named after a class decides. Hidden files, what macOS adds to zips and what
    `make evaluate PICTURES=` draws of a class are no pictures.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return None
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return None
    folders = [folded(part) for part in path.parts[:-1]]
    named = [place for place, folder in enumerate(folders) if folder in LABELS]
    if not named or "evaluation" in folders[named[-1] + 1 :]:
        return None
    label = LABELS[folders.pop(named[-1])]  # a class may have the name of a split
    splits = [SPLIT_OF[folder] for folder in folders if folder in SPLIT_OF]
    return splits[-1] if splits else "", label


def assign_splits(pictures: list[Picture], source: Path) -> dict[str, list[Picture]]:
    """Pictures by split, every class present in training; without a test split, some held out."""
    train = [picture for picture in pictures if picture.split != "test"]
    test = [picture for picture in pictures if picture.split == "test"]
    if not pictures:
        raise DataError(
            f"{source} holds no pictures in folders named by class ({CLASS_NAMES[0]}, ... or "
            f"class0 ... class{len(CLASS_NAMES) - 1}); accepted: {', '.join(IMAGE_SUFFIXES)}, zips"
        )
    present = {picture.label for picture in train}
    missing = [name for label, name in enumerate(CLASS_NAMES) if label not in present]
    if missing:
        raise DataError(
            f"{source} has no training pictures of {', '.join(missing)}; each class needs a folder "
            f"named like {missing[0]} or class{CLASS_NAMES.index(missing[0])}"
        )
    if not test:
        for label in range(len(CLASS_NAMES)):
            of_class = [picture for picture in train if picture.label == label]
            # Of fewer than ten the last one, unless it is the only one.
            test += of_class[HELD_OUT - 1 :: HELD_OUT] or of_class[1:][-1:]
        held_out = set(test)
        train = [picture for picture in train if picture not in held_out]
    return {"train": train, "test": test}


# ---- preparing -----------------------------------------------------------------------------------


def prepare(data: DataConfig, *, progress: Progress, say: Callable[[str], None]) -> Path:
    """The folder of checked uint8 arrays for `data`, made now unless it is there already."""
    source = find_source(data.data_dir)
    if source is None:
        with only_one(say):  # another may have fetched it meanwhile
            source = find_source("") or download(REPOSITORY_DATA)
    archive, pictures, folder = examine(source, data)
    if (folder / "info.json").exists():
        say(f"data: {source}, prepared in {folder}")
        return folder
    say(f"data: preparing {source} into {folder} (once)")
    unfinished = folder.with_name(".unfinished")
    with only_one(say):
        if (folder / "info.json").exists():
            return folder
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir()
        try:
            skipped = 0
            if archive:
                write_arrays(read_published(archive, data.image_size), unfinished)
            else:
                splits = assign_splits(pictures, source)
                skipped = write_pictures(splits, data, unfinished, progress)
            write_info(unfinished, source, skipped, say)
            shutil.rmtree(folder, ignore_errors=True)  # without info.json it is no complete one
            unfinished.rename(folder)
        except OSError as error:  # numpy has no name for its file, and no number for its reason
            raise DataError(f"{folder} cannot be written ({error.strerror or error}); free some "
                            "space on that disk") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def examine(source: Path, data: DataConfig) -> tuple[Path | None, list[Picture], Path]:
    """The authors' archive or else the pictures in source, and the folder that has them prepared.
    """
    archive = published_archive(source)
    pictures = [] if archive else list_pictures(source)
    return archive, pictures, PREPARED / prepared_name(archive or source, pictures, data)


@contextmanager
def only_one(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, this is the only process of the repository that fetches or prepares pictures."""
    path = PREPARED / "run.lock"  # a name that `make clean-all` knows, which may remove it
    while True:
        PREPARED.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("data: another process is fetching or preparing pictures here; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                yield
                return


def prepared_name(source: Path, pictures: list[Picture], data: DataConfig) -> str:
    """Changes when the source, any of its files or a setting that shapes the arrays changes."""
    digest = hashlib.sha256()
    stat = source.stat()
    archive = [] if pictures else [stat.st_size, stat.st_mtime]
    settings = [data.image_size, data.skip_unreadable, PREPARED_VERSION, CLASS_NAMES]
    digest.update(json.dumps([str(source.resolve()), archive, settings]).encode())
    for picture in pictures:
        inside = picture.name.removeprefix(str(source)).lstrip("/")  # however source is spelled
        digest.update(os.fsencode(f"{inside}\0{picture.size}\0{picture.changed}\n"))
    return digest.hexdigest()[:16]


def read_published(archive: Path, image_size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Arrays of the authors' archive, each member checked against its published checksum.

    Enlarging waits for the device.
    """
    from torchvision.datasets import CIFAR10

    splits = {}
    for split, members in (("train", CIFAR10.train_list), ("test", CIFAR10.test_list)):
        images, labels = [], []
        for name, md5 in members:
            content = read_member(archive, name)
            if hashlib.md5(content).hexdigest() != md5:
                raise DataError(f"{archive}: {name} is damaged (wrong checksum); fetch it again")
            batch = pickle.loads(content, encoding="latin1")  # known content: checksum verified
            images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.extend(batch["labels"])
        pixels = np.concatenate(images)
        if image_size < pixels.shape[-1]:
            pictures = (Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1))
            pixels = np.stack([fitted(picture, image_size) for picture in pictures])
        splits[split] = (pixels, np.asarray(labels, dtype=np.int64))
    return splits


def read_member(archive: Path, name: str) -> bytes:
    try:
        if archive.is_dir():
            return (archive / name).read_bytes()
        with tarfile.open(archive) as tar:
            return tar.extractfile(f"cifar-10-batches-py/{name}").read(LARGEST_FILE)
    except (OSError, KeyError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{archive}: cannot read {name} ({reason}); fetch it again, or if it is "
                        "another archive, unpack it and point DATA_DIR to the folder") from error


def write_arrays(splits: dict[str, tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    for split, (images, labels) in splits.items():
        for name, array in (("images", images), ("labels", labels)):
            with open(folder / f"{split}_{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())  # before the folder gets the name of a complete one


def write_pictures(
    splits: dict[str, list[Picture]], data: DataConfig, folder: Path, progress: Progress
) -> int:
    """Decode every picture into one array per split; returns how many were skipped."""
    everything = [picture for split in SPLITS for picture in splits[split]]
    # One thread: decoding 32-pixel pictures in several is slower, the interpreter lock passing
    # between them costs more than the work.
    sizes = {measure(picture) for picture in progress(everything, len(everything), "checking")}
    good = [size for size in sizes if size is not None]
    # Enlarging waits for the device if all pictures are equal squares no larger than needed.
    keep_size = len(good) == 1 and good[0][0] == good[0][1] <= data.image_size
    side = good[0][0] if keep_size else data.image_size

    failures: list[str] = []
    decoded = (decode(picture, side) for picture in everything)
    decoded = iter(progress(decoded, len(everything), "decoding"))
    for split in SPLITS:
        images = np.empty((len(splits[split]), 3, side, side), np.uint8)
        labels = []
        for picture, pixels in zip(splits[split], decoded):
            if isinstance(pixels, str):
                failures.append(pixels)
                continue
            images[len(labels)] = pixels
            labels.append(picture.label)
        arrays = images[: len(labels)], np.asarray(labels, dtype=np.int64)
        write_arrays({split: arrays}, folder)
    if failures and not data.skip_unreadable:
        listed = "; ".join(failures[:10]) + ("; ..." if len(failures) > 10 else "")
        raise DataError(
            f"{len(failures)} of {len(everything)} pictures cannot be read: {listed}. Replace or "
            "remove them, or leave them out with --data.skip_unreadable true"
        )
    return len(failures)


def opened(picture: Picture) -> Image.Image:
    if picture.size > LARGEST_FILE:
        raise OSError(f"{picture.size / 2**20:.0f} MiB, more than any picture needs")
    return Image.open(io.BytesIO(picture.read()))


def measure(picture: Picture) -> tuple[int, int] | None:
    """(width, height) from the header, before any turning, or None if it cannot be read."""
    try:
        with opened(picture) as image:
            return image.size
    except UNREADABLE:
        return None


def decode(picture: Picture, side: int) -> np.ndarray | str:
    """Pixels uint8 (3, side, side), or a sentence saying why the picture cannot be read."""
    try:
        with opened(picture) as image:
            rgb = to_rgb(turned(image))
    except UnidentifiedImageError:
        return f"{picture.name} (not a picture)"
    except UNREADABLE as error:
        return f"{picture.name} ({error})"
    return fitted(rgb, side)


def turned(image: Image.Image) -> Image.Image:
    """The picture as its EXIF says that it is to be held."""
    image.load()  # what is wrong with its pixels must be seen
    # EXIF may be damaged where the pixels are whole; and PIL, once the picture is turned, writes it
    # anew, which fails where cameras got it wrong.
    with suppress(*UNREADABLE, struct.error, TypeError):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def fitted(rgb: Image.Image, side: int) -> np.ndarray:
    """The pixels (3, side, side) of its central square."""
    if rgb.size != (side, side):
        rgb = ImageOps.fit(rgb, (side, side), Image.Resampling.LANCZOS)
    return np.asarray(rgb).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency over white, 16-bit grey by its upper byte."""
    if image.mode.startswith("I"):
        upper_byte = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(upper_byte).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def write_info(folder: Path, source: Path, skipped: int, say: Callable[[str], None]) -> None:
    info = {"source": str(source), "skipped": skipped}
    for split in SPLITS:
        counts = np.bincount(np.load(folder / f"{split}_labels.npy"), minlength=len(CLASS_NAMES))
        info[split] = dict(zip(CLASS_NAMES, counts.tolist()))
        lost = [name for name, count in info[split].items() if split == "train" and not count]
        if lost:
            raise DataError(f"{source}: no readable training picture of {', '.join(lost)} is left")
        listed = ", ".join(f"{name} {count}" for name, count in info[split].items())
        say(f"data: {split} {counts.sum()} pictures: {listed}")
    if skipped:
        say(f"data: {skipped} unreadable pictures were left out")
    (folder / "info.json").write_text(json.dumps(info, indent=1))
