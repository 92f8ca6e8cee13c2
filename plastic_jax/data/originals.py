"""A data set's original files: where they are, whether they are the ones that were published, and what is in them."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from plastic_jax.data.sets import DATASETS
from plastic_jax.data.source import Damaged, Split
from plastic_jax.errors import InputError


def layouts(name: str) -> list[tuple[str, ...]]:
    """The sets of files that a folder may hold a data set as, best first, relative to the folder.

    Packed files come first, because their checksums are known.
    """
    source = DATASETS[name]
    return [tuple(file.name for file in source.files), *source.others]


def find(name: str, folder: Path) -> tuple[Path, ...]:
    """The paths of a data set's original files in `folder`; empty where it does not hold all."""
    for layout in layouts(name):
        paths = tuple(folder / file for file in layout)
        if paths and all(path.is_file() for path in paths):
            return paths
    return ()


def missing(name: str, folder: Path) -> tuple[str, ...]:
    """The files that `folder` lacks of a layout it holds in part; empty where it holds none."""
    for layout in layouts(name):
        absent = tuple(file for file in layout if not (folder / file).is_file())
        if 0 < len(absent) < len(layout):
            return absent
    return ()


def what_to_put(name: str) -> str:
    """The original files in words, for a sentence that says what to put where."""
    source = DATASETS[name]
    names = " and ".join(file.name for file in source.files)
    if source.unpacked:
        names += f" (or the folder {source.unpacked} unpacked from it)"
    return f"{names} from {source.files[0].url.rpartition('/')[0]}/"


def fingerprint(name: str, paths: Sequence[Path]) -> str:
    """16 hexadecimal digits that stand for the contents of the original files at `paths`.

    Raises:
      InputError: a file cannot be read, or has an official one's name and size but not its SHA-256.
    """
    official = {file.name: file for file in DATASETS[name].files}
    key = hashlib.sha256()
    with _one_sentence(name):
        for path in paths:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256")
            expected = official.get(path.name)
            if expected is not None and path.stat().st_size == expected.size and digest.hexdigest() != expected.sha256:
                raise Damaged(path, "its size is right, its SHA-256 is not")
            key.update(digest.digest())
    return key.hexdigest()[:16]


def read(name: str, paths: Sequence[Path]) -> tuple[Split, Split]:
    """Reads a data set from its original files, in the files' order.

    Args:
      name: a key of `DATASETS`.
      paths: the files in the order of one of `layouts(name)`; none for one without files.

    Returns:
      The train and the test split.

    Raises:
      InputError: a file cannot be read or is damaged, or what is read has other sizes or types than the data set says.
    """
    source = DATASETS[name]
    sizes = {"train": source.train_examples, "test": source.test_examples}
    with _one_sentence(name):
        try:
            (train, test) = ((np.asarray(images), np.asarray(labels)) for images, labels in source.read(paths))
        except (Damaged, OSError):
            raise
        except Exception as error:  # a user's own reader's
            raise InputError(f"dataset={name!r} cannot be read ({type(error).__name__}: {error}).") from error
        for (split, examples), (images, labels) in zip(sizes.items(), (train, test), strict=True):
            if problem := _problem(split, images, labels, (examples, *source.shape), source.classes):
                if not paths:
                    raise InputError(f"dataset={name!r} cannot be read: {problem}.")
                raise Damaged(Path(os.path.commonpath(paths)), problem)
    return (train[0], train[1].astype(np.int32)), (test[0], test[1].astype(np.int32))


def _problem(split: str, images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...], classes: int) -> str:
    """What is wrong with a split, in words; empty where it is as it should be."""
    if images.shape != shape:
        return f"{split} images {images.shape} instead of {shape}"
    if images.dtype != np.uint8:
        return f"{split} images of {images.dtype} instead of uint8"
    if labels.ndim != 1:
        return f"{split} labels of {labels.ndim} dimensions instead of 1"
    if len(labels) != shape[0]:
        return f"{len(labels)} {split} labels instead of {shape[0]}"
    if labels.dtype.kind not in "iu":
        return f"{split} labels of {labels.dtype} instead of integers"
    if labels.min() < 0 or labels.max() >= classes:
        return f"{split} labels outside 0 to {classes - 1}"
    return ""


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turns what a bad file raises into the one sentence for the user."""
    try:
        yield
    except Damaged as error:
        raise InputError(f"dataset={name!r}: {error}; put the original there: {what_to_put(name)}") from error
    except OSError as error:
        raise InputError(f"dataset={name!r}: {error.filename} cannot be read ({error.strerror})") from error
