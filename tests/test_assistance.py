"""TAG, RAT and TCSS on real lanes: who did what, and the same gradients."""

import types

import jax
import numpy as np
import pytest

from digen_jax import training
from digen_jax.config import from_config_dict
from digen_jax.island import Island
from digen_jax.pipeline.scheduler import Lane, start_step
from digen_jax.pipeline.steady import Pays
from digen_jax.pipeline.units import Kind, Unit, Workload
from tests.arrays import to_host
from tests.small_run import distance, small_config, write_prompts

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SPLITS = {
  "1+1": (1, 1, "auto"),
  "2+6 resharded": (2, 6, "rollout"),
  "5+3 gathered": (5, 3, "trainer"),
  "tokens divided": (
    {"data": 2, "sequence": 2},
    {"fsdp": 2, "sequence": 2},
    "trainer",
  ),
  "1+2+5, two rollout lanes": ([1, 2], 5, "trainer"),
}
SLOW = {"2+6 resharded", "5+3 gathered", "tokens divided"}


def config_of(prompts_file, **switches):
  config = small_config(prompts_file)
  config.batch.prompts, config.batch.group_size = 6, 8
  config.pipeline.update(switches)
  return config


def first_step(config, workdir):
  """(gradient of each update, new parameters, metrics) of the first step."""
  job = training.Run(from_config_dict(config), workdir)
  trainer, gradients = job.trainer.island, []
  update = trainer.update

  def recorded(*args):
    gradients.append(to_host(trainer.total))
    return update(*args)

  trainer.update = recorded
  # Who generates and trains holds what is not trained once.
  assert not trainer.generates or trainer.frozen_train is trainer.frozen
  job.warm_up()
  row, _ = job.train_one_step()
  params = to_host(trainer.state["trainable"])
  generator = job.team.links[job.team.rollouts[0]].island
  jax.tree.map(
    np.testing.assert_array_equal, params, to_host(generator.published)
  )
  job.close()
  return gradients, params, row


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  folder = tmp_path_factory.mktemp("reference")
  config = config_of(write_prompts(folder), mode="colocated")
  return first_step(config, folder / "run")


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SPLITS],
)
def test_assistance_gives_the_same_gradient(
  name, reference, prompts_file, tmp_path
):
  config = config_of(prompts_file, tag=True, rat=True, bts=False)
  rollout, trainer, config.pipeline.tag_layout = SPLITS[name]
  config.mesh.rollout, config.mesh.trainer = rollout, trainer
  gradients, params, row = first_step(config, tmp_path / "run")
  # Rounding: the lanes have unequal shapes, and advantages cancel in the sum.
  assert distance(reference[0][0], gradients[0]) < 2e-6
  assert distance(reference[1], params) < 1e-4
  assert row["ratio_max_abs_log"] <= 1e-6
  # All lanes did both kinds of work, and every unit was done once.
  lanes = {"rollout", "trainer"}
  if isinstance(rollout, list):
    lanes = {"rollout0", "rollout1", "trainer"}
  assert set(row["generated_by"]) == lanes
  assert set(row["trained_by"]) == lanes
  assert sum(row["generated_by"].values()) == 6
  dead = row["zero_std_groups"]
  assert sum(row["trained_by"].values()) == 6 - dead


@pytest.mark.slow
def test_later_updates_are_assisted_with_borrowed_weights(
  prompts_file, tmp_path, monkeypatch
):
  borrowed, borrow = [], Island.borrow

  def heard(island, parcel):
    borrowed.append(to_host(parcel.params))
    return borrow(island, parcel)

  monkeypatch.setattr(Island, "borrow", heard)
  found = {}
  for name, switches in (
    ("alone", dict(mode="colocated")),
    ("assisted", dict(rat=True, bts=False)),
  ):
    config = config_of(prompts_file, timesteps_per_pack=1, **switches)
    config.train.updates_per_batch = 2
    # Adam's first steps are signs: what it makes of rounding is none.
    config.train.learning_rate = 1e-5
    found[name] = first_step(config, tmp_path / name)
  alone, assisted = found["alone"], found["assisted"]
  assert distance(alone[0][0], assisted[0][0]) < 2e-6
  assert distance(alone[0][1], assisted[0][1]) < 1e-4
  assert distance(alone[0][0], alone[0][1]) > 0.1
  assert assisted[2]["trained_by"]["rollout"] > 0
  assert borrowed
  assert 0 < distance(borrowed[-1], assisted[1]) < 0.01  # not the last weights


def test_in_bfloat16_lanes_are_sent_what_layers_read(prompts_file, tmp_path):
  config = config_of(prompts_file, rat=True)
  config.dtype.compute = "bfloat16"
  job = training.Run(from_config_dict(config), tmp_path / "run")
  trainer, rollout = (job.team.links[n].island for n in ("trainer", "rollout"))
  pack = job.program.first_pack("trainer")
  # What is trained moves away from what bfloat16 can hold.
  trained = jax.tree.map(lambda x: x * 1.001, trainer.state["trainable"])
  trainer.state = trainer.state | {"trainable": trained}
  size, parcel = trainer.outgoing(1)
  rollout.receive(parcel)
  # Stale units go on with a version when the next is there.
  rollout.receive(trainer.outgoing(2)[1])
  assert rollout.version == 1 and rollout._generator(1)
  published = rollout.published
  assert rollout.version == 2
  assert {x.dtype for x in jax.tree.leaves(trained)} == {np.dtype("float32")}
  block = published["double_blocks"]["attn"]["to_q"]
  assert block["kernel"].dtype == "bfloat16"  # read so
  assert block["bias"].dtype == "float32"
  full = sum(x.nbytes for x in jax.tree.leaves(trained))
  assert 0.5 * full < size < 0.7 * full
  # Gradients are float32, and bit by bit those of the unrounded weights.
  trainer.gradients(0, *pack)
  _, other = rollout.gradients(0, *pack)
  own = to_host(trainer._gradients[0])
  assert {x.dtype for x in jax.tree.leaves(other)} == {np.dtype("float32")}
  assert any(np.any(x) for x in jax.tree.leaves(own))
  jax.tree.map(np.testing.assert_array_equal, own, to_host(other))
  job.close()


