"""Lanes as Ray actors: shares of the machine, and the same result as here."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from digen_jax import cluster, serving, training
from digen_jax.config import from_config_dict
from digen_jax.errors import UserError
from digen_jax.evaluation import NOISE_SEED
from digen_jax.island import Island
from digen_jax.lanes import lane_axes, lane_gpus
from digen_jax.links import Hardware
from digen_jax.pipeline.execute import UnitError
from digen_jax.pipeline.units import Kind
from tests.small_run import distance, small_config


class FakeCluster:
  """What Ray says of hosts with these resources, of which some are free."""

  def __init__(self, *hosts, granted=True):
    gone = {"Alive": False, "Resources": {"GPU": 64.0, "TPU": 4.0}}
    self.hosts = [*({"Alive": True, "Resources": h} for h in hosts), gone]
    self.granted, self.groups = granted, []
    self.util = self

  def nodes(self):
    return self.hosts

  def available_resources(self):
    return {"GPU": 3.0}

  def placement_group(self, bundles):
    group = types.SimpleNamespace(bundles=bundles, wait=lambda _: self.granted)
    self.groups.append(group)
    return group

  def remove_placement_group(self, group):
    self.groups.remove(group)


@pytest.mark.parametrize(
  ("cores", "counts", "shares"),
  [
    ([0, 1], (1, 1), ((0,), (1,))),
    (range(8), (2, 6), ((0, 1), (2, 3, 4, 5, 6, 7))),
    ([4, 5, 6], (1, 7), ((4,), (5, 6))),
    ([3], (1, 1), ((), ())),  # too few: nobody is pinned
  ],
)
def test_cores_are_shared_by_devices(monkeypatch, cores, counts, shares):
  monkeypatch.setattr("os.sched_getaffinity", lambda _: set(cores))
  ray = FakeCluster({"CPU": 8.0})
  axes = {"rollout": {"data": counts[0]}, "trainer": {"fsdp": counts[1]}}
  sites = cluster.place(ray, axes)
  assert tuple(site.cores for site in sites.values()) == shares
  assert tuple(site.devices for site in sites.values()) == counts


def test_gpus_are_left_to_ray():
  ray = FakeCluster({"GPU": 4.0})
  axes = {"rollout": {"data": 1}, "trainer": {"fsdp": 2, "tensor": 1}}
  sites = cluster.place(ray, axes)
  assert [s.gpus for s in sites.values()] == [True, True]
  assert ray.groups[0].bundles == [{"GPU": 1}, {"GPU": 2}]
  assert [s.bundle for s in sites.values()] == [0, 1]
  assert [s.devices for s in sites.values()] == [1, 2]
  assert all(site.cores == () for site in sites.values())


TWO_KINDS = (
  {"GPU": 4.0, "accelerator_type:L4": 1.0},
  {"GPU": 4.0, "accelerator_type:L4": 1.0},
  {"GPU": 8.0, "accelerator_type:H100": 1.0},
)


@pytest.mark.parametrize(
  ("rollout", "rollout_gpu", "trainer", "trainer_gpu", "kinds"),
  [
    ([4, 4], "L4", 8, "H100", ["L4", "L4", "H100"]),
    ([4, 2], ["L4", "H100"], 6, "H100", ["L4", "H100", "H100"]),
    ([4, 4], ["L4", ""], 8, "H100", ["L4", "", "H100"]),
    (4, "", 8, "", ["", ""]),
    ([4, 2], ["L4"], 8, "", "one for each of the 2 rollout lanes"),
    (4, 100, 8, "", "takes a kind of GPU such as 'H100'.* got 100"),
    (4, "A100", 8, "", "kind 'A100' for the rollout lane, .* has H100, L4"),
    (6, "L4", 8, "", "rollout lane 6 L4 GPUs, and no host .* more than 4"),
    (4, "L4", "colocated", "H100", "set config.mesh.trainer_gpu alone"),
    (4, "", "colocated", "H100", ["H100"]),
    (4, "H100", 8, "H100", "asks for 12 H100 GPUs, but the cluster has 8"),
  ],
)
def test_lanes_are_given_the_kind_of_gpu_that_is_asked_for(
  monkeypatch,
  prompts_file,
  rollout,
  rollout_gpu,
  trainer,
  trainer_gpu,
  kinds,
):
  ray = FakeCluster(*TWO_KINDS)
  monkeypatch.setattr(cluster, "start", lambda: ray)
  config = small_config(prompts_file)
  config.pipeline.lanes = "ray"
  if trainer == "colocated":
    config.pipeline.mode, trainer = trainer, 4
  config.mesh.rollout, config.mesh.trainer = rollout, trainer
  config.mesh.rollout_gpu, config.mesh.trainer_gpu = rollout_gpu, trainer_gpu
  config = from_config_dict(config)
  if isinstance(kinds, str):
    with pytest.raises(UserError, match=kinds) as error:
      lane_axes(config)
    assert "\n" not in str(error.value)
    return
  axes = lane_axes(config)
  cluster.place(ray, axes, lane_gpus(config, axes))
  asked = [
    next((k for k in bundle if k != "GPU"), "")
    for bundle in ray.groups[0].bundles
  ]
  assert asked == [f"accelerator_type:{k}" * bool(k) for k in kinds]


@pytest.mark.parametrize(
  ("lanes", "mode", "message"),
  [
    ("local", "disaggregated", "choose among the GPUs of a cluster"),
    ("ray", "disaggregated", "choose among the GPUs of a cluster"),
    ("local", "colocated", "choose among the GPUs of a cluster"),
  ],
)
def test_kinds_of_gpu_that_mean_nothing_are_refused(
  monkeypatch, prompts_file, lanes, mode, message
):
  monkeypatch.setattr(cluster, "start", lambda: FakeCluster({"CPU": 2.0}))
  config = small_config(prompts_file)
  config.pipeline.lanes, config.pipeline.mode = lanes, mode
  config.mesh.rollout_gpu = "H100"
  with pytest.raises(UserError, match=message):
    lane_axes(from_config_dict(config))


def test_gpus_that_others_have_are_not_waited_for_without_end():
  ray = FakeCluster({"GPU": 4.0}, {"GPU": 4.0}, granted=False)
  axes = {"rollout": {"data": 3}, "trainer": {"fsdp": 2}}
  with pytest.raises(UserError) as error:
    cluster.place(ray, axes)
  assert "3 (rollout) + 2 (trainer) GPUs" in str(error.value)
  assert "hosts have [4, 4], of which 3 are free" in str(error.value)
  assert ray.groups == []  # others may have what was asked for


def test_cores_that_a_host_does_not_have_are_not_asked_for(monkeypatch):
  pinned = []
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
  monkeypatch.setattr("os.sched_setaffinity", lambda _, c: pinned.append({*c}))
  for cores in ((1, 2), (7, 8), ()):
    site = {"cores": cores, "devices": 1, "gpus": True, "axes": {}}
    cluster._server_class()(site, b"no run")
  assert pinned == [{1}]


@pytest.mark.slow
def test_gpus_are_reserved_for_all_lanes_at_once():
  """By Ray itself, which is told that there are some."""
  code = """
