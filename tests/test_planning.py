"""Cost tables, predictions and splits: in virtual time, nothing runs."""

import collections
import dataclasses
import itertools
import json
import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from digen_jax.benchmarks import published
from digen_jax.errors import UserError
from digen_jax.ladder import ladder_chart, ladder_rows, ladder_text
from digen_jax.pipeline import bounds, steady
from digen_jax.pipeline import search as search_module
from digen_jax.pipeline.cost_table import (
  CostTable,
  Measured,
  Place,
  Rate,
  RoleCosts,
  lane_costs,
  read_table,
  table_from_dict,
  table_from_measured,
  table_from_spans,
  write_table,
)
from digen_jax.pipeline.planner import (
  RUNGS,
  Split,
  cut,
  equal_split,
  ladder,
  make_lanes,
  predict,
  why_not,
)
from digen_jax.pipeline.scheduler import start_step
from digen_jax.pipeline.search import PREDICTED, Search
from digen_jax.pipeline.simulate import always, never, simulate
from digen_jax.pipeline.splits import best_split, best_splits
from digen_jax.pipeline.steady import what_pays
from digen_jax.pipeline.units import (
  Kind,
  Unit,
  Workload,
  full_sizes,
  step_units,
)
from digen_jax.timeline import Span
from tests.small_costs import ROLE, TABLE, WORK

rates = st.builds(Rate, st.floats(0, 2), st.floats(0.01, 2))
roles = st.builds(
  RoleCosts,
  generate=rates,
  decode=st.builds(Rate, st.floats(0, 1), st.floats(0, 1)),
  train=rates,
  update=rates,
  publish=rates,
  switch=rates,
)
tables = st.builds(
  CostTable,
  rollout=roles,
  trainer=roles,
  colocated=st.none() | roles,
  score=rates,
  source=st.text(max_size=5),
)
workloads = st.builds(
  lambda groups, size, window, updates, generate, train, pack: Workload(
    groups * updates,
    size,
    window,
    updates=updates,
    generate_size=size * generate,
    train_size=size * train,
    pack=min(pack, window),
  ),
  st.integers(1, 5),
  st.integers(1, 4),
  st.integers(1, 4),
  st.integers(1, 2),
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 4),
)
rungs = st.sampled_from(list(RUNGS))


@settings(max_examples=50, deadline=None)
@given(table=tables)
def test_a_table_is_the_same_after_its_file(table, tmp_path_factory):
  path = tmp_path_factory.mktemp("table") / "costs.json"
  write_table(path, table)
  assert read_table(path) == table


def broken(*keys, value):
  values = json.loads(json.dumps(dataclasses.asdict(TABLE)))
  *parents, last = keys
  inner = values
  for key in parents:
    inner = inner[key]
  inner[last] = value
  return values


@pytest.mark.parametrize(
  "values, said",
  [
    ([], "must hold rollout"),
    (broken("rollot", value={}), "unknown field 'rollot'"),
    (broken("trainer", value=None), "'trainer' must hold the costs"),
    (broken("rollout", "train", value={}), "rollout.train costs nothing"),
    (broken("rollout", "train", "row", value=-1), "rollout.train.row must be"),
    (broken("trainer", "update", "fixed", value="1"), "trainer.update.fixed"),
    (broken("score", "row", value=math.inf), "score.row must be a number"),
    (broken("trainer", "shards", value=0), "trainer.shards must be a positive"),
    (broken("trainer", "rows", value=1), "trainer has an unknown field 'rows'"),
    (broken("source", value=3), "source must be a text"),
    (broken("trainer", "max_rows", value=-1), "trainer.max_rows must be"),
    (broken("rollout", "state_rows", value="1"), "rollout.state_rows must be"),
    (broken("resize", value=1), "resize must be true or false"),
  ],
)
def test_bad_tables_are_refused_in_one_line(values, said):
  with pytest.raises(UserError, match=said) as error:
    table_from_dict(values)
  assert "\n" not in str(error.value)


