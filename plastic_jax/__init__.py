"""plastic_jax: how what a network has learned before changes what it can learn next.

`run(config)` trains a sweep and reports it; `load(workdir)` reads one back.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plastic_jax.running.loading import load
    from plastic_jax.running.runner import run

__all__ = ["load", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use: `import plastic_jax` alone does not start JAX."""
    if name == "load":
        from plastic_jax.running.loading import load

        return load
    if name == "run":
        from plastic_jax.running.runner import run

        return run
    raise AttributeError(f"module 'plastic_jax' has no attribute {name!r}")
