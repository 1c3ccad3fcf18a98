"""FLUX.1: a rectified-flow transformer with double and single blocks.

Text and image tokens first pass blocks with separate weights and joint
attention, then blocks with shared weights over the concatenated sequence.
Time, distilled guidance and the pooled prompt modulate every block (AdaLN).

Source: Black Forest Labs 2024, FLUX.1; joint attention as in Esser et al.
2024 (SD3), figure 2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.attention import attention
from digen_jax.models.layers import Linear, RMSNorm, round_to
from digen_jax.types import Conditioning

TIME_DIM = 256
MLP_RATIO = 4
PATCH = 2


@dataclasses.dataclass(frozen=True)
class FluxConfig:
  """Sizes of a FLUX transformer; names and defaults as in `config.json`.

  Attributes:
    in_channels: of a packed token: latent channels x 2 x 2.
    out_channels: of a packed output token; None means `in_channels`.
    num_layers: double blocks.
    num_single_layers: single blocks.
    joint_attention_dim: D of `Conditioning.text`.
    pooled_projection_dim: P of `Conditioning.pooled`.
    guidance_embeds: whether distilled guidance is an input (dev, not schnell).
    axes_dims_rope: head dimensions rotated by (frame, row, column).
    dtype: compute dtype of matrix products and the residual stream.
    remat: see `layers.scan_blocks`.
  """

  patch_size: int = 1
  in_channels: int = 64
  out_channels: int | None = None
  num_layers: int = 19
  num_single_layers: int = 38
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = False
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)
  dtype: Any = jnp.float32
  remat: str = "none"

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
    if self.patch_size != 1:
      raise UserError(
        f"FluxTransformer2DModel with patch_size {self.patch_size} is not "
        "supported; use a checkpoint with patch_size 1"
      )
    if sum(self.axes_dims_rope) != self.attention_head_dim:
      raise UserError(
        f"axes_dims_rope {self.axes_dims_rope} must add up to "
        f"attention_head_dim {self.attention_head_dim}"
      )
    if self.in_channels % PATCH**2:
      raise UserError(
        f"in_channels {self.in_channels} must be a multiple of {PATCH**2}: "
        "tokens are 2 x 2 latent pixels"
      )

  @property
  def dim(self) -> int:
    """Model width."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def latent_channels(self) -> int:
    """Channels of the unpacked latents."""
    return self.in_channels // PATCH**2


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
  """[B, S, H D] -> [B, S, H, D]."""
  return x.reshape(*x.shape[:2], -1, head_dim)


class JointAttention(nnx.Module):
  """Self-attention over text and image tokens, each with its own weights."""

  def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
    dim, head_dim = config.dim, config.attention_head_dim
    inward = dict(axes=("embed", "heads"), dtype=config.dtype, rngs=rngs)
    outward = dict(axes=("heads", "embed"), dtype=config.dtype, rngs=rngs)
    self.to_q = Linear(dim, dim, **inward)
    self.to_k = Linear(dim, dim, **inward)
    self.to_v = Linear(dim, dim, **inward)
    self.to_out = Linear(dim, dim, **outward)
    self.add_q_proj = Linear(dim, dim, **inward)
    self.add_k_proj = Linear(dim, dim, **inward)
    self.add_v_proj = Linear(dim, dim, **inward)
    self.to_add_out = Linear(dim, dim, **outward)
    self.norm_q = RMSNorm(head_dim)
    self.norm_k = RMSNorm(head_dim)
    self.norm_added_q = RMSNorm(head_dim)
    self.norm_added_k = RMSNorm(head_dim)
    self.head_dim = head_dim
    self.dtype = config.dtype

  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    rope: np.ndarray,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Image [B, S, d], text [B, T, d] -> image, text; see `DoubleBlock`."""
    query = jnp.concatenate(
      [
        self.norm_added_q(split_heads(self.add_q_proj(text), self.head_dim)),
        self.norm_q(split_heads(self.to_q(image), self.head_dim)),
      ],
      axis=1,
    )
    key = jnp.concatenate(
      [
        self.norm_added_k(split_heads(self.add_k_proj(text), self.head_dim)),
        self.norm_k(split_heads(self.to_k(image), self.head_dim)),
      ],
      axis=1,
    )
    value = jnp.concatenate(
      [
        split_heads(self.add_v_proj(text), self.head_dim),
        split_heads(self.to_v(image), self.head_dim),
      ],
      axis=1,
    )
    out = rotated_attention(query, key, value, rope, self.dtype, mask)
    text_len = text.shape[1]
    return self.to_out(out[:, text_len:]), self.to_add_out(out[:, :text_len])


class SelfAttention(nnx.Module):
  """Self-attention without output projection, for the single blocks."""

  def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
    dim, head_dim = config.dim, config.attention_head_dim
    inward = dict(axes=("embed", "heads"), dtype=config.dtype, rngs=rngs)
    self.to_q = Linear(dim, dim, **inward)
    self.to_k = Linear(dim, dim, **inward)
    self.to_v = Linear(dim, dim, **inward)
    self.norm_q = RMSNorm(head_dim)
    self.norm_k = RMSNorm(head_dim)
    self.head_dim = head_dim
    self.dtype = config.dtype

  def __call__(
    self, x: jax.Array, rope: np.ndarray, mask: jax.Array | None = None
  ) -> jax.Array:
    """x [B, S, d], rope [2, S, D/2], mask [B, S] bool -> [B, S, d]."""
    query = self.norm_q(split_heads(self.to_q(x), self.head_dim))
    key = self.norm_k(split_heads(self.to_k(x), self.head_dim))
    value = split_heads(self.to_v(x), self.head_dim)
    return rotated_attention(query, key, value, rope, self.dtype, mask)


def rotated_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  rope: np.ndarray,
  dtype: DTypeLike,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Attention with rotated queries and keys, heads joined: [B, S, H D]."""
  query = round_to(layers.apply_rope(query, rope), dtype)
  key = round_to(layers.apply_rope(key, rope), dtype)
  out = attention(query, key, value, mask)
  return out.reshape(*out.shape[:2], -1)


