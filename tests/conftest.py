"""Four virtual CPU devices, strict rank promotion, and compiled programs shared by the tests of a session."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")

import jax
import pytest

from plastic_jax.registry import Registry

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
    from small_data import SMALL

    from plastic_jax.data import originals

    for name, spec in SMALL.items():
        monkeypatch.setitem(originals.SPECS, name, spec)


def pytest_unconfigure() -> None:
    if _OURS:
        shutil.rmtree(_COMPILED, ignore_errors=True)
