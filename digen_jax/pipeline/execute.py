"""Drives the scheduler with real lanes.

One thread dispatches everything: free-running dispatch threads can deadlock
XLA's collectives. Work overlaps because dispatch is asynchronous; the loop
waits for what has finished, tells the scheduler, and hands out what became
ready. Host work (rewards) runs in threads of its own, behind the same handle.
Lanes of this process are polled; where every unit under way has a future (lanes
of other processes) the loop sleeps until one of them ends, since its process
may share a core with a lane.
"""

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from digen_jax.errors import LaneLost
from digen_jax.pipeline.costs import Costs
from digen_jax.pipeline.scheduler import (
  Lane,
  State,
  finished,
  needs_switch,
  next_unit,
  on_done,
  on_lost,
  on_start,
  switch_to,
)
from digen_jax.pipeline.simulate import Assist, Left, always, leaves, unit_span
from digen_jax.pipeline.units import Kind, Unit
from digen_jax.timeline import Span

POLL_SECONDS = 5e-4  # well under the shortest unit; leaves the cores to work
WAIT_SECONDS = 0.1  # for a future, before everything is looked at again
START_SECONDS = 1800.0  # that a lane may need to start anew
LATE = 2.0  # times its cost: a unit of which nobody knows when it will end
ANEW_EVERY = 16  # steps, after which all lanes are measured again


class Handle(Protocol):
  """Work under way on a lane.

  Attributes:
    future: done when `ready` is true; None where that must be asked.
  """

  future: concurrent.futures.Future | None

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
# Starts a lane anew that has died; None where that cannot be.
Revive = Callable[[str], Handle | None]

_log = logging.getLogger(__name__)


class UnitError(RuntimeError):
  """A unit failed; the message names it and its lane."""

  def __init__(self, lane: str, unit: Unit, cause: BaseException):
    where = f"samples {unit.start}:{unit.stop} of " if unit.stop else ""
    super().__init__(
      f"{unit.kind.value} unit of {where}step {unit.step} failed on lane "
      f"{lane!r}: {cause}"
    )


@dataclasses.dataclass(eq=False)
class _Running:
  """A unit under way; `then` follows on its lane at once (after a switch).

  Units that outlive a step are not `timed`: nobody looks while the caller
  evaluates and saves. Nor are those that a lane has to compile for.
  """

  lane: Lane
  unit: Unit
  handle: Handle
  span: Span
  then: Unit | None = None
  timed: bool = True

  @property
  def scheduled(self) -> Unit:
    """What the scheduler knows the lane to be busy with."""
    return self.then or self.unit


