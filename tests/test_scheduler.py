"""The scheduler as a state machine, in virtual time."""

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from digen_jax.pipeline.scheduler import (
  Lane,
  finished,
  next_unit,
  on_done,
  on_lost,
  on_start,
  start_step,
)
from digen_jax.pipeline.simulate import simulate
from digen_jax.pipeline.units import Kind, Unit, Workload, step_units
from tests.unit_order import must_precede

ROLLOUT = Lane("rollout", frozenset({Kind.GENERATE}))
TRAINER = Lane("trainer", frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH}))
HOST = Lane("host", frozenset({Kind.SCORE}), slots=4)
TWO = (ROLLOUT, TRAINER, HOST)
ONE = (Lane("colocated", frozenset(Kind) - {Kind.SCORE}), HOST)
COST = {
  Kind.GENERATE: 4.0,
  Kind.SCORE: 0.0,
  Kind.TRAIN: 3.0,
  Kind.UPDATE: 1.0,
  Kind.PUBLISH: 1.0,
}


def cost(lane, unit):
  del lane
  return COST[unit.kind] * (unit.last - unit.first if unit.last else 1)


def seconds(work, lanes):
  return max(span.end for span in simulate(start_step(work, 0), lanes, cost))


def test_units_cover_every_sample_and_step_once():
  work = Workload(
    groups=4, group_size=6, window=5, updates=2, generate_size=3, pack=2
  )
  units = step_units(work, 7)
  trained = [
    (i, t)
    for u in units
    if u.kind == Kind.TRAIN
    for i in range(u.start, u.stop)
    for t in range(u.first, u.last)
  ]
  assert sorted(trained) == [(i, t) for i in range(24) for t in range(5)]
  assert [u.samples for u in units if u.kind == Kind.GENERATE] == [3] * 8
  assert {u.update for u in units if u.kind == Kind.TRAIN and u.start < 12} == {
    0
  }
  assert all(u.step == 7 for u in units)


def test_sequential_step_is_the_sum_of_its_phases():
  work = Workload(groups=3, group_size=2, window=2)
  # 3 x 4 generating, then 6 x 3 training, then update and publish.
  assert seconds(work, TWO) == 12 + 18 + 2


def test_gap_trains_behind_the_first_group():
  work = Workload(groups=3, group_size=2, window=2, gap=True)
  # The trainer starts after one group and is never short of work again.
  assert seconds(work, TWO) == 4 + 18 + 2


def test_gap_is_bound_by_generation_when_that_is_longer():
  work = Workload(groups=3, group_size=2, window=1, gap=True)
  assert seconds(work, TWO) == 12 + 3 + 2


def test_colocated_does_everything_in_turn():
  work = Workload(groups=3, group_size=2, window=2, gap=True)
  assert seconds(work, ONE) == 12 + 18 + 2


def test_global_scope_waits_for_every_reward():
  work = Workload(groups=3, group_size=2, window=2, gap=True, scope="global")
  assert seconds(work, TWO) == 12 + 18 + 2


def test_dead_groups_are_not_trained():
  work = Workload(groups=2, group_size=2, window=1, gap=True)
  state = start_step(work, 0)
  ran = []
  while not finished(state):
    for lane in TWO:
      if (unit := next_unit(state, lane)) is not None:
        state = on_start(state, lane, unit)
        dead = {0} if unit.kind == Kind.SCORE and unit.start == 0 else ()
        state = on_done(state, lane, unit, dead)
        ran.append(unit)
  assert [u.start for u in ran if u.kind == Kind.TRAIN] == [2]
  assert [u.start for u in state.skipped] == [0]


def test_updates_keep_their_order_where_all_groups_of_one_are_dead():
  work = Workload(groups=4, group_size=2, window=1, updates=2, gap=True)
  generates = lambda unit: unit.kind in (Kind.GENERATE, Kind.SCORE)  # noqa: E731
  state = start_step(work, 0)
  for unit in filter(generates, step_units(work, 0)):
    lane = HOST if unit.kind == Kind.SCORE else ROLLOUT
    state = on_start(state, lane, unit)
    state = on_done(state, lane, unit, {2, 3} if unit.start == 4 else ())
  ran = []
  while not finished(state):
    unit = next_unit(state, TRAINER)
    state = on_done(on_start(state, TRAINER, unit), TRAINER, unit)
    ran.append((unit.kind, unit.update))
  train, update = (Kind.TRAIN, 0), Kind.UPDATE
  assert ran[:4] == [train, train, (update, 0), (update, 1)]


