"""One GRPO run on every mode and split: the same gradients, the same result."""

import jax
import numpy as np
import pytest

from digen_jax import training
from digen_jax.config import from_config_dict
from digen_jax.pipeline.units import Kind
from tests.arrays import to_host
from tests.small_run import distance, small_config, write_prompts

SPLITS = {
  "colocated": ("colocated", 1, 1, {"gap": False, "tsp": False}),
  "sequential": ("disaggregated", 1, 1, {"gap": False, "tsp": False}),
  "gap": ("disaggregated", 1, 1, {"tsp": False}),
  "gap+tsp": ("disaggregated", 1, 1, {}),
  "gap+tsp 2+6": ("disaggregated", 2, 6, {}),
  "gap+tsp 5+3": ("disaggregated", 5, 3, {}),
}


def run(config, workdir, steps):
  """(gradient of every update, final parameters, metrics, spans)."""
  job = training.Run(from_config_dict(config), workdir)
  gradients, rows, spans = [], [], []
  trainer = job.trainer.island
  rollout = job.team.links[job.team.rollouts[0]].island
  update = trainer.update

  def recorded(*args):
    gradients.append(to_host(trainer.total))
    return update(*args)

  trainer.update = recorded
  for _ in range(steps):
    row, step_spans = job.train_one_step()
    rows.append(row)
    spans += step_spans
  params = to_host(trainer.state["trainable"])
  published = to_host(rollout.published)
  jax.tree.map(np.testing.assert_array_equal, params, published)
  job.close()
  return gradients, params, rows, spans


def split_config(name, prompts_file):
  mode, rollout, trainer, switches = SPLITS[name]
  config = small_config(prompts_file)
  # Advantages cancel in the sum of few samples, and rounding does not.
  config.batch.prompts, config.batch.group_size = 6, 16
  config.pipeline.mode = mode
  config.pipeline.update(switches)
  config.mesh.rollout, config.mesh.trainer = rollout, trainer
  return config


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  folder = tmp_path_factory.mktemp("reference")
  config = split_config("colocated", write_prompts(folder))
  return run(config, folder / "run", 3)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n == "gap+tsp 2+6"))
    for n in list(SPLITS)[1:]
  ],
)
def test_every_split_gives_the_same_gradient(
  name, reference, prompts_file, tmp_path
):
  gradients, params, rows, spans = run(
    split_config(name, prompts_file), tmp_path / "run", 3
  )
  assert distance(reference[0][0], gradients[0]) < 1e-6
  assert distance(reference[1], params) < 1e-4
  assert all(row["ratio_max_abs_log"] <= 1e-6 for row in rows)
  ran = [s for s in spans if s.args["step"] == 0]
  trained = [s for s in ran if s.name == Kind.TRAIN]
  packs = 1 if "tsp" in name else 2
  dead = rows[0]["zero_std_groups"]
  assert len(trained) == (6 - dead) * packs
  if name == "sequential":
    scored = max(s.end for s in ran if s.name == Kind.SCORE)
    assert min(s.start for s in trained) >= scored


def test_reference_learns_something(reference):
  gradients, _, rows, _ = reference
  assert distance(gradients[0], gradients[1]) > 0.1
  assert rows[0]["grad_norm"] > 0
  assert rows[0]["zero_std_groups"] < 6


def test_evaluations_are_scored_by_the_threads_that_score(
  prompts_file, tmp_path
):
  """Stale samples may be scored meanwhile; `reward_slots` bounds all calls."""
  (tmp_path / "rewards.py").write_text(
    "import threading\n"
    "def aside(images, prompts):\n"
    "  name = threading.current_thread().name\n"
    "  return [float(name.startswith('reward_'))] * len(prompts)\n"
  )
  config = split_config("gap+tsp", prompts_file)
  config.reward = f"{tmp_path}/rewards.py:aside"
  config.pipeline.reward_timeout = 0.0  # else calls have threads of their own
  job = training.Run(from_config_dict(config), tmp_path / "run")
  assert job.evaluate().rewards.min() == 1.0
  job.close()
