"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plastic_jax.data.source import Damaged, DataSource, OriginalFile, Split, unzipped

_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FILES = (
    OriginalFile(
        _URL + "train-images-idx3-ubyte.gz",
        26_421_880,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    OriginalFile(
        _URL + "train-labels-idx1-ubyte.gz",
        29_515,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    OriginalFile(
        _URL + "t10k-images-idx3-ubyte.gz",
        4_422_102,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    OriginalFile(
        _URL + "t10k-labels-idx1-ubyte.gz",
        5_148,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


def read(paths: Sequence[Path]) -> tuple[Split, Split]:
    """From idx files: train images, train labels, test images, test labels."""
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
    content = unzipped(path)
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes([0, 0, 8, rank]):
        raise Damaged(path, f"no idx header of {rank} dimensions of bytes")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise Damaged(path, f"{len(content) - header} bytes of values instead of {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


ENTRY = DataSource(
    60_000,
    10_000,
    (28, 28, 1),
    10,
    read,
    files=_FILES,
    others=(tuple(file.name.removesuffix(".gz") for file in _FILES),),
    folders=(DEBIAN,),
    hint="install Debian's package dataset-fashion-mnist",
    prepared=True,
)
