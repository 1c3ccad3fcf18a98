"""`mesh="auto"`: measured costs decide, and a resumed run keeps its split."""

import dataclasses
import json
import types

import pytest

from digen_jax import auto_split, training
from digen_jax.config import Config, Mesh, Pipeline, from_config_dict
from digen_jax.errors import UserError
from digen_jax.links import Hardware
from digen_jax.pipeline.cost_table import (
  CostTable,
  Measured,
  Rate,
  RoleCosts,
)
from digen_jax.pipeline.units import Kind, Workload
from digen_jax.program import Program
from digen_jax.run_files import RunFiles
from tests.small_run import small_config

pytestmark = pytest.mark.usefixtures("compiled_quickly")

WORK = Workload(groups=16, group_size=24, window=2, pack=2)


def measured(generate, train, work=WORK):
  """Units on four devices each; seconds of a whole group."""
  found = []
  for size in (work.group_size, work.group_size // 2):
    seconds = size / work.group_size
    rows = size * work.pack
    found += [
      Measured("rollout", Kind.GENERATE, size, generate * seconds),
      Measured("trainer", Kind.TRAIN, rows, train * seconds),
    ]
  return found


@pytest.mark.parametrize(
  ("generate", "train", "rollout"), [(3, 1, 6), (1, 3, 2), (1, 1, 4)]
)
def test_the_role_with_more_work_gets_more_devices(generate, train, rollout):
  # Without TAG and RAT a lane does its own work only.
  costs = measured(generate, train)
  choice = auto_split.choose(costs, WORK, Pipeline(), 8)
  assert choice.placed(Mesh()) == Mesh(rollout, 8 - rollout)
  best, equal = choice.best.step_seconds, choice.equal.step_seconds
  assert best <= equal
  assert (best < 0.9 * equal) == (rollout != 4)
  assert f"{rollout} + {8 - rollout} devices" in str(choice)


def test_units_keep_their_sizes():
  choice = auto_split.choose(measured(3, 1), WORK, Pipeline(), 8)
  sizes = choice.best.split.generate_size, choice.best.split.train_size
  assert sizes == (24, 24)


def test_a_gain_within_the_noise_moves_nothing(monkeypatch):
  work = Workload(groups=16, group_size=100_000, window=2, pack=2)
  costs = measured(1.08, 1, work)
  choice = auto_split.choose(costs, work, Pipeline(), 32)
  assert choice.best == choice.equal
  monkeypatch.setattr(auto_split, "WORTH", 0.0)
  choice = auto_split.choose(costs, work, Pipeline(), 32)
  assert choice.placed(Mesh()) == Mesh(17, 15)


def test_what_is_not_measured_is_said():
  choice = auto_split.choose(measured(1, 1), WORK, Pipeline(), 8)
  assert "the rewards count as nothing" in str(choice)


def test_a_split_that_does_not_fit_is_not_chosen():
  # Equal lanes would be best, but a trainer of four holds the state alone.
  rollout = RoleCosts(generate=Rate(row=1.0), train=Rate(row=1.0))
  trainer = dataclasses.replace(rollout, max_rows=30, state_rows=100)
  table, work = CostTable(rollout, trainer), Workload(16, 24, 1)
  choice = auto_split.compare(table, work, Pipeline(), 8)
  assert choice.best == choice.equal
  assert choice.placed(Mesh()) == Mesh(3, 5)  # 5 x (30 - 20) rows
  free = dataclasses.replace(table, trainer=rollout)
  choice = auto_split.compare(free, work, Pipeline(), 8)
  assert choice.placed(Mesh()) == Mesh(4, 4)


def test_a_run_that_moves_says_since_when(tmp_path):
  def placed(step, **sizes):
    hardware = {
      name: Hardware({"data": n}, n, n, "cpu") for name, n in sizes.items()
    }
    RunFiles(tmp_path, Config(), hardware, step).close()
    record = json.loads((tmp_path / "config.json").read_text())
    return record["placed_at_step"]

  assert placed(0, rollout=2, trainer=2) == 0
  assert placed(5, rollout=2, trainer=2) == 0
  assert placed(8, rollout=1, trainer=3) == 8
  assert placed(9, rollout=1, trainer=3) == 8
  assert placed(0, rollout=1, trainer=3) == 0


def test_smaller_units_are_legal():
  assert auto_split.smaller(WORK).generate_size == 12
  work = Workload(groups=6, group_size=4, window=1, generate_size=12)
  assert auto_split.smaller(work).generate_size == 4  # 6 is no whole group


def auto_config(prompts_file):
  config = small_config(prompts_file)
  config.mesh.rollout = config.mesh.trainer = "auto"
  return config


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_there_must_be_something_to_choose(mode, prompts_file):
  config = auto_config(prompts_file)
  config.pipeline.mode = mode
  config = from_config_dict(config)
  assert auto_split.wanted(config, 8) == (mode == "disaggregated")
  assert not auto_split.wanted(config, 2)


@pytest.mark.slow
def test_units_are_measured_in_two_sizes(prompts_file, tmp_path):
  run = training.Run(from_config_dict(small_config(prompts_file)), tmp_path)
  found = run.measure()
  assert {(m.lane, m.kind, m.size) for m in found} == {
    ("rollout", Kind.GENERATE, 8),
    ("rollout", Kind.GENERATE, 4),
    ("trainer", Kind.TRAIN, 16),
    ("trainer", Kind.TRAIN, 8),
  }
  assert all(m.seconds > 0 for m in found)
  run.close()


def test_a_run_is_placed_by_measured_costs_and_resumed_alike(
  prompts_file, tmp_path, monkeypatch
):
  config = auto_config(prompts_file)
  config.steps = 1
  config.eval.num_prompts = 1
  monkeypatch.setattr(
    auto_split,
    "measure",
    lambda programs, step: measured(1, 3, programs[0].work),
  )
  job = training.Run(from_config_dict(config), tmp_path)
  RunFiles(tmp_path, job.config, job.hardware, 0).close()
  job.save()
  job.close()
  meshes = json.loads((tmp_path / "config.json").read_text())["meshes"]
  sizes = {name: max(axes.values()) for name, axes in meshes.items()}
  assert sizes == {"rollout": 2, "trainer": 6}

  def never(programs, step):
    raise AssertionError("measured again")

  monkeypatch.setattr(auto_split, "measure", never)
  run = training.Run(from_config_dict(config), tmp_path)
  assert {n: h.size for n, h in run.hardware.items()} == sizes
  run.close()


@pytest.mark.parametrize(("room", "pack"), [(6, 6), (4, 3), (1, 1)])
def test_packs_are_as_large_as_memory_allows(room, pack):
  work = Workload(groups=2, group_size=2, window=6, pack=6)

  class Trial(Program):
    def __init__(self, team, work):
      self.team, self.work = team, work

    def measure(self, step, what=()):
      assert what == [("trainer", Kind.TRAIN)]
      if self.work.pack > room:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory on GPU_0")
      return []

  hardware = Hardware({"fsdp": 1}, 1, 1, "NVIDIA H100")
  links = {"trainer": types.SimpleNamespace(hardware=hardware)}
  run = types.SimpleNamespace(
    config=Config(),
    work=work,
    team=types.SimpleNamespace(learners=("trainer",), links=links),
    _program=Trial,
  )
  assert training.Run._fitting(run).pack == pack
  room = 0
  with pytest.raises(
    UserError, match=r"2 samples x 1 trained .*train_size, set"
  ):
    training.Run._fitting(run)
  run.config = from_config_dict({"pipeline": {"timesteps_per_pack": 3}})
  run.work = work = dataclasses.replace(work, pack=3)
  with pytest.raises(
    UserError, match=r"x 3 trained .* or .*timesteps_per_pack"
  ):
    training.Run._fitting(run)
  room = 3
  assert training.Run._fitting(run) == work
  run.team.links["trainer"] = types.SimpleNamespace(
    hardware=dataclasses.replace(hardware, device_kind="cpu")
  )
  room = 0
  assert training.Run._fitting(run) is work
