"""How long steps take on given lanes, by simulation without a search.

Of a running state to its end, and in the long run where steps overlap.
"""

import dataclasses
from collections.abc import Callable, Sequence

from digen_jax.pipeline import bounds
from digen_jax.pipeline.scheduler import Lane, State, start_step
from digen_jax.pipeline.simulate import (
  Assist,
  Cost,
  Left,
  always,
  never,
  simulate,
)
from digen_jax.pipeline.units import Kind, Workload, full_sizes
from digen_jax.timeline import Span

STEPS = (3, 9)  # simulated where steps overlap; see `steady`
FEWER_STEPS = (2, 4)  # where they have more than `SEARCHED_UNITS`
# Where a step has more units than this, idle lanes assist always or never,
# whichever is better: a search at every bubble would take minutes.
SEARCHED_UNITS = 100
# Part of a step that stale units must save: costs are noisy, and samples of the
# version before are no better than fresh ones.
WORTH = 0.02


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
    end(simulate(state, lanes, cost, assist=assist, left=left))
    for assist in ((always, never) if helps else (always,))
  )


def stale_pays(work: Workload, lanes: Sequence[Lane], cost: Cost) -> bool:
  """Whether steps that overlap (TCSS) are shorter by `WORTH` in the long run.

  A lane that has begun a stale unit is not there to help with the step.

  Args:
    work: what a step consists of.
    lanes: who executes.
    cost: seconds of a unit on a lane.
  """
  if not work.stale:
    return False
  helps = any(lane.assists for lane in lanes)
  found = in_the_long_run(
    work, lanes, cost, lambda _: (always, never) if helps else (always,)
  )
  return found.work.stale > 0


def in_the_long_run(
  work: Workload,
  lanes: Sequence[Lane],
  cost: Cost,
  assists: Callable[[Workload], Sequence[Assist]],
) -> "Steady":
  """The best of some ways to assist, with stale units only where they pay.

  They do where they make a step shorter by `WORTH`.

  Args:
    work: what a step consists of.
    lanes: who executes.
    cost: seconds of a unit on a lane.
    assists: the ways, of the workload with stale units and without.
  """

  def best(trial: Workload) -> Steady:
    ways = (steady(trial, lanes, cost, assist) for assist in assists(trial))
    return min(ways, key=lambda way: way.step_seconds)

  fresh = best(dataclasses.replace(work, stale=0))
  if not work.stale:
    return fresh
  overlapping = best(work)
  pays = overlapping.step_seconds < (1 - WORTH) * fresh.step_seconds
  return overlapping if pays else fresh


@dataclasses.dataclass(frozen=True)
class Steady:
  """Simulated steps of `work`, and seconds of one of them in the long run."""

  work: Workload
  spans: list[Span]
  step_seconds: float


def steady(
  work: Workload, lanes: Sequence[Lane], cost: Cost, assist: Assist
) -> Steady:
  """A step in the long run.

  Where steps overlap that is what a longer run takes more than a shorter one:
  the beginning and the end are in both.
  """
  if not work.stale:
    spans = simulate(start_step(work, 0), lanes, cost, assist=assist)
    return Steady(work, spans, end(spans))
  counts = FEWER_STEPS if large(work) else STEPS
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
  return Steady(work, many, (end(many) - end(few)) / (counts[1] - counts[0]))


def large(work: Workload) -> bool:
  """Whether steps have so many units that simulations must be few."""
  generating = work.samples // full_sizes(work)[Kind.GENERATE]
  return bounds.train_units(work) + generating > SEARCHED_UNITS


def end(spans: Sequence[Span]) -> float:
  """Seconds until the last span has ended."""
  return max(span.end for span in spans)
