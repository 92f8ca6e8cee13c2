"""The built-in data sets. Each file here is one, and a word in `DATASETS`.

URLs, sizes and SHA-256 sums of their files are those that TFDS 4.9.10 has registered.
"""

from plastic_jax.data.source import DataSource
from plastic_jax.registry import Registry

DATASETS: Registry[DataSource] = Registry(
    "data set", __name__, ("digits", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")
)
