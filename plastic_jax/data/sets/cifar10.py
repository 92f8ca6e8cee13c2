"""CIFAR-10 (Krizhevsky 2009)."""

from functools import partial

from plastic_jax.data.cifar import URL, read
from plastic_jax.data.source import DataSource, OriginalFile

_FOLDER = "cifar-10-batches-bin"
_INSIDE = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")

ENTRY = DataSource(
    50_000,
    10_000,
    (32, 32, 3),
    10,
    partial(read, files=_INSIDE, label_bytes=1),
    files=(
        OriginalFile(
            URL + "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    others=(tuple(f"{_FOLDER}/{file}" for file in _INSIDE), _INSIDE),
    unpacked=_FOLDER,
    prepared=True,
)
