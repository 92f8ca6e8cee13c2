"""Small copies of the data sets' original files, written as they are published, and damage to them."""

import dataclasses
import errno
import gzip
import io
import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from plastic_jax import data
from plastic_jax.errors import InputError

ROOT = Path(__file__).parents[1]
SMALL = {
    "fashion_mnist": data.DatasetSpec("fashion_mnist", 7, 3, (28, 28, 1), 10),
    "cifar10": data.DatasetSpec("cifar10", 20, 6, (32, 32, 3), 10),
    "cifar100": data.DatasetSpec("cifar100", 9, 4, (32, 32, 3), 100),
    "svhn_cropped": data.DatasetSpec("svhn_cropped", 11, 5, (32, 32, 3), 10),
}


def shrunk() -> dict[str, data.DataSource]:
    """The built-in data sets with these sizes."""
    return {
        name: dataclasses.replace(
            data.DATASETS[name], train_examples=spec.train_examples, test_examples=spec.test_examples
        )
        for name, spec in SMALL.items()
    }


def examples(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels of a split's size, with the smallest and the largest label in them."""
    spec = SMALL[name]
    count = spec.train_examples if split == "train" else spec.test_examples
    generator = np.random.default_rng([count, spec.classes])
    images = generator.integers(0, 256, (count, *spec.shape), np.uint8)
    labels = generator.integers(0, spec.classes, count)
    labels[:2] = 0, spec.classes - 1
    return images, labels.astype(np.int32)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Writes an idx file of bytes, gzipped if its name says so."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(folder: Path, suffix: str = ".gz") -> None:
    """Writes the four files of Fashion-MNIST."""
    for prefix, split in (("train", "train"), ("t10k", "test")):
        images, labels = examples("fashion_mnist", split)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images[..., 0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)


def cifar_files(name: str) -> dict[str, bytes]:
    """The files in CIFAR's binary archives, a record written byte by byte as their pages describe it."""
    files = {}
    images, labels = examples(name, "train")
    parts = 5 if name == "cifar10" else 1
    batches = [
        *zip(np.split(images, parts), np.split(labels, parts), strict=True),
        examples(name, "test"),
    ]
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for file, batch in zip(names if parts == 5 else ["train.bin", "test.bin"], batches, strict=True):
        content = bytearray()
        for image, label in zip(*batch, strict=True):
            content += bytes([label] if name == "cifar10" else [label // 5, label])
            for channel in range(3):
                for row in range(32):
                    content += bytes(image[row, column, channel] for column in range(32))
        files[file] = bytes(content)
    return files


def write_cifar(folder: Path, name: str, how: str = "archive") -> Path:
    """Writes CIFAR as the published archive, as the folder in it, or as the files in that."""
    inner = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    files = cifar_files(name)
    if how == "archive":
        path = folder / data.DATASETS[name].files[0].name
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(entry := tarfile.TarInfo(inner))
            entry.type = tarfile.DIRTYPE
            for file, content in {"readme.html": b"<html>", **files}.items():
                entry = tarfile.TarInfo(f"{inner}/{file}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return path
    target = folder / inner if how == "folder" else folder
    target.mkdir(exist_ok=True)
    for file, content in files.items():
        (target / file).write_bytes(content)
    return target


def write_svhn(folder: Path) -> None:
    """Writes the two .mat files of SVHN; the digit 0 has label 10 there."""
    for split in ("train", "test"):
        images, labels = examples("svhn_cropped", split)
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels, labels, 10)[:, None]}
        scipy.io.savemat(folder / f"{split}_32x32.mat", content, do_compression=True)


def assert_small(loaded: data.Dataset, name: str) -> None:
    """The arrays are those of `examples`, in their order."""
    assert loaded.spec == SMALL[name]
    for split in ("train", "test"):
        images, labels = examples(name, split)
        loaded_images = getattr(loaded, f"{split}_images")
        loaded_labels = getattr(loaded, f"{split}_labels")
        assert loaded_images.dtype == np.uint8 and loaded_labels.dtype == np.int32
        np.testing.assert_array_equal(loaded_images, images)
        np.testing.assert_array_equal(loaded_labels, labels)


def python(code: str, *arguments: str) -> subprocess.Popen:
    """Starts a Python that sees the package and runs `code`, with the small sizes as `SMALL`."""
    head = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); "
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(name: str, data_dir: Path | None = None) -> str:
    """The sentence that loading ends with."""
    with pytest.raises(InputError) as caught:
        data.load(name, None if data_dir is None else str(data_dir))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def cut(path: Path, bytes_off: int) -> None:
    """Takes bytes off a file's end."""
    path.write_bytes(path.read_bytes()[:-bytes_off])


def overwrite(path: Path, position: int, content: bytes) -> None:
    """Overwrites bytes in the middle of a file."""
    old = path.read_bytes()
    path.write_bytes(old[:position] + content + old[position + len(content) :])


def no_locks(*_) -> None:
    """What flock does on a file system that has none."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