class DoubleBlock(nnx.Module):
  """Joint attention, then a feed-forward per stream; all modulated."""

  def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
    dim, hidden = config.dim, MLP_RATIO * config.dim
    kwargs = dict(dtype=config.dtype, rngs=rngs)
    self.norm1 = layers.Modulation(dim, 6, **kwargs)
    self.norm1_context = layers.Modulation(dim, 6, **kwargs)
    self.attn = JointAttention(config, rngs=rngs)
    self.ff = layers.FeedForward(dim, hidden, **kwargs)
    self.ff_context = layers.FeedForward(dim, hidden, **kwargs)

  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    embedding: jax.Array,
    rope: np.ndarray,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """One block.

    Args:
      image: [B, S, d] compute dtype.
      text: [B, T, d] compute dtype.
      embedding: [B, d] float32, what modulates.
      rope: [2, T+S, D/2] rotations of text, then image.
      mask: [B, T+S] bool, False where a token is padding; None is all True.

    Returns:
      image, text, as they came.
    """
    modulate, gated = layers.modulate, layers.gated
    shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(embedding)
    (
      text_shift,
      text_scale,
      text_gate,
      text_shift_ff,
      text_scale_ff,
      text_gate_ff,
    ) = self.norm1_context(embedding)

    image_out, text_out = self.attn(
      modulate(image, shift, scale),
      modulate(text, text_shift, text_scale),
      rope,
      mask,
    )
    image = gated(image, gate, image_out)
    text = gated(text, text_gate, text_out)

    image_out = self.ff(modulate(image, shift_ff, scale_ff))
    text_out = self.ff_context(modulate(text, text_shift_ff, text_scale_ff))
    image = gated(image, gate_ff, image_out)
    text = gated(text, text_gate_ff, text_out)
    return image, text


