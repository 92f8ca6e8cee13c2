"""How a process sets JAX up: one CPU device a core, compiled programs kept for later runs; what the device is."""

import contextlib
import ctypes
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


def prepare() -> None:
    """Ask for one CPU device for each core and turn JAX's persistent compilation cache on.

    Where JAX runs already, its devices stay as they are; a cache folder that is set stays too.
    """
    keep_memory()
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def device() -> str:
    """The local devices in words: `2 x AMD EPYC 7B13 (cpu)`."""
    first = jax.local_devices()[0]
    kind = first.device_kind
    if first.platform == "cpu":
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            kind = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), kind)
    return f"{jax.local_device_count()} x {kind} ({first.platform})"