@pytest.mark.parametrize(("held", "ahead"), [(0, 5), (1, 1), (3, 3)])
def test_gradients_that_wait_for_others_are_limited(held, ahead):
  work = Workload(groups=6, group_size=2, window=1, gap=True, held=held)
  state = start_step(work, 0)
  for unit in step_units(work, 0):
    late = unit.kind == Kind.SCORE and unit.start == 0
    if unit.kind in (Kind.GENERATE, Kind.SCORE):
      lane = HOST if unit.kind == Kind.SCORE else ROLLOUT
      state = on_start(state, lane, unit)
      state = state if late else on_done(state, lane, unit)
  ran = []
  while unit := next_unit(state, TRAINER):
    state = on_done(on_start(state, TRAINER, unit), TRAINER, unit)
    ran.append(unit.start)
  assert ran == [2, 4, 6, 8, 10][:ahead]
  state = on_done(state, HOST, Unit(Kind.SCORE, 0, 0, 2))
  while unit := next_unit(state, TRAINER):
    state = on_done(on_start(state, TRAINER, unit), TRAINER, unit)
    ran.append(unit.start)
  assert finished(state)
  assert sorted(ran[:6]) == [0, 2, 4, 6, 8, 10]


def test_no_lane_for_a_kind_is_an_error():
  with pytest.raises(RuntimeError, match="no lane can do"):
    simulate(start_step(Workload(2, 2, 1), 0), (ROLLOUT, HOST), cost)


def test_a_unit_that_is_not_running_cannot_end():
  state = start_step(Workload(2, 2, 1), 0)
  with pytest.raises(ValueError, match="not running"):
    on_done(state, ROLLOUT, step_units(state.work, 0)[0])


workloads = st.builds(
  lambda groups, size, window, pack, updates, gap, scope, part, held: Workload(
    groups=groups * updates,
    group_size=size * part,
    window=window,
    updates=updates,
    generate_size=size,
    train_size=size * part,
    pack=min(pack, window),
    scope=scope,
    gap=gap,
    held=held,
  ),
  st.integers(1, 4),
  st.integers(1, 3),
  st.integers(1, 4),
  st.integers(1, 4),
  st.integers(1, 3),
  st.booleans(),
  st.sampled_from(["group", "global"]),
  st.integers(1, 3),
  st.sampled_from([0, 0, 1, 2]),
)


@settings(max_examples=300, deadline=None)
@given(work=workloads, seed=st.integers(0, 2**16), colocated=st.booleans())
def test_every_unit_once_and_never_before_its_needs(work, seed, colocated):
  rng = random.Random(seed)
  lanes = ONE if colocated else (*TWO, Lane("extra", ROLLOUT.kinds))
  cost = functools.cache(lambda lane, unit: rng.uniform(0.0, 2.0))
  spans = simulate(start_step(work, 3), lanes, cost)
  units = {
    (u.kind.value, f"{u.start}:{u.stop}", u.first, u.last, u.update): u
    for u in step_units(work, 3)
  }

  def find(span):
    label = span.args["unit"].split("/")
    first, last = map(int, label[1].split(":")) if len(label) > 1 else (0, 0)
    return units[span.name, label[0], first, last, span.args["update"]]

  ran = [find(span) for span in spans]
  assert len(ran) == len(set(ran)) == len(units)
  ended = {unit: span.end for unit, span in zip(ran, spans)}
  for unit, span in zip(ran, spans):
    before = [other for other in ran if must_precede(other, unit, work)]
    assert all(ended[other] <= span.start for other in before)


@settings(max_examples=200, deadline=None)
@given(work=workloads, seed=st.integers(0, 2**16))
def test_dead_groups_change_no_order(work, seed):
  rng = random.Random(seed)
  dead = {g for g in range(work.groups) if rng.random() < 0.6}
  state, running, ended = start_step(work, 0), [], []
  while not finished(state):
    for lane in TWO:
      while (unit := next_unit(state, lane)) is not None:
        missing = set(step_units(work, 0)) - set(ended) - state.skipped
        assert not any(must_precede(other, unit, work) for other in missing)
        state = on_start(state, lane, unit)
        running.append((lane, unit))
    lane, unit = running.pop(rng.randrange(len(running)))
    known = ()
    if unit.kind == Kind.SCORE:
      left = {u for u in step_units(work, 0) if u.kind == Kind.SCORE}
      left -= {*ended, unit}
      waiting = {g for u in left for g in work.groups_of(u)}
      known = dead & (set(work.groups_of(unit)) - waiting)
    state = on_done(state, lane, unit, known)
    ended.append(unit)
  assert sorted({*ended, *state.skipped}, key=repr) == sorted(
    step_units(work, 0), key=repr
  )


@settings(max_examples=200, deadline=None)
@given(work=workloads, seed=st.integers(0, 2**16))
def test_a_lost_lane_loses_nothing_and_doubles_nothing(work, seed):
  rng = random.Random(seed)
  lanes = [*TWO, Lane("extra", frozenset(Kind) - {Kind.SCORE})]
  state = start_step(work, 0)
  ended = []
  running = []
  while not finished(state):
    if len(lanes) == 4 and rng.random() < 0.1:
      gone = lanes.pop()
      state = on_lost(state, gone)
      running = [r for r in running if r[0] != gone]
    for lane in lanes:
      while (unit := next_unit(state, lane)) is not None:
        state = on_start(state, lane, unit)
        running.append((lane, unit))
    lane, unit = running.pop(rng.randrange(len(running)))
    state = on_done(state, lane, unit)
    ended.append(unit)
  assert sorted(ended, key=repr) == sorted(step_units(work, 0), key=repr)
