"""Networks and data sets for the tests of costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from plastic_jax.data import DatasetSpec, sampler
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config
from plastic_jax.train import core
from plastic_jax.train.state import Data, Sample, Sums

# Analyses come from the optimised HLO, before LLVM: so let LLVM skip its work, most of a compilation's time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

MAPPED, PRODUCTS = Form("mapped"), Form("products")

SHAPES = {"digits": (8, 8, 1), "fashion": (28, 28, 1), "cifar": (32, 32, 3)}


def spec(shape, train=128, test=64, classes=10):
    return DatasetSpec("noise", train, test, SHAPES[shape], classes)


def resnet(**fields):
    return Config(**{"model": "resnet", "width": 4, "depth": 1, "batch_size": 128} | fields)


def mlp(**fields):
    return Config(**{"model": "mlp", "width": 100, "depth": 3, "batch_size": 128} | fields)


def shape_of(shape, dtype=jnp.int32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def arguments(point, of, form=MAPPED):
    """A trial's core, and the shapes of all that a chunk takes: (core, state, stage, sample, data)."""
    made = core.Core(point, of.shape, of.classes, form)
    drawn = sampler.train_set(
        0,
        np.zeros(of.train_examples, np.int32),
        of.classes,
        train_examples=point.train_examples,
        validation_fraction=point.validation_fraction,
        label_noise=0.0,
    )
    state = jax.eval_shape(lambda: made.init(jnp.uint32(0), len(drawn.permutation)))
    real = dict.fromkeys(("learning_rate", "accuracy"), np.zeros((), made.dtype))
    stage = jax.tree.map(lambda value: shape_of(value.shape, value.dtype), tiny.stage(**real))
    sample = Sample(*(shape_of(getattr(drawn, field.name).shape) for field in dataclasses.fields(Sample)))
    data = {}
    for split, n in (("train", of.train_examples), ("test", of.test_examples)):
        data |= {f"{split}_images": shape_of((n, *of.shape), jnp.uint8), f"{split}_labels": shape_of((n,))}
    return made, state, stage, sample, Data(**data)


def compiled_step(point, of):
    """One training step of one mapped trial, jitted outside any loop."""
    made, state, stage, sample, data = arguments(point, of)
    sums = Sums(shape_of((), made.dtype), shape_of(()), shape_of(()))
    state = dataclasses.replace(state, order=None, epoch=None, done=None)
    step = jax.jit(made.step, donate_argnums=(0,))
    return step.lower(state, sums, stage, sample, shape_of((point.batch_size,)), data).compile(QUICK)
