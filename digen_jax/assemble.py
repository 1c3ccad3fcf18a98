"""From a config to what a run is made of: models, weights, recipe, workload."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from digen_jax.config import Config, Sampling
from digen_jax.data.embeddings import cached_embeddings, known_embeddings
from digen_jax.data.prompt_encoder import load_prompt_encoder
from digen_jax.errors import UserError
from digen_jax.island import Weights
from digen_jax.metrics import pace_reporter
from digen_jax.models import Model, lora
from digen_jax.models.layers import Axes, Params
from digen_jax.models.published import MODELS, recognise
from digen_jax.models.vae import Autoencoder, Tiling
from digen_jax.parallel.mesh import make_meshes
from digen_jax.parallel.rules import ROLLOUT, Rules, param_shardings
from digen_jax.pipeline.units import Workload, part_of
from digen_jax.policy import Recipe
from digen_jax.sampling import sample_ode, sample_unipc, schedule_from_config
from digen_jax.types import Conditioning
from digen_jax.weights.adapters import check_adapters, load_adapters
from digen_jax.weights.load import (
  PipelineConfig,
  check_weights,
  load_abstract,
  load_abstract_autoencoder,
  load_autoencoder,
  load_model,
  load_pipeline_config,
)


@dataclasses.dataclass(frozen=True)
class Assembly:
  """A run before it is placed on devices.

  Attributes:
    config: the run.
    model: the denoiser, LoRA adapters included.
    autoencoder: latents to images.
    weights: split into trainable, frozen, decoder; None if left on disk.
    recipe: what is static.
    work: what a global step consists of.
  """

  config: Config
  model: Model
  autoencoder: Autoencoder
  weights: Weights | None
  recipe: Recipe
  work: Workload


def workload(config: Config) -> Workload:
  """The units of a global step."""
  window = config.sampling.window or config.sampling.num_steps - 1
  pipeline = config.pipeline
  pack = min(pipeline.timesteps_per_pack or window, window)
  samples = config.batch.prompts * config.batch.group_size
  size = pipeline.generate_size or config.batch.group_size
  return Workload(
    groups=config.batch.prompts,
    group_size=config.batch.group_size,
    window=window,
    updates=config.train.updates_per_batch,
    generate_size=size,
    train_size=pipeline.train_size or config.batch.group_size,
    pack=pack if pipeline.tsp else 1,
    scope=config.advantage.scope,
    gap=pipeline.gap,
    stale=part_of(-(-samples // size), pipeline.tcss),
    held=pipeline.held_gradients,
  )


def training_mesh(config: Config) -> Mesh:
  """The mesh, in this process, of the lane that trains.

  Raises:
    UserError: the devices do not suffice.
  """
  mesh = config.mesh
  meshes = make_meshes(config.pipeline.mode, mesh.rollout, mesh.trainer)
  return meshes["trainer" if "trainer" in meshes else "colocated"]


def assemble(
  config: Config,
  *,
  weights: bool = True,
  mesh: Mesh | None = None,
  rules: Rules = ROLLOUT,
  training: bool = True,
) -> Assembly:
  """Loads the checkpoint of a config and prepares it for training.

  What can be checked on shapes is, before any weights are read. No device ever
  holds more of the denoiser than its part of the layout.

  Args:
    config: the run.
    weights: False leaves the weights on disk: the assembly has none.
    mesh: where to load them; None means the default device.
    rules: layout of the denoiser on the mesh; the decoder is on every device.
    training: False keeps all parameters as they are computed with, in
      `config.dtype.compute`: enough for sampling.

  Raises:
    UserError: the checkpoint is incomplete, damaged or of another family; the
      image size does not fit the model; LoRA targets match nothing; a LoRA
      file does not fit; the mesh cuts what cannot be cut.
  """
  pipeline = load_pipeline_config(config.checkpoint)
  base = load_abstract(
    config.checkpoint, dtype=config.dtype.compute, remat=config.train.remat
  )
  model = _with_abstract_adapters(config, base)
  autoencoder = load_abstract_autoencoder(
    config.checkpoint, **_decoding(config, pipeline)
  )
  recipe = _recipe(config, model, autoencoder, pipeline)
  check_weights(config.checkpoint, "vae", autoencoder.params)
  check_weights(config.checkpoint, "transformer", base.params)
  assembly = Assembly(
    config, model, autoencoder, None, recipe, workload(config)
  )
  return (
    with_weights(assembly, mesh=mesh, rules=rules, training=training)
    if weights
    else assembly
  )


def with_weights(
  assembly: Assembly,
  *,
  mesh: Mesh | None = None,
  rules: Rules = ROLLOUT,
  training: bool = True,
) -> Assembly:
  """Reads the weights of an assembly that was made without them.

  Args:
    assembly: the run.
    mesh: as for `assemble`, and so are the others.
    rules: layout of the denoiser.
    training: False keeps all parameters as they are computed with.

  Raises:
    UserError: the files are damaged.
  """
  config = assembly.config
  # The small one first: should its files be damaged, that shows at once.
  autoencoder = load_autoencoder(
    config.checkpoint,
    mesh=mesh,
    **_decoding(config, load_pipeline_config(config.checkpoint)),
  )
  model = _denoiser(config, mesh, rules, training)
  trainable, frozen = lora.split_trainable(
    model.params, "lora" if config.train.lora_rank else "full"
  )
  return dataclasses.replace(
    assembly,
    model=model,
    autoencoder=autoencoder,
    weights=Weights(
      trainable,
      frozen,
      autoencoder.params,
      model.logical_axes,
      model.read_dtypes,
    ),
  )


LORA_STREAM = 0x4C4F5241


def _with_abstract_adapters(config: Config, model: Model) -> Model:
  """The model with its adapters as shapes; UserError where they do not fit."""
  train = config.train
  if not train.lora_rank:
    return model
  adapted = []

  def adapt(params: Params) -> Params:
    adapted.append(_adapt(config, dataclasses.replace(model, params=params)))
    return adapted[0].params

  params = jax.eval_shape(adapt, model.params)
  model = dataclasses.replace(adapted[0], params=params)
  if train.lora_init:
    check_adapters(model, train.lora_init)
  return model


def _denoiser(
  config: Config, mesh: Mesh | None, rules: Rules, training: bool
) -> Model:
  """The model of a config with its adapters; arguments as for `assemble`."""
  train = config.train
  adapted = train.lora_rank > 0
  model = load_model(
    config.checkpoint,
    dtype=config.dtype.compute,
    # What is trained is kept in float32; a frozen base only as it is used.
    param_dtype="float32" if training and not adapted else None,
    remat=train.remat,
    mesh=mesh,
    rules=rules,
  )
  if not adapted:
    return model

  def sharding(shape: tuple[int, ...], axes: Axes) -> NamedSharding:
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return param_shardings(mesh, axes, leaf, rules)

  model = _adapt(config, model, None if mesh is None else sharding)
  if not train.lora_init:
    return model
  return load_adapters(model, train.lora_init, alpha=train.lora_alpha)


def _adapt(
  config: Config, model: Model, sharding: lora.Placement | None = None
) -> Model:
  train = config.train
  return lora.adapt(
    model,
    rank=train.lora_rank,
    alpha=train.lora_alpha,
    targets=train.lora_targets,
    key=jax.random.fold_in(jax.random.key(config.seed), LORA_STREAM),
    sharding=sharding,
  )


def _recipe(
  config: Config,
  model: Model,
  autoencoder: Autoencoder,
  pipeline: PipelineConfig,
) -> Recipe:
  sampling, work, family = config.sampling, workload(config), model.family
  _check_published(config, model)
  shape = _latent_shape(config, model, autoencoder)
  unipc = pipeline.scheduler.get("_class_name") == "UniPCMultistepScheduler"

  def schedule(num_steps: int) -> np.ndarray:
    return schedule_from_config(
      pipeline.scheduler,
      num_steps,
      seq_len=shape[-3] * shape[-2] // PATCH**2,
      base=family.schedule_base,
    )

  return Recipe(
    apply=model.apply,
    decode=autoencoder.decode,
    solve=sample_unipc if unipc else sample_ode,
    sigmas=schedule(sampling.num_steps),
    eval_sigmas=schedule(config.eval.num_steps),
    kernel_name=sampling.kernel,
    noise_level=sampling.noise_level,
    window=work.window,
    shared_noise=sampling.shared_noise,
    latent_shape=shape,
    guidance_scale=sampling.guidance_scale,
    rescale_guidance=family.rescale_guidance,
    clip_range=config.train.clip_range,
    kl_weight=config.train.kl_weight,
    kl_form=_kl_form(config.train.kl_form, family.video),
    rows_per_update=work.rows_per_update,
    ema_decay=config.train.ema_decay,
    eval_batch_size=config.eval.batch_size or work.generate_size,
    sequential=autoencoder.config.sequential,
  )


def _check_published(config: Config, model: Model) -> None:
  """UserError for a published model at the default, the toy's, sizes."""
  sampling, name = config.sampling, recognise(model.config)
  sizes = (sampling.height, sampling.width, sampling.num_frames)
  if name is None or sizes != (Sampling.height, Sampling.width, 1):
    return
  settings = dataclasses.asdict(MODELS[name].settings)
  tiling = settings.pop("tiling")
  shown = ", ".join(f"{key}={value}" for key, value in settings.items())
  raise UserError(
    f"{config.checkpoint} has the sizes of {name}, and config.sampling those "
    f"of a toy: set its fields, which are published as {shown}"
    + f", and config.vae.tiling={tiling}"
    * bool(tiling)
  )


