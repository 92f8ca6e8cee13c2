"""The schedule of nodes on slots, without a device: what runs once, from what, beside whom, and how much is idle."""

import itertools
import json
import random

import pytest
import tiny

from experiments import warm_start
from plastic_jax import data
from plastic_jax.data import sampler
from plastic_jax.running.dry_run import describe
from plastic_jax.study import plan, trial
from plastic_jax.study.config import Sweep
from plastic_jax.train.idle import idle_share
from plastic_jax.train.schedule import Schedule


def one_program(**changes):
    (program,) = plan.programs(tiny.study(**changes))
    return program


def drawn(number):
    """A plan and a form drawn at random: (program, keywords of `Schedule`)."""
    draw = random.Random(number)
    lengths = draw.sample(range(1, 9), draw.randint(1, 4))
    fields = dict(
        warm_start_epochs=(0, *lengths),
        tuning_epochs=tuple(draw.sample(range(1, 9), draw.randint(1, 2))),
        pretraining_fraction=draw.choice([0.4, (0.4, 0.8)]),
        tuning_learning_rate_factor=draw.choice([1.0, (1.0, 2.0)]),
        stage_accuracy=draw.choice([0.0, 0.0, 0.7]),
        equal_updates=draw.random() < 0.5,
        metric_epochs=1,
        batch_size=draw.choice([8, 10]),
        seeds=draw.randint(1, 4),
    )
    block, devices = draw.choice([1, 2, 3, 4, 7]), draw.choice([1, 1, 2])
    slots = block * devices * draw.randint(1, 4)
    return one_program(**fields), dict(slots=slots, eval_every=draw.randint(1, 3), block=block, devices=devices)


class Device:
    """Trains what a schedule says, in a world in which a node's outcome is a function of itself alone.

    A slot's state is the node that it trained last, the epoch it has reached, its steps over all stages, and whether it
    has diverged: it then stands still, and what starts from it too. Metrics come one chunk late.
    """

    def __init__(self, program, keywords, fate=None):
        self.program, self.fate = program, fate
        self.schedule = Schedule(program, **keywords)
        self.states = [None] * keywords["slots"]
        self.store, self.pending, self.history = {}, [], []
        self.computed = 0

    def run(self):
        while self.chunk():
            pass
        return self

    def chunk(self):
        schedule = self.schedule
        dealt = schedule.deal()
        for i in dealt:
            slot = schedule.slots[i]
            if slot.source != -1:
                self.states[i] = None if slot.source is None else self.store[slot.source]
            self.check_start(slot.node, self.states[i])
            total, diverged = self.states[i][2:] if self.states[i] else (0, False)
            self.states[i] = (slot.node, schedule.first(slot.node), total, diverged)
            schedule.told(i)
        nodes = [slot.node for slot in schedule.slots if slot.node is not None]
        assert len(set(nodes)) == len(nodes), "a node in two slots"
        self.history.append([slot.node for slot in schedule.slots])
        if not nodes:
            late, self.pending = self.pending, []
            self.take_in(late)
            return bool(late)
        before = [state[1] if state else 0 for state in self.states]
        targets, entries, ended = schedule.send()
        assert [i for i, _ in entries] == [i for i, epoch in enumerate(targets) if epoch]
        latest = []
        for i, node in entries:
            assert self.states[i][0] == node and before[i] < targets[i]
            record = self.outcome(node, before[i], targets[i], *self.states[i][2:])
            latest.append((i, node, record))
            self.states[i] = (node, record["epoch"], record["total"], record["diverged"])
        self.count(before, targets)
        for i in ended:
            self.finish(i, False)
        late, self.pending = self.pending, latest
        self.take_in(late)
        return True

    def check_start(self, index, state):
        """A node starts from its parent's end, or where the parent's stage had ended by accuracy before."""
        node = self.program.nodes[index]
        if state is None:
            assert node.parent is None
            return
        above = node.parent
        while above != state[0]:
            assert above not in self.schedule.records and not self.program.nodes[above].begins
            above = self.program.nodes[above].parent
        held = self.schedule.first(index)
        assert node.begins or state[1] == held or self.schedule.ended[state[0]] or state[3]

    def outcome(self, index, before, target, total, diverged):
        """The record at the first epoch after `before` that decides something, or at `target`."""
        node = self.program.nodes[index]
        size, batch = node.stage.size, node.trial.point.batch_size
        for epoch in range(before + 1, target + 1):
            lot = random.Random(f"{self.fate} {index} {epoch}").random() if self.fate is not None else 1.0
            diverged, done = diverged or lot < 0.01, bool(node.stage.accuracy) and 0.01 < lot < 0.2
            if diverged or done or epoch == target:
                step = sampler.stage_steps(size, epoch, batch)
                total += step - sampler.stage_steps(size, before, batch)
                return dict(epoch=epoch - diverged, step=step, total=total, done=done, diverged=diverged)
        raise AssertionError("no epoch to train")

    def take_in(self, late):
        for i, node, record in late:
            if self.schedule.awaits(node) and self.schedule.take_in(node, dict(record)):
                self.finish(i, record["done"])

    def finish(self, i, by_accuracy):
        stored = self.schedule.finish(i, by_accuracy)
        if stored is not None:
            self.store[stored] = self.states[i]

    def count(self, before, targets):
        """Add the steps that the blocks compute."""
        block, steps = self.schedule.block, []
        for slot, a, b in zip(self.history[-1], before, targets, strict=True):
            size = None if slot is None else self.program.nodes[slot].stage.size
            batch = self.program.point.batch_size
            steps.append(sampler.stage_steps(size, b, batch) - sampler.stage_steps(size, a, batch) if b else 0)
        self.computed += sum(block * max(steps[k : k + block]) for k in range(0, len(steps), block))


