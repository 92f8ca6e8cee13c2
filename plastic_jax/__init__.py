"""plastic_jax: how what a network has learned before changes what it can learn next.

`run(config)` trains a sweep and reports it; `load(workdir)` reads one back. `register` takes in methods and models of
your own: subclasses of `Intervention` and `Diagnostic` with their `Field`s and `Column`s, an `Optimiser`, a `Model`, a
`DataSource`, an `Experiment`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plastic_jax.data import DataSource
    from plastic_jax.fields import Column, Field
    from plastic_jax.methods.diagnostics import Diagnostic
    from plastic_jax.methods.interventions import Intervention
    from plastic_jax.methods.optimisers import Optimiser
    from plastic_jax.methods.view import Trained, View
    from plastic_jax.models import Model, Units
    from plastic_jax.running.experiment import Experiment
    from plastic_jax.running.loading import load
    from plastic_jax.running.runner import run
    from plastic_jax.study.plugins import register

_PLACES = {
    "load": "running.loading",
    "run": "running.runner",
    "register": "study.plugins",
    "Column": "fields",
    "DataSource": "data",
    "Field": "fields",
    "Diagnostic": "methods.diagnostics",
    "Experiment": "running.experiment",
    "Intervention": "methods.interventions",
    "Optimiser": "methods.optimisers",
    "Trained": "methods.view",
    "View": "methods.view",
    "Model": "models",
    "Units": "models",
}

__all__ = [
    "Column",
    "DataSource",
    "Diagnostic",
    "Experiment",
    "Field",
    "Intervention",
    "Model",
    "Optimiser",
    "Trained",
    "Units",
    "View",
    "load",
    "register",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import plastic_jax` alone does not start JAX."""
    if name not in _PLACES:
        raise AttributeError(f"module 'plastic_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"plastic_jax.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