def test_files_that_are_no_tables(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    read_table(tmp_path / "missing.json")
  (tmp_path / "costs.json").write_text("{")
  with pytest.raises(UserError, match="is not JSON"):
    read_table(tmp_path / "costs.json")


def test_seconds_of_units():
  role = RoleCosts(
    generate=Rate(1.0, 2.0),
    decode=Rate(0.0, 0.5),
    train=Rate(0.0, 3.0),
    update=Rate(0.5, 8.0),
    shards=2,
  )
  table = CostTable(role, role, score=Rate(0.1, 0.2))
  cost = lane_costs(table, {"trainer": Place("trainer", 8)})
  # Eight devices are four pairs, and a pair takes half the time for a row.
  generate = Unit(Kind.GENERATE, 0, 0, 5)
  assert cost("trainer", generate) == pytest.approx(1.0 + 2.5 * 2 / 2)
  assert cost("trainer", Unit(Kind.TRAIN, 0, 0, 4, 0, 3)) == 3.0 * 3 / 2
  assert cost("trainer", Unit(Kind.UPDATE, 0)) == 0.5 + 8.0 / 8
  assert cost("host", Unit(Kind.SCORE, 0, 0, 10)) == pytest.approx(2.1)


def test_measured_units_give_back_the_line_they_lie_on():
  line = {Kind.GENERATE: (0.5, 2.0), Kind.TRAIN: (0.25, 1.0)}
  measured = [
    Measured(lane, kind, size, line[kind][0] + line[kind][1] * size / count)
    for lane, kind, count in (
      ("rollout", Kind.GENERATE, 2),
      ("trainer", Kind.TRAIN, 4),
    )
    for size in (4, 8, 16)
  ]
  measured += [Measured("trainer", Kind.UPDATE, 0, s) for s in (0.1, 0.3, 9.0)]
  measured += [Measured("host", Kind.SCORE, 8, 0.4)]
  table = table_from_measured(measured, {"rollout": 2, "trainer": 4})
  assert table.rollout.generate.fixed == pytest.approx(0.5)
  assert table.rollout.generate.row == pytest.approx(2.0)
  assert table.trainer.train.fixed == pytest.approx(0.25)
  assert table.trainer.train.row == pytest.approx(1.0)
  assert table.trainer.update == Rate(0.3)  # the median
  assert table.score == Rate(0.0, 0.05)
  # What a role never did costs what it costs the other.
  assert table.trainer.generate == table.rollout.generate
  with pytest.raises(UserError, match="holds no train unit"):
    table_from_measured([m for m in measured if m.kind != Kind.TRAIN],
                        {"rollout": 2, "trainer": 4})  # fmt: skip


def test_a_single_lane_is_colocated():
  measured = [
    Measured("colocated", Kind.GENERATE, 4, 2.0),
    Measured("colocated", Kind.TRAIN, 8, 4.0),
    Measured("colocated", Kind.UPDATE, 0, 1.0),
  ]
  table = table_from_measured(measured, {"colocated": 1})
  assert table.colocated == table.rollout == table.trainer
  assert table.colocated.generate == Rate(0.0, 0.5)


@settings(max_examples=60, deadline=None)
@given(work=workloads, rung=rungs, seed=st.integers(0, 2**20))
def test_costs_of_a_timeline_predict_that_timeline(work, rung, seed):
  """Every unit off by up to 5 %, and some lanes slower than others."""
  rng = random.Random(seed)
  split = Split(1, 1, work.generate_size, work.train_size, work.window)
  techniques = dataclasses.replace(RUNGS[rung], bts=False, tcss=0.0)
  speed = collections.defaultdict(lambda: rng.uniform(0.5, 2.0))

  def truth(lane, unit):
    base = 0.3 + 0.1 * max(unit.size, full.get(unit.kind, 0))
    return base * speed[lane, unit.kind] * rng.uniform(0.95, 1.05)

  lanes, places = make_lanes(split, techniques)
  units = cut(work, split, techniques)
  full = full_sizes(units)  # short units are padded
  steps = 12
  spans = simulate(
    start_step(units, 0, last=steps - 1), lanes, truth, last=steps - 1
  )
  took = max(span.end for span in spans) / steps
  table = table_from_spans(spans, {n: p.devices for n, p in places.items()})
  predicted = predict(table, work, split, techniques).step_seconds
  # Lanes that assist may shift a unit from one to the other.
  close = 0.25 if techniques.tag else 0.04
  assert predicted == pytest.approx(took, rel=close)


def test_short_units_do_not_make_rows_look_free():
  """Five groups in units of two: the last one is padded, and as slow."""
  spans = [
    Span("generate", "rollout", t, t + 1.0, {"size": n})
    for t, n in enumerate((8, 8, 4))
  ]
  spans += [
    Span("train", "trainer", t, t + 2.0, {"size": n})
    for t, n in enumerate((16, 16, 8))
  ]
  table = table_from_spans(spans, {"rollout": 1, "trainer": 1})
  assert table.rollout.generate == Rate(0.0, 1 / 8)
  assert table.trainer.train == Rate(0.0, 2 / 16)
  work = Workload(5, 4, 2, pack=2)
  found = predict(table, work, Split(1, 1, 8, 8, 2), RUNGS["sequential"])
  assert found.step_seconds == pytest.approx(3 * 1.0 + 6 * 1.0)


def test_units_are_padded_to_what_a_step_has():
  work = Workload(3, 4, 5, generate_size=16, train_size=8, pack=2)
  assert full_sizes(work) == {Kind.GENERATE: 12, Kind.TRAIN: 16}
  assert full_sizes(Workload(4, 2, 3, updates=2, train_size=8, pack=3)) == {
    Kind.GENERATE: 2,
    Kind.TRAIN: 12,
  }


@settings(max_examples=100, deadline=None)
@given(work=workloads)
def test_units_are_counted_without_making_them(work):
  counted = collections.Counter(
    (unit.kind, unit.size) for unit in step_units(work, 0)
  )
  assert counted == {
    (kind, size): n
    for kind, sizes in bounds.unit_counts(work).items()
    for size, n in sizes.items()
  }


@settings(max_examples=80, deadline=None)
@given(table=tables, work=workloads, rung=rungs, split=st.tuples(
  st.integers(1, 5), st.integers(1, 5)))  # fmt: skip
def test_no_step_beats_the_bound_and_lanes_add_up(table, work, rung, split):
  split = Split(*split, work.generate_size, work.train_size, work.window)
  techniques = dataclasses.replace(RUNGS[rung], tcss=0.0)
  found = predict(table, work, split, techniques)
  assert found.bound_seconds <= found.step_seconds * (1 + 1e-9)
  for part in found.lanes.values():
    total = part.busy + part.idle + part.switch + part.sync
    assert total == pytest.approx(found.step_seconds)


def test_the_bound_of_equal_lanes_is_the_work_of_all_units_in_halves():
  split = equal_split(WORK, 2)
  found = predict(TABLE, WORK, split, RUNGS["tsp"])
  units = step_units(cut(WORK, split, RUNGS["tsp"]), 0)
  work = sum(
    ROLE.seconds(unit.kind, unit.size, 1)
    for unit in units
    if unit.kind != Kind.SCORE
  )
  assert found.bound_seconds == pytest.approx(work / 2)


@settings(max_examples=20, deadline=None)
@given(table=tables, work=workloads, rung=rungs, devices=st.integers(2, 6))
def test_the_best_split_is_no_worse_than_the_equal_one(
  table, work, rung, devices
):
  techniques = RUNGS[rung]
  best = best_split(table, work, devices, techniques)
  assert best.devices == devices
  equal = predict(table, work, equal_split(work, devices), techniques)
  found = predict(table, work, best, techniques)
  assert found.step_seconds <= equal.step_seconds * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(table=tables, work=workloads, split=st.tuples(
  st.integers(1, 5), st.integers(1, 5)))  # fmt: skip
def test_stale_units_are_not_started_where_they_do_not_pay(table, work, split):
  split = Split(*split, work.generate_size, work.train_size, work.window)
  stale = predict(table, work, split, RUNGS["tcss"]).step_seconds
  assert stale <= predict(table, work, split, RUNGS["rat"]).step_seconds


def test_stale_units_pay_where_a_lane_waits_and_not_where_none_does():
  split, techniques = equal_split(WORK, 2), RUNGS["tsp"]
  both = dataclasses.replace(cut(WORK, split, techniques), stale=4)
  lanes, places = make_lanes(split, techniques)
  cost = lane_costs(TABLE, places)
  assert what_pays(both, lanes, cost).stale
  fresh = dataclasses.replace(both, stale=0)
  assert not what_pays(fresh, lanes, cost).stale


def _amid_stale(seed: int):
  """A random pair of lanes with TCSS: its work, lanes, costs and a search."""
  rng = random.Random(seed)
  groups, window = rng.choice((6, 8)), rng.choice((1, 2, 4))
  stale = groups // rng.choice((2, 4))
  work = Workload(groups, 4, window, gap=True, stale=stale)
  lanes, _ = make_lanes(equal_split(work, 2), RUNGS["tcss"])
  pairs = itertools.product(("rollout", "trainer"), (Kind.GENERATE, Kind.TRAIN))
  table = {pair: rng.uniform(0.5, 6.0) for pair in pairs}

  def cost(lane: str, unit: Unit) -> float:
    return table.get((lane, unit.kind), 0.2)

  return work, lanes, cost, Search(lanes, cost, PREDICTED)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=37)
