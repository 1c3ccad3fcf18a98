"""Bad input: one line, before expensive work, and the run directory intact."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from digen_jax import assemble, assets, island, training
from digen_jax.config import from_config_dict
from digen_jax.errors import UserError
from digen_jax.lanes import lane_axes
from digen_jax.pipeline.execute import UnitError
from digen_jax.pipeline.units import Kind
from tests.arrays import to_host
from tests.small_run import small_config

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parents[1]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def refused(config, tmp_path, words):
  """`training.Run` raises one line that has `words`; nothing is written."""
  with pytest.raises(UserError, match=words) as error:
    training.Run(from_config_dict(config), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.fixture
def checkpoint(tmp_path):
  return Path(shutil.copytree(assets.path("tiny_flux"), tmp_path / "flux"))


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (None, "does not exist"),
    (b"", "no prompt"),
    (b"\n  \n\n", "no prompt"),
    (b"a red circle\n\xff\xfe bad\n", "line 2.*UTF-8|UTF-8.*line 2"),
  ],
)
def test_prompt_files(content, words, prompts_file, tmp_path):
  file = tmp_path / "bad.txt"
  if content is not None:
    file.write_bytes(content)
  config = small_config(file)
  refused(config, tmp_path, words)


def test_blank_lines_between_prompts_are_fine(tmp_path):
  from digen_jax.data.prompts import read_prompts

  file = tmp_path / "p.txt"
  file.write_bytes("\ufeffa red circle\r\n\r\n  \nthree green squares".encode())
  assert read_prompts(file) == ["a red circle", "three green squares"]


def test_accelerators_are_not_left_idle_by_mistake(prompts_file, monkeypatch):
  config = small_config(prompts_file)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with pytest.raises(UserError, match=r"2 of 8 gpu devices: .* hide them"):
    lane_axes(from_config_dict(config))
  config.mesh.trainer = "auto"
  assert lane_axes(from_config_dict(config))["trainer"]["fsdp"] == 7


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_that_the_reward_cannot_read(held_out, prompts_file, tmp_path):
  file = tmp_path / "bad.txt"
  file.write_text("a red circle\nthree cats\nthree green squares\n")
  config = small_config(prompts_file if held_out else file)
  config.eval.prompts = str(file)
  refused(config, tmp_path, '"three cats" is outside the grammar')


def edit_tensors(checkpoint, edit):
  tensors = load_file(checkpoint / WEIGHTS)
  edit(tensors)
  save_file(tensors, checkpoint / WEIGHTS)


def test_missing_file(checkpoint, prompts_file, tmp_path):
  (checkpoint / "vae" / "config.json").unlink()
  config = small_config(prompts_file)
  config.checkpoint = str(checkpoint)
  refused(config, tmp_path, r"lacks vae/config\.json")


def test_truncated_weights(checkpoint, prompts_file, tmp_path):
  file = checkpoint / WEIGHTS
  file.write_bytes(file.read_bytes()[:-100])
  config = small_config(prompts_file)
  config.checkpoint = str(checkpoint)
  refused(config, tmp_path, "diffusion_pytorch_model.*truncated")


@pytest.mark.parametrize(
  ("edit", "words"),
  [
    (lambda t: t.pop("x_embedder.weight"), "'x_embedder.weight'.*missing"),
    (
      lambda t: t.update({"x_embedder.weight": np.ones((3, 4), np.float32)}),
      r"'x_embedder.weight'.*is \[3, 4\]",
    ),
    (
      lambda t: t.update({"extra.weight": np.ones(2, np.float32)}),
      "'extra.weight'.*not part of",
    ),
  ],
)
def test_tensors(edit, words, checkpoint, prompts_file, tmp_path):
  edit_tensors(checkpoint, edit)
  config = small_config(prompts_file)
  config.checkpoint = str(checkpoint)
  refused(config, tmp_path, words)


@pytest.mark.parametrize(
  ("rollout", "trainer", "words"),
  [
    (4, 5, "there are 8"),
    ({"tensor": 3}, 1, "tensor.*3.*does not divide"),
    (1, {"tensor": 3}, "tensor.*3.*does not divide"),
  ],
)
def test_devices(rollout, trainer, words, prompts_file, tmp_path):
  config = small_config(prompts_file)
  config.mesh.rollout, config.mesh.trainer = rollout, trainer
  refused(config, tmp_path, words)


def test_image_size(prompts_file, tmp_path):
  config = small_config(prompts_file)
  config.sampling.height = 36
  refused(config, tmp_path, r"config\.sampling\.height=36 must be")


def test_lora_target(prompts_file, tmp_path):
  config = small_config(prompts_file)
  config.train.lora_rank, config.train.lora_targets = 4, ("nothing",)
  refused(config, tmp_path, "'nothing' matches no linear layer")


REWARD = """
import numpy as np
calls = 0
def nan(images, prompts):
  return [float("nan")] * len(prompts)
