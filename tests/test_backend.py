"""How a process sets JAX and the C library up, whatever its shell says."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from plastic_jax import backend

FAULTS = """
import resource, sys
import numpy as np
from plastic_jax import backend

if sys.argv[1] == "keep":
    backend.keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**25, np.float32)
before = faults()
for _ in range(4):
    np.ones(2**25, np.float32)
print(faults() - before)
"""


# What is tested sets limits of glibc's allocator; another C library has none of them, and `keep_memory` does nothing.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_its_next_use():
    """128 MiB are 64 huge pages at least: without it the kernel hands them out anew each time."""

    def count(how):
        call = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(call, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert count("keep") < 16 < 4 * 64 <= count("as it is")


def python(script, *arguments, **environment):
    """What a fresh interpreter prints as JSON; its JAX has CPU devices only."""
    call = [sys.executable, "-c", script, *map(str, arguments)]
    own = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    ended = subprocess.run(call, capture_output=True, text=True, timeout=120, env=own)
    assert ended.returncode == 0, ended.stderr
    assert "rror" not in ended.stderr, ended.stderr
    return json.loads(ended.stdout)


# A GPU's flags

FLAGS = """
import json, os, sys
import jax
from plastic_jax import backend

if sys.argv[1] == "running":
    jax.devices()
backend.prepare()
backend.prepare()
print(json.dumps([len(jax.devices()), int(jax.jit(lambda x: x + 1)(1)), os.environ.get("XLA_FLAGS", "")]))
"""
HAS_GPU_PLUGIN = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))


def test_xla_starts_with_the_flags(tmp_path):
    """An unknown one ends the process, on a CPU too, which reads them all."""
    flags = backend.gpu_flags("")
    assert flags.count("--") == 2 and "+WHILE" in flags
    devices, two, kept = python(FLAGS, "fresh", XLA_FLAGS=flags, PLASTIC_JAX_CACHE=str(tmp_path))
    assert (devices, two, kept) == (len(os.sched_getaffinity(0)), 2, flags)
    with pytest.raises(AssertionError, match="Unknown flag"):
        python(FLAGS, "fresh", XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=1", PLASTIC_JAX_CACHE=str(tmp_path))


def test_flags_are_set_where_there_is_a_gpus_plugin_and_jax_does_not_run_yet(tmp_path):
    own = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false", "PLASTIC_JAX_CACHE": str(tmp_path)}
    expected = backend.gpu_flags(own["XLA_FLAGS"]) if HAS_GPU_PLUGIN else own["XLA_FLAGS"]
    assert python(FLAGS, "fresh", **own)[2] == expected
    assert python(FLAGS, "running", **own)[2] == own["XLA_FLAGS"]


def test_flags_that_are_set_are_kept():
    mine = "--xla_gpu_enable_command_buffer= --xla_dump_to=x"
    assert backend.gpu_flags(mine) == f"{mine} --xla_gpu_graph_min_graph_size=1"
    assert backend.gpu_flags(backend.gpu_flags(mine)) == backend.gpu_flags(mine)


# Compiled programs

COMPILE = """
import json, sys, time
import jax, jax.numpy as jnp
from plastic_jax import backend

backend.prepare()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
heard = []
jax.monitoring.register_event_listener(lambda event, **_: heard.append(event.rpartition("/")[2]))
while time.time() < float(sys.argv[1]):  # so that all begin at once
    pass
for n in range(20):
    jax.jit(lambda x: jnp.sin(x) @ x + n)(jnp.ones((8, 8)))
caches = jax.config.jax_persistent_cache_enable_xla_caches
print(json.dumps([heard.count("cache_hits"), heard.count("cache_misses"), caches]))
"""


def test_processes_that_start_at_once_share_compiled_programs(tmp_path):
    cache = {"PLASTIC_JAX_CACHE": str(tmp_path)}
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: python(COMPILE, time.time() + 8, **cache), range(3)))
    assert all(hits + misses > 20 for hits, misses, _ in found)
    hits, misses, caches = python(COMPILE, 0, **cache)
    assert hits > 20 and misses == 0
    assert caches == "xla_gpu_per_fusion_autotune_cache_dir"  # how a GPU's operations were tuned
    assert len(list((tmp_path / "xla").glob("*-cache"))) == hits


def test_what_was_read_longest_ago_goes_when_there_is_too_much(tmp_path):
    deep = tmp_path / "xla" / "tuning"
    deep.mkdir(parents=True)
    for age, file in enumerate((tmp_path / "xla" / "a", deep / "b", tmp_path / "xla" / "c", tmp_path / "xla" / "d")):
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e8))
    (tmp_path / "xla" / "dangling").symlink_to(tmp_path / "nowhere")
    backend.prune(tmp_path / "xla", 400)
    assert sum(file.is_file() for file in tmp_path.rglob("*")) == 4
    backend.prune(tmp_path / "xla", 250)
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["a", "b"]
    backend.prune(tmp_path / "nowhere")


# Random draws

DRAWS = """
import hashlib, json, sys
import jax, jax.numpy as jnp, numpy as np
from plastic_jax import models, streams
from plastic_jax.data import sampler
from plastic_jax.study.config import Config
from plastic_jax.kernels import Form

drawn = hashlib.sha256()
put = lambda tree: [drawn.update(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]
for initialisation in ("pytorch", "he"):
    point = Config(model="mlp", width=4, initialisation=initialisation)
    net = models.network(point, (4, 4, 1), 5, Form("mapped"))
    put(jax.jit(net.init)(streams.stream(7, streams.INITIALISATION)))
own = dict(train_examples=0, validation_fraction=0.2, label_noise=0.3, nesting=(2, 0.5))
put(vars(sampler.train_set(7, np.arange(50, dtype=np.int32) % 5, 5, **own)))
seed, one, all_of = jnp.uint32(7), jnp.int32(1), jnp.arange(40)

def steps(epoch):  # as the core does: inside a loop, of a block of trials
    def add(i, sums):
        order = sampler.epoch_order(seed, one, epoch + i, all_of, jnp.int32(30))
        return sums[0] * 3 + order, sampler.mixture(seed, one, epoch + i, all_of, jnp.int32(20), jnp.float32(0.4), 8)
    return jax.lax.fori_loop(0, 3, add, (jnp.zeros(40, jnp.int32), jnp.zeros(8, jnp.int32)))

put(jax.jit(jax.vmap(steps))(jnp.arange(3)))
print(json.dumps(drawn.hexdigest()[:16]))
"""


SHELL = {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_RANDOM_SEED_OFFSET": "5", "JAX_DEFAULT_PRNG_IMPL": "rbg"}


@pytest.mark.parametrize("environment", [{}, SHELL], ids=["defaults", "set"])
def test_draws_do_not_depend_on_the_shell(environment):
    """Contract 1: bit for bit what they are by default, and were before they were pinned."""
    assert python(DRAWS, **environment) == "7d0990db783b66bc"
