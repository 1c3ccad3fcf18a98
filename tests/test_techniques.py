"""TAG, RAT, BTS and TCSS in virtual time: what they gain, and what holds."""

import itertools
import math
import random
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from digen_jax.pipeline.scheduler import (
  Lane,
  finished,
  next_step,
  next_unit,
  on_done,
  on_lost,
  on_start,
  start_step,
  version_of,
)
from digen_jax.pipeline.search import Budget, Search
from digen_jax.pipeline.simulate import always, simulate
from digen_jax.pipeline.units import Kind, Workload, step_units
from tests.unit_order import must_precede

HOST = Lane("host", frozenset({Kind.SCORE}), slots=4)
TRAINS = frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH})
STEP = 1.0


def lanes(tag=False, rat=False):
  return (
    Lane(
      "rollout",
      frozenset({Kind.GENERATE}),
      assists=frozenset({Kind.TRAIN} if rat else ()),
    ),
    Lane("trainer", TRAINS, assists=frozenset({Kind.GENERATE} if tag else ())),
    HOST,
  )


def costs(generate=4.0, train=3.0, switch=0.0):
  table = {
    Kind.GENERATE: generate,
    Kind.SCORE: 0.0,
    Kind.TRAIN: train,
    Kind.UPDATE: 0.5,
    Kind.PUBLISH: 0.5,
    Kind.SWITCH: switch,
  }
  return lambda lane, unit: table[unit.kind]


def end(spans):
  return max(span.end for span in spans)


def run(work, lanes, cost, steps=1, **options):
  state = start_step(work, 0, last=steps - 1)
  return simulate(state, lanes, cost, last=steps - 1, **options)


WORK = Workload(groups=12, group_size=4, window=1, gap=True)


def test_tag_fills_the_trainer_when_generation_is_longer():
  alone = end(run(WORK, lanes(), costs(generate=6.0, train=1.0)))
  helped = end(run(WORK, lanes(tag=True), costs(generate=6.0, train=1.0)))
  assert alone == 12 * 6.0 + 1.0 + STEP
  bound = (12 * 6.0 + 12 * 1.0) / 2 + STEP
  assert bound <= helped < alone / 1.6


def test_rat_fills_the_rollout_when_training_is_longer():
  alone = end(run(WORK, lanes(), costs(generate=1.0, train=6.0)))
  helped = end(run(WORK, lanes(rat=True), costs(generate=1.0, train=6.0)))
  assert alone == 1.0 + 12 * 6.0 + STEP
  assert (12 * 7.0) / 2 + STEP <= helped < alone / 1.6


def test_assisting_too_much_is_slower_and_the_search_sees_it():
  # One group left to generate, and a trainer that is slow at it.
  slow = costs(generate=4.0, train=3.0, switch=30.0)
  team = lanes(tag=True)
  greedy = end(run(WORK, team, slow))
  alone = end(run(WORK, lanes(), slow))
  searched = end(run(WORK, team, slow, assist=Search(team, slow)))
  assert greedy > alone
  assert searched == alone


def test_the_search_stops_before_the_trainer_is_late_for_its_own_work():
  cost = costs(generate=4.0, train=3.9)
  team = lanes(tag=True)
  searched = end(run(WORK, team, cost, assist=Search(team, cost)))
  assert searched <= end(run(WORK, lanes(), cost))
  assert searched <= end(run(WORK, team, cost))


def test_a_lane_counts_on_what_another_has_committed_to():
  """Else a slow lane takes a unit that the other would finish sooner."""
  seconds = {"rollout": 4.0, "trainer": 4.0, "slow": 9.0}
  work = Workload(groups=4, group_size=4, window=1, gap=True)
  two = lanes(tag=True)
  three = (*two, Lane("slow", frozenset(), assists=frozenset({Kind.GENERATE})))

  def cost(lane, unit):
    return seconds[lane] if unit.kind == Kind.GENERATE else 0.125

  shared = end(run(work, two, cost, assist=Search(two, cost)))
  assert shared < 2 * 4.0 + 1.0
  assert end(run(work, three, cost, assist=Search(three, cost))) == shared


def test_a_slow_lane_leaves_the_last_unit_to_a_faster_one():
  seconds = {"slow": 3.0, "rollout": 1.0}
  team = (Lane("slow", frozenset({Kind.GENERATE})), *lanes())

  def cost(lane, unit):
    return seconds[lane] if unit.kind == Kind.GENERATE else 0.0

  work = Workload(groups=5, group_size=4, window=1, gap=True)
  spans = run(work, team, cost)
  generated = [s for s in spans if s.name == Kind.GENERATE]
  # Both are free at 3.0, and one is left: at 6.0 the slow one would be through.
  assert [s.start for s in generated if s.lane == "slow"] == [0.0]
  assert end(generated) == 4.0


