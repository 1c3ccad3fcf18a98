"""The executor: the same schedule as the simulator, and failures."""

import concurrent.futures
import dataclasses

import pytest

from digen_jax.errors import LaneLost
from digen_jax.pipeline.costs import WINDOW, Costs
from digen_jax.pipeline.execute import Executor, UnitError
from digen_jax.pipeline.scheduler import Lane, next_step, start_step
from digen_jax.pipeline.simulate import simulate
from digen_jax.pipeline.units import Kind, Unit, Workload, step_units
from digen_jax.timeline import lane_accounting

LANES = (
  Lane("rollout", frozenset({Kind.GENERATE})),
  Lane("trainer", frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH})),
  Lane("host", frozenset({Kind.SCORE}), slots=2),
)
COST = {
  Kind.GENERATE: 5,
  Kind.SCORE: 2,
  Kind.TRAIN: 3,
  Kind.UPDATE: 4,
  Kind.PUBLISH: 1,
}
WORK = Workload(groups=5, group_size=2, window=2, gap=True)


class Clock:
  """Time that passes one tick at each look: no test waits for real time."""

  def __init__(self):
    self.now = 0

  def __call__(self):
    return self.now


@dataclasses.dataclass
class Job:
  """A handle that ends at a tick of the clock."""

  clock: Clock
  end: int
  error: Exception | None = None
  finished: int = 0
  future = None

  def ready(self):
    return self.clock.now >= self.end

  def finish(self):
    self.finished += 1
    if self.error:
      raise self.error
    return frozenset()


def run(monkeypatch, fail=None):
  clock, jobs = Clock(), []

  def tick(_):
    clock.now += 1

  monkeypatch.setattr("time.sleep", tick)

  def begin(lane, unit):
    del lane
    error = ValueError("no memory") if unit == fail else None
    jobs.append(Job(clock, clock.now + COST[unit.kind], error))
    return jobs[-1]

  costs = Costs()
  executor = Executor(LANES, dict.fromkeys(Kind, begin), costs, clock=clock)
  spans, state = executor.run(start_step(WORK, 0))
  return spans, state, jobs, costs


def test_executes_what_the_simulator_predicts(monkeypatch):
  spans, _, jobs, costs = run(monkeypatch)
  assert all(job.finished == 1 for job in jobs)
  predicted = simulate(start_step(WORK, 0), LANES, costs)
  key = lambda s: (s.name, s.args["unit"])  # noqa: E731
  assert {key(s): (s.start, s.end) for s in spans} == {
    key(s): (s.start, s.end) for s in predicted
  }


@pytest.mark.parametrize(
  ("step", "late", "slow", "end"),
  [
    (1, 5, [0], 20),
    (1, 6, [0], 21),
    (1, 50, [0, 21], 60),
    (16, 5, [0, 15], 30),
  ],
)
def test_a_slow_lane_leaves_the_last_unit_to_a_faster_one(
  step, late, slow, end, monkeypatch
):
  """As in simulated time; but not if that is late itself, nor in every step."""
  clock, lanes = Clock(), (Lane("slow", LANES[0].kinds), *LANES)

  def tick(_):
    clock.now += 1

  def begin(lane, unit):
    seconds = COST[unit.kind] * (3 if lane == "slow" else 1)
    if lane == "rollout" and unit.start == 6:
      seconds = late
    return Job(clock, clock.now + seconds)

  monkeypatch.setattr("time.sleep", tick)
  executor = Executor(lanes, dict.fromkeys(Kind, begin), Costs(), clock=clock)
  spans, _ = executor.run(start_step(WORK, step))
  generated = [s for s in spans if s.name == Kind.GENERATE]
  # At 15 one of five is left, for which the slow lane needs till 30.
  assert [s.start for s in generated if s.lane == "slow"] == slow
  assert max(s.end for s in generated) == end


def test_time_is_accounted_for(monkeypatch):
  spans, *_ = run(monkeypatch)
  end = max(s.end for s in spans)
  for lane in lane_accounting(spans, ["rollout", "trainer"], 0, end).values():
    assert lane.busy + lane.idle + lane.switch + lane.sync == end


def test_a_failed_unit_is_named_and_nothing_is_left_running(monkeypatch):
  failing = Unit(Kind.TRAIN, 0, 2, 4, 0, 1)
  with pytest.raises(
    UnitError, match=r"train unit of samples 2:4 .*'trainer': no memory"
  ):
    run(monkeypatch, fail=failing)


def test_costs_ignore_an_outlier_and_scale_to_other_sizes():
  costs = Costs()
  unit = Unit(Kind.TRAIN, 0, 0, 8, 0, 2)
  for seconds in (1.0, 1.1, 60.0, 0.9, 1.0):
    costs.observe("trainer", unit, seconds)
  assert costs("trainer", unit) == 1.0
  half = dataclasses.replace(unit, last=1)
  assert costs("trainer", half) == 0.5
  assert costs("other", unit) == 0.0
  for _ in range(WINDOW):
    costs.observe("trainer", unit, 3.0)
  assert costs("trainer", unit) == 3.0


