"""From trajectories to gradients: fold, pad, differentiate, add up."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from digen_jax.errors import UserError
from digen_jax.grpo.losses import clipped, grpo_loss_rows, kl_to_reference
from digen_jax.sampling.denoise import Apply, denoise_step
from digen_jax.sampling.kernels import Kernel, Transition
from digen_jax.types import Guidance, TrainBatch, Trajectory

KlForm = Literal["diffusion", "transition"]


def train_step(
  apply: Apply,
  params: Any,
  batch: TrainBatch,
  *,
  kernel: Kernel,
  clip_range: float,
  normalizer: float | jax.Array | None = None,
  advantage_clip: float | None = 5.0,
  frozen: Any = None,
  kl_weight: float = 0.0,
  kl_form: KlForm = "diffusion",
  reference: Any = None,
) -> tuple[Any, dict[str, jax.Array]]:
  """Gradient of the GRPO loss on one pack of transitions.

  The loss is the weighted sum over rows, divided by `normalizer`; with the
  number of rows of the whole optimiser update there, the gradients of its
  packs add up to the gradient of their mean, however it was cut.

  Args:
    apply: the model, `apply(params, latents, sigma, conditioning)`.
    params: the trainable parameters; the gradient is taken in them.
    batch: N transitions. Padding rows have weight 0 and finite content, see
      `pad`.
    kernel: the transition the rows were sampled with.
    clip_range: see `grpo_loss`.
    normalizer: see above; None for the rows of this batch.
    advantage_clip: see `grpo_loss`.
    frozen: parameters that are not trained, `join`ed with `params` before
      they reach `apply`; None where `params` is everything.
    kl_weight: weight of the KL to the reference; 0 skips its forward. Static.
    kl_form: std the KL is measured in: "diffusion", the coefficient g alone
      (the published image recipes), or "transition", the exact Gaussian KL
      (video). The same thing for Flow-CPS.
    reference: all parameters of the reference policy, as `apply` takes them;
      needed where kl_weight is not 0.

  Returns:
    The gradients, a pytree like `params`, and metrics as *sums* over rows so
    that packs can be added: see `add_metrics`, `mean_metrics`.

  Raises:
    UserError: a KL weight without reference.
  """
  if kl_weight and reference is None:
    raise UserError("train_step: kl_weight needs a reference policy; pass one")

  def transition(params: Any) -> Transition:
    return denoise_step(
      apply,
      params,
      batch.x,
      batch.conditioning,
      batch.sigma,
      batch.sigma_next,
      kernel=kernel,
      guidance=batch.guidance,
    )

  def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    current = transition(params if frozen is None else join(params, frozen))
    rows, log_ratio = grpo_loss_rows(
      current.log_prob(batch.x_next),
      batch.old_log_prob,
      batch.advantage,
      clip_range=clip_range,
      advantage_clip=advantage_clip,
    )
    kl = jnp.zeros_like(rows)
    if kl_weight:
      mean = jax.lax.stop_gradient(transition(reference).mean)
      std = _kl_std(current, batch, kl_form)
      kl = kl_to_reference(current.mean, mean, std)
      rows = rows + kl_weight * kl
    total = _weighted_sum(batch.weight, rows)
    metrics = _metric_sums(batch.weight, total, log_ratio, kl, clip_range)
    scale = metrics["rows"] if normalizer is None else normalizer
    return total / scale, metrics

  (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return grads, metrics


def fold(
  trajectory: Trajectory,
  advantages: jax.Array,
  sigmas: jax.Array,
  conditioning: Any,
  *,
  guidance: Guidance | None = None,
  steps: slice = slice(None),
) -> TrainBatch:
  """Trajectories to transitions, samples x steps in one leading axis.

  Sample-major: row b * W + w is trained step w of sample b, so an array that
  is sharded over samples folds without communication.

  Args:
    trajectory: of B samples, W trained steps.
    advantages: [B] float32.
    sigmas: [n+1] float32 schedule the trajectory was sampled on.
    conditioning: pytree of [B, ...] arrays, as given to `rollout`.
    guidance: as given to `rollout`.
    steps: which of the W trained steps to take.

  Returns:
    A batch of N = B * (steps taken) rows, all of weight 1.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)
  index = trajectory.steps[:, steps]
  width = index.shape[1]

  def flat(x: jax.Array) -> jax.Array:
    return x.reshape((-1, *x.shape[2:]))

  def rows(x: jax.Array) -> jax.Array:
    return jnp.repeat(x, width, axis=0)

  if guidance is not None:
    scale = guidance.scale
    guidance = Guidance(
      negative=jax.tree.map(rows, guidance.negative),
      scale=rows(scale) if jnp.ndim(scale) else scale,
      rescale=guidance.rescale,
    )
  return TrainBatch(
    x=flat(trajectory.states[:, :-1][:, steps]),
    x_next=flat(trajectory.states[:, 1:][:, steps]),
    sigma=flat(sigmas[index]),
    sigma_next=flat(sigmas[index + 1]),
    old_log_prob=flat(trajectory.log_probs[:, steps]),
    advantage=rows(jnp.asarray(advantages, jnp.float32)),
    weight=jnp.ones(index.size, jnp.float32),
    conditioning=jax.tree.map(rows, conditioning),
    guidance=guidance,
  )


