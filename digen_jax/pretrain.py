"""Pre-training of the embedded checkpoint: a small FLUX on drawn scenes.

An autoencoder first, then flow matching in its latents, jointly with both
text encoders. At the end, briefly, facts of the captions are replaced at
random: the model still draws everything and knows what was asked, but listens
badly, which is what reinforcement learning is to mend. (With such captions from
the start it would learn five times more slowly what a caption means.)
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from digen_jax.data.tokenizer import TokenizerInfo
from digen_jax.errors import UserError
from digen_jax.models import Model, create_model, text, vae
from digen_jax.models.flux import FluxConfig
from digen_jax.models.text import TextEncoder
from digen_jax.models.text.clip import ClipTextConfig
from digen_jax.models.text.t5 import T5Config
from digen_jax.models.vae.autoencoder_kl import AutoencoderKLConfig
from digen_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from digen_jax.types import Conditioning

# loss(params, rows, key) -> scalar, rows being a batch of the data
Loss = Callable[[Any, Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How long and how fast to train.

  Attributes:
    steps: optimiser steps.
    batch: rows per step.
    learning_rate: peak of a cosine that follows a linear warm-up.
    warmup: steps of the warm-up.
    ema: decay per step of the averaged parameters, which are the result.
    report_every: steps between two reports.
  """

  steps: int
  batch: int
  learning_rate: float
  warmup: int = 50
  ema: float = 0.99
  report_every: int = 25


