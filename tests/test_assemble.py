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
from digen_jax.models import find_family, published
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import make_mesh
from digen_jax.weights import load
from digen_jax.weights.adapters import save_adapters
from digen_jax.weights.load import load_abstract
from tests.small_run import small_config

pytestmark = pytest.mark.usefixtures("compiled_quickly")

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

  def stop(assembly, *, mesh, rules):
    assert assembly.weights is None
    raise UserError(f"{mesh == training_mesh(config)} {rules}")

  monkeypatch.setattr(assemble_lib, "with_weights", stop)
  with pytest.raises(UserError) as caught:
    training.Run(config, prompts_file.parent / "run")
  assert str(caught.value) == f"True {rules.TRAINER}"


@pytest.mark.parametrize("number", [0, 1])
def test_a_lane_of_its_own_loads_onto_its_own_mesh_in_parts(
  number, monkeypatch
):
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
  assert found["rules"] == (rules.PARTS, rules.TRAINER)[number]
  assert island.mesh.size == 8


def no_file(config, checkpoint):
  config.train.lora_rank, config.train.lora_init = 4, "nowhere"


def other_scheduler(config, checkpoint):
  file = checkpoint / "scheduler" / "scheduler_config.json"
  content = json.loads(file.read_text()) | {"_class_name": "DDIMScheduler"}
  file.write_text(json.dumps(content))


def other_autoencoder(config, checkpoint):
  file = checkpoint / "vae" / "config.json"
  content = json.loads(file.read_text()) | {"latent_channels": 5}
  file.write_text(json.dumps(content))


def published_at_toy_size(config, checkpoint):
  config.checkpoint = str(checkpoint)
  directory = checkpoint / "transformer"
  sizes = published.find_model("flux-dev").transformer_config
  raw = find_family("FluxTransformer2DModel").config_dict(sizes)
  (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (
      lambda c, _: c.sampling.update(height=36),
      r"config\.sampling\.height=36 must be",
    ),
    (lambda c, _: c.sampling.update(num_frames=5), "makes images"),
    (lambda c, _: c.vae.update(tiling=9), r"config\.vae\.tiling=9 must be"),
    (
      lambda c, _: c.train.update(lora_rank=4, lora_targets=("nothing",)),
      "'nothing' matches no linear layer",
    ),
    (no_file, "nowhere"),
    (other_scheduler, "DDIMScheduler"),
    (other_autoencoder, "not of one pipeline"),
    (
      published_at_toy_size,
      "has the sizes of flux-dev, .* height=1024, .* num_steps=28, ",
    ),
  ],
)
def test_what_cannot_work_shows_before_weights_are_read(
  change, words, tmp_path, monkeypatch
):
  config = small_config("prompts.txt")
  checkpoint = shutil.copytree(config.checkpoint, tmp_path / "flux")
  config.checkpoint = str(checkpoint)
  change(config, checkpoint)

  def read(*args, **kwargs):
    raise AssertionError("weights are read")

  monkeypatch.setattr(load, "read_params", read)
  with pytest.raises(UserError, match=words) as told:
    assemble(from_config_dict(config))
  assert "\n" not in str(told.value)


def test_shapes_alone_make_the_same_recipe(tmp_path):
  config = config_of("lora in bfloat16", tmp_path)
  assembly, plan = (assemble(config, weights=w) for w in (True, False))
  assert plan.weights is None
  assert assembly.recipe.apply == plan.recipe.apply == assembly.model.apply
  assert jax.tree.structure(plan.model.params) == jax.tree.structure(
    assembly.model.params
  )
  assert plan.model.logical_axes == assembly.model.logical_axes


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


@pytest.mark.parametrize(
  ("room", "run", "sizes"),
  [
    (None, True, {"data": 8}),
    (4.1, False, {"data": 8}),
    (3.9, False, {"data": 4, "tensor": 2}),
    (4.1, True, {"data": 4, "tensor": 2}),
    (8.1, True, {"data": 8}),
  ],
)
def test_models_that_fill_a_device_are_split(room, run, sizes, monkeypatch):
  """`room`: half of a device's memory, in bytes a parameter."""
  checkpoint = small_config("").checkpoint
  plan = runs.check_policy(checkpoint, {"sampling": SIZE})
  config = dataclasses.replace(plan.model.config, num_attention_heads=6)
  plan = dataclasses.replace(
    plan, model=dataclasses.replace(plan.model, config=config)
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(plan.model.params))

  class Device:
    def memory_stats(self):
      return room and {"bytes_limit": 2 * room * count}

  monkeypatch.setattr(jax, "devices", lambda: [Device()] * 8)
  assert runs.sampling_axes(plan, run) == sizes


def test_policies_are_spread(monkeypatch):
  """Over a `tensor` axis where one asks for it."""
  axes = {"data": 4, "tensor": 2}
  monkeypatch.setattr(runs, "sampling_axes", lambda *_: axes)
  checkpoint, overrides = small_config("").checkpoint, {"sampling": SIZE}
  policy = runs.open_policy(checkpoint, overrides)
  kernel = policy.trainable["double_blocks"]["attn"]["to_q"]["kernel"]
  part = kernel.sharding.shard_shape(kernel.shape)
  assert np.prod(part) * 2 == kernel.size
  assert len(kernel.sharding.device_set) == 8


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
    settings=published.Settings(
      48, 64, num_steps=3, guidance_scale=2.0, tiling=64
    ),
  )
  monkeypatch.setitem(published.MODELS, "small", known)
  policy = runs.open_policy(
    checkpoint,
    {"sampling": {"width": 32}, "dtype": {"compute": "bfloat16"}},
  )
  assembly = policy.assembly
  assert assembly.config.vae.tiling == 64
  assert assembly.recipe.eval_batch_size == 1  # for every copy of the model
  assert assembly.config.sampling.guidance_scale == 2.0
  assert len(assembly.recipe.eval_sigmas) == 4
  downscale = assembly.autoencoder.config.downscale
  assert assembly.recipe.latent_shape[:2] == (48 // downscale, 32 // downscale)
  # Nothing is trained, so nothing is kept in more than it is computed in.
  assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(policy.trainable))
  plain = runs.open_policy(checkpoint)
  assert all(x.dtype == "float32" for x in jax.tree.leaves(plain.trainable))
  assert plain.assembly.config.dtype.compute == "float32"


def test_how_many_samples_are_made_at_once():
  config = small_config("prompts.txt")
  config.pipeline.generate_size = 4
  for given, made in ((0, 4), (6, 6)):
    config.eval.batch_size = given
    recipe = assemble(from_config_dict(config), weights=False).recipe
    assert recipe.eval_batch_size == made
  plan = runs.check_policy(config.checkpoint, {"eval": {"batch_size": 3}})
  assert plan.recipe.eval_batch_size == 3


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