class Executor:
  """Runs global steps on real lanes; stale units live on between them."""

  def __init__(
    self,
    lanes: Sequence[Lane],
    starts: Mapping[Kind, Start],
    costs: Costs,
    *,
    assist: Assist = always,
    retries: int = 0,
    restarts: int = 0,
    revive: Revive = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Nothing runs yet.

    Args:
      lanes: who executes.
      starts: for every kind, the function that begins a unit on a lane and
        returns at once with its handle.
      costs: told the seconds of every unit, and asked for what is left.
      assist: whether an idle lane should take what is not its own work.
      retries: how often a unit that fails is run again in a step, in all.
      restarts: how often a lane that has died is started anew, in all.
      revive: what does so; its handle is ready when the lane is.
      clock: seconds, monotonic.
    """
    self._lanes, self._starts, self._costs = tuple(lanes), starts, costs
    self._assist, self._clock = assist, clock
    self._retries, self._revive = retries, revive
    self.restarts = restarts  # that are left
    self._running: list[_Running] = []
    # Lanes that are being started anew, and until when they must be there.
    self._away: dict[str, tuple[Handle, float]] = {}
    self._cold: set[tuple[str, Kind]] = set()  # what they have not compiled
    self._spans: list[Span] = []

  def run(self, state: State) -> tuple[list[Span], State]:
    """Executes the step under way to its end.

    Args:
      state: `scheduler.start_step(...)`, or `next_step` of what this returned.

    Returns:
      Spans of the units that have ended since the last call, in order of
      completion, and the state at the end of the step.

    Raises:
      UnitError: a unit raised. Whatever still runs is waited for first, so
        that nothing is in flight when the caller writes its checkpoint.
    """
    self._spans, self._left_retries = [], self._retries
    for item in self._running:
      item.timed = False
    for lane in self._away:  # lost between the steps
      state = on_lost(state, self._lane(lane))
    while not finished(state):
      progressed = False
      # First: who has the next version must not be asked for the one before.
      state = self._welcome(state)
      for item in list(self._running):
        # Another unit may have told that its lane is lost.
        if item not in self._running or not item.handle.ready():
          continue
        self._running.remove(item)
        try:
          state = self._end(state, item)
        except Exception as cause:
          state = self._failed(state, item.lane, item.scheduled, cause)
        progressed = True
      # At the end of a step nothing is begun: the next version is there.
      for lane in () if finished(state) else self._lanes:
        while (unit := self._next(state, lane)) is not None:
          switch = needs_switch(state, lane, unit)
          before, state = state, on_start(state, lane, unit)
          try:
            if switch:
              self._begin(before, lane, switch_to(unit), unit)
            else:
              self._begin(before, lane, unit)
          except Exception as cause:
            state = self._failed(state, lane, unit, cause)
          progressed = True
      if not progressed:
        if not self._running and not self._away:
          raise RuntimeError(f"{state.left} units are left that no lane can do")
        self._wait()
    return self._spans, state

  def restart(self, lost: LaneLost) -> Handle | None:
    """Has a lane started anew that has died.

    It gets no units until it is there; others do what they can meanwhile.

    Returns:
      What is ready when the lane is; None where it cannot be started anew.
    """
    if self.restarts <= 0 or (handle := self._revive(lost.lane)) is None:
      return None
    self.restarts -= 1
    self._running = [i for i in self._running if i.lane.name != lost.lane]
    self._away[lost.lane] = handle, self._clock() + START_SECONDS
    _log.warning(
      "the process of lane %r has died and is started anew (%d restarts left)",
      lost.lane,
      self.restarts,
    )
    return handle

  def left(self) -> Left:
    """Seconds that what is under way should still need."""
    now = self._clock()
    return {
      (i.lane.name, i.scheduled): max(
        self._expected(i) - (now - i.span.start), 0.0
      )
      for i in self._running
    }

  def _expected(self, item: _Running) -> float:
    """Seconds that it should take, with what follows at once."""
    units = (item.unit, item.then) if item.then else (item.unit,)
    return sum(self._costs(item.lane.name, unit) for unit in units)

  def unfinished(self) -> list[Span]:
    """Spans of what is under way, up to now."""
    now = self._clock()
    return [dataclasses.replace(i.span, end=now) for i in self._running]

  def _begin(
    self, state: State, lane: Lane, unit: Unit, then: Unit | None = None
  ) -> None:
    now = self._clock()
    span = unit_span(lane.name, unit, state, now, now)
    handle = self._starts[unit.kind](lane.name, unit)
    timed = (lane.name, unit.kind) not in self._cold
    self._cold.discard((lane.name, unit.kind))
    self._running.append(_Running(lane, unit, handle, span, then, timed))

  def _wait(self) -> None:
    """Until something may have ended."""
    handles = [item.handle for item in self._running]
    handles += [handle for handle, _ in self._away.values()]
    futures = [handle.future for handle in handles]
    if None in futures:
      time.sleep(POLL_SECONDS)
    else:
      concurrent.futures.wait(
        futures, WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED
      )

  def _end(self, state: State, item: _Running) -> State:
    """Takes a unit in. What that takes is no span, but a lane waits for it."""
    now, lane = self._clock(), item.lane
    dead = item.handle.finish()
    self._spans.append(dataclasses.replace(item.span, end=now))
    if item.timed:
      seconds = self._clock() - item.span.start
      self._costs.observe(lane.name, item.unit, seconds)
    if item.then is None:
      return on_done(state, lane, item.unit, dead)
    self._begin(state, lane, item.then)
    return state

  def _next(self, state: State, lane: Lane) -> Unit | None:
    """What a lane should do now; nothing while it is started anew."""
    if lane.name in self._away:
      return None
    return next_unit(state, lane, self._worth, self._leaves)

  def _worth(self, state: State, lane: Lane, unit: Unit) -> bool:
    if self._away:  # a search would count on the lane that is missing
      return not self._leaves(state, lane, unit)
    return self._assist(state, lane, unit, self.left())

  def _leaves(self, state: State, lane: Lane, unit: Unit) -> bool:
    if state.step % ANEW_EVERY == 0:  # else it might never be seen to be fast
      return False
    now = self._clock()
    late = {
      i.lane.name
      for i in self._running
      if not i.timed or now - i.span.start > LATE * self._expected(i)
    }
    there = [i for i in self._lanes if i.name not in late | set(self._away)]
    return leaves(state, lane, unit, there, self._costs, self.left())

  def _welcome(self, state: State) -> State:
    """Lanes that were started anew are there, or have failed to start."""
    for name, (handle, deadline) in list(self._away.items()):
      if not handle.ready() and self._clock() < deadline:
        continue
      del self._away[name]
      lane = self._lane(name)
      try:
        if not handle.ready():
          minutes = START_SECONDS / 60
          raise TimeoutError(f"it did not start within {minutes:.0f} minutes")
        handle.finish()
        self._cold |= {(name, kind) for kind in lane.kinds | lane.assists}
      except Exception as cause:
        unit = Unit(Kind.SWITCH, state.step)
        state = self._failed(state, lane, unit, cause)
    return state

  def _lane(self, name: str) -> Lane:
    return next(lane for lane in self._lanes if lane.name == name)

  def _failed(
    self, state: State, lane: Lane, unit: Unit, cause: Exception
  ) -> State:
    """Puts the unit back, or waits for the others and names it."""
    if isinstance(cause, LaneLost):
      if self.restart(cause):
        return on_lost(on_lost(state, lane, unit), self._lane(cause.lane))
    # Updates change what they start from; a switch is a lane that did not start.
    elif self._left_retries > 0 and unit.kind not in (
      Kind.UPDATE,
      Kind.PUBLISH,
      Kind.SWITCH,
    ):
      self._left_retries -= 1
      return on_lost(state, lane, unit)
    while not all(item.handle.ready() for item in self._running):
      time.sleep(POLL_SECONDS)
    self._running.clear()
    raise UnitError(lane.name, unit, cause) from cause
