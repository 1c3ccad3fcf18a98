"""LoRA files: diffusers loads ours, we load diffusers', and what goes wrong."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from digen_jax import jobs, runs
from digen_jax.assemble import assemble
from digen_jax.checkpoint import Checkpoints
from digen_jax.config import Dtype, from_config_dict, to_dict
from digen_jax.errors import UserError
from digen_jax.grpo.train_step import join
from digen_jax.models import lora
from digen_jax.optimizer import make_optimizer
from digen_jax.run_files import check_resumable
from digen_jax.weights import adapters, export, load
from tests import references
from tests.small_run import small_config

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RANK, ALPHA = 3, 7.0
FLUX = "FluxTransformer2DModel"
# Of 2 double and 2 single blocks: attention 8 + 3, feed-forward 4, and so on.
TARGETS = {
  "blocks.attn": (r"blocks\.attn\.",),
  "everything": ("",),
  "one of two names": ("^proj_out$",),  # single blocks have a proj_out as well
  "default": ("attn", "ff"),
}
COUNTS = {
  "blocks.attn": 2 * 8 + 2 * 3,
  "everything": 2 * (8 + 4 + 2) + 2 * (3 + 3) + 2 + 3 * 2 + 2,
  "one of two names": 1,
  "default": 2 * (8 + 4) + 2 * 3,
}


def reference():
  return references.flux(seed=7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("flux")
  reference().save_pretrained(path)
  return path


def adapt(model, seed=0, **options):
  """With adapters as after training: B is not zero."""
  options = dict(rank=RANK, alpha=ALPHA, targets=("attn", "ff")) | options
  model = lora.adapt(model, key=jax.random.key(seed), **options)
  rng = np.random.default_rng(seed)

  def draw(path, x):
    if path[-1].key != "lora_b":
      return x
    return jnp.asarray(0.07 * rng.normal(size=x.shape), x.dtype)

  params = jax.tree.map_with_path(draw, model.params)
  return dataclasses.replace(model, params=params)


def velocity(model, inputs):
  names = "hidden_states encoder_hidden_states pooled_projections timestep"
  arrays = [inputs[name] for name in names.split()]
  ids = {name: inputs[name] for name in ("img_ids", "txt_ids")}

  def run(params, *arrays):
    module = nnx.merge(model.graphdef, params)
    return module(*arrays, **ids, guidance=inputs["guidance"])

  with jax.default_matmul_precision("highest"):
    return np.asarray(references.jit(run)(model.params, *arrays))


def pipeline_of(transformer):
  parts = dict.fromkeys(
    ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
  )
  return diffusers.FluxPipeline(
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    transformer=transformer,
    **parts,
  )


def adapted_layers(module):
  return [
    name
    for name, layer in module.named_modules()
    if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
  ]


# PEFT notes that the name `proj_out` alone would match more than the file.
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@pytest.mark.parametrize("name", TARGETS)
def test_diffusers_loads_both_forms(name, saved, tmp_path):
  base = load.load_model(saved)
  model = adapt(base, targets=TARGETS[name])
  inputs = references.flux_inputs(3, 3, (3, 2), 5, guidance=True)
  expected = velocity(model, inputs)
  assert np.abs(expected - velocity(base, inputs)).max() > 0.01

  count = adapters.save_adapters(
    tmp_path / "lora", model.params, FLUX, alpha=ALPHA
  )
  assert count == COUNTS[name]
  transformer = reference()
  pipeline_of(transformer).load_lora_weights(str(tmp_path / "lora"))
  assert len(adapted_layers(transformer)) == COUNTS[name]
  actual = references.run_flux(transformer.requires_grad_(False), inputs)
  np.testing.assert_allclose(actual, expected, atol=1e-4)

  merged = lora.merge_lora(model.params, ALPHA)
  raw = model.family.config_dict(model.config)
  export.save_module(tmp_path / "merged", merged, raw)
  transformer = diffusers.FluxTransformer2DModel.from_pretrained(
    tmp_path / "merged"
  )
  actual = references.run_flux(transformer.requires_grad_(False), inputs)
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_the_file_is_the_portable_form(saved, tmp_path):
  model = adapt(load.load_model(saved))
  adapters.save_adapters(tmp_path / "lora", model.params, FLUX, alpha=ALPHA)
  (file,) = (tmp_path / "lora").iterdir()
  assert file.name == "pytorch_lora_weights.safetensors"
  tensors = load_file(file)
  assert {name.rpartition(".lora_")[2] for name in tensors} == {
    "A.weight",
    "B.weight",
  }
  layer = model.params["double_blocks"]["ff"]["linear_1"]
  module = "transformer.transformer_blocks.1.ff.net.0.proj"
  a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
  assert a.dtype == b.dtype == np.float32
  np.testing.assert_array_equal(a, layer["lora_a"][1].T)
  np.testing.assert_allclose(b, layer["lora_b"][1].T * ALPHA / RANK, rtol=1e-6)
  with pytest.raises(UserError, match="not empty"):
    adapters.save_adapters(tmp_path / "lora", model.params, FLUX, alpha=ALPHA)


def test_round_trip_into_another_alpha(saved, tmp_path):
  base = load.load_model(saved)
  model = adapt(base)
  adapters.save_adapters(tmp_path / "lora", model.params, FLUX, alpha=ALPHA)
  other = adapt(base, seed=1, alpha=2.0)
  path = tmp_path / "lora" / adapters.FILE  # the file, or its directory
  loaded = adapters.load_adapters(other, path, alpha=2.0)
  assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
  assert_close(
    lora.merge_lora(loaded.params, 2.0), lora.merge_lora(model.params, ALPHA)
  )


def test_we_load_what_diffusers_saves(saved, tmp_path):
  transformer = reference()
  settings = peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=["to_q", "ff.net.2", "norm_out.linear"]
  )
  transformer.add_adapter(settings)
  layers = adapted_layers(transformer)
  assert len(layers) == 2 * 2 + 2 + 1
  generator = torch.Generator().manual_seed(0)
  for name, parameter in transformer.named_parameters():
    if "lora_B" in name:
      parameter.data = torch.randn(parameter.shape, generator=generator) / 3
  diffusers.FluxPipeline.save_lora_weights(
    tmp_path,
    transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
    transformer_lora_adapter_metadata=settings.to_dict(),
  )
  inputs = references.flux_inputs(3, 3, (3, 2), 5, guidance=True)
  expected = references.run_flux(transformer.requires_grad_(False), inputs)

  chosen = adapters.train_settings(tmp_path, saved)
  assert (chosen["lora_rank"], chosen["lora_alpha"]) == (2, 5.0)
  assert len(chosen["lora_targets"]) == 4
  model = adapt(
    load.load_model(saved), rank=2, alpha=4.0, targets=chosen["lora_targets"]
  )
  model = adapters.load_adapters(model, tmp_path, alpha=4.0)
  np.testing.assert_allclose(velocity(model, inputs), expected, atol=1e-4)


def refused(call, words):
  with pytest.raises(UserError, match=words) as error:
    call()
  assert "\n" not in str(error.value)


def test_files_that_do_not_fit(saved, tmp_path):
  base = load.load_model(saved)
  model = adapt(base)
  folder = tmp_path / "lora"
  adapters.save_adapters(folder, model.params, FLUX, alpha=ALPHA)
  content = load_file(folder / adapters.FILE)
  first = "transformer.single_transformer_blocks.0.attn.to_k"

  def loading(target=model, change=None, metadata=None):
    tensors = dict(content)
    (change or (lambda t: None))(tensors)
    save_file(tensors, folder / adapters.FILE, metadata=metadata)
    return lambda: adapters.load_adapters(target, folder, alpha=ALPHA)

  refused(
    loading(adapt(base, rank=2)), "rank 3, not 2: set config.train.lora_rank=3"
  )
  refused(
    loading(adapt(base, targets=("attn",))),
    r"holds adapters of transformer_blocks\.0\.ff.* and 5 more, which "
    "config.train.lora_targets do not match",
  )
  refused(
    loading(adapt(base, targets=("attn", "ff", "x_embedder"))),
    "lacks adapters of x_embedder, which config.train.lora_targets match",
  )
  refused(
    loading(change=lambda t: t.pop(f"{first}.lora_B.weight")),
    r"lacks adapters of single_transformer_blocks\.0\.attn\.to_k, which",
  )
  wide = {f"{first}.lora_A.weight": np.ones((RANK, 50), np.float32)}
  refused(loading(change=lambda t: t.update(wide)), r"is \[3, 50\].*\[3, 48\]")
  mixed = {f"{first}.lora_A.weight": np.ones((2, 48), np.float32)}
  refused(loading(change=lambda t: t.update(mixed)), r"ranks \[2, 3\]")
  for name, shape in (
    (f"{first}.alpha", ()),
    (first.removeprefix("transformer.") + ".lora_A.weight", (3, 48)),
    (f"{first}.lora_A.weight", (3, 48, 1, 1)),
  ):
    extra = {name: np.ones(shape, np.float32)}
    refused(
      loading(change=lambda t: t.update(extra)),  # noqa: B023
      f"'{name}' in .* is not in diffusers' portable form",
    )
  for text, words in (
    ("{", "unreadable lora_adapter_metadata"),
    ('{"transformer.use_dora": true}', "use_dora=True"),
  ):
    key = {adapters.METADATA: text}
    refused(loading(metadata=key), words)
  (folder / adapters.FILE).unlink()
  refused(
    lambda: adapters.read_adapter_file(folder), "safetensors does not exist"
  )
  refused(
    lambda: adapters.save_adapters(folder, base.params, FLUX, alpha=1.0),
    "no LoRA adapters",
  )


def test_a_file_of_another_checkpoint(saved, tmp_path):
  model = adapt(load.load_model(saved))
  adapters.save_adapters(tmp_path / "lora", model.params, FLUX, alpha=ALPHA)
  schnell = references.flux(num_layers=1, num_single_layers=2)
  schnell.save_pretrained(tmp_path / "other")
  refused(
    lambda: adapters.train_settings(tmp_path / "lora", tmp_path / "other"),
    r"adapts transformer_blocks\.1\.attn.* more: no linear layer of this Flux",
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run with trained adapters."""
  return write_run(tmp_path_factory.mktemp("run"), 4)