def test_who_leaves_a_unit_goes_on_with_the_next_step():
  seconds = {"slow": 3.0, "rollout": 1.0}
  team = (Lane("slow", frozenset({Kind.GENERATE})), *lanes())

  def cost(lane, unit):
    return seconds.get(lane, 0.5) if unit.kind == Kind.GENERATE else 0.5

  work = Workload(groups=2, group_size=4, window=1, gap=True, stale=2)
  spans = run(work, team, cost, steps=2)
  generated = {
    (s.lane, s.args["step"], s.start) for s in spans if s.name == Kind.GENERATE
  }
  # Both units of the first step will be done before the slow lane has done one.
  assert ("slow", 1, 0.0) in generated
  assert {lane for lane, step, _ in generated if step == 0} == {"rollout"}


@settings(max_examples=300, deadline=None)
@given(
  groups=st.integers(1, 12),
  seconds=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=4),
)
def test_leaving_units_to_faster_lanes_is_never_slower(groups, seconds):
  generate = frozenset({Kind.GENERATE})
  team = [Lane(str(i), generate) for i in range(len(seconds))]
  _, *others = lanes()
  work = Workload(groups=groups, group_size=1, window=1, gap=True)

  def cost(lane, unit):
    return seconds[int(lane)] if unit.kind == Kind.GENERATE else 0.0

  left = end(run(work, (*team, *others), cost))
  with mock.patch("digen_jax.pipeline.simulate.leaves", lambda *_: False):
    greedy = end(run(work, (*team, *others), cost))
  assert left <= greedy * (1 + 1e-9)


def test_rewards_under_way_do_not_hide_a_bubble():
  # Four slow rewards at once are not the work of two lanes.
  cost = costs(generate=4.0, train=1.0)
  team = lanes(tag=True)
  rollout, trainer, host = team
  state = start_step(WORK, 0)
  left = {}
  for _ in range(4):
    unit = next_unit(state, rollout)
    state = on_done(on_start(state, rollout, unit), rollout, unit)
    unit = next_unit(state, host)
    state, left["host", unit] = on_start(state, host, unit), 10.0
  search = Search(team, cost)
  assert next_unit(state, trainer, lambda *args: search(*args, left))


def test_lanes_that_gain_only_together_help_each_other():
  # Generating on both lanes at once pays only if both then train.
  work = Workload(groups=2, group_size=4, window=1, gap=True)
  cost = costs(generate=4.0, train=8.0)
  team = lanes(tag=True, rat=True)
  assert end(run(work, team, cost)) == 4.0 + 8.0 + STEP
  searched = end(run(work, team, cost, assist=Search(team, cost)))
  assert searched == 4.0 + 8.0 + STEP


def test_a_switch_is_charged_once_per_block():
  spans = run(WORK, lanes(tag=True), costs(generate=6.0, train=1.0, switch=2.0))
  switches = [s for s in spans if s.name == "switch"]
  assert switches
  assert all(s.end - s.start == 2.0 and s.lane == "trainer" for s in switches)
  blocks, before = 0, None
  for span in sorted(spans, key=lambda s: s.start):
    if span.lane == "trainer" and span.name != "switch":
      blocks += span.name == "generate" != before
      before = span.name
  assert len(switches) == blocks


def test_rat_goes_on_after_the_first_update():
  """It fetches what the updates before have made once for each."""
  work = Workload(groups=12, group_size=4, window=1, updates=3, gap=True)
  cost = costs(generate=0.5, train=6.0, switch=0.25)
  alone = end(run(work, lanes(), cost))
  spans = run(work, lanes(tag=True, rat=True), cost)
  assert end(spans) < alone / 1.6
  switches = [s for s in spans if s.name == "switch" and s.lane == "rollout"]
  assert [s.args["update"] for s in switches] == [0, 1, 2]
  assert [s.args["size"] for s in switches] == [0, 1, 1]
  # Generating ends before the weights of the step are gone.
  updated = min(s.end for s in spans if s.name == "update")
  for span in spans:
    if span.lane == "trainer" and span.name == "generate":
      assert span.start < updated


def test_stale_units_hide_the_end_of_a_step():
  cost = costs(generate=2.0, train=2.0)
  work = WORK
  stale = Workload(groups=12, group_size=4, window=1, gap=True, stale=6)
  plain = end(run(work, lanes(), cost, steps=5))
  ahead = run(stale, lanes(), cost, steps=5)
  assert end(ahead) < 0.95 * plain
  late = [
    s
    for s in ahead
    if s.name == "generate" and s.args["version"] < s.args["step"]
  ]
  assert late
  assert all(s.args["version"] == s.args["step"] - 1 for s in late)
  for step in range(5):
    assert sum(s.args["step"] == step for s in late) <= 6


