"""Decoder-only language models as text encoders: Llama, and Qwen2.5.

Causal pre-norm blocks with root-mean-square norms, rotary positions, fewer
key and value heads than query heads, and a gated feed-forward. Of
Qwen2.5-VL only the language model is meant: on text alone its
three-dimensional rotary positions are the ordinary ones.

Source: Touvron et al. 2023, "LLaMA", section 2.2; grouped heads: Ainslie et
al. 2023, "GQA"; Qwen2.5-VL: Bai et al. 2025, section 2.1.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.layers import Linear, RMSNorm
from digen_jax.models.text.embedding import Embedding


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of the rotary periods; names as in `config.json`.

  Attributes:
    factor: what long periods are multiplied by.
    low_freq_factor: periods from `original / low_freq_factor` on are long.
    high_freq_factor: periods up to `original / high_freq_factor` stay.
    original_max_position_embeddings: positions the periods were made for.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes of a language model; names and defaults as in Llama's `config.json`.

  Attributes:
    num_key_value_heads: divides `num_attention_heads`; None means as many.
    head_dim: even; None means `hidden_size / num_attention_heads`.
    qkv_bias: whether the query, key and value projections have biases.
    rope_theta: longest rotary period over 2 pi.
    rope_scaling: stretching of the periods, or None.
    skip_layers: blocks at the end that are left out. If there are any, so is
      the last norm: what comes out are the states between blocks.
    dtype: compute dtype of matrix products; the residual stream, norms,
      rotations and softmax are float32.
  """

  vocab_size: int = 32000
  hidden_size: int = 4096
  intermediate_size: int = 11008
  num_hidden_layers: int = 32
  num_attention_heads: int = 32
  num_key_value_heads: int | None = None
  head_dim: int | None = None
  rms_norm_eps: float = 1e-6
  qkv_bias: bool = False
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  skip_layers: int = 0
  dtype: Any = jnp.float32

  def __post_init__(self):
    heads = self.num_attention_heads
    for name, value in (
      ("dtype", jnp.dtype(self.dtype)),
      ("num_key_value_heads", self.num_key_value_heads or heads),
      ("head_dim", self.head_dim or self.hidden_size // heads),
    ):
      object.__setattr__(self, name, value)
    if heads % self.num_key_value_heads or self.head_dim % 2:
      raise UserError(
        f"language model with {heads} heads of {self.head_dim} and "
        f"{self.num_key_value_heads} key-value heads: the latter must divide "
        "the former, and the size of a head must be even"
      )
    if not 0 <= self.skip_layers < self.num_hidden_layers:
      raise UserError(
        f"language model of {self.num_hidden_layers} blocks: cannot leave out "
        f"the last {self.skip_layers}"
      )


# Sizes that Qwen2.5-VL's configuration takes where its file has none.
_QWEN_DEFAULTS = {
  "vocab_size": 152064,
  "hidden_size": 8192,
  "intermediate_size": 29568,
  "num_hidden_layers": 80,
  "num_attention_heads": 64,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
}
_UNSUPPORTED = ("attention_bias", "mlp_bias", "use_sliding_window")


def parse_config(raw: Mapping[str, Any], dtype: Any) -> DecoderConfig:
  """transformers' `config.json` content -> config record.

  Reads Llama's file and Qwen2.5-VL's, in which the language model's sizes
  are under `text_config` or, in older files, beside it.

  Raises:
    UserError: biases, activations, windows or rotary positions of a kind that
      neither model was published with.
  """
  qwen = raw["model_type"] == "qwen2_5_vl"
  if qwen:
    raw = _QWEN_DEFAULTS | raw | (raw.get("text_config") or {})
  for name in _UNSUPPORTED:
    if raw.get(name):
      raise UserError(f"language model with {name}={raw[name]} not supported")
  if raw.get("hidden_act", "silu") != "silu":
    raise UserError(
      f"language model with hidden_act={raw['hidden_act']!r} is not "
      "supported; only 'silu' is"
    )
  names = {f.name for f in dataclasses.fields(DecoderConfig)}
  names -= {"dtype", "qkv_bias", "rope_theta", "rope_scaling", "skip_layers"}
  sizes = {name: raw[name] for name in names & raw.keys()}
  return DecoderConfig(**sizes, **_parse_rope(raw), qkv_bias=qwen, dtype=dtype)


def _parse_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling` from files of either generation."""
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind in ("default", "mrope"):
    return {"rope_theta": theta}
  if kind != "llama3":
    raise UserError(
      f"language model with rotary positions of type {kind!r} is not "
      "supported; one of 'default', 'mrope', 'llama3'"
    )
  names = [f.name for f in dataclasses.fields(RopeScaling)]
  missing = [name for name in names if name not in rope]
  if missing:
    raise UserError(f"config.json: rope scaling lacks {', '.join(missing)}")
  scaling = RopeScaling(**{name: rope[name] for name in names})
  return {"rope_theta": theta, "rope_scaling": scaling}


def rotary_table(config: DecoderConfig, length: int) -> np.ndarray:
  """Cosines and sines of the rotation of each position.

  Angles are float32 products of float32 frequencies, as the models were
  trained with.

  Args:
    config: of the model.
    length: T, tokens.

  Returns:
    [2, T, head_dim / 2] float32.
  """
  exponents = np.arange(0, config.head_dim, 2, np.float32) / np.float32(
    config.head_dim
  )
  frequencies = 1 / np.float32(config.rope_theta) ** exponents
  if config.rope_scaling is not None:
    frequencies = _stretched(frequencies, config.rope_scaling)
  angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None]
  return np.stack([np.cos(angles), np.sin(angles)])


def _stretched(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Low frequencies divided by `factor`, high ones kept, a ramp between."""
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  original = scaling.original_max_position_embeddings
  turns = original * frequencies / (2 * math.pi)  # within `original` positions
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  stretched = frequencies / scaling.factor
  return ((1 - kept) * stretched + kept * frequencies).astype(np.float32)


def rotate_halves(x: jax.Array, table: jax.Array | np.ndarray) -> jax.Array:
  """Rotates the pairs (k, k + D / 2) of the last axis, in float32.

  Args:
    x: [B, T, H, D].
    table: [2, T, D / 2] from `rotary_table`.

  Returns:
    [B, T, H, D] float32.
  """
  cos, sin = table[0][None, :, None], table[1][None, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1)


class DecoderBlock(nnx.Module):
  """Self-attention and a gated feed-forward, each on a normed residual."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    dim, hidden = config.hidden_size, config.intermediate_size
    inner = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    kwargs = dict(dtype=config.dtype, rngs=rngs)
    plain = dict(use_bias=False, out_dtype=jnp.float32, **kwargs)
    inward = dict(axes=("embed", "heads"), use_bias=config.qkv_bias, **kwargs)
    self.norm_1 = RMSNorm(dim, eps=config.rms_norm_eps)
    self.to_q = Linear(dim, inner, **inward)
    self.to_k = Linear(dim, shared, **inward)
    self.to_v = Linear(dim, shared, **inward)
    self.to_out = Linear(inner, dim, axes=("heads", "embed"), **plain)
    self.norm_2 = RMSNorm(dim, eps=config.rms_norm_eps)
    self.gate = Linear(dim, hidden, axes=("embed", "mlp"), **plain)
    self.linear_1 = Linear(dim, hidden, axes=("embed", "mlp"), **plain)
    self.linear_2 = Linear(hidden, dim, axes=("mlp", "embed"), **plain)
    self.head_dim = config.head_dim

  def __call__(
    self, x: jax.Array, table: np.ndarray, mask: jax.Array
  ) -> jax.Array:
    """x: [B, T, d] float32, mask: [B or 1, 1, T, T] bool -> [B, T, d]."""
    normed = self.norm_1(x)
    query, key, value = (
      project(normed).reshape(*x.shape[:2], -1, self.head_dim)
      for project in (self.to_q, self.to_k, self.to_v)
    )
    query, key = (
      layers.round_to(rotate_halves(y, table), value.dtype)
      for y in (query, key)
    )
    # jax 0.10's implementation mixes dtypes itself; allow it that here only.
    with jax.numpy_dtype_promotion("standard"):
      out = jax.nn.dot_product_attention(query, key, value, mask=mask)
    x = x + self.to_out(out.reshape(*x.shape[:2], -1))
    normed = self.norm_2(x)
    hidden = jax.nn.silu(self.gate(normed)) * self.linear_1(normed)
    return x + self.linear_2(hidden)


class Decoder(nnx.Module):
  """Token ids to token states."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.token_embedding = Embedding(
      config.vocab_size,
      config.hidden_size,
      stddev=0.02,
      axes=("vocab", "embed"),
      rngs=rngs,
    )
    self.blocks = layers.stack(
      lambda rngs: DecoderBlock(config, rngs=rngs),
      config.num_hidden_layers - config.skip_layers,
      rngs,
    )
    self.norm_out = (
      None
      if config.skip_layers
      else RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    )

  def __call__(
    self, ids: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """ids: [B, T] int, mask: [B, T] bool -> [B, T, d] float32."""
    length = ids.shape[1]
    table = rotary_table(self.config, length)
    causal = np.tri(length, dtype=bool)[None, None]
    seen = causal if mask is None else causal & mask[:, None, None, :]
    x = layers.scan_blocks(
      self.blocks,
      lambda block, x: block(x, table, seen),
      self.token_embedding(ids),
    )
    return x if self.norm_out is None else self.norm_out(x)


def decoder_encode(
  graphdef: nnx.GraphDef,
  params: layers.Params,
  ids: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Reads prompts with a language model.

  Positions count from the first column. Only their differences matter, so
  that padding on the left changes nothing but rounding.

  Args:
    graphdef: of a `Decoder`, from `layers.split`.
    params: its parameters, any float dtype.
    ids: [B, T] int32 tokens.
    mask: [B, T] bool, False where a token is padding and not attended to;
      None attends to all.

  Returns:
    [B, T, d] float32 token states: after the last norm or, with
    `skip_layers`, on entry to the first block that is left out. Those of
    padding are finite and without meaning.
  """
  return nnx.merge(graphdef, params)(ids, mask)
