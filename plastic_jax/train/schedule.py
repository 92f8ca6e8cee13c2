"""The schedule: which node of a plan is trained in which slot, and how far in the next chunk. No device is known here.

A slot trains one node after another. When a node ends, its first child takes over the slot and the others wait with a
copy of its state. Which node runs where and beside whom changes no result (contract 1), but how much is computed for
nothing: a block of slots computes as many steps for all of them as the one that needs most to its next evaluation.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from plastic_jax.study import plan
from plastic_jax.study.plan import ProgramPlan

Records = dict[int, list[dict[str, Any]]]  # node -> its evaluations, in order


@dataclass
class Slot:
    """A place in the batch: its node (None: free), the epoch it has been sent to, and how the node gets its state."""

    node: int | None = None
    epoch: int = 0
    waiting: bool = False  # by accuracy: at the node's last epoch, until its metrics say how it ended
    source: int | None = None  # the stored state to load, -1 the slot's own, None a new trial
    dealt: bool = False  # has a node that the device does not know of yet


class Schedule:
    """A frozen plan's nodes on `slots` slots: `deal()`, `send()`, then `take_in` what the nodes recorded, over again.

    Args:
      program: the plan.
      slots: how many nodes can be trained side by side.
      eval_every: epochs between two evaluations of a node, each of which ends a chunk.
      block: slots that are computed as one, as long as any of them trains.
      devices: that the blocks are shared out to, in order.
      keep: whose states are kept: `none`, `ends` of trials, or of all `stages`.
    """

    def __init__(
        self, program: ProgramPlan, slots: int, eval_every: int, block: int = 1, devices: int = 1, keep: str = "none"
    ):
        self.plan, self.nodes, self.eval_every, self.keep = program, program.nodes, eval_every, keep
        self.block, self.devices = block, devices
        self._remaining = program.remaining()
        self.slots = [Slot() for _ in range(slots)]
        self.records: Records = {}
        self.ended: dict[int, bool] = {}  # node -> whether it ended by accuracy
        self.dead: set[int] = set()  # nodes that can't be trained: their trial diverged before
        self.reaches: dict[int, tuple[int, int]] = {}  # first and last epoch that a control has learned
        self.ready: list[tuple[int, int | None]] = [(n.index, None) for n in self.nodes if n.parent is None]
        self.held: list[tuple[int, int]] = []  # controls that wait for the trials they serve: (node, source)
        self.steps_done = 0

    def first(self, index: int) -> int:
        """The epoch of its stage that a node starts from."""
        return self.reaches[index][0] if index in self.reaches else self.nodes[index].first

    def last(self, index: int) -> int:
        """The epoch of its stage that a node is trained to, if it does not end by accuracy before."""
        return self.reaches[index][1] if index in self.reaches else self.nodes[index].last

    @property
    def active(self) -> bool:
        """Whether a slot has a node."""
        return any(slot.node is not None for slot in self.slots)

    def deal(self) -> list[int]:
        """Give free slots ready nodes, those with the longest way to go first; the slots that the device is to be told.

        Nodes of one block should be of one pace. So its holes are filled with its own pace first, then with slower
        nodes, which cost nothing there; and a further block is opened only when nodes of one pace fill it, or for a
        device without work. Blocks are computed one after another: an empty one costs nothing.
        """
        self._release_controls()
        if self.ready and any(slot.node is None for slot in self.slots):
            self.ready.sort(key=lambda r: (-self._remaining[r[0]], self.nodes[r[0]].stage.size, r[0]))
            self._assign()
        return [i for i, slot in enumerate(self.slots) if slot.dealt]

    def _assign(self) -> None:
        paces: list[list[int]] = [[] for _ in range(len(self.slots) // self.block)]
        for i, slot in enumerate(self.slots):
            if slot.node is not None:
                paces[i // self.block].append(self._pace(slot.node))
        each = len(paces) // self.devices
        busy = [sum(map(bool, paces[d * each : (d + 1) * each])) for d in range(self.devices)]
        for block, found in enumerate(paces):
            if found:
                self._fill(block, max(found))
        empty = [block for block, found in enumerate(paces) if not found]
        while empty and self.ready:
            block = min(empty, key=lambda b: (busy[b // each], b))
            waiting = Counter(self._pace(node) for node, _ in self.ready)  # the longest way first
            full = [pace for pace, nodes in waiting.items() if nodes >= self.block]
            if not full and busy[block // each]:
                break
            self._fill(block, full[0] if full else max(waiting))
            busy[block // each] += 1
            empty.remove(block)

    def _pace(self, index: int) -> int:
        """Examples that a node trains on from one evaluation to the next: the steps are nearly in proportion."""
        return self.nodes[index].stage.size * self.every(index)

    def every(self, index: int) -> int:
        """Epochs between two evaluations of a node."""
        return 1 if self.nodes[index].closely else self.eval_every

    def _fill(self, block: int, pace: int) -> None:
        """Fill a block's free slots with ready nodes of that pace, or else of the next below."""
        for i in range(block * self.block, (block + 1) * self.block):
            fitting = [r for r in self.ready if self._pace(r[0]) <= pace] if self.slots[i].node is None else []
            if fitting:
                chosen = max(fitting, key=lambda r: self._pace(r[0]))  # of equal ones the first: it has longest to go
                self.ready.remove(chosen)
                self._put(i, *chosen)

    def _put(self, i: int, node: int, source: int | None) -> None:
        self.slots[i] = Slot(node, self.first(node), source=source, dealt=True)

    def told(self, i: int) -> None:
        """The device knows of slot `i`'s node and has its state."""
        self.slots[i].dealt, self.slots[i].source = False, None

    def send(self) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Send each slot to its next evaluation.

        Returns:
          The epoch that each slot trains to, 0 where it stands still; (slot, node) of those that train; and the slots
          whose node ends there, which are to be finished.
        """
        targets, entries, ended = [0] * len(self.slots), [], []
        for i, slot in enumerate(self.slots):
            if slot.node is None or slot.waiting:
                continue
            slot.epoch = targets[i] = self._boundary(slot.node, slot.epoch)
            entries.append((i, slot.node))
            if slot.epoch == self.last(slot.node):
                if self.nodes[slot.node].stage.accuracy:
                    slot.waiting = True
                else:
                    ended.append(i)
        return targets, entries, ended

    def _boundary(self, index: int, epoch: int) -> int:
        """The next epoch after `epoch` at which the host looks: an evaluation, or the node's end."""
        every = self.every(index)
        return min((epoch // every + 1) * every, self.last(index))

    def looks(self, index: int, epoch: int) -> list[int]:
        """All epochs after `epoch` at which the host looks at a node: evaluations, and its end."""
        every, last = self.every(index), self.last(index)
        return [*range((epoch // every + 1) * every, last, every), last]

    # What a chunk measured

    def awaits(self, index: int) -> bool:
        """Whether a node's next record counts: it has neither diverged nor ended by accuracy."""
        past = self.records.get(index)
        return index not in self.dead and not (past and (past[-1]["done"] or past[-1]["diverged"]))

    def take_in(self, index: int, record: dict[str, Any]) -> bool:
        """Add a node's record; a diverged trial leaves.

        Args:
          index: a node that `awaits` it.
          record: an evaluation: `epoch` and `step` of the stage, `total` steps, `done` by accuracy, `diverged`, and
            the metrics. Gets `last`: whether it is at the node's last epoch.

        Returns:
          Whether the node ends with it by accuracy or at its cap: its slot is to be finished, its fit to be measured.
        """
        past = self.records.setdefault(index, [])
        record["last"] = record["epoch"] == self.last(index)
        self.steps_done += record["step"] - (past[-1]["step"] if past else self._first_step(index))
        past.append(record)
        if record["diverged"]:
            self._kill(index)
        return bool(self.nodes[index].stage.accuracy) and (record["done"] or record["last"]) and not record["diverged"]

    def _first_step(self, index: int) -> int:
        node = self.nodes[index]
        if node.begins:
            return 0
        above = node.parent
        while above not in self.records:  # a stretch that was skipped: its stage had ended by accuracy
            assert above is not None
            above = self.nodes[above].parent
        return self.records[above][-1]["step"]

    # Ends of nodes

    def finish(self, i: int, by_accuracy: bool) -> int | None:
        """End the node in slot `i`: its first child takes it over; the node, if its state has to be stored."""
        index = self.slots[i].node
        assert index is not None
        self.slots[i] = Slot()
        self.ended[index] = by_accuracy
        heirs = sorted(self._heirs(index, by_accuracy), key=lambda c: -self._remaining[c])
        held = [c for c in heirs if self.nodes[c].control and self.nodes[c].closely]
        children = [c for c in heirs if c not in held]
        self.held += [(c, index) for c in held]
        if children:
            self._put(i, children[0], -1)
            self.ready += [(c, index) for c in children[1:]]
        return index if held or len(children) > 1 or self.kept(index) else None

    def _heirs(self, index: int, by_accuracy: bool) -> Iterator[int]:
        """The nodes that start where `index` ended; a stage that ended by accuracy skips its later stretches."""
        for c in self.nodes[index].children:
            child = self.nodes[c]
            if by_accuracy and not child.begins and not child.control:
                self.ended[c] = True
                yield from self._heirs(c, by_accuracy)
            else:
                yield c

    def _release_controls(self) -> None:
        """Let controls start whose served trials have all ended: only now is their length known."""
        for control, source in list(self.held):
            node = self.nodes[control]
            parts = [n.index for n in self.nodes if set(n.trials) & set(node.served)]
            if not all(map(self._settled, [source, *parts])):
                continue
            self.held.remove((control, source))
            updates = max((self.records[n][-1]["total"] for n in parts if n in self.records), default=0)
            ended = self.records[source][-1]
            updates -= ended["total"] - ended["step"]  # of the fresh trial's own earlier stages
            last = plan.control_epochs(updates, node.stage.size, node.trial.point.batch_size)
            self.reaches[control] = (ended["epoch"], last)
            if last > ended["epoch"]:
                self.ready.append((control, source))

    def _settled(self, index: int) -> bool:
        """Whether a node has ended and its last metrics are there."""
        if index in self.dead:
            return True
        if index not in self.ended:
            return False
        found = self.records.get(index)  # none: a stretch that was skipped
        return self.ended[index] or (found is not None and found[-1]["last"])

    def _kill(self, index: int) -> None:
        """A diverged trial leaves: its node and all that would come after."""
        below = [index]
        while below:
            node = below.pop()
            self.dead.add(node)
            below += self.nodes[node].children
        self.ready = [r for r in self.ready if r[0] not in self.dead]
        self.held = [h for h in self.held if h[0] not in self.dead]
        self.slots = [Slot() if slot.node in self.dead else slot for slot in self.slots]

    # Stored states

    def kept(self, index: int) -> bool:
        """Whether the state at a node's end is kept for the user."""
        node = self.nodes[index]
        if self.keep == "none" or not node.ends or node.control:
            return False
        return self.keep == "stages" or node.final

    def needed(self) -> set[int]:
        """Nodes at whose stored states another waits to start."""
        sources = [source for _, source in [*self.ready, *self.held]] + [s.source for s in self.slots if s.dealt]
        return {source for source in sources if source is not None}

    # What a checkpoint holds

    def snapshot(self) -> dict[str, Any]:
        """All of the schedule, as JSON's kinds."""
        return copy.deepcopy(
            {
                "slots": [vars(slot) for slot in self.slots],
                "ready": self.ready,
                "held": self.held,
                "ended": sorted(self.ended.items()),
                "dead": sorted(self.dead),
                "records": sorted(self.records.items()),
                "reaches": sorted(self.reaches.items()),
                "steps_done": self.steps_done,
            }
        )

    def restore(self, held: dict[str, Any]) -> None:
        """Continue from a snapshot of the same plan."""
        held = copy.deepcopy(held)
        self.slots = [Slot(**slot) for slot in held["slots"]]
        self.ready = [(node, source) for node, source in held["ready"]]
        self.held = [(node, source) for node, source in held["held"]]
        self.ended = dict(held["ended"])
        self.dead = set(held["dead"])
        self.records = {int(k): v for k, v in held["records"]}
        self.reaches = {node: (first, last) for node, (first, last) in held["reaches"]}
        self.steps_done = held["steps_done"]