def test_stale_samples_are_scored_after_those_of_the_step():
  work = Workload(groups=6, group_size=4, window=1, gap=True, stale=3)
  slow = Lane("slow", frozenset({Kind.GENERATE}))
  host = Lane("host", frozenset({Kind.SCORE}))  # one call at a time

  def cost(lane, unit):
    if unit.kind == Kind.GENERATE:
      return 30.0 if lane == "slow" else 5.0
    return 1.0 if unit.kind == Kind.SCORE else 0.5

  # Stale samples are there while the slow lane is at the first of the step.
  spans = run(work, (slow, *lanes(tag=True)[:2], host), cost, steps=3)
  scores = [s for s in spans if s.name == Kind.SCORE]
  for step in (0, 1):
    last = max(s.start for s in scores if s.args["step"] == step)
    assert last <= min(s.start for s in scores if s.args["step"] == step + 1)
  assert any(s.args["version"] < s.args["step"] for s in scores)


def test_without_tcss_nothing_is_stale():
  spans = run(WORK, lanes(tag=True, rat=True), costs(), steps=3)
  assert all(
    s.args["version"] == s.args["step"]
    for s in spans
    if s.name in ("generate", "train")
  )


def test_all_on_is_close_to_work_conserving():
  work = Workload(groups=32, group_size=4, window=1, gap=True, stale=16)
  for generate, train in ((6.0, 2.0), (4.0, 4.0), (2.0, 6.0)):
    cost = costs(generate, train)
    team = lanes(tag=True, rat=True)
    spans = run(work, team, cost, steps=4, assist=Search(team, cost))
    bound = 4 * (32 * (generate + train) + STEP) / 2
    assert bound / end(spans) > 0.95


workloads = st.builds(
  lambda groups, size, window, pack, updates, gap, scope, part, stale: Workload(
    groups=groups * updates,
    group_size=size * part,
    window=window,
    updates=updates,
    generate_size=size,
    train_size=size * part,
    pack=min(pack, window),
    scope=scope,
    gap=gap,
    stale=stale,
  ),
  st.integers(1, 4),
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 3),
  st.booleans(),
  st.sampled_from(["group", "global"]),
  st.integers(1, 3),
  st.integers(0, 5),
)
teams = st.builds(
  lambda tag, rat, extra: (
    *lanes(tag, rat),
    *(Lane(f"more{i}", frozenset({Kind.GENERATE})) for i in range(extra)),
  ),
  st.booleans(),
  st.booleans(),
  st.integers(0, 2),
)


def random_costs(seed):
  rng = random.Random(seed)
  table = {}

  def cost(lane, unit):
    key = (lane, unit.kind)
    if key not in table:
      table[key] = 0.0 if rng.random() < 0.1 else rng.uniform(0.1, 3.0)
    return table[key]

  return cost


def started(spans):
  """Spans of units, with what identifies the unit."""
  return [
    (s, (s.name, s.args["step"], s.args["unit"], s.args["update"]))
    for s in spans
    if s.name != "switch"
  ]


def name_of(unit):
  label = f"{unit.start}:{unit.stop}"
  if unit.last:
    label += f"/{unit.first}:{unit.last}"
  return (unit.kind.value, unit.step, label, unit.update)


@settings(max_examples=700, deadline=None)
@given(
  work=workloads,
  team=teams,
  seed=st.integers(0, 2**20),
  steps=st.integers(1, 3),
)
def test_invariants_of_every_schedule(work, team, seed, steps):
  """Invariants 2, 3, 4 and 8, over random workloads, lanes and costs."""
  spans = run(work, team, random_costs(seed), steps=steps)
  units = {name_of(u): u for k in range(steps) for u in step_units(work, k)}
  ran = started(spans)
  # 4: every unit exactly once.
  assert sorted(n for _, n in ran) == sorted(units)
  ended = {n: s.end for s, n in ran}
  published = {s.args["step"] + 1: s.end for s, _ in ran if s.name == "publish"}
  stale = dict.fromkeys(range(steps), 0)
  for span, name in ran:
    unit = units[name]
    # 3: nothing before what it needs; of Train units that is their rewards.
    assert all(
      ended[other] <= span.start
      for other, u in units.items()
      if u.step == unit.step and must_precede(u, unit, work)
    )
    version = span.args["version"]
    if unit.kind in (Kind.GENERATE, Kind.TRAIN):
      # 2: one version, published before it starts, at most one step old.
      assert version in (unit.step, unit.step - 1)
      assert version == unit.step or unit.kind == Kind.GENERATE
      assert published.get(version, 0.0) <= span.start
      stale[unit.step] += version < unit.step
  assert all(count <= work.stale for count in stale.values())
  # 8: a lane of one slot never does two things at once.
  for lane in team:
    if lane.slots == 1:
      mine = sorted((s.start, s.end) for s in spans if s.lane == lane.name)
      assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(mine))


