"""Drives the scheduler with a virtual clock and a table of costs."""

import heapq
from collections.abc import Callable, Sequence

from digen_jax.pipeline.scheduler import (
  Lane,
  State,
  finished,
  next_unit,
  on_done,
  on_start,
)
from digen_jax.pipeline.units import Unit
from digen_jax.timeline import Span


def simulate(
  state: State,
  lanes: Sequence[Lane],
  cost: Callable[[str, Unit], float],
  start: float = 0.0,
) -> list[Span]:
  """Runs a global step to its end in virtual time.

  Args:
    state: where the step stands; units already running are taken to begin now.
    lanes: who executes.
    cost: seconds of a unit on a lane, by lane name.
    start: virtual time at which it begins, seconds.

  Returns:
    One span per unit, in order of completion, as `execute.run_step` returns
    them. The step takes `max(span.end) - start` seconds.

  Raises:
    RuntimeError: units are left that no lane can do.
  """
  by_name = {lane.name: lane for lane in lanes}
  events: list[tuple[float, int, str, Unit, float]] = []
  spans: list[Span] = []
  now, serial = start, 0

  def push(lane: str, unit: Unit) -> None:
    nonlocal serial
    heapq.heappush(events, (now + cost(lane, unit), serial, lane, unit, now))
    serial += 1

  for lane_name, unit in sorted(
    state.running, key=lambda r: (r[1].start, r[1].first)
  ):
    push(lane_name, unit)
  while not finished(state):
    for lane in lanes:
      while (unit := next_unit(state, lane)) is not None:
        state = on_start(state, lane, unit)
        push(lane.name, unit)
    if not events:
      left = sum(len(units) for units in state.pending.values())
      raise RuntimeError(f"{left} units are left that no lane can do")
    now, _, name, unit, began = heapq.heappop(events)
    state = on_done(state, by_name[name], unit)
    spans.append(unit_span(name, unit, state, began, now))
  return spans


def unit_span(
  lane: str, unit: Unit, state: State, start: float, end: float
) -> Span:
  """The timeline entry of a unit; simulated and real ones are alike."""
  label = f"{unit.start}:{unit.stop}"
  if unit.last:
    label += f"/{unit.first}:{unit.last}"
  args = {
    "step": unit.step,
    "group": unit.start // state.work.group_size,
    "unit": label,
    "size": unit.size,
    "version": unit.step,
    "update": unit.update,
  }
  return Span(unit.kind.value, lane, start, end, args)