def write_run(workdir, rank):
  """A run, as far as its files go: where it is, its config, its weights."""
  values = small_config("prompts.txt")
  values.train.lora_rank, values.train.lora_alpha = rank, 6.0
  values.train.ema_decay = 0.0
  config = from_config_dict(values)
  weights = assemble(config).weights
  trained = jax.tree.map_with_path(
    lambda path, x: x + 0.1 if path[-1].key in ("lora_b", "kernel") else x,
    weights.trainable,
  )
  state = {
    "trainable": trained,
    "optimizer": make_optimizer(config.train, 1).init(trained),
    "ema": None,
  }
  checkpoints = Checkpoints(workdir / "checkpoints", 1)
  start = load.fingerprint(config.checkpoint)
  checkpoints.save(1, state, {"checkpoint": start})
  checkpoints.close()
  text = json.dumps({"config": to_dict(config)})
  (workdir / "config.json").write_text(text)
  return workdir, config, trained, weights.frozen


def with_train(config, **changes):
  train = dataclasses.replace(config.train, **changes)
  return dataclasses.replace(config, train=train)


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_runs_are_exported_and_go_on_from_files(run, tmp_path, monkeypatch):
  workdir, config, trained, frozen = run
  with monkeypatch.context() as context:
    context.setattr(load, "read_params", None)  # names and shapes are enough
    line = jobs.export_run(workdir, tmp_path / "lora")
    jobs.export_run(workdir, tmp_path / "merged", "pipeline")
  count = len(load_file(tmp_path / "lora" / adapters.FILE)) // 2
  assert f"adapters of {count} layers" in line
  assert "load_lora_weights" in line
  assert_close(
    load.load_model(tmp_path / "merged").params,
    lora.merge_lora(join(trained, frozen), 6.0),
  )

  # As the start of another run, whose alpha may differ; and for sampling.
  start = with_train(config, lora_init=str(tmp_path / "lora"), lora_alpha=3.0)
  found = assemble(start).weights.trainable
  assert_close(
    lora.merge_lora(join(found, frozen), 3.0),
    lora.merge_lora(join(trained, frozen), 6.0),
  )
  settings = adapters.train_settings(tmp_path / "lora", config.checkpoint)
  size = {"height": 32, "width": 32}
  policy = runs.open_policy(
    config.checkpoint, {"train": settings, "sampling": size}
  )
  assert_close(
    lora.merge_lora(join(policy.trainable, frozen), settings["lora_alpha"]),
    lora.merge_lora(join(trained, frozen), 6.0),
  )


