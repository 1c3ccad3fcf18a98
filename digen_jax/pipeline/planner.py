"""Predicts steps from a table of costs: each technique, and the best split.

Everything here is the scheduler on a virtual clock; nothing runs. A `Split`
says which lanes there are and how work is cut, `Techniques` what is switched
on; `predict` says what a step then takes, `best_split` searches for the split.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from digen_jax.errors import UserError
from digen_jax.pipeline import bounds
from digen_jax.pipeline.cost_table import CostTable, Place, lane_costs
from digen_jax.pipeline.scheduler import Lane, State, start_step
from digen_jax.pipeline.search import Budget, Search
from digen_jax.pipeline.simulate import (
  Assist,
  Cost,
  Left,
  always,
  never,
  simulate,
)
from digen_jax.pipeline.units import Kind, Workload, full_sizes
from digen_jax.timeline import Accounting, Span, lane_accounting

TRAINS = frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH})
BOTH = TRAINS | {Kind.GENERATE}
STEPS = (3, 9)  # simulated where steps overlap; see `_steady`
FEWER_STEPS = (2, 4)  # where they have more than `SEARCHED_UNITS`
# Where a step has more units than this, idle lanes assist always or never,
# whichever is better: a search at every bubble would take minutes.
SEARCHED_UNITS = 100
STALE = 0.5  # of the ladder's last rung
TRIAL_UNITS = 60_000  # simulated by `best_split`, about
FINALISTS = 4  # that are looked at with a search at each bubble
MOST_UNITS = 4000  # of a step of a candidate


@dataclasses.dataclass(frozen=True)
class Techniques:
  """What is switched on.

  Attributes:
    colocated: one lane of all devices does both in turn.
    gap: groups are trained as soon as they are scored.
    tsp: Train units fold `Split.pack` denoising steps; else one.
    tag: an idle trainer generates.
    rat: an idle rollout lane trains.
    bts: idle lanes search for how much they should take; else all there is.
    tcss: part of the next step's Generate units that may start early.
    reward_slots: reward calls under way at once.
  """

  colocated: bool = False
  gap: bool = False
  tsp: bool = False
  tag: bool = False
  rat: bool = False
  bts: bool = True
  tcss: float = 0.0
  reward_slots: int = 4


# Each adds to the one before.
RUNGS: Mapping[str, Techniques] = {
  "colocated": Techniques(colocated=True),
  "sequential": Techniques(),
  "gap": Techniques(gap=True),
  "tsp": Techniques(gap=True, tsp=True),
  "tag": Techniques(gap=True, tsp=True, tag=True),
  "rat": Techniques(gap=True, tsp=True, tag=True, rat=True),
  "tcss": Techniques(gap=True, tsp=True, tag=True, rat=True, tcss=STALE),
}


@dataclasses.dataclass(frozen=True)
class Split:
  """Which lanes there are, and how work is cut.

  Attributes:
    rollout: devices of all rollout lanes together.
    trainer: devices of the trainer. A colocated lane has those of both.
    generate_size: samples per Generate unit.
    train_size: samples per Train unit.
    pack: denoising steps per Train unit, under TSP.
    rollout_lanes: lanes that the rollout devices are divided among.
  """

  rollout: int
  trainer: int
  generate_size: int
  train_size: int
  pack: int
  rollout_lanes: int = 1

  @property
  def devices(self) -> int:
    """All of them."""
    return self.rollout + self.trainer


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a step takes.

  Attributes:
    step_seconds: from publish to publish, in the long run.
    bound_seconds: the work of the step shared out over all lanes without a
      bubble; see `bounds.bound`.
    lanes: where the time of each lane goes, seconds of `step_seconds`.
    spans: the simulated timeline.
    split: the lanes.
    techniques: what is on.
  """

  step_seconds: float
  bound_seconds: float
  lanes: Mapping[str, Accounting]
  spans: tuple[Span, ...]
  split: Split
  techniques: Techniques

  @property
  def busy(self) -> dict[str, float]:
    """Busy fraction of each lane."""
    return {n: a.busy / self.step_seconds for n, a in self.lanes.items()}


