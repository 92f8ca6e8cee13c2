"""How a process sets JAX up: one CPU device a core, compiled programs kept for later runs; what the device is."""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

import jax


def cache() -> Path:
    """The per-user folder for compiled programs: $PLASTIC_JAX_CACHE, else plastic_jax in the user's cache folder."""
    own = os.environ.get("PLASTIC_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "plastic_jax"


# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX, and what they are set to.
_MALLOC = ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26), (-8, 1))


def keep_memory() -> None:
    """Have the C library keep freed memory for its next use, where it is glibc.

    It would give large blocks back to the kernel at once, and page faults were 19 to 25 % of a ResNet's training on two
    CPU cores. One arena for all threads, since others hold blocks of less than 64 MiB.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)


_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_GPU_FLAGS_BELOW = (0, 13)  # the JAX that they were not tried with: a flag that XLA does not know ends the process
_GPU_FLAGS = {
    "xla_gpu_enable_command_buffer": "+WHILE,+CONDITIONAL,+DYNAMIC_SLICE_FUSION",
    "xla_gpu_graph_min_graph_size": "1",
}


def gpu_flags(given: str) -> str:
    """XLA_FLAGS with a GPU's loops as command buffers, where `given` does not say otherwise.

    A loop's condition is then asked on the device, not on the host at every turn (an H200, 2026-11, JAX 0.11: 3 % of a
    ResNet's time, 12 to 18 % of an MLP's).
    """
    return " ".join([given, *(f"--{name}={value}" for name, value in _GPU_FLAGS.items() if name not in given)]).strip()


CACHE_BYTES = 2 * 2**30
"""What compiled programs may take in the user's cache folder when a run begins."""


def prune(folder: Path, most: int = CACHE_BYTES) -> None:
    """Delete the files of `folder` that were read longest ago, until the others take less than `most` bytes.

    JAX's own bound, jax_compilation_cache_max_size, stores nothing more once a process was killed in the middle of an
    entry, nor in a folder from before it was set. A file that is gone when another process wants it is compiled again.
    """
    found = []
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another run may be deleting it too
            status = file.stat()
            if file.is_file():
                found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    kept = 0
    for _, size, file in sorted(found, reverse=True):
        kept += size
        if kept > most:
            with contextlib.suppress(OSError):
                file.unlink()


def prepare() -> None:
    """Ask for one CPU device for each core, set a GPU's flags and turn JAX's persistent compilation cache on.

    Where JAX runs already, its devices and flags stay as they are; a cache folder that is set stays too. Beside
    compiled programs XLA keeps there how it has tuned a GPU's operations.
    """
    keep_memory()
    with contextlib.suppress(RuntimeError):  # it runs already
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
        if jax.__version_info__ < _GPU_FLAGS_BELOW and any(map(importlib.util.find_spec, _GPU_PLUGINS)):
            os.environ["XLA_FLAGS"] = gpu_flags(os.environ.get("XLA_FLAGS", ""))
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        prune(cache() / "xla")
        jax.config.update("jax_compilation_cache_dir", str(cache() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir")


def device() -> str:
    """The local devices in words: `2 x AMD EPYC 7B13 (cpu)`."""
    first = jax.local_devices()[0]
    kind = first.device_kind
    if first.platform == "cpu":
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            kind = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), kind)
    return f"{jax.local_device_count()} x {kind} ({first.platform})"