def test_a_run_in_bfloat16_is_exported_in_the_dtype_of_its_base(run, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / "run")
  _, config, trained, frozen = run
  half = dataclasses.replace(config, dtype=Dtype("bfloat16"))
  text = json.dumps({"config": to_dict(half)})
  (workdir / "config.json").write_text(text)
  jobs.export_run(workdir, tmp_path / "merged", "pipeline")
  before, after = (
    load_file(f"{path}/transformer/diffusion_pytorch_model.safetensors")
    for path in (config.checkpoint, tmp_path / "merged")
  )
  assert {tensor.dtype for tensor in after.values()} == {np.dtype(np.float32)}
  for name in ("proj_out.weight", "x_embedder.bias"):
    np.testing.assert_array_equal(after[name], before[name])
  assert_close(
    load.load_model(tmp_path / "merged").params,
    lora.merge_lora(join(trained, frozen), 6.0),
  )


def test_a_run_that_trained_everything_is_exported(tmp_path, monkeypatch):
  workdir, _, trained, _ = write_run(tmp_path / "run", 0)
  with monkeypatch.context() as context:
    context.setattr(load, "read_params", None)  # not to be called
    jobs.export_run(workdir, tmp_path / "out")
  found = load.load_model(tmp_path / "out").params
  jax.tree.map(np.testing.assert_array_equal, found, trained)


