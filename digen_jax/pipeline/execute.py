"""Drives the scheduler with real lanes.

One thread dispatches everything: free-running dispatch threads can deadlock
XLA's collectives. Work overlaps because dispatch is asynchronous; the loop
polls for what has finished, tells the scheduler, and hands out what became
ready. Host work (rewards) runs in threads of its own, behind the same handle.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from digen_jax.pipeline.costs import Costs
from digen_jax.pipeline.scheduler import (
  Lane,
  State,
  finished,
  next_unit,
  on_done,
  on_start,
)
from digen_jax.pipeline.simulate import unit_span
from digen_jax.pipeline.units import Kind, Unit
from digen_jax.timeline import Span

POLL_SECONDS = 5e-4  # well under the shortest unit; leaves the cores to work


class Handle(Protocol):
  """Work under way on a lane."""

  def ready(self) -> bool:
    """Whether it has ended, without blocking."""
    ...

  def finish(self) -> frozenset[int]:
    """Takes the result in, on the dispatching thread; raises if it failed.

    Returns:
      Groups now known to carry no gradient; empty but for SCORE.
    """
    ...


Start = Callable[[str, Unit], Handle]


class UnitError(RuntimeError):
  """A unit failed; the message names it and its lane."""

  def __init__(self, lane: str, unit: Unit, cause: BaseException):
    where = f"samples {unit.start}:{unit.stop} of " if unit.stop else ""
    super().__init__(
      f"{unit.kind.value} unit of {where}step {unit.step} failed on lane "
      f"{lane!r}: {cause}"
    )


@dataclasses.dataclass
class _Running:
  lane: Lane
  unit: Unit
  handle: Handle
  span: Span


def run_step(
  state: State,
  lanes: Sequence[Lane],
  starts: Mapping[Kind, Start],
  costs: Costs,
  clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Span], State]:
  """Executes a global step.

  Args:
    state: `scheduler.start_step(...)`.
    lanes: who executes.
    starts: for every kind, the function that begins a unit on a lane and
      returns at once with its handle.
    costs: told the seconds of every unit.
    clock: seconds, monotonic.

  Returns:
    Spans in order of completion, and the final state.

  Raises:
    UnitError: a unit raised. Whatever still runs is waited for first, so that
      nothing is in flight when the caller writes its checkpoint.
  """
  running: list[_Running] = []
  spans: list[Span] = []
  while not finished(state):
    progressed = False
    for item in list(running):
      if not item.handle.ready():
        continue
      now = clock()
      running.remove(item)
      state = _finish(state, item, running)
      spans.append(dataclasses.replace(item.span, end=now))
      costs.observe(item.lane.name, item.unit, now - item.span.start)
      progressed = True
    for lane in lanes:
      while (unit := next_unit(state, lane)) is not None:
        now = clock()
        span = unit_span(lane.name, unit, state, now, now)
        state = on_start(state, lane, unit)
        handle = _guard(lane, unit, running, starts[unit.kind], lane.name, unit)
        running.append(_Running(lane, unit, handle, span))
        progressed = True
    if not progressed:
      if not running:
        raise RuntimeError(f"{state.left} units are left that no lane can do")
      time.sleep(POLL_SECONDS)
  return spans, state


def _finish(state: State, item: _Running, others: list[_Running]) -> State:
  dead = _guard(item.lane, item.unit, others, item.handle.finish)
  return on_done(state, item.lane, item.unit, dead)


def _guard(
  lane: Lane,
  unit: Unit,
  others: list[_Running],
  call: Callable[..., Any],
  *args: Any,
) -> Any:
  """Calls; on failure waits for the other units, then names the failed one."""
  try:
    return call(*args)
  except Exception as cause:
    while not all(item.handle.ready() for item in others):
      time.sleep(POLL_SECONDS)
    raise UnitError(lane.name, unit, cause) from cause
