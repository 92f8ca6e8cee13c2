"""The data sets: readers of the original files, TFDS's copies of them, and what a bad file says."""

import concurrent.futures
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from plastic_jax import data
from plastic_jax.data import originals
from plastic_jax.errors import InputError

ROOT = Path(__file__).parents[1]
SMALL = {
    "fashion_mnist": data.DatasetSpec("fashion_mnist", 7, 3, (28, 28, 1), 10),
    "cifar10": data.DatasetSpec("cifar10", 20, 6, (32, 32, 3), 10),
    "cifar100": data.DatasetSpec("cifar100", 9, 4, (32, 32, 3), 100),
    "svhn_cropped": data.DatasetSpec("svhn_cropped", 11, 5, (32, 32, 3), 10),
}


@pytest.fixture(autouse=True)
def tfds_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TFDS's folder: one of its own for each test."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official sizes of a few examples, so that tests can write whole files."""
    for name, spec in SMALL.items():
        monkeypatch.setitem(originals.SPECS, name, spec)


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
        path = folder / originals.FILES[name][0].name
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


# What is known without a file


def test_the_plan_needs_neither_files_nor_heavy_imports() -> None:
    """Importing, and the sizes of built-in data sets, import no TFDS; loading imports no TensorFlow."""
    process = python(
        """
        from plastic_jax import data
        print([(s.train_examples, s.test_examples, s.classes) for s in map(data.spec, data.NAMES)])
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
    assert data.NAMES == ("digits", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")
    assert [data.spec(name).name for name in data.NAMES] == list(data.NAMES)


def test_checksums_are_those_that_tfds_has_registered() -> None:
    """URL, size and SHA-256 of each file, against the tables in the installed TFDS."""
    import tensorflow_datasets as tfds

    package = Path(tfds.__file__).parent
    tables = [package / "datasets/svhn_cropped/checksums.tsv"]
    tables += [package / f"url_checksums/{name}.txt" for name in data.NAMES[1:4]]
    registered = {
        (fields[0], int(fields[1]), fields[2])
        for table in tables
        for fields in (line.split("\t") for line in table.read_text().splitlines())
    }
    ours = {(file.url, file.size, file.sha256) for name in data.NAMES for file in originals.FILES[name]}
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
    folder = originals.DEBIAN_FASHION_MNIST
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


# Damaged files


def cut(path: Path, bytes_off: int) -> None:
    """Takes bytes off a file's end."""
    path.write_bytes(path.read_bytes()[:-bytes_off])


def overwrite(path: Path, position: int, content: bytes) -> None:
    """Overwrites bytes in the middle of a file."""
    old = path.read_bytes()
    path.write_bytes(old[:position] + content + old[position + len(content) :])


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
    assert originals.FILES[name][0].name in sentence
    assert not list(tfds_dir.rglob("dataset_info.json"))


def test_an_official_size_is_asked_for(tmp_path: Path) -> None:
    """A whole file with fewer examples than the official one is refused."""
    write_cifar(tmp_path, "cifar10")
    assert "(20, 32, 32, 3) instead of (50000, 32, 32, 3)" in refused("cifar10", tmp_path)


# Where files are looked for


@pytest.mark.usefixtures("small")
def test_a_data_dir_without_the_files(tmp_path: Path) -> None:
    """No folder, an empty folder, a part of the files: what is wrong and what to put there."""
    sentence = refused("cifar10", tmp_path / "nowhere")
    assert sentence.startswith(f"--data_dir='{tmp_path}/nowhere' is no folder")
    sentence = refused("svhn_cropped", tmp_path)
    assert "holds no original file of svhn_cropped" in sentence
    assert "train_32x32.mat and test_32x32.mat" in sentence
    (write_cifar(tmp_path, "cifar10", "folder") / "data_batch_2.bin").unlink()
    assert "lacks cifar-10-batches-bin/data_batch_2.bin of cifar10" in refused("cifar10", tmp_path)


@pytest.mark.usefixtures("small")
def test_other_files_are_not_answered_from_the_cache(tmp_path: Path) -> None:
    """Another folder's content, and content changed in place with the old time, are read anew."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_cifar(tmp_path / folder, "cifar10", "files")
    overwrite(tmp_path / "two" / "test_batch.bin", 1, b"\x07\x08")
    assert_small(data.load("cifar10", str(tmp_path / "one")), "cifar10")
    two = data.load("cifar10", str(tmp_path / "two"))
    np.testing.assert_array_equal(two.test_images[0, 0, :2, 0], [7, 8])

    batch = tmp_path / "one" / "test_batch.bin"
    before = batch.stat()
    overwrite(batch, 1, b"\x09\x0a")
    os.utime(batch, ns=(before.st_atime_ns, before.st_mtime_ns))
    one = data.load("cifar10", str(tmp_path / "one"))
    np.testing.assert_array_equal(one.test_images[0, 0, :2, 0], [9, 10])


@pytest.mark.usefixtures("small")
def test_a_tfds_folder_that_cannot_be_written(tmp_path: Path, tfds_dir: Path) -> None:
    """A file where the folder should be."""
    write_cifar(tmp_path, "cifar10")
    tfds_dir.write_text("")
    sentence = refused("cifar10", tmp_path)
    assert sentence.startswith(f"TFDS_DATA_DIR='{tfds_dir}': cifar10 cannot be prepared there")


# Downloads, from a server on this machine


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> Iterator[Path]:
    """A folder that is served over HTTP, and named as the place that CIFAR-10 is downloaded from."""
    from plastic_jax.data import builders

    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *args) -> None:
            """Says nothing."""

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        archive = write_cifar(folder, "cifar10")
        original = originals.OriginalFile(
            f"http://127.0.0.1:{httpd.server_port}/{archive.name}",
            archive.stat().st_size,
            hashlib.sha256(archive.read_bytes()).hexdigest(),
        )
        monkeypatch.setitem(originals.FILES, "cifar10", (original,))
        info = builders.UrlInfo(builders.Size(original.size), original.sha256, original.name)
        monkeypatch.setattr(builders.Cifar10, "url_infos", {original.url: info})
        yield folder
        httpd.shutdown()
        thread.join()


def test_a_download(server: Path, tfds_dir: Path) -> None:
    """TFDS downloads and checks the file; afterwards it needs neither the server nor the download."""
    assert_small(data.load("cifar10"), "cifar10")
    (server / "cifar-10-binary.tar.gz").unlink()
    assert_small(data.load("cifar10"), "cifar10")
    prepared = list(tfds_dir.glob("plastic_jax/downloaded/cifar10/*"))
    for path in prepared[0].iterdir():
        path.unlink()
    prepared[0].rmdir()
    assert_small(data.load("cifar10"), "cifar10")  # from the download that TFDS has kept


def test_a_download_with_another_checksum(server: Path, tfds_dir: Path) -> None:
    """What the server sends is not the registered file."""
    overwrite(server / "cifar-10-binary.tar.gz", 1000, b"damaged")
    sentence = refused("cifar10")
    assert "the download failed (it does not have the registered SHA-256)" in sentence
    assert not list(tfds_dir.rglob("dataset_info.json"))


def test_no_file_and_no_server(server: Path, tfds_dir: Path) -> None:
    """The sentence says what to put where."""
    (server / "cifar-10-binary.tar.gz").unlink()
    sentence = refused("cifar10")
    assert sentence.startswith("dataset='cifar10': none of its files was found and the download failed")
    assert "HTTPError" in sentence
    assert "put cifar-10-binary.tar.gz (or the folder cifar-10-batches-bin unpacked from it)" in sentence
    assert str(tfds_dir / "downloads" / "manual") in sentence
    assert "--data_dir" in sentence


def test_no_file_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused at once: TFDS alone would try for minutes. Debian's package is named."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(originals, "DEBIAN_FASHION_MNIST", tmp_path)
    closed = originals.OriginalFile("http://127.0.0.1:9/train-images-idx3-ubyte.gz", 1, "00")
    monkeypatch.setitem(originals.FILES, "fashion_mnist", (closed,))
    sentence = refused("fashion_mnist")
    assert "the download failed (ConnectionError)" in sentence
    assert "install Debian's package dataset-fashion-mnist" in sentence


# Preparing: interrupted, and twice at once


@pytest.mark.usefixtures("small")
def test_a_killed_preparation_leaves_nothing_broken(tmp_path: Path, tfds_dir: Path) -> None:
    """kill -9 in the middle of writing; the next load prepares it whole."""
    write_cifar(tmp_path, "cifar10")
    process = python(
        """
        import os, signal
        from plastic_jax import data
        from plastic_jax.data import builders, originals
        import test_data
        originals.SPECS.update(test_data.SMALL)
        whole = builders.Cifar10._generate_examples
        def part(self, images, labels):
            for key, example in whole(self, images, labels):
                if key == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield key, example
        builders.Cifar10._generate_examples = part
        data.load("cifar10", sys.argv[1])
        """,
        str(tmp_path),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    assert list(tfds_dir.glob("plastic_jax/*/cifar10/incomplete*"))  # it was at work
    assert_small(data.load("cifar10", str(tmp_path)), "cifar10")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_prepare_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    """The second waits for the first; on a file system without locks it wins, and the first takes its copy."""
    from plastic_jax.data import builders

    write_cifar(tmp_path, "cifar10")
    process = python(
        """
        import time
        from pathlib import Path
        from plastic_jax import data
        from plastic_jax.data import builders, originals
        import test_data
        originals.SPECS.update(test_data.SMALL)
        folder = Path(sys.argv[1])
        whole = builders.Cifar10._generate_examples
        def slow(self, images, labels):
            for key, example in whole(self, images, labels):
                (folder / "started").touch()
                while not (folder / "go on").exists():
                    time.sleep(0.01)
                yield key, example
        builders.Cifar10._generate_examples = slow
        if sys.argv[2] == "False":
            builders.fcntl.flock = test_data.no_locks
        test_data.assert_small(data.load("cifar10", str(folder)), "cifar10")
        """,
        str(tmp_path),
        str(locks),
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    if not locks:
        monkeypatch.setattr(builders.fcntl, "flock", no_locks)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        second = executor.submit(data.load, "cifar10", str(tmp_path))
        done, _ = concurrent.futures.wait([second], timeout=0.3 if locks else 30)
        assert bool(done) != locks
        (tmp_path / "go on").touch()
        assert_small(second.result(timeout=30), "cifar10")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


def no_locks(*_) -> None:
    """What flock does on a file system that has none."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.usefixtures("small")
def test_a_damaged_prepared_copy(tmp_path: Path, tfds_dir: Path) -> None:
    """Named with its folder; deleting that is enough."""
    write_cifar(tmp_path, "cifar10")
    data.load("cifar10", str(tmp_path))
    (shard,) = tfds_dir.glob("plastic_jax/*/cifar10/*/*train.array_record*")
    overwrite(shard, 20_000, b"damaged")
    assert f"has prepared in {shard.parent} is damaged" in refused("cifar10", tmp_path)
    for path in shard.parent.iterdir():
        path.unlink()
    shard.parent.rmdir()
    assert_small(data.load("cifar10", str(tmp_path)), "cifar10")


# Other data sets that TFDS has prepared


def prepare_other(root: Path, *, sizes: tuple[tuple[int, int], ...] = ((6, 5),), **options) -> Path:
    """Prepares a data set of PNG images as TFDS's own builders do, as array_record."""
    import tensorflow_datasets as tfds
    from PIL import Image

    shape = options.pop("shape", (6, 5, 3))
    splits = options.pop("splits", ("train", "test"))
    labels = options.pop("labels", tfds.features.ClassLabel(num_classes=3))

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(options.pop("version", "1.0.0"))

        def _info(self):
            image = tfds.features.Image(shape=shape)
            features = tfds.features.FeaturesDict({"image": image, "label": labels})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for index, pixels in enumerate(other_images(split)):
                height, width = sizes[index % len(sizes)]
                yield index, {"image": Image.fromarray(pixels[:height, :width]), "label": index % 3}

    builder = Shapes(data_dir=root, file_format="array_record", **options)
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    return Path(builder.data_dir)


def other_images(split: str) -> np.ndarray:
    """The images of a split, [N, 6, 5, 3]."""
    count = {"train": 8, "test": 4, "validation": 4}[split]
    return np.random.default_rng(count).integers(0, 256, (count, 6, 5, 3), np.uint8)


def assert_other(loaded: data.Dataset) -> None:
    """The arrays are those of `other_images`."""
    np.testing.assert_array_equal(loaded.train_images, other_images("train"))
    np.testing.assert_array_equal(loaded.test_images, other_images("test"))
    np.testing.assert_array_equal(loaded.test_labels, np.array([0, 1, 2, 0], np.int32))
    assert loaded.train_images.dtype == np.uint8 and loaded.train_labels.dtype == np.int32


@pytest.mark.parametrize("shape", [(6, 5, 3), (None, None, 3)])
def test_another_data_set(tmp_path: Path, shape: tuple[int | None, ...]) -> None:
    """Found in --data_dir or in TFDS's folder; a size that is not stated is that of the images."""
    prepare_other(tmp_path / "tfds", shape=shape)
    expected = data.DatasetSpec("shapes", 8, 4, (6, 5, 3), 3)
    assert data.spec("shapes") == expected
    assert data.spec("shapes", str(tmp_path / "tfds")) == expected
    loaded = data.load("shapes")
    assert loaded.spec == expected
    assert_other(loaded)
    assert "tensorflow" not in sys.modules


def test_versions_and_configs_of_another_data_set(tmp_path: Path) -> None:
    """The newest version is taken; one version and one config can be named, several must be."""
    import tensorflow_datasets as tfds

    one = prepare_other(tmp_path, version="1.9.0")
    prepare_other(tmp_path, version="1.10.0")
    from plastic_jax.data import prepared

    assert prepared.find("shapes", tmp_path).name == "1.10.0"
    assert prepared.find("shapes:1.9.0", tmp_path) == one
    assert "dataset='shapes:2.0.0' is neither built in" in refused("shapes:2.0.0", tmp_path)

    for config in ("big", "small"):
        prepare_other(tmp_path / "c", config=tfds.core.BuilderConfig(name=config, version="1.0.0"))
    assert_other(data.load("shapes/big", str(tmp_path / "c")))
    assert "name one of shapes/big, shapes/small" in refused("shapes", tmp_path / "c")


def test_another_data_set_that_is_not_there(tmp_path: Path) -> None:
    """The built-in names and the command that prepares one; no path leads out of TFDS's folder."""
    sentence = refused("mnist", tmp_path)
    assert sentence.startswith("dataset='mnist' is neither built in (digits, ")
    assert "`tfds build mnist --file_format=array_record`" in sentence
    prepare_other(tmp_path)
    assert "is neither built in" in refused("../shapes", tmp_path / "tfds")
    assert "is neither built in" in refused(str(tmp_path / "shapes"), tmp_path)


def test_a_tfrecord_data_set(tmp_path: Path) -> None:
    """TFDS's default format: the command that converts it, with the folder's whole path."""
    folder = prepare_other(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    sentence = refused("shapes", tmp_path)
    assert "as tfrecord" in sentence
    assert f"`tfds convert_format --dataset_version_dir={folder.resolve()} --out_file_format=array_record`" in sentence
    # What that command leaves in place.
    info = {**info, "fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert_other(data.load("shapes", str(tmp_path)))


def test_unfit_data_sets(tmp_path: Path) -> None:
    """Images of two sizes, no test split, no class label, a damaged file."""
    import tensorflow_datasets as tfds

    prepare_other(tmp_path / "a", sizes=((6, 5), (5, 6 - 1)), shape=(None, None, 3))
    assert "images of (5, 5, 3) beside those of (6, 5, 3)" in refused("shapes", tmp_path / "a")
    prepare_other(tmp_path / "b", splits=("train", "validation"))
    assert "has no test split, only train, validation" in refused("shapes", tmp_path / "b")
    label = tfds.features.Tensor(shape=(), dtype=np.int64)
    prepare_other(tmp_path / "c", labels=label)
    assert "its class label are needed" in refused("shapes", tmp_path / "c")
    folder = prepare_other(tmp_path / "d")
    (shard,) = folder.glob("*test.array_record*")
    os.truncate(shard, 1000)
    assert f"what TFDS has prepared in {folder} is damaged" in refused("shapes", tmp_path / "d")
    (folder / "dataset_info.json").write_text("{")
    assert f"what TFDS has prepared in {folder} is damaged" in refused("shapes", tmp_path / "d")