@settings(max_examples=300, deadline=None)
@given(work=workloads, team=teams, seed=st.integers(0, 2**20))
# Two lanes that assist each other, each counting on the other to go on.
@example(
  work=Workload(2, 1, 1, generate_size=1, train_size=1, gap=True),
  team=lanes(tag=True, rat=True),
  seed=197,
)
def test_the_search_is_never_slower_than_not_assisting(work, team, seed):
  cost = random_costs(seed)
  idle = end(run(work, team, cost, assist=lambda *_: False))
  searched = end(run(work, team, cost, assist=Search(team, cost)))
  assert searched <= idle * (1 + 1e-6)


@settings(max_examples=700, deadline=None)
@given(
  work=workloads, team=teams, seed=st.integers(0, 2**20), odds=st.floats(0, 0.3)
)
def test_lost_lanes_lose_nothing_and_double_nothing(work, team, seed, odds):
  rng = random.Random(seed)
  spare = Lane("spare", frozenset(Kind) - {Kind.SCORE})
  alive, last = [*team, spare], 2
  state = start_step(work, 0, last=last)
  running, ended = [], []
  while True:
    while not finished(state):
      mortal = [i for i in alive if i.name not in ("spare", "host")]
      if mortal and rng.random() < odds:
        gone = rng.choice(mortal)
        alive.remove(gone)
        state = on_lost(state, gone)
        running = [r for r in running if r[0] != gone]
      for lane in alive:
        while (unit := next_unit(state, lane)) is not None:
          running.append((lane, unit, version_of(state, unit)))
          state = on_start(state, lane, unit)
      lane, unit, version = running.pop(rng.randrange(len(running)))
      state = on_done(state, lane, unit)
      assert unit.step - version in (0, 1)
      ended.append(unit)
    if state.step == last:
      break
    state = next_step(state, last=last)
  every = [u for k in range(last + 1) for u in step_units(work, k)]
  assert sorted(ended, key=repr) == sorted(every, key=repr)


def test_a_search_out_of_budget_is_no_slower_than_idling():
  cost = costs(generate=6.0, train=1.0)
  team = lanes(tag=True)
  search = Search(team, cost, Budget(simulations=1, seconds=0.0))
  assert end(run(WORK, team, cost, assist=search)) <= end(
    run(WORK, lanes(), cost)
  )


@pytest.mark.parametrize(("generate", "train"), [(6.0, 1.0), (1.0, 6.0)])
def test_where_a_simulation_takes_too_long_all_or_nothing_is_decided_once(
  generate, train
):
  cost, team = costs(generate, train, switch=1.0), lanes(tag=True)
  work = Workload(groups=96, group_size=4, window=1, gap=True)
  clock = itertools.count().__next__  # a second for whoever looks at it
  search = Search(team, cost, Budget(seconds=0.5), clock)
  with mock.patch.object(search, "_simulate", wraps=search._simulate) as looks:
    searched = end(run(work, team, cost, assist=search))
  assert looks.call_count == 2
  idling, helping = (end(run(work, t, cost)) for t in (lanes(), team))
  assert searched == min(idling, helping)
  with mock.patch.object(search, "_simulate", wraps=search._simulate) as looks:
    run(work, team, cost, steps=3, assist=search)
  assert looks.call_count == 4  # steps 1 and 2 anew; 0 was decided


def test_the_search_tries_everything_and_one_unit_first():
  search = Search(lanes(tag=True), costs())
  unit = step_units(WORK, 0)[0]
  quotas = search._quotas(start_step(WORK, 0), unit)
  assert quotas[:5] == [12, 1, 6, 2, 3]
  assert sorted(quotas) == [1, 2, 3, 4, 6, 8, 12]


def test_a_search_may_take_longer_where_units_are_long():
  budget = Budget(seconds=0.5, part=0.25)
  for generate, patience in ((1.0, 0.5), (12.0, 3.0)):
    search = Search(lanes(tag=True), costs(generate, train=20.0), budget)
    assert search._patience(start_step(WORK, 0)) == patience


def test_large_steps_are_simulated_to_their_end():
  """A thousand groups: the size of a published set-up, not of a toy."""
  work = Workload(groups=1024, group_size=8, window=4, gap=True, stale=512)
  spans = run(work, lanes(tag=True, rat=True), costs(), assist=always)
  assert math.isfinite(end(spans))
  assert len(started(spans)) == len(step_units(work, 0))


def test_versions_of_units_of_no_step_under_way():
  state = start_step(WORK, 3, last=9)
  unit = step_units(WORK, 7)[0]
  with pytest.raises(ValueError, match="no step under way"):
    on_start(state, HOST, unit)