@pytest.mark.parametrize("number", range(60))
def test_every_node_is_trained_once_from_its_parents_end(number):
    program, keywords = drawn(number)
    device = Device(program, keywords).run()
    learned = device.schedule.reaches
    assert {n.index for n in program.nodes} - set(device.schedule.records) == {
        index for index, (first, last) in learned.items() if last <= first
    }
    spans = {}  # node -> chunks in which a slot has it
    for chunk, row in enumerate(device.history):
        for slot, node in enumerate(row):
            spans.setdefault(node, []).append((chunk, slot))
    for node in program.nodes:
        own = spans.get(node.index, [])
        assert len({slot for _, slot in own}) <= 1, "a node stays in its slot"
        assert [c for c, _ in own] == list(range(own[0][0], own[0][0] + len(own))) if own else True
        assert not own or node.parent is None or spans[node.parent][-1][0] < own[0][0]
    records = [[r["epoch"] for r in device.schedule.records.get(n.index, [])] for n in program.nodes]
    for node, epochs in zip(program.nodes, records, strict=True):
        first, last = device.schedule.first(node.index), device.schedule.last(node.index)
        every = 1 if node.closely else keywords["eval_every"]
        assert epochs == [e for e in range(first + 1, last + 1) if e % every == 0 or e == last]


@pytest.mark.parametrize("number", range(60))
def test_who_runs_beside_whom_changes_no_record(number):
    """Ends by accuracy and divergences included."""
    program, keywords = drawn(number)
    alone = Device(program, dict(keywords, slots=1, block=1, devices=1), fate=number).run()
    assert Device(program, keywords, fate=number).run().schedule.records == alone.schedule.records


def test_the_drawn_plans_diverge_end_by_accuracy_and_learn_controls():
    runs = [Device(program, keywords, fate=n).run().schedule for n in range(60) for program, keywords in [drawn(n)]]
    records = [r for run in runs for found in run.records.values() for r in found]
    assert any(r["diverged"] for r in records) and any(r["done"] for r in records)
    assert any(run.dead - set(run.records) for run in runs)
    assert any(set(run.reaches) & set(run.records) for run in runs)


@pytest.mark.parametrize("number", range(0, 60, 4))
def test_a_restored_schedule_goes_on_as_the_first(number):
    """At every chunk, through JSON; a snapshot takes in what is pending first, as a run's does."""
    program, keywords = drawn(number)
    whole = Device(program, keywords, fate=number)
    more = True
    while more:
        late, whole.pending = whole.pending, []
        whole.take_in(late)
        again = Device(program, keywords, fate=number)
        again.schedule.restore(json.loads(json.dumps(whole.schedule.snapshot())))
        again.states, again.store = list(whole.states), dict(whole.store)
        begun = len(whole.history)
        other = Device(program, keywords, fate=number)  # goes on from the same place, but has never stopped
        other.__dict__.update(states=list(whole.states), store=dict(whole.store))
        other.schedule = whole.schedule
        held = whole.schedule.snapshot()
        assert again.run().history == other.run().history
        assert again.schedule.snapshot() == other.schedule.snapshot()
        whole.schedule.restore(held)
        more = whole.chunk()
        assert len(whole.history) == begun + 1


def test_needed_states_are_those_that_nodes_start_from():
    for number in range(20):
        program, keywords = drawn(number)
        device = Device(program, keywords)
        more = True
        while more:
            more = device.chunk()
            needed = device.schedule.needed()
            device.store = {n: state for n, state in device.store.items() if n in needed}
        assert device.schedule.needed() == set()


# The idle share.


def share(slots, block, devices=1, eval_every=1, **changes):
    fields = dict(batch_size=10, pretraining_fraction=0.4, tuning_epochs=4, metric_epochs=1, equal_updates=False)
    return idle_share(one_program(**{**fields, **changes}), slots, eval_every, block, devices)


