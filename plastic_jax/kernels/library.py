"""The operations of `native_convolution.cc` and `native_dense.cc`, compiled at their first use, as torch.compile does.

They are compiled for this machine, and kept in the user's cache folder under a name that holds all that the library
depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax import Array

from plastic_jax import backend
from plastic_jax.errors import InputError

_SOURCES = [Path(__file__).parent / "cc" / name for name in ("native_convolution.cc", "native_dense.cc")]
_HEADER = Path(__file__).parent / "cc" / "native.h"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
_HANDLERS = ("forward", "backward", "join", "product", "adam")
_SECONDS = 300  # that compiling may take


def available() -> bool:
    """Whether there are native convolutions on this machine; the first call may compile for some seconds."""
    return not _reason()


def require(platform: str) -> None:
    """Raises an InputError that says why there are no native convolutions on that backend, if so."""
    reason = f"programs for {platform} cannot call it" if platform != "cpu" else _reason()
    if reason:
        raise InputError(f"kernels is 'native', which is compiled by this machine's C++ compiler, but {reason}.")


def fits(images_BHWC: Array, kernel_HWIO: Array, strides: Any, pads: Any) -> bool:
    """Whether it is a convolution that is written there: 3x3 or 1x1, of which the image's size keeps or halves."""
    taps = kernel_HWIO.shape[0]
    pad = (taps - 1) // 2
    return (
        kernel_HWIO.shape[:2] in ((1, 1), (3, 3))
        and kernel_HWIO.shape[2] == images_BHWC.shape[3]
        and tuple(strides) in ((1, 1), (2, 2))
        and all(tuple(p) == (pad, pad) for p in pads)
        and images_BHWC.dtype == kernel_HWIO.dtype
        and images_BHWC.dtype in ("float32", "float64")
        and min(images_BHWC.shape) > 0
    )


def call(
    handler: str,
    operands: Sequence[Array],
    shapes: Sequence[tuple[int, ...]],
    into: dict[int, int] | None = None,
    **attributes: int,
) -> list[Array]:
    """One of `_HANDLERS`: its results, of those shapes. An operand or result without values is none.

    `into` maps numbers of operands to the results that may take their place.
    """
    require("cpu")
    one = jax.typeof(operands[0])  # inside a shard_map, all vary alike
    results = [one.update(shape=shape, weak_type=False) for shape in shapes]
    target = jax.ffi.ffi_call(f"plastic_jax_{handler}", results, vmap_method="sequential", input_output_aliases=into)
    return list(target(*operands, **attributes))


@functools.cache
def _reason() -> str:
    """Compiles, loads and registers; why that failed, or nothing."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return "there is none (set CXX to one)"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
        for name in _HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(f"plastic_jax_{name}", handler, platform="cpu")
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {(error.stderr.strip() or 'without a word').splitlines()[-1]}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"{compiler}'s library cannot be had: {error}"
    return ""


def _compiled(compiler: str) -> Path:
    """The library's path, after compiling it where it is not there yet."""
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=_SECONDS)
    cpu = platform.processor()
    with contextlib.suppress(OSError):  # -march=native depends on them; a home folder may serve unlike machines
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), cpu)
    version = run([compiler, "--version"]).stdout
    known = (version, cpu, platform.machine(), importlib.metadata.version("jaxlib"), *_FLAGS)
    key = hashlib.sha256(
        "\n".join(known).encode() + b"".join(path.read_bytes() for path in (*_SOURCES, _HEADER))
    ).hexdigest()[:16]
    path = backend.cache() / "native" / f"{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")  # other runs may be compiling the same
        try:
            run([compiler, *_FLAGS, "-I", jax.ffi.include_dir(), *map(str, _SOURCES), "-o", str(own)])
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
    return path
