"""Whole runs on tiny random checkpoints of every family."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from digen_jax import jobs, training
from digen_jax.assemble import assemble, embed, negative_conditioning
from digen_jax.benchmarks import cases, reference
from digen_jax.checkpoint import Checkpoints
from digen_jax.config import Train, default_config, from_config_dict, to_dict
from digen_jax.grpo.train_step import join
from digen_jax.metrics import read_metrics
from digen_jax.optimizer import make_optimizer
from digen_jax.parallel.mesh import make_mesh
from digen_jax.sampler import Sampler
from digen_jax.weights import load
from tests import autoencoders, references, text_pipelines

pytestmark = pytest.mark.usefixtures("compiled_quickly")

JOINT = dict(num_layers=2, attention_head_dim=24, num_attention_heads=2)
ROPE = dict(axes_dims_rope=(4, 10, 10))
KL_SIZES = references.VAE
# Transformer class, its sizes, autoencoder class, scheduler, its settings.
EULER = diffusers.FlowMatchEulerDiscreteScheduler
PARTS = {
  "flux": (
    diffusers.FluxTransformer2DModel,
    JOINT
    | ROPE
    | dict(
      in_channels=16,
      num_single_layers=2,
      joint_attention_dim=32,
      pooled_projection_dim=24,
      guidance_embeds=True,
    ),
    "AutoencoderKL",
    EULER(use_dynamic_shifting=True),
  ),
  "stable_diffusion_3": (
    diffusers.SD3Transformer2DModel,
    references.SD3 | dict(joint_attention_dim=48, pooled_projection_dim=32),
    "AutoencoderKL",
    EULER(shift=3.0),
  ),
  "qwen_image": (
    diffusers.QwenImageTransformer2DModel,
    JOINT | ROPE | dict(in_channels=16, out_channels=4, joint_attention_dim=32),
    autoencoders.QWEN,
    EULER(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9),
  ),
  "wan": (
    diffusers.WanTransformer3DModel,
    JOINT
    | dict(in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64),
    autoencoders.WAN,
    diffusers.UniPCMultistepScheduler(
      prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
  ),
  "hunyuan_video": (
    diffusers.HunyuanVideoTransformer3DModel,
    JOINT
    | dict(
      in_channels=4,
      out_channels=4,
      num_single_layers=1,
      num_refiner_layers=1,
      text_embed_dim=32,
      pooled_projection_dim=24,
      rope_axes_dim=(4, 10, 10),
    ),
    autoencoders.HUNYUAN,
    EULER(shift=7.0),
  ),
}
GUIDED = ("qwen_image", "wan", "stable_diffusion_3")
VIDEO = ("wan", "hunyuan_video")
PROMPTS = ("two red circles left of a blue square", "green squares", "a square")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Makes a pipeline directory per family, once."""
  made = {}

  def make(name):
    if name not in made:
      directory = tmp_path_factory.mktemp(name)
      text_pipelines.FAMILIES[name](directory)
      cls, sizes, vae, scheduler = PARTS[name]
      if name == "flux" or name == "stable_diffusion_3":
        autoencoder = references.autoencoder()
      else:
        autoencoder = autoencoders.build(vae)
      transformer = references.randomise(cls(**sizes), seed=1)
      index = json.loads((directory / "model_index.json").read_text())
      for part, module in (
        ("transformer", transformer),
        ("vae", autoencoder),
        ("scheduler", scheduler),
      ):
        module.save_pretrained(directory / part)
        index[part] = ["diffusers", type(module).__name__]
      (directory / "model_index.json").write_text(json.dumps(index))
      made[name] = directory
    return made[name]

  return make


def family_config(name, checkpoint, folder):
  prompts = folder / "prompts.txt"
  prompts.write_text("\n".join(PROMPTS))
  config = default_config()
  config.steps = 3
  config.checkpoint, config.prompts = str(checkpoint), str(prompts)
  config.reward = "jpeg_incompressibility"
  config.batch.prompts, config.batch.group_size = 2, 4
  sampling = config.sampling
  sampling.num_steps, sampling.noise_level = 4, 0.7
  sampling.window, sampling.window_first = 2, 3
  sampling.height, sampling.width = 16, 32
  sampling.text_length = 12 if name != "hunyuan_video" else 0
  if name in GUIDED:
    sampling.guidance_scale = 3.0
  if name in VIDEO:
    sampling.num_frames = 5
  config.train.learning_rate = 1e-3
  config.train.clip_range = 1e-3
  config.eval.num_prompts, config.eval.num_steps = 2, 3
  config.mesh.rollout, config.mesh.trainer = 1, 1
  return config


def check_run(config, workdir):
  training.train(from_config_dict(config), workdir)
  rows = read_metrics(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(config.steps))
  for row in rows:
    assert 0 <= row["ratio_max_abs_log"] <= 1e-6
    assert row["grad_norm"] > 0


