"""The pure functions that units run, compiled for the mesh of their lane.

Each takes every array it reads as an argument (nothing is baked into a
compiled program but schedules) and leaves placement to the shardings it is
given. `Recipe` holds what is static in a run.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from digen_jax.grpo.train_step import KlForm, join, train_step
from digen_jax.optimizer import ema_update
from digen_jax.parallel.mesh import one_by_one
from digen_jax.sampling.denoise import Apply
from digen_jax.sampling.kernels import Kernel, make_kernel
from digen_jax.sampling.rollout import initial_latents, rollout
from digen_jax.types import Conditioning, Guidance, TrainBatch, Trajectory

EVAL_STREAM = 0x7FFFFFFF  # a step number that training never reaches


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is fixed when a run is compiled.

  Attributes:
    apply: `apply(params, latents, sigma, conditioning) -> velocity`.
    decode: `(decoder params, latents [B, ...]) -> [B, (F,) H, W, 3]` in
      [0, 1].
    solve: the deterministic sampler, `sample_ode` or `sample_unipc`.
    sigmas: [num_steps + 1] float32 schedule of rollouts.
    eval_sigmas: the schedule of the deterministic sampler.
    kernel_name: transition of the trained steps.
    noise_level: its noise level.
    window: number of trained steps.
    shared_noise: whether the samples of a group start from the same latents.
    latent_shape: of one sample.
    guidance_scale: classifier-free guidance; 1 is off.
    rescale_guidance: see `types.Guidance`.
    clip_range: PPO clip.
    kl_weight: weight of the KL to the reference; 0 leaves it out.
    kl_form: see `grpo.train_step`.
    rows_per_update: trained transitions of one optimiser update.
    ema_decay: of the averaged parameters; 0 leaves them out.
    eval_batch_size: samples that the deterministic sampler makes at once.
    sequential: whether a device decodes its samples one after the other.
    mesh: where it runs, once that is known.
  """

  apply: Apply
  decode: Callable[[Any, jax.Array], jax.Array]
  solve: Callable[..., jax.Array]
  sigmas: np.ndarray
  eval_sigmas: np.ndarray
  kernel_name: str
  noise_level: float
  window: int
  shared_noise: bool
  latent_shape: tuple[int, ...]
  guidance_scale: float
  rescale_guidance: bool
  clip_range: float
  kl_weight: float
  kl_form: KlForm
  rows_per_update: int
  ema_decay: float
  eval_batch_size: int
  sequential: bool = False
  mesh: Mesh | None = None

  @property
  def kernel(self) -> Kernel:
    """The transition with its options bound."""
    return make_kernel(
      self.kernel_name,
      noise_level=self.noise_level,
      sigma_max=float(self.sigmas[1]),
    )

  def step_weights(self, trained: int) -> np.ndarray:
    """Weight of every step's rows in the loss: [num_steps] float32.

    A step that adds little noise has a large gradient and little influence on
    the reward; weighting by the standard deviation of the noise evens that
    out. Mean 1 over the first `trained` steps. Source: He et al. 2025
    (TempFlow-GRPO), noise-aware weighting.
    """
    zero = np.zeros((1, 1), np.float32)
    steps = zip(self.sigmas[:-1], self.sigmas[1:])
    std = [float(np.mean(self.kernel(zero, zero, *s).std)) for s in steps]
    return np.float32(std) / np.float32(np.mean(std[:trained]))


def generate(
  recipe: Recipe,
  trainable: Any,
  frozen: Any,
  decoder: Any,
  prompts: Conditioning,
  negative: Conditioning | None,
  rows: jax.Array,
  start: jax.Array,
  numbers: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
) -> tuple[Trajectory, jax.Array]:
  """Samples trajectories and decodes them.

  Args:
    recipe: the run.
    trainable: parameters being trained.
    frozen: the others.
    decoder: autoencoder parameters.
    prompts: [G, ...] conditioning of the prompts in this unit.
    negative: [1, ...] conditioning of the negative prompt, with guidance.
    rows: [B] int32, which prompt each sample belongs to.
    start: [B] int32 first trained step of each sample.
    numbers: seed [], global step [], group [B] and member [B] of each sample:
      all that its noise depends on.

  Returns:
    The trajectories, and [B, H, W, 3] uint8 images, or [B, F, H, W, 3]
    videos.
  """
  keys = first = _sample_keys(*numbers)
  if recipe.shared_noise:
    seed, step, group, member = numbers
    first = _sample_keys(seed, step, group, jnp.zeros_like(member))
  trajectory = rollout(
    recipe.apply,
    join(trainable, frozen),
    initial_latents(first, (rows.shape[0], *recipe.latent_shape)),
    jax.tree.map(lambda x: x[rows], prompts),
    recipe.sigmas,
    key=keys,
    kernel=recipe.kernel,
    window=(start, recipe.window),
    guidance=_guidance(recipe, negative, rows.shape[0]),
  )
  return trajectory, _decode(recipe, decoder, trajectory.final)


