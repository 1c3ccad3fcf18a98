"""Qwen-Image: a rectified-flow transformer of FLUX's double blocks alone.

What sets it apart from FLUX: only time modulates the blocks; the states of a
language model are normalised before they are projected, and padding among
them is masked; image positions are centred on the middle of the picture, and
text positions continue past its larger side.

Source: Wu et al. 2025, Qwen-Image Technical Report, section 2.4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.flux import PATCH, TIME_DIM, DoubleBlock, pack, unpack
from digen_jax.models.layers import Linear, RMSNorm
from digen_jax.types import Conditioning

# Flags of the image-editing and layered variants, whose inputs differ.
FIXED = dict(
  guidance_embeds=False,
  zero_cond_t=False,
  use_additional_t_cond=False,
  use_layer3d_rope=False,
)


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
  """Sizes of a Qwen-Image transformer; names and defaults as in `config.json`.

  Attributes:
    patch_size: side of the square of latent pixels that is a token.
    in_channels: of a packed token: latent channels x 2 x 2.
    out_channels: of the latents.
    num_layers: blocks.
    joint_attention_dim: D of `Conditioning.text`.
    axes_dims_rope: head dimensions rotated by (frame, row, column).
    dtype: compute dtype of matrix products and the residual stream.
    remat: see `layers.scan_blocks`.
  """

  patch_size: int = 2
  in_channels: int = 64
  out_channels: int = 16
  num_layers: int = 60
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 3584
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)
  dtype: Any = jnp.float32
  remat: str = "none"

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
    if self.patch_size != PATCH:
      raise UserError(
        f"QwenImageTransformer2DModel with patch_size {self.patch_size} is "
        f"not supported; use a checkpoint with patch_size {PATCH}"
      )
    if self.out_channels is None or self.in_channels != self.token_channels:
      raise UserError(
        f"in_channels {self.in_channels} must be {PATCH**2} x out_channels "
        f"{self.out_channels}: the velocity has the channels of the latents"
      )
    if sum(self.axes_dims_rope) != self.attention_head_dim:
      raise UserError(
        f"axes_dims_rope {self.axes_dims_rope} must add up to "
        f"attention_head_dim {self.attention_head_dim}"
      )

  @property
  def dim(self) -> int:
    """Model width."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def latent_channels(self) -> int:
    """Channels of the unpacked latents."""
    return self.out_channels

  @property
  def token_channels(self) -> int:
    """Channels of a packed output token."""
    return PATCH**2 * self.out_channels


class QwenImageTransformer(nnx.Module):
  """The denoiser on packed tokens."""

  def __init__(self, config: QwenImageConfig, *, rngs: nnx.Rngs):
    dim, dtype = config.dim, config.dtype
    self.config = config
    self.img_in = Linear(
      config.in_channels,
      dim,
      axes=("latent", "embed"),
      dtype=dtype,
      rngs=rngs,
    )
    self.txt_norm = RMSNorm(config.joint_attention_dim)
    self.txt_in = Linear(
      config.joint_attention_dim,
      dim,
      axes=("text", "embed"),
      dtype=dtype,
      rngs=rngs,
    )
    self.time_embedder = layers.EmbeddingMLP(TIME_DIM, dim, rngs=rngs)
    self.blocks = layers.stack(
      lambda rngs: DoubleBlock(config, rngs=rngs), config.num_layers, rngs
    )
    self.norm_out = layers.Modulation(dim, 2, dtype=dtype, rngs=rngs)
    self.proj_out = Linear(
      dim,
      config.token_channels,
      axes=("embed", "latent"),
      dtype=dtype,
      out_dtype=jnp.float32,
      kernel_init=layers.zeros,
      rngs=rngs,
    )

  def __call__(
    self,
    tokens: jax.Array,
    text: jax.Array,
    mask: jax.Array | None,
    timestep: jax.Array,
    img_shape: tuple[int, int, int],
  ) -> jax.Array:
    """Predicts the velocity of packed latents.

    Args:
      tokens: [B, S, in_channels] packed noisy latents.
      text: [B, T, joint_attention_dim].
      mask: [B, T] bool, False where `text` is padding; None is all True.
      timestep: [B] in [0, 1], 1 = pure noise.
      img_shape: frames, rows, columns of tokens; S is their product.

    Returns:
      [B, S, 4 out_channels] float32.
    """
    config = self.config
    text_len = text.shape[1]
    embedding = self.time_embedder(
      layers.timestep_embedding(timestep, TIME_DIM, scale=1000.0)
    )
    image = self.img_in(tokens)
    text = self.txt_in(self.txt_norm(text))
    rope = layers.rope_table(
      positions(img_shape, text_len), config.axes_dims_rope, dtype=np.float32
    )
    if mask is not None:
      mask = jnp.pad(mask, [(0, 0), (0, image.shape[1])], constant_values=True)

    image, _ = layers.scan_blocks(
      self.blocks,
      lambda block, carry: block(*carry, embedding, rope, mask),
      (image, text),
      config.remat,
    )
    scale, shift = self.norm_out(embedding)
    return self.proj_out(layers.modulate(image, shift, scale))


def positions(img_shape: tuple[int, int, int], text_len: int) -> np.ndarray:
  """Where text, then image tokens are, along (frame, row, column).

  Rows and columns count from the middle, so that another image size keeps the
  positions that both have; text lies on the diagonal that begins where the
  positive side of the larger of them ends.

  Args:
    img_shape: frames, rows, columns.
    text_len: T.

  Returns:
    [T + S, 3] float32.
  """
  frames, rows, columns = img_shape
  grid = np.meshgrid(
    np.arange(frames),
    np.arange(rows) - (rows - rows // 2),
    np.arange(columns) - (columns - columns // 2),
    indexing="ij",
  )
  image = np.stack(grid, axis=-1).reshape(-1, 3)
  text = max(rows // 2, columns // 2) + np.arange(text_len)
  text = np.repeat(text[:, None], 3, axis=1)
  return np.concatenate([text, image]).astype(np.float32)


def qwen_image_apply(
  graphdef: nnx.GraphDef,
  params: layers.Params,
  latents: jax.Array,
  sigma: jax.Array,
  conditioning: Conditioning,
) -> jax.Array:
  """The denoiser on latents: x, sigma, prompt -> velocity.

  Args:
    graphdef: of a `QwenImageTransformer`, from `layers.split`.
    params: its parameters, any float dtype.
    latents: [B, h, w, c] float32, h and w even.
    sigma: [] or [B] float32 in [0, 1], 1 = pure noise.
    conditioning: `text`, and `mask` where some of it is padding.

  Returns:
    [B, h, w, c] float32 velocity, noise - x0.

  Raises:
    UserError: latents of odd size.
  """
  batch, height, width, _ = latents.shape
  if height % PATCH or width % PATCH:
    raise UserError(
      f"Qwen-Image latents are {height} x {width}; both must be even: use "
      "image sizes that are multiples of twice the autoencoder's downscaling"
    )
  tokens = nnx.merge(graphdef, params)(
    pack(latents),
    conditioning.text,
    conditioning.mask,
    jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (batch,)),
    (1, height // PATCH, width // PATCH),
  )
  return unpack(tokens, height, width)
