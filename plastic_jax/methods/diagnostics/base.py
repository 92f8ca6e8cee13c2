"""What a diagnostic is: the columns that it fills, and how."""

import abc
from collections.abc import Mapping
from typing import ClassVar

from jax import Array

from plastic_jax.fields import Column, Field
from plastic_jax.methods.view import View


class Diagnostic(abc.ABC):
    """Something that is measured at every evaluation; a subclass declares its columns and overrides `measure`.

    `fields` become fields of the config, all of kind *run*: read them from `view.point`.
    """

    fields: ClassVar[Mapping[str, Field]] = {}
    columns: ClassVar[tuple[Column, ...]] = ()
    needs_units: ClassVar[bool] = False  # whether it can only be measured on a model that declares its units

    @abc.abstractmethod
    def measure(self, view: View) -> Mapping[str, Array]:
        """A scalar for each column; `view.batch()` has the first examples of the stage's data set, at most 128."""
