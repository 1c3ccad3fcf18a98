"""The scheduler: a pure state machine that hands out units.

No JAX, no threads, no clock. Two drivers run it: `simulate.py` with a virtual
clock, `execute.py` with real lanes. Both make the same calls:

  unit = next_unit(state, lane)          what the lane should do now, or None
  state = on_start(state, lane, unit)    it has begun
  state = on_done(state, lane, unit, …)  it has ended
  state = next_step(state)               the step is over

Which technique does what:
  sequential   Train units wait for the last reward of the step.
  GAP          `Workload.gap`: they wait for the rewards of their own group.
  TSP          `Workload.pack`: a Train unit folds several denoising steps.
  TAG, RAT     `Lane.assists`: what a lane does when its own work has run out.
               (Or is left to faster lanes: `leave` of `next_unit`.)
  BTS          `assist` of `next_unit`: whether it should (`search.py`).
  TCSS         `Workload.stale`: units of the next step that may start early.

Invariants (tests/test_scheduler.py): every unit is started exactly once; no
unit starts before what it needs is done; what runs with a policy version runs
with the one it should; a lane that is given back its work (`on_lost`) loses
nothing.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from digen_jax.pipeline.units import (
  Kind,
  Unit,
  Workload,
  bits,
  numbers,
  plan,
  same,
  step_units,
)

# What a lane that can do several kinds does first: finish the step (its result
# is what others wait for), then feed the others, then train.
PRIORITY = (
  Kind.PUBLISH,
  Kind.UPDATE,
  Kind.SCORE,
  Kind.GENERATE,
  Kind.TRAIN,
)


@dataclasses.dataclass(frozen=True)
class Lane:
  """Something that executes units one after another.

  Attributes:
    name: e.g. "rollout".
    kinds: its own work.
    slots: how many units it may have in hand at once; 1 but for host threads.
    assists: what else it can do when its own work has run out: GENERATE of a
      trainer lane is TAG, TRAIN of a rollout lane is RAT.
  """

  name: str
  kinds: frozenset[Kind]
  slots: int = 1
  assists: frozenset[Kind] = frozenset()


class Progress(NamedTuple):
  """Where one global step stands, as sets of bits (see `units.Plan`).

  Attributes:
    step: which one.
    ready: units that can start.
    started: units that have.
    done: units that have ended, or that nobody needs to run (`skipped`).
    skipped: Train units without a gradient: every group in them is dead.
    dead: groups whose rewards are all equal; they carry no gradient.
  """

  step: int
  ready: int
  started: int = 0
  done: int = 0
  skipped: int = 0
  dead: frozenset[int] = frozenset()


class State(NamedTuple):
  """Where a run stands.

  Attributes:
    work: what a step consists of.
    now: the global step under way.
    ahead: the step after it, of which stale units may run; None after the
      last one, or without TCSS.
    running: (lane name, unit) under way.
    assisting: (lane name, update) of the lanes whose last unit was not their
      own work: they hold what more of that update needs (weights in another
      layout, or after the updates before) and need no switch.
  """

  work: Workload
  now: Progress
  ahead: Progress | None = None
  running: frozenset[tuple[str, Unit]] = frozenset()
  assisting: frozenset[tuple[str, int]] = frozenset()

  @property
  def step(self) -> int:
    """The global step under way; also the newest policy version in use."""
    return self.now.step

  def units(self, progress: Progress, members: int) -> frozenset[Unit]:
    """The units of a step that a set of bits stands for."""
    units = step_units(self.work, progress.step)
    return frozenset(units[i] for i in bits(members))

  @property
  def skipped(self) -> frozenset[Unit]:
    """Train units of this step that carry no gradient."""
    return self.units(self.now, self.now.skipped)

  @property
  def left(self) -> int:
    """Number of units of this step that nobody has started."""
    count = len(step_units(self.work, 0))
    return count - (self.now.started | self.now.skipped).bit_count()


def start_step(work: Workload, step: int, *, last: int | None = None) -> State:
  """The state at the beginning of a global step, its version published.

  Args:
    work: what a step consists of.
    step: the global step.
    last: the last global step of the run, which no stale unit goes beyond;
      None if this is it.
  """
  work = same(work)
  more = work.stale > 0 and last is not None and step < last
  ahead = _fresh(work, step + 1) if more else None
  return State(work, _fresh(work, step), ahead)


def next_step(state: State, *, last: int | None = None) -> State:
  """The state after the step is finished; stale units go on running."""
  fresh = start_step(state.work, state.step + 1, last=last)
  if state.ahead is None:
    return fresh
  return fresh._replace(now=state.ahead, running=state.running)


def _fresh(work: Workload, step: int) -> Progress:
  free = sum(gate.members for gate in plan(work).gates if not gate.needs)
  return Progress(step, ready=free)


def finished(state: State) -> bool:
  """Whether every unit of the step is done."""
  return state.now.done.bit_count() == len(step_units(state.work, 0))


def next_unit(
  state: State,
  lane: Lane,
  assist: Callable[[State, Lane, Unit], bool] | None = None,
  leave: Callable[[State, Lane, Unit], bool] | None = None,
) -> Unit | None:
  """The unit that `lane` should start now; None leaves it idle.

  Args:
    state: where the run stands.
    lane: who asks.
    assist: asked before a lane takes what is not its own work; by default it
      always does.
    leave: asked whether a lane should leave its own work to faster ones; by
      default it never does.
  """
  if [name for name, _ in state.running].count(lane.name) >= lane.slots:
    return None
  left = False
  for kind in PRIORITY:
    if kind in lane.kinds and (unit := _first(state, state.now, kind)):
      if leave is None or not leave(state, lane, unit):
        return unit
      left = True
  unit = _assistance(state, lane)
  if unit and (assist is None or assist(state, lane, unit)):
    return unit
  return _stale(state, lane, left)


def _first(state: State, progress: Progress, kind: Kind) -> Unit | None:
  members = progress.ready & plan(state.work).kinds[kind]
  if not members:
    return None
  lowest = (members & -members).bit_length() - 1
  if kind == Kind.TRAIN and state.work.held:
    # Units between the first that is not done and this one.
    trains = plan(state.work).kinds[kind]
    missing = trains & ~progress.done
    before = (1 << lowest) - (missing & -missing)
    if (trains & before).bit_count() > state.work.held:
      return None
  return step_units(state.work, progress.step)[lowest]


def _assistance(state: State, lane: Lane) -> Unit | None:
  """What an idle lane could do for others.

  Generating needs the version of the step, which the trainer has until its
  first update begins. Train units of a later update need weights that only the
  trainer has; it can lend them, as they stand still while such units are ready
  or under way: the update before is done, and the next waits for the units.
  """
  updating = state.now.started & plan(state.work).kinds[Kind.UPDATE]
  for kind in (Kind.TRAIN,) if updating else (Kind.GENERATE, Kind.TRAIN):
    if kind in lane.assists and (unit := _first(state, state.now, kind)):
      return unit
  return None


def _stale(state: State, lane: Lane, left: bool) -> Unit | None:
  """TCSS: a unit of the next step, with the present version.

  Args:
    state: where the run stands.
    lane: who asks.
    left: whether it leaves what is to generate in this step to others.
  """
  if state.ahead is None:
    return None
  kinds = plan(state.work).kinds
  # After all of this step, which will ask for the same slots.
  begun = not kinds[Kind.SCORE] & ~state.now.started
  if (
    Kind.SCORE in lane.kinds
    and begun
    and (unit := _first(state, state.ahead, Kind.SCORE))
  ):
    return unit
  if Kind.GENERATE not in lane.kinds:
    return None
  if state.now.ready & kinds[Kind.GENERATE] and not left:
    return None
  if (
    state.ahead.started & kinds[Kind.GENERATE]
  ).bit_count() >= state.work.stale:
    return None
  return _first(state, state.ahead, Kind.GENERATE)


def needs_switch(state: State, lane: Lane, unit: Unit) -> bool:
  """Whether `lane` must first fetch what `unit` needs and its own work not."""
  held = (lane.name, unit.update) in state.assisting
  return unit.kind not in lane.kinds and not held


def switch_to(unit: Unit) -> Unit:
  """What a lane does before `unit` where it `needs_switch`."""
  return Unit(Kind.SWITCH, unit.step, update=unit.update)


def version_of(state: State, unit: Unit) -> int:
  """The policy version that a unit which starts now runs with."""
  return min(unit.step, state.step)


def on_start(state: State, lane: Lane, unit: Unit) -> State:
  """`lane` has begun `unit`."""
  progress, member = _find(state, unit)
  if not progress.ready & member:
    raise ValueError(f"{unit} is not ready to run")
  progress = progress._replace(
    ready=progress.ready ^ member,
    started=progress.started | member,
  )
  assisting = _without(state.assisting, lane)
  if unit.kind not in lane.kinds:
    assisting |= {(lane.name, unit.update)}
  running = state.running | {(lane.name, unit)}
  return _with(state, progress, running, assisting=assisting)


def on_done(
  state: State, lane: Lane, unit: Unit, dead: Iterable[int] = ()
) -> State:
  """`unit` has ended on `lane`.

  Args:
    state: the state it ran in.
    lane: who ran it.
    unit: what ended.
    dead: groups found to carry no gradient (all rewards equal). Train units
      whose groups are all dead count as done without being run.
  """
  if (lane.name, unit) not in state.running:
    raise ValueError(f"{unit} is not running on lane {lane.name!r}")
  progress, member = _find(state, unit)
  progress = _ended(state.work, progress, member)
  if dead:
    progress = _skip_dead(state.work, progress, frozenset(dead))
  return _with(state, progress, state.running - {(lane.name, unit)})


def on_lost(state: State, lane: Lane, lost: Unit | None = None) -> State:
  """`lane` is gone: what it had in hand can start again elsewhere.

  Args:
    state: where the run stands.
    lane: which lane.
    lost: only this unit of it has failed; None means all that it had.
  """
  gone = frozenset(
    (name, unit)
    for name, unit in state.running
    if name == lane.name and lost in (None, unit)
  )
  for _, unit in gone:
    progress, member = _find(state, unit)
    progress = progress._replace(
      ready=progress.ready | member,
      started=progress.started & ~member,
    )
    state = _with(state, progress, state.running)
  return state._replace(
    running=state.running - gone,
    assisting=_without(state.assisting, lane),
  )


def _without(
  assisting: frozenset[tuple[str, int]], lane: Lane
) -> frozenset[tuple[str, int]]:
  if not assisting:
    return assisting
  return frozenset(held for held in assisting if held[0] != lane.name)


def _find(state: State, unit: Unit) -> tuple[Progress, int]:
  """The progress of a unit's step, and the unit as a set."""
  number = numbers(state.work, unit.step)[unit]
  progress = state.now if unit.step == state.step else state.ahead
  if progress is None or progress.step != unit.step:
    raise ValueError(f"{unit} is of no step under way")
  return progress, 1 << number


def _with(
  state: State,
  progress: Progress,
  running: frozenset[tuple[str, Unit]],
  **changes: Any,
) -> State:
  changes["now" if progress.step == state.step else "ahead"] = progress
  return state._replace(running=running, **changes)


def _ended(work: Workload, progress: Progress, ended: int) -> Progress:
  """Units are done; those that waited for nothing else become ready."""
  ready, done, step = progress.ready, progress.done | ended, plan(work)
  for i in bits(ended):
    for gate in step.opens[i]:
      if not gate.needs & ~done:
        ready |= gate.members & ~progress.started & ~done
  return progress._replace(ready=ready, done=done)


def _skip_dead(
  work: Workload, progress: Progress, dead: frozenset[int]
) -> Progress:
  dead = progress.dead | dead
  trains = plan(work).trains
  alive = 0
  for group in range(work.groups):
    if group not in dead:
      alive |= trains[group]
  touched = 0
  for group in dead:
    touched |= trains[group]
  skipped = touched & ~alive & ~progress.started & ~progress.done
  progress = progress._replace(
    dead=dead,
    ready=progress.ready & ~skipped,
    skipped=progress.skipped | skipped,
  )
  return _ended(work, progress, skipped)
