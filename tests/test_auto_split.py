"""`mesh="auto"`: measured costs decide, and a resumed run keeps its split."""

import json

import pytest

from digen_jax import auto_split, training
from digen_jax.config import Mesh, Pipeline, from_config_dict
from digen_jax.pipeline.cost_table import Measured
from digen_jax.pipeline.units import Kind, Workload
from tests.small_run import small_config

WORK = Workload(groups=16, group_size=8, window=2, pack=2)


def measured(generate, train, work=WORK, halves=4):
  """Units on four devices each; seconds of a whole group."""
  found = []
  for size in (work.generate_size or work.group_size, halves):
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
  assert choice.mesh == Mesh(rollout, 8 - rollout)
  best, equal = choice.best.step_seconds, choice.equal.step_seconds
  assert best <= equal
  assert (best < 0.9 * equal) == (rollout != 4)
  assert f"{rollout} + {8 - rollout} devices" in str(choice)


def test_units_keep_their_sizes():
  choice = auto_split.choose(measured(3, 1), WORK, Pipeline(), 8)
  sizes = choice.best.split.generate_size, choice.best.split.train_size
  assert sizes == (8, 8)


def test_a_gain_within_the_noise_moves_nothing():
  choice = auto_split.choose(measured(1.01, 1), WORK, Pipeline(), 8)
  assert choice.best == choice.equal


def test_smaller_units_are_legal():
  assert auto_split.smaller(WORK).generate_size == 4
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


def test_a_run_is_placed_by_measured_costs_and_resumed_alike(
  prompts_file, tmp_path, monkeypatch
):
  config = auto_config(prompts_file)
  config.steps = 1
  config.eval.num_prompts = 1
  seen = []

  def skewed(programs, step):
    seen.extend(measure(programs, step))
    return measured(3, 1, programs[0].work)

  measure = auto_split.measure
  monkeypatch.setattr(auto_split, "measure", skewed)
  training.train(from_config_dict(config), tmp_path)
  meshes = json.loads((tmp_path / "config.json").read_text())["meshes"]
  sizes = {name: max(axes.values()) for name, axes in meshes.items()}
  assert sizes["rollout"] > 4
  assert sizes["rollout"] + sizes["trainer"] == 8
  # What was really measured: each role's own work, in two sizes.
  assert {(m.lane, m.kind, m.size) for m in seen} == {
    ("rollout", Kind.GENERATE, 8),
    ("rollout", Kind.GENERATE, 4),
    ("trainer", Kind.TRAIN, 16),
    ("trainer", Kind.TRAIN, 8),
  }
  assert all(m.seconds > 0 for m in seen)

  def never(programs, step):
    raise AssertionError("measured again")

  monkeypatch.setattr(auto_split, "measure", never)
  config.steps = 2
  run = training.Run(from_config_dict(config), tmp_path)
  assert run.step == 1
  assert {n: h.size for n, h in run.hardware.items()} == sizes
  run.close()