def short(images, prompts):
  return [0.0] * (len(prompts) - 1)
def broken(images, prompts):
  raise RuntimeError("the server is down")
def later(images, prompts):
  # Fine for the probe and the first evaluation, not for the first step.
  global calls
  calls += 1
  return np.full(len(prompts), 0.5 if calls < 3 else np.nan)
"""


@pytest.mark.parametrize(
  ("function", "words"),
  [
    ("nan", "returned nan for sample 0, prompt"),
    ("short", "one float per sample"),
    ("broken", "raised RuntimeError: the server is down"),
  ],
)
def test_rewards(function, words, prompts_file, tmp_path):
  (tmp_path / "rewards.py").write_text(REWARD)
  config = small_config(prompts_file)
  config.reward = f"{tmp_path}/rewards.py:{function}"
  refused(config, tmp_path, words)


def test_a_reward_that_fails_later_leaves_a_checkpoint(prompts_file, tmp_path):
  (tmp_path / "rewards.py").write_text(REWARD)
  config = small_config(prompts_file)
  config.reward = f"{tmp_path}/rewards.py:later"
  config.mesh.rollout, config.mesh.trainer = 1, 1
  with pytest.raises(UnitError, match=r"score unit of samples .* nan") as told:
    training.train(from_config_dict(config), tmp_path / "run")
  assert told.value.__notes__ == [training.SAVED]
  config.reward = "shapes"
  job = training.Run(from_config_dict(config), tmp_path / "run")
  assert job.step == 0
  job.close()


@pytest.mark.parametrize(
  ("updates", "kind", "number", "devices", "kept"),
  [
    (2, Kind.TRAIN, 0, 1, 0),
    (2, Kind.TRAIN, 1, 3, 0),
    (2, Kind.UPDATE, 1, 2, 0),
    (2, Kind.PUBLISH, 0, 1, 1),
    (1, Kind.UPDATE, 0, 1, None),
  ],
)
def test_a_failure_loses_no_step_that_was_whole(
  updates, kind, number, devices, kept, prompts_file, tmp_path
):
  config = small_config(prompts_file)
  config.train.updates_per_batch = updates
  config.mesh.rollout, config.mesh.trainer = 1, devices
  config = from_config_dict(config)
  job = training.Run(config, tmp_path)
  job.train_one_step()  # no checkpoint: that of the failure is the first
  before = to_host(job.trainer.island.state)
  start = job.executor._starts[kind]

  def broken(lane, unit):
    if unit.update == number:
      down = mock.Mock(side_effect=RuntimeError("the network is down"))
      for method in ("_run", "outgoing"):
        setattr(job.trainer.island, method, down)
    return start(lane, unit)

  job.executor._starts = job.executor._starts | {kind: broken}
  with pytest.raises(UnitError, match=f"{kind.value} unit .* network") as told:
    job.train_one_step()
  note = training.LOST if kept is None else training.SAVED
  assert told.value.__notes__ == [note]
  state = to_host(job.trainer.island.state)
  if kept == 0 and number:  # what the failure has left makes room for it
    assert job.trainer.island.total is None
    assert not job.trainer.island._gradients
  job.close()
  again = training.Run(config, tmp_path)
  assert again.step == (0 if kept is None else 1 + kept)
  if kept is not None:
    found = to_host(again.trainer.island.state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    sent = to_host(again.team.links["rollout"].island.published)
    jax.tree.map(np.testing.assert_array_equal, sent, state["trainable"])
    same = [
      np.array_equal(*pair)
      for pair in zip(*map(jax.tree.leaves, (found, before)))
    ]
    assert all(same) if kept == 0 else not all(same)
  again.close()


def test_a_state_that_cannot_be_saved_does_not_hide_what_failed(
  prompts_file, tmp_path, monkeypatch
):
  config = small_config(prompts_file)
  job = training.Run(from_config_dict(config), tmp_path)
  full = mock.Mock(side_effect=OSError("no space left"))
  monkeypatch.setattr(job.trainer.island, "save", full)
  monkeypatch.setattr(
    job.trainer.island, "gradients", mock.Mock(side_effect=ValueError("nobody"))
  )
  with pytest.raises(UnitError, match=r"train unit .* nobody") as told:
    job.train_one_step()
  (note,) = told.value.__notes__
  assert "could not be saved: no space left" in note
  job.rescue(told.value)  # has been done
  assert told.value.__notes__ == [note]
  job.close()


def test_a_host_without_room_for_a_copy_still_trains(
  prompts_file, tmp_path, monkeypatch, caplog
):
  config = small_config(prompts_file)
  config.train.updates_per_batch = 2
  job = training.Run(from_config_dict(config), tmp_path)
  room = mock.Mock(side_effect=RuntimeError("RESOURCE_EXHAUSTED:\n host"))
  monkeypatch.setattr(island, "_in_memory", room)
  for _ in range(2):
    job.train_one_step()
  assert room.call_count == 1
  (line,) = [r.getMessage() for r in caplog.records if "XLA_PJRT" in r.msg]
  assert "(RESOURCE_EXHAUSTED: host)" in line and "\n" not in line
  update = job.trainer.island.update
  down = mock.Mock(side_effect=[update, RuntimeError("out of memory")])

  def second(expected):
    found = down()
    return found(expected)

  monkeypatch.setattr(job.trainer.island, "update", second)
  with pytest.raises(UnitError, match="out of memory") as told:
    job.train_one_step()
  assert told.value.__notes__ == [training.LOST]
  job.close()


def test_a_working_directory_that_hosts_do_not_share(
  prompts_file, tmp_path, monkeypatch
):
  config = small_config(prompts_file)
  sees = island.Island.sees

  def elsewhere(lane, file):
    assert sees(lane, file)
    return lane.lane.name != "rollout"

  monkeypatch.setattr(island.Island, "sees", elsewhere)
  with pytest.raises(UserError, match=r"lane 'rollout' does not see .*share"):
    training.train(from_config_dict(config), tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_is_only_measured_opens_no_checkpoints(
  prompts_file, tmp_path, monkeypatch
):
  monkeypatch.setattr(island.Island, "sees", lambda *_: False)
  config = from_config_dict(small_config(prompts_file))
  job = training.Run(config, tmp_path, resume=False)
  assert job.step == 0
  job.close()
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("split", [1, "auto"])
def test_weights_are_on_the_lanes_and_nowhere_else(
  split, prompts_file, tmp_path, monkeypatch
):
  config = small_config(prompts_file)
  config.mesh.rollout = config.mesh.trainer = split
  with_weights, read = assemble.with_weights, []

  def spy(*args, **kwargs):
    assembly = with_weights(*args, **kwargs)
    leaves = jax.tree.leaves(assembly.weights.trainable)
    read.extend(map(weakref.ref, leaves))
    return assembly

  monkeypatch.setattr(assemble, "with_weights", spy)
  job = training.Run(from_config_dict(config), tmp_path)
  gc.collect()
  assert read
  assert [ref() for ref in read if ref() is not None] == []
  job.close()


def test_a_gradient_that_is_not_finite_leaves_a_checkpoint(
  prompts_file, tmp_path, monkeypatch
):
  config = small_config(prompts_file)
  config.mesh.rollout, config.mesh.trainer = 1, 1
  job = training.Run(from_config_dict(config), tmp_path)
  job.train_one_step()
  island = job.trainer.island
  before = to_host(island.state)
  run = island._run

  def overflowing(name, *args):
    if name == "update":
      args = args[0], jax.tree.map(lambda x: x * jnp.inf, args[1])
    return run(name, *args)

  monkeypatch.setattr(island, "_run", overflowing)
  with pytest.raises(UnitError, match=r"update 0 is (nan|inf)") as told:
    job.train_one_step()
  assert told.value.__notes__ == [training.SAVED]
  job.close()
  again = training.Run(from_config_dict(config), tmp_path)
  assert again.step == 1
  found = to_host(again.trainer.island.state)
  jax.tree.map(np.testing.assert_array_equal, found, before)
  again.close()


def launch(script, *args, **env):
  return subprocess.run(
    [sys.executable, ROOT / "launch" / script, *args],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
    env=os.environ | env,
  )


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (
      ["--config=configs/none.py"],
      "config file configs/none.py does not exist",
    ),
    (
      ["--config=configs/tiny_shapes.py", "--config.batch.grup_size=3"],
      "config.batch.grup_size: did you mean config.batch.group_size?",
    ),
    (
      ["--config=configs/tiny_shapes.py", "--config.batch.group_size=1"],
      "config.batch.group_size must be at least 2",
    ),
    (["--config=configs/tiny_shapes.py", "--sed=1"], "'sed'"),
  ],
)
def test_launch_scripts_print_one_line(args, words, tmp_path):
  done = launch("train.py", f"--workdir={tmp_path}/run", *args)
  assert done.returncode != 0
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ")
  assert words in line
  assert not (tmp_path / "run").exists()


def test_pretraining_knows_its_own_fields(tmp_path):
  done = launch(
    "pretrain.py",
    f"--workdir={tmp_path}/p",
    "--config=configs/pretrain_shapes.py",
    "--config.flow_training.step=3",
  )
  assert done.returncode != 0
  (line,) = done.stderr.strip().splitlines()
  assert "did you mean config.flow_training.steps?" in line


def test_other_scripts_refuse_what_is_not_a_run(tmp_path, prompts_file):
  done = launch("export.py", f"--run={tmp_path}", f"--out={tmp_path}/out")
  assert done.returncode == 2
  assert "is not a run" in done.stderr
  json_file = tmp_path / "config.json"
  json_file.write_text(json.dumps({}))
  done = launch("evaluate.py", f"--run={tmp_path}", f"--prompts={prompts_file}")
  assert done.returncode == 2
  assert "is not a run" in done.stderr


@pytest.mark.parametrize("field", ["checkpoint", "prompts", "reward"])
def test_what_no_run_can_do_without(field, prompts_file, tmp_path):
  config = small_config(prompts_file)
  config[field] = ""
  refused(config, tmp_path, f"config.{field} is not set: give ")


def test_less_than_one_stale_unit(prompts_file, tmp_path):
  config = small_config(prompts_file)
  config.pipeline.tcss = 0.4
  refused(config, tmp_path, "tcss=0.4 of the 2 Generate units .* less than one")


HOLD = """
import sys
from pathlib import Path
from digen_jax import run_files
from digen_jax.errors import UserError
try:
  held = run_files.lock(Path(sys.argv[1]))
