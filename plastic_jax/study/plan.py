"""The plan: trials grouped into compiled programs, common stage prefixes trained once, forked where they part.

A *node* is a stretch of one stage, from one whole epoch to another, that a set of trials has in common. Nodes form a
forest: ten warm-start lengths of a seed are one pretraining cut at ten places, with a tuning stage hanging from each
(contract 4). Equal trials fall on the same nodes by themselves.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plastic_jax.data import sampler
from plastic_jax.methods.interventions import INTERVENTIONS
from plastic_jax.study.config import Config
from plastic_jax.study.trial import CONTINUED, NO_MIXTURE, Stage, Study, Trial


@dataclass(frozen=True)
class Node:
    """Epochs `first` .. `last` of a stage, for all of `trials`; `ends` are those whose stage ends with it.

    `control` marks the fresh trial trained on to the largest number of updates of the trials `served`; where their
    stages end by accuracy its `first` and `last` are those planned, and the run learns its own.
    """

    index: int
    parent: int | None
    trial: Trial  # the first of its trials; seed and point are common to all
    stage: Stage
    first: int
    last: int
    trials: tuple[int, ...]
    ends: tuple[int, ...]
    final: bool = False  # a trial's last stage ends here
    control: bool = False
    served: tuple[int, ...] = ()
    closely: bool = False  # a control that waits to know how far, and is evaluated every epoch
    children: tuple[int, ...] = ()

    @property
    def begins(self) -> bool:
        """Whether the stage starts with this node."""
        return self.first == 0

    def steps(self) -> int:
        """Steps from `first` to `last`."""
        size, batch = self.stage.size, self.trial.point.batch_size
        return sampler.stage_steps(size, self.last, batch) - sampler.stage_steps(size, self.first, batch)


@dataclass(frozen=True)
class ProgramPlan:
    """The trials that one compiled program trains, and their nodes (indices are positions in `nodes`)."""

    point: Config
    trials: tuple[Trial, ...]
    nodes: tuple[Node, ...]

    @property
    def interventions(self) -> tuple[str, ...]:
        """Those that act in one of its stages, in the registry's order."""
        acting = {name for node in self.nodes for name in node.stage.acting}
        return tuple(name for name in INTERVENTIONS if name in acting)

    @property
    def fingerprint(self) -> int:
        """CRC-32 over the nodes' lengths and how they hang together: a checkpoint names nodes by their numbers."""
        nodes = [
            (n.parent, n.stage.name, n.stage.size, n.first, n.last, n.trials, n.ends, n.served) for n in self.nodes
        ]
        return zlib.crc32(repr(nodes).encode())

    @property
    def mixes(self) -> bool:
        """Whether a stage of the program is a smooth transition, which then all of it is compiled for."""
        return any(node.stage.gamma != NO_MIXTURE for node in self.nodes)

    @property
    def leaves(self) -> int:
        """Nodes without a child, which bounds how many can run side by side."""
        return sum(not node.children for node in self.nodes)

    @property
    def shared_steps(self) -> int:
        """Trial-steps to train."""
        return sum(node.steps() for node in self.nodes)

    @property
    def unshared_steps(self) -> int:
        """Trial-steps if every trial were trained from its own start."""
        alone = sum(_planned_steps(trial) for trial in self.trials)
        return alone + sum(node.steps() for node in self.nodes if node.control)

    def remaining(self) -> list[int]:
        """For each node, the steps of the longest way from its start to a leaf."""
        longest = [0] * len(self.nodes)
        for node in reversed(self.nodes):
            longest[node.index] = node.steps() + max((longest[c] for c in node.children), default=0)
        return longest


def _planned_steps(trial: Trial, stages: int | None = None) -> int:
    """Steps of the trial's first `stages` stages, or of all."""
    return sum(sampler.stage_steps(s.size, s.epochs, trial.point.batch_size) for s in trial.stages[:stages])