def test_the_idle_share_in_closed_form():
    """Pretraining is 2 steps an epoch, tuning 5."""
    assert share(1, 1, warm_start_epochs=(0, 3), seeds=2) == 0
    assert share(4, 4, warm_start_epochs=(0,), seeds=1) == 3 / 4
    assert share(4, 2, warm_start_epochs=(0,), seeds=3) == pytest.approx(1 / 4)
    # A pretrained trial beside a fresh one: 3 chunks of 5 and 2 steps, one of 5 and 5, three with a hole.
    assert share(2, 2, warm_start_epochs=(0, 3), seeds=1) == pytest.approx(1 - 46 / 70)
    # Of two seeds each kind has its own block, in one slot's time.
    assert share(4, 2, warm_start_epochs=(0, 3), seeds=2) == 0
    # Evaluations every 2 epochs: chunks of 10 and 4, of 10 and 2, then tuning alone.
    assert share(2, 2, warm_start_epochs=(0, 3), seeds=1, eval_every=2) == pytest.approx(1 - 46 / (2 * 40))
    # Holes are filled: two seeds' forks at 1 and 3 epochs, of one block alone.
    assert share(2, 2, warm_start_epochs=(1, 3), seeds=2) == 0


def test_a_control_of_stages_by_accuracy_takes_its_planned_length():
    fields = dict(warm_start_epochs=(0, 5), stage_accuracy=0.9, seeds=1, equal_updates=True)
    # 4 epochs fresh, 10 + 20 steps beside it, and the control's 30 steps less 20.
    assert share(1, 1, **fields) == 0
    assert share(2, 2, **fields) == pytest.approx(1 - (20 + 30 + 10) / (2 * (4 * 5 + 1 * 2 + 4 * 5 + 10)))


@pytest.mark.parametrize("number", range(60))
def test_the_idle_share_is_what_chunks_compute(number):
    program, keywords = drawn(number)
    device = Device(program, keywords)
    trained = 0
    device.run()
    for node, found in device.schedule.records.items():
        size, batch = program.nodes[node].stage.size, program.point.batch_size
        trained += sampler.stage_steps(size, found[-1]["epoch"], batch)
        trained -= sampler.stage_steps(size, device.schedule.first(node), batch)
    if any(node.stage.accuracy for node in program.nodes):
        return  # a device waits a chunk for how a stage has ended
    assert idle_share(program, **keywords) == pytest.approx(1 - trained / device.computed, abs=1e-12)


def test_no_device_is_without_work_while_another_has_two_blocks():
    program = one_program(warm_start_epochs=(0, 2, 5), seeds=4, equal_updates=False)
    device = Device(program, dict(slots=24, eval_every=1, block=2, devices=4))
    more = True
    while more:
        more = device.chunk()
        slots = device.history[-1]
        busy = [sum(any(n is not None for n in slots[b : b + 2]) for b in range(d, d + 6, 2)) for d in range(0, 24, 6)]
        if device.schedule.ready:
            assert min(busy) > 0
    assert max(len({n for n in row if n is not None}) for row in device.history) == 12


# The paper's figure 2.


def figure_2(**changes):
    sweep = Sweep.of({**warm_start.PAPER, **changes})
    specs = {"cifar10": data.spec("cifar10", None)}
    return trial.study(sweep, specs, warm_start.EXPERIMENT.fresh), specs


@pytest.mark.parametrize(("width", "equal_updates"), list(itertools.product((64, 16, 8), (True, False))))
def test_figure_2_leaves_less_than_a_tenth_idle(width, equal_updates):
    study, specs = figure_2(width=width, equal_updates=equal_updates)
    described = describe(study, plan.programs(study), specs, 80.0, imagined=True)
    for program in described["programs"]:
        form = program["formulation"]
        assert program["idle_share"] < 0.1 and form["kernels"] == "packed" and form["block"] >= 4
        tried = program["idle_shares_tried"]
        assert all(found >= 0.1 for found in list(tried.values())[:-1]), "the widest block that will do"
        name = f"packed({form['block'] // form['group']}x{form['group']})"
        assert list(tried)[-1] == name and tried[name] == program["idle_share"]


@pytest.mark.parametrize("block", range(1, 9))
@pytest.mark.parametrize("equal_updates", [True, False])
def test_figure_2_in_any_small_block(block, equal_updates):
    study, _ = figure_2(optimizer="adam", equal_updates=equal_updates)
    (program,) = plan.programs(study)
    assert idle_share(program, -(-program.leaves // block) * block, 1, block) < 0.1


def test_a_block_that_is_set_is_kept_to_however_idle():
    study, specs = figure_2(width=8, block=50, optimizer="adam")
    (program,) = describe(study, plan.programs(study), specs, 80.0, imagined=True)["programs"]
    assert program["formulation"]["block"] == 50 and program["idle_share"] > 0.3
    assert len(program["idle_shares_tried"]) == 1
