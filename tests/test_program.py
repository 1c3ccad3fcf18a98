"""What islands are asked to do in a step, told by islands that only listen."""

import dataclasses
import types
from typing import Any
from unittest import mock

import numpy as np
import pytest

import digen_jax as dj
from digen_jax.config import default_config, from_config_dict
from digen_jax.data.prompts import PromptStream
from digen_jax.errors import LaneLost
from digen_jax.lanes import make_lanes, team_of
from digen_jax.links import Hardware
from digen_jax.pipeline.costs import Costs
from digen_jax.pipeline.execute import Executor
from digen_jax.pipeline.scheduler import start_step
from digen_jax.pipeline.units import Kind, Unit, Workload
from digen_jax.program import Program
from digen_jax.rewards.compose import compose
from digen_jax.samples import window_starts
from digen_jax.types import Conditioning

SEED, STEPS, SIZE = 5, 8, 3
WORK = Workload(
  groups=4,
  group_size=SIZE,
  window=3,
  updates=2,
  generate_size=SIZE,
  train_size=SIZE,
  pack=2,
  gap=True,
)
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
PROMPTS = tuple("abcdefg")


@dataclasses.dataclass(frozen=True)
class Done:
  """A result that is there."""

  value: Any
  future = None

  def ready(self):
    return True

  def result(self):
    return self.value


@dataclasses.dataclass(frozen=True)
class Listener:
  """An island whose latents say of which sample and step they are."""

  hardware: Hardware
  heard: list

  def call(self, method, *args):
    args = [a.value if isinstance(a, Done) else a for a in args]
    self.heard.append((method, args))
    return Done(getattr(self, method, lambda *_: {"grad_norm": 1.0})(*args))

  def call_pair(self, method, *args):
    return map(Done, self.call(method, *args).value)

  def restart(self):
    self.heard.append(("restart", []))
    return True

  def generate(self, version, prompts, negative, rows, start, numbers):
    _, step, group, member = numbers
    sample = number_of(step, group, member)[:, None]
    at = start[:, None] + np.arange(WORK.window + 1)
    trajectory = dj.Trajectory(
      states=np.float32(100 * sample + at)[..., None],
      log_probs=np.float32(sample + at[:, :-1] / 10),
      steps=at[:, :-1],
      final=None,
    )
    return trajectory, np.uint8(sample)[:, None, None] + np.zeros(3, np.uint8)

  def gradients(self, number, *args):
    return {"rows": np.float32(1)}, ("gradient", number)

  def outgoing(self, version):
    return 7, ("weights", version)

  def interim(self, update):
    return "weights", "interim"


def number_of(step, group, member):
  return 20 * int(step) + np.int64(group) * SIZE + member


def reward(images, prompts):
  return [float(7 * round(i * 255) % 11) for i in images[:, 0, 0, 0]]


def program_of(assisting, rollouts=("rollout",)):
  """A program, its lanes, and what its islands will have heard."""
  config = default_config()
  config.seed, config.batch.prompts, config.batch.group_size = SEED, 4, SIZE
  config.sampling.num_steps, config.sampling.window = STEPS, WORK.window
  config.sampling.window_first = 5
  config.pipeline.tag = config.pipeline.rat = assisting
  config.pipeline.lanes = "ray"
  config = dataclasses.replace(
    from_config_dict(config), checkpoint="", prompts=""
  )
  names = (*rollouts, "trainer")
  heard, lanes = [], make_lanes(config.pipeline, names)
  links = {
    name: Listener(Hardware({"data": n}, n, n, "none"), heard)
    for name in names
    for n in (4 if name == "trainer" else 2,)
  }
  program = Program(
    config,
    WORK,
    types.SimpleNamespace(sigmas=SIGMAS, latent_shape=(1,)),
    team_of(lanes, links),
    compose(reward),
    PromptStream(PROMPTS, SEED, 4),
    Conditioning(text=np.arange(7.0, dtype=np.float32)[:, None, None]),
    None,
  )
  return program, lanes, heard


@pytest.fixture(params=["own work", "assisting"])
def steps(request):
  """What was asked of all islands, in order, by step."""
  program, lanes, heard = program_of(request.param == "assisting")
  executor, found = Executor(lanes, program.starts, Costs()), []
  for step in (2, 3):
    heard.clear()
    program.begin_step(step)
    executor.run(start_step(WORK, step, last=step))
    found.append((step, list(heard)))
  return found


def test_noise_is_keyed_by_step_group_and_member(steps):
  for step, heard in steps:
    drawn = []
    for version, prompts, _, rows, _, numbers in args_of(heard, "generate"):
      seed, of, group, member = numbers
      assert (version, seed, of) == (step, SEED, step)
      ids = PromptStream(PROMPTS, SEED, 4).indices(step)
      np.testing.assert_array_equal(prompts.text[rows, 0, 0], ids[group])
      drawn += zip(group[:SIZE], member[:SIZE])
      # Padding repeats the last sample.
      assert set(zip(group, member)) == set(drawn[-SIZE:])
    assert sorted(drawn) == [(g, m) for g in range(4) for m in range(SIZE)]