def test_a_padded_unit_costs_what_a_full_one_does():
  costs = Costs({Kind.GENERATE: 8})
  costs.observe("rollout", Unit(Kind.GENERATE, 0, 0, 8), 2.0)
  assert costs("rollout", Unit(Kind.GENERATE, 0, 8, 11)) == 2.0
  for _ in range(WINDOW):
    costs.observe("rollout", Unit(Kind.GENERATE, 0, 8, 11), 3.0)
  assert costs("rollout", Unit(Kind.GENERATE, 0, 0, 8)) == 3.0


def test_taking_a_unit_in_is_part_of_its_cost_and_not_of_its_span(monkeypatch):
  monkeypatch.setattr(
    Job, "finish", lambda job: setattr(job.clock, "now", job.clock.now + 40)
  )
  spans, _, _, costs = run(monkeypatch)
  unit = Unit(Kind.GENERATE, 0, 0, 2)
  first = next(s for s in spans if s.name == "generate")
  assert first.end - first.start == 5
  assert costs("rollout", unit) >= 45


def test_nothing_is_polled_where_futures_tell(monkeypatch):
  clock, waited = Clock(), []

  def wait(futures, timeout, when):
    assert timeout < 1 and when == "FIRST_COMPLETED"
    waited.append(len(futures))
    clock.now += 1

  def begin(lane, unit):
    job = Job(clock, clock.now + COST[unit.kind])
    job.future = concurrent.futures.Future()
    return job

  monkeypatch.setattr("time.sleep", lambda _: pytest.fail("polled"))
  monkeypatch.setattr("concurrent.futures.wait", wait)
  executor = Executor(LANES, dict.fromkeys(Kind, begin), Costs(), clock=clock)
  assert executor.left() == {}
  executor.run(start_step(WORK, 0))
  assert max(waited) > 1


def test_a_failed_unit_is_run_again_where_the_config_allows(monkeypatch):
  clock, tries = Clock(), []
  monkeypatch.setattr(
    "time.sleep", lambda _: setattr(clock, "now", clock.now + 1)
  )

  def begin(lane, unit):
    tries.append(unit)
    failing = unit.kind == Kind.TRAIN and tries.count(unit) == 1
    error = ValueError("lost") if failing and len(tries) % 2 else None
    return Job(clock, clock.now + COST[unit.kind], error)

  def executor(retries):
    tries.clear()
    return Executor(
      LANES, dict.fromkeys(Kind, begin), Costs(), retries=retries, clock=clock
    )

  spans, _ = executor(9).run(start_step(WORK, 0))
  assert len(tries) > len(set(tries))  # something was tried twice ...
  assert len(spans) == len(set(tries))  # ... and everything ended once
  with pytest.raises(UnitError, match="lost"):
    executor(0).run(start_step(WORK, 0))


def assisting():
  rollout, trainer, host = LANES
  return (
    dataclasses.replace(rollout, assists=frozenset({Kind.TRAIN})),
    dataclasses.replace(trainer, assists=frozenset({Kind.GENERATE})),
    host,
  )


def test_a_failed_switch_is_tried_again_and_a_lost_lane_is_not(monkeypatch):
  clock, switches = Clock(), []
  monkeypatch.setattr(
    "time.sleep", lambda _: setattr(clock, "now", clock.now + 1)
  )

  def begin(lane, unit):
    error = None
    if unit.kind == Kind.SWITCH:
      switches.append(unit)
      error = errors.pop() if errors else None
    return Job(clock, clock.now + COST.get(unit.kind, 1), error)

  def run():
    start = dict.fromkeys(Kind, begin)
    executor = Executor(assisting(), start, Costs(), retries=1, clock=clock)
    return executor.run(start_step(WORK, 0))[0]

  errors = [ValueError("no room")]
  spans = run()
  assert len(spans) == len(step_units(WORK, 0)) + len(switches) - 1
  errors = [LaneLost("rollout", "killed")]
  with pytest.raises(UnitError, match="killed"):
    run()


