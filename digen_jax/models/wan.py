"""Wan 2.1 text-to-video: self-attention over space-time, text by crossing.

One stack of equal blocks; time modulates each through one projection that all
of them share, plus a table of their own.

Source: Wan Team 2025, Wan: Open and Advanced Large-Scale Video Generative
Models, section 4.2.2.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers, video
from digen_jax.models.attention import attention
from digen_jax.models.flux import split_heads
from digen_jax.models.layers import Linear, RMSNorm, round_to
from digen_jax.types import Conditioning

ROPE_THETA = 10000.0

# Flags of variants (image-to-video, other norms) whose inputs or maths differ.
FIXED = dict(
  cross_attn_norm=True,
  qk_norm="rms_norm_across_heads",
  image_dim=None,
  added_kv_proj_dim=None,
  pos_embed_seq_len=None,
)


@dataclasses.dataclass(frozen=True)
class WanConfig:
  """Sizes of a Wan transformer; names and defaults as in `config.json`.

  Attributes:
    patch_size: latent frames, rows and columns of a token.
    in_channels: of the latents.
    out_channels: of the velocity; None means `in_channels`.
    text_dim: D of `Conditioning.text`.
    freq_dim: of the sinusoidal time embedding.
    ffn_dim: hidden width of the feed-forward.
    num_layers: blocks.
    eps: of every norm.
    rope_max_seq_len: positions along one axis that the model knows.
    dtype: compute dtype of matrix products and the residual stream.
    remat: see `layers.scan_blocks`.
  """

  patch_size: tuple[int, int, int] = (1, 2, 2)
  num_attention_heads: int = 40
  attention_head_dim: int = 128
  in_channels: int = 16
  out_channels: int | None = 16
  text_dim: int = 4096
  freq_dim: int = 256
  ffn_dim: int = 13824
  num_layers: int = 40
  eps: float = 1e-6
  rope_max_seq_len: int = 1024
  dtype: Any = jnp.float32
  remat: str = "none"

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    object.__setattr__(self, "patch_size", tuple(self.patch_size))
    if len(self.patch_size) != 3:
      raise UserError(
        f"patch_size {self.patch_size} of WanTransformer3DModel must be three "
        "numbers: frames, rows, columns"
      )
    if self.attention_head_dim % 2:
      raise UserError(
        f"attention_head_dim {self.attention_head_dim} of "
        "WanTransformer3DModel must be even: positions rotate pairs"
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
  def axes_dims_rope(self) -> tuple[int, int, int]:
    """Head dimensions rotated by (frame, row, column)."""
    side = 2 * (self.attention_head_dim // 6)
    return self.attention_head_dim - 2 * side, side, side


class Attention(nnx.Module):
  """Attention of the video to itself or to the text.

  Queries and keys are normalised over all heads together, before they are
  split: with heads split over a mesh axis, the mean square of a token is the
  one sum in here that crosses devices. The partitioner adds it by itself, an
  all-reduce of [B, S] float32 for each of the two norms.
  """

  def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
    dim = config.dim
    inward = dict(axes=("embed", "heads"), dtype=config.dtype, rngs=rngs)
    self.to_q = Linear(dim, dim, **inward)
    self.to_k = Linear(dim, dim, **inward)
    self.to_v = Linear(dim, dim, **inward)
    self.to_out = Linear(
      dim, dim, axes=("heads", "embed"), dtype=config.dtype, rngs=rngs
    )
    self.norm_q = RMSNorm(dim, eps=config.eps)
    self.norm_k = RMSNorm(dim, eps=config.eps)
    self.head_dim = config.attention_head_dim
    self.dtype = config.dtype

  def __call__(
    self, x: jax.Array, source: jax.Array, rope: jax.Array | None = None
  ) -> jax.Array:
    """Attends from `x` to `source`.

    Args:
      x: [B, S, d].
      source: [B, T, d], `x` itself in self-attention.
      rope: [2, S, D/2] rotations of both, or None for neither.

    Returns:
      [B, S, d] compute dtype.
    """
    query = split_heads(self.norm_q(self.to_q(x)), self.head_dim)
    key = split_heads(self.norm_k(self.to_k(source)), self.head_dim)
    value = split_heads(self.to_v(source), self.head_dim)
    if rope is not None:
      query, key = (layers.apply_rope(y, rope) for y in (query, key))
    query, key = (round_to(y, self.dtype) for y in (query, key))
    out = attention(query, key, value)
    return self.to_out(out.reshape(*out.shape[:2], -1))


class Block(nnx.Module):
  """Self-attention, cross-attention, feed-forward.

  Attributes:
    scale_shift_table: [1, 6, d], added to what time gives to all blocks.
  """

  def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
    dim = config.dim
    self.attn1 = Attention(config, rngs=rngs)
    self.attn2 = Attention(config, rngs=rngs)
    self.norm2 = layers.LayerNorm(dim, eps=config.eps)
    self.ffn = layers.FeedForward(
      dim, config.ffn_dim, dtype=config.dtype, rngs=rngs
    )
    self.scale_shift_table = nnx.Param(
      jnp.zeros((1, 6, dim)), logical_axes=(None, None, "embed")
    )
    self.eps = config.eps

  def __call__(
    self,
    x: jax.Array,
    text: jax.Array,
    time: jax.Array,
    rope: jax.Array,
  ) -> jax.Array:
    """One block.

    Args:
      x: [B, S, d] compute dtype.
      text: [B, T, d] compute dtype.
      time: [B, 1 or S, 6, d] float32, for all tokens or for each.
      rope: [2, S, D/2].

    Returns:
      [B, S, d] compute dtype.
    """
    shift, scale, gate, shift_ff, scale_ff, gate_ff = split_table(
      self.scale_shift_table, time
    )
    normed = modulate(x, shift, scale, self.eps)
    x = add(x, gate * self.attn1(normed, normed, rope).astype(jnp.float32))
    x = add(x, self.attn2(self.norm2(x), text))
    normed = modulate(x, shift_ff, scale_ff, self.eps)
    return add(x, gate_ff * self.ffn(normed).astype(jnp.float32))


def split_table(table: nnx.Param, time: jax.Array) -> list[jax.Array]:
  """[1, n, d] + [B, 1 or S, n, d] -> n arrays [B, 1 or S, d] float32."""
  both = table[...].astype(jnp.float32)[None] + time
  return [both[:, :, i] for i in range(both.shape[2])]


def modulate(
  x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float
) -> jax.Array:
  """AdaLN with shift and scale [B, 1 or S, d]: [B, S, d] float32."""
  return layers.layer_norm(x, eps) * (1.0 + scale) + shift


def add(x: jax.Array, update: jax.Array) -> jax.Array:
  """The residual sum, taken in float32, in x's dtype."""
  return round_to(x.astype(jnp.float32) + update.astype(jnp.float32), x.dtype)


