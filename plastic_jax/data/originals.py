"""The five built-in data sets: their sizes, their original files, and readers for those in numpy.

Sizes and splits are the official ones. `digits` has none: its fixed split is described in
`read_digits`. URLs, sizes and SHA-256 sums are those that TFDS 4.9.10 has registered.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from plastic_jax.errors import InputError

Split = tuple[np.ndarray, np.ndarray]
"""Images, uint8 [N, H, W, C], and labels, int32 [N]."""


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What a plan needs to know of a data set. `shape` is (height, width, channels)."""

    name: str
    train_examples: int
    test_examples: int
    shape: tuple[int, int, int]
    classes: int


SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", 1_437, 360, (8, 8, 1), 10),
        DatasetSpec("fashion_mnist", 60_000, 10_000, (28, 28, 1), 10),
        DatasetSpec("cifar10", 50_000, 10_000, (32, 32, 3), 10),
        DatasetSpec("cifar100", 50_000, 10_000, (32, 32, 3), 100),
        DatasetSpec("svhn_cropped", 73_257, 26_032, (32, 32, 3), 10),
    )
}


@dataclasses.dataclass(frozen=True)
class OriginalFile:
    """A published file: where it can be downloaded, its bytes and its SHA-256."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name, without a folder."""
        return self.url.rpartition("/")[2]


_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"