def test_a_pack_that_does_not_fit_leaves_no_gradient_behind():
  def gradients():
    if island._gradients:
      raise RuntimeError("RESOURCE_EXHAUSTED")
    island._gradients[0] = np.ones(3)

  island = types.SimpleNamespace(_gradients={}, gradients=gradients)
  with pytest.raises(RuntimeError, match="EXHAUSTED"):
    Island.measure(island, "gradients")
  assert not island._gradients


def test_an_update_that_lacks_a_gradient_is_refused():
  island = types.SimpleNamespace(
    _added=2,
    total="sum",
    state="as it was",
    lane=types.SimpleNamespace(name="t"),
  )
  with pytest.raises(
    RuntimeError, match=r"3 gradients were sent .* 2 have come"
  ):
    Island.update(island, 3)
  assert (island.total, island.state) == ("sum", "as it was")


@pytest.mark.parametrize("pays", [True, False])
def test_stale_units_start_as_long_as_they_pay(pays, monkeypatch):
  found = Pays(stale=pays, assists=True)
  monkeypatch.setattr(training, "what_pays", lambda *_, **__: found)
  run = types.SimpleNamespace(
    config=from_config_dict({"steps": 9, "checkpoint_every": 4}),
    step=0,
    work=Workload(groups=4, group_size=2, window=1, stale=2),
    lanes=(),
    costs=None,
    _ahead=None,
    _pays=Pays(stale=True, assists=True),
    _due_for_review=lambda: True,
  )
  assert (training.Run._state(run).ahead is not None) == pays
  run.step = 3  # a checkpoint follows
  assert training.Run._state(run).ahead is None


def test_lanes_assist_amid_stale_units_only_where_that_pays():
  work = Workload(groups=4, group_size=2, window=1, stale=2)
  asked = Lane("trainer", frozenset()), Unit(Kind.GENERATE, 0), {}
  run = types.SimpleNamespace(_search=lambda *_: True)
  for last, assists, answer in (
    (1, True, True),
    (1, False, False),
    (0, False, True),  # no stale units in this step: a checkpoint follows
  ):
    run._pays = Pays(stale=True, assists=assists)
    state = start_step(work, 0, last=last)
    assert training.Run._assist(run, state, *asked) == answer


def test_predictions_know_where_lanes_do_not_assist():
  work = Workload(groups=4, group_size=2, window=1, gap=True, stale=2)
  generates = frozenset({Kind.GENERATE})
  trains = frozenset({Kind.TRAIN, Kind.UPDATE, Kind.PUBLISH})
  lanes = (
    Lane("rollout", generates),
    Lane("trainer", trains, assists=generates),
    Lane("host", frozenset({Kind.SCORE})),
  )

  def cost(lane, unit):
    return 10.0 if unit.kind == Kind.GENERATE else 1.0

  def predicted(assists, bts=True):
    run = types.SimpleNamespace(
      config=from_config_dict({"pipeline": {"bts": bts}}),
      lanes=lanes,
      costs=cost,
      executor=types.SimpleNamespace(left=dict),
      _measured=lambda: True,
      _pays=Pays(stale=True, assists=assists),
    )
    return training.Run._predict(run, start_step(work, 0, last=1))

  alone, helped = predicted(assists=False), predicted(assists=True)
  assert alone >= 40 > 30 > helped >= 20
  assert predicted(assists=True, bts=False) == helped


def test_stale_samples_are_corrected_and_counted(
  prompts_file, tmp_path, monkeypatch
):
  pays = Pays(stale=True, assists=True)
  monkeypatch.setattr(training, "what_pays", lambda *_, **__: pays)
  config = config_of(prompts_file, tcss=0.5)
  config.steps, config.checkpoint_every = 4, 3
  job = training.Run(from_config_dict(config), tmp_path / "run")
  rows = []
  for _ in range(4):
    if job.step == 3:
      assert job._ahead is None  # a checkpoint would lose what is under way
      job.save()
    rows.append(job.train_one_step()[0])
    versions = job.program.samples.version.reshape(6, 8)
    assert (versions == versions[:, :1]).all()  # a unit is a group here
  job.close()
  assert [row["staleness_max"] for row in rows] == [0, 1, 1, 0]
  assert all(row["staleness_mean"] <= 0.5 for row in rows)
  for row in rows:
    # On-policy packs stay exact; stale ones are corrected by their ratio.
    assert row["ratio_max_abs_log"] <= 1e-6
    assert (row["ratio_max_abs_log_stale"] > 1e-5) == bool(row["staleness_max"])
    assert sum(row["generated_by"].values()) == 6
