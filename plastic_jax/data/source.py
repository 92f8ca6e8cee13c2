"""What a data set is: its sizes, its original files, and how these are read."""

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Split = tuple[np.ndarray, np.ndarray]
"""Images, uint8 [N, H, W, C], and labels, int32 [N]."""


@dataclass(frozen=True)
class DatasetSpec:
    """What a plan needs to know of a data set. `shape` is (height, width, channels)."""

    name: str
    train_examples: int
    test_examples: int
    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class OriginalFile:
    """A published file: where it can be downloaded, its bytes and its SHA-256."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name, without a folder."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class DataSource:
    """A data set as it is registered. Sizes and splits are the official ones.

    `read` gets the paths of the original files, in the order of `files` or of one of `others` (none, if there are no
    files), and returns the train and the test split: images as uint8 [N, H, W, C], labels from 0 on.
    """

    train_examples: int
    test_examples: int
    shape: tuple[int, int, int]
    """Height, width and channels of an image."""
    classes: int
    read: Callable[[Sequence[Path]], tuple[Split, Split]]
    files: tuple[OriginalFile, ...] = ()
    others: tuple[tuple[str, ...], ...] = ()
    """Other sets of files that a folder may hold it as, relative to the folder; those of `files` come first."""
    unpacked: str = ""
    """The folder that its archive is unpacked to."""
    folders: tuple[Path, ...] = ()
    """Where else its files are looked for."""
    hint: str = ""
    """How else to get its files, in words."""
    prepared: bool = False
    """Whether TFDS, where it is installed, prepares it once; else `read` is called in each run."""


class Damaged(ValueError):
    """A file that is not what its name says."""

    def __init__(self, path: Path, reason: str):
        """Names the file and what is wrong with it."""
        first_line = reason.partition("\n")[0]
        super().__init__(f"{path} is damaged or not the original ({first_line})")


def unzipped(path: Path) -> bytes:
    """A file's bytes, gunzipped and checked against gzip's checksum where it is a gzip file.

    Raises:
      Damaged: they are cut short or fail the check.
    """
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(path, str(error)) from error