def test_what_is_only_read_comes_alone_and_where_it_belongs(run, monkeypatch):
  workdir, _, trained, frozen = run
  monkeypatch.setattr(load, "read_params", None)  # not to be called
  params = runs.read_trained(workdir).params
  found, rest = lora.split_trainable(params, "lora")
  jax.tree.map(np.testing.assert_array_equal, found, trained)
  assert jax.tree.map(np.shape, rest) == jax.tree.map(np.shape, frozen)
  for leaf in jax.tree.leaves(rest):
    assert isinstance(leaf, jax.ShapeDtypeStruct)
  leaves = jax.tree.leaves(found)
  assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
  assert sum(not leaf.sharding.is_fully_replicated for leaf in leaves) > 5
  wanted = {"trainable": trained}
  reader = Checkpoints(workdir / "checkpoints", writes=False)
  assert reader.load(1, wanted).keys() == {"trainable"}
  refused(lambda: reader.load(1, {"weights": trained}), "missing there")
  reader.close()
  resumed = Checkpoints(workdir / "checkpoints")
  refused(lambda: resumed.load(1, wanted), "absent here")
  resumed.close()


def test_an_output_that_is_taken_shows_before_weights_are_read(
  run, tmp_path, monkeypatch
):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(jobs, "read_trained", None)  # not to be called
  for form in ("lora", "pipeline"):
    refused(
      lambda: jobs.export_run(run[0], tmp_path, form),  # noqa: B023
      "not empty",
    )


