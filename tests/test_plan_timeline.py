"""Costs of an earlier run, read from its timeline."""

import dataclasses
import json

import pytest

from digen_jax import plan_basis, planning
from digen_jax.errors import UserError
from digen_jax.pipeline.cost_table import (
  Rate,
  lane_costs,
  read_table,
  write_table,
)
from digen_jax.pipeline.planner import (
  RUNGS,
  Split,
  cut,
  make_lanes,
  predict,
)
from digen_jax.pipeline.scheduler import start_step
from digen_jax.pipeline.simulate import simulate
from digen_jax.pipeline.splits import best_split
from digen_jax.pipeline.units import Kind, Workload
from digen_jax.timeline import Span, write_trace
from tests.small_costs import TABLE, WORK, small_config


def timeline_of(path, **record):
  """A run of three steps, and what it wrote about its lanes."""
  spans = []
  for step in range(3):
    at, seconds = {"step": step}, 1.0 + (step < 2)  # the last on other lanes
    spans += [
      Span("generate", "rollout", 0.0, seconds, at | {"size": 8}),
      Span("train", "trainer", 0.0, seconds, at | {"size": 16}),
      Span("update", "trainer", 0.0, 0.5, at | {"size": 0}),
      Span("score", "host", 0.0, 0.8, at | {"size": 8}),
    ]
  write_trace(path / "timeline.json", spans)
  meshes = {"rollout": {"data": 2}, "trainer": {"fsdp": 4}}
  (path / "config.json").write_text(json.dumps({"meshes": meshes} | record))
  return plan_basis.from_timeline(small_config(), path / "timeline.json")


def test_units_measured_in_one_size_keep_it(tmp_path):
  basis = timeline_of(tmp_path)
  assert not basis.table.resize and basis.devices == 6
  work = Workload(4, 8, 2, generate_size=8, train_size=8, pack=2)
  plan = planning.make_plan(small_config(), work, basis, 6)
  for prediction in plan.best.values():
    split = prediction.split
    assert (split.generate_size, split.train_size) == (8, 8)
  assert planning.ONE_SIZE in plan.assumed
  assert planning.ONE_SIZE in planning.plan_text(plan)
  write_table(tmp_path / "costs.json", basis.table)
  assert not read_table(tmp_path / "costs.json").resize
  # With the fixed part free to vanish, units would be as small as they get.
  free = dataclasses.replace(basis.table, resize=True)
  assert best_split(free, work, 6, RUNGS["tsp"]).train_size < 8


def test_a_run_that_moved_counts_from_where_it_is(tmp_path):
  both = timeline_of(tmp_path).table
  moved = timeline_of(tmp_path, placed_at_step=2).table
  assert both.rollout.generate == Rate(0.0, 2 / 4)
  assert moved.rollout.generate == Rate(0.0, 1 / 4)
  with pytest.raises(UserError, match="holds no generate unit"):
    timeline_of(tmp_path, placed_at_step=3)
  with pytest.raises(UserError, match="holds no generate unit"):
    timeline_of(tmp_path, meshes={"colocated": {"fsdp": 2}})


def test_the_devices_of_an_earlier_run(tmp_path):
  kinds = {"rollout": "NVIDIA A100-SXM4-80GB", "trainer": "NVIDIA H100 PCIe"}
  basis = timeline_of(tmp_path, devices=kinds)
  assert basis.apart and basis.peaks == {"rollout": 312, "trainer": 756}
  basis = timeline_of(tmp_path, devices=dict.fromkeys(kinds, "cpu"))
  assert not basis.apart and basis.peaks == {}
  assert plan_basis.peaks_of({"colocated": "TPU v4"})["trainer"] == 275


def test_lanes_of_a_timeline_are_of_their_roles(tmp_path):
  at = {"step": 0, "size": 8}
  spans = [
    Span("generate", "rollout0", 0.0, 1.0, at),
    Span("generate", "rollout1", 0.0, 1.0, at),
    Span("train", "trainer", 1.0, 2.0, at),
    Span("update", "trainer", 2.0, 2.5, at | {"size": 0}),
  ]
  path = tmp_path / "timeline.json"
  write_trace(path, spans)
  names = ("rollout0", "rollout1", "trainer")
  meshes = {name: {"data": 2} for name in names}
  kinds = dict.fromkeys(names, "NVIDIA H100 80GB HBM3")
  record = {"meshes": meshes, "devices": kinds}
  (tmp_path / "config.json").write_text(json.dumps(record))
  basis = plan_basis.from_timeline(small_config(), path)
  assert basis.devices == 6
  assert set(basis.peaks) == {"rollout", "trainer"}
  assert basis.table.rollout.seconds(Kind.GENERATE, 8, 2) == pytest.approx(1.0)


def test_a_tensor_parallel_timeline_is_read_as_one(tmp_path):
  at = {"step": 0}
  spans = [
    Span("generate", "rollout", 0.0, 1.0, at | {"size": 8}),
    Span("train", "trainer", 1.0, 2.0, at | {"size": 8}),
    Span("update", "trainer", 2.0, 2.5, at | {"size": 0}),
  ]
  path = tmp_path / "timeline.json"
  write_trace(path, spans)
  meshes = {"rollout": {"data": 2}, "trainer": {"fsdp": 2, "tensor": 4}}
  (tmp_path / "config.json").write_text(json.dumps({"meshes": meshes}))
  table = plan_basis.from_timeline(small_config(), path).table
  assert (table.rollout.shards, table.trainer.shards) == (1, 4)
  assert table.trainer.seconds(Kind.TRAIN, 8, 8) == pytest.approx(1.0)
  assert table.trainer.seconds(Kind.TRAIN, 1, 8) == pytest.approx(0.25)


def test_a_timeline_file_and_its_devices(tmp_path):
  techniques, split = RUNGS["tsp"], Split(2, 4, 4, 4, 4)
  lanes, places = make_lanes(split, techniques)
  state = start_step(cut(WORK, split, techniques), 0)
  spans = simulate(state, lanes, lane_costs(TABLE, places))
  path = tmp_path / "timeline.json"
  write_trace(path, spans)
  meshes = {"rollout": {"data": 2}, "trainer": {"fsdp": 4, "tensor": 1}}
  (tmp_path / "config.json").write_text(json.dumps({"meshes": meshes}))
  table = plan_basis.from_timeline(small_config(), path).table
  took = max(span.end for span in spans)
  predicted = predict(table, WORK, split, techniques).step_seconds
  assert predicted == pytest.approx(took, rel=1e-3)
  with pytest.raises(UserError, match="does not exist"):
    plan_basis.from_timeline(small_config(), tmp_path / "none.json")