@example(seed=112)
@example(seed=205)
def test_assistance_amid_stale_units_is_never_slower_in_the_long_run(seed):
  """A search sees the end of the present step alone; `what_pays` sees more."""
  work, lanes, cost, search = _amid_stale(seed)
  pays = what_pays(work, lanes, cost)

  def assist(state, *asked) -> bool:
    return not pays.forbid(state) and search(state, *asked)

  fresh = dataclasses.replace(work, stale=0)
  taken = steady.steady(work if pays.stale else fresh, lanes, cost, assist)
  for trial in (work, fresh):
    alone = steady.steady(trial, lanes, cost, never).step_seconds
    longest = alone / (1 - steady.WORTH)
    assert taken.step_seconds <= longest * (1 + 1e-9)


@pytest.mark.parametrize("units", [1, 100])
@pytest.mark.parametrize("seed", [37, 112, 205])
def test_where_a_search_would_be_slower_in_the_long_run(
  seed, units, monkeypatch
):
  monkeypatch.setattr(search_module, "SEARCHED_UNITS", units)
  work, lanes, cost, search = _amid_stale(seed)
  assert search_module.large(work) == (units == 1)
  alone = steady.steady(work, lanes, cost, never).step_seconds
  searched = steady.steady(work, lanes, cost, search).step_seconds
  assert searched > alone * (1 + steady.WORTH)
  assert what_pays(work, lanes, cost) == steady.Pays(True, False)
  # Who must always help is not asked.
  assert what_pays(work, lanes, cost, bts=False).assists


