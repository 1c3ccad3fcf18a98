"""How long steps take on given lanes, by simulation.

Of a running state to its end, without a search; and in the long run, where
steps overlap, with what then pays: stale units, assistance, or both.
"""

import dataclasses
from collections.abc import Callable, Sequence

from digen_jax.pipeline.scheduler import Lane, State, start_step
from digen_jax.pipeline.search import (
  PREDICTED,
  WHOLE,
  Budget,
  Search,
  large,
)
from digen_jax.pipeline.simulate import (
  Assist,
  Cost,
  Left,
  always,
  never,
  simulate,
)
from digen_jax.pipeline.units import Workload
from digen_jax.timeline import Span

STEPS = (3, 9)  # simulated where steps overlap; see `steady`
FEWER_STEPS = (2, 4)  # where they are `large`
# Part of a step that stale units must save: costs are noisy, and samples of the
# version before are no better than fresh ones.
WORTH = 0.02


def quick_end(
  state: State,
  lanes: Sequence[Lane],
  cost: Cost,
  left: Left | None = None,
  *,
  assists: Sequence[Assist] = (always, never),
) -> float:
  """Seconds to the end of the step, without a search at each bubble.

  Args:
    state: where the run stands.
    lanes: who executes.
    cost: seconds of a unit on a lane.
    left: seconds that the units under way still need.
    assists: ways to assist, of which the best counts.
  """
  return min(
    end(simulate(state, lanes, cost, assist=assist, left=left))
    for assist in assists
  )


@dataclasses.dataclass(frozen=True)
class Pays:
  """What makes steps shorter in the long run.

  Attributes:
    stale: units of the next step that start early (TCSS).
    assists: idle lanes that help with a step in which such units may start.
  """

  stale: bool
  assists: bool

  def forbid(self, state: State) -> bool:
    """Whether no lane should assist in this state."""
    return state.ahead is not None and not self.assists


def what_pays(
  work: Workload,
  lanes: Sequence[Lane],
  cost: Cost,
  *,
  bts: bool = True,
) -> Pays:
  """Whether to start stale units, and whether to assist where they are.

  A lane that has begun a stale unit is not there to help with the step, and
  one that helps is not there for stale units. A search looks to the end of the
  step alone, which with stale units is not all that counts; without them it is
  never slower than not assisting.

  Args:
    work: what a step consists of.
    lanes: who executes.
    cost: seconds of a unit on a lane.
    bts: whether idle lanes need not assist.
  """
  if not work.stale:
    return Pays(stale=False, assists=True)
  budget = WHOLE if large(work) else PREDICTED
  found = in_the_long_run(
    work,
    lanes,
    cost,
    lambda trial: ways(trial, lanes, cost, bts=bts, budget=budget),
  )
  stale = found.work.stale > 0
  return Pays(stale, not stale or found.assist is not never)


def ways(
  work: Workload,
  lanes: Sequence[Lane],
  cost: Cost,
  *,
  bts: bool,
  budget: Budget,
) -> Sequence[Assist]:
  """Ways to assist, of which a run takes the best.

  Args:
    work: what a step consists of.
    lanes: who executes.
    cost: seconds of a unit on a lane.
    bts: whether idle lanes need not assist.
    budget: of the search.
  """
  if not bts or not any(lane.assists for lane in lanes):
    return (always,)
  search = Search(lanes, cost, budget)
  return (search, never) if work.stale else (search,)


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
    found = [steady(trial, lanes, cost, assist) for assist in assists(trial)]
    return min(found, key=lambda one: one.step_seconds)

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
  assist: Assist
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
    return Steady(work, assist, spans, end(spans))
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
  seconds = (end(many) - end(few)) / (counts[1] - counts[0])
  return Steady(work, assist, many, seconds)


def end(spans: Sequence[Span]) -> float:
  """Seconds until the last span has ended."""
  return max(span.end for span in spans)
