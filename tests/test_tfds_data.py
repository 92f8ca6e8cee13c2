"""Data sets that are not built in, as TFDS has prepared them."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import refused

from plastic_jax import data

pytestmark = pytest.mark.usefixtures("tfds_dir")


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
