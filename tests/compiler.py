"""Whether the native kernels can be compiled here."""

import pytest

from plastic_jax.kernels import library

needs_compiler = pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")
