"""TFDS builders of the built-in data sets that work without TensorFlow.

They differ from TFDS's own in what would need it: images are stored as bytes in array_record files,
and the archives are read by `originals`. The examples keep the original files' order.
"""

import contextlib
import fcntl
import functools
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.utils import Size

from plastic_jax.data import originals
from plastic_jax.data.sets import DATASETS
from plastic_jax.errors import InputError


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore
    """Reads `download_config.manual_dir` where that holds the original files, else downloads them.

    Not registered in TFDS, which has data sets of the same names; the names are equal so that a
    file which TFDS has downloaded for its own one is found.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The original files, as published."

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers the sizes and SHA-256 sums that downloads must have."""
        super().__init_subclass__(**kwargs)
        cls.url_infos = {
            file.url: UrlInfo(size=Size(file.size), checksum=file.sha256, filename=file.name)
            for file in DATASETS[cls.name].files
        }

    def _info(self) -> tfds.core.DatasetInfo:
        source = DATASETS[self.name]
        image = tfds.features.Tensor(shape=source.shape, dtype=np.uint8, encoding="bytes")
        label = tfds.features.ClassLabel(num_classes=source.classes)
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        try:
            paths = originals.find(self.name, Path(dl_manager.manual_dir))
        except AssertionError:  # how TFDS says that the folder does not exist or is empty
            paths = ()
        urls = [file.url for file in DATASETS[self.name].files]
        if urls and not paths:
            downloaded: Any = dl_manager.download(urls)
            paths = tuple(Path(path) for path in downloaded)
        train, test = originals.read(self.name, paths)
        return {"train": self._generate_examples(*train), "test": self._generate_examples(*test)}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            yield index, {"image": image, "label": label}


@functools.cache
def builder(name: str) -> type[_Builder]:
    """The builder of a data set."""
    return type(
        name.title().replace("_", ""),
        (_Builder,),
        {"name": name, "__doc__": f"{name}, as published."},
        skip_registration=True,
    )


def prepare(name: str, root: Path, key: str, folder: Path | None) -> Path:
    """Where TFDS has prepared a built-in data set from one source; prepares it if it has not yet.

    Processes wait for each other at a lock, which dies with its process. Where the file system has
    no locks the first to finish wins and the others take what it left. TFDS writes into a folder
    of its own and renames it once it is whole: an interrupted preparation leaves none.

    Args:
      name: a built-in data set.
      root: TFDS's folder; prepared data go below it, in plastic_jax/`key`, downloads in downloads.
      key: stands for the source's content, so that other contents are prepared elsewhere.
      folder: holds the original files; None to download them (and for digits).

    Returns:
      The folder of the prepared data set.

    Raises:
      InputError: no network, a damaged file, or `root` cannot be written.
    """
    home = root / "plastic_jax" / key
    prepared = home / name / str(_Builder.VERSION)
    if prepared.exists():
        return prepared
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _alone(home / f"{name}.lock"):
            if not prepared.exists():
                made = builder(name)(data_dir=home, file_format="array_record")
                _prepare(made, root / "downloads", folder)
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as the latter
        if not prepared.exists():
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"TFDS_DATA_DIR={str(root)!r}: {name} cannot be prepared there ({reason}); name a "
                "folder that can be written to and has room"
            ) from error
    return prepared


def _prepare(builder: tfds.core.DatasetBuilder, downloads: Path, folder: Path | None) -> None:
    name = builder.name
    if folder is None:
        _check_network(name, downloads)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False, force_checksums_validation=True)
    # TFDS prints that it downloads, whether or not it does.
    out = sys.stderr if folder is None and DATASETS[name].files else io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except NonMatchingChecksumError as error:
        raise _no_download(name, downloads, "it does not have the registered SHA-256") from error
    except (requests.RequestException, tfds.download.DownloadError) as error:
        raise _no_download(name, downloads, type(error).__name__) from error


def _check_network(name: str, downloads: Path) -> None:
    """Asks once for what is still to be downloaded: TFDS itself tries for minutes."""
    done = {url for path in (downloads / name).glob("*.INFO") for url in json.loads(path.read_text()).get("urls", ())}
    for url in [file.url for file in DATASETS[name].files if file.url not in done][:1]:
        try:
            with requests.get(url, stream=True, timeout=10) as response:
                response.raise_for_status()
        except requests.RequestException as error:
            raise _no_download(name, downloads, type(error).__name__) from error


def _no_download(name: str, downloads: Path, reason: str) -> InputError:
    hint = f"{DATASETS[name].hint}, or " * bool(DATASETS[name].hint)
    return InputError(
        f"dataset={name!r}: none of its files was found and the download failed ({reason}): "
        f"{hint}put {originals.what_to_put(name)} into {downloads / 'manual'} or a folder named "
        "by --data_dir"
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file where the file system has locks."""
    with path.open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
