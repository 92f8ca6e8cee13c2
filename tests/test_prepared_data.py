"""Where a data set's files are looked for, downloads, and TFDS's copies."""

import concurrent.futures
import hashlib
import http.server
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_data import assert_small, no_locks, overwrite, python, refused, write_cifar

from plastic_jax import data
from plastic_jax.data import DATASETS
from plastic_jax.data.source import OriginalFile

pytestmark = pytest.mark.usefixtures("tfds_dir")

# Where files are looked for


@pytest.mark.usefixtures("small")
def test_a_data_dir_without_the_files(tmp_path: Path) -> None:
    """No folder, an empty folder, a part of the files: what is wrong and what to put there."""
    sentence = refused("cifar10", tmp_path / "nowhere")
    assert sentence.startswith(f"--data_dir='{tmp_path}/nowhere' is no folder")
    sentence = refused("svhn_cropped", tmp_path)
    assert "holds no original file of svhn_cropped" in sentence
    assert "train_32x32.mat and test_32x32.mat" in sentence
    (write_cifar(tmp_path, "cifar10", "folder") / "data_batch_2.bin").unlink()
    assert "lacks cifar-10-batches-bin/data_batch_2.bin of cifar10" in refused("cifar10", tmp_path)


@pytest.mark.usefixtures("small")
def test_other_files_are_not_answered_from_the_cache(tmp_path: Path) -> None:
    """Another folder's content, and content changed in place with the old time, are read anew."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_cifar(tmp_path / folder, "cifar10", "files")
    overwrite(tmp_path / "two" / "test_batch.bin", 1, b"\x07\x08")
    assert_small(data.load("cifar10", str(tmp_path / "one")), "cifar10")
    two = data.load("cifar10", str(tmp_path / "two"))
    np.testing.assert_array_equal(two.test_images[0, 0, :2, 0], [7, 8])

    batch = tmp_path / "one" / "test_batch.bin"
    before = batch.stat()
    overwrite(batch, 1, b"\x09\x0a")
    os.utime(batch, ns=(before.st_atime_ns, before.st_mtime_ns))
    one = data.load("cifar10", str(tmp_path / "one"))
    np.testing.assert_array_equal(one.test_images[0, 0, :2, 0], [9, 10])


@pytest.mark.usefixtures("small")
def test_a_tfds_folder_that_cannot_be_written(tmp_path: Path, tfds_dir: Path) -> None:
    """A file where the folder should be."""
    write_cifar(tmp_path, "cifar10")
    tfds_dir.write_text("")
    sentence = refused("cifar10", tmp_path)
    assert sentence.startswith(f"TFDS_DATA_DIR='{tfds_dir}': cifar10 cannot be prepared there")


# Downloads, from a server on this machine


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> Iterator[Path]:
    """A folder that is served over HTTP, and named as the place that CIFAR-10 is downloaded from."""
    from plastic_jax.data import builders

    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *args) -> None:
            """Says nothing."""

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        archive = write_cifar(folder, "cifar10")
        original = OriginalFile(
            f"http://127.0.0.1:{httpd.server_port}/{archive.name}",
            archive.stat().st_size,
            hashlib.sha256(archive.read_bytes()).hexdigest(),
        )
        monkeypatch.setitem(DATASETS._found, "cifar10", replace(DATASETS["cifar10"], files=(original,)))
        info = builders.UrlInfo(builders.Size(original.size), original.sha256, original.name)
        monkeypatch.setattr(builders.builder("cifar10"), "url_infos", {original.url: info})
        yield folder
        httpd.shutdown()
        thread.join()


def test_a_download(server: Path, tfds_dir: Path) -> None:
    """TFDS downloads and checks the file; afterwards it needs neither the server nor the download."""
    assert_small(data.load("cifar10"), "cifar10")
    (server / "cifar-10-binary.tar.gz").unlink()
    assert_small(data.load("cifar10"), "cifar10")
    prepared = list(tfds_dir.glob("plastic_jax/downloaded/cifar10/*"))
    for path in prepared[0].iterdir():
        path.unlink()
    prepared[0].rmdir()
    assert_small(data.load("cifar10"), "cifar10")  # from the download that TFDS has kept


def test_a_download_with_another_checksum(server: Path, tfds_dir: Path) -> None:
    """What the server sends is not the registered file."""
    overwrite(server / "cifar-10-binary.tar.gz", 1000, b"damaged")
    sentence = refused("cifar10")
    assert "the download failed (it does not have the registered SHA-256)" in sentence
    assert not list(tfds_dir.rglob("dataset_info.json"))


def test_no_file_and_no_server(server: Path, tfds_dir: Path) -> None:
    """The sentence says what to put where."""
    (server / "cifar-10-binary.tar.gz").unlink()
    sentence = refused("cifar10")
    assert sentence.startswith("dataset='cifar10': none of its files was found and the download failed")
    assert "HTTPError" in sentence
    assert "put cifar-10-binary.tar.gz (or the folder cifar-10-batches-bin unpacked from it)" in sentence
    assert str(tfds_dir / "downloads" / "manual") in sentence
    assert "--data_dir" in sentence


def test_no_file_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused at once: TFDS alone would try for minutes. Debian's package is named."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    closed = OriginalFile("http://127.0.0.1:9/train-images-idx3-ubyte.gz", 1, "00")
    source = replace(DATASETS["fashion_mnist"], files=(closed,), folders=(tmp_path,))
    monkeypatch.setitem(DATASETS._found, "fashion_mnist", source)
    sentence = refused("fashion_mnist")
    assert "the download failed (ConnectionError)" in sentence
    assert "install Debian's package dataset-fashion-mnist" in sentence


# Preparing: interrupted, and twice at once


@pytest.mark.usefixtures("small")
def test_a_killed_preparation_leaves_nothing_broken(tmp_path: Path, tfds_dir: Path) -> None:
    """kill -9 in the middle of writing; the next load prepares it whole."""
    write_cifar(tmp_path, "cifar10")
    process = python(
        """
        import os, signal
        from plastic_jax import data
        from plastic_jax.data import builders
        import small_data
        data.DATASETS._found.update(small_data.shrunk())
        whole = builders.builder("cifar10")._generate_examples
        def part(self, images, labels):
            for key, example in whole(self, images, labels):
                if key == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield key, example
        builders.builder("cifar10")._generate_examples = part
        data.load("cifar10", sys.argv[1])
        """,
        str(tmp_path),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    assert list(tfds_dir.glob("plastic_jax/*/cifar10/incomplete*"))  # it was at work
    assert_small(data.load("cifar10", str(tmp_path)), "cifar10")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_prepare_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    """The second waits for the first; on a file system without locks it wins, and the first takes its copy."""
    from plastic_jax.data import builders

    write_cifar(tmp_path, "cifar10")
    process = python(
        """
        import time
        from pathlib import Path
        from plastic_jax import data
        from plastic_jax.data import builders
        import small_data
        data.DATASETS._found.update(small_data.shrunk())
        folder = Path(sys.argv[1])
        whole = builders.builder("cifar10")._generate_examples
        def slow(self, images, labels):
            for key, example in whole(self, images, labels):
                (folder / "started").touch()
                while not (folder / "go on").exists():
                    time.sleep(0.01)
                yield key, example
        builders.builder("cifar10")._generate_examples = slow
        if sys.argv[2] == "False":
            builders.fcntl.flock = small_data.no_locks
        small_data.assert_small(data.load("cifar10", str(folder)), "cifar10")
        """,
        str(tmp_path),
        str(locks),
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    if not locks:
        monkeypatch.setattr(builders.fcntl, "flock", no_locks)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        second = executor.submit(data.load, "cifar10", str(tmp_path))
        done, _ = concurrent.futures.wait([second], timeout=0.3 if locks else 30)
        assert bool(done) != locks
        (tmp_path / "go on").touch()
        assert_small(second.result(timeout=30), "cifar10")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


@pytest.mark.usefixtures("small")
def test_a_damaged_prepared_copy(tmp_path: Path, tfds_dir: Path) -> None:
    """Named with its folder; deleting that is enough."""
    write_cifar(tmp_path, "cifar10")
    data.load("cifar10", str(tmp_path))
    (shard,) = tfds_dir.glob("plastic_jax/*/cifar10/*/*train.array_record*")
    overwrite(shard, 20_000, b"damaged")
    assert f"has prepared in {shard.parent} is damaged" in refused("cifar10", tmp_path)
    for path in shard.parent.iterdir():
        path.unlink()
    shard.parent.rmdir()
    assert_small(data.load("cifar10", str(tmp_path)), "cifar10")
