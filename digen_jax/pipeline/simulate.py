"""Drives the scheduler with a virtual clock and a table of costs."""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from digen_jax.pipeline.scheduler import (
  Lane,
  State,
  finished,
  needs_switch,
  next_step,
  next_unit,
  on_done,
  on_start,
  switch_to,
  version_of,
)
from digen_jax.pipeline.units import Kind, Unit, plan
from digen_jax.timeline import Span

Cost = Callable[[str, Unit], float]
# Seconds that units under way still need, as far as is known.
Left = Mapping[tuple[str, Unit], float]
# Whether an idle lane should take a unit that is not its own work.
Assist = Callable[[State, Lane, Unit, Left], bool]


ROUNDING = 1e-9


def always(state: State, lane: Lane, unit: Unit, left: Left) -> bool:
  """Assists whenever there is something to do."""
  del state, lane, unit, left
  return True


def never(state: State, lane: Lane, unit: Unit, left: Left) -> bool:
  """Every lane keeps to its own work."""
  del state, lane, unit, left
  return False


def leaves(
  state: State,
  lane: Lane,
  unit: Unit,
  lanes: Sequence[Lane],
  cost: Cost,
  left: Left,
) -> bool:
  """Whether `lane` would hold up the step by a Generate unit of its own work.

  It would if, by the time it is through with one, faster lanes have done all
  that are left. Then it is free for other things.

  Args:
    state: where the run stands.
    lane: idle, and asks.
    unit: what it could take.
    lanes: all that are there.
    cost: expected seconds of a unit on a lane.
    left: seconds that units under way still need.
  """
  if unit.kind != Kind.GENERATE:
    return False
  through = cost(lane.name, unit)
  count = (state.now.ready & plan(state.work).kinds[unit.kind]).bit_count()
  for other in lanes:
    if unit.kind not in other.kinds or other.name == lane.name:
      continue
    seconds = cost(other.name, unit)
    if 0.0 < seconds < through:
      free = sum(s for (name, _), s in left.items() if name == other.name)
      # Strictly sooner, whichever way it is rounded.
      count -= max(math.ceil((through - free) / seconds - ROUNDING) - 1, 0)
  return count <= 0


def simulate(
  state: State,
  lanes: Sequence[Lane],
  cost: Cost,
  start: float = 0.0,
  *,
  last: int | None = None,
  assist: Assist = always,
  left: Left | None = None,
) -> list[Span]:
  """Runs global steps to their end in virtual time.

  Args:
    state: where the run stands.
    lanes: who executes.
    cost: seconds of a unit on a lane, by lane name.
    start: virtual time at which it begins, seconds.
    last: the last global step to run; by default the one under way.
    assist: see `search.Search`.
    left: seconds that the units already running still need; their whole cost
      where it is not known.

  Returns:
    One span per unit, in order of completion, as `Executor.run` returns
    them. The steps take `max(span.end) - start` seconds.

  Raises:
    RuntimeError: units are left that no lane can do.
  """
  last = state.step if last is None else last
  clock = _Clock(lanes, cost, start)
  for lane, unit in sorted(state.running, key=_order):
    clock.resume(state, clock.lanes[lane], unit, (left or {}).get((lane, unit)))
  while True:
    while not finished(state):
      state = clock.hand_out(state, assist)
      state = clock.wait(state)
    if state.step >= last:
      return clock.spans
    state = next_step(state, last=last)


def _order(running: tuple[str, Unit]) -> tuple[int, ...]:
  unit = running[1]
  return unit.step, unit.start, unit.first


class _Clock:
  """Virtual time, and what ends when."""

  def __init__(self, lanes: Sequence[Lane], cost: Cost, start: float):
    self.lanes = {lane.name: lane for lane in lanes}
    self.cost, self.now = cost, start
    self.spans: list[Span] = []
    self._events: list[tuple[float, int, Lane, Unit, Span]] = []
    self._serial = 0

  def resume(
    self, state: State, lane: Lane, unit: Unit, left: float | None
  ) -> None:
    """A unit is already under way."""
    if left is None:
      left = self.cost(lane.name, unit)
    self._push(lane, unit, state, self.now, self.now + max(left, 0.0))

  def begin(self, state: State, lane: Lane, unit: Unit) -> None:
    """A unit begins, after a switch if it needs one."""
    start = self.now
    if needs_switch(state, lane, unit):
      switch = switch_to(unit)
      start += self.cost(lane.name, switch)
      self.spans.append(unit_span(lane.name, switch, state, self.now, start))
    self._push(lane, unit, state, start, start + self.cost(lane.name, unit))

  def _push(
    self, lane: Lane, unit: Unit, state: State, start: float, end: float
  ) -> None:
    span = unit_span(lane.name, unit, state, start, end)
    heapq.heappush(self._events, (end, self._serial, lane, unit, span))
    self._serial += 1

  def hand_out(self, state: State, assist: Assist) -> State:
    """Every lane takes what it can."""
    left = {(e[2].name, e[3]): e[0] - self.now for e in self._events}

    def worth(state: State, lane: Lane, unit: Unit) -> bool:
      return assist(state, lane, unit, left)

    lanes = list(self.lanes.values())

    def leave(state: State, lane: Lane, unit: Unit) -> bool:
      return leaves(state, lane, unit, lanes, self.cost, left)

    for lane in lanes:
      while (unit := next_unit(state, lane, worth, leave)) is not None:
        left[lane.name, unit] = self.cost(lane.name, unit)
        self.begin(state, lane, unit)
        state = on_start(state, lane, unit)
    return state

  def wait(self, state: State) -> State:
    """Until the next unit ends."""
    if not self._events:
      raise RuntimeError(f"{state.left} units are left that no lane can do")
    self.now, _, lane, unit, span = heapq.heappop(self._events)
    self.spans.append(span)
    return on_done(state, lane, unit)


def unit_span(
  lane: str, unit: Unit, state: State, start: float, end: float
) -> Span:
  """The timeline entry of a unit that starts in `state`.

  Simulated and real ones are alike.
  """
  label = f"{unit.start}:{unit.stop}"
  if unit.last:
    label += f"/{unit.first}:{unit.last}"
  args: dict[str, Any] = {
    "step": unit.step,
    "group": unit.start // state.work.group_size,
    "unit": label,
    "size": unit.size,
    "version": version_of(state, unit),
    "update": unit.update,
  }
  return Span(unit.kind.value, lane, start, end, args)
