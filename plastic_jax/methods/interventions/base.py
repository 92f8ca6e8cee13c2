"""What an intervention is: the fields that it declares, and what it does when."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from plastic_jax.fields import Field
from plastic_jax.methods.view import Trained, View

Tree = Any
IN_STEPS = ("penalty", "gradient", "update", "at_interval")
"""What acts during a stage."""


class Intervention:
    """A method that acts on a trial; a subclass declares its fields and overrides what it does.

    `fields` become fields of the config. Those of kind *dynamic* are strengths: each trial has its own, as an attribute
    of the view. Those of kind *static* are read from `view.point`. A field's `off` is the value with which the method
    does nothing: only trials for which it does something are trained in a program that has it, and the others stay as
    they are, bit for bit.

    Each of the methods below does nothing here, and one that a subclass does not override is not called at all.
    """

    fields: ClassVar[Mapping[str, Field]] = {}
    needs_units: ClassVar[bool] = False  # whether it can only act on a model that declares its units

    def remember(self, params: Tree) -> Tree:
        """What is kept from a trial's initialisation on, as `view.memory`: a tree of arrays."""
        return None

    def at_start(self, view: View) -> Trained:
        """The trial when a stage after its first begins."""
        return view.trained

    def penalty(self, params: Tree, view: View) -> Array:
        """What is added to the loss that is descended; differentiated by `params`. Reported losses are without it."""
        return jnp.float32(0)

    def gradient(self, gradients: Tree, view: View) -> Tree:
        """The gradient that the optimiser gets."""
        return gradients

    def update(self, update: Tree, view: View) -> Tree:
        """What the optimiser makes of the gradient, before it is multiplied by the learning rate and subtracted."""
        return update

    def interval(self, point: Any) -> int:
        """Updates from one call of `at_interval` to the next, by static fields."""
        return 1

    def at_interval(self, view: View) -> Trained:
        """The trial after each `interval` of its updates; costs nothing in the steps between."""
        return view.trained

    def does(self, what: str) -> bool:
        """Whether it overrides `what`."""
        return getattr(type(self), what) is not getattr(Intervention, what)

    @property
    def in_steps(self) -> bool:
        """Whether it acts during a stage, and not at its start alone."""
        return any(map(self.does, IN_STEPS))

    def active(self, values: Any) -> bool:
        """Whether it does something, by a config's values (attributes)."""
        return any(getattr(values, name) != field.off for name, field in self.fields.items() if field.off is not None)