TRAININGS = (
  "autoencoder_training",
  "flow_training",
  "cycle",
  "detuning",
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """All of a pre-training; see `configs/pretrain_shapes.py`.

  Attributes:
    seed: of everything random.
    scenes: number of scenes drawn.
    captions: corrupted versions of each scene's caption.
    corruption: share of the facts in them that are replaced.
    max_length: tokens of a prompt.
    kl_weight: of the autoencoder's loss.
    autoencoder: sizes, fields of `AutoencoderKLConfig`.
    transformer: sizes, fields of `FluxConfig`.
    clip: sizes, fields of `ClipTextConfig`.
    t5: sizes, fields of `T5Config`.
    autoencoder_training: see `TrainSettings`.
    flow_training: see `TrainSettings`; with the right captions.
    cycle: see `TrainSettings`; the same once more, from the averaged
      parameters, with a learning rate that starts high again.
    cycles: how often.
    detuning: see `TrainSettings`; what follows with the corrupted ones.
    eval_prompts: file of held-out prompts.
    eval_steps: denoising steps of the evaluation.
  """

  seed: int
  scenes: int
  captions: int
  corruption: float
  max_length: int
  kl_weight: float
  autoencoder: dict[str, Any]
  transformer: dict[str, Any]
  clip: dict[str, Any]
  t5: dict[str, Any]
  autoencoder_training: TrainSettings
  flow_training: TrainSettings
  cycle: TrainSettings
  cycles: int
  detuning: TrainSettings
  eval_prompts: str
  eval_steps: int

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "PretrainConfig":
    """Builds the record from nested mappings; UserError names bad fields."""
    values = dict(values)
    try:
      for name in TRAININGS:
        values[name] = TrainSettings(**values[name])
      return cls(**values)
    except (KeyError, TypeError) as error:
      raise UserError(
        f"pre-training config: {error}; take configs/pretrain_shapes.py as "
        "the pattern"
      ) from error


@dataclasses.dataclass(frozen=True)
class Progress:
  """What `train` reports.

  Attributes:
    step: steps done.
    steps: of the whole training.
    loss: mean since the last report.
    steps_per_second: since the start, compilation included.
    seconds_left: at that rate.
  """

  step: int
  steps: int
  loss: float
  steps_per_second: float
  seconds_left: float


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks of a FLUX pipeline."""

  autoencoder: vae.Autoencoder
  transformer: Model
  clip: TextEncoder
  t5: TextEncoder


def create_networks(config: PretrainConfig, tokens: TokenizerInfo) -> Networks:
  """Freshly initialised networks that fit each other and the tokenizers."""
  keys = jax.random.split(jax.random.key(config.seed), 4)
  clip = ClipTextConfig(
    vocab_size=tokens.clip_vocab_size,
    eos_token_id=tokens.clip_eos_id,
    max_position_embeddings=tokens.max_length,
    **config.clip,
  )
  t5 = T5Config(vocab_size=tokens.t5_vocab_size, **config.t5)
  autoencoder = AutoencoderKLConfig(
    scaling_factor=1.0, shift_factor=0.0, **config.autoencoder
  )
  transformer = FluxConfig(
    in_channels=4 * autoencoder.latent_channels,
    joint_attention_dim=t5.d_model,
    pooled_projection_dim=clip.hidden_size,
    **config.transformer,
  )
  return Networks(
    vae.create_autoencoder(autoencoder, keys[0]),
    create_model(transformer, keys[1]),
    text.create_text_encoder(clip, keys[2]),
    text.create_text_encoder(t5, keys[3]),
  )


def autoencoder_loss(autoencoder: vae.Autoencoder, kl_weight: float) -> Loss:
  """Absolute and squared error plus a weighted KL divergence to N(0, 1).

  Rows are images [B, H, W, 3] uint8. The absolute error makes edges sharp; on
  its own it is content with the plain ground for hundreds of steps, which the
  squared error is not. Source: Rombach et al. 2022, appendix G, without the
  adversarial and perceptual terms: drawn scenes need neither.
  """

  def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    module = nnx.merge(autoencoder.graphdef, params)
    images = _signed(images)
    mean, logvar = module.encode(images)
    noise = jax.random.normal(key, mean.shape)
    error = module.decode(mean + jnp.exp(0.5 * logvar) * noise) - images
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    fit = jnp.mean(jnp.abs(error)) + 4.0 * jnp.mean(jnp.square(error))
    return fit + kl_weight * kl

  return loss


def _signed(images: jax.Array) -> jax.Array:
  """uint8 -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def flow_loss(networks: Networks) -> Loss:
  """Flow matching: mean squared error of the velocity, noise - x0.

  Rows are (latents [B, h, w, c], clip_ids [B, V, T], t5_ids [B, V, T]) with V
  captions to choose from; parameters are those of `flow_params`. Noise levels
  are logit-normal: Esser et al. 2024 (SD3), section 3.1.
  """

  def loss(params: Any, rows: Any, key: jax.Array) -> jax.Array:
    latents, clip_ids, t5_ids = rows
    batch, variants = clip_ids.shape[:2]
    keys = jax.random.split(key, 3)
    row = jnp.arange(batch)
    chosen = jax.random.randint(keys[0], (batch,), 0, variants)
    clip = networks.clip.encode(params["clip"], clip_ids[row, chosen])
    tokens = networks.t5.encode(params["t5"], t5_ids[row, chosen])
    sigma = jax.nn.sigmoid(jax.random.normal(keys[1], (batch,)))
    noise = jax.random.normal(keys[2], latents.shape)
    level = sigma[:, None, None, None]
    velocity = networks.transformer.apply(
      params["transformer"],
      (1.0 - level) * latents + level * noise,
      sigma,
      Conditioning(text=tokens, pooled=clip.pooled),
    )
    return jnp.mean(jnp.square(velocity - (noise - latents)))

  return loss


def flow_params(networks: Networks) -> dict[str, Any]:
  """The parameters that `flow_loss` trains."""
  names = ("transformer", "clip", "t5")
  return {name: getattr(networks, name).params for name in names}


def with_flow_params(networks: Networks, params: Mapping[str, Any]) -> Networks:
  """The networks with other parameters, the inverse of `flow_params`."""
  replaced = {
    name: dataclasses.replace(getattr(networks, name), params=value)
    for name, value in params.items()
  }
  return dataclasses.replace(networks, **replaced)


def train(
  loss: Loss,
  params: Any,
  data: Any,
  settings: TrainSettings,
  *,
  seed: int,
  report: Callable[[Progress], None],
) -> Any:
  """Minimises `loss` with AdamW on random rows of `data`.

  The rows of a step are spread over all devices.

  Args:
    loss: called as loss(params, rows, key).
    params: pytree of float32 arrays.
    data: pytree of arrays with a common leading axis, kept on every device.
    settings: see `TrainSettings`.
    seed: of rows and noise.
    report: called every `settings.report_every` steps and at the end.

  Returns:
    The averaged parameters.
  """
  mesh = make_mesh({"data": jax.device_count()}, jax.devices())
  spread, whole = batch_sharding(mesh), replicated(mesh)
  if settings.batch % mesh.size:
    raise UserError(
      f"the batch of {settings.batch} rows does not divide over {mesh.size} "
      "devices: choose a multiple"
    )
  optimiser = _optimiser(settings)
  size = jax.tree.leaves(data)[0].shape[0]
  base = jax.random.key(seed)

  # One call per step: XLA's CPU convolutions are 15 times slower inside a
  # compiled loop.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=whole)
  def step(carry: Any, index: jax.Array, data: Any) -> tuple[Any, jax.Array]:
    params, state, average = carry
    row_key, loss_key = jax.random.split(jax.random.fold_in(base, index))
    rows = jax.random.randint(row_key, (settings.batch,), 0, size)
    batch = jax.tree.map(lambda x: x[rows], data)
    batch = jax.lax.with_sharding_constraint(batch, spread)
    value, grads = jax.value_and_grad(loss)(params, batch, loss_key)
    # optax mixes integer counts with floats; allow it that here only.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimiser.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    # A young average would remember its start: let its horizon grow.
    age = index.astype(jnp.float32)
    decay = jnp.minimum(settings.ema, (1.0 + age) / (10.0 + age))
    average = optax.incremental_update(params, average, 1.0 - decay)
    return (params, state, average), value

  copy = functools.partial(jax.tree.map, jnp.copy)  # `step` donates
  carry = (params, optimiser.init(params), params)
  carry = jax.jit(copy, out_shardings=whole)(jax.device_put(carry, whole))
  data = jax.device_put(data, whole)
  start, losses = time.monotonic(), []
  for done in range(1, settings.steps + 1):
    carry, value = step(carry, jnp.int32(done - 1), data)
    losses.append(value)
    if done % settings.report_every == 0 or done == settings.steps:
      mean = float(jnp.stack(losses).mean())
      losses, seconds = [], time.monotonic() - start
      left = seconds * (settings.steps - done) / done
      report(Progress(done, settings.steps, mean, done / seconds, left))
  return jax.device_put(carry[2], jax.devices()[0])


def _optimiser(settings: TrainSettings) -> optax.GradientTransformation:
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, settings.learning_rate, settings.warmup, settings.steps
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99)
  )