@dataclasses.dataclass
class Mortal:
  """Lanes of which one dies with its n-th unit and is then started anew."""

  clock: Clock
  dies_with: int
  starts_in: int = 30
  begun: list = dataclasses.field(default_factory=list)
  revived: int = 0
  uncompiled: list = dataclasses.field(default_factory=list)
  gone: bool = False

  def begin(self, lane, unit):
    self.begun.append((lane, unit, self.clock.now))
    mine = [x for x in self.begun if x[0] == "rollout"]
    if lane == "rollout" and len(mine) == self.dies_with:
      self.gone = True
    if lane == "trainer" and unit.kind == Kind.PUBLISH and self.gone:
      raise LaneLost("rollout", "killed")  # a receipt that never came
    lost = lane == "rollout" and self.gone
    error = LaneLost("rollout", "killed") if lost else None
    cost = 1 if error else COST.get(unit.kind, 1)
    if lane == "rollout" and unit.kind in self.uncompiled:
      self.uncompiled.remove(unit.kind)
      cost += 500
    return Job(self.clock, self.clock.now + cost, error)

  def revive(self, lane):
    assert lane == "rollout"
    self.revived, self.gone = self.revived + 1, False
    self.uncompiled = [Kind.GENERATE, Kind.TRAIN]
    self.back = self.clock.now + self.starts_in
    return Job(self.clock, self.back)

  def executor(self, lanes, restarts=1, **kwargs):
    return Executor(
      lanes,
      dict.fromkeys(Kind, self.begin),
      Costs(),
      clock=self.clock,
      restarts=restarts,
      revive=self.revive,
      **kwargs,
    )


