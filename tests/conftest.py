"""Four virtual CPU devices, strict rank promotion, and compiled programs shared by the tests of a session."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("WANDB_MODE", "offline")

import jax
import pytest

from plastic_jax.registry import Registry

if TYPE_CHECKING:
    from wandb_server import Server

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The tests build the same few programs many times over; a cache of the session's own, which its workers share, compiles
# each once.
_OURS = "PLASTIC_JAX_TESTS_COMPILED" not in os.environ  # not a worker
if _OURS:
    os.environ["PLASTIC_JAX_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="plastic_jax-tests-")
_COMPILED = os.environ["PLASTIC_JAX_TESTS_COMPILED"]
jax.config.update("jax_compilation_cache_dir", _COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def register() -> Iterator[Callable[[Registry, str, object], None]]:
    """`register(registry, name, entry)` for one test."""
    added = []

    def add(registry: Registry, name: str, entry: object) -> None:
        registry.add(name, entry)
        added.append((registry, name))

    yield add
    for registry, name in added:
        registry.remove(name)


@pytest.fixture
def tfds_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TFDS's folder: one of its own for each test."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official sizes of a few examples, so that tests can write whole files."""
    from small_data import shrunk

    from plastic_jax.data import DATASETS

    for name, source in shrunk().items():
        monkeypatch.setitem(DATASETS._found, name, source)


@pytest.fixture
def without_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For W&B: no key, no settings and no server but those that a test names."""
    from wandb_server import NOBODY

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Server]":
    """A server of W&B's on this machine, with a key."""
    from wandb_server import KEY, Server

    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.stop()


def pytest_unconfigure() -> None:
    if _OURS:
        shutil.rmtree(_COMPILED, ignore_errors=True)
