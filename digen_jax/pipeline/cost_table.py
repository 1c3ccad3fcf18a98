"""What units cost on lanes of any size: a record, its file, and measuring it.

`costs.Costs` knows what units cost on the lanes that a run has. To choose
lanes one must know what they would cost on others. So a table holds, for each
role, the seconds of a unit of each kind as

  fixed + row * ceil(rows / replicas) / shards

on a lane of replicas x shards devices: `shards` devices work on a row together,
and batches are padded to what the replicas divide. Work without rows (update,
publish, switch) takes fixed + row / devices. `row` is in device-seconds.
"""

import collections
import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from digen_jax.atomic import write_text
from digen_jax.errors import UserError
from digen_jax.pipeline.costs import NOT_PADDED
from digen_jax.pipeline.units import Kind, Unit
from digen_jax.timeline import Span

WHOLE = (Kind.UPDATE, Kind.PUBLISH, Kind.SWITCH)  # they have no rows


@dataclasses.dataclass(frozen=True)
class Rate:
  """What a kind of unit costs.

  Attributes:
    fixed: seconds, whatever the size of the unit and of the lane.
    row: device-seconds of a row; of all of it where there are no rows.
  """

  fixed: float = 0.0
  row: float = 0.0


@dataclasses.dataclass(frozen=True)
class RoleCosts:
  """What units cost on lanes of one role: one layout, one kind of device.

  Attributes:
    generate: rows are samples; every denoising step of them.
    decode: rows are samples; follows on the same lane. Measured tables have it
      in `generate`.
    train: rows are transitions, samples x denoising steps.
    update: the optimiser.
    publish: moving the weights to all others.
    switch: before a block of units that are not the lane's own work.
    shards: devices that work on a row together.
    sequence: of them, among how many its tokens are divided; the others divide
      heads and weights.
    max_rows: of a Train unit on `shards` devices, the state of training aside;
      more do not fit into memory. 0 means that nothing is known against any
      number.
    state_rows: how many fewer where `shards` devices are a whole lane, which
      holds the state of training. Larger lanes divide it.
  """

  generate: Rate = Rate()
  decode: Rate = Rate()
  train: Rate = Rate()
  update: Rate = Rate()
  publish: Rate = Rate()
  switch: Rate = Rate()
  shards: int = 1
  sequence: int = 1
  max_rows: float = 0.0
  state_rows: float = 0.0

  def room(self, devices: int) -> float:
    """Rows of a Train unit that fit on a lane of so many devices, or inf."""
    if not self.max_rows:
      return math.inf
    replicas = max(devices // self.shards, 1)
    each = math.floor(self.max_rows - self.state_rows / replicas)
    return replicas * max(each, 0)

  def seconds(self, kind: Kind, rows: int, devices: int) -> float:
    """Of a unit on a lane of so many devices."""
    if kind in WHOLE:
      rate = getattr(self, kind.value)
      return rate.fixed + rate.row / devices
    rounds = math.ceil(rows / max(devices // self.shards, 1)) / self.shards
    rates = [getattr(self, kind.value)]
    if kind == Kind.GENERATE:
      rates.append(self.decode)
    return sum(rate.fixed + rate.row * rounds for rate in rates)


@dataclasses.dataclass(frozen=True)
class CostTable:
  """What the units of a run cost, for lanes of any number of devices.

  Attributes:
    rollout: on lanes that generate.
    trainer: on the lane that trains.
    colocated: on a lane that does both; None means as on the trainer.
    score: rows are samples; on a host thread.
    source: how the figures were come by, for people.
    resize: whether units may have other sizes. Where only one was measured it
      is not known what part of their seconds would stay.
  """

  rollout: RoleCosts
  trainer: RoleCosts
  colocated: RoleCosts | None = None
  score: Rate = Rate()
  source: str = ""
  resize: bool = True

  def role(self, name: str) -> RoleCosts:
    """The costs of "rollout", "trainer" or "colocated" lanes."""
    if name == "colocated":
      return self.colocated or self.trainer
    return {"rollout": self.rollout, "trainer": self.trainer}[name]


@dataclasses.dataclass(frozen=True)
class Place:
  """What a lane runs on: a role of the table, and a number of devices."""

  role: str
  devices: int


def lane_costs(
  table: CostTable,
  places: Mapping[str, Place],
  full: Mapping[Kind, int] = NOT_PADDED,
) -> Callable[[str, Unit], float]:
  """Seconds of a unit on a lane, as `simulate` and `Search` ask for them.

  Args:
    table: what units cost.
    places: by lane name. A lane without a place scores, on the host.
    full: by kind, the size that shorter units are padded to; see
      `units.full_sizes`.
  """

  @functools.cache
  def seconds(lane: str, kind: Kind, rows: int) -> float:
    if lane not in places:
      return table.score.fixed + table.score.row * rows
    place = places[lane]
    return table.role(place.role).seconds(kind, rows, place.devices)

  def cost(lane: str, unit: Unit) -> float:
    return seconds(lane, unit.kind, max(unit.size, full.get(unit.kind, 0)))

  return cost


# Measuring


@dataclasses.dataclass(frozen=True)
class Measured:
  """A unit that ran: on which lane, its size (`Unit.size`), and its seconds."""

  lane: str
  kind: Kind
  size: int
  seconds: float


def table_from_spans(
  spans: Iterable[Span],
  devices: Mapping[str, int],
  *,
  shards: Mapping[str, int] | None = None,
  sequence: Mapping[str, int] | None = None,
  source: str = "",
) -> CostTable:
  """The table of a run from its timeline; see `table_from_measured`.

  Short units were padded: all that generated or trained count with the size of
  the largest of their kind.
  """
  measured = [
    Measured(s.lane, Kind(s.name), s.args.get("size", 0), s.end - s.start)
    for s in spans
  ]
  for kind in (Kind.GENERATE, Kind.TRAIN):
    full = max((m.size for m in measured if m.kind == kind), default=0)
    measured = [
      dataclasses.replace(m, size=full) if m.kind == kind else m
      for m in measured
    ]
  return table_from_measured(
    measured, devices, shards=shards, sequence=sequence, source=source
  )


def table_from_measured(
  measured: Iterable[Measured],
  devices: Mapping[str, int],
  *,
  shards: Mapping[str, int] | None = None,
  sequence: Mapping[str, int] | None = None,
  roles: Mapping[str, str] | None = None,
  source: str = "",
) -> CostTable:
  """The table that units which ran agree with best.

  A kind measured in several sizes gives a fixed part and a part per row, by
  least squares through the medians of the sizes. One size alone is taken to
  grow with its rows, and the table then says that units keep theirs. What a
  role never did costs the device-seconds that it costs the other.

  Args:
    measured: units of one run, in any order. Those that compiled should be
      left out; a few do no harm, as medians count.
    devices: how many each lane has. Lanes without an entry are host threads.
    shards: devices that work on a row together, by lane; 1 by default.
    sequence: of them, those among which its tokens are divided; likewise.
    roles: of the lanes that have devices. By default the lane that updates is
      the trainer, or colocated where no other one generates, and all others
      are rollout lanes.
    source: see `CostTable`.

  Raises:
    UserError: nothing was generated, or nothing trained.
  """
  shards, sequence = shards or {}, sequence or {}
  points: dict[tuple[str, Kind], dict[float, list[float]]] = {}
  found = list(measured)
  roles = roles or _roles(found, devices)
  degrees: dict[str, tuple[int, int]] = {}
  for unit in found:
    role, degree = roles.get(unit.lane, "host"), shards.get(unit.lane, 1)
    degrees[role] = degree, sequence.get(unit.lane, 1)
    if unit.kind in WHOLE:
      x = 0.0
    elif role == "host":
      x = float(unit.size)
    else:
      x = math.ceil(unit.size / max(devices[unit.lane] // degree, 1)) / degree
    sizes = points.setdefault((role, unit.kind), collections.defaultdict(list))
    sizes[x].append(unit.seconds)
  for kind in (Kind.GENERATE, Kind.TRAIN):
    if not any(k == kind for _, k in points):
      raise UserError(
        f"{source or 'the timeline'} holds no {kind.value} unit: give one of "
        "a run that finished a step"
      )
  rates = {
    key: _fit({x: statistics.median(seconds) for x, seconds in sizes.items()})
    for key, sizes in points.items()
  }
  own = {
    role: _role_costs(role, rates, *degrees.get(role, (1, 1)))
    for role in ("rollout", "trainer", "colocated")
  }
  both = own["colocated"] if "colocated" in degrees else None
  sized = [
    sizes
    for (_, kind), sizes in points.items()
    if kind in (Kind.GENERATE, Kind.TRAIN)
  ]
  return CostTable(
    rollout=both or own["rollout"],
    trainer=both or own["trainer"],
    colocated=both,
    score=next((r for (_, k), r in rates.items() if k == Kind.SCORE), Rate()),
    source=source,
    resize=all(len(sizes) > 1 for sizes in sized),
  )


def _roles(
  measured: Iterable[Measured], devices: Mapping[str, int]
) -> dict[str, str]:
  """What each lane with devices is."""
  kinds: dict[str, set[Kind]] = {}
  for unit in measured:
    if unit.lane in devices:
      kinds.setdefault(unit.lane, set()).add(unit.kind)
  trainers = [lane for lane in kinds if Kind.UPDATE in kinds[lane]]
  others = [lane for lane in kinds if lane not in trainers]
  name = "trainer" if others else "colocated"
  return dict.fromkeys(others, "rollout") | dict.fromkeys(trainers, name)


def _role_costs(
  role: str,
  rates: Mapping[tuple[str, Kind], Rate],
  shards: int,
  sequence: int,
) -> RoleCosts:
  """The rates of a role; those that it lacks are another's."""
  found = {}
  for kind in (Kind.GENERATE, Kind.TRAIN, *WHOLE):
    others = [rate for (_, k), rate in rates.items() if k == kind]
    rate = rates.get((role, kind), others[0] if others else None)
    if rate is not None:
      found[kind.value] = rate
  return RoleCosts(**found, shards=shards, sequence=sequence)


def _fit(points: Mapping[float, float]) -> Rate:
  """The best line through (rounds, seconds) whose two parts are not negative.

  Errors count in relation to the seconds: small units matter as much.
  """
  if set(points) == {0.0}:
    return Rate(fixed=points[0.0])
  if len(points) == 1:
    ((x, y),) = points.items()
    return Rate(row=y / x)
  weights = {x: 1 / max(y, 1e-9) ** 2 for x, y in points.items()}
  total = sum(weights.values())
  mean_x = sum(w * x for x, w in weights.items()) / total
  mean_y = sum(weights[x] * y for x, y in points.items()) / total
  spread = sum(w * (x - mean_x) ** 2 for x, w in weights.items())
  slope = sum(
    weights[x] * (x - mean_x) * (y - mean_y) for x, y in points.items()
  )
  slope = max(slope / spread, 0.0)
  if slope * mean_x <= mean_y:
    return Rate(mean_y - slope * mean_x, slope)
  squares = sum(w * x * x for x, w in weights.items())
  return Rate(row=sum(weights[x] * x * y for x, y in points.items()) / squares)


# The file


def write_table(path: str | Path, table: CostTable) -> None:
  """Writes a table as JSON."""
  text = json.dumps(dataclasses.asdict(table), indent=2)
  write_text(path, text + "\n")


def read_table(path: str | Path) -> CostTable:
  """Reads what `write_table` wrote; what is left out costs nothing.

  Raises:
    UserError: no such file, not JSON, an unknown field, or a value that cannot
      be.
  """
  try:
    values = json.loads(Path(path).read_text("utf-8"))
  except OSError as error:
    raise UserError(
      f"cost table {path} cannot be read: {error.strerror}"
    ) from (error)
  except ValueError as error:
    raise UserError(f"cost table {path} is not JSON: {error}") from error
  return table_from_dict(values, str(path))


def table_from_dict(values: Any, where: str = "cost table") -> CostTable:
  """A table from plain values; see `read_table`."""
  fields = _fields(values, CostTable, where)
  for role in ("rollout", "trainer"):
    if not isinstance(fields.get(role), Mapping):
      raise UserError(f"{where}: {role!r} must hold the costs of its units")
  for role in ("rollout", "trainer", "colocated"):
    if fields.get(role) is not None:
      fields[role] = _role_from_dict(fields[role], f"{where}: {role}")
  if "score" in fields:
    fields["score"] = _rate_from_dict(fields["score"], f"{where}: score")
  if not isinstance(fields.get("source", ""), str):
    raise UserError(f"{where}: source must be a text")
  if not isinstance(fields.get("resize", True), bool):
    raise UserError(f"{where}: resize must be true or false")
  return CostTable(**fields)


def _role_from_dict(values: Any, where: str) -> RoleCosts:
  fields = _fields(values, RoleCosts, where)
  for name, value in fields.items():
    if name in ("shards", "sequence"):
      if type(value) is not int or value < 1:
        raise UserError(
          f"{where}.{name} must be a positive integer; got {value!r}"
        )
    elif name in ("max_rows", "state_rows"):
      if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise UserError(
          f"{where}.{name} must be a number of rows, 0 or more; got {value!r}"
        )
    else:
      fields[name] = _rate_from_dict(value, f"{where}.{name}")
  for name in ("generate", "train"):
    if not (rate := fields.get(name)) or rate == Rate():
      raise UserError(
        f'{where}.{name} costs nothing: give it seconds, {{"fixed": s, "row": s}}'
      )
  shards, sequence = fields.get("shards", 1), fields.get("sequence", 1)
  if shards % sequence:
    raise UserError(
      f"{where}.sequence, {sequence}, must divide shards, {shards}: it is a "
      "part of the devices that work on a row together"
    )
  return RoleCosts(**fields)


def _rate_from_dict(values: Any, where: str) -> Rate:
  fields = _fields(values, Rate, where)
  for name, value in fields.items():
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
      raise UserError(
        f"{where}.{name} must be a number of seconds, 0 or more; got {value!r}"
      )
  return Rate(**{name: float(value) for name, value in fields.items()})


def _fields(values: Any, record: type, where: str) -> dict[str, Any]:
  known = [field.name for field in dataclasses.fields(record)]
  if not isinstance(values, Mapping):
    raise UserError(f"{where} must hold {', '.join(known)}; got {values!r}")
  for name in values:
    if name not in known:
      raise UserError(
        f"{where} has an unknown field {name!r}; known: {', '.join(known)}"
      )
  return dict(values)