def sample(
  recipe: Recipe,
  trainable: Any,
  frozen: Any,
  decoder: Any,
  prompts: Conditioning,
  negative: Conditioning | None,
  seed: jax.Array,
  index: jax.Array,
) -> jax.Array:
  """Deterministic samples for evaluation, from fixed noise.

  Args:
    recipe: the run.
    trainable: parameters being trained.
    frozen: the others.
    decoder: autoencoder parameters.
    prompts: [B, ...] conditioning.
    negative: [1, ...] conditioning of the negative prompt, with guidance.
    seed: [] uint32.
    index: [B] int32 number of each sample: its noise depends on that and the
      seed alone.

  Returns:
    [B, H, W, 3] uint8 images, or [B, F, H, W, 3] videos.
  """
  keys = _sample_keys(
    seed, jnp.uint32(EVAL_STREAM), index, jnp.zeros_like(index)
  )
  noise = initial_latents(keys, (index.shape[0], *recipe.latent_shape))
  params = join(trainable, frozen)
  latents = denoise(recipe, params, noise, prompts, negative)
  return _decode(recipe, decoder, latents)


def denoise(
  recipe: Recipe,
  params: Any,
  noise: jax.Array,
  prompts: Conditioning,
  negative: Conditioning | None,
  *,
  record: bool = False,
) -> jax.Array:
  """Noise to clean latents with the deterministic sampler.

  Args:
    recipe: the run.
    params: all of the denoiser's.
    noise: [B, ...] initial latents.
    prompts: [B, ...] conditioning.
    negative: [1, ...] or [B, ...] conditioning, with guidance.
    record: return the latents after every step.

  Returns:
    [B, ...] float32, [n, B, ...] with `record`.
  """
  return recipe.solve(
    recipe.apply,
    params,
    noise,
    prompts,
    recipe.eval_sigmas,
    guidance=_guidance(recipe, negative, noise.shape[0]),
    record=record,
  )


def gradients(
  recipe: Recipe,
  trainable: Any,
  frozen: Any,
  reference: Any,
  batch: TrainBatch,
  rows: jax.Array,
  prompts: Conditioning,
  negative: Conditioning | None,
) -> tuple[Any, dict[str, jax.Array]]:
  """Summed gradient and metrics of a pack of transitions.

  Args:
    recipe: the run.
    trainable: parameters being trained, float32 or as layers read them.
    frozen: the others.
    reference: trainable parameters of the reference policy; None when
      `kl_weight` is 0.
    batch: [N, ...] rows; their conditioning is put together here.
    rows: [N] int32, which prompt each row belongs to.
    prompts: [G, ...] conditioning of the prompts in this pack.
    negative: [1, ...] conditioning of the negative prompt, with guidance.

  Returns:
    The gradient in float32, to be summed over the packs of an update, and
    summed metrics.
  """
  # A lane that was sent them has them rounded; gradients are float32.
  trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
  batch = dataclasses.replace(
    batch,
    conditioning=jax.tree.map(lambda x: x[rows], prompts),
    guidance=_guidance(recipe, negative, rows.shape[0]),
  )
  return train_step(
    recipe.apply,
    trainable,
    batch,
    kernel=recipe.kernel,
    clip_range=recipe.clip_range,
    normalizer=recipe.rows_per_update,
    advantage_clip=None,  # group_advantages has clipped them
    frozen=frozen,
    kl_weight=recipe.kl_weight,
    kl_form=recipe.kl_form,
    reference=join(reference, frozen) if recipe.kl_weight else None,
  )


def update(
  recipe: Recipe,
  optimizer: optax.GradientTransformation,
  state: dict[str, Any],
  gradient: Any,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """One optimiser update.

  Args:
    recipe: the run.
    optimizer: from `make_optimizer`.
    state: {"trainable", "optimizer", "ema"}; `ema` is None without averaging.
    gradient: accumulated over the whole update.

  Returns:
    The new state, which is the old one where the gradient is not finite, and
    {"grad_norm"}, before clipping.
  """
  # optax mixes integer counts and floats, which strict promotion refuses.
  with jax.numpy_dtype_promotion("standard"):
    updates, optimizer_state = optimizer.update(
      gradient, state["optimizer"], state["trainable"]
    )
  trainable = optax.apply_updates(state["trainable"], updates)
  ema = state["ema"]
  if recipe.ema_decay:
    ema = ema_update(ema, trainable, recipe.ema_decay)
  new = {"trainable": trainable, "optimizer": optimizer_state, "ema": ema}
  norm = optax.tree.norm(gradient)
  # The run ends there, and its state is to be worth saving.
  new = optax.tree.where(jnp.isfinite(norm), new, state)
  return new, {"grad_norm": norm}


def _sample_keys(
  seed: jax.Array, step: jax.Array, group: jax.Array, member: jax.Array
) -> jax.Array:
  """One key per sample, from who it is and not from who makes it."""
  key = jax.random.fold_in(jax.random.key(seed), step)

  def one(group: jax.Array, member: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, group), member)

  return jax.vmap(one)(group, member)


def _guidance(
  recipe: Recipe, negative: Conditioning | None, rows: int
) -> Guidance | None:
  if negative is None:
    return None
  return Guidance(
    jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), negative),
    jnp.float32(recipe.guidance_scale),
    rescale=recipe.rescale_guidance,
  )


def still(images: Any) -> Any:
  """A video of one frame is a picture: [B, 1, H, W, 3] -> [B, H, W, 3]."""
  return images[:, 0] if images.ndim == 5 and images.shape[1] == 1 else images


def _decode(recipe: Recipe, decoder: Any, latents: jax.Array) -> jax.Array:
  """[B, ...] latents -> [B, ...] uint8 pictures."""
  images = functools.partial(_images, recipe)
  if recipe.sequential and recipe.mesh is not None:
    images = one_by_one(images, recipe.mesh)
  return images(decoder, latents)


def _images(recipe: Recipe, decoder: Any, latents: jax.Array) -> jax.Array:
  images = still(recipe.decode(decoder, latents))
  return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)
