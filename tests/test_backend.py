"""How a process sets JAX and the C library up."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from plastic_jax import backend

if sys.argv[1] == "keep":
    backend.keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**25, np.float32)
before = faults()
for _ in range(4):
    np.ones(2**25, np.float32)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_its_next_use():
    """128 MiB are 64 huge pages at least: without it the kernel hands them out anew each time."""

    def count(how):
        call = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(call, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert count("keep") < 16 < 4 * 64 <= count("as it is")
