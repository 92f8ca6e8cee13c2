"""Reads what TFDS has prepared as array_record, without TensorFlow."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from plastic_jax.data.sets import DATASETS
from plastic_jax.data.source import DatasetSpec, Split
from plastic_jax.errors import InputError

_PROTO: Any = tf_example_pb2  # its classes come into being when it is imported

_BATCH = 4096
"""Records read at once: one by one is several times slower."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set of images of one size: its builder and the names of its two features."""

    spec: DatasetSpec
    builder: Any
    image: str
    label: str


def find(name: str, root: Path) -> Path:
    """The folder of a prepared data set, its newest version if the name states none.

    Args:
      name: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.
      root: TFDS's folder, which holds NAME/[CONFIG/]VERSION/dataset_info.json.

    Raises:
      InputError: there is none, or it has several configs and the name states none.
    """
    base, _, version = name.partition(":")
    folders = []
    if re.fullmatch(r"\w+(/[\w.+-]+)?", base):
        folders = _versions(root / base, version)
        for config in [] if folders else sorted((root / base).glob("*")):
            folders += _versions(config, version)
    if not folders:
        raise InputError(
            f"dataset={name!r} is neither built in ({', '.join(DATASETS.names)}) nor prepared by TFDS in "
            f"{root}: name another, or prepare it with `tfds build {base} "
            "--file_format=array_record` (extra tfds), or name TFDS's folder with --data_dir"
        )
    parents = sorted({folder.parent.relative_to(root).as_posix() for folder in folders})
    if len(parents) > 1:
        raise InputError(f"dataset={name!r} has several configs: name one of {', '.join(parents)}")
    return max(folders, key=lambda folder: tfds.core.Version(folder.name))


def _versions(folder: Path, version: str) -> list[Path]:
    """The folders of a data set's prepared versions; of one version where it is stated."""
    return [
        path.parent
        for path in folder.glob("*/dataset_info.json")
        if tfds.core.Version.is_valid(path.parent.name) and version in ("", path.parent.name)
    ]


def open_prepared(name: str, folder: Path) -> Prepared:
    """Opens a prepared data set and checks that it is one for image classification.

    Args:
      name: what to call it.
      folder: as from `find`.

    Raises:
      InputError: it is damaged, not in a format that can be read without TensorFlow, or has no
        uint8 image, no class label, no train or no test split.
    """
    try:
        builder: Any = tfds.builder_from_directory(folder)
        info = builder.info
    except Exception as error:  # json's, protobuf's and TFDS's own, as the damage may be
        raise _damaged(name, folder, error) from error
    formats = {file_format.value for file_format in info.available_file_formats()}
    if "array_record" not in formats:
        raise InputError(
            f"dataset={name!r} is prepared in {folder} as {', '.join(sorted(formats))}, which only "
            "TensorFlow reads: convert it (extra tfds) with `tfds convert_format "
            f"--dataset_version_dir={folder.resolve()} --out_file_format=array_record`"
        )
    if absent := {"train", "test"} - set(info.splits):
        raise InputError(
            f"dataset={name!r} has no {' and no '.join(sorted(absent))} split, only "
            f"{', '.join(sorted(info.splits))}: both are needed"
        )
    image, label = info.supervised_keys if _is_pair(info.supervised_keys) else ("image", "label")
    features = info.features
    if (
        image not in features
        or label not in features
        or not isinstance(features[image], tfds.features.Image | tfds.features.Tensor)
        or len(features[image].shape) != 3
        or features[image].np_dtype != np.uint8
        or not isinstance(features[label], tfds.features.ClassLabel)
        or features[label].num_classes is None
    ):
        raise InputError(
            f"dataset={name!r} in {folder} has the features {', '.join(features)}: an image of "
            "uint8 [H, W, C] and its class label are needed"
        )
    examples = {split: info.splits[split].num_examples for split in ("train", "test")}
    shape, classes = features[image].shape, features[label].num_classes
    spec = DatasetSpec(name, examples["train"], examples["test"], shape, classes)
    opened = Prepared(spec, builder, image, label)
    if None in shape:  # not stated: that of the first example, to which `read` holds the others
        ((first, _),) = _examples(opened, "train", 1)
        opened = dataclasses.replace(opened, spec=dataclasses.replace(spec, shape=first.shape))
    return opened


def read(prepared: Prepared) -> tuple[Split, Split]:
    """The train and the test split, in the order in which TFDS has stored them.

    Raises:
      InputError: a file is damaged or missing, images differ in size, or an example has no label.
    """
    spec = prepared.spec
    return (
        _read_split(prepared, "train", spec.train_examples),
        _read_split(prepared, "test", spec.test_examples),
    )


def _read_split(prepared: Prepared, split: str, examples: int) -> Split:
    spec = prepared.spec
    images = np.empty((examples, *spec.shape), np.uint8)
    labels = np.empty(examples, np.int32)
    for index, (image, label) in enumerate(_examples(prepared, split, examples)):
        if image.shape != spec.shape:
            raise InputError(
                f"dataset={spec.name!r} has images of {image.shape} beside those of {spec.shape}: "
                "all must have one size"
            )
        images[index], labels[index] = image, label
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= spec.classes:
        raise InputError(
            f"dataset={spec.name!r} has {split} labels outside 0 to {spec.classes - 1}: every example needs a label"
        )
    return images, labels


def _examples(prepared: Prepared, split: str, examples: int) -> Iterator[tuple[np.ndarray, int]]:
    """The first `examples` images and labels of a split.

    Decodes the two features that are needed from the raw records, which takes a third of the time
    of TFDS's own decoding of whole examples.
    """
    decode = prepared.builder.info.features[prepared.image].decode_example_np
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        source = prepared.builder.as_data_source(split, deserialize_method=raw, file_format="array_record")
        for start in range(0, examples, _BATCH):
            for record in source.__getitems__(range(start, min(start + _BATCH, examples))):
                features = _PROTO.Example.FromString(record).features.feature
                values = features[prepared.image]
                if values.HasField("bytes_list"):
                    image = decode(values.bytes_list.value[0])
                else:
                    image = decode(np.array(values.int64_list.value, np.uint8))
                yield image, features[prepared.label].int64_list.value[0]
    except Exception as error:
        raise _damaged(prepared.spec.name, Path(prepared.builder.data_dir), error) from error


def _damaged(name: str, folder: Path, error: Exception) -> InputError:
    first_line = str(error).partition("\n")[0]
    return InputError(
        f"dataset={name!r}: what TFDS has prepared in {folder} is damaged ({first_line}): delete "
        "that folder and prepare it again"
    )


def _is_pair(keys: Any) -> bool:
    return isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(key, str) for key in keys)