def equal_split(work: Workload, devices: int, rollout_lanes: int = 1) -> Split:
  """Half of the devices for each role, units as `work` cuts them."""
  share = max(devices // 2 // rollout_lanes, 1) * rollout_lanes
  return Split(
    rollout=share,
    trainer=devices - share,
    generate_size=work.generate_size or work.group_size,
    train_size=work.train_size or work.group_size,
    pack=work.pack,
    rollout_lanes=rollout_lanes,
  )


def make_lanes(
  split: Split, techniques: Techniques
) -> tuple[tuple[Lane, ...], dict[str, Place]]:
  """The lanes of a split, and what each runs on."""
  host = Lane("host", frozenset({Kind.SCORE}), slots=techniques.reward_slots)
  if techniques.colocated:
    lane = Lane("colocated", BOTH)
    return (lane, host), {lane.name: Place("colocated", split.devices)}
  trains = frozenset({Kind.TRAIN} if techniques.rat else ())
  generates = frozenset({Kind.GENERATE} if techniques.tag else ())
  count = split.rollout_lanes
  names = [f"rollout{i}" for i in range(count)] if count > 1 else ["rollout"]
  rollouts = [
    Lane(n, frozenset({Kind.GENERATE}), assists=trains) for n in names
  ]
  trainer = Lane("trainer", TRAINS, assists=generates)
  places = dict.fromkeys(names, Place("rollout", split.rollout // count))
  places["trainer"] = Place("trainer", split.trainer)
  return (*rollouts, trainer, host), places


def cut(work: Workload, split: Split, techniques: Techniques) -> Workload:
  """The workload as a split and techniques cut it into units."""
  count = -(-work.samples // split.generate_size)
  return dataclasses.replace(
    work,
    generate_size=split.generate_size,
    train_size=split.train_size,
    pack=split.pack if techniques.tsp else 1,
    gap=techniques.gap,
    stale=0 if techniques.colocated else round(techniques.tcss * count),
  )


def predict(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> Prediction:
  """Simulates steps.

  Args:
    table: what units cost.
    work: what a step consists of; `split` says how it is cut.
    split: the lanes.
    techniques: what is on.

  Raises:
    UserError: a lane has no device, rollout lanes cannot share their devices,
      or the devices of a lane are fewer than work on one row together.
  """
  check(table, split, techniques)
  work = cut(work, split, techniques)
  lanes, places = make_lanes(split, techniques)
  cost = lane_costs(table, places, full_sizes(work))
  runs = [
    _steady(trial, lanes, cost, assist)
    for trial in _stale_or_not(work)
    for assist in _assists(trial, lanes, cost, techniques)
  ]
  run = min(runs, key=lambda run: run.step_seconds)
  wall = _end(run.spans)
  parts = lane_accounting(run.spans, places, 0.0, wall)
  return Prediction(
    step_seconds=run.step_seconds,
    bound_seconds=bounds.bound(work, lanes, cost),
    lanes={n: _scaled(a, run.step_seconds / wall) for n, a in parts.items()},
    spans=tuple(run.spans),
    split=split,
    techniques=techniques,
  )


def _scaled(part: Accounting, factor: float) -> Accounting:
  seconds = dataclasses.asdict(part)
  return Accounting(**{name: x * factor for name, x in seconds.items()})


def ladder(
  table: CostTable,
  work: Workload,
  splits: Split | Mapping[str, Split],
  rungs: Mapping[str, Techniques] = RUNGS,
) -> dict[str, Prediction]:
  """A prediction per rung, all with the same bound: the lowest of them.

  Args:
    table: what units cost.
    work: what a step consists of.
    splits: one for all rungs, or one for each.
    rungs: techniques by name.
  """
  found = {}
  for name, techniques in rungs.items():
    split = splits if isinstance(splits, Split) else splits[name]
    found[name] = predict(table, work, split, techniques)
  lowest = min(p.bound_seconds for p in found.values())
  return {
    name: dataclasses.replace(p, bound_seconds=lowest)
    for name, p in found.items()
  }


def best_splits(
  table: CostTable,
  work: Workload,
  devices: int,
  rungs: Mapping[str, Techniques] = RUNGS,
  **options: int,
) -> dict[str, Split]:
  """For each rung the split that serves it best; see `best_split`.

  What serves the rung below is looked at as well.
  """
  found: dict[str, Split] = {}
  for name, techniques in rungs.items():
    below = tuple(found.values())[-1:]
    found[name] = best_split(
      table, work, devices, techniques, also=below, **options
    )
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

  Never worse, by its own prediction, than `equal_split`. Candidates are tried
  in the order of a bound on what they can reach, most promising first; the
  search ends when no other can be better, or its simulations are used up.

  Args:
    table: what units cost.
    work: what a step consists of, with the unit sizes to begin with.
    devices: how many there are for both roles.
    techniques: what will be on.
    rollout: devices that generate, where that is decided (two kinds of
      device); 0 lets the search choose.
    most_lanes: rollout lanes that the devices may be divided among.
    resize: whether units may have other sizes than `work` gives them.
    also: splits to look at in any case.

  Raises:
    UserError: too few devices, or no Train unit fits into memory.
  """
  start = equal_split(work, devices)
  shares = [rollout] if rollout else _shares(table, devices)
  if shares and not techniques.colocated:
    share = min(shares, key=lambda share: abs(share - devices // 2))
    start = dataclasses.replace(start, rollout=share, trainer=devices - share)
  start = _fitting_start(table, work, start, techniques)
  cuts = _cuts(work, start) if resize else [start]
  shares = [start.rollout] if rollout or techniques.colocated else shares
  options = _candidates(table, cuts, shares, work, techniques, most_lanes)
  reach = {s: _reach(table, work, s, techniques) for s in options}
  found = {start: _quick(table, work, start, techniques)}
  units = TRIAL_UNITS
  for split in sorted(reach, key=lambda s: (reach[s], -s.generate_size)):
    if reach[split] >= min(found.values()) or units < 0:
      break
    found[split] = _quick(table, work, split, techniques)
    steps = sum(STEPS) if techniques.tcss else 1
    units -= steps * _count(work, split, techniques)
  finalists = sorted(found, key=found.__getitem__)[:FINALISTS]
  others = [_fitting(table, split, techniques) for split in also]
  return min(
    dict.fromkeys((start, *finalists, *filter(None, others))),
    key=lambda s: predict(table, work, s, techniques).step_seconds,
  )


def check(table: CostTable, split: Split, techniques: Techniques) -> None:
  """Raises UserError for a split that cannot be."""
  if techniques.colocated:
    sizes = {"colocated": split.devices}
  elif split.rollout % split.rollout_lanes:
    raise UserError(
      f"{split.rollout} rollout devices cannot be divided among "
      f"{split.rollout_lanes} lanes: take a divisor"
    )
  else:
    sizes = {
      "rollout": split.rollout // split.rollout_lanes,
      "trainer": split.trainer,
    }
  for role, count in sizes.items():
    shards = table.role(role).shards
    if count < 1:
      raise UserError(
        f"no device is left for the {role} lane: give more devices, or use "
        "config.pipeline.mode='colocated'"
      )
    if count % shards:
      raise UserError(
        f"{count} devices on a {role} lane: {shards} of them work on a row "
        f"together, so their number must be a multiple of {shards}"
      )


def _reach(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> float:
  """Seconds that a step of this split takes at least, by what lanes can do."""
  work = cut(work, split, techniques)
  lanes, places = make_lanes(split, techniques)
  cost = lane_costs(table, places, full_sizes(work))
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
  last = min(t for _, t in times) / _trains(work)
  return max(fluid, first + training, generating + last)


def _trains(work: Workload) -> int:
  return sum(bounds.unit_counts(work)[Kind.TRAIN].values())


def _large(work: Workload) -> bool:
  """Whether steps have so many units that simulations must be few."""
  return _trains(work) + work.samples // work.generate_size > SEARCHED_UNITS


def _count(work: Workload, split: Split, techniques: Techniques) -> int:
  """Units of a step."""
  counts = bounds.unit_counts(cut(work, split, techniques))
  return sum(n for sizes in counts.values() for n in sizes.values())


def _assists(
  work: Workload,
  lanes: Sequence[Lane],
  cost: Cost,
  techniques: Techniques,
) -> list[Assist]:
  """Ways of assisting to simulate, of which the best will be taken."""
  if not techniques.bts or not (techniques.tag or techniques.rat):
    return [always]
  if _large(work):
    return [always, never]
  return [Search(lanes, cost, Budget(simulations=12))]


def _quick(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> float:
  """Seconds of a step, without a search at each bubble."""
  work = cut(work, split, techniques)
  lanes, places = make_lanes(split, techniques)
  cost = lane_costs(table, places, full_sizes(work))
  helps = techniques.bts and (techniques.tag or techniques.rat)
  return min(
    _steady(trial, lanes, cost, assist).step_seconds
    for trial in _stale_or_not(work)
    for assist in ((always, never) if helps else (always,))
  )


def quick_end(
  state: State,
  lanes: Sequence[Lane],
  cost: Cost,
  left: Left | None = None,
  *,
  bts: bool = True,
) -> float:
  """Seconds to the end of the step, without a search at each bubble.

  Args:
    state: where the run stands.
    lanes: who executes.
    cost: seconds of a unit on a lane.
    left: seconds that the units under way still need.
    bts: whether idle lanes need not assist.
  """
  helps = bts and any(lane.assists for lane in lanes)
  return min(
    _end(simulate(state, lanes, cost, assist=assist, left=left))
    for assist in ((always, never) if helps else (always,))
  )


def _stale_or_not(work: Workload) -> list[Workload]:
  """Stale units are not started where they do not pay; see `stale_pays`."""
  off = [dataclasses.replace(work, stale=0)] if work.stale else []
  return [work, *off]


def stale_pays(work: Workload, lanes: Sequence[Lane], cost: Cost) -> bool:
  """Whether steps that overlap (TCSS) are shorter in the long run.

  A lane that has begun a stale unit is not there to help with the step.

  Args:
    work: what a step consists of.
    lanes: who executes.
    cost: seconds of a unit on a lane.
  """
  if not work.stale:
    return False
  helps = any(lane.assists for lane in lanes)
  with_stale, without = (
    min(
      _steady(trial, lanes, cost, assist).step_seconds
      for assist in ((always, never) if helps else (always,))
    )
    for trial in _stale_or_not(work)
  )
  return with_stale < without


@dataclasses.dataclass(frozen=True)
class _Run:
  """Simulated steps."""

  spans: list[Span]
  step_seconds: float


def _steady(
  work: Workload, lanes: Sequence[Lane], cost: Cost, assist: Assist
) -> _Run:
  """A step in the long run.

  Where steps overlap that is what a longer run takes more than a shorter one:
  the beginning and the end are in both.
  """
  if not work.stale:
    spans = simulate(start_step(work, 0), lanes, cost, assist=assist)
    return _Run(spans, _end(spans))
  counts = FEWER_STEPS if _large(work) else STEPS
  few, many = (
    simulate(
      start_step(work, 0, last=steps - 1),
      lanes,
      cost,
      last=steps - 1,
      assist=assist,
    )
    for steps in counts
  )
  return _Run(many, (_end(many) - _end(few)) / (counts[1] - counts[0]))


def _end(spans: Sequence[Span]) -> float:
  return max(span.end for span in spans)


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
      split = _fitting(table, split, techniques)
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


def _fitting(
  table: CostTable, split: Split, techniques: Techniques
) -> Split | None:
  """The split with its packs cut to what fits into memory; None if none does.

  A Train unit may run on any lane that trains: the smallest counts.
  """
  lanes, places = make_lanes(split, techniques)
  pack = split.pack if techniques.tsp else 1
  for lane in bounds.own(lanes):
    role = table.role(places[lane.name].role)
    if role.max_rows and Kind.TRAIN in lane.kinds | lane.assists:
      replicas = max(places[lane.name].devices // role.shards, 1)
      pack = min(pack, role.max_rows * replicas // split.train_size)
  if pack < 1:
    return None
  return dataclasses.replace(split, pack=pack) if techniques.tsp else split


def _fitting_start(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> Split:
  """The split, or the one with the largest Train units that fit."""
  check(table, split, techniques)
  sizes = legal_sizes(work.group_size, work.groups // work.updates)
  smaller = [n for n in sizes if n < split.train_size]
  for size in (split.train_size, *reversed(smaller)):
    trial = dataclasses.replace(split, train_size=size)
    if fitting := _fitting(table, trial, techniques):
      return fitting
  raise UserError(
    "not even one sample and one denoising step fits into the memory of a "
    "lane that trains: give it more devices, or more of them to a row (shards)"
  )