def test_rows_are_the_transitions_that_were_sampled(steps):
  for step, heard in steps:
    rewards = [reward(np.full((1, 1, 1, 1), s / 255), "")[0] for s in of(step)]
    groups = np.repeat(np.arange(4), SIZE)
    advantages = dj.group_advantages(np.float32(rewards), groups)
    trained = []
    for _, batch, rows, prompts, _ in args_of(heard, "gradients"):
      sample, position = np.divmod(batch.x[:, 0].astype(int), 100)
      np.testing.assert_array_equal(batch.x_next, batch.x + 1)
      np.testing.assert_array_equal(batch.sigma, SIGMAS[position])
      np.testing.assert_array_equal(batch.sigma_next, SIGMAS[position + 1])
      np.testing.assert_allclose(
        batch.old_log_prob, sample + position / 10, rtol=1e-6
      )
      index = sample - 20 * step
      np.testing.assert_allclose(batch.advantage, advantages[index], atol=1e-6)
      ids = PromptStream(PROMPTS, SEED, 4).indices(step)
      np.testing.assert_array_equal(
        prompts.text[rows, 0, 0], ids[index // SIZE]
      )
      assert set(batch.weight) <= {0, 1}
      trained += zip(index[batch.weight > 0], position[batch.weight > 0])
    assert len(trained) == len(set(trained)) == WORK.samples * WORK.window
    for sample in range(WORK.samples):
      first, *rest = sorted(p for s, p in trained if s == sample)
      assert rest == [first + 1, first + 2]


def test_gradients_are_added_in_order_and_published_after_the_last(steps):
  for step, heard in steps:
    ends = [
      args[0] if method == "add" else method
      for method, args in heard
      if method in ("add", "update", "outgoing", "receive")
    ]
    numbers = [e[1] if isinstance(e, tuple) else e for e in ends]
    assert numbers == [
      *range(4),
      "update",
      *range(4, 8),
      "update",
      "outgoing",
      "receive",
    ]
    assert args_of(heard, "outgoing") == [[step + 1]]
    assert args_of(heard, "receive") == [[("weights", step + 1)]]
    # Each update says how many gradients it has been sent.
    assert args_of(heard, "update") == [[4], [4]]


def test_weights_are_borrowed_as_the_first_update_leaves_them(steps):
  for _, heard in steps:
    named = [method for method, _ in heard]
    assert args_of(heard, "interim") in ([], [[1]])
    for i in (i for i, method in enumerate(named) if method == "borrow"):
      assert named[:i].count("update") == 1
      assert heard[i][1] == [("weights", "interim")]


def test_a_lane_started_anew_gets_the_version_that_there_is():
  program, lanes, heard = program_of(assisting=False)

  def revived():
    heard.clear()
    arrival = program.revive("rollout")
    # The trainer, who may be in the middle of an update, is asked nothing.
    assert [method for method, _ in heard] == ["restart", "receive"]
    return args_of(heard, "receive"), arrival

  program.restore(2)
  program.begin_step(2)
  received, arrival = revived()
  assert received == [[("weights", 2)]]
  assert arrival.ready() and arrival.finish() == frozenset()
  program.begin_step(2)
  Executor(lanes, program.starts, Costs()).run(start_step(WORK, 2, last=2))
  assert revived()[0] == [[("weights", 3)]]  # of the step to come
  assert program.revive("trainer") is None  # what it held is lost
  assert program.revive("") is None


@dataclasses.dataclass(frozen=True)
class Asked(Done):
  """A result that remembers who waited for it."""

  asked: list

  def result(self):
    self.asked.append(self.value)


def test_a_publish_does_not_wait_for_a_lane_that_loads(monkeypatch):
  program, *_ = program_of(assisting=False, rollouts=("rollout0", "rollout1"))
  asked, call = [], Listener.call

  def spy(link, method, *args):
    done = call(link, method, *args)
    if method != "receive":
      return done
    name = next(n for n, other in program.links.items() if other is link)
    return Asked(name, asked)

  def awaited():
    asked.clear()
    program.publish("trainer", Unit(Kind.PUBLISH, 2))
    return list(asked)

  monkeypatch.setattr(Listener, "call", spy)
  program.restore(2)
  program.begin_step(2)
  arrival = program.revive("rollout1")
  assert awaited() == ["rollout0"]
  arrival.finish()
  assert awaited() == ["rollout0", "rollout1"]


def test_every_step_has_windows_of_its_own():
  program, _, _ = program_of(assisting=False)
  shape = STEPS, WORK.window, 5
  starts = [window_starts(SEED, i, WORK.groups, shape) for i in range(9)]
  drawn = np.array([program._of(step).start for step in range(9)])
  np.testing.assert_array_equal(drawn, starts)
  assert len(set(map(tuple, starts))) > 4


@pytest.mark.parametrize(
  ("updates", "norms", "whole"),
  [
    (2, [], 0),
    (2, [1.0], 0),  # of two
    (2, [1.0, 2.0], 1),
    (2, [1.0, np.inf], 0),
    (2, [1.0, ValueError("out of memory")], 0),
    (1, [1.0], 1),
    (1, [np.inf], 0),
    (1, [ValueError("out of memory")], None),
  ],
)
def test_what_is_left_of_a_step_that_failed(updates, norms, whole):
  program, _, heard = program_of(assisting=False)
  program.work = dataclasses.replace(program.work, updates=updates)
  program.begin_step(2)
  program._summed = len(program._order)  # all gradients are there
  trainer = program.links["trainer"]

  def call(method, *args):
    if method != "update":
      return trainer.call(method, *args)
    norm = norms[program._begun - 1]
    if isinstance(norm, Exception):
      return types.SimpleNamespace(result=mock.Mock(side_effect=norm))
    return Done({"grad_norm": norm})

  link = types.SimpleNamespace(call=call)
  program.links = {**program.links, "trainer": link}
  for update in range(len(norms)):
    program.update("trainer", Unit(Kind.UPDATE, 2, update=update))
  heard.clear()
  assert program.make_whole() == whole
  back = updates == 2 and whole == 0 and norms
  assert args_of(heard, "roll_back") == ([[]] if back else [])


def test_a_step_of_a_trainer_that_is_gone_is_not_whole():
  program, _, _ = program_of(assisting=False)
  program.begin_step(2)
  program._summed = len(program._order)
  lost = types.SimpleNamespace(result=mock.Mock(side_effect=LaneLost("", "")))
  link = types.SimpleNamespace(call=lambda *_: lost)
  program.links = {**program.links, "trainer": link}
  for update in (0, 1):
    program.update("trainer", Unit(Kind.UPDATE, 2, update=update))
  with pytest.raises(LaneLost):
    program.make_whole()


@pytest.mark.parametrize(
  ("updates", "holds", "whole"), [(1, None, None), (1, 2, 0), (2, None, 0)]
)
def test_an_update_that_cannot_even_begin(updates, holds, whole):
  program, _, _ = program_of(assisting=False)
  program.work = dataclasses.replace(program.work, updates=updates)
  trainer = program.links["trainer"]
  program.begin_step(2)
  program._summed = len(program._order)

  def call(method, *args):
    if method == "update":
      raise RuntimeError("RESOURCE_EXHAUSTED")
    return Done(holds) if method == "holds" else trainer.call(method, *args)

  link = types.SimpleNamespace(call=call)
  program.links = {**program.links, "trainer": link}
  with pytest.raises(RuntimeError):
    program.update("trainer", Unit(Kind.UPDATE, 2))
  assert program.make_whole() == whole


def test_every_rollout_lane_is_sent_every_version():
  rollouts = ("rollout0", "rollout1", "rollout2")
  program, lanes, heard = program_of(assisting=False, rollouts=rollouts)
  program.restore(2)
  assert args_of(heard, "receive") == [[("weights", 2)]] * 3
  program.begin_step(2)
  heard.clear()
  Executor(lanes, program.starts, Costs()).run(start_step(WORK, 2, last=2))
  assert args_of(heard, "outgoing") == [[3]]  # cast and summed once
  assert args_of(heard, "receive") == [[("weights", 3)]] * 3
  assert set(program.samples.generated_by) == set(rollouts)
  heard.clear()
  assert program.revive("rollout1").ready()
  assert args_of(heard, "receive") == [[("weights", 3)]]  # to that one


def args_of(heard, method):
  return [args for name, args in heard if name == method]


def of(step):
  return range(20 * step, 20 * step + WORK.samples)


@pytest.mark.parametrize("layout", ["auto", "rollout"])
def test_assisting_resharded_does_not_fit(layout):
  """Then the trainer generates in its own layout, unless told otherwise."""
  program, _, heard = program_of(assisting=True)
  pipeline = dataclasses.replace(program.config.pipeline, tag_layout=layout)
  program.config = dataclasses.replace(program.config, pipeline=pipeline)
  resharded = []

  class Small(Listener):
    def measure(self, method, *args):
      if method == "switch":
        resharded.append(args)
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
      return 1.0

  for name, link in program.links.items():
    program.links[name] = Small(link.hardware, heard)
  costs = Costs()
  if layout == "rollout":
    with pytest.raises(RuntimeError, match="EXHAUSTED"):
      program.calibrate(0, costs)
    return
  program.calibrate(0, costs)
  assert resharded and not program.resharded_blocks
  assert ("switch", [False]) in heard
  generate = Unit(Kind.GENERATE, 0, 0, SIZE)
  assert costs("trainer", generate) == 1.0
  assert costs.known([(Kind.GENERATE, "trainer")])
