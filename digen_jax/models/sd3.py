"""Stable Diffusion 3, 3.5 medium and 3.5 large: MMDiT with sine positions.

Blocks with separate weights for text and image tokens and joint attention,
modulated by time and the pooled prompt (AdaLN). Positions are added to the
image tokens, not rotated. The first blocks of 3.5 medium have a second
attention over the image alone; the last block of every model only reads the
text. So there are up to three stacks: dual blocks, blocks, the last one.

Source: Esser et al. 2024 (SD3), section 4 and figure 2; the second attention:
Stability AI 2024, Stable Diffusion 3.5 (MMDiT-X).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.attention import attention
from digen_jax.models.flux import MLP_RATIO, TIME_DIM, split_heads
from digen_jax.models.layers import Linear, RMSNorm, round_to
from digen_jax.types import Conditioning

PATCH = 2


@dataclasses.dataclass(frozen=True)
class SD3Config:
  """Sizes of an SD3 transformer; names and defaults as in `config.json`.

  Attributes:
    sample_size: latent pixels along which a fresh position table counts one
      position a token; other sizes are scaled to it.
    patch_size: side of the square of latent pixels that is a token.
    in_channels: of the latents.
    num_layers: blocks of all kinds.
    joint_attention_dim: D of `Conditioning.text`.
    caption_projection_dim: width of text tokens, that of the model.
    pooled_projection_dim: P of `Conditioning.pooled`.
    out_channels: of the velocity, `in_channels` or None.
    pos_embed_max_size: tokens along a side of the position table.
    dual_attention_layers: 0 ... n-1: the first n blocks have two attentions.
    qk_norm: "rms_norm" of queries and keys (3.5) or None (3).
    dtype: compute dtype of matrix products and the residual stream.
    remat: see `layers.scan_blocks`.
  """

  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  num_layers: int = 18
  attention_head_dim: int = 64
  num_attention_heads: int = 18
  joint_attention_dim: int = 4096
  caption_projection_dim: int = 1152
  pooled_projection_dim: int = 2048
  out_channels: int | None = 16
  pos_embed_max_size: int = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: str | None = None
  dtype: Any = jnp.float32
  remat: str = "none"

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    dual = tuple(self.dual_attention_layers)
    object.__setattr__(self, "dual_attention_layers", dual)
    if self.patch_size != PATCH:
      raise UserError(
        f"SD3Transformer2DModel with patch_size {self.patch_size} is not "
        f"supported; use a checkpoint with patch_size {PATCH}"
      )
    if self.out_channels not in (None, self.in_channels):
      raise UserError(
        f"out_channels {self.out_channels} must be in_channels "
        f"{self.in_channels}: the velocity has the channels of the latents"
      )
    if self.caption_projection_dim != self.dim or self.dim % 4:
      raise UserError(
        f"caption_projection_dim {self.caption_projection_dim} must be "
        f"num_attention_heads x attention_head_dim {self.dim}, a multiple of 4"
      )
    if dual != tuple(range(len(dual))) or len(dual) >= self.num_layers:
      raise UserError(
        f"dual_attention_layers {dual} must be 0, 1, ... without a gap, and "
        f"without the last of the {self.num_layers} blocks"
      )
    if self.qk_norm not in (None, "rms_norm"):
      raise UserError(
        f"qk_norm {self.qk_norm!r} is not supported; use a checkpoint with "
        "'rms_norm' or null"
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
  def num_dual(self) -> int:
    """Blocks with two attentions."""
    return len(self.dual_attention_layers)

  @property
  def num_plain(self) -> int:
    """Blocks with one attention that update the text."""
    return self.num_layers - self.num_dual - 1


def patchify(latents: jax.Array) -> jax.Array:
  """[B, h, w, c] -> [B, (h/2)(w/2), 4c] tokens, channel order (2, 2, c)."""
  b, h, w, c = latents.shape
  x = latents.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, PATCH * PATCH * c)


def unpatchify(tokens: jax.Array, height: int, width: int) -> jax.Array:
  """[B, (h/2)(w/2), 4c] tokens -> [B, h, w, c]; the inverse of `patchify`."""
  b = tokens.shape[0]
  x = tokens.reshape(b, height // PATCH, width // PATCH, PATCH, PATCH, -1)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)


def position_table(config: SD3Config) -> jax.Array:
  """A fresh table: sines and cosines of the column, then of the row.

  Returns:
    [1, M^2, d] float32, M = `pos_embed_max_size`, rows first.

  Source: Vaswani et al. 2017, section 3.5, along two axes as in DiT.
  """
  side, dim = config.pos_embed_max_size, config.dim
  unit = np.float32(side / (config.sample_size // PATCH))
  position = np.arange(side, dtype=np.float32) / unit
  frequency = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
  angles = position.astype(np.float64)[:, None] * frequency
  # The table itself has up to 226 million elements: no constant of a program.
  line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  line = jnp.asarray(line, jnp.float32)
  shape = (side, side, dim // 2)
  column = jnp.broadcast_to(line[None], shape)
  row = jnp.broadcast_to(line[:, None], shape)
  return jnp.concatenate([column, row], axis=-1).reshape(1, side**2, dim)


class PatchConv(nnx.Module):
  """A convolution whose stride is its size: one linear map of each patch.

  Attributes:
    kernel: [2, 2, in, out].
    bias: [out].
  """

  def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
    fan_in = PATCH**2 * config.in_channels
    kernel = layers.xavier(rngs.params(), (fan_in, config.dim), jnp.float32)
    self.kernel = nnx.Param(
      kernel.reshape(PATCH, PATCH, config.in_channels, config.dim),
      logical_axes=(None, None, "latent", "embed"),
      read_as=jnp.dtype(config.dtype),
    )
    self.bias = nnx.Param(jnp.zeros(config.dim), logical_axes=("embed",))
    self.dtype = config.dtype

  def __call__(self, latents: jax.Array) -> jax.Array:
    """latents: [B, h, w, in] -> [B, (h/2)(w/2), out] float32."""
    kernel = self.kernel[...]
    y = jax.lax.dot_general(
      round_to(patchify(latents), self.dtype),
      round_to(kernel.reshape(-1, kernel.shape[-1]), self.dtype),
      (((2,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return y + self.bias[...].astype(jnp.float32)[None, None]


class PatchEmbed(nnx.Module):
  """Patches to tokens that know their place.

  Attributes:
    pos_embed: [1, M^2, d], a constant (`layers.CONSTANTS`). Checkpoints store
      it, and what they store is used: it need not be `position_table`.
  """

  def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
    self.proj = PatchConv(config, rngs=rngs)
    self.pos_embed = nnx.Param(
      position_table(config), logical_axes=(None, "position", "embed")
    )
    self.side = config.pos_embed_max_size
    self.dtype = config.dtype

  def __call__(self, latents: jax.Array) -> jax.Array:
    """latents: [B, h, w, c] -> [B, (h/2)(w/2), d] compute dtype.

    Raises:
      UserError: more tokens along a side than the table has.
    """
    rows, columns = (size // PATCH for size in latents.shape[1:3])
    if max(rows, columns) > self.side:
      raise UserError(
        f"SD3 latents are {PATCH * rows} x {PATCH * columns}, but the position "
        f"table ends at {PATCH * self.side}: use smaller images"
      )
    top, left = (self.side - rows) // 2, (self.side - columns) // 2
    table = jax.lax.stop_gradient(self.pos_embed[...]).astype(jnp.float32)
    table = table.reshape(self.side, self.side, -1)
    table = table[top : top + rows, left : left + columns]
    tokens = self.proj(latents) + table.reshape(1, rows * columns, -1)
    return round_to(tokens, self.dtype)


class SelfAttention(nnx.Module):
  """Attention over the image alone."""

  def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
    dim = config.dim
    inward = dict(axes=("embed", "heads"), dtype=config.dtype, rngs=rngs)
    outward = dict(axes=("heads", "embed"), dtype=config.dtype, rngs=rngs)
    self.to_q = Linear(dim, dim, **inward)
    self.to_k = Linear(dim, dim, **inward)
    self.to_v = Linear(dim, dim, **inward)
    self.to_out = Linear(dim, dim, **outward)
    self.norm_q = head_norm(config)
    self.norm_k = head_norm(config)
    self.head_dim = config.attention_head_dim
    self.dtype = config.dtype

  def heads(
    self, x: jax.Array, linear: Linear, norm: RMSNorm | None
  ) -> jax.Array:
    """[B, S, d] -> [B, S, H, D] compute dtype, normalised if there is a norm."""
    y = split_heads(linear(x), self.head_dim)
    return y if norm is None else round_to(norm(y), self.dtype)

  def __call__(self, image: jax.Array) -> jax.Array:
    """image: [B, S, d] -> [B, S, d]."""
    out = attention(
      self.heads(image, self.to_q, self.norm_q),
      self.heads(image, self.to_k, self.norm_k),
      self.heads(image, self.to_v, None),
    )
    return self.to_out(out.reshape(*out.shape[:2], -1))


class JointAttention(SelfAttention):
  """Self-attention over image and text, each with its own weights."""

  def __init__(self, config: SD3Config, *, last: bool = False, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    dim = config.dim
    inward = dict(axes=("embed", "heads"), dtype=config.dtype, rngs=rngs)
    outward = dict(axes=("heads", "embed"), dtype=config.dtype, rngs=rngs)
    self.add_q_proj = Linear(dim, dim, **inward)
    self.add_k_proj = Linear(dim, dim, **inward)
    self.add_v_proj = Linear(dim, dim, **inward)
    self.to_add_out = None if last else Linear(dim, dim, **outward)
    self.norm_added_q = head_norm(config)
    self.norm_added_k = head_norm(config)

  def __call__(
    self, image: jax.Array, text: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Image [B, S, d], text [B, T, d] -> image, text; no text if `last`."""
    image_heads = (
      self.heads(image, self.to_q, self.norm_q),
      self.heads(image, self.to_k, self.norm_k),
      self.heads(image, self.to_v, None),
    )
    text_heads = (
      self.heads(text, self.add_q_proj, self.norm_added_q),
      self.heads(text, self.add_k_proj, self.norm_added_k),
      self.heads(text, self.add_v_proj, None),
    )
    joint = (
      jnp.concatenate(pair, axis=1) for pair in zip(image_heads, text_heads)
    )
    out = attention(*joint)
    out = out.reshape(*out.shape[:2], -1)
    image_len = image.shape[1]
    image_out = self.to_out(out[:, :image_len])
    if self.to_add_out is None:
      return image_out, None
    return image_out, self.to_add_out(out[:, image_len:])


