"""What the repetitions of a ladder come to: medians, a bound, predictions."""

import dataclasses
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from digen_jax.ladder import ladder_chart, timeline_panels
from digen_jax.lanes import Team
from digen_jax.page import page, section
from digen_jax.pipeline.steady import Pays
from digen_jax.pipeline.units import Kind, Unit, Workload, step_units
from digen_jax.timeline import Span

RUNGS = ("colocated", "sequential", "gap", "tsp", "tag", "rat", "tcss")
TRIMMED = 20  # of so many equal units, the slowest and the fastest are left out

Took = tuple[str, Unit, float]  # lane, unit, seconds


@dataclasses.dataclass(frozen=True)
class Ran:
  """A repetition of a rung.

  Attributes:
    seconds: of every counted step.
    spans: of the counted steps.
    costs: of their units: what a lane was busy, and what taking it in took.
    pays: whether units of the next step might start early, and lanes assist
      then.
    driver_seconds: CPU time of this process per counted step, rewards included.
    stolen: part of the processor time wanted that others got, see
      `overlap.cpu_seconds`.
    accounting: lane -> {"busy", "idle", "switch", "sync"} seconds per counted
      step.
  """

  seconds: list[float]
  spans: list[Span]
  costs: list[Took]
  pays: Pays
  driver_seconds: float
  stolen: float
  accounting: dict[str, dict[str, float]]


class Rung(Protocol):
  """What a summary must know of a rung."""

  work: Workload
  team: Team

  def predict(self, cost: Callable[[str, Unit], float], pays: Pays) -> float:
    """Seconds of a counted step, by simulation with such costs of units."""
    ...


def summarize(
  rungs: Mapping[str, Rung],
  ran: Mapping[str, Sequence[Ran]],
  aside: Mapping[str, Sequence[Ran]],
) -> dict[str, Any]:
  """Medians, and what the simulator makes of the costs that a rung had.

  The bound is taken from the units of all rungs that cut the work alike. Units
  are slower where both lanes are busy, so each rung is also compared with the
  bound of its own units.
  """
  spans = {n: _took(s for r in ran[n] for s in r.spans) for n in RUNGS}
  bound = _common_work("tsp", rungs, spans) / 2
  medians = {
    n: statistics.median(s for r in ran[n] for s in r.seconds) for n in RUNGS
  }
  table = {}
  for name, rung in rungs.items():
    own = _work_seconds(mean_costs(spans[name]), rung.work)
    own /= len(rung.team.links)
    cost = mean_costs([took for r in ran[name] for took in r.costs])
    predicted = {
      pays: rung.predict(cost, pays) for pays in {r.pays for r in ran[name]}
    }
    table[name] = {
      "step_seconds": [s for r in ran[name] for s in r.seconds],
      "median_seconds": medians[name],
      "bound_fraction": bound / medians[name],
      "own_bound_fraction": own / medians[name],
      "ratio_to_sequential": medians["sequential"] / medians[name],
      "ratio_to_colocated": medians["colocated"] / medians[name],
      "ratios_to_before": _ratios_to_before(ran, name),
      "ratios_at_equal_costs": _ratios_at_equal_costs(rungs, ran, name),
      "moved": _moved(ran[name]),
      "predicted_step_seconds": statistics.median(
        predicted[r.pays] for r in ran[name]
      ),
      "stale": [r.pays.stale for r in ran[name]],
      "assists_amid_stale": [r.pays.assists for r in ran[name] if r.pays.stale],
      "stolen": [r.stolen for r in ran[name]],
      "put_aside": [
        {"step_seconds": r.seconds, "stolen": r.stolen} for r in aside[name]
      ],
      "driver_cpu_seconds": statistics.median(
        r.driver_seconds for r in ran[name]
      ),
      "lanes": {
        lane: {
          key: statistics.median(r.accounting[lane][key] for r in ran[name])
          for key in ("busy", "idle", "switch", "sync")
        }
        for lane in rung.team.links
      },
    }
  return {"bound_seconds": bound, "rungs": table}


def _ratios_to_before(
  ran: Mapping[str, Sequence[Ran]], name: str
) -> list[float]:
  """How many times faster than the rung below it, repetition by repetition.

  The two ran close to each other, so that what drifts on the machine cancels. Of
  the two lowest, which stand beside each other, there is none.
  """
  if name in ("colocated", "sequential"):
    return []
  before = RUNGS[RUNGS.index(name) - 1]
  return [
    statistics.fmean(a.seconds) / statistics.fmean(b.seconds)
    for a, b in zip(ran[before], ran[name], strict=True)
  ]


def _ratios_at_equal_costs(
  rungs: Mapping[str, Rung],
  ran: Mapping[str, Sequence[Ran]],
  name: str,
) -> list[float]:
  """Likewise, if the units of both had cost the same.

  What a core's speed does from one repetition to the next is taken out, and
  with it that units cost more where both lanes are busy. Where the rung before
  has other packs, Generate units tell the speed.
  """
  if name in ("colocated", "sequential"):
    return []
  before = RUNGS[RUNGS.index(name) - 1]
  kinds = frozenset(Kind)
  if rungs[before].work.pack != rungs[name].work.pack:
    kinds = frozenset({Kind.GENERATE})

  def steps(name: str) -> list[float]:  # in units of their own work
    return [
      statistics.fmean(one.seconds)
      / _work_seconds(mean_costs(_took(one.spans)), rungs[name].work, kinds)
      for one in ran[name]
    ]

  return [a / b for a, b in zip(steps(before), steps(name), strict=True)]


