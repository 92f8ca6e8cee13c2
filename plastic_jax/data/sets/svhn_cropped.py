"""SVHN's cropped digits, without the extra ones (Netzer et al. 2011, ufldl.stanford.edu/housenumbers)."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plastic_jax.data.source import Damaged, DataSource, OriginalFile, Split

_URL = "http://ufldl.stanford.edu/housenumbers/"


def read(paths: Sequence[Path]) -> tuple[Split, Split]:
    """From train_32x32.mat and test_32x32.mat; label 10 there is the digit 0."""
    train, test = (_split(path) for path in paths)
    return train, test


def _split(path: Path) -> Split:
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


ENTRY = DataSource(
    73_257,
    26_032,
    (32, 32, 3),
    10,
    read,
    files=(
        OriginalFile(
            _URL + "train_32x32.mat",
            182_040_794,
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        OriginalFile(
            _URL + "test_32x32.mat",
            64_275_384,
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    ),
    prepared=True,
)
