"""Where the weights of a run are loaded, and what a config says of decoding."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from digen_jax import assemble as assemble_lib
from digen_jax import runs, serving, training
from digen_jax.assemble import assemble, training_mesh
from digen_jax.config import from_config_dict
from digen_jax.errors import UserError
from digen_jax.grpo.train_step import join
from digen_jax.lanes import make_lanes
from digen_jax.models import published
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import make_mesh
from digen_jax.weights.adapters import save_adapters
from digen_jax.weights.load import load_abstract
from tests.small_run import small_config

MODES = {
  "full": {},
  "lora": dict(lora_rank=4),
  "lora in bfloat16": dict(lora_rank=4),
  "lora from a file": dict(lora_rank=4, lora_init="lora"),
}
LAYOUTS = {
  "fsdp": (dict(fsdp=4), rules.TRAINER),
  "fsdp and tensor": (dict(fsdp=2, tensor=2), rules.TRAINER),
  "rollout": (dict(data=2, tensor=2), rules.ROLLOUT),
}


def config_of(mode, folder):
  config = small_config("prompts.txt")
  config.train.update(MODES[mode])
  if mode == "lora in bfloat16":
    config.dtype.compute = "bfloat16"
  if config.train.lora_init:
    config.train.lora_init = ""
    assembly = assemble(from_config_dict(config))
    trained = jax.tree.map(lambda x: x + 0.1, assembly.weights.trainable)
    params = join(trained, assembly.weights.frozen)
    name = assembly.model.family.class_name
    save_adapters(folder / "lora", params, name, alpha=config.train.lora_alpha)
    config.train.lora_init = str(folder / "lora")
  return from_config_dict(config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_no_device_holds_more_than_its_part(mode, layout, tmp_path):
  config = config_of(mode, tmp_path)
  sizes, table = LAYOUTS[layout]
  whole = assemble(config)
  mesh = make_mesh(sizes, jax.devices()[4:])
  before = {id(x) for x in jax.live_arrays()}
  assembly = assemble(config, mesh=mesh, rules=table)
  for array in jax.live_arrays():
    if id(array) not in before and array.size > 1000:
      assert array.sharding.device_set == set(mesh.devices.flat)

  weights = assembly.weights
  params = join(weights.trainable, weights.frozen)
  shardings = rules.param_shardings(mesh, weights.axes, params, table)
  split = 0

  def check(leaf, sharding):
    nonlocal split
    part = sharding.shard_shape(leaf.shape)
    assert len(leaf.addressable_shards) == mesh.size
    assert {shard.data.shape for shard in leaf.addressable_shards} == {part}
    split += part != leaf.shape

  jax.tree.map(check, params, shardings)
  assert split > 5
  for leaf in jax.tree.leaves(weights.decoder):
    assert {shard.data.shape for shard in leaf.addressable_shards} == {
      leaf.shape
    }

  for name in ("trainable", "frozen", "decoder"):
    jax.tree.map(
      same_bits, getattr(weights, name), getattr(whole.weights, name)
    )
  assert weights.axes == whole.weights.axes


def same_bits(a, b):
  assert a.dtype == b.dtype
  np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
  ("mode", "devices"),
  [("disaggregated", range(2, 8)), ("colocated", range(8))],
)
def test_a_run_loads_where_it_trains(mode, devices, prompts_file, monkeypatch):
  config = small_config(prompts_file)
  config.pipeline.mode = mode
  config.mesh.rollout, config.mesh.trainer = 2, 6
  config = from_config_dict(config)
  assert [d.id for d in training_mesh(config).devices.flat] == list(devices)

  def stop(config, *, weights, mesh, rules):
    raise UserError(f"{weights} {mesh == training_mesh(config)} {rules}")

  monkeypatch.setattr(assemble_lib, "assemble", stop)
  with pytest.raises(UserError) as caught:
    training.Run(config, prompts_file.parent / "run")
  assert str(caught.value) == f"True True {rules.TRAINER}"


@pytest.mark.parametrize("number", [0, 1])
def test_a_lane_of_its_own_loads_in_its_own_layout(number, monkeypatch):
  config = from_config_dict(small_config("prompts.txt"))
  lane = make_lanes(config.pipeline)[number]
  found = {}

  def record(config, **kwargs):
    found.update(kwargs)
    return assemble(config, **kwargs)

  monkeypatch.setattr(serving, "assemble", record)
  axes = ({"tensor": 4, "data": 2}, {"fsdp": 8})[number]
  island = serving.serve(config, lane, axes).island
  assert found["mesh"] == island.mesh
  assert found["rules"] == (rules.ROLLOUT, rules.TRAINER)[number]
  assert island.mesh.size == 8


SIZE = {"height": 32, "width": 32}


def test_a_policy_is_on_the_mesh_that_samples():
  policy = runs.open_policy(
    small_config("").checkpoint, {"sampling": SIZE, "train": {"lora_rank": 2}}
  )
  weights = policy.assembly.weights
  assert policy.mesh.size == 8
  for tree in (policy.trainable, weights.frozen, weights.decoder):
    for leaf in jax.tree.leaves(tree):
      assert leaf.sharding.is_fully_replicated
      assert leaf.sharding.device_set == set(policy.mesh.devices.flat)


def test_pipelines_of_unknown_size_ask_for_it(tmp_path):
  checkpoint = small_config("").checkpoint
  sampling = runs.open_policy(checkpoint).assembly.config.sampling
  assert (sampling.height, sampling.width) == (32, 32)  # the autoencoder's
  checkpoint = shutil.copytree(checkpoint, tmp_path / "flux")
  file = checkpoint / "vae" / "config.json"
  vae = json.loads(file.read_text())
  del vae["sample_size"]
  file.write_text(json.dumps(vae))
  with pytest.raises(UserError, match="give --height and --width"):
    runs.open_policy(checkpoint)
  with pytest.raises(UserError, match="give --height and --width"):
    runs.open_policy(checkpoint, {"sampling": {"height": 32}})


def test_pipelines_of_known_size_are_sampled_as_published(monkeypatch):
  checkpoint = small_config("").checkpoint
  sizes = dataclasses.asdict(load_abstract(checkpoint).config)
  known = dataclasses.replace(
    published.MODELS["flux-dev"],
    sizes={k: v for k, v in sizes.items() if k not in ("dtype", "remat")},
    settings=published.Settings(48, 64, num_steps=3, guidance_scale=2.0),
  )
  monkeypatch.setitem(published.MODELS, "small", known)
  policy = runs.open_policy(
    checkpoint,
    {"sampling": {"width": 32}, "dtype": {"compute": "bfloat16"}},
  )
  assembly = policy.assembly
  assert assembly.config.sampling.guidance_scale == 2.0
  assert len(assembly.recipe.eval_sigmas) == 4
  downscale = assembly.autoencoder.config.downscale
  assert assembly.recipe.latent_shape[:2] == (48 // downscale, 32 // downscale)
  # Nothing is trained, so nothing is kept in more than it is computed in.
  assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(policy.trainable))
  plain = runs.open_policy(checkpoint)
  assert all(x.dtype == "float32" for x in jax.tree.leaves(plain.trainable))
  assert plain.assembly.config.dtype.compute == "float32"


def test_decoding_follows_the_config():
  config = small_config("prompts.txt")
  assembly = assemble(from_config_dict(config))
  assert not assembly.recipe.sequential  # no videos
  assert assembly.autoencoder.config.tiling is None
  downscale = assembly.autoencoder.config.downscale
  config.vae.sequential, config.vae.tiling = "always", 4 * downscale
  for weights in (True, False):
    assembly = assemble(from_config_dict(config), weights=weights)
    assert assembly.recipe.sequential
    assert assembly.autoencoder.config.sequential
    tiling = assembly.autoencoder.config.tiling
    assert (tiling.size, tiling.stride) == (4 * downscale, 3 * downscale)
  config.vae.tiling = 6 * downscale
  with pytest.raises(UserError, match=r"config\.vae\.tiling=.*multiple of"):
    assemble(from_config_dict(config), weights=False)
