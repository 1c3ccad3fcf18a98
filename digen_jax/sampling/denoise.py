"""One denoising step: velocity, guidance, transition.

The rollout and the loss both go through these functions, with the same casts
and the same batched noise levels, so the probability ratio of a transition
that was just sampled is 1 up to the rounding of two compilations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from digen_jax.errors import UserError
from digen_jax.sampling.kernels import Kernel, Transition
from digen_jax.types import Guidance

# apply(params, latents [B, ...], sigma [B], conditioning) -> velocity [B, ...]
Apply = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]


def velocity(
  apply: Apply,
  params: Any,
  x: jax.Array,
  conditioning: Any,
  sigma: jax.Array,
  guidance: Guidance | None = None,
) -> jax.Array:
  """The (guided) velocity of a denoiser.

  Args:
    apply: the model, `apply(params, latents, sigma, conditioning)`.
    params: its parameters.
    x: [B, ...] float32 latents.
    conditioning: pytree of [B, ...] arrays.
    sigma: [] or [B] noise level.
    guidance: classifier-free guidance, or None for one plain forward. Both
      forwards run as one batch of 2B; gradients flow through both.

  Returns:
    [B, ...] float32, whatever the model computes in.

  Raises:
    UserError: the negative conditioning has not the shapes of the positive.
  """
  batch = x.shape[0]
  sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (batch,))
  if guidance is None:
    return apply(params, x, sigma, conditioning).astype(jnp.float32)
  pairs = _interleave(conditioning, guidance.negative)
  v = apply(params, jnp.repeat(x, 2, 0), jnp.repeat(sigma, 2), pairs)
  v = v.astype(jnp.float32).reshape((batch, 2, *x.shape[1:]))
  return apply_guidance(
    v[:, 0], v[:, 1], guidance.scale, rescale=guidance.rescale
  )


def apply_guidance(
  positive: jax.Array,
  negative: jax.Array,
  scale: jax.Array | float,
  *,
  rescale: bool = False,
  patch_size: int = 2,
) -> jax.Array:
  """Classifier-free guidance: negative + scale (positive - negative).

  Args:
    positive: [B, ..., h, w, c] float32 velocity under the prompt.
    negative: same shape, under the negative prompt.
    scale: [] or [B] guidance scale.
    rescale: give each token of the result the norm it has in `positive`, as
      Qwen-Image does. A token is a patch of `patch_size` x `patch_size`
      latent pixels with all channels.
    patch_size: only used by `rescale`; must divide h and w.

  Returns:
    The guided velocity, same shape.

  Source: classifier-free guidance, https://arxiv.org/abs/2207.12598.
  """
  scale = jnp.asarray(scale, jnp.float32)
  if scale.ndim:
    scale = scale.reshape(scale.shape + (1,) * (positive.ndim - 1))
  guided = negative + scale * (positive - negative)
  if not rescale:
    return guided
  *lead, h, w, c = positive.shape
  p = patch_size
  tokens = (*lead, h // p, p, w // p, p, c)

  def norm(v: jax.Array) -> jax.Array:
    squares = jnp.square(v.reshape(tokens))
    return jnp.sqrt(jnp.sum(squares, axis=(-4, -2, -1), keepdims=True))

  ratio = norm(positive) / norm(guided)
  return (guided.reshape(tokens) * ratio).reshape(guided.shape)


def denoise_step(
  apply: Apply,
  params: Any,
  x: jax.Array,
  conditioning: Any,
  sigma: jax.Array,
  sigma_next: jax.Array,
  *,
  kernel: Kernel,
  guidance: Guidance | None = None,
) -> Transition:
  """The distribution of the latents one denoising step on.

  Args:
    apply: the model, `apply(params, latents, sigma, conditioning)`.
    params: its parameters; differentiate with respect to them.
    x: [B, ...] float32 latents at `sigma`.
    conditioning: pytree of [B, ...] arrays.
    sigma: [] or [B] noise level in (0, 1].
    sigma_next: [] or [B] noise level after the step.
    kernel: the transition, options bound, e.g.
      `partial(flow_sde, noise_level=0.9, sigma_max=sigmas[1])`.
    guidance: classifier-free guidance, or None.

  Returns:
    The transition; `.log_prob(x_next)` is what a policy gradient needs.
  """
  batch = x.shape[:1]
  sigma, sigma_next = (
    jnp.broadcast_to(jnp.asarray(s, jnp.float32), batch)
    for s in (sigma, sigma_next)
  )
  v = velocity(apply, params, x, conditioning, sigma, guidance)
  return kernel(x, v, sigma, sigma_next)


def _interleave(positive: Any, negative: Any) -> Any:
  """Rows p0 n0 p1 n1 ...: pairs stay on the device that has the sample."""
  shapes = [jax.tree.map(jnp.shape, c) for c in (positive, negative)]
  if shapes[0] != shapes[1]:
    raise UserError(
      "guidance.negative must have the fields and shapes of the conditioning "
      f"(pad both to one text length); got {shapes[0]} and {shapes[1]}"
    )

  def pair(p: jax.Array, n: jax.Array) -> jax.Array:
    return jnp.stack([p, n], axis=1).reshape((-1, *p.shape[1:]))

  return jax.tree.map(pair, positive, negative)
