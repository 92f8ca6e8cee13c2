"""The dry run: the whole plan in numbers, before anything is trained, as plan.json and as a table."""

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from plastic_jax import data
from plastic_jax.data import DatasetSpec, sampler
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.study import plan, trial
from plastic_jax.study.config import Config, Sweep, static_fields
from plastic_jax.study.plan import ProgramPlan
from plastic_jax.study.trial import TUNING_STREAM, Study
from plastic_jax.train import calibration, costs
from plastic_jax.train.choice import candidates, fitted, formulation
from plastic_jax.train.idle import idle_share
from plastic_jax.train.trial_axis import Formulation

GIB = 2**30


def device_memory(given_gib: float) -> tuple[int, str]:
    """Bytes of one device and where the number comes from; a CPU's devices share the machine's memory."""
    if not math.isfinite(given_gib) or given_gib < 0:
        raise InputError(
            f"--device_memory_gib={given_gib:g} is not allowed: a number above 0, or 0 for the device at hand."
        )
    if given_gib:
        return int(given_gib * GIB), "as given"
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit, "measured"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // jax.local_device_count(), "measured"


def describe(
    study: Study,
    programs: Sequence[ProgramPlan],
    specs: Mapping[str, DatasetSpec],
    device_memory_gib: float,
    imagined: bool = False,
    measure: bool = False,
    began_with: Sequence[Formulation | None] = (),
) -> dict[str, Any]:
    """plan.json: trials, arms, programs, steps with and without sharing, FLOPs, memory, formulation.

    A given memory is a limit for the devices at hand, or, `imagined` on a CPU, an accelerator's that is not there.
    With `measure`, formulations are measured where that pays (`calibration.py`); without, what is remembered is taken.
    A run that began with formulations, one a program, keeps them.
    """
    memory, source = device_memory(device_memory_gib)
    devices, backend = jax.local_device_count(), jax.default_backend()
    if imagined and device_memory_gib and backend == "cpu":
        devices, backend = 1, "accelerator"  # not there: planned by its costs alone
    described = [
        _program(study, p, specs[p.point.dataset], memory, devices, backend, measure, begun)
        for p, begun in itertools.zip_longest(programs, began_with)
    ]
    total = {
        key: sum(p[key] for p in described)
        for key in ("trials", "nodes", "steps", "steps_unshared", "examples", "flops", "flops_unshared")
    }
    return {
        "arms": len(study.arms),
        "seeds": study.sweep.seeds,
        "devices": devices,
        "backend": backend,
        "device_memory_bytes": memory,
        "device_memory": source,
        "stage_sizes": "estimate" if study.estimated else "exact",
        **total,
        "sharing_saves": 1 - total["steps"] / total["steps_unshared"],
        "sharing_saves_pretraining": _pretraining_saved(programs),
        "programs": described,
        "arm_list": [{"arm": arm.arm, **arm.values, "fresh": arm.fresh} for arm in study.arms],
    }


def flops(config: Mapping[str, Any], fresh: Mapping[str, Any]) -> float:
    """FLOPs of a whole study, from its config and what makes an arm fresh; no data and no device."""
    sweep = Sweep.of(config)
    specs = {name: data.spec(name, None) for name in sweep.values["dataset"]}
    study = trial.study(sweep, specs, fresh)
    return describe(study, plan.programs(study), specs, 80.0, imagined=True)["flops"]