class SingleBlock(nnx.Module):
  """Attention and feed-forward side by side, joined by one projection."""

  def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
    dim, hidden = config.dim, MLP_RATIO * config.dim
    kwargs = dict(dtype=config.dtype, rngs=rngs)
    self.norm = layers.Modulation(dim, 3, **kwargs)
    self.attn = SelfAttention(config, rngs=rngs)
    self.proj_mlp = Linear(dim, hidden, axes=("embed", "mlp"), **kwargs)
    self.proj_out = Linear(dim + hidden, dim, axes=("mlp", "embed"), **kwargs)

  def __call__(
    self,
    x: jax.Array,
    embedding: jax.Array,
    rope: np.ndarray,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """x [B, T+S, d] -> [B, T+S, d]; the rest as for `DoubleBlock`."""
    shift, scale, gate = self.norm(embedding)
    normed = round_to(layers.modulate(x, shift, scale), x.dtype)
    mlp = layers.gelu_tanh(self.proj_mlp(normed))
    out = jnp.concatenate([self.attn(normed, rope, mask), mlp], axis=-1)
    return layers.gated(x, gate, self.proj_out(out))


class FluxTransformer(nnx.Module):
  """The denoiser on packed tokens."""

  def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
    dim, dtype = config.dim, config.dtype
    self.config = config
    self.x_embedder = Linear(
      config.in_channels,
      dim,
      axes=("latent", "embed"),
      dtype=dtype,
      rngs=rngs,
    )
    self.context_embedder = Linear(
      config.joint_attention_dim,
      dim,
      axes=("text", "embed"),
      dtype=dtype,
      rngs=rngs,
    )
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
      config.out_channels or config.in_channels,
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
    embedding = self.time_embedder(
      layers.timestep_embedding(timestep.astype(jnp.float32) * 1000.0)
    )
    if self.config.guidance_embeds:
      if guidance is None:
        raise UserError(
          "this FLUX transformer embeds guidance: give Conditioning.guidance, "
          "[B] float32 (3.5 is usual)"
        )
      embedding += self.guidance_embedder(
        layers.timestep_embedding(guidance.astype(jnp.float32) * 1000.0)
      )
    return embedding + self.pooled_embedder(pooled.astype(jnp.float32))

  def __call__(
    self,
    tokens: jax.Array,
    text: jax.Array,
    pooled: jax.Array,
    timestep: jax.Array,
    img_ids: np.ndarray,
    txt_ids: np.ndarray,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the velocity of packed latents.

    Args:
      tokens: [B, S, in_channels] packed noisy latents.
      text: [B, T, joint_attention_dim].
      pooled: [B, pooled_projection_dim].
      timestep: [B] in [0, 1], 1 = pure noise.
      img_ids: [S, 3] positions (frame, row, column); not traced.
      txt_ids: [T, 3] positions, zero in FLUX; not traced.
      guidance: [B] distilled guidance scale, e.g. 3.5; ignored by models
        without guidance embedding.

    Returns:
      [B, S, out_channels] float32.
    """
    config = self.config
    embedding = self.embed(timestep, pooled, guidance)
    image = self.x_embedder(tokens)
    text = self.context_embedder(text)
    text_len = text.shape[1]
    ids = np.concatenate([np.asarray(txt_ids), np.asarray(img_ids)])
    rope = layers.rope_table(ids, config.axes_dims_rope)

    image, text = layers.scan_blocks(
      self.double_blocks,
      lambda block, carry: block(*carry, embedding, rope),
      (image, text),
      config.remat,
    )
    joint = layers.scan_blocks(
      self.single_blocks,
      lambda block, x: block(x, embedding, rope),
      jnp.concatenate([text, image], axis=1),
      config.remat,
    )
    scale, shift = self.norm_out(embedding)
    return self.proj_out(layers.modulate(joint[:, text_len:], shift, scale))


def pack(latents: jax.Array) -> jax.Array:
  """[B, h, w, c] -> [B, (h/2)(w/2), 4c] tokens, channel order (c, 2, 2)."""
  b, h, w, c = latents.shape
  x = latents.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
  return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, PATCH * PATCH * c)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
  """[B, (h/2)(w/2), 4c] tokens -> [B, h, w, c]; the inverse of `pack`."""
  b = tokens.shape[0]
  x = tokens.reshape(b, height // PATCH, width // PATCH, -1, PATCH, PATCH)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, -1)


def image_ids(height: int, width: int) -> np.ndarray:
  """[(h/2)(w/2), 3] float32 positions (0, row, column) of packed tokens."""
  rows, columns = height // PATCH, width // PATCH
  grid = np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij")
  return np.stack(grid, axis=-1).reshape(-1, 3).astype(np.float32)


def flux_apply(
  graphdef: nnx.GraphDef,
  params: layers.Params,
  latents: jax.Array,
  sigma: jax.Array,
  conditioning: Conditioning,
) -> jax.Array:
  """The denoiser on latents: x, sigma, prompt -> velocity.

  Args:
    graphdef: of a `FluxTransformer`, from `layers.split`.
    params: its parameters, any float dtype.
    latents: [B, h, w, c] float32, h and w even.
    sigma: [] or [B] float32 in [0, 1], 1 = pure noise.
    conditioning: `text`, `pooled`, and `guidance` where the model embeds it.

  Returns:
    [B, h, w, c] float32 velocity, noise - x0.

  Raises:
    UserError: latents of odd size, or a missing conditioning.
  """
  batch, height, width, _ = latents.shape
  if height % PATCH or width % PATCH:
    raise UserError(
      f"FLUX latents are {height} x {width}; both must be even: use image "
      "sizes that are multiples of twice the autoencoder's downscaling"
    )
  if conditioning.pooled is None:
    raise UserError("FLUX needs Conditioning.pooled, [B, P]")
  tokens = nnx.merge(graphdef, params)(
    pack(latents),
    conditioning.text,
    conditioning.pooled,
    jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (batch,)),
    image_ids(height, width),
    np.zeros((conditioning.text.shape[1], 3), np.float32),
    conditioning.guidance,
  )
  return unpack(tokens, height, width)
