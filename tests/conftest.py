"""Four virtual CPU devices, strict rank promotion, and compiled programs shared by the tests of a session."""

import os
import shutil
import tempfile

os.environ.setdefault("WANDB_MODE", "offline")

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The tests build the same few programs many times over; a cache of the session's own compiles each once.
_COMPILED = tempfile.mkdtemp(prefix="plastic_jax-tests-")
jax.config.update("jax_compilation_cache_dir", _COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_unconfigure() -> None:
    shutil.rmtree(_COMPILED, ignore_errors=True)
