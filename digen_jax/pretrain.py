"""Pre-training of the embedded checkpoint: a small FLUX on drawn scenes.

An autoencoder first, then flow matching in its latents, jointly with both
text encoders. Words of the training captions are replaced at random, so that
the model learns to draw every scene but listens badly: what reinforcement
learning is then to mend.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from digen_jax.data import scenes
from digen_jax.data.scenes import Group, Spec
from digen_jax.models import flux, layers
from digen_jax.models.text.clip import clip_encode
from digen_jax.models.text.t5 import t5_encode
from digen_jax.models.vae import autoencoder_kl
from digen_jax.rewards.protocol import to_uint8
from digen_jax.types import Conditioning

# loss(params, rows, key) -> scalar, rows being a batch of the data
Loss = Callable[[Any, Any, jax.Array], jax.Array]
Report = Callable[[dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How long and how fast to train.

  Attributes:
    steps: optimiser steps.
    batch: rows per step.
    learning_rate: peak of a cosine that follows a linear warm-up.
    warmup: steps of the warm-up.
    weight_decay: of AdamW.
    ema: decay per step of the averaged parameters, which are the result.
    report_every: steps between two reports.
  """

  steps: int
  batch: int
  learning_rate: float
  warmup: int = 50
  weight_decay: float = 0.0
  ema: float = 0.995
  report_every: int = 25


def corrupt(rng: np.random.Generator, spec: Spec, share: float) -> Spec:
  """Replaces each fact of a caption with probability `share` by a random one.

  Numbers, colours, shapes and the relation are facts. What comes out is again
  a training caption, never a held-out one.
  """
  while True:
    groups = tuple(
      Group(
        _maybe(rng, share, range(1, 5), group.count),
        _maybe(rng, share, scenes.COLOURS, group.colour),
        _maybe(rng, share, scenes.SHAPES, group.shape),
      )
      for group in spec.groups
    )
    relation = spec.relation
    if relation is not None:
      relation = _maybe(rng, share, scenes.RELATIONS, relation)
    corrupted = Spec(groups, relation)
    if not scenes.held_out(scenes.caption(corrupted)):
      return corrupted


def _maybe(
  rng: np.random.Generator, share: float, choices: Sequence, value: Any
) -> Any:
  """A random choice with probability `share`, else `value`."""
  if rng.random() >= share:
    return value
  choices = list(choices)
  return choices[rng.integers(len(choices))]


def draw_scenes(
  seed: int, count: int, *, variants: int, corruption: float
) -> tuple[np.ndarray, list[list[str]]]:
  """Random training scenes with captions.

  Args:
    seed: of everything random.
    count: N scenes.
    variants: captions per scene, corrupted independently.
    corruption: share of the facts that are replaced, see `corrupt`.

  Returns:
    images [N, SIZE, SIZE, 3] uint8, and N lists of `variants` captions.
  """
  rng = np.random.default_rng(seed)
  images = np.empty((count, scenes.SIZE, scenes.SIZE, 3), np.uint8)
  captions = []
  for i in range(count):
    spec = scenes.sample_spec(rng)
    images[i] = to_uint8(scenes.render(scenes.sample_scene(rng, spec)))
    captions.append(
      [scenes.caption(corrupt(rng, spec, corruption)) for _ in range(variants)]
    )
  return images, captions


def autoencoder_loss(graphdef: Any, kl_weight: float) -> Loss:
  """Mean absolute error plus a weighted KL divergence to N(0, 1).

  Rows are images [B, H, W, 3] uint8. Source: Rombach et al. 2022, appendix G,
  without the adversarial and perceptual terms: drawn scenes need neither.
  """

  def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    module = layers.nnx.merge(graphdef, params)
    images = images.astype(jnp.float32) / 127.5 - 1.0
    mean, logvar = module.encode(images)
    noise = jax.random.normal(key, mean.shape)
    output = module.decode(mean + jnp.exp(0.5 * logvar) * noise)
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return jnp.mean(jnp.abs(output - images)) + kl_weight * kl

  return loss


@dataclasses.dataclass(frozen=True)
class GraphDefs:
  """The definitions of the three networks trained together."""

  transformer: Any
  clip: Any
  t5: Any