def head_norm(config: SD3Config) -> RMSNorm | None:
  """The norm of queries or of keys, where the model has one."""
  return RMSNorm(config.attention_head_dim) if config.qk_norm else None


class Block(nnx.Module):
  """Joint attention, then a feed-forward per stream; all modulated.

  A dual block attends a second time, over the image alone. Both attentions
  read the image as it came in.
  """

  def __init__(self, config: SD3Config, *, dual: bool = False, rngs: nnx.Rngs):
    dim, hidden = config.dim, MLP_RATIO * config.dim
    kwargs = dict(dtype=config.dtype, rngs=rngs)
    self.norm1 = layers.Modulation(dim, 9 if dual else 6, **kwargs)
    self.norm1_context = layers.Modulation(dim, 6, **kwargs)
    self.attn = JointAttention(config, rngs=rngs)
    self.attn2 = SelfAttention(config, rngs=rngs) if dual else None
    self.ff = layers.FeedForward(dim, hidden, **kwargs)
    self.ff_context = layers.FeedForward(dim, hidden, **kwargs)

  def __call__(
    self, image: jax.Array, text: jax.Array, embedding: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Image [B, S, d], text [B, T, d], embedding [B, d] -> image, text."""
    modulate, gated = layers.modulate, layers.gated
    shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(
      embedding
    )
    (
      text_shift,
      text_scale,
      text_gate,
      text_shift_ff,
      text_scale_ff,
      text_gate_ff,
    ) = self.norm1_context(embedding)

    image_out, text_out = self.attn(
      modulate(image, shift, scale), modulate(text, text_shift, text_scale)
    )
    if self.attn2 is None:
      image = gated(image, gate, image_out)
    else:
      shift_2, scale_2, gate_2 = second
      image_out_2 = self.attn2(modulate(image, shift_2, scale_2))
      image = gated(gated(image, gate, image_out), gate_2, image_out_2)
    text = gated(text, text_gate, text_out)

    image_out = self.ff(modulate(image, shift_ff, scale_ff))
    text_out = self.ff_context(modulate(text, text_shift_ff, text_scale_ff))
    image = gated(image, gate_ff, image_out)
    text = gated(text, text_gate_ff, text_out)
    return image, text


class LastBlock(nnx.Module):
  """A block that reads the text and leaves it as it is."""

  def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
    dim, hidden = config.dim, MLP_RATIO * config.dim
    kwargs = dict(dtype=config.dtype, rngs=rngs)
    self.norm1 = layers.Modulation(dim, 6, **kwargs)
    self.norm1_context = layers.Modulation(dim, 2, **kwargs)
    self.attn = JointAttention(config, last=True, rngs=rngs)
    self.ff = layers.FeedForward(dim, hidden, **kwargs)

  def __call__(
    self, image: jax.Array, text: jax.Array, embedding: jax.Array
  ) -> jax.Array:
    """Image [B, S, d], text [B, T, d], embedding [B, d] -> image."""
    modulate, gated = layers.modulate, layers.gated
    shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(embedding)
    text_scale, text_shift = self.norm1_context(embedding)
    out, _ = self.attn(
      modulate(image, shift, scale), modulate(text, text_shift, text_scale)
    )
    image = gated(image, gate, out)
    return gated(image, gate_ff, self.ff(modulate(image, shift_ff, scale_ff)))


class SD3Transformer(nnx.Module):
  """The denoiser on latents.

  The last block is a stack of one, so that it is scanned, recomputed and
  named as the others are.
  """

  def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
    dim, dtype = config.dim, config.dtype
    self.config = config
    self.patch_embed = PatchEmbed(config, rngs=rngs)
    self.context_embedder = Linear(
      config.joint_attention_dim,
      dim,
      axes=("text", "embed"),
      dtype=dtype,
      rngs=rngs,
    )
    self.time_embedder = layers.EmbeddingMLP(TIME_DIM, dim, rngs=rngs)
    self.pooled_embedder = layers.EmbeddingMLP(
      config.pooled_projection_dim, dim, in_axis="text", rngs=rngs
    )
    if config.num_dual:
      self.dual_blocks = layers.stack(
        lambda rngs: Block(config, dual=True, rngs=rngs), config.num_dual, rngs
      )
    if config.num_plain:
      self.blocks = layers.stack(
        lambda rngs: Block(config, rngs=rngs), config.num_plain, rngs
      )
    self.last_block = layers.stack(
      lambda rngs: LastBlock(config, rngs=rngs), 1, rngs
    )
    self.norm_out = layers.Modulation(dim, 2, dtype=dtype, rngs=rngs)
    self.proj_out = Linear(
      dim,
      PATCH**2 * config.in_channels,
      axes=("embed", "latent"),
      dtype=dtype,
      out_dtype=jnp.float32,
      kernel_init=layers.zeros,
      rngs=rngs,
    )

  def __call__(
    self,
    latents: jax.Array,
    text: jax.Array,
    pooled: jax.Array,
    timestep: jax.Array,
  ) -> jax.Array:
    """Predicts the velocity.

    Args:
      latents: [B, h, w, in_channels] noisy latents, h and w even.
      text: [B, T, joint_attention_dim].
      pooled: [B, pooled_projection_dim].
      timestep: [B] in [0, 1000], 1000 = pure noise.

    Returns:
      [B, h, w, in_channels] float32.

    Raises:
      UserError: latents larger than the position table.
    """
    config = self.config
    embedding = self.time_embedder(
      layers.timestep_embedding(timestep, TIME_DIM)
    ) + self.pooled_embedder(pooled.astype(jnp.float32))
    image = self.patch_embed(latents)
    text = self.context_embedder(text)

    def update_both(block: Block, carry: Any) -> Any:
      return block(*carry, embedding)

    if config.num_dual:
      image, text = layers.scan_blocks(
        self.dual_blocks, update_both, (image, text), config.remat
      )
    if config.num_plain:
      image, text = layers.scan_blocks(
        self.blocks, update_both, (image, text), config.remat
      )
    image = layers.scan_blocks(
      self.last_block,
      lambda block, image: block(image, text, embedding),
      image,
      config.remat,
    )
    scale, shift = self.norm_out(embedding)
    tokens = self.proj_out(layers.modulate(image, shift, scale))
    return unpatchify(tokens, *latents.shape[1:3])


def sd3_apply(
  graphdef: nnx.GraphDef,
  params: layers.Params,
  latents: jax.Array,
  sigma: jax.Array,
  conditioning: Conditioning,
) -> jax.Array:
  """The denoiser on latents: x, sigma, prompt -> velocity.

  Args:
    graphdef: of an `SD3Transformer`, from `layers.split`.
    params: its parameters, any float dtype.
    latents: [B, h, w, c] float32, h and w even.
    sigma: [] or [B] float32 in [0, 1], 1 = pure noise.
    conditioning: `text` and `pooled`.

  Returns:
    [B, h, w, c] float32 velocity, noise - x0.

  Raises:
    UserError: latents of odd size or too large, or no pooled prompt.
  """
  batch, height, width, _ = latents.shape
  if height % PATCH or width % PATCH:
    raise UserError(
      f"SD3 latents are {height} x {width}; both must be even: use image "
      "sizes that are multiples of twice the autoencoder's downscaling"
    )
  if conditioning.pooled is None:
    raise UserError("SD3 needs Conditioning.pooled, [B, P]")
  sigma = jnp.asarray(sigma, jnp.float32)
  return nnx.merge(graphdef, params)(
    latents,
    conditioning.text,
    conditioning.pooled,
    jnp.broadcast_to(sigma * 1000.0, (batch,)),
  )
