"""Tiny networks in every form, compiled quickly."""

from functools import partial

import jax

from plastic_jax import kernels, models
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config

# XLA's passes as always, but little of LLVM's, which is what compiling takes its time for.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FORMS = {name: Form(name) for name in kernels.KERNELS}
FORMS |= {"packed 3x1": Form("packed", 3, 1), "packed 1x3": Form("packed", 3, 3)}


def build(model="resnet", shape=(8, 8, 1), form="mapped", classes=4, **changes):
    fields = {"width": 2, "depth": 1, "norm": "batch", "initialisation": "pytorch", "compute_dtype": "float32"}
    return models.network(Config(model=model, **fields | changes), shape, classes, FORMS[form])


def init(network, key):
    return quick_jit(network.init)(key)
