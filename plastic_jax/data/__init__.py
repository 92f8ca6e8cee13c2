"""The data sets: what a plan knows of one without any file, and its images in memory.

Built-in data sets are prepared by our own TFDS builders and read back through `as_data_source`, in
the original files' order, without TensorFlow. Where TFDS is not installed they are read straight
from the original files; the arrays are equal to the bit.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from plastic_jax.data import originals
from plastic_jax.data.sets import DATASETS
from plastic_jax.data.source import DatasetSpec, DataSource, Split
from plastic_jax.errors import InputError

if TYPE_CHECKING:
    from plastic_jax.data.prepared import Prepared

__all__ = ["DATASETS", "DataSource", "Dataset", "DatasetSpec", "load", "spec"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory: images as uint8 [N, H, W, C], labels as int32 [N]."""

    spec: DatasetSpec
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def spec(name: str, data_dir: str | None = None) -> DatasetSpec:
    """Sizes of a data set; a built-in one needs no file for it.

    Args:
      name: one of `DATASETS`, or NAME[/CONFIG][:VERSION] of a data set that TFDS has prepared.
      data_dir: TFDS's folder, for the latter; None for $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      InputError: there is no such data set, or not one that can be read here.
    """
    if name in DATASETS.names:
        one = DATASETS[name]
        return DatasetSpec(name, one.train_examples, one.test_examples, one.shape, one.classes)
    return _open_other(name, data_dir).spec


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set with its official train and test splits.

    A built-in one is read from the user's copy of the original files, which is looked for in
    `data_dir` or, without one, in Debian's folder for Fashion-MNIST and in TFDS's downloads/manual;
    where there is none TFDS downloads it. What is prepared from them is kept in plastic_jax below
    TFDS's folder, under a key of the files' contents: other or changed files are never answered
    from it. Data sets without files, as digits, ignore `data_dir`.

    Args:
      name: as for `spec`.
      data_dir: a folder with the original files; for other data sets, TFDS's folder.

    Raises:
      InputError: no such data set, no files and no network, or a damaged file.
    """
    if name not in DATASETS.names:
        from plastic_jax.data import prepared

        other = _open_other(name, data_dir)
        return _dataset(other.spec, prepared.read(other))

    folder = _folder(name, data_dir)
    paths = originals.find(name, folder) if folder else ()
    source = DATASETS[name]
    if not (source.prepared and _has_tfds()):
        if source.files and not paths:
            raise InputError(
                f"dataset={name!r}: none of its files was found: put "
                f"{originals.what_to_put(name)} into a folder named by --data_dir"
            )
        return _dataset(spec(name), originals.read(name, paths))
    if source.files:
        key = originals.fingerprint(name, paths) if paths else "downloaded"
    else:
        key = "scikit-learn"

    from plastic_jax.data import builders, prepared

    opened = prepared.open_prepared(name, builders.prepare(name, _root(), key, folder))
    return _dataset(spec(name), prepared.read(opened))


def _dataset(spec: DatasetSpec, splits: tuple[Split, Split]) -> Dataset:
    (train_images, train_labels), (test_images, test_labels) = splits
    return Dataset(spec, train_images, train_labels, test_images, test_labels)


def _folder(name: str, data_dir: str | None) -> Path | None:
    """The folder with a built-in data set's original files; None where none is needed or found."""
    if not DATASETS[name].files:
        return None
    if data_dir is None:
        places = [*DATASETS[name].folders, _root() / "downloads" / "manual"]
        return next((place for place in places if originals.find(name, place)), None)
    folder = Path(data_dir).expanduser()
    if originals.find(name, folder):
        return folder
    if not folder.is_dir():
        problem = "is no folder"
    elif absent := originals.missing(name, folder):
        problem = f"lacks {', '.join(absent)} of {name}"
    else:
        problem = f"holds no original file of {name}"
    raise InputError(
        f"--data_dir={data_dir!r} {problem}: put {originals.what_to_put(name)} there, or leave "
        "--data_dir out to have it downloaded"
    )


def _open_other(name: str, data_dir: str | None) -> "Prepared":
    """A data set that is not built in, as TFDS has prepared it."""
    if not _has_tfds():
        raise InputError(
            f"dataset={name!r} is not built in ({', '.join(DATASETS.names)}), and tensorflow_datasets, "
            "which could read others, is not installed"
        )
    from plastic_jax.data import prepared

    root = Path(data_dir).expanduser() if data_dir is not None else _root()
    return prepared.open_prepared(name, prepared.find(name, root))


def _root() -> Path:
    """TFDS's folder of this user."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _has_tfds() -> bool:
    return importlib.util.find_spec("tensorflow_datasets") is not None