@pytest.fixture
def ticking(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(
    "time.sleep", lambda _: setattr(clock, "now", clock.now + 1)
  )
  return clock


@pytest.mark.parametrize("assist", [False, True])
def test_a_lost_lane_comes_back_and_others_do_its_work_meanwhile(
  ticking, assist
):
  lanes = assisting() if assist else LANES
  # A search would leave the trainer idle: the rollout lane is soon free.
  idle = {"assist": lambda *_: False}
  world = Mortal(ticking, dies_with=2)
  executor = world.executor(lanes, **idle)
  spans, _ = executor.run(start_step(WORK, 0))
  units = step_units(WORK, 0)
  assert world.revived == 1
  ended = [s for s in spans if s.name != Kind.SWITCH]
  assert len(ended) == len(units)  # nothing lost, nothing doubled
  generated = [
    (lane, at) for lane, u, at in world.begun if u.kind == Kind.GENERATE
  ]
  assert len(generated) == WORK.groups + 1
  # While it was away it was given nothing.
  died = next(at for lane, _, at in world.begun[1:] if lane == "rollout")
  assert not any(
    lane == "rollout" and died < at < world.back for lane, at in generated
  )
  helped = any(lane == "trainer" for lane, _ in generated)
  assert helped == assist
  # What it compiled for says nothing of its speed.
  times = executor._costs._seen[Kind.GENERATE, "rollout"].values()
  assert {t for seen in times for t in seen} == {COST[Kind.GENERATE]}


def test_nobody_counts_on_a_lane_that_is_away(ticking):
  slow = Lane("slow", LANES[0].kinds)
  trainer = dataclasses.replace(LANES[1], assists=LANES[0].kinds)
  executor = Mortal(ticking, dies_with=2).executor((slow, LANES[0], trainer))
  state = start_step(Workload(groups=1, group_size=2, window=1, gap=True), 1)
  unit = step_units(state.work, 1)[0]
  for lane, seconds in (("slow", 15), ("rollout", 5), ("trainer", 40)):
    executor._costs.observe(lane, unit, seconds)
  assert executor._leaves(state, slow, unit)
  executor._away["rollout"] = Job(ticking, 100), 1000.0
  assert not executor._leaves(state, slow, unit)
  # The slow lane is through before the trainer would be, who might assist.
  assert not executor._worth(state, trainer, unit)
  executor._away["slow"] = executor._away["rollout"]
  assert executor._worth(state, trainer, unit)


def test_a_lane_that_keeps_dying_ends_the_run(ticking):
  class Doomed(Mortal):
    def revive(self, lane):
      self.revived += 1
      return Job(self.clock, self.clock.now + 5, LaneLost(lane, "killed"))

  world = Doomed(ticking, dies_with=2)
  with pytest.raises(UnitError, match=r"switch .*lane 'rollout': killed"):
    world.executor(LANES, restarts=2).run(start_step(WORK, 0))
  assert world.revived == 2
  world = Mortal(ticking, dies_with=2)
  with pytest.raises(UnitError, match=r"generate unit .*'rollout': killed"):
    world.executor(LANES, restarts=0).run(start_step(WORK, 0))
  assert world.revived == 0
  world = Mortal(ticking, dies_with=2)
  world.revive = lambda lane: None  # this one cannot be started again
  with pytest.raises(UnitError, match=r"generate unit .*'rollout': killed"):
    world.executor(LANES).run(start_step(WORK, 0))


def test_a_lane_that_does_not_come_back_ends_the_run(ticking):
  world = Mortal(ticking, dies_with=2, starts_in=10**6)
  with pytest.raises(UnitError, match="did not start within 30 minutes"):
    world.executor(LANES).run(start_step(WORK, 0))
  assert 1800 <= ticking.now < 2000


def test_a_lane_that_is_back_begins_nothing_of_a_step_that_ends(ticking):
  """What it has then is the next version."""
  world = Mortal(ticking, dies_with=WORK.groups + 1, starts_in=10**6)
  begin, back = world.begin, []

  def revive(lane):
    back.append(Mortal.revive(world, lane))
    return back[0]

  def with_the_publish(lane, unit):
    job = begin(lane, unit)
    if unit.kind == Kind.PUBLISH and back:
      back[0].end = job.end
    return job

  world.revive, world.begin = revive, with_the_publish
  work = dataclasses.replace(WORK, stale=5)
  executor = world.executor(LANES)
  _, state = executor.run(start_step(work, 0, last=1))
  assert back and not executor._away and not state.running
  assert state.ahead.started == 0


@pytest.mark.parametrize("starts_in", [1, 30])  # in this step, in the next
def test_a_loss_that_another_lane_tells_of_puts_both_units_back(
  ticking, starts_in
):
  work = dataclasses.replace(WORK, stale=5)
  # The first stale unit: the next thing to hear of it is the publish.
  world = Mortal(ticking, dies_with=WORK.groups + 1, starts_in=starts_in)
  begin = world.begin

  def slow_death(lane, unit):
    job = begin(lane, unit)
    if job.error:
      job.end += 1000
    return job

  world.begin = slow_death
  executor = world.executor(LANES)
  spans, state = executor.run(start_step(work, 0, last=1))
  assert world.revived == 1
  spans += executor.run(next_step(state, last=1))[0]
  units = [(s.name, s.args["step"], s.args["unit"]) for s in spans]
  assert len(units) == len(set(units)) == 2 * len(step_units(WORK, 0))


def test_a_lane_lost_between_steps_is_told_by_whoever_notices(ticking):
  work = dataclasses.replace(WORK, stale=5)
  world = Mortal(ticking, dies_with=0)
  executor = world.executor(LANES)
  spans, state = executor.run(start_step(work, 0, last=1))
  assert state.running  # a stale unit, which dies with its lane
  assert executor.restart(LaneLost("rollout", "killed"))
  assert not executor.restart(LaneLost("rollout", "killed"))  # one was allowed
  spans += executor.run(next_step(state, last=1))[0]
  units = [(s.name, s.args["step"], s.args["unit"]) for s in spans]
  assert len(units) == len(set(units)) == 2 * len(step_units(WORK, 0))


def test_what_outlives_a_step_is_not_timed(monkeypatch):
  clock, costs = Clock(), Costs()
  monkeypatch.setattr(
    "time.sleep", lambda _: setattr(clock, "now", clock.now + 1)
  )

  def begin(lane, unit):
    return Job(clock, clock.now + COST[unit.kind])

  work = dataclasses.replace(WORK, stale=5)
  run = Executor(LANES, dict.fromkeys(Kind, begin), costs, clock=clock).run
  _, state = run(start_step(work, 0, last=1))
  assert state.running
  clock.now += 1000  # an evaluation
  run(next_step(state, last=1))
  generate = Unit(Kind.GENERATE, 0, 0, 2)
  times = costs._seen[Kind.GENERATE, "rollout"][generate.size]
  assert set(times) == {COST[Kind.GENERATE]}


def test_switches_and_stale_units_run_as_simulated(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(
    "time.sleep", lambda _: setattr(clock, "now", clock.now + 1)
  )
  lanes = assisting()
  work = dataclasses.replace(WORK, stale=2)
  seconds = {  # no two things end at once: order among those is free
    Kind.GENERATE: 503,
    Kind.SCORE: 211,
    Kind.TRAIN: 307,
    Kind.UPDATE: 401,
    Kind.PUBLISH: 101,
    Kind.SWITCH: 71,
  }

  def begin(lane, unit):
    return Job(clock, clock.now + seconds[unit.kind])

  run = Executor(lanes, dict.fromkeys(Kind, begin), Costs(), clock=clock).run
  state, spans = start_step(work, 0, last=2), []
  for step in range(3):
    ran, state = run(state)
    spans += ran
    if step < 2:
      state = next_step(state, last=2)
  predicted = simulate(
    start_step(work, 0, last=2),
    lanes,
    lambda lane, unit: seconds[unit.kind],
    last=2,
  )
  key = lambda s: (s.name, s.lane, s.args["step"], s.args["unit"], s.start)  # noqa: E731
  assert sorted(map(key, spans)) == sorted(map(key, predicted))
  assert any(s.name == Kind.SWITCH for s in spans)
  stale = [s for s in spans if s.args["version"] < s.args["step"]]
  assert {s.name for s in stale} == {Kind.GENERATE, Kind.SCORE}
  assert 0 < sum(s.name == Kind.GENERATE for s in stale) <= 4
