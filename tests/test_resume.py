"""Stopping and going on: the same end, whatever happened on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from digen_jax import runs, training
from digen_jax.config import from_config_dict
from digen_jax.errors import UserError
from digen_jax.metrics import read_metrics
from tests.arrays import to_host
from tests.small_run import distance, small_config, write_prompts

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parents[1]


def final_params(config, workdir):
  """State of a finished run; its split need not be that of `config`."""
  job = training.Run(from_config_dict(config), workdir)
  assert job.step == config.steps
  island = job.trainer.island
  stored = to_host(island.checkpoints.load(job.step, island.state))
  params = to_host(island.state)
  job.close()
  jax.tree.map(np.testing.assert_array_equal, params, stored)
  return params


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """Config of a run of three steps, and where it was stopped after two."""
  folder = tmp_path_factory.mktemp("stopped")
  config = small_config(write_prompts(folder))
  config.steps = 2
  training.train(from_config_dict(config), folder / "run")
  config.steps = 3
  return config, folder / "run"


def test_resumed_run_equals_the_uninterrupted_one(stopped, tmp_path):
  config = stopped[0].copy_and_resolve_references()
  config.checkpoint_every = 2
  training.train(from_config_dict(config), tmp_path / "whole")
  shutil.copytree(stopped[1], tmp_path / "parts")
  result = training.train(from_config_dict(config), tmp_path / "parts")
  whole = final_params(config, tmp_path / "whole")
  parts = final_params(config, tmp_path / "parts")
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  rows = [
    read_metrics(tmp_path / d / "metrics.jsonl") for d in ("whole", "parts")
  ]
  assert [r["step"] for r in rows[1]] == [0, 1, 2]
  for name in ("reward_mean", "grad_norm", "ratio_mean"):
    assert [r[name] for r in rows[0]] == [r[name] for r in rows[1]]
  row = rows[1][-1]  # all that was trained this time
  busy = [f"{n} {part:.0%} busy" for n, part in row["busy_fraction"].items()]
  assert result["lanes"].startswith(", ".join(busy))
  assert f"; {row['step_seconds']:.3g} s a step" in result["lanes"]


@pytest.mark.slow
def test_resumed_on_other_meshes_it_ends_the_same(stopped, tmp_path):
  """But for rounding."""
  found = []
  for rollout, trainer in ((1, 1), (2, 6), (5, 3)):
    config = stopped[0].copy_and_resolve_references()
    config.mesh.rollout, config.mesh.trainer = rollout, trainer
    workdir = shutil.copytree(stopped[1], tmp_path / f"{rollout}+{trainer}")
    training.train(from_config_dict(config), workdir)
    found.append(final_params(config, workdir)["trainable"])
  for other in found[1:]:
    assert 0 < distance(found[0], other) < 1e-4


def test_another_run_in_the_directory_is_refused(stopped, tmp_path):
  workdir = shutil.copytree(stopped[1], tmp_path / "run")
  config = stopped[0].copy_and_resolve_references()
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
  other = stopped[0].copy_and_resolve_references()
  other.seed, other.prompts = 1, str(tmp_path / "prompts.txt")
  Path(other.prompts).write_text("a green circle\n")  # not embedded yet
  with pytest.raises(UserError, match=r"config\.seed=0, not 1"):
    training.train(from_config_dict(other), workdir)

  moved = shutil.copytree(config.checkpoint, tmp_path / "flux")
  config.checkpoint = str(moved)
  training.Run(from_config_dict(config), workdir).close()
  weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(weights)
  tensors["proj_out.bias"] += 1
  save_file(tensors, weights)
  with pytest.raises(UserError, match="flux holds other files"):
    training.train(from_config_dict(config), workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_a_failed_evaluation_loses_nothing(stopped, tmp_path, monkeypatch):
  workdir = shutil.copytree(stopped[1], tmp_path / "run")
  config = from_config_dict(stopped[0])
  evaluate = training.Run.evaluate

  def down(_):
    raise UserError("the reward server is down")

  monkeypatch.setattr(training.Run, "evaluate", down)
  with pytest.raises(UserError, match="server is down"):
    training.train(config, workdir)
  monkeypatch.setattr(training.Run, "evaluate", evaluate)
  trained = (workdir / "metrics.jsonl").read_bytes()
  training.train(config, workdir)
  assert (workdir / "metrics.jsonl").read_bytes() == trained
  rows = json.loads((workdir / "evaluation.json").read_text())
  assert [row["step"] for row in rows] == [0, 2, 3]


@pytest.mark.parametrize(
  ("owner", "name", "lines"),
  [
    (training.Run, "evaluate", [0, 1, 2]),
    (training, "write_report", [0, 1, 2]),
    (training.Run, "_metrics", [0, 2]),  # trained, but of no line
  ],
)
def test_what_fails_after_a_step_loses_nothing(
  owner, name, lines, prompts_file, tmp_path, monkeypatch
):
  config = small_config(prompts_file)
  config.eval_every, config.checkpoint_every = 2, 0
  config = from_config_dict(config)
  called = getattr(owner, name)
  calls = []

  def down(*args):
    calls.append(args)
    if len(calls) == 2:  # after two steps
      raise UserError("the server is down")
    return called(*args)

  monkeypatch.setattr(owner, name, down)
  with pytest.raises(UserError, match="server is down") as told:
    training.train(config, tmp_path)
  assert told.value.__notes__ == [training.SAVED]
  training.train(config, tmp_path)
  rows = read_metrics(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == lines
  rows = json.loads((tmp_path / "evaluation.json").read_text())
  assert [row["step"] for row in rows] == [0, 2, 3]


CONFIG_FILE = """
from tests.small_run import small_config

def get_config():
  config = small_config({prompts!r})
  config.steps = 5
  config.checkpoint_every = 1
  config.eval_every = 2
  config.devices = 2
  return config
"""


def launch_train(config_file, workdir):
  return subprocess.Popen(
    [
      sys.executable,
      ROOT / "launch" / "train.py",
      f"--config={config_file}",
      f"--workdir={workdir}",
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def saved_state(workdir):
  """Arrays of the newest checkpoint, and the metrics rows."""
  job = training.Run(runs.read_config(workdir), workdir)
  state = to_host(job.trainer.island.state)
  assert job.step == 5
  job.close()
  rows = read_metrics(workdir / "metrics.jsonl")
  return state, [(r["step"], r["reward_mean"], r["grad_norm"]) for r in rows]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_ends_the_same(
  seed, prompts_file, tmp_path
):
  file = tmp_path / "config.py"
  file.write_text(CONFIG_FILE.format(prompts=str(prompts_file)))
  began = time.monotonic()
  assert launch_train(file, tmp_path / "whole").wait() == 0
  whole_seconds = time.monotonic() - began
  rng = random.Random(seed)
  kills = 0
  while True:
    process = launch_train(file, tmp_path / "killed")
    try:
      aim = rng.uniform(0.3, 0.9) * whole_seconds if kills < 2 else None
      process.wait(aim)
    except subprocess.TimeoutExpired:
      os.kill(process.pid, signal.SIGKILL)
      process.wait()
      kills += 1
      continue
    assert process.returncode == 0
    if kills:
      break
    # The machine has become faster: the run was through before it was killed.
    shutil.rmtree(tmp_path / "killed")
    whole_seconds *= 0.7
  whole, killed = (saved_state(tmp_path / d) for d in ("whole", "killed"))
  jax.tree.map(np.testing.assert_array_equal, whole[0], killed[0])
  assert whole[1] == killed[1]