def control_epochs(updates: int, size: int, batch_size: int) -> int:
    """The last whole epoch of the tuning stage that `updates` steps reach."""
    return updates * batch_size // size


def programs(study: Study) -> tuple[ProgramPlan, ...]:
    """Group the trials of a study by program and share the prefixes in each group."""
    groups: dict[tuple, list[Trial]] = {}
    for trial in study.trials:
        groups.setdefault(trial.program, []).append(trial)
    return tuple(_program(study, tuple(trials)) for trials in groups.values())


def _program(study: Study, trials: tuple[Trial, ...]) -> ProgramPlan:
    nodes: list[Node] = []

    def add(parent: int | None, node_trials: Sequence[Trial], stage: Stage, first: int, last: int, **more) -> Node:
        numbers = tuple(t.trial for t in node_trials)
        node = Node(len(nodes), parent, node_trials[0], stage, first, last, numbers, **more)
        nodes.append(node)
        return node

    def grow(parent: int | None, group: Iterable[Trial], depth: int) -> None:
        """Lay the stages number `depth` of trials that have been alike so far."""
        same: dict[tuple, list[Trial]] = {}
        for trial in group:
            stage = trial.stages[depth]
            # How long a stage is changes its start only through its schedule or its transition.
            fixed = trial.point.schedule == "constant" and stage.gamma == NO_MIXTURE
            length = 0 if fixed else stage.epochs
            last = depth == len(trial.stages) - 1
            same.setdefault((dataclasses.replace(stage, epochs=length), last), []).append(trial)
        for (_, last), alike in same.items():
            first, before = 0, parent
            for epochs in sorted({t.stages[depth].epochs for t in alike}):
                through = [t for t in alike if t.stages[depth].epochs >= epochs]
                ending = [t for t in through if t.stages[depth].epochs == epochs]
                stage = through[-1].stages[depth]
                ends = tuple(t.trial for t in ending)
                node = add(before, through, stage, first, epochs, ends=ends, final=last)
                if last:
                    continue_fresh(node, ending)
                else:
                    grow(node.index, ending, depth + 1)
                first, before = epochs, node.index

    def continue_fresh(node: Node, ending: Sequence[Trial]) -> None:
        for fresh in ending:
            served = [
                t for t in trials if t.seed == fresh.seed and reference[t.arm] == fresh.arm and t.arm != fresh.arm
            ]
            if not (study.sweep.equal_updates and served):
                continue
            # Updates of the fresh trial's own earlier stages, where it has any (the online setting's).
            earlier = _planned_steps(fresh, len(fresh.stages) - 1)
            size, batch = node.stage.size, fresh.point.batch_size
            reached = {control_epochs(_planned_steps(t) - earlier, size, batch) for t in served}
            # Stages that end by accuracy tell only afterwards how far: one stretch, evaluated every epoch.
            closely = any(stage.accuracy for t in (fresh, *served) for stage in t.stages)
            ends = [max(reached)] if closely else sorted(reached)
            numbers = tuple(t.trial for t in served)
            before = node
            for last in ends:
                if last <= node.last:
                    continue
                stage = dataclasses.replace(node.stage, name=CONTINUED, epochs=ends[-1], accuracy=0.0)
                more = dict(ends=(fresh.trial,), control=True, served=numbers, closely=closely)
                before = add(before.index, [fresh], stage, before.last, last, **more)

    reference = {arm.arm: arm.fresh for arm in study.arms}
    by_sample: dict[tuple, list[Trial]] = {}
    for trial in trials:
        by_sample.setdefault(trial.sample, []).append(trial)
    for group in by_sample.values():
        grow(None, group, 0)
    children: dict[int | None, list[int]] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node.index)
    whole = (dataclasses.replace(node, children=tuple(children.get(node.index, ()))) for node in nodes)
    return ProgramPlan(trials[0].point, trials, tuple(whole))
