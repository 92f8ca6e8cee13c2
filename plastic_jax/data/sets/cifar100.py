"""CIFAR-100 with its fine labels (Krizhevsky 2009)."""

from functools import partial

from plastic_jax.data.cifar import URL, read
from plastic_jax.data.source import DataSource, OriginalFile

_FOLDER = "cifar-100-binary"
_INSIDE = ("train.bin", "test.bin")

ENTRY = DataSource(
    50_000,
    10_000,
    (32, 32, 3),
    100,
    partial(read, files=_INSIDE, label_bytes=2),
    files=(
        OriginalFile(
            URL + "cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
    others=(tuple(f"{_FOLDER}/{file}" for file in _INSIDE), _INSIDE),
    unpacked=_FOLDER,
    prepared=True,
)
