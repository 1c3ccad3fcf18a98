"""The smallest pieces of work, and what makes each of them ready.

The samples of a global step are numbered in canonical order: group by group.
A unit covers a range of them; ranges are cut so that a unit holds whole groups
or a part of one. Gradients are summed in the canonical order of Train units,
whatever the order in which they ran.
"""

import dataclasses
import enum
import functools
import math


class Kind(enum.StrEnum):
  """What a unit does; the names of timeline events."""

  GENERATE = "generate"
  SCORE = "score"
  TRAIN = "train"
  UPDATE = "update"
  PUBLISH = "publish"
  SWITCH = "switch"  # no work of a step: fetching what an assisting lane needs


@dataclasses.dataclass(frozen=True)
class Unit:
  """One piece of work, executed exactly once.

  Attributes:
    kind: what to do.
    step: global step it belongs to. Generate and Train units of step k run
      with policy version k (stale Generate units with k-1); Publish of step k
      makes version k+1 usable.
    start: first sample (GENERATE, SCORE, TRAIN).
    stop: one past the last sample.
    first: first trained step of the window (TRAIN).
    last: one past the last one.
    update: index of the optimiser update in the step (TRAIN, UPDATE); that of
      the units which follow (SWITCH).
  """

  kind: Kind
  step: int
  start: int = 0
  stop: int = 0
  first: int = 0
  last: int = 0
  update: int = 0

  @property
  def samples(self) -> int:
    """Number of samples."""
    return self.stop - self.start

  @property
  def size(self) -> int:
    """What its cost grows with: samples, or samples x steps for TRAIN.

    Of a SWITCH, 1 where weights of the middle of a step are fetched, else 0.
    """
    if self.kind == Kind.TRAIN:
      return self.samples * (self.last - self.first)
    if self.kind == Kind.SWITCH:
      return int(self.update > 0)
    return self.samples