def test_no_steps_are_not_the_default(run, tmp_path):
  (tmp_path / "prompts.txt").write_text("a red circle\n")
  refused(
    lambda: jobs.evaluate_run(run[0], tmp_path / "prompts.txt", None, 0),
    "eval.num_steps must be at least 1",
  )


def test_a_reader_leaves_what_is_being_written(run, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / "run")
  unfinished = workdir / "checkpoints" / "2.orbax-checkpoint-tmp"
  unfinished.mkdir()
  (unfinished / "array").write_bytes(b"1")
  assert runs.open_policy(workdir).step == 1
  assert (unfinished / "array").exists()
  # A run's own process takes over: gone before the next one is written.
  writer = Checkpoints(workdir / "checkpoints")
  writer.save(2, {"w": jnp.ones(2)}, {})
  writer.close()
  assert not unfinished.exists()


def test_a_run_of_other_files_is_not_opened(run, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / "run")
  moved = shutil.copytree(run[1].checkpoint, tmp_path / "flux")
  config = to_dict(dataclasses.replace(run[1], checkpoint=str(moved)))
  (workdir / "config.json").write_text(json.dumps({"config": config}))
  assert runs.open_policy(workdir).step == 1
  weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(weights)
  tensors["proj_out.bias"] += 1
  save_file(tensors, weights)
  refused(
    lambda: jobs.export_run(workdir, tmp_path / "out"),
    "run was trained from other files than .*flux holds now",
  )
  assert not (tmp_path / "out").exists()


def test_what_cannot_be_used(run, tmp_path):
  workdir, config, *_ = run
  (tmp_path / "prompts.txt").write_text("a red circle\n")
  refused(
    lambda: jobs.sample_prompts(
      workdir,
      tmp_path / "prompts.txt",
      tmp_path / "out",
      overrides={},
      seed=0,
      samples_per_prompt=1,
      lora="file",
    ),
    "--lora=file goes with a pipeline directory, and .* is a run",
  )
  (tmp_path / "checkpoints").mkdir()
  plain = to_dict(with_train(config, lora_rank=0))
  (tmp_path / "config.json").write_text(json.dumps({"config": plain}))
  refused(
    lambda: jobs.export_run(tmp_path, tmp_path / "out", "lora"),
    "trained every parameter, so it has no LoRA adapters",
  )
  assert not (tmp_path / "out").exists()
  values = {"train": {"lora_init": "a"}}
  refused(lambda: from_config_dict(values), "lora_init='a' needs adapters")


def test_resuming_with_other_adapters(run, tmp_path):
  workdir, config, *_ = run
  (tmp_path / adapters.FILE).write_bytes(b"1")
  started = load.fingerprint(config.checkpoint)
  assert started != load.fingerprint(config.checkpoint, tmp_path)
  assert load.fingerprint(config.checkpoint, tmp_path) == load.fingerprint(
    config.checkpoint, tmp_path / adapters.FILE
  )
  record = json.loads(json.dumps({"config": to_dict(config), "step": 1}))
  record["checkpoint"] = started
  check_resumable(config, started, record, workdir)
  refused(
    lambda: check_resumable(
      with_train(config, lora_init="x"), "other", record, workdir
    ),
    "tiny_flux with x holds other files",
  )
  for field, value in (("lora_alpha", 5.0), ("lora_targets", ("attn",))):
    changed = with_train(config, **{field: value})
    refused(
      lambda: check_resumable(changed, started, record, workdir),  # noqa: B023
      rf"config\.train\.{field}=",
    )


def test_prompts_that_the_reward_cannot_read_are_told_before_sampling(
  run, tmp_path, monkeypatch
):
  (tmp_path / "prompts.txt").write_text("a dog on a bicycle\n")
  monkeypatch.setattr(jobs, "check_policy", None)  # not to be called
  refused(
    lambda: jobs.evaluate_run(run[0], tmp_path / "prompts.txt", None, None),
    "prompt",
  )
