"""The binary version of CIFAR (Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html)."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plastic_jax.data.source import Damaged, Split, unzipped

URL = "https://www.cs.toronto.edu/~kriz/"


def read(paths: Sequence[Path], files: Sequence[str], label_bytes: int) -> tuple[Split, Split]:
    """The splits of an archive, or of the `files` in it: those of the train set, then the test set's.

    Raises:
      Damaged: a file is missing in the archive, or is no sequence of whole records.
    """
    if len(paths) == 1:
        contents = _from_archive(paths[0], files)
        sources = [paths[0]] * len(files)
    else:
        contents = [path.read_bytes() for path in paths]
        sources = list(paths)
    parts = [_records(content, label_bytes, source) for content, source in zip(contents, sources, strict=True)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return (images, labels), parts[-1]


def _records(content: bytes, label_bytes: int, path: Path) -> Split:
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
        with tarfile.open(fileobj=io.BytesIO(unzipped(path)), mode="r:") as archive:
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