def slow_but(*names):
  """The families, all but `names` marked as slow."""
  return [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in names))
    for name in PARTS
  ]


# The embedded checkpoint is a FLUX: other tests train it.
@pytest.mark.parametrize("name", slow_but("wan"))
def test_lora_run(name, checkpoints, tmp_path):
  config = family_config(name, checkpoints(name), tmp_path)
  config.steps = 1
  config.train.lora_rank, config.train.lora_targets = 4, ("attn",)
  check_run(config, tmp_path / "run")
  jobs.export_run(tmp_path / "run", tmp_path / "out")
  assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
  if name in VIDEO:
    assert (tmp_path / "run" / "samples" / "step_000000.mp4").exists()


PICTURES = """
from digen_jax.rewards import takes_pil

@takes_pil
def brightness(images, prompts):
  return [float(sum(image.getpixel((3, 5)))) for image in images]
"""


@pytest.mark.slow
def test_one_frame_of_a_video_family_is_a_picture(checkpoints, tmp_path):
  (tmp_path / "rewards.py").write_text(PICTURES)
  config = family_config("wan", checkpoints("wan"), tmp_path)
  config.steps, config.sampling.num_frames = 1, 1
  config.reward = f"{tmp_path}/rewards.py:brightness"
  config.train.lora_rank, config.train.lora_targets = 4, ("attn",)
  check_run(config, tmp_path / "run")
  assert not list((tmp_path / "run").rglob("*.mp4"))
  count = jobs.sample_prompts(
    tmp_path / "run",
    tmp_path / "prompts.txt",
    tmp_path / "out",
    overrides={},
    seed=0,
    samples_per_prompt=1,
  )
  assert count == len(PROMPTS)
  files = sorted(p.suffix for p in (tmp_path / "out").glob("0*"))
  assert files == [".png"] * count


def test_the_form_of_the_kl_goes_by_family(checkpoints, tmp_path):
  for name, form in (("flux", "diffusion"), ("wan", "transition")):
    config = family_config(name, checkpoints(name), tmp_path)
    found = assemble(from_config_dict(config), weights=False).recipe
    assert found.kl_form == form
    config.train.kl_form = "diffusion"
    found = assemble(from_config_dict(config), weights=False).recipe
    assert found.kl_form == "diffusion"


@pytest.mark.slow
@pytest.mark.parametrize("split", [(1, 1), (2, 6)])
@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("name", PARTS)
def test_three_steps_resumed_and_exported(
  name, lora, split, checkpoints, tmp_path
):
  config = family_config(name, checkpoints(name), tmp_path)
  config.mesh.rollout, config.mesh.trainer = split
  config.train.lora_rank, config.train.lora_targets = lora, ("attn",)
  config.checkpoint_every = 2
  config.steps = 2
  check_run(config, tmp_path / "run")
  config.steps = 3
  check_run(config, tmp_path / "run")
  jobs.export_run(tmp_path / "run", tmp_path / "out", "pipeline")
  cls = PARTS[name][0]
  module = cls.from_pretrained(tmp_path / "out" / "transformer")
  base = cls.from_pretrained(checkpoints(name) / "transformer")
  assert any(
    not np.array_equal(a.detach(), b.detach())
    for a, b in zip(module.parameters(), base.parameters())
  )


@pytest.mark.parametrize(
  "name", ["wan", pytest.param("hunyuan_video", marks=pytest.mark.slow)]
)
def test_videos_are_decoded_one_by_one(name, checkpoints, tmp_path):
  """Unless the config says otherwise; the pictures are the same."""
  pictures = {}
  for when in ("videos", "never"):
    config = family_config(name, checkpoints(name), tmp_path)
    config.vae.sequential = when
    config = from_config_dict(config)
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    assembly = assemble(config, mesh=mesh)
    weights = assembly.weights
    assert assembly.recipe.sequential == (when == "videos")
    recipe = dataclasses.replace(assembly.recipe, eval_batch_size=4)
    sampler = Sampler(recipe, mesh, weights.frozen, weights.decoder)
    told = embed(assembly, PROMPTS), negative_conditioning(assembly)
    pictures[when] = sampler(weights.trainable, *told, 0)
  a, b = (x.astype(int) for x in pictures.values())
  assert a.shape == (3, 5, 16, 32, 3) and a.std() > 5
  assert np.abs(a - b).max() <= 1