import types
import ray
from digen_jax import cluster
from digen_jax.errors import UserError
cluster.FREE_SECONDS = 3.0
ray.init(
  num_gpus=4,
  resources={"accelerator_type:L4": 1},
  include_dashboard=False,
  log_to_driver=False,
)
assert cluster.gpus(ray) == cluster.gpus(ray, "L4") == [4]
assert cluster.gpus(ray, "H100") == []
def place(*counts, kind="L4"):
  meshes = {f"lane{i}": {"data": n} for i, n in enumerate(counts)}
  return cluster.place(ray, meshes, dict.fromkeys(meshes, kind))
try:
  place(1, kind="H100")
except UserError as error:
  print(error)
sites = place(3, 1)
try:
  place(2)
except UserError as error:
  print(error)
lane = types.SimpleNamespace(name="lane0")  # an actor that fails has them, too
link = cluster.RayLink(ray, None, lane, sites["lane0"])
try:
  link.hardware
except ValueError as error:  # for there are none
  print(error)
link.stop()
assert len(place(2, 2)) == 2
print("reserved")
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
  )
  for lane in ("1 (lane0 H100)", "2 (lane0 L4)"):
    assert f"asks for {lane} GPUs" in done.stdout, done.stderr
  assert done.stdout.endswith("reserved\n"), done.stderr


