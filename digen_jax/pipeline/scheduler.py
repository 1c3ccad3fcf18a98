"""The scheduler: a pure state machine that hands out units.

No JAX, no threads, no clock. Two drivers run it: `simulate.py` with a virtual
clock, `execute.py` with real lanes. Both do the same three calls:

  unit = next_unit(state, lane)          what the lane should do now, or None
  state = on_start(state, lane, unit)    it has begun
  state = on_done(state, lane, unit, …)  it has ended

Which technique does what:
  sequential   Train units wait for the last reward of the step.
  GAP          `Workload.gap`: they wait for the rewards of their own group.
  TSP          `Workload.pack`: a Train unit folds several denoising steps.
Assisted generation and training, and staleness, are further capabilities of
lanes and a later horizon of steps; `Lane.kinds` and `State.step` are where
they go.

Invariants (tests/test_scheduler.py): every unit is started exactly once; no
unit starts before what it needs is done; a lane that is given back its work
(`on_lost`) loses nothing.
"""

import dataclasses
from collections.abc import Iterable

from digen_jax.pipeline.units import Kind, Unit, Workload, needs, step_units

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
    kinds: what it can do.
    slots: how many units it may have in hand at once; 1 but for host threads.
  """

  name: str
  kinds: frozenset[Kind]
  slots: int = 1


@dataclasses.dataclass(frozen=True)
class State:
  """Where a global step stands.

  Attributes:
    work: what a step consists of.
    step: the global step under way.
    pending: units not started, by kind, in canonical order.
    running: (lane name, unit) under way.
    done: units that have ended, or that nobody needs to run (`skipped`).
    skipped: Train units without a gradient: every group in them is dead.
    dead: groups whose rewards are all equal; they carry no gradient.
  """

  work: Workload
  step: int
  pending: dict[Kind, tuple[Unit, ...]]
  running: frozenset[tuple[str, Unit]] = frozenset()
  done: frozenset[Unit] = frozenset()
  skipped: frozenset[Unit] = frozenset()
  dead: frozenset[int] = frozenset()


def start_step(work: Workload, step: int) -> State:
  """The state at the beginning of a global step, its version published."""
  units = step_units(work, step)
  return State(
    work,
    step,
    {kind: tuple(u for u in units if u.kind == kind) for kind in Kind},
  )


def finished(state: State) -> bool:
  """Whether every unit of the step is done."""
  return not state.running and not any(state.pending.values())


def next_unit(state: State, lane: Lane) -> Unit | None:
  """The unit that `lane` should start now; None leaves it idle."""
  if sum(name == lane.name for name, _ in state.running) >= lane.slots:
    return None
  for kind in PRIORITY:
    if kind not in lane.kinds:
      continue
    for unit in state.pending[kind]:
      if needs(unit, state.work) <= state.done:
        return unit
  return None


def on_start(state: State, lane: Lane, unit: Unit) -> State:
  """`lane` has begun `unit`."""
  pending = dict(state.pending)
  pending[unit.kind] = tuple(u for u in pending[unit.kind] if u != unit)
  return dataclasses.replace(
    state, pending=pending, running=state.running | {(lane.name, unit)}
  )


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
  state = dataclasses.replace(
    state,
    running=state.running - {(lane.name, unit)},
    done=state.done | {unit},
    dead=state.dead | frozenset(dead),
  )
  return _skip_dead(state) if dead else state


def on_lost(state: State, lane: Lane) -> State:
  """`lane` is gone: what it had in hand goes back, in canonical order."""
  lost = {unit for name, unit in state.running if name == lane.name}
  order = {unit: i for i, unit in enumerate(step_units(state.work, state.step))}
  pending = {
    kind: tuple(
      sorted(
        (*units, *(u for u in lost if u.kind == kind)), key=order.__getitem__
      )
    )
    for kind, units in state.pending.items()
  }
  running = frozenset(r for r in state.running if r[0] != lane.name)
  return dataclasses.replace(state, pending=pending, running=running)


def _skip_dead(state: State) -> State:
  skipped = frozenset(
    unit
    for unit in state.pending[Kind.TRAIN]
    if all(group in state.dead for group in state.work.groups_of(unit))
  )
  pending = dict(state.pending)
  pending[Kind.TRAIN] = tuple(
    u for u in pending[Kind.TRAIN] if u not in skipped
  )
  return dataclasses.replace(
    state,
    pending=pending,
    done=state.done | skipped,
    skipped=state.skipped | skipped,
  )
