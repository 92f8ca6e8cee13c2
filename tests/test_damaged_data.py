"""What a damaged file of a data set says."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from small_data import cut, overwrite, refused, write_cifar, write_fashion_mnist, write_idx, write_svhn

from plastic_jax.data import DATASETS

pytestmark = pytest.mark.usefixtures("tfds_dir")

IMAGES = "train-images-idx3-ubyte"
DAMAGES = {
    "gzip cut": ("fashion_mnist", ".gz", lambda f: cut(f / f"{IMAGES}.gz", 40), f"{IMAGES}.gz"),
    "gzip bit": (
        "fashion_mnist",
        ".gz",
        lambda f: overwrite(f / f"{IMAGES}.gz", 2000, b"\x00\x01\x02"),
        f"{IMAGES}.gz",
    ),
    "idx cut": ("fashion_mnist", "", lambda f: cut(f / IMAGES, 1), IMAGES),
    "idx header": ("fashion_mnist", "", lambda f: overwrite(f / IMAGES, 3, b"\x01"), IMAGES),
    "idx empty": ("fashion_mnist", "", lambda f: (f / IMAGES).write_bytes(b""), IMAGES),
    "idx label": (
        "fashion_mnist",
        "",
        lambda f: overwrite(f / "t10k-labels-idx1-ubyte", 9, b"\x0a"),
        "labels outside 0 to 9",
    ),
    "idx labels short": (
        "fashion_mnist",
        "",
        lambda f: write_idx(f / "t10k-labels-idx1-ubyte", np.zeros(2)),
        "2 test labels instead of 3",
    ),
    "archive cut": (
        "cifar10",
        "archive",
        lambda f: cut(f / "cifar-10-binary.tar.gz", 1000),
        "cifar-10-binary.tar.gz",
    ),
    "archive empty": (
        "cifar10",
        "archive",
        lambda f: (f / "cifar-10-binary.tar.gz").write_bytes(b""),
        "cifar-10-binary.tar.gz",
    ),
    "archive of another": (
        "cifar10",
        "archive",
        lambda f: write_cifar(f, "cifar100").rename(f / "cifar-10-binary.tar.gz"),
        "data_batch_1.bin is not in it",
    ),
    "archive with the checksum of another": (
        "cifar10",
        "archive",
        lambda f: os.truncate(f / "cifar-10-binary.tar.gz", 170_052_171),
        "SHA-256",
    ),
    "record cut": (
        "cifar10",
        "folder",
        lambda f: cut(f / "cifar-10-batches-bin" / "data_batch_3.bin", 1),
        "data_batch_3.bin",
    ),
    "records missing": (
        "cifar10",
        "folder",
        lambda f: cut(f / "cifar-10-batches-bin" / "data_batch_3.bin", 3073),
        "train images (19, 32, 32, 3) instead of (20, 32, 32, 3)",
    ),
    "cifar label": (
        "cifar100",
        "files",
        lambda f: overwrite(f / "test.bin", 1, b"\x64"),
        "labels outside 0 to 99",
    ),
    "mat cut": ("svhn_cropped", "", lambda f: cut(f / "test_32x32.mat", 200), "test_32x32.mat"),
    "mat bytes": (
        "svhn_cropped",
        "",
        lambda f: overwrite(f / "test_32x32.mat", 300, bytes(200)),
        "test_32x32.mat",
    ),
    "mat text": (
        "svhn_cropped",
        "",
        lambda f: (f / "test_32x32.mat").write_text("<html>404</html>"),
        "test_32x32.mat",
    ),
    "mat without y": (
        "svhn_cropped",
        "",
        lambda f: scipy.io.savemat(f / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 5), np.uint8)}),
        "'y'",
    ),
    "mat dtype": (
        "svhn_cropped",
        "",
        lambda f: scipy.io.savemat(f / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 5)), "y": np.ones((5, 1))}),
        "float64",
    ),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gets_one_sentence(tmp_path: Path, tfds_dir: Path, damage: str) -> None:
    """The sentence names data set and file and says what to put there; nothing is left prepared."""
    name, how, apply, expected = DAMAGES[damage]
    if name == "fashion_mnist":
        write_fashion_mnist(tmp_path, how)
    elif name == "svhn_cropped":
        write_svhn(tmp_path)
    else:
        write_cifar(tmp_path, name, how)
    apply(tmp_path)
    sentence = refused(name, tmp_path)
    assert sentence.startswith(f"dataset={name!r}: {tmp_path}")
    assert "is damaged or not the original" in sentence
    assert expected in sentence
    assert DATASETS[name].files[0].name in sentence
    assert not list(tfds_dir.rglob("dataset_info.json"))


def test_an_official_size_is_asked_for(tmp_path: Path) -> None:
    """A whole file with fewer examples than the official one is refused."""
    write_cifar(tmp_path, "cifar10")
    assert "(20, 32, 32, 3) instead of (50000, 32, 32, 3)" in refused("cifar10", tmp_path)
