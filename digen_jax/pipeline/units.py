"""The smallest pieces of work, and what makes each of them ready.

The samples of a global step are numbered in canonical order: group by group.
A unit covers a range of them; ranges are cut so that a unit holds whole groups
or a part of one. Gradients are summed in the canonical order of Train units,
whatever the order in which they ran.
"""

import dataclasses
import enum
import functools


class Kind(enum.StrEnum):
  """What a unit does; the names of timeline events."""

  GENERATE = "generate"
  SCORE = "score"
  TRAIN = "train"
  UPDATE = "update"
  PUBLISH = "publish"


@dataclasses.dataclass(frozen=True)
class Unit:
  """One piece of work, executed exactly once.

  Attributes:
    kind: what to do.
    step: global step it belongs to. Generate and Train units of step k run
      with policy version k; Publish of step k makes version k+1 usable.
    start: first sample (GENERATE, SCORE, TRAIN).
    stop: one past the last sample.
    first: first trained step of the window (TRAIN).
    last: one past the last one.
    update: index of the optimiser update in the step (TRAIN, UPDATE).
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
    """What its cost grows with: samples, or samples x steps for TRAIN."""
    if self.kind == Kind.TRAIN:
      return self.samples * (self.last - self.first)
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


@functools.lru_cache(maxsize=1 << 16)
def needs(unit: Unit, work: Workload) -> frozenset[Unit]:
  """The units of the same step that must be done before this one starts.

  GENERATE also needs the version of its step, which Publish of the step before
  provides: the scheduler starts no step without it.
  """
  if unit.kind == Kind.GENERATE:
    return frozenset()
  units = step_units(work, unit.step)
  if unit.kind == Kind.SCORE:
    return frozenset({dataclasses.replace(unit, kind=Kind.GENERATE)})
  if unit.kind == Kind.TRAIN:
    whole = work.scope == "global" or not work.gap
    groups = range(work.groups) if whole else work.groups_of(unit)
    low, high = groups[0] * work.group_size, (groups[-1] + 1) * work.group_size
    return frozenset(
      u
      for u in units
      if (u.kind == Kind.SCORE and u.start < high and u.stop > low)
      or (u.kind == Kind.UPDATE and u.update == unit.update - 1)
    )
  if unit.kind == Kind.UPDATE:
    return frozenset(
      u for u in units if u.kind == Kind.TRAIN and u.update == unit.update
    )
  return frozenset(u for u in units if u.kind == Kind.UPDATE)


def _ranges(start: int, stop: int, size: int) -> list[tuple[int, int]]:
  return [(a, min(a + size, stop)) for a in range(start, stop, size)]