def test_a_review_of_large_steps_searches_once_a_step(monkeypatch):
  searched, simulations = search_module.simulate, []
  monkeypatch.setattr(
    search_module,
    "simulate",
    lambda *args, **options: (
      simulations.append(args) or searched(*args, **options)
    ),
  )
  work, lanes, cost, _ = _amid_stale(37)
  counts = []
  for units in (1, 100):
    monkeypatch.setattr(search_module, "SEARCHED_UNITS", units)
    simulations.clear()
    what_pays(work, lanes, cost)
    counts.append(len(simulations))
  steps = 1 + sum(steady.FEWER_STEPS)  # fresh, and with stale units
  assert counts[0] <= 4 * steps < counts[1]


def test_a_colocated_lane_samples_ahead_while_rewards_are_out():
  slow = dataclasses.replace(TABLE, score=Rate(fixed=50.0))
  split, alone = equal_split(WORK, 2), RUNGS["colocated"]
  ahead = dataclasses.replace(alone, tcss=0.5)
  before = predict(slow, WORK, split, alone)
  after = predict(slow, WORK, split, ahead)
  assert after.step_seconds < before.step_seconds
  # As the run does, with the same lanes and work.
  assert any(s.args["version"] < s.args["step"] for s in after.spans)


def test_stale_units_that_would_save_little_are_not_started(monkeypatch):
  split, techniques = equal_split(WORK, 2), RUNGS["tsp"]
  fresh = cut(WORK, split, techniques)
  both = dataclasses.replace(fresh, stale=4)
  lanes, places = make_lanes(split, techniques)
  cost = lane_costs(TABLE, places)
  long, short = (
    steady.steady(work, lanes, cost, always).step_seconds
    for work in (fresh, both)
  )
  for worth, pays in ((-1e-3, True), (1e-3, False)):
    monkeypatch.setattr(steady, "WORTH", 1 - short / long + worth)
    assert what_pays(both, lanes, cost).stale == pays


def test_the_best_split_gives_more_devices_to_what_takes_longer():
  slow = dataclasses.replace(ROLE, generate=Rate(0.0, 40.0))
  table = CostTable(slow, slow)
  best = best_split(table, WORK, 8, RUNGS["tsp"])
  assert best.rollout > best.trainer
  assert best_split(table, WORK, 8, RUNGS["tsp"], rollout=2).rollout == 2


def test_rows_that_fit_on_lanes_of_any_size():
  role = RoleCosts(shards=2, max_rows=3.5, state_rows=4.0)
  # Of eight pairs each takes an eighth of the state.
  assert role.room(16) == 8 * 3
  assert role.room(4) == 2 * 1
  assert role.room(2) == 0
  assert RoleCosts().room(1) == math.inf


def test_packs_are_cut_to_what_fits_into_memory():
  tight = dataclasses.replace(ROLE, max_rows=2)
  best = best_split(CostTable(tight, tight), WORK, 4, RUNGS["tsp"])
  assert best.train_size * best.pack <= 2 * best.trainer
  # A whole group, or one sample of it, on a trainer that holds no row.
  none = dataclasses.replace(ROLE, max_rows=-1)
  with pytest.raises(UserError, match="not even one sample"):
    best_split(CostTable(ROLE, none), WORK, 4, RUNGS["tsp"])


