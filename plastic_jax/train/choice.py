"""Which form a program's trials are computed in: what there is to choose from, the rule, and how many trials fit."""

import math

from plastic_jax import kernels, models
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config, Sweep
from plastic_jax.study.plan import ProgramPlan
from plastic_jax.train.costs import Costs
from plastic_jax.train.idle import idle_share
from plastic_jax.train.trial_axis import Formulation

CHANNELS = (128, 64, 256)
"""Channels of the first module that a group of trials should have side by side, the rule's first.

Narrower convolutions are bound by their launch, and grouped ones are slow backwards (an H200, 2026-11: ResNet-18 of
w = 8, 16 trials, 0.30 ms a trial-step with 128 channels, 0.36 with 64, 0.43 grouped, 1.66 one by one).
"""
WIDE = 64
"""The width from which on a trial has its convolutions to itself: zeros beside its own would only cost."""
GROUPS = (4, 1, 8)
"""Groups in a block, convolutions one after another, the rule's first; one more where fewer slots stay idle."""
IDLE = 0.1
"""The most idle share of slots that a block is taken with, where a narrower one has less."""
MLP_BLOCKS = (256, 32, 1024)  # at most, the rule's first
CPU_BLOCK = 8


def candidates(sweep: Sweep, point: Config, backend: str, leaves: int, measured: bool = False) -> tuple[Form, ...]:
    """What there is to choose from, the one that is taken unmeasured first; what the user has set is kept to.

    On a CPU trials go one after another, and convolutions are compiled by the machine's C++ compiler, or have gradients
    for XLA's loops where there is none. An MLP's layers are so only where it is to be `measured` if that pays, as a
    short run is over before they are compiled. Elsewhere trials are packed.

    Args:
      sweep: its `kernels`, `block` and `group` are kept to.
      point: the program's static values.
      backend: as `jax.default_backend()`.
      leaves: trials that can be side by side on a device; `trials_per_device` limits them further.
      measured: whether the choice may be measured.

    Raises:
      InputError: for a form that the backend or the model lacks, a block that its group does not divide, or one that is
        wider than `trials_per_device`.
    """
    model, cpu = models.MODELS[point.model], backend == "cpu"
    if sweep.group > 1 and not model.convolutional:
        raise InputError(
            f"--config.group={sweep.group} is not allowed with model={point.model}: it has no convolutions whose "
            "channels trials could share; 0 or 1 here."
        )
    if 0 < sweep.trials_per_device < max(sweep.block, sweep.group):
        field = "block" if sweep.block > sweep.trials_per_device else "group"
        raise InputError(
            f"--config.{field}={getattr(sweep, field)} is not allowed with "
            f"trials_per_device={sweep.trials_per_device}: a device computes whole blocks, so that at most as many can "
            "be together."
        )
    wanted = sweep.kernels
    if wanted == "auto" and max(sweep.block, sweep.group) > 1:
        wanted = "packed"
    if wanted not in ("auto", "packed"):
        kernels.require(wanted, backend)
        return (Form(wanted, max(sweep.block, 1), max(sweep.group, 1)),)
    each = min(leaves, sweep.trials_per_device or leaves)
    if model.convolutional:
        packed = _convolutional(sweep, point.width, each)
    else:
        packed = [_even(sweep, each, most, 1) for most in ((CPU_BLOCK,) if cpu else MLP_BLOCKS)]
    if wanted == "packed":
        return tuple(dict.fromkeys(packed))
    together = [form for form in packed if form.block > 1]  # one of a single trial is as good as mapped
    if not cpu:
        return tuple(dict.fromkeys([packed[0], *together, Form("mapped")]))
    if model.convolutional:
        return tuple(Form(name) for name in ("native", "products") if kernels.available(name, backend))
    return (Form("mapped"), *together, *[Form("native")] * (measured and kernels.available("native", backend)))


def _convolutional(sweep: Sweep, width: int, leaves: int) -> list[Form]:
    """Blocks of a convolutional net: the rule's group in blocks of several sizes, then the other groups."""
    found = []
    for channels in CHANNELS:
        group = max(1, channels // width) if width < WIDE else 1
        if sweep.group or sweep.block:  # what is set is kept to; a group that is not divides the block
            group = sweep.group or max(g for g in range(1, group + 1) if sweep.block % g == 0)
        else:
            group = min(group, leaves)
        for groups in GROUPS if channels == CHANNELS[0] else GROUPS[:1]:
            sizes = [_even(sweep, leaves, k * group, group) for k in ((groups, groups + 1) if groups > 1 else (1,))]
            found.append(min(sizes, key=lambda form: math.ceil(leaves / form.block) * form.block))
    return found


def _even(sweep: Sweep, leaves: int, most: int, group: int) -> Form:
    """A block of at most that many trials, evened out so that the last block is as full as the others."""
    if sweep.block:
        return Form("packed", sweep.block, group)
    groups = math.ceil(math.ceil(leaves / math.ceil(leaves / most)) / group)
    if not sweep.group:
        group = math.ceil(leaves / math.ceil(leaves / most) / groups)
    return Form("packed", groups * group, group)


def formulation(form: Form, sweep: Sweep, cost: Costs, *, leaves: int, memory: int, devices: int) -> Formulation:
    """That form for a program of `leaves` parallel trials on `devices` with `memory` bytes each.

    What the memory cannot hold becomes smaller, but for a block or a group that the user has set.
    """
    block, group = form.block, form.group
    while block > 1 and not sweep.block and cost.device_bytes(block, block, group) > memory:
        if block > group:
            block -= group
        elif sweep.group:
            break
        else:
            block = group = group // 2
    each = -(-leaves // devices)
    # Mapped trials gain nothing from company but fewer chunks; short chunks want more of them.
    usual = each if form.kernels == "packed" else 4 if cost.convolutional else 16
    blocks = -(-min(each, sweep.trials_per_device or usual) // block)
    while blocks > 1 and cost.device_bytes(blocks * block, block, group) > memory:
        blocks -= 1
    return Formulation(form.kernels, block, group, blocks * block * min(devices, leaves))


def fitted(
    form: Form, sweep: Sweep, cost: Costs, program: ProgramPlan, *, memory: int, devices: int
) -> tuple[Formulation, dict[str, float]]:
    """That form for a program, in the widest blocks, at most its own, that the plan keeps busy.

    Convolutions alone are narrowed: an MLP's block takes hardly longer than one of its trials.

    Returns:
      The formulation, whose idle share is below `IDLE`, or the least there is; and the idle share of each form tried.
    """
    tried: dict[str, tuple[float, Formulation]] = {}
    for one in _narrower(form, sweep, cost.convolutional):
        found = formulation(one, sweep, cost, leaves=program.leaves, memory=memory, devices=devices)
        share = idle_share(program, found.slots, sweep.eval_every, found.block, found.devices(devices))
        tried[str(found.form)] = share, found
        if share < IDLE:
            break
    return min(tried.values(), key=lambda pair: pair[0])[1], {name: share for name, (share, _) in tried.items()}


def _narrower(form: Form, sweep: Sweep, convolutional: bool) -> list[Form]:
    """The form, then with narrower blocks: fewer groups, of the most trials from half as many as in its own on."""
    if form.kernels != "packed" or sweep.block or not convolutional:
        return [form]
    groups = [form.group] if sweep.group else range(form.group, (form.group + 1) // 2 - 1, -1)
    widest: dict[int, int] = {}
    for group in groups:
        for block in range(group, form.block, group):
            widest.setdefault(block, group)
    return [form, *(Form(form.kernels, block, widest[block]) for block in sorted(widest, reverse=True))]
