"""The idle share of a schedule's slots, found without a device."""

from plastic_jax.data import sampler
from plastic_jax.study.plan import ProgramPlan
from plastic_jax.train.schedule import Schedule


def idle_share(program: ProgramPlan, slots: int, eval_every: int, block: int = 1, devices: int = 1) -> float:
    """The share of computed slot-steps that train nothing; arguments as `Schedule`'s.

    In each chunk a block computes for all its slots as many steps as the one of them that needs most to its next
    evaluation, and nothing where none trains. Stages that end by accuracy are taken to last as long as planned.
    """
    if block == 1:
        return 0.0
    schedule, batch, computed = Schedule(program, slots, eval_every, block, devices), program.point.batch_size, 0
    while True:
        for i in schedule.deal():
            schedule.told(i)
        training = [(i, slot.node) for i, slot in enumerate(schedule.slots) if slot.node is not None]
        if not training:
            return 1 - schedule.steps_done / computed if computed else 0.0
        # Nothing is dealt before a node ends: as many chunks as the shortest needs, at once.
        looks = {i: schedule.looks(node, schedule.slots[i].epoch) for i, node in training}
        chunks = min(map(len, looks.values()))
        ways: dict[int, set] = {}  # block -> its nodes' (size, epochs before and after each chunk)
        for i, node in training:
            way = (program.nodes[node].stage.size, schedule.slots[i].epoch, *looks[i][:chunks])
            ways.setdefault(i // block, set()).add(way)
        computed += sum(block * _longest(kinds, batch) for kinds in ways.values())
        for i, node in training:
            schedule.slots[i].epoch = epoch = looks[i][chunks - 1]
            if len(looks[i]) == chunks:
                schedule.take_in(node, _record(schedule, node, epoch))
                schedule.finish(i, by_accuracy=False)


def _longest(ways: set[tuple[int, ...]], batch: int) -> int:
    """Steps of a block whose nodes go these ways, summed over the chunks."""
    steps = [[sampler.stage_steps(size, epoch, batch) for epoch in epochs] for size, *epochs in ways]
    if len(steps) == 1:
        return steps[0][-1] - steps[0][0]
    return sum(max(to[k + 1] - to[k] for to in steps) for k in range(len(steps[0]) - 1))


def _record(schedule: Schedule, index: int, epoch: int) -> dict:
    """What a node would record at its end."""
    node = schedule.nodes[index]
    step = sampler.stage_steps(node.stage.size, epoch, schedule.plan.point.batch_size)
    before = sampler.stage_steps(node.stage.size, schedule.first(index), schedule.plan.point.batch_size)
    above = 0 if node.parent is None else schedule.records[node.parent][-1]["total"]
    return {"epoch": epoch, "step": step, "total": above + step - before, "done": False, "diverged": False}