@pytest.mark.parametrize("rung", ["tsp", "rat", "colocated"])
def test_what_does_not_fit_has_no_seconds(rung):
  tight = dataclasses.replace(ROLE, max_rows=3)
  role = {"tsp": "trainer", "rat": "rollout"}.get(rung, rung)
  table = dataclasses.replace(TABLE, **{role: tight})
  split, pack = equal_split(WORK, 4), 1 if rung == "colocated" else 4
  rows, room = 4 * pack, 12 if rung == "colocated" else 6
  if rung == "colocated":  # one step of four groups
    split, rows = dataclasses.replace(split, train_size=16), 16
  said = f"a Train unit has {rows} rows .*, the {role} lane holds {room}:"
  with pytest.raises(UserError, match=f"does not fit: {said}") as error:
    predict(table, WORK, split, RUNGS[rung])
  assert "\n" not in str(error.value)
  if rung == "rat":  # the lane that does not train may hold less
    predict(table, WORK, split, RUNGS["tag"])


@settings(max_examples=20, deadline=None)
@given(table=tables, work=workloads, rung=rungs, room=st.floats(1, 8),
       state=st.floats(0, 8))  # fmt: skip
def test_the_best_split_fits(table, work, rung, room, state):
  held = dict(max_rows=room, state_rows=state)
  trainer = dataclasses.replace(table.trainer, **held)
  rollout = dataclasses.replace(table.rollout, max_rows=room)
  table = CostTable(rollout, trainer, trainer, table.score)
  try:
    best = best_split(table, work, 5, RUNGS[rung])
  except UserError as error:
    assert "not even one sample" in str(error)
  else:
    assert why_not(table, work, best, RUNGS[rung]) == ""


@pytest.mark.parametrize(
  "devices, techniques, said",
  [
    (1, RUNGS["gap"], "no device is left for the trainer"),
    (0, RUNGS["colocated"], "no device is left for the colocated"),
  ],
)
def test_too_few_devices(devices, techniques, said):
  with pytest.raises(UserError, match=said):
    best_split(TABLE, WORK, devices, techniques)


def test_a_lane_of_a_number_that_does_not_divide():
  pairs = CostTable(dataclasses.replace(ROLE, shards=2), ROLE)
  with pytest.raises(UserError, match="multiple of 2"):
    predict(pairs, WORK, Split(3, 2, 4, 4, 4), RUNGS["gap"])
  with pytest.raises(UserError, match="cannot be divided among 2"):
    predict(TABLE, WORK, Split(3, 2, 4, 4, 4, 2), RUNGS["gap"])


def test_a_ladder_has_one_bound_and_is_climbed():
  found = ladder(TABLE, WORK, best_splits(TABLE, WORK, 4))
  assert len({p.bound_seconds for p in found.values()}) == 1
  seconds = {name: p.step_seconds for name, p in found.items()}
  assert seconds["rat"] < seconds["tsp"] <= seconds["sequential"]
  assert found["tcss"].bound_seconds / seconds["tcss"] > 0.9
  rows = ladder_rows(seconds, found["tcss"].bound_seconds)
  assert rows[1]["ratio_to_sequential"] == 1.0
  assert rows[-1]["ratio_to_colocated"] == pytest.approx(
    seconds["colocated"] / seconds["tcss"]
  )
  text = ladder_text(seconds, found["tcss"].bound_seconds)
  assert len(text.splitlines()) == 2 + len(RUNGS)
  longest = max(text.splitlines(), key=lambda line: line.count("█"))
  assert longest.startswith(("sequential", "colocated"))
  chart = ladder_chart(seconds, found["tcss"].bound_seconds)
  assert chart.count('class="bar"') == len(RUNGS)
  assert 'class="mark"' in chart


def test_published_setups():
  found = published.simulate_setup("hunyuan-video", 20, 0.4)
  seconds = [p.step_seconds for p in list(found.values())[1:]]
  # No rung is slower than the one below it by more than 3 %.
  assert all(b <= 1.03 * a for a, b in itertools.pairwise(seconds))
  assert found["tcss"].bound_seconds / seconds[-1] > 0.9
  mixed = published.simulate_setup("flux-dev", 20, 0.4, "16 A100 + 16 H100")
  assert mixed["tcss"].step_seconds < mixed["colocated"].step_seconds
