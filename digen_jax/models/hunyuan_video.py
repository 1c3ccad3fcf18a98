"""HunyuanVideo: FLUX's double and single blocks on video tokens.

What sets it apart from FLUX: tokens are patches of a video; the states of a
language model pass a refiner of their own before they meet the video; padding
among them is masked; only the video rotates, with a shorter longest period.

Source: Kong et al. 2024, HunyuanVideo: A Systematic Framework for Large Video
Generative Models, section 4.2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers, video
from digen_jax.models.attention import attention
from digen_jax.models.flux import (
  MLP_RATIO,
  TIME_DIM,
  DoubleBlock,
  SingleBlock,
  split_heads,
)
from digen_jax.models.layers import Linear
from digen_jax.types import Conditioning

# Flags of variants (image-to-video, other norms) whose inputs or maths differ.
FIXED = dict(
  mlp_ratio=float(MLP_RATIO), qk_norm="rms_norm", image_condition_type=None
)


@dataclasses.dataclass(frozen=True)
class HunyuanVideoConfig:
  """Sizes of a HunyuanVideo transformer; names and defaults as in the file.

  Attributes:
    in_channels: of the latents.
    out_channels: of the velocity; None means `in_channels`.
    num_layers: double blocks.
    num_single_layers: single blocks.
    num_refiner_layers: blocks of the text refiner.
    patch_size: latent rows and columns of a token.
    patch_size_t: latent frames of a token.
    guidance_embeds: whether distilled guidance is an input.
    text_embed_dim: D of `Conditioning.text`.
    pooled_projection_dim: P of `Conditioning.pooled`.
    rope_theta: longest period of positions over 2 pi.
    rope_axes_dim: head dimensions rotated by (frame, row, column).
    dtype: compute dtype of matrix products and the residual stream.
    remat: see `layers.scan_blocks`.
  """

  in_channels: int = 16
  out_channels: int | None = 16
  num_attention_heads: int = 24
  attention_head_dim: int = 128
  num_layers: int = 20
  num_single_layers: int = 40
  num_refiner_layers: int = 2
  patch_size: int = 2
  patch_size_t: int = 1
  guidance_embeds: bool = True
  text_embed_dim: int = 4096
  pooled_projection_dim: int = 768
  rope_theta: float = 256.0
  rope_axes_dim: tuple[int, ...] = (16, 56, 56)
  dtype: Any = jnp.float32
  remat: str = "none"

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    object.__setattr__(self, "rope_axes_dim", tuple(self.rope_axes_dim))
    if sum(self.rope_axes_dim) != self.attention_head_dim:
      raise UserError(
        f"rope_axes_dim {self.rope_axes_dim} must add up to "
        f"attention_head_dim {self.attention_head_dim}"
      )

  @property
  def dim(self) -> int:
    """Model width."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def latent_channels(self) -> int:
    """Channels of the latents."""
    return self.in_channels

  @property
  def patch(self) -> video.Triple:
    """Latent frames, rows and columns of a token."""
    return self.patch_size_t, self.patch_size, self.patch_size


class RefinerAttention(nnx.Module):
  """Self-attention of the text, without norms or positions.

  Every token attends to the first one; a token of the prompt also to the
  prompt's others, padding to nothing else. That leaves no empty row, whatever
  the mask.
  """

  def __init__(self, config: HunyuanVideoConfig, *, rngs: nnx.Rngs):
    dim = config.dim
    inward = dict(axes=("embed", "heads"), dtype=config.dtype, rngs=rngs)
    self.to_q = Linear(dim, dim, **inward)
    self.to_k = Linear(dim, dim, **inward)
    self.to_v = Linear(dim, dim, **inward)
    self.to_out = Linear(
      dim, dim, axes=("heads", "embed"), dtype=config.dtype, rngs=rngs
    )
    self.head_dim = config.attention_head_dim

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """x [B, T, d], mask [B, T] bool -> [B, T, d] compute dtype."""
    query, key, value = (
      split_heads(linear(x), self.head_dim)
      for linear in (self.to_q, self.to_k, self.to_v)
    )
    # `.at[:, 0].set(True)` goes wrong where XLA divides T (jax 0.10.2, CPU).
    keys = mask | (jnp.arange(mask.shape[1])[None] == 0)
    out = attention(query, key, value, keys)
    # Attention to one key alone is that key's value.
    out = jnp.where(mask[:, :, None, None], out, value[:, :1])
    return self.to_out(out.reshape(x.shape))