def encode_images(
  autoencoder: vae.Autoencoder, images: np.ndarray, *, batch: int = 250
) -> np.ndarray:
  """Normalised latents [N, h, w, c] float32 of images [N, H, W, 3] uint8.

  The last batch repeats its last row, so that one compilation serves all.
  """
  encode = jax.jit(autoencoder.encode)
  parts = []
  for first in range(0, len(images), batch):
    rows = np.minimum(np.arange(first, first + batch), len(images) - 1)
    pixels = images[rows].astype(np.float32) / 255
    parts.append(np.asarray(encode(autoencoder.params, pixels)))
  return np.concatenate(parts)[: len(images)]


def with_autoencoder_params(
  networks: Networks, params: Any, images: np.ndarray
) -> Networks:
  """The networks with a trained autoencoder, its latents normalised.

  Args:
    networks: whose autoencoder has shift 0 and scale 1.
    params: of the autoencoder.
    images: [N, H, W, 3] uint8; the shift and scale are such that the latents
      of the first 2000 have mean 0 and standard deviation 1.
  """
  raw = dataclasses.replace(networks.autoencoder, params=params)
  latents = encode_images(raw, images[:2000])
  config = dataclasses.replace(
    raw.config,
    shift_factor=float(latents.mean()),
    scaling_factor=float(1 / latents.std()),
  )
  scaled = vae.abstract_autoencoder(config)
  scaled = dataclasses.replace(scaled, params=params)
  return dataclasses.replace(networks, autoencoder=scaled)