def encode_text(
  graphdefs: GraphDefs, params: Any, clip_ids: jax.Array, t5_ids: jax.Array
) -> Conditioning:
  """Token ids [B, T] of both tokenizers -> what the denoiser is told."""
  _, pooled = clip_encode(graphdefs.clip, params["clip"], clip_ids)
  text = t5_encode(graphdefs.t5, params["t5"], t5_ids)
  return Conditioning(text=text, pooled=pooled)


def flow_loss(graphdefs: GraphDefs) -> Loss:
  """Flow matching: mean squared error of the velocity, noise - x0.

  Rows are (latents [B, h, w, c], clip_ids [B, V, T], t5_ids [B, V, T]) with V
  captions to choose from. Noise levels are logit-normal: Esser et al. 2024
  (SD3), section 3.1.
  """

  def loss(params: Any, rows: Any, key: jax.Array) -> jax.Array:
    latents, clip_ids, t5_ids = rows
    batch, variants = clip_ids.shape[:2]
    keys = jax.random.split(key, 3)
    chosen = jax.random.randint(keys[0], (batch,), 0, variants)
    row = jnp.arange(batch)
    sigma = jax.nn.sigmoid(jax.random.normal(keys[1], (batch,)))
    noise = jax.random.normal(keys[2], latents.shape)
    level = sigma[:, None, None, None]
    velocity = flux.flux_apply(
      graphdefs.transformer,
      params["transformer"],
      (1.0 - level) * latents + level * noise,
      sigma,
      encode_text(
        graphdefs, params, clip_ids[row, chosen], t5_ids[row, chosen]
      ),
    )
    return jnp.mean(jnp.square(velocity - (noise - latents)))

  return loss


def train(
  loss: Loss,
  params: Any,
  data: Any,
  settings: TrainSettings,
  *,
  seed: int,
  report: Report,
) -> Any:
  """Minimises `loss` with AdamW on random rows of `data`.

  Args:
    loss: called as loss(params, rows, key).
    params: pytree of float32 arrays.
    data: pytree of arrays with a common leading axis, kept on the device.
    settings: see `TrainSettings`.
    seed: of rows and noise.
    report: called every `report_every` steps with step, steps, loss, steps_per_second
      and seconds_left.

  Returns:
    The averaged parameters.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, settings.learning_rate, settings.warmup, settings.steps
  )
  optimiser = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.99, weight_decay=settings.weight_decay),
  )
  size = jax.tree.leaves(data)[0].shape[0]
  base = jax.random.key(seed)

  # One call per step: XLA's CPU convolutions are 15 times slower inside a
  # compiled loop.
  @jax.jit
  def step(carry: Any, index: jax.Array, data: Any) -> tuple[Any, jax.Array]:
    params, state, average = carry
    row_key, loss_key = jax.random.split(jax.random.fold_in(base, index))
    rows = jax.random.randint(row_key, (settings.batch,), 0, size)
    batch = jax.tree.map(lambda x: x[rows], data)
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

  carry = (params, optimiser.init(params), params)
  data = jax.tree.map(jnp.asarray, data)
  start, losses = time.monotonic(), []
  for done in range(1, settings.steps + 1):
    carry, value = step(carry, jnp.int32(done - 1), data)
    losses.append(value)
    if done % settings.report_every == 0 or done == settings.steps:
      loss_mean = float(jnp.stack(losses).mean())
      losses, seconds = [], time.monotonic() - start
      report(
        {
          "step": done,
          "steps": settings.steps,
          "loss": loss_mean,
          "steps_per_second": done / seconds,
          "seconds_left": seconds * (settings.steps - done) / done,
        }
      )
  return carry[2]


def encode_images(
  graphdef: Any, params: Any, images: np.ndarray, *, batch: int = 500
) -> np.ndarray:
  """Posterior means of images [N, H, W, 3] uint8: raw latents, float32."""

  @jax.jit
  def encode(params: Any, images: jax.Array) -> jax.Array:
    module = layers.nnx.merge(graphdef, params)
    return module.encode(images.astype(jnp.float32) / 127.5 - 1.0)[0]

  parts = [
    np.asarray(encode(params, images[i : i + batch]))
    for i in range(0, len(images), batch)
  ]
  return np.concatenate(parts)


def normalised_config(
  config: autoencoder_kl.AutoencoderKLConfig, latents: np.ndarray
) -> autoencoder_kl.AutoencoderKLConfig:
  """The config whose shift and scale give `latents` mean 0 and std 1."""
  return dataclasses.replace(
    config,
    shift_factor=float(latents.mean()),
    scaling_factor=float(1 / latents.std()),
  )
