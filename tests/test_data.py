"""The data sets: what is known without a file, and readers of the original files."""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import assert_small, python, refused, write_cifar, write_fashion_mnist, write_svhn

from plastic_jax import data
from plastic_jax.data import originals
from plastic_jax.data.sets import fashion_mnist

pytestmark = pytest.mark.usefixtures("tfds_dir")

# What is known without a file


def test_the_plan_needs_neither_files_nor_heavy_imports() -> None:
    """Importing, and the sizes of built-in data sets, import no TFDS; loading imports no TensorFlow."""
    process = python(
        """
        from plastic_jax import data
        print([(s.train_examples, s.test_examples, s.classes) for s in map(data.spec, data.DATASETS)])
        heavy = {"tensorflow_datasets", "sklearn", "scipy", "tensorflow"}
        print(heavy & {name.partition(".")[0] for name in sys.modules})
        data.load("digits")
        print("tensorflow_datasets" in sys.modules, "tensorflow" in sys.modules)
        """
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    sizes, imported, after = out.splitlines()
    assert sizes == str(
        [
            (1437, 360, 10),
            (60000, 10000, 10),
            (50000, 10000, 10),
            (50000, 10000, 100),
            (73257, 26032, 10),
        ]
    )
    assert imported == "set()"
    assert after == "True False"


def test_names() -> None:
    """The five built-in names, each with its own spec."""
    assert data.DATASETS.names == ("digits", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")
    assert [data.spec(name).name for name in data.DATASETS] == list(data.DATASETS)


def test_checksums_are_those_that_tfds_has_registered() -> None:
    """URL, size and SHA-256 of each file, against the tables in the installed TFDS."""
    import tensorflow_datasets as tfds

    package = Path(tfds.__file__).parent
    tables = [package / "datasets/svhn_cropped/checksums.tsv"]
    tables += [package / f"url_checksums/{name}.txt" for name in data.DATASETS.names[1:4]]
    registered = {
        (fields[0], int(fields[1]), fields[2])
        for table in tables
        for fields in (line.split("\t") for line in table.read_text().splitlines())
    }
    ours = {(file.url, file.size, file.sha256) for source in data.DATASETS.values() for file in source.files}
    assert len(ours) == 8
    assert ours <= registered


# digits


def test_digits() -> None:
    """A stratified split of all 1797 examples, pixels times 255/16, fixed to the bit."""
    from sklearn.datasets import load_digits

    loaded = data.load("digits")
    values, labels = load_digits(return_X_y=True)
    assert loaded.train_images.shape == (1437, 8, 8, 1)
    assert loaded.test_images.shape == (360, 8, 8, 1)
    assert loaded.train_images.dtype == np.uint8 and loaded.train_labels.dtype == np.int32
    for label in range(10):
        share = (loaded.test_labels == label).sum()
        assert abs(share - (labels == label).sum() / 5) < 1
    images = np.concatenate([loaded.train_images, loaded.test_images]).reshape(-1, 64)
    both = np.column_stack([images, np.concatenate([loaded.train_labels, loaded.test_labels])])
    whole = np.column_stack([np.floor(values * 255 / 16 + 0.5), labels])
    np.testing.assert_array_equal(both[np.lexsort(both.T)], whole[np.lexsort(whole.T)])
    arrays = (loaded.train_images, loaded.train_labels, loaded.test_images, loaded.test_labels)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert digest[:16] == "b457e7df6aadcdc7", "the split of digits is part of every result: do not change it"


# The originals' formats, through TFDS


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_files(tmp_path: Path, suffix: str) -> None:
    """The four idx files, gzipped as published or not."""
    write_fashion_mnist(tmp_path, suffix)
    assert_small(data.load("fashion_mnist", str(tmp_path)), "fashion_mnist")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", ["archive", "folder", "files"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(tmp_path: Path, name: str, how: str) -> None:
    """Label bytes, then colour planes: the archive, its folder, or the folder itself."""
    write_cifar(tmp_path, name, how)
    assert_small(data.load(name, str(tmp_path)), name)


@pytest.mark.usefixtures("small")
def test_svhn_files(tmp_path: Path) -> None:
    """Images along the last axis, label 10 for the digit 0."""
    write_svhn(tmp_path)
    assert_small(data.load("svhn_cropped", str(tmp_path)), "svhn_cropped")


@pytest.mark.usefixtures("small")
def test_files_in_tfds_manual_folder_are_found(tfds_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TFDS's users put files; no --data_dir is needed then. Read in several batches."""
    from plastic_jax.data import prepared

    monkeypatch.setattr(prepared, "_BATCH", 8)
    manual = tfds_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    write_cifar(manual, "cifar10")
    assert_small(data.load("cifar10"), "cifar10")


@pytest.mark.usefixtures("small")
def test_without_tfds_the_same_arrays(tmp_path: Path, tfds_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read straight from the files where TFDS is not installed."""
    write_cifar(tmp_path, "cifar100")
    through_tfds = data.load("digits")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "plastic_jax.data.builders", None)
    assert_small(data.load("cifar100", str(tmp_path)), "cifar100")
    straight = data.load("digits")
    np.testing.assert_array_equal(straight.train_images, through_tfds.train_images)
    np.testing.assert_array_equal(straight.test_labels, through_tfds.test_labels)
    assert not list(tfds_dir.glob("plastic_jax/*/cifar100"))
    assert "--data_dir" in refused("cifar10")
    assert "'mnist' is not built in" in refused("mnist")


def test_fashion_mnist_of_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 70 000 images of Debian's package, found by themselves, against the files' bytes.

    Read straight from the files, as without TFDS, which would take 5 s more to prepare them.
    """
    folder = fashion_mnist.DEBIAN
    if not originals.find("fashion_mnist", folder):
        pytest.skip(f"no files in {folder}: apt-get install dataset-fashion-mnist")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    loaded = data.load("fashion_mnist")
    assert loaded.spec == data.spec("fashion_mnist")
    for prefix, images, labels in (
        ("train", loaded.train_images, loaded.train_labels),
        ("t10k", loaded.test_images, loaded.test_labels),
    ):
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
            assert file.read()[16:] == images.tobytes()
        with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
            assert file.read()[8:] == labels.astype(np.uint8).tobytes()
        assert len(set(np.bincount(labels))) == 1  # equally many of each class
