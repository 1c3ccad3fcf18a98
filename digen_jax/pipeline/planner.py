"""Predicts steps from a table of costs, with each technique.

Everything here is the scheduler on a virtual clock; nothing runs. A `Split`
says which lanes there are and how work is cut, `Techniques` what is switched
on; `predict` says what a step then takes. `splits.py` searches for the split.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from digen_jax.errors import UserError
from digen_jax.pipeline import bounds
from digen_jax.pipeline.cost_table import CostTable, Place, lane_costs
from digen_jax.pipeline.scheduler import Lane
from digen_jax.pipeline.search import Budget, large
from digen_jax.pipeline.simulate import Assist, Cost, always, never
from digen_jax.pipeline.steady import end, in_the_long_run, ways
from digen_jax.pipeline.units import Kind, Workload, full_sizes, part_of
from digen_jax.timeline import Accounting, Span, lane_accounting

TRAINS = frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH})
BOTH = TRAINS | {Kind.GENERATE}
STALE = 0.5  # of the ladder's last rung
CALM = Budget(simulations=12)  # of a search; nobody waits for the answer


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
    uneven: devices of each rollout lane, where they differ.
  """

  rollout: int
  trainer: int
  generate_size: int
  train_size: int
  pack: int
  rollout_lanes: int = 1
  uneven: tuple[int, ...] = ()

  @property
  def devices(self) -> int:
    """All of them."""
    return self.rollout + self.trainer

  @property
  def rollouts(self) -> tuple[int, ...]:
    """Devices of each rollout lane."""
    share = self.rollout // self.rollout_lanes
    return self.uneven or (share,) * self.rollout_lanes


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a step takes.

  Attributes:
    step_seconds: from publish to publish, in the long run.
    bound_seconds: the work of the step shared out over all lanes without a
      bubble; see `bounds.bound`.
    scoring_seconds: that the rewards take at least; see `bounds.scoring`.
    lanes: where the time of each lane goes, seconds of `step_seconds`.
    spans: the simulated timeline.
    split: the lanes.
    techniques: what is on.
  """

  step_seconds: float
  bound_seconds: float
  scoring_seconds: float
  lanes: Mapping[str, Accounting]
  spans: tuple[Span, ...]
  split: Split
  techniques: Techniques

  @property
  def busy(self) -> dict[str, float]:
    """Busy fraction of each lane."""
    return {n: a.busy / self.step_seconds for n, a in self.lanes.items()}


def equal_split(work: Workload, devices: int) -> Split:
  """Half of the devices for each role, units as `work` cuts them."""
  share = max(devices // 2, 1)
  return Split(
    rollout=share,
    trainer=devices - share,
    generate_size=work.generate_size or work.group_size,
    train_size=work.train_size or work.group_size,
    pack=work.pack,
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
  several = len(split.rollouts) > 1
  places = {
    f"rollout{i if several else ''}": Place("rollout", count)
    for i, count in enumerate(split.rollouts)
  }
  rollouts = [
    Lane(n, frozenset({Kind.GENERATE}), assists=trains) for n in places
  ]
  trainer = Lane("trainer", TRAINS, assists=generates)
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
    stale=part_of(count, techniques.tcss),
  )


def lay_out(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> tuple[Workload, tuple[Lane, ...], Mapping[str, Place], Cost]:
  """The workload as it is cut, the lanes, what they run on, and their costs."""
  work = cut(work, split, techniques)
  lanes, places = make_lanes(split, techniques)
  return work, lanes, places, lane_costs(table, places, full_sizes(work))


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
    UserError: the split cannot be; see `why_not`.
  """
  if reason := why_not(table, work, split, techniques):
    raise UserError(reason)
  work, lanes, places, cost = lay_out(table, work, split, techniques)
  run = in_the_long_run(
    work,
    lanes,
    cost,
    lambda trial: _ways(trial, lanes, cost, techniques.bts),
  )
  wall = end(run.spans)
  parts = lane_accounting(run.spans, places, 0.0, wall)
  return Prediction(
    step_seconds=run.step_seconds,
    bound_seconds=bounds.bound(work, lanes, cost),
    scoring_seconds=bounds.scoring(work, lanes, cost),
    lanes={n: _scaled(a, run.step_seconds / wall) for n, a in parts.items()},
    spans=tuple(run.spans),
    split=split,
    techniques=techniques,
  )


def _ways(
  work: Workload, lanes: Sequence[Lane], cost: Cost, bts: bool
) -> Sequence[Assist]:
  """As `steady.ways`; where steps are large, a search would take minutes."""
  if bts and large(work):
    return (always, never)
  return ways(work, lanes, cost, bts=bts, budget=CALM)


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


# What can be

NO_ROW = (
  "not even one sample and one denoising step fits into the memory of the {} "
  "lane: give it more devices, or more of them to a row (shards)"
)


def why_not(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> str:
  """Why a split cannot be, in a line; "" if it can.

  A lane has no device, rollout lanes cannot share their devices, those of a
  lane are no multiple of what works on a row together, or a Train unit does
  not fit into the memory of a lane that may train.
  """
  alike = not techniques.colocated and not split.uneven
  if alike and split.rollout % split.rollout_lanes:
    return (
      f"{split.rollout} rollout devices cannot be divided among "
      f"{split.rollout_lanes} lanes: take a divisor"
    )
  for role, count in _lane_sizes(split, techniques):
    shards, most = table.role(role).shards, table.role(role).max_rows
    if 0 < most < 1 and (role != "rollout" or techniques.rat):
      return NO_ROW.format(role)
    if count < 1:
      return (
        f"no device is left for the {role} lane: give more devices, or use "
        "config.pipeline.mode='colocated'"
      )
    if count % shards:
      return (
        f"{count} devices on a {role} lane: {shards} of them work on a row "
        f"together, so their number must be a multiple of {shards}"
      )
  rows = full_sizes(cut(work, split, techniques))[Kind.TRAIN]
  name, room = _least_room(table, split, techniques)
  if room < 1:
    return NO_ROW.format(name)
  if rows > room:
    return (
      f"does not fit: a Train unit has {rows:,} rows (samples x denoising "
      f"steps), the {name} lane holds {room:,.0f}: take a smaller "
      "config.pipeline.train_size or timesteps_per_pack, or more devices"
    )
  return ""


def fitting(
  table: CostTable, work: Workload, split: Split, techniques: Techniques
) -> Split | None:
  """The split with its packs cut to what fits; None if it cannot be."""
  if techniques.tsp:
    one = dataclasses.replace(split, pack=1)
    rows = full_sizes(cut(work, one, techniques))[Kind.TRAIN]
    _, room = _least_room(table, split, techniques)
    pack = max(int(min(split.pack, room / rows)), 1)
    split = dataclasses.replace(split, pack=pack)
  return None if why_not(table, work, split, techniques) else split


def _lane_sizes(split: Split, techniques: Techniques) -> list[tuple[str, int]]:
  """Role and devices of every lane, of those that are alike one."""
  if techniques.colocated:
    return [("colocated", split.devices)]
  rollouts = [("rollout", count) for count in dict.fromkeys(split.rollouts)]
  return [*rollouts, ("trainer", split.trainer)]


def _least_room(
  table: CostTable, split: Split, techniques: Techniques
) -> tuple[str, float]:
  """The lane that holds the smallest Train unit, and how many rows.

  A Train unit may run on any lane that trains.
  """
  rooms = [
    (role, table.role(role).room(count))
    for role, count in _lane_sizes(split, techniques)
    if role != "rollout" or techniques.rat
  ]
  return min(rooms, key=lambda item: item[1])
