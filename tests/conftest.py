"""Four virtual CPU devices, strict rank promotion, and compiled programs shared by the tests of a session."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

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


def pytest_unconfigure() -> None:
    if _OURS:
        shutil.rmtree(_COMPILED, ignore_errors=True)