FILES: dict[str, tuple[OriginalFile, ...]] = {
    "digits": (),
    "fashion_mnist": (
        OriginalFile(
            _FASHION_URL + "train-images-idx3-ubyte.gz",
            26_421_880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        OriginalFile(
            _FASHION_URL + "train-labels-idx1-ubyte.gz",
            29_515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        OriginalFile(
            _FASHION_URL + "t10k-images-idx3-ubyte.gz",
            4_422_102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        OriginalFile(
            _FASHION_URL + "t10k-labels-idx1-ubyte.gz",
            5_148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "cifar10": (
        OriginalFile(
            _CIFAR_URL + "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    "cifar100": (
        OriginalFile(
            _CIFAR_URL + "cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
    "svhn_cropped": (
        OriginalFile(
            _SVHN_URL + "train_32x32.mat",
            182_040_794,
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        OriginalFile(
            _SVHN_URL + "test_32x32.mat",
            64_275_384,
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    ),
}

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

# What an unpacked archive holds: the train files, then the test file.
_UNPACKED = {
    "cifar10": (
        "cifar-10-batches-bin",
        (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    ),
    "cifar100": ("cifar-100-binary", ("train.bin", "test.bin")),
}


class Damaged(ValueError):
    """A file that is not what its name says."""

    def __init__(self, path: Path, reason: str):
        """Names the file and what is wrong with it."""
        first_line = reason.partition("\n")[0]
        super().__init__(f"{path} is damaged or not the original ({first_line})")


def layouts(name: str) -> list[tuple[str, ...]]:
    """The sets of files that a folder may hold a data set as, best first, relative to the folder.

    Packed files come first, because their checksums are known.
    """
    packed = tuple(file.name for file in FILES[name])
    if name in _UNPACKED:
        folder, files = _UNPACKED[name]
        return [packed, tuple(f"{folder}/{file}" for file in files), files]
    if name == "fashion_mnist":
        return [packed, tuple(file.removesuffix(".gz") for file in packed)]
    return [packed]


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
    names = " and ".join(file.name for file in FILES[name])
    if name in _UNPACKED:
        names += f" (or the folder {_UNPACKED[name][0]} unpacked from it)"
    return f"{names} from {FILES[name][0].url.rpartition('/')[0]}/"


def fingerprint(name: str, paths: Sequence[Path]) -> str:
    """16 hexadecimal digits that stand for the contents of the original files at `paths`.

    Raises:
      InputError: a file cannot be read, or has an official one's name and size but not its SHA-256.
    """
    official = {file.name: file for file in FILES[name]}
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
    """Reads a built-in data set from its original files, in the files' order.

    Args:
      name: a key of `SPECS`.
      paths: the files in the order of one of `layouts(name)`; none for digits.

    Returns:
      The train and the test split.

    Raises:
      InputError: a file cannot be read or is damaged, or a split has not its official size.
    """
    spec = SPECS[name]
    sizes = {"train": spec.train_examples, "test": spec.test_examples}
    with _one_sentence(name):
        splits = _READERS[name](paths)
        place = Path(os.path.commonpath(paths) if paths else "")
        for (split, examples), (images, labels) in zip(sizes.items(), splits, strict=True):
            expected = (examples, *spec.shape)
            if images.shape != expected:
                raise Damaged(place, f"{split} images {images.shape} instead of {expected}")
            if labels.shape != (examples,):
                raise Damaged(place, f"{len(labels)} {split} labels instead of {examples}")
            if labels.min() < 0 or labels.max() >= spec.classes:
                raise Damaged(place, f"{split} labels outside 0 to {spec.classes - 1}")
    return splits


def read_digits(_: Sequence[Path] = ()) -> tuple[Split, Split]:
    """The 1797 digits of scikit-learn: 8x8 grey images, 10 classes.

    Pixels run from 0 to 16 and are stored as round(255 value / 16). The split is fixed: of the
    examples in order of class (those of one class in the file's order) every fifth, from the first
    one on, is for testing. That makes 1437 train and 360 test examples, a fifth of each class to
    within one example. Both splits keep the file's order. Source: Alpaydin & Kaynak 1998, UCI.
    """
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    images = np.rint(np.asarray(values) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(classes, np.int32)
    testing = np.zeros(len(labels), bool)
    testing[np.argsort(labels, kind="stable")[::5]] = True
    return (images[~testing], labels[~testing]), (images[testing], labels[testing])


def read_fashion_mnist(paths: Sequence[Path]) -> tuple[Split, Split]:
    """Fashion-MNIST from idx files: train images, train labels, test images, test labels.

    Source: Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747.
    """
    train_images, train_labels, test_images, test_labels = (
        read_idx(path, rank) for path, rank in zip(paths, (3, 1, 3, 1), strict=True)
    )
    return (
        (train_images[..., None], train_labels.astype(np.int32)),
        (test_images[..., None], test_labels.astype(np.int32)),
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """An idx file of bytes, gzipped or not: uint8, of the shape that its header states.

    Layout: two zero bytes, type 8, the rank, `rank` big-endian uint32 sizes, then the values
    (yann.lecun.com/exdb/mnist).

    Raises:
      Damaged: the file is cut short, fails gzip's check or has another header.
    """
    content = _unzipped(path)
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes([0, 0, 8, rank]):
        raise Damaged(path, f"no idx header of {rank} dimensions of bytes")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise Damaged(path, f"{len(content) - header} bytes of values instead of {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar10(paths: Sequence[Path]) -> tuple[Split, Split]:
    """CIFAR-10 from its binary version, as an archive or the files in it.

    Source: Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html.
    """
    return _read_cifar("cifar10", paths, label_bytes=1)


def read_cifar100(paths: Sequence[Path]) -> tuple[Split, Split]:
    """CIFAR-100 with its 100 fine labels from its binary version, as an archive or the files in it.

    Source: Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html.
    """
    return _read_cifar("cifar100", paths, label_bytes=2)


def _read_cifar(name: str, paths: Sequence[Path], label_bytes: int) -> tuple[Split, Split]:
    files = _UNPACKED[name][1]
    if len(paths) == 1:
        contents = _from_archive(paths[0], files)
        sources = [paths[0]] * len(files)
    else:
        contents = [path.read_bytes() for path in paths]
        sources = list(paths)
    parts = [_cifar_records(content, label_bytes, source) for content, source in zip(contents, sources, strict=True)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return (images, labels), parts[-1]


def _cifar_records(content: bytes, label_bytes: int, path: Path) -> Split:
    """Records: the label bytes, of which the last counts, then 3 colour planes of 32 rows of 32."""
    record = label_bytes + 3 * 32 * 32
    if not content or len(content) % record:
        raise Damaged(path, f"{len(content)} bytes, no multiple of a record's {record}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, label_bytes - 1].astype(np.int32)
    images_NCHW = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1)), labels


def _from_archive(path: Path, files: Sequence[str]) -> list[bytes]:
    """The contents of the named files, wherever they lie in a tar archive, gzipped or not."""
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_unzipped(path)), mode="r:") as archive:
            for member in archive:
                file = member.name.rpartition("/")[2]
                content = archive.extractfile(member) if file in files else None
                if content is not None:  # as it is for a folder
                    contents[file] = content.read()
    except tarfile.TarError as error:
        raise Damaged(path, str(error)) from error
    for file in files:
        if file not in contents:
            raise Damaged(path, f"{file} is not in it")
    return [contents[file] for file in files]


def read_svhn_cropped(paths: Sequence[Path]) -> tuple[Split, Split]:
    """SVHN's cropped digits from train_32x32.mat and test_32x32.mat; label 10 there is the digit 0.

    Source: Netzer et al. 2011, ufldl.stanford.edu/housenumbers.
    """
    train, test = (_read_svhn(path) for path in paths)
    return train, test


def _read_svhn(path: Path) -> Split:
    """A MATLAB 5 file with X, uint8 [32, 32, 3, N], and y, [N, 1], from 1 to 10."""
    import scipy.io

    content = io.BytesIO(path.read_bytes())
    try:
        arrays = scipy.io.loadmat(content, variable_names=("X", "y"))
        images_HWCN, labels = arrays["X"], arrays["y"].reshape(-1)
    except Exception as error:  # of many kinds: whatever the wrong bytes lead scipy to
        raise Damaged(path, f"no MATLAB 5 file with X and y: {error!r}") from error
    if images_HWCN.dtype != np.uint8 or images_HWCN.ndim != 4:
        raise Damaged(path, f"X is {images_HWCN.dtype} of shape {images_HWCN.shape}")
    if labels.min(initial=1) < 1 or labels.max(initial=10) > 10:
        raise Damaged(path, "labels outside 1 to 10")
    images = np.ascontiguousarray(images_HWCN.transpose(3, 0, 1, 2))
    return images, (labels % 10).astype(np.int32)


def _unzipped(path: Path) -> bytes:
    """A file's bytes, gunzipped and checked against gzip's checksum where it is a gzip file."""
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(path, str(error)) from error


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turns what a bad file raises into the one sentence for the user."""
    try:
        yield
    except Damaged as error:
        raise InputError(f"dataset={name!r}: {error}; put the original there: {what_to_put(name)}") from error
    except OSError as error:
        raise InputError(f"dataset={name!r}: {error.filename} cannot be read ({error.strerror})") from error


_READERS: dict[str, Callable[[Sequence[Path]], tuple[Split, Split]]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "svhn_cropped": read_svhn_cropped,
}
