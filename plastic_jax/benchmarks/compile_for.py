"""A training step compiled for a device that is not there: how many kernels it launches, what it moves, what it holds.

JAX's topologies compile for a GPU or a TPU without one, where the extra `cuda` or `tpu` is installed. Nothing is timed,
and on a GPU nothing is tuned; what is counted is the optimised program, the same that a device would run.
"""

import collections
import dataclasses
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plastic_jax.data import DatasetSpec
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config
from plastic_jax.train import core, costs
from plastic_jax.train.state import Data, Sample, Stage, Sums

PLATFORMS = {"h100": "cuda", "tpu-v5e": "tpu"}
BATCHES = 16  # of the train set
# XLA's own description of the device (GpuTargetConfigProto as text), from which it takes sizes and rates.
_H100 = Path(__file__).with_name("h100.txtpb")
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "slice-done")
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u8": 1, "s8": 1, "pred": 1}


def lowered_step(point: Config, spec: DatasetSpec, form: Form, sharding: Any = None) -> Any:
    """One training step of a block of trials as JAX lowers it, with donated state; shapes only, no data.

    Args:
      point: the network.
      spec: the shape of its images.
      form: the block is vmapped, as in training; a block of one is not.
      sharding: of all arguments, such as one on a device that is not there.
    """
    examples = point.batch_size * BATCHES
    one = core.Core(point, spec.shape, spec.classes, form)
    real, single = one.dtype, form.block == 1

    def leaf(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def of_trials(*shape: int, dtype: Any = jnp.int32) -> Any:
        return leaf(*shape, dtype=dtype) if single else leaf(form.block, *shape, dtype=dtype)

    state = jax.eval_shape(lambda: one.init(jnp.uint32(0), examples))
    state = dataclasses.replace(state, order=None, epoch=None, done=None)
    state = jax.tree.map(lambda a: of_trials(*a.shape, dtype=a.dtype), state)
    kinds = {
        "seed": jnp.uint32,
        "gamma": jnp.float32,
        **dict.fromkeys(("restart_batch_stats", "reset_optimizer"), bool),
    }
    kinds |= dict.fromkeys(("learning_rate", "accuracy"), real)
    whole = dict.fromkeys(("stream", "size", "steps", "schedule", "prefix"), jnp.int32)
    scalars = {name: of_trials(dtype=kind) for name, kind in (kinds | whole).items()}
    stage = Stage(**scalars, redrawn=of_trials(1, dtype=bool))
    each = of_trials(examples)
    sample = Sample(each, each, each, of_trials(0))
    sums = Sums(of_trials(dtype=real), of_trials(), of_trials())
    images, labels = leaf(examples, *spec.shape, dtype=jnp.uint8), leaf(examples)

    def step(state: Any, sums: Any, stage: Any, sample: Any, local: Any, data: Any) -> Any:
        def trial(state: Any, sums: Any, stage: Any, sample: Any, local: Any) -> Any:
            return one.step(state, sums, stage, sample, local, data)

        return (trial if single else jax.vmap(trial))(state, sums, stage, sample, local)

    data = Data(images, labels, images, labels)
    return jax.jit(step, donate_argnums=(0, 1)).lower(state, sums, stage, sample, of_trials(point.batch_size), data)


def absent(platform: str) -> Any:
    """The sharding of an array on one device of that kind, which need not be there.

    Raises:
      InputError: for another platform, or where its extra is not installed.
    """
    from jax.experimental import topologies

    if platform not in PLATFORMS:
        raise InputError(f"--compile_for={platform} is not allowed: one of {', '.join(PLATFORMS)}.")
    kind = PLATFORMS[platform]
    named = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    if kind == "tpu":
        for name, value in named.items():
            os.environ.setdefault(name, value)
    try:
        if kind == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        else:
            text = _H100.read_text()
            found = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    except Exception as error:  # whatever JAX makes of a plugin that is missing or too old
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"--compile_for={platform} needs the extra {kind}: pip install -e '.[{kind}]' (JAX says: {reason})."
        ) from None
    mesh = jax.sharding.Mesh(np.array(found.devices).reshape(-1)[:1], ("trials",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Launch:
    """An operation that a device launches: its kind, and the bytes that it reads and writes."""

    kind: str
    moved: int
    made: str  # types and shapes of its results
    source: str  # where in the network it comes from


def launches(text: str) -> list[Launch]:
    """Those of an optimised program's entry, from its text; an operand that is read in part counts whole."""
    types, found = {}, []
    convolving = _convolving(text)
    for line in text[text.rindex("ENTRY") :].splitlines():
        parts = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)", line)
        if not parts:
            continue
        name, made, operation, operands, rest = parts.groups()
        types[name] = made
        if operation in _FREE or 'custom_call_target="ConcatBitcast"' in rest:
            continue
        read = sum(_size(types[operand]) for operand in re.findall(r"%?([\w.\-]+)(?:,|$)", operands))
        source = re.search(r'op_name="([^"]*)"', rest)
        moved = _size(made, skip="u8" if operation == "custom-call" else "") + read
        if operation.endswith("-start"):
            moved = 2 * (_size(made) - read)  # its results are the operand, the copy and a few bytes
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        kind = "convolution" if called and called[1] in convolving else _kind(name, operation, rest)
        found.append(Launch(kind, moved, made, source[1] if source else ""))
    return found


def _convolving(text: str) -> set[str]:
    """Names of the computations that hold a convolution: a TPU's fusions do, and so do its products."""
    found, name = set(), ""
    for line in text.splitlines():
        head = re.match(r"%?([\w.\-]+) .*\{$", line)
        called = re.search(r"calls=%?([\w.\-]+)", line)
        if head:
            name = head[1]
        elif " convolution(" in line or (called and called[1] in found):  # what is called stands above
            found.add(name)
    return found


def _kind(name: str, operation: str, rest: str) -> str:
    if operation in ("custom-call", "convolution") or "convolution" in name:
        return "convolution" if "conv" in name + rest else "product"
    if "gemm" in name or operation == "dot":
        return "product"
    if operation.endswith("-start"):
        return "between memories"  # a TPU's: in or out of its fast memory, beside what it computes
    if operation in ("copy", "transpose", "reshape") or re.match("(input_|loop_|wrapped_)?(copy|transpose)", name):
        return "copy or transpose"
    return "reduction" if "reduce" in name else "elementwise"


def _size(types: str, skip: str = "") -> int:
    """Bytes of HLO types; `skip`: a type that is not counted, a convolution's workspace."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    return sum(
        _BYTES[a] * math.prod(map(int, filter(None, b.split(",")))) for a, b in arrays if a in _BYTES and a != skip
    )


def figures(point: Config, spec: DatasetSpec, form: Form, platform: str) -> dict[str, Any]:
    """One step of a block of trials, compiled: launches, bytes moved a trial-step, memory, seconds to compile."""
    begin = time.perf_counter()
    compiled = lowered_step(point, spec, form, absent(platform)).compile()
    seconds = time.perf_counter() - begin
    found, memory = launches(compiled.as_text()), compiled.memory_analysis()
    kinds = collections.Counter(launch.kind for launch in found)
    cost: Any = compiled.cost_analysis() or {}
    estimated = cost.get("optimal_seconds", 0.0) / form.block
    planned = costs.costs(point, spec)
    return {
        "form": str(form),
        "trials": form.block,
        "launches": len(found),
        "launches_per_trial_step": len(found) / form.block,
        "kinds": dict(kinds.most_common()),
        "megabytes_per_trial_step": sum(launch.moved for launch in found) / form.block / 1e6,
        "temporary_bytes": memory.temp_size_in_bytes,
        "planned_temporary_bytes": planned.step_temporaries(form.block, form.group),
        "estimated_seconds_per_trial_step": estimated if estimated > 0 else None,
        "compile_seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Figures as a table in Markdown."""
    heads = ("form", "trials", "launches", "a trial-step", "of these", "MB a trial-step", "temporaries, planned, MB")
    lines = [" | ".join(("", *heads, "compiled in s", "")).strip(), "|" + "---|" * (len(heads) + 1)]
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
        held = f"{row['temporary_bytes'] / 1e6:.0f}, {row['planned_temporary_bytes'] / 1e6:.0f}"
        cells = (row["form"], row["trials"], row["launches"], f"{row['launches_per_trial_step']:.1f}", kinds)
        cells += (f"{row['megabytes_per_trial_step']:.1f}", held, f"{row['compile_seconds']:.1f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