def pad(batch: TrainBatch, num_rows: int) -> TrainBatch:
  """Repeats the last row with weight 0 until there are `num_rows`.

  Args:
    batch: N >= 1 rows.
    num_rows: rows wanted, at least N.

  Raises:
    UserError: there are more rows already.
  """
  n = batch.weight.shape[0]
  if num_rows < n:
    raise UserError(f"pad: {n} rows do not fit in {num_rows}")

  def repeat_last(x: jax.Array) -> jax.Array:
    if jnp.ndim(x) == 0:  # a guidance scale for all rows
      return x
    return jnp.concatenate([x, jnp.repeat(x[-1:], num_rows - n, axis=0)])

  padded = jax.tree.map(repeat_last, batch)
  weight = jnp.where(jnp.arange(num_rows) < n, padded.weight, 0)
  return dataclasses.replace(padded, weight=weight)


def join(trainable: Any, frozen: Any) -> Any:
  """Merges two nested dicts of parameters that share no leaf.

  Raises:
    UserError: a leaf is in both.
  """
  if not (isinstance(trainable, Mapping) and isinstance(frozen, Mapping)):
    raise UserError("join: a parameter is both trainable and frozen")
  merged = dict(frozen)
  for name, value in trainable.items():
    merged[name] = join(value, frozen[name]) if name in frozen else value
  return merged


def add_metrics(
  a: dict[str, jax.Array], b: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Metrics of two packs of one update, together."""
  return {
    name: jnp.maximum(a[name], b[name])
    if "_max_" in name
    else a[name] + b[name]
    for name in a
  }


def mean_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Sums over rows to means: loss, kl, ratio_mean, clip_fraction."""
  rows = jnp.maximum(sums["rows"], 1)
  return {
    "loss": sums["loss_sum"] / rows,
    "kl": sums["kl_sum"] / rows,
    "ratio_mean": sums["ratio_sum"] / rows,
    "ratio_max_abs_log": sums["ratio_max_abs_log"],
    "clip_fraction": sums["clip_sum"] / rows,
  }


def _metric_sums(
  weight: jax.Array,
  total: jax.Array,
  log_ratio: jax.Array,
  kl: jax.Array,
  clip_range: float,
) -> dict[str, jax.Array]:
  log_ratio = jnp.where(weight > 0, log_ratio, 0)
  sums = {
    "loss_sum": total,
    "kl_sum": _weighted_sum(weight, kl),
    "ratio_sum": _weighted_sum(weight, jnp.exp(log_ratio)),
    "ratio_max_abs_log": jnp.max(jnp.abs(log_ratio)),
    "clip_sum": _weighted_sum(weight, clipped(log_ratio, clip_range)),
    "rows": jnp.sum(weight),
  }
  return jax.lax.stop_gradient(sums)


def _weighted_sum(weight: jax.Array, rows: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(weight > 0, weight * rows, 0))


def _kl_std(
  transition: Transition, batch: TrainBatch, kl_form: KlForm
) -> jax.Array:
  if kl_form == "transition" or transition.density == "residual":
    return transition.std
  return transition.std / jnp.sqrt(batch.sigma - batch.sigma_next)