class RefinerBlock(nnx.Module):
  """Attention and feed-forward on normed text, gated by the embedding."""

  def __init__(self, config: HunyuanVideoConfig, *, rngs: nnx.Rngs):
    dim, hidden = config.dim, MLP_RATIO * config.dim
    kwargs = dict(dtype=config.dtype, rngs=rngs)
    self.norm1 = layers.LayerNorm(dim)
    self.attn = RefinerAttention(config, rngs=rngs)
    self.norm2 = layers.LayerNorm(dim)
    self.ff = layers.FeedForward(dim, hidden, activation=layers.silu, **kwargs)
    self.norm_out = layers.Modulation(dim, 2, **kwargs)

  def __call__(
    self, x: jax.Array, embedding: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """x [B, T, d], embedding [B, d], mask [B, T] bool -> [B, T, d]."""
    gate, gate_ff = self.norm_out(embedding)
    x = layers.gated(x, gate, self.attn(self.norm1(x), mask))
    return layers.gated(x, gate_ff, self.ff(self.norm2(x)))


class TokenRefiner(nnx.Module):
  """Language-model states to text tokens."""

  def __init__(self, config: HunyuanVideoConfig, *, rngs: nnx.Rngs):
    text_dim, dim = config.text_embed_dim, config.dim
    self.time_embedder = layers.EmbeddingMLP(TIME_DIM, dim, rngs=rngs)
    self.pooled_embedder = layers.EmbeddingMLP(
      text_dim, dim, in_axis="text", rngs=rngs
    )
    self.proj_in = Linear(
      text_dim, dim, axes=("text", "embed"), dtype=config.dtype, rngs=rngs
    )
    self.refiner_blocks = layers.stack(
      lambda rngs: RefinerBlock(config, rngs=rngs),
      config.num_refiner_layers,
      rngs,
    )
    self.remat = config.remat

  def __call__(
    self, text: jax.Array, timestep: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """text [B, T, D], timestep [B], mask [B, T] bool -> [B, T, d]."""
    real = mask.astype(jnp.float32)[:, :, None]
    # An empty prompt has no mean; 1 keeps its embedding finite.
    count = jnp.maximum(jnp.sum(real, axis=1), 1.0)
    mean = jnp.sum(text.astype(jnp.float32) * real, axis=1) / count
    embedding = self.time_embedder(layers.timestep_embedding(timestep))
    embedding += self.pooled_embedder(mean)
    return layers.scan_blocks(
      self.refiner_blocks,
      lambda block, x: block(x, embedding, mask),
      self.proj_in(text),
      self.remat,
    )


class HunyuanVideoTransformer(nnx.Module):
  """The denoiser.

  The joint sequence is [text, video], as in FLUX; attention does not depend
  on its order.
  """

  def __init__(self, config: HunyuanVideoConfig, *, rngs: nnx.Rngs):
    dim, dtype = config.dim, config.dtype
    self.config = config
    self.x_embedder = video.PatchEmbed(
      config.in_channels, dim, config.patch, dtype=dtype, rngs=rngs
    )
    self.context_embedder = TokenRefiner(config, rngs=rngs)
    self.time_embedder = layers.EmbeddingMLP(TIME_DIM, dim, rngs=rngs)
    if config.guidance_embeds:
      self.guidance_embedder = layers.EmbeddingMLP(TIME_DIM, dim, rngs=rngs)
    self.pooled_embedder = layers.EmbeddingMLP(
      config.pooled_projection_dim, dim, in_axis="text", rngs=rngs
    )
    self.double_blocks = layers.stack(
      lambda rngs: DoubleBlock(config, rngs=rngs), config.num_layers, rngs
    )
    self.single_blocks = layers.stack(
      lambda rngs: SingleBlock(config, rngs=rngs),
      config.num_single_layers,
      rngs,
    )
    self.norm_out = layers.Modulation(dim, 2, dtype=dtype, rngs=rngs)
    self.proj_out = Linear(
      dim,
      int(np.prod(config.patch)) * (config.out_channels or config.in_channels),
      axes=("embed", "latent"),
      dtype=dtype,
      out_dtype=jnp.float32,
      kernel_init=layers.zeros,
      rngs=rngs,
    )

  def embed(
    self,
    timestep: jax.Array,
    pooled: jax.Array,
    guidance: jax.Array | None,
  ) -> jax.Array:
    """What modulates every block: [B, d] float32."""
    embedding = self.time_embedder(layers.timestep_embedding(timestep))
    if self.config.guidance_embeds:
      if guidance is None:
        raise UserError(
          "this HunyuanVideo transformer embeds guidance: give "
          "Conditioning.guidance, [B] float32 (6.0 is usual)"
        )
      embedding += self.guidance_embedder(layers.timestep_embedding(guidance))
    return embedding + self.pooled_embedder(pooled.astype(jnp.float32))

  def __call__(
    self,
    latents: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
    mask: jax.Array,
    pooled: jax.Array,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the velocity of a video.

    Args:
      latents: [B, f, h, w, c] noisy latents.
      timestep: [B] in [0, 1000], 1000 = pure noise.
      text: [B, T, text_embed_dim].
      mask: [B, T] bool, True for the prompt's rows, which come first.
      pooled: [B, pooled_projection_dim].
      guidance: [B] distilled guidance scale x 1000; ignored by models
        without guidance embedding.

    Returns:
      [B, f, h, w, c] float32.

    Raises:
      UserError: sizes that patches do not fill, or no guidance.
    """
    config = self.config
    grid = video.token_grid(latents, config.patch, "HunyuanVideo")
    batch, text_len = mask.shape
    rope = video.rope_table(
      grid, config.rope_axes_dim, config.rope_theta, np.float32
    )
    still = jnp.zeros((text_len, rope.shape[-1]))  # text has no position
    still = jnp.stack([still + 1.0, still])
    rope = jnp.concatenate([still, rope], axis=1)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    real = jnp.concatenate(
      [
        jnp.arange(text_len, dtype=jnp.int32)[None] < lengths[:, None],
        jnp.ones((batch, int(np.prod(grid))), bool),
      ],
      axis=1,
    )
    embedding = self.embed(timestep, pooled, guidance)
    tokens = self.x_embedder(latents)
    text = self.context_embedder(text, timestep, mask)

    tokens, text = layers.scan_blocks(
      self.double_blocks,
      lambda block, carry: block(*carry, embedding, rope, real),
      (tokens, text),
      config.remat,
    )
    joint = layers.scan_blocks(
      self.single_blocks,
      lambda block, x: block(x, embedding, rope, real),
      jnp.concatenate([text, tokens], axis=1),
      config.remat,
    )
    scale, shift = self.norm_out(embedding)
    tokens = self.proj_out(layers.modulate(joint[:, text_len:], shift, scale))
    return video.unpatchify(channels_last(tokens, config), grid, config.patch)


def channels_last(tokens: jax.Array, config: HunyuanVideoConfig) -> jax.Array:
  """Output tokens from channel order (c, patch) to (patch, c)."""
  b, s, size = tokens.shape
  pixels = int(np.prod(config.patch))
  tokens = tokens.reshape(b, s, size // pixels, pixels)
  return tokens.swapaxes(2, 3).reshape(b, s, size)


def hunyuan_video_apply(
  graphdef: nnx.GraphDef,
  params: layers.Params,
  latents: jax.Array,
  sigma: jax.Array,
  conditioning: Conditioning,
) -> jax.Array:
  """The denoiser on latents: x, sigma, prompt -> velocity.

  Args:
    graphdef: of a `HunyuanVideoTransformer`, from `layers.split`.
    params: its parameters, any float dtype.
    latents: [B, f, h, w, c] float32.
    sigma: [] or [B] float32 in [0, 1], 1 = pure noise.
    conditioning: `text`, `pooled`, `mask` where rows of the text are padding
      (all of it last), and `guidance` where the model embeds it.

  Returns:
    [B, f, h, w, c] float32 velocity, noise - x0.

  Raises:
    UserError: see `HunyuanVideoTransformer`; or a missing conditioning.
  """
  if conditioning.pooled is None:
    raise UserError("HunyuanVideo needs Conditioning.pooled, [B, P]")
  text, mask = conditioning.text, conditioning.mask
  if mask is None:
    mask = jnp.ones(text.shape[:2], bool)
  guidance = conditioning.guidance
  if guidance is not None:
    guidance = guidance.astype(jnp.float32) * 1000.0
  sigma = jnp.asarray(sigma, jnp.float32)
  timestep = jnp.broadcast_to(sigma, latents.shape[:1]) * 1000.0
  return nnx.merge(graphdef, params)(
    latents, timestep, text, mask, conditioning.pooled, guidance
  )