def _common_work(
  name: str, rungs: Mapping[str, Rung], spans: Mapping[str, Sequence[Took]]
) -> float:
  """Seconds of a step's work at the mean costs of all rungs that cut it so."""
  pack = rungs[name].work.pack
  alike = [
    took
    for n in RUNGS
    if n != "colocated" and rungs[n].work.pack == pack
    for took in spans[n]
  ]
  return _work_seconds(mean_costs(alike), rungs[name].work)


def _moved(runs: Sequence[Ran]) -> dict[str, float]:
  """Units a step that lanes did for each other, or started a step early."""
  away = {
    "generated by the trainer": (Kind.GENERATE, "trainer"),
    "trained by the rollout": (Kind.TRAIN, "rollout"),
  }
  spans = [span for one in runs for span in one.spans]
  steps = sum(len(one.seconds) for one in runs)
  counts = {
    what: sum((s.name, s.lane) == (kind.value, lane) for s in spans)
    for what, (kind, lane) in away.items()
  }
  counts["stale"] = sum(
    s.name == Kind.GENERATE and s.args["version"] < s.args["step"]
    for s in spans
  )
  return {what: count / steps for what, count in counts.items()}


def _took(spans: Iterable[Span]) -> list[Took]:
  """What lanes were busy with units of such sizes."""
  return [
    (
      span.lane,
      Unit(Kind(span.name), 0, 0, span.args["size"], 0, 1),
      span.end - span.start,
    )
    for span in spans
  ]


def mean_costs(units: Iterable[Took]) -> Callable[[str, Unit], float]:
  """Mean seconds by kind, lane and size, as a cost of units.

  A step is a sum of units, so what it takes is a sum of means; a few extreme
  units of many are left out.
  """
  seen: dict[tuple[Kind, str, int], list[float]] = {}
  for lane, unit, seconds in units:
    seen.setdefault((unit.kind, lane, unit.size), []).append(seconds)
  table = {key: _mean(values) for key, values in seen.items()}

  def cost(lane: str, unit: Unit) -> float:
    key = unit.kind, lane, unit.size
    if key in table:
      return table[key]
    # A lane that has not done this: what the others take.
    others = [v for (k, _, n), v in table.items() if (k, n) == (key[0], key[2])]
    return statistics.mean(others) if others else 0.0

  return cost


def _mean(values: Sequence[float]) -> float:
  """Mean without one in `TRIMMED` at either end."""
  cut = len(values) // TRIMMED
  return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _work_seconds(
  cost: Callable[[str, Unit], float],
  work: Workload,
  kinds: Collection[Kind] = frozenset(Kind),
) -> float:
  """Seconds of a step's work of some kinds on the lanes that it belongs to."""
  home = {Kind.GENERATE: "rollout"}
  return sum(
    cost(home.get(unit.kind, "trainer"), unit)
    for unit in step_units(work, 0)
    if unit.kind in kinds and unit.kind != Kind.SCORE
  )


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The table: a line for every workload and rung."""
  return [
    {
      "workload": name,
      "rung": rung,
      "step, s": r["median_seconds"],
      "range, s": _range(r["step_seconds"]),
      "x sequential": r["ratio_to_sequential"],
      "x colocated": r["ratio_to_colocated"],
      "x the rung before": _range(r["ratios_to_before"], middle=True),
      "at equal costs": _range(r["ratios_at_equal_costs"], middle=True),
      "moved, units": " / ".join(f"{n:.1f}" for n in r["moved"].values()),
      "of the bound": r["bound_fraction"],
      "of its own bound": r["own_bound_fraction"],
      "predicted / measured": r["predicted_step_seconds"] / r["median_seconds"],
      **{f"{k}, s": _by_lane(r, k) for k in ("busy", "idle", "switch", "sync")},
      "driver, CPU s": r["driver_cpu_seconds"],
      "taken away, %": 100 * max(r["stolen"]),
      "put aside": len(r["put_aside"]),
    }
    for name, workload in result["workloads"].items()
    for rung, r in workload["rungs"].items()
  ]


@dataclasses.dataclass(frozen=True)
class _Shown:
  """A repetition of a rung, as a timeline has it."""

  step_seconds: float
  spans: Sequence[Span]
  busy: Mapping[str, float]


def picture(table: Mapping[str, Any], ran: Mapping[str, Sequence[Ran]]) -> str:
  """HTML of a workload: its ladder, and a step of each rung's last repetition.

  Args:
    table: from `summarize`.
    ran: the repetitions, as it had them.
  """
  seconds = {n: rung["median_seconds"] for n, rung in table["rungs"].items()}
  shown = {}
  for name in seconds:
    last = ran[name][-1]
    step = statistics.fmean(last.seconds)
    busy = {lane: s["busy"] / step for lane, s in last.accounting.items()}
    shown[name] = _Shown(step, last.spans, busy)
  return ladder_chart(seconds, table["bound_seconds"]) + timeline_panels(shown)


def ladder_page(pictures: Mapping[str, str]) -> str:
  """The page of a ladder, a section for each workload."""
  header = (
    "<header><h1>The ladder, measured</h1><p>medians of all repetitions; "
    "timelines of one step of the last</p></header>"
  )
  parts = [section(name, content) for name, content in pictures.items()]
  return page("The ladder, measured", header + "".join(parts))


def _range(values: Sequence[float], middle: bool = False) -> str:
  """Lowest to highest, with the median before them if asked; "" of nothing."""
  if not values:
    return ""
  span = f"{min(values):.2f}–{max(values):.2f}"
  return f"{statistics.median(values):.2f} ({span})" if middle else span


def _by_lane(rung: Mapping[str, Any], key: str) -> str:
  return " + ".join(f"{s[key]:.2f}" for s in rung["lanes"].values())
