"""The handwritten digits that come with scikit-learn (Alpaydin & Kaynak 1998, UCI)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plastic_jax.data.source import DataSource, Split


def read(_: Sequence[Path]) -> tuple[Split, Split]:
    """The 1797 digits of scikit-learn: 8x8 grey images, 10 classes.

    Pixels run from 0 to 16 and are stored as round(255 value / 16). The split is fixed: of the
    examples in order of class (those of one class in the file's order) every fifth, from the first
    one on, is for testing. That makes 1437 train and 360 test examples, a fifth of each class to
    within one example. Both splits keep the file's order.
    """
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    images = np.rint(np.asarray(values) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(classes, np.int32)
    testing = np.zeros(len(labels), bool)
    testing[np.argsort(labels, kind="stable")[::5]] = True
    return (images[~testing], labels[~testing]), (images[testing], labels[testing])


ENTRY = DataSource(1_437, 360, (8, 8, 1), 10, read, prepared=True)
