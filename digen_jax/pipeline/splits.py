"""Searches for the split of devices, and the sizes of units."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from digen_jax.errors import UserError
from digen_jax.pipeline import bounds
from digen_jax.pipeline.cost_table import CostTable
from digen_jax.pipeline.planner import (
  RUNGS,
  Split,
  Techniques,
  cut,
  equal_split,
  fitting,
  lay_out,
  predict,
  why_not,
)
from digen_jax.pipeline.simulate import always, never
from digen_jax.pipeline.steady import STEPS, in_the_long_run
from digen_jax.pipeline.units import Workload

TRIAL_UNITS = 60_000  # simulated by `best_split`, about
FINALISTS = 4  # that are looked at with a search at each bubble
MOST_UNITS = 4000  # of a step of a candidate


def best_splits(
  table: CostTable,
  work: Workload,
  devices: int,
  rungs: Mapping[str, Techniques] = RUNGS,
  *,
  also: Sequence[Split] = (),
  **options: int,
) -> dict[str, Split]:
  """For each rung the split that serves it best; see `best_split`.

  What serves the rung below is looked at too, and so is `also`. A rung that
  fits on no split is left out.

  Raises:
    UserError: none fits on any.
  """
  found: dict[str, Split] = {}
  for name, techniques in rungs.items():
    others = (*also, *tuple(found.values())[-1:])
    try:
      found[name] = best_split(
        table, work, devices, techniques, also=others, **options
      )
    except UserError as error:
      reason = error
  if not found:
    raise reason
  return found


def best_split(
  table: CostTable,
  work: Workload,
  devices: int,
  techniques: Techniques = RUNGS["rat"],
  *,
  rollout: int = 0,
  most_lanes: int = 1,
  resize: bool = True,
  also: Sequence[Split] = (),
) -> Split:
  """The split and unit sizes with which a step is predicted to be shortest.

  Never worse, by its own prediction, than `equal_split`, and never one that
  does not fit (packs are cut to what does). Candidates are tried in the order
  of a bound on what they can reach, most promising first; the search ends when
  no other can be better, or its simulations are used up.

  Args:
    table: what units cost.
    work: what a step consists of, with the unit sizes to begin with.
    devices: how many there are for both roles.
    techniques: what will be on.
    rollout: devices that generate, where that is decided (two kinds of
      device); 0 lets the search choose.
    most_lanes: rollout lanes that the devices may be divided among.
    resize: whether units may have other sizes than `work` gives them, where
      the table says that they can (`CostTable.resize`).
    also: splits to look at in any case.

  Raises:
    UserError: too few devices, or no Train unit fits into memory.
  """
  start = equal_split(work, devices)
  shares = [rollout] if rollout else _shares(table, devices)
  starts = [start]
  if shares and not techniques.colocated:
    starts = [
      dataclasses.replace(start, rollout=share, trainer=devices - share)
      for share in sorted(shares, key=lambda share: abs(share - devices // 2))
    ]
  start = fitting_start(table, work, starts, techniques)
  cuts = [dataclasses.replace(start, pack=starts[0].pack)]
  if resize and table.resize:
    cuts = _cuts(work, start)
  shares = [start.rollout] if rollout or techniques.colocated else shares
  options = _candidates(table, cuts, shares, work, techniques, most_lanes)
  reach = {s: _reach(table, work, s, techniques) for s in options}
  found = {start: _quick(table, work, start, techniques)}
  # What no split changes but by the sizes of units.
  scoring = min(_scoring(table, work, s, techniques) for s in (start, *reach))
  units = TRIAL_UNITS
  for split in sorted(reach, key=lambda s: (reach[s], -s.generate_size)):
    if max(reach[split], scoring) >= min(found.values()) or units < 0:
      break
    found[split] = _quick(table, work, split, techniques)
    steps = sum(STEPS) if techniques.tcss else 1
    units -= steps * _count(work, split, techniques)
  finalists = sorted(found, key=found.__getitem__)[:FINALISTS]
  others = [fitting(table, work, split, techniques) for split in also]
  seconds: dict[Split, float] = {}
  for split in dict.fromkeys((*finalists, *filter(None, others), start)):
    # Where units are many, not to look at them is what saves time.
    least = _reach(table, work, split, techniques)
    if least <= min(seconds.values(), default=least):
      seconds[split] = predict(table, work, split, techniques).step_seconds
  return min(seconds, key=lambda s: (seconds[s], s != start))


def _reach(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> float:
  """Seconds that a step of this split takes at least, by what lanes can do."""
  work, lanes, _, cost = lay_out(table, work, split, techniques)
  times = [
    bounds.times(work, lane, lanes, cost, lane.kinds | lane.assists)
    for lane in bounds.own(lanes)
  ]
  fluid = bounds.fluid(times)
  if work.stale:
    return fluid
  generating = 1 / sum(1 / g for g, _ in times)
  training = 1 / sum(1 / t for _, t in times)
  if not techniques.gap or work.scope == "global":
    return generating + training
  # Nothing is trained before the first unit is generated, and something is
  # after the last one.
  first = min(g for g, _ in times) / -(-work.samples // work.generate_size)
  last = min(t for _, t in times) / bounds.train_units(work)
  return max(fluid, first + training, generating + last)


def _scoring(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> float:
  """Seconds that the rewards of a step take at least."""
  work, lanes, _, cost = lay_out(table, work, split, techniques)
  return bounds.scoring(work, lanes, cost)


def _count(work: Workload, split: Split, techniques: Techniques) -> int:
  """Units of a step."""
  counts = bounds.unit_counts(cut(work, split, techniques))
  return sum(n for sizes in counts.values() for n in sizes.values())


def _quick(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> float:
  """Seconds of a step, without a search at each bubble."""
  work, lanes, _, cost = lay_out(table, work, split, techniques)
  helps = techniques.bts and (techniques.tag or techniques.rat)
  ways = (always, never) if helps else (always,)
  return in_the_long_run(work, lanes, cost, lambda _: ways).step_seconds


def _candidates(
  table: CostTable,
  cuts: Sequence[Split],
  shares: Sequence[int],
  work: Workload,
  techniques: Techniques,
  most_lanes: int,
) -> Iterator[Split]:
  """Splits worth a thought: units cut as in `cuts`, on all shares and lanes."""
  divided = [1]
  while most_lanes >= 2 * divided[-1] and not techniques.colocated:
    divided.append(2 * divided[-1])
  for share, lanes, cut_as in itertools.product(shares, divided, cuts):
    split = dataclasses.replace(
      cut_as,
      rollout=share,
      trainer=cut_as.devices - share,
      rollout_lanes=lanes,
    )
    if techniques.colocated or share % (lanes * table.rollout.shards) == 0:
      split = fitting(table, work, split, techniques)
      if split and _count(work, split, techniques) <= MOST_UNITS:
        yield split


def _cuts(work: Workload, start: Split) -> list[Split]:
  """`start` with every legal size of units, and packs of all trained steps."""
  train_sizes = legal_sizes(work.group_size, work.groups // work.updates)
  return [
    dataclasses.replace(
      start, generate_size=generate, train_size=train, pack=work.window
    )
    for generate in legal_sizes(work.group_size, work.groups)
    for train in train_sizes
  ]


def _shares(table: CostTable, devices: int) -> list[int]:
  """Legal numbers of rollout devices: at most 32, evenly spread."""
  rollout, trainer = table.rollout.shards, table.trainer.shards
  legal = [
    share
    for share in range(rollout, devices, rollout)
    if (devices - share) % trainer == 0
  ]
  return _spread(legal, 32)


def legal_sizes(group_size: int, groups: int) -> list[int]:
  """Samples of a unit: whole groups, or equal parts of one; at most ten."""
  parts = [n for n in range(1, group_size) if group_size % n == 0]
  wholes = [n for n in range(1, groups + 1) if groups % n == 0]
  return _spread(parts + [n * group_size for n in wholes], 10)


def _spread(values: Sequence[int], most: int) -> list[int]:
  """At most `most` of the values, with the first and the last."""
  if len(values) <= most:
    return list(values)
  return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]


def fitting_start(
  table: CostTable,
  work: Workload,
  splits: Sequence[Split],
  techniques: Techniques,
) -> Split:
  """The first of some splits that fits, with Train units as large as can be.

  Raises:
    UserError: on none of them do even the smallest.
  """
  own = splits[0].train_size
  legal = legal_sizes(work.group_size, work.groups // work.updates)
  for size in (own, *reversed([n for n in legal if n < own])):
    for split in splits:
      trial = dataclasses.replace(split, train_size=size)
      if found := fitting(table, work, trial, techniques):
        return found
  last = dataclasses.replace(splits[0], train_size=size, pack=1)
  raise UserError(why_not(table, work, last, techniques))
