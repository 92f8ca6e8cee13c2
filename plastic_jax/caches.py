"""The per-user folder for what later runs can use again."""

import os
from pathlib import Path


def folder() -> Path:
    """$PLASTIC_JAX_CACHE, else plastic_jax in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("PLASTIC_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "plastic_jax"


def compilation() -> None:
    """Turn JAX's persistent compilation cache on."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