@pytest.mark.parametrize(
  ("hosts", "rollout", "trainer", "message"),
  [
    ([4, 4], 6, 2, "gives the rollout lane 6 GPUs, and no host .* than 4"),
    ([4, 4], "auto", "auto", r"several hosts \(their GPUs: \[4, 4\]\)"),
    ([8], 2, 4, "uses 6 of 8 gpu devices"),
    ([4, 4], [4, 4], 4, "but there are 8"),
    ([4, 4], [3, 1], 4, None),
    ([4, 4], 2, 2, None),  # others may have the rest
    ([2], "auto", "auto", None),
  ],
)
def test_meshes_must_fit_the_hosts_of_a_cluster(
  monkeypatch, prompts_file, hosts, rollout, trainer, message
):
  ray = FakeCluster(*({"GPU": float(n)} for n in hosts))
  monkeypatch.setattr(cluster, "start", lambda: ray)
  monkeypatch.delenv("RAY_ADDRESS", raising=False)
  config = small_config(prompts_file)
  config.pipeline.lanes = "ray"
  config.mesh.rollout, config.mesh.trainer = rollout, trainer
  config = from_config_dict(config)
  if message is None:
    lane_axes(config)
  else:
    with pytest.raises(UserError, match=message):
      lane_axes(config)
  if hosts == [8]:  # of a cluster that was there before, others may have some
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    lane_axes(config)


def test_tpus_are_not_left_aside(monkeypatch, prompts_file):
  monkeypatch.setattr(cluster, "start", lambda: FakeCluster({"TPU": 4.0}))
  config = small_config(prompts_file)
  config.pipeline.lanes = "ray"
  with pytest.raises(UserError, match=r"TPUs: set .*lanes='local'"):
    lane_axes(from_config_dict(config))