def adapted_run(config, workdir):
  """A run with trained adapters, as far as its files go.

  Returns:
    The model, and its parameters before and after.
  """
  config = from_config_dict(config)
  assembly = assemble(config)
  before, frozen = assembly.weights.trainable, assembly.weights.frozen
  rng = np.random.default_rng(0)
  after = jax.tree.map_with_path(
    lambda path, x: (
      jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
      if path[-1].key == "lora_b"
      else x
    ),
    before,
  )
  state = {
    "trainable": after,
    "optimizer": make_optimizer(config.train, 1).init(after),
    "ema": None,
  }
  checkpoints = Checkpoints(workdir / "checkpoints", 1)
  start = load.fingerprint(config.checkpoint)
  checkpoints.save(1, state, {"checkpoint": start})
  checkpoints.close()
  text = json.dumps({"config": to_dict(config)})
  (workdir / "config.json").write_text(text)
  return assembly.model, join(before, frozen), join(after, frozen)


def adapted_layers(module):
  return [
    layer
    for layer in module.modules()
    if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
  ]


TARGETS = {"default": ("attn", "ff"), "everything": ("",)}
# Layers that LoRA adapts: attention and feed-forward of the blocks (the first
# of SD3 attends twice, its last has neither output nor feed-forward for the
# text; those of Wan attend twice; HunyuanVideo has a refiner block). With
# "everything", all linear ones.
ADAPTED = {
  ("flux", "default"): 2 * (8 + 4) + 2 * 3,
  ("qwen_image", "default"): 2 * (8 + 4),
  ("stable_diffusion_3", "default"): (8 + 4 + 4) + (8 + 4) + (7 + 2),
  ("wan", "default"): 2 * (8 + 2),
  ("hunyuan_video", "default"): 2 * (8 + 4) + 3 + (4 + 2),
}


@pytest.mark.parametrize(
  ("name", "targets"),
  [
    pytest.param(name, targets, marks=[pytest.mark.slow] * slow)
    for name in PARTS
    for targets in TARGETS
    for slow in [
      targets == "everything" or name in ("qwen_image", "stable_diffusion_3")
    ]
  ],
)
def test_diffusers_loads_what_is_exported(name, targets, checkpoints, tmp_path):
  checkpoint = checkpoints(name)
  config = family_config(name, checkpoint, tmp_path)
  config.train.lora_rank, config.train.lora_alpha = 3, 5.0
  config.train.lora_targets = TARGETS[targets]
  model, before, after = adapted_run(config, tmp_path)
  jobs.export_run(tmp_path, tmp_path / "lora")
  jobs.export_run(tmp_path, tmp_path / "merged", "pipeline")

  (case,) = (
    c
    for c in cases.CASES.values()
    if c.family.class_name == PARTS[name][0].__name__
  )
  work = case.workload(0, tiny=True)
  inputs = cases.inputs(case, model.config, work, batch=2)
  with jax.default_matmul_precision("highest"):
    apply = references.jit(model.apply)
    base, expected = (apply(p, *inputs) for p in (before, after))
  assert np.abs(base - expected).max() > 0.03

  adapted = diffusers.DiffusionPipeline.from_pretrained(checkpoint)
  linears = [
    layer
    for layer in adapted.transformer.modules()
    if isinstance(layer, torch.nn.Linear)
  ]
  adapted.load_lora_weights(str(tmp_path / "lora"))
  count = ADAPTED.get((name, targets), len(linears))
  assert len(adapted_layers(adapted.transformer)) == count > 0
  merged = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
  assert not adapted_layers(merged.transformer)
  tensors = jax.tree.map(torch.from_numpy, inputs)
  for pipeline in (adapted, merged):
    module = pipeline.transformer.requires_grad_(False)
    actual = reference.velocity(module, *tensors)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


LARGE = {
  "flux": (32, 32),  # at 4 pixels a token
  "stable_diffusion_3": (32, 32),
  # Flips average out over latents, and this one has the most text beside them.
  "hunyuan_video": (192, 192),
}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_fully")  # rounds as users' programs do
@pytest.mark.parametrize("name", PARTS)
def test_ratios_in_bfloat16(name, checkpoints, tmp_path):
  """Before the first update, rollout and training agree on probabilities."""
  config = family_config(name, checkpoints(name), tmp_path)
  config.steps, config.dtype.compute = 4, "bfloat16"
  # XLA's CPU compiler sums arrays below 4,096 elements in another order: 8
  # rows (of samples, or with guidance of pairs) of 24 tokens, 48 wide, are
  # well above it in both roles, text included.
  config.batch.group_size = 4 if name in GUIDED else 8
  config.sampling.height, config.sampling.width = LARGE.get(name, (64, 96))
  if config.sampling.text_length:
    config.sampling.text_length = 24
  config.train.clip_range = Train().clip_range
  config.train.lora_rank, config.train.lora_targets = 4, ("attn",)
  training.train(from_config_dict(config), tmp_path / "run")
  rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
  for row in rows:
    found = row["ratio_max_abs_log"]
    print(f"{name} bfloat16: |log ratio| <= {found:.1e}")
    assert 0 <= found < config.train.clip_range / 10