def _decoding(config: Config, pipeline: PipelineConfig) -> dict[str, Any]:
  """`config.vae` as `load_autoencoder` takes it."""
  when, size = config.vae.sequential, config.vae.tiling
  videos = when == "videos" and pipeline.family.video
  return dict(
    sequential=when == "always" or videos,
    tiling=Tiling(size, size * 3 // 4) if size else None,
  )


def _kl_form(wanted: str, video: bool) -> str:
  if wanted != "auto":
    return wanted
  return "transition" if video else "diffusion"


PATCH = 2  # latent pixels along the side of a token, in all families


def _latent_shape(
  config: Config, model: Model, autoencoder: Autoencoder
) -> tuple[int, ...]:
  """(h, w, c) of an image, (f, h, w, c) of a video."""
  sampling, sizes = config.sampling, autoencoder.config
  unit = PATCH * sizes.downscale
  for name in ("height", "width"):
    size = getattr(sampling, name)
    if size < unit or size % unit:
      raise UserError(
        f"config.sampling.{name}={size} must be a positive multiple of {unit} "
        "for this checkpoint (autoencoder downscaling x latent patch)"
      )
  if config.vae.tiling % (4 * sizes.downscale):
    raise UserError(
      f"config.vae.tiling={config.vae.tiling} must be a multiple of "
      f"{4 * sizes.downscale} for this checkpoint (quarters of a tile are "
      "whole latents), or 0 to take pictures whole"
    )
  if model.config.latent_channels != sizes.latent_channels:
    raise UserError(
      f"{config.checkpoint}: the transformer takes latents of "
      f"{model.config.latent_channels} channels, the autoencoder makes "
      f"{sizes.latent_channels}: they are not of one pipeline"
    )
  height, width = (
    s // sizes.downscale for s in (sampling.height, sampling.width)
  )
  spatial = (height, width, sizes.latent_channels)
  frames, stride = sampling.num_frames, sizes.temporal_downscale
  if not model.family.video and frames == 1:
    return spatial
  if not model.family.video:
    raise UserError(
      f"config.sampling.num_frames={frames}: {model.family.class_name} makes "
      "images; leave it at 1"
    )
  if (frames - 1) % stride:
    raise UserError(
      f"config.sampling.num_frames={frames} must be one more than a multiple "
      f"of {stride} for this checkpoint"
    )
  return ((frames - 1) // stride + 1, *spatial)


def embedder(
  assembly: Assembly, keep: Path | None = None
) -> Callable[[Sequence[str]], Conditioning]:
  """A function of P prompts that gives their conditioning, [P, ...] on host.

  The text encoders are read when they are first needed, and live as long as
  the function.

  Args:
    assembly: the run.
    keep: directory to keep embeddings in where the config names none; None
      keeps none, and a set that the config names is only read.
  """
  config = assembly.config
  encoder = load_prompt_encoder(
    config.checkpoint,
    dtype=config.dtype.compute,
    max_length=config.sampling.text_length or None,
  )

  def embed(prompts: Sequence[str]) -> Conditioning:
    if keep:
      directory = config.embeddings or keep
      report = pace_reporter("encoded prompts")
      conditioning = cached_embeddings(encoder, prompts, directory, report)
    elif config.embeddings:
      conditioning = known_embeddings(encoder, prompts, config.embeddings)
    else:
      conditioning = encoder.encode(prompts)
    return with_guidance(config, assembly.model, conditioning)

  return embed


def embed(assembly: Assembly, prompts: Sequence[str]) -> Conditioning:
  """Conditioning of P prompts, [P, ...] on the host."""
  return embedder(assembly)(prompts)


def negative_conditioning(
  assembly: Assembly,
  embed: Callable[[Sequence[str]], Conditioning] | None = None,
) -> Conditioning | None:
  """[1, ...] conditioning of the negative prompt, where guidance needs it.

  Args:
    assembly: the run.
    embed: from `embedder`; None makes one.
  """
  if assembly.config.sampling.guidance_scale == 1.0:
    return None
  embed = embed or embedder(assembly)
  conditioning = embed([assembly.config.sampling.negative_prompt])
  return jax.tree.map(np.asarray, conditioning)


def with_guidance(
  config: Config, model: Model, prompts: Conditioning
) -> Conditioning:
  """Conditioning with the embedded guidance of models that are told it."""
  if not getattr(model.config, "guidance_embeds", False):
    return prompts
  scale = config.sampling.embedded_guidance
  guidance = np.full(len(prompts.text), scale, np.float32)
  return dataclasses.replace(prompts, guidance=guidance)