except UserError as error:
  print(error, flush=True)
else:
  print("held", flush=True)
  input()
"""


def hold(workdir):
  """Another process that locks a directory, and what it says."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, workdir],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  return process, process.stdout.readline()


def test_one_process_runs_in_a_directory(prompts_file, tmp_path, monkeypatch):
  config, workdir = from_config_dict(small_config(prompts_file)), tmp_path / "r"
  job = training.Run(config, workdir)
  process, said = hold(workdir)
  process.communicate("")
  assert "another process runs in" in said
  job.close()
  process, said = hold(workdir)
  assert said == "held\n"
  try:
    with monkeypatch.context() as patch:
      patch.setattr(training, "read_prompts", None)  # told before
      with pytest.raises(UserError, match="another process runs in"):
        training.Run(config, workdir)
  finally:
    process.communicate("")
  training.Run(config, workdir).close()


def test_what_ended_a_run_is_told_and_not_what_failed_then():
  def broken():
    raise OSError("the disk is gone")

  told = pytest.raises(UserError, match="reward is down")
  with told as error, training._closed(broken):
    raise UserError("the reward is down")
  assert error.value.__notes__ == ["(and at the end: the disk is gone)"]
  with pytest.raises(OSError, match="disk is gone"), training._closed(broken):
    pass