def _program(
    study: Study,
    program: ProgramPlan,
    spec: DatasetSpec,
    memory: int,
    devices: int,
    backend: str,
    measure: bool,
    begun: Formulation | None,
) -> dict[str, Any]:
    point, sweep = program.point, study.sweep
    steps, unshared = program.shared_steps, program.unshared_steps
    evaluated = _evaluated(study, program, spec)
    cost = costs.costs(point, spec)
    flops = steps * cost.step_flops + evaluated * cost.evaluation_flops
    if begun:
        share = idle_share(program, begun.slots, sweep.eval_every, begun.block, begun.devices(devices))
        chosen, idle = begun, {str(begun.form): share}
        choice = calibration.Choice(begun.form, "begun", f"{begun.form}: as the run began.", {}, 0.0)
    else:
        leaves = -(-program.leaves // devices)
        rule = candidates(sweep, point, backend, leaves)[0]
        ruled = formulation(rule, sweep, cost, leaves=program.leaves, memory=memory, devices=devices)
        _check_memory(point, cost, ruled, memory, devices)
        choice = calibration.choose(sweep, point, spec, flops, backend, leaves=leaves, measure=measure)
        chosen, idle = fitted(choice.form, sweep, cost, program, memory=memory, devices=devices)
        if chosen.form != choice.form:
            narrowed = f"{choice.why.removesuffix('.')}; narrowed to {chosen.form}, for the memory or the plan."
            choice = dataclasses.replace(choice, why=narrowed)
    used, needed = _check_memory(point, cost, chosen, memory, devices)
    return {
        **{name: getattr(point, name) for name in static_fields()},
        "interventions": list(program.interventions),
        "trials": len(program.trials),
        "nodes": len(program.nodes),
        "batches": -(-program.leaves // chosen.slots),
        "formulation": dataclasses.asdict(chosen),
        "calibration": choice.as_dict(),
        "idle_share": idle[str(chosen.form)],
        "idle_shares_tried": idle,
        "devices_used": used,
        "parameters": cost.parameters,
        "steps": steps,
        "steps_unshared": unshared,
        "examples": steps * point.batch_size,
        "step_flops": cost.step_flops,
        "flops": flops,
        "flops_leave_out": list(cost.unread),
        "flops_unshared": unshared * cost.step_flops + evaluated * cost.evaluation_flops * unshared / max(steps, 1),
        "bytes_per_trial": cost.trial_bytes,
        "bytes_per_device": needed,
        "memory": "estimate",
    }


def _check_memory(point: Config, cost: costs.Costs, chosen: Formulation, memory: int, devices: int) -> tuple[int, int]:
    """Devices used and bytes of each, or an `InputError` that says what would fit."""
    used = chosen.devices(devices)
    needed = cost.device_bytes(chosen.slots // used, chosen.block, chosen.group)
    if needed > memory:
        raise InputError(
            f"--config.width={point.width}, --config.depth={point.depth}, --config.batch_size={point.batch_size}: "
            f"{chosen.slots // used} trials side by side need about {needed / GIB:.2f} GiB, "
            f"{cost.dataset_bytes / GIB:.2f} GiB of it for the data, and the device has {memory / GIB:.2f} GiB: take a "
            "smaller batch, width or depth."
        )
    return used, needed


def _pretraining_saved(programs: Sequence[ProgramPlan]) -> float:
    """Share of the pretraining steps of separate trials that need not be trained."""
    shared = sum(n.steps() for p in programs for n in p.nodes if n.stage.stream != TUNING_STREAM)
    separate = sum(
        sampler.stage_steps(s.size, s.epochs, t.point.batch_size)
        for p in programs for t in p.trials for s in t.stages if s.stream != TUNING_STREAM
    )  # fmt: skip
    return 1 - shared / separate if separate else 0.0


def _evaluated(study: Study, program: ProgramPlan, spec: DatasetSpec) -> int:
    """Images that the program's evaluations pass through the network."""
    point = program.point
    each = spec.test_examples + sampler.validation_size(spec.train_examples, point.validation_fraction)
    every = study.sweep.eval_every
    passes = sum(node.last // every - node.first // every + (node.last % every > 0) for node in program.nodes)
    size = sampler.train_size(spec.train_examples, point.train_examples, point.validation_fraction)
    return passes * each + len(program.nodes) * size


def _number(value: float) -> str:
    for limit, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            scaled = value / (limit if unit != "k" else 1e3)
            return f"{scaled:.3g} {unit}"
    return f"{value:,.0f}"


def table_of(described: Mapping[str, Any]) -> str:
    """The plan as text: one line a program, and the totals."""
    programs = described["programs"]
    varied = [n for n in static_fields() if len({p[n] for p in programs}) > 1] or ["model"]
    heads = [
        *varied,
        "trials",
        "slots",
        "batches",
        "form",
        "idle",
        "parameters",
        "steps",
        "unshared",
        "FLOP",
        "MiB/trial",
        "GiB/device",
    ]
    lines = [heads]
    for p in programs:
        form = p["formulation"]
        lines.append(
            [
                *(str(p[name]) for name in varied),
                str(p["trials"]),
                str(form["slots"]),
                str(p["batches"]),
                str(Form(form["kernels"], form["block"], form["group"])),
                f"{100 * p['idle_share']:.1f} %",
                _number(p["parameters"]),
                _number(p["steps"]),
                _number(p["steps_unshared"]),
                _number(p["flops"]),
                f"{p['bytes_per_trial'] / 2**20:.1f}",
                f"{p['bytes_per_device'] / GIB:.2f}",
            ]
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    text = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    d = described
    text.append(
        f"\n{d['arms']} arms x {d['seeds']} seeds: {d['trials']} trials in {len(programs)} compiled "
        f"program{'s' * (len(programs) != 1)}, {_number(d['steps'])} trial-steps, {_number(d['flops'])}FLOP.\n"
        f"Sharing pretraining saves {100 * d['sharing_saves']:.1f} % of the {_number(d['steps_unshared'])} steps of "
        f"separate trials, {100 * d['sharing_saves_pretraining']:.1f} % of their pretraining.\n"
        f"Memory is an estimate, for {d['devices']} x {d['backend']} of {d['device_memory_bytes'] / GIB:.1f} GiB "
        f"({d['device_memory']})."
    )
    unread = dict.fromkeys(words for p in programs for words in p["flops_leave_out"])
    if unread:
        text.append(f"FLOPs are not known in full: {'; '.join(unread)}.")
    whys = [p["calibration"]["why"] for p in programs]
    alike = len(set(whys)) == 1
    text += [
        f"Form{'' if alike else f' of program {k + 1}'}: {why}" for k, why in enumerate(whys[: 1 if alike else None])
    ]
    if d["stage_sizes"] == "estimate":
        text.append(
            "Stage sizes, and so steps, are estimates for classes of one size: with uniform_fraction below 1 they "
            "depend on each seed's labels."
        )
    return "\n".join(text)