@dataclasses.dataclass(frozen=True)
class Workload:
  """What a global step consists of.

  Attributes:
    groups: prompts per step.
    group_size: samples per prompt.
    window: trained steps per trajectory.
    updates: optimiser updates per step; divides `groups`.
    generate_size: samples per Generate and Score unit.
    train_size: samples per Train unit.
    pack: trained steps per Train unit (1 without TSP).
    scope: "group" or "global": whose rewards an advantage needs.
    gap: whether training may start before the last reward is in.
    stale: how many Generate units of the next step may start with the present
      policy version, once all of this step have been handed out, or are left to
      others (TCSS).
    held: how far, in Train units, a lane may be ahead of the first that is not
      done; 0 sets no limit. Their gradients wait for it in memory.
  """

  groups: int
  group_size: int
  window: int
  updates: int = 1
  generate_size: int = 0
  train_size: int = 0
  pack: int = 1
  scope: str = "group"
  gap: bool = False
  stale: int = 0
  held: int = 0

  @property
  def samples(self) -> int:
    """Samples per global step."""
    return self.groups * self.group_size

  @property
  def rows_per_update(self) -> int:
    """Trained transitions of one optimiser update, dead groups included."""
    return self.samples * self.window // self.updates

  def groups_of(self, unit: Unit) -> range:
    """The groups that a unit's samples belong to."""
    first = unit.start // self.group_size
    return range(first, -(-unit.stop // self.group_size))


@functools.lru_cache(maxsize=16)
def same(work: Workload) -> Workload:
  """One of all that are equal: caches find it without comparing fields."""
  return work


@functools.lru_cache(maxsize=16)
def step_units(work: Workload, step: int) -> tuple[Unit, ...]:
  """All units of a global step, in canonical order."""
  ranges = _ranges(0, work.samples, work.generate_size or work.group_size)
  units = [Unit(Kind.GENERATE, step, a, b) for a, b in ranges]
  units += [Unit(Kind.SCORE, step, a, b) for a, b in ranges]
  chunk = work.samples // work.updates
  for update in range(work.updates):
    for a, b in _ranges(
      update * chunk, (update + 1) * chunk, work.train_size or work.group_size
    ):
      units += [
        Unit(Kind.TRAIN, step, a, b, first, last, update)
        for first, last in _ranges(0, work.window, work.pack)
      ]
    units.append(Unit(Kind.UPDATE, step, update=update))
  units.append(Unit(Kind.PUBLISH, step))
  return tuple(units)


@functools.lru_cache(maxsize=16)
def numbers(work: Workload, step: int) -> dict[Unit, int]:
  """The place of every unit of a global step in `step_units`."""
  return {unit: i for i, unit in enumerate(step_units(work, step))}


def part_of(units: int, fraction: float) -> int:
  """How many units are at most this part of them: 3 of 10 are 0.3."""
  return math.floor(units * fraction + 1e-9)


def full_sizes(work: Workload) -> dict[Kind, int]:
  """`Unit.size` of a full unit, by kind; a shorter one is padded to it.

  So that every unit has the same compiled shapes: the last unit of a step, or
  the last pack of a window, may have fewer rows and costs as much.
  """
  generate = work.generate_size or work.group_size
  train = work.train_size or work.group_size
  train = min(train, work.samples // work.updates)
  return {
    Kind.GENERATE: min(generate, work.samples),
    Kind.TRAIN: train * min(work.pack, work.window),
  }


@dataclasses.dataclass(frozen=True)
class Gate:
  """Units that wait for the same others. Bit i of a set is unit i of a step.

  Attributes:
    needs: set of the units that must be done.
    members: set of the units that may then start.
  """

  needs: int
  members: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The dependencies of a global step, as sets of bits.

  Attributes:
    kinds: kind -> set of its units.
    gates: what waits for what.
    opens: unit -> the gates that need it.
    trains: group -> set of the Train units with samples of it.
  """

  kinds: dict[Kind, int]
  gates: tuple[Gate, ...]
  opens: tuple[tuple[Gate, ...], ...]
  trains: tuple[int, ...]


@functools.lru_cache(maxsize=16)
def plan(work: Workload) -> Plan:
  """The dependencies of every global step of `work`.

  Score needs its Generate. Train needs the rewards of its groups (of all
  groups without GAP or with a global scope) and the update before its own,
  Update the Train units of that update and the update before, Publish all
  updates. Generate needs
  nothing but a policy version, which the scheduler sees to.
  """
  units = step_units(work, 0)
  kinds = dict.fromkeys(Kind, 0)
  trains = [0] * work.groups
  for i, unit in enumerate(units):
    kinds[unit.kind] |= 1 << i
    if unit.kind == Kind.TRAIN:
      for group in work.groups_of(unit):
        trains[group] |= 1 << i
  updates = bits(kinds[Kind.UPDATE])
  waiting: dict[int, int] = {}
  for i, unit in enumerate(units):
    needed = _needs(work, unit, i, kinds, updates)
    waiting[needed] = waiting.get(needed, 0) | 1 << i
  gates = tuple(Gate(*gate) for gate in waiting.items())
  opens: list[list[Gate]] = [[] for _ in units]
  for gate in gates:
    for i in bits(gate.needs):
      opens[i].append(gate)
  return Plan(kinds, gates, tuple(map(tuple, opens)), tuple(trains))


def _needs(
  work: Workload, unit: Unit, i: int, kinds: dict[Kind, int], updates: list[int]
) -> int:
  """Set of the units that unit i waits for."""
  scores = kinds[Kind.SCORE]
  size = work.generate_size or work.group_size
  if unit.kind == Kind.SCORE:
    return 1 << (i - len(_ranges(0, work.samples, size)))
  if unit.kind == Kind.TRAIN:
    if work.gap and work.scope != "global":
      groups = work.groups_of(unit)
      low = groups[0] * work.group_size // size
      high = -(-(groups[-1] + 1) * work.group_size // size)
      first = (scores & -scores).bit_length() - 1
      scores = ((1 << high) - (1 << low)) << first
    return scores | (1 << updates[unit.update - 1] if unit.update else 0)
  if unit.kind == Kind.UPDATE:
    if not unit.update:
      return kinds[Kind.TRAIN] & ((1 << i) - 1)
    # Where all groups of an update are dead, only this keeps it in its place.
    previous = 1 << updates[unit.update - 1]
    return kinds[Kind.TRAIN] & ((1 << i) - previous) | previous
  if unit.kind == Kind.PUBLISH:
    return kinds[Kind.UPDATE]
  return 0


def bits(members: int) -> list[int]:
  """The members of a set of bits, in order."""
  found = []
  while members:
    lowest = members & -members
    found.append(lowest.bit_length() - 1)
    members ^= lowest
  return found


def _ranges(start: int, stop: int, size: int) -> list[tuple[int, int]]:
  return [(a, min(a + size, stop)) for a in range(start, stop, size)]