def test_what_a_run_has_open_is_closed_though_progress_cannot_be(
  prompts_file, tmp_path, monkeypatch
):
  closed = []

  def broken(self):
    raise BrokenPipeError("nobody reads")

  close = training.Run.close
  monkeypatch.setattr(training.Progress, "close", broken)
  monkeypatch.setattr(
    training.Run, "close", lambda self: closed.append(close(self))
  )
  config = small_config(prompts_file)
  config.steps = 1
  with pytest.raises(BrokenPipeError):
    training.train(from_config_dict(config), tmp_path)
  assert closed == [None]
  # The last checkpoint is whole, and a finished run is not evaluated again ...
  monkeypatch.undo()
  before = (tmp_path / "evaluation.json").read_text()
  told = []
  evaluate = training.Run.evaluate
  monkeypatch.setattr(
    training.Run, "evaluate", lambda self: told.append(1) or evaluate(self)
  )
  training.train(from_config_dict(config), tmp_path)
  assert not told and (tmp_path / "evaluation.json").read_text() == before
  # ... but with another reward.
  config.reward = "shapes_colour"
  training.train(from_config_dict(config), tmp_path)
  rows = json.loads((tmp_path / "evaluation.json").read_text())
  assert rows[:-1] == json.loads(before)
  assert told and "shapes_colour_mean" in rows[-1]
  # With the first again what was found before is told, and nothing made anew.
  told.clear()
  config.reward = "shapes"
  summary = training.train(from_config_dict(config), tmp_path)
  assert not told and summary["after"] == rows[-2]["reward_mean"]
