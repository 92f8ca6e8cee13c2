"""How a process sets JAX up: one CPU device a core, compiled programs kept for later runs; what the device is."""

import contextlib
import os
from pathlib import Path

import jax


def cache() -> Path:
    """The per-user folder for compiled programs: $PLASTIC_JAX_CACHE, else plastic_jax in the user's cache folder."""
    own = os.environ.get("PLASTIC_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "plastic_jax"


def prepare() -> None:
    """Ask for one CPU device for each core and turn JAX's persistent compilation cache on.

    Where JAX runs already, its devices stay as they are; a cache folder that is set stays too.
    """
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