def test_the_driver_of_actors_leaves_accelerators_to_them():
  code = (
    "from digen_jax.launching import start_run_devices\n"
    "from digen_jax.config import Config, Pipeline\n"
    "start_run_devices(Config(pipeline=Pipeline(lanes='{}'), devices=3))\n"
    "import jax\n"
    "print(jax.config.jax_platforms, jax.local_device_count())"
  )
  environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  said = [
    subprocess.run(
      [sys.executable, "-c", code.format(lanes)],
      env=environment,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.split()
    for lanes in ("ray", "local")
  ]
  assert said[0] == ["cpu", "1"]
  assert said[1][0] != "cpu"


def test_ray_missing_names_the_extra(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "ray", None)
  with pytest.raises(UserError, match=r"pip install 'digen-jax\[cluster\]'"):
    cluster.start()


class FakeIsland:
  mesh = None
  sees = Island.sees

  def update(self, expected):
    return {"grad_norm": jax.numpy.ones(())}

  def add(self, gradient):
    raise ValueError(f"no room for {gradient}")

  def generate(self):
    raise ZeroDivisionError

  def save(self):
    pass

  def switch(self, resharded):
    if resharded == "amiss":
      raise ZeroDivisionError
    return jax.numpy.ones(3)  # whole weights, in earnest


def test_a_failure_is_told_once_where_somebody_listens(monkeypatch):
  hardware = Hardware({"data": 1}, 1, 1, "cpu")
  monkeypatch.setattr(Hardware, "of", classmethod(lambda *_: hardware))
  served = serving.Served(FakeIsland())
  metrics = served.call("update", 0)
  assert isinstance(metrics["grad_norm"], np.ndarray | np.generic)
  assert served.call("switch", True) is None
  with pytest.raises(ValueError, match="no room for 3"):
    served.call("add", 3)  # nobody waits for it ...
  with pytest.raises(ValueError, match="no room for 3"):
    served.call("update", 1)  # ... so this one tells
  assert "grad_norm" in served.call("update", 0)
  served = serving.Served(FakeIsland())
  for call in (("generate",), ("switch", "amiss")):  # both are waited for
    with pytest.raises(ZeroDivisionError):
      served.call(*call)
  assert served.call("save") is None  # and the state can be saved after it
  assert "grad_norm" in served.call("update", 0)  # ... or the unit run again


def test_what_an_actor_sees_of_the_files_is_told(monkeypatch, tmp_path):
  monkeypatch.setattr(Hardware, "of", classmethod(lambda *_: None))
  served = serving.Served(FakeIsland())
  (tmp_path / "here").touch()
  seen = [served.call("sees", tmp_path / name) for name in ("here", "there")]
  assert seen == [True, False]


class Ref:
  """What an actor is making; it counts how often somebody fetches it."""

  def __init__(self):
    self.fetched = 0

  def future(self):
    self.fetched += 1
    future = concurrent.futures.Future()
    future.set_result(3)
    return future


def test_what_nobody_asks_for_stays_where_it_was_made():
  ref = Ref()
  remote = cluster.Remote(ref, "trainer")
  assert cluster._refs([1, remote]) == [1, ref]
  assert ref.fetched == 0
  assert remote.ready() and remote.ready()
  assert ref.fetched == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_actors_train_as_meshes_of_one_process_do(prompts_file, tmp_path):
  results = {}
  for lanes in ("local", "ray"):
    config = small_config(prompts_file)
    config.batch.prompts = 6
    config.pipeline.update(lanes=lanes, tag=True, rat=True, bts=False)
    config.steps, config.checkpoint_every = 4, 2
    config.mesh.rollout = config.mesh.trainer = 1
    run = training.Run(from_config_dict(config), tmp_path / lanes)
    run.warm_up()
    rows = []
    for step in range(4):
      if step == 2:  # stopped here and taken up again
        run.save()
        run.close()
        run = training.Run(from_config_dict(config), tmp_path / lanes)
        assert run.step == 2
      rows.append(run.train_one_step()[0])
    params = jax.device_get(run.trainer.call("averaged").result())
    rewards = run.evaluate().rewards
    run.close()
    results[lanes] = params, rewards
    assert all(row["ratio_max_abs_log"] <= 1e-6 for row in rows)
    assert all(set(row["trained_by"]) == {"rollout", "trainer"} for row in rows)
  (here, scored), (there, scored_there) = results["local"], results["ray"]
  assert distance(here, there) < 1e-6
  np.testing.assert_array_equal(scored, scored_there)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("victim", ["rollout", "trainer"])
def test_a_dead_actor_ends_the_run_in_one_line(victim, prompts_file, tmp_path):
  config = small_config(prompts_file)
  config.pipeline.lanes = "ray"
  config.pipeline.restarts = 0
  config.steps, config.checkpoint_every = 4, 2
  run = training.Run(from_config_dict(config), tmp_path)
  run.warm_up()
  run.train_one_step()
  pid = run.team.links[victim].apply(lambda _: os.getpid()).result()
  os.kill(pid, signal.SIGKILL)
  with pytest.raises(UnitError, match=f"process of lane '{victim}' has died"):
    run.train_one_step()
  run.close()
  again = training.Run(from_config_dict(config), tmp_path)
  # The trainer was there to save the state before the step, or was not.
  assert again.step == (1 if victim == "rollout" else 0)
  again.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_actors_go_back_to_the_state_before_a_failed_step(
  prompts_file, tmp_path
):
  config = small_config(prompts_file)
  config.pipeline.lanes = "ray"
  config.train.updates_per_batch = 2
  config.devices, config.mesh.trainer = 3, 2
  run = training.Run(from_config_dict(config), tmp_path)
  run.train_one_step()

  def state(run):
    return run.trainer.apply(lambda i: jax.device_get(i.state)).result()

  before, start = state(run), run.executor._starts[Kind.TRAIN]

  def broken(lane, unit):
    if unit.update == 1:
      raise ValueError("nobody there")
    return start(lane, unit)

  run.executor._starts = run.executor._starts | {Kind.TRAIN: broken}
  with pytest.raises(UnitError, match="nobody there") as told:
    run.train_one_step()
  assert told.value.__notes__ == [training.SAVED]
  run.close()
  again = training.Run(from_config_dict(config), tmp_path)
  assert again.step == 1
  jax.tree.map(np.testing.assert_array_equal, state(again), before)
  again.close()


MURDEROUS = """
import os
from pathlib import Path

def score(images, prompts):
  victim, taken = (Path(__file__).with_name(n) for n in ("victim", "taken"))
  if victim.exists() and not taken.exists():
    taken.touch()
    os.kill(int(victim.read_text()), 9)
  return images.mean((1, 2, 3))
"""


def note_calls(link, name, asked):
  call = link.call

  def noted(method, *args):
    asked.append(name)
    return call(method, *args)

  link.call = noted


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
  ("tag", "lanes"), [(False, 1), (True, 1), (False, [1, 1])]
)
def test_a_rollout_actor_that_dies_is_started_again(
  tag, lanes, prompts_file, tmp_path
):
  """In the middle of a step, and again in an evaluation: nothing is lost."""
  (tmp_path / "reward.py").write_text(MURDEROUS)
  config = small_config(prompts_file)
  config.batch.prompts = 6
  config.reward = f"{tmp_path / 'reward.py'}:score"
  config.pipeline.reward_slots = 1
  config.pipeline.update(lanes="ray", tag=tag, rat=True)
  config.steps, config.checkpoint_every = 4, 2
  config.mesh.rollout, config.mesh.trainer, config.devices = lanes, 1, 3
  found = {}
  for killed in (False, True):
    run = training.Run(from_config_dict(config), tmp_path / str(killed))
    run.warm_up()
    first, *_, last = [*run.team.rollouts] * 2
    for step in range(3):
      if killed and step == 1:
        pid = run.team.links[last].apply(lambda _: os.getpid()).result()
        (tmp_path / "victim").write_text(str(pid))
      row, _ = run.train_one_step()
      assert sum(row["generated_by"].values()) == 6  # prompts, a unit each
      assert row["ratio_max_abs_log"] <= 1e-6
    if killed:
      assert run.executor.restarts == config.pipeline.restarts - 1
      pid = run.team.links[first].apply(lambda _: os.getpid()).result()
      os.kill(pid, signal.SIGKILL)
    asked = []
    for name in run.team.rollouts:
      note_calls(run.team.links[name], name, asked)
    evaluated = run.evaluate()
    # Every lane took its part, with the noise of the whole.
    assert set(asked) == set(run.team.rollouts)
    if not killed:
      args = run.trainer.call("averaged"), run.held_out_conditioning, None
      call = run.team.links[first].call
      whole = call("sample", *args, NOISE_SEED).result()
      assert abs(whole.astype(int) - evaluated.images).max() <= 1
    run.train_one_step()
    params = jax.device_get(run.trainer.call("averaged").result())
    if killed:
      assert run.executor.restarts == config.pipeline.restarts - 2
    run.close()
    found[killed] = params, evaluated.rewards
  assert (tmp_path / "taken").exists()
  assert distance(found[False][0], found[True][0]) < 1e-6
  np.testing.assert_array_equal(found[False][1], found[True][1])