class TextEmbedder(nnx.Module):
  """Linear, tanh-approximated GELU, linear on the text features."""

  def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
    kwargs = dict(axes=("text", "embed"), dtype=config.dtype, rngs=rngs)
    self.linear_1 = Linear(config.text_dim, config.dim, **kwargs)
    self.linear_2 = Linear(config.dim, config.dim, **kwargs)

  def __call__(self, text: jax.Array) -> jax.Array:
    """text: [B, T, D] -> [B, T, d] compute dtype."""
    return self.linear_2(layers.gelu_tanh(self.linear_1(text)))


class WanTransformer(nnx.Module):
  """The denoiser.

  Attributes:
    scale_shift_table: [1, 2, d], of the last norm.
  """

  def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
    dim, dtype = config.dim, config.dtype
    self.config = config
    self.patch_embedding = video.PatchEmbed(
      config.in_channels, dim, config.patch_size, dtype=dtype, rngs=rngs
    )
    self.time_embedder = layers.EmbeddingMLP(config.freq_dim, dim, rngs=rngs)
    self.time_proj = Linear(
      dim,
      6 * dim,
      axes=("embed", "modulation"),
      dtype=dtype,
      out_dtype=jnp.float32,
      kernel_init=layers.zeros,
      rngs=rngs,
    )
    self.text_embedder = TextEmbedder(config, rngs=rngs)
    self.blocks = layers.stack(
      lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs
    )
    self.scale_shift_table = nnx.Param(
      jnp.zeros((1, 2, dim)), logical_axes=(None, None, "embed")
    )
    self.proj_out = Linear(
      dim,
      math.prod(config.patch_size)
      * (config.out_channels or config.in_channels),
      axes=("embed", "latent"),
      dtype=dtype,
      out_dtype=jnp.float32,
      kernel_init=layers.zeros,
      rngs=rngs,
    )

  def __call__(
    self, latents: jax.Array, timestep: jax.Array, text: jax.Array
  ) -> jax.Array:
    """Predicts the velocity of a video.

    Args:
      latents: [B, f, h, w, c] noisy latents.
      timestep: [B] in [0, 1000], 1000 = pure noise; or [B, S], one for each
        token, where some of a video is clean.
      text: [B, T, text_dim]. Nothing is masked: the model was trained on 512
        rows, zeros after the prompt, and attends to them.

    Returns:
      [B, f, h, w, c] float32.

    Raises:
      UserError: sizes that patches do not fill, or more positions along an
        axis than the model knows.
    """
    config = self.config
    grid = video.token_grid(latents, config.patch_size, "Wan")
    if max(grid) > config.rope_max_seq_len:
      raise UserError(
        f"Wan latents give {max(grid)} tokens along one axis; the model knows "
        f"{config.rope_max_seq_len} positions: use a smaller video"
      )
    rope = video.rope_table(grid, config.axes_dims_rope, ROPE_THETA)
    embedding = self.time_embedder(
      layers.timestep_embedding(timestep.reshape(-1), config.freq_dim)
    ).reshape(timestep.shape[0], -1, config.dim)
    time = self.time_proj(jax.nn.silu(embedding))
    time = time.reshape(*embedding.shape[:2], 6, config.dim)
    text = self.text_embedder(text)

    x = layers.scan_blocks(
      self.blocks,
      lambda block, x: block(x, text, time, rope),
      self.patch_embedding(latents),
      config.remat,
    )
    shift, scale = split_table(self.scale_shift_table, embedding[:, :, None])
    tokens = self.proj_out(modulate(x, shift, scale, config.eps))
    return video.unpatchify(tokens, grid, config.patch_size)


def wan_apply(
  graphdef: nnx.GraphDef,
  params: layers.Params,
  latents: jax.Array,
  sigma: jax.Array,
  conditioning: Conditioning,
) -> jax.Array:
  """The denoiser on latents: x, sigma, prompt -> velocity.

  Args:
    graphdef: of a `WanTransformer`, from `layers.split`.
    params: its parameters, any float dtype.
    latents: [B, f, h, w, c] float32.
    sigma: [] or [B] float32 in [0, 1], 1 = pure noise.
    conditioning: `text`, padded with zeros to 512 rows; nothing else is read.

  Returns:
    [B, f, h, w, c] float32 velocity, noise - x0.

  Raises:
    UserError: see `WanTransformer`.
  """
  sigma = jnp.asarray(sigma, jnp.float32)
  timestep = jnp.broadcast_to(sigma, latents.shape[:1]) * 1000.0
  module = nnx.merge(graphdef, params)
  return module(latents, timestep, conditioning.text)
