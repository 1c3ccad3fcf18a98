"""What no schedule can beat, from the costs of units alone."""

import itertools
import math
from collections.abc import Sequence

from digen_jax.pipeline.scheduler import Lane
from digen_jax.pipeline.simulate import Cost
from digen_jax.pipeline.units import Kind, Unit, Workload

BOTH = frozenset({Kind.GENERATE, Kind.TRAIN})
TINY = 1e-12  # seconds, of what costs nothing


def bound(work: Workload, lanes: Sequence[Lane], cost: Cost) -> float:
  """Seconds that no schedule of these units on these lanes can beat.

  All generating and all training (updates and publishing count with it) is
  divided at will, every lane may do both and is never idle. On equal lanes
  that is the work of all units divided by the number of lanes.
  """
  return fluid([times(work, lane, lanes, cost, BOTH) for lane in own(lanes)])


def scoring(work: Workload, lanes: Sequence[Lane], cost: Cost) -> float:
  """Seconds that all scores of a step take at least, on the host's threads."""
  sizes = unit_counts(work)[Kind.SCORE]
  slots = sum(i.slots for i in lanes if Kind.SCORE in i.kinds)
  name = next(i.name for i in lanes if Kind.SCORE in i.kinds)
  units = ((Unit(Kind.SCORE, 0, 0, n), c) for n, c in sizes.items())
  return sum(c * cost(name, unit) for unit, c in units) / slots


def own(lanes: Sequence[Lane]) -> list[Lane]:
  """The lanes with devices."""
  return [lane for lane in lanes if Kind.SCORE not in lane.kinds]


def times(
  work: Workload,
  lane: Lane,
  lanes: Sequence[Lane],
  cost: Cost,
  able: frozenset[Kind],
) -> tuple[float, float]:
  """Seconds in which a lane alone would generate all, and train all.

  What follows training (update, publish) is the trainer's; it is added to all
  lanes' training in proportion.
  """
  counts = unit_counts(work)

  def seconds(lane: Lane, kind: Kind) -> float:
    units = ((Unit(kind, 0, 0, n, 0, 1), c) for n, c in counts[kind].items())
    return sum(c * cost(lane.name, unit) for unit, c in units)

  trainer = next(i for i in lanes if Kind.UPDATE in i.kinds)
  after = seconds(trainer, Kind.UPDATE) + seconds(trainer, Kind.PUBLISH)
  share = 1 + after / max(seconds(trainer, Kind.TRAIN), TINY)
  return (
    max(seconds(lane, Kind.GENERATE), TINY)
    if Kind.GENERATE in able
    else math.inf,
    max(share * seconds(lane, Kind.TRAIN), TINY)
    if Kind.TRAIN in able
    else math.inf,
  )


def fluid(pairs: Sequence[tuple[float, float]]) -> float:
  """The shortest step if work could be divided at will.

  With x_i the part of its time that lane i generates, all is generated in time
  T if T * sum(x_i / g_i) >= 1, and trained if T * sum((1 - x_i) / t_i) >= 1,
  where g_i and t_i are what all of it would take on lane i alone. The lanes
  that generate are those with the lowest g_i / t_i; one may do both.
  """
  generating, training = 0.0, sum(1 / t for _, t in pairs)
  for g, t in sorted(pairs, key=lambda gt: gt[0] / gt[1]):
    if generating + 1 / g >= training - 1 / t:
      x = (training - generating) / (1 / g + 1 / t)
      return 1 / (generating + x / g)
    generating, training = generating + 1 / g, training - 1 / t
  return 1 / generating


def unit_counts(work: Workload) -> dict[Kind, dict[int, int]]:
  """How many units of each size (`Unit.size`) a step has, by kind."""
  samples = _lengths(work.samples, work.generate_size or work.group_size)
  counts: dict[Kind, dict[int, int]] = {
    Kind.GENERATE: samples,
    Kind.SCORE: samples,
    Kind.TRAIN: {},
    Kind.UPDATE: {0: work.updates},
    Kind.PUBLISH: {0: 1},
  }
  chunk = _lengths(
    work.samples // work.updates, work.train_size or work.group_size
  )
  trains = counts[Kind.TRAIN]
  for (rows, n), (steps, m) in itertools.product(
    chunk.items(), _lengths(work.window, work.pack).items()
  ):
    trains[rows * steps] = trains.get(rows * steps, 0) + n * m * work.updates
  return counts


def train_units(work: Workload) -> int:
  """How many Train units a step has."""
  return sum(unit_counts(work)[Kind.TRAIN].values())


def _lengths(total: int, size: int) -> dict[int, int]:
  """Lengths of the ranges of `size` that make up `total`, and their number."""
  lengths = {size: total // size, total % size: 1}
  return {length: n for length, n in lengths.items() if length and n}
