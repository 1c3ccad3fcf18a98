"""CLIP's text encoder: a causal pre-norm transformer.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural
Language Supervision", section 2.4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.layers import Linear
from digen_jax.models.text.embedding import Embedding

ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

# Checkpoints older than mid-2023 carry this wrong id; for them the end token
# is known to be the highest id of the vocabulary.
LEGACY_EOS_ID = 2


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """Sizes of a CLIP text encoder; names and defaults as in `config.json`.

  Attributes:
    max_position_embeddings: longest sequence, in tokens.
    hidden_act: "quick_gelu" or "gelu" (exact).
    eos_token_id: the token whose state is the pooled output; 2 means the
      highest id in the sequence.
    projection_dim: width that the pooled output is projected to; None leaves
      it as it is.
    dtype: compute dtype of matrix products; the residual stream, norms and
      softmax are float32.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407
  projection_dim: int | None = None
  dtype: Any = jnp.float32

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    if self.hidden_act not in ACTIVATIONS:
      raise UserError(
        f"CLIP hidden_act {self.hidden_act!r} is not supported; one of "
        f"{', '.join(ACTIVATIONS)}"
      )
    if self.hidden_size % self.num_attention_heads:
      raise UserError(
        f"CLIP hidden_size {self.hidden_size} must be a multiple of "
        f"num_attention_heads {self.num_attention_heads}"
      )
    if not isinstance(self.eos_token_id, int):
      raise UserError(
        f"CLIP eos_token_id {self.eos_token_id!r} must be one integer"
      )


def parse_config(raw: Mapping[str, Any], dtype: Any) -> ClipTextConfig:
  """transformers' `config.json` content -> config record.

  The file names a projection's size whether there is a projection or not.
  """
  names = {f.name for f in dataclasses.fields(ClipTextConfig)} - {"dtype"}
  if "CLIPTextModelWithProjection" not in (raw.get("architectures") or ()):
    names -= {"projection_dim"}
  sizes = {name: raw[name] for name in names & raw.keys()}
  return ClipTextConfig(**sizes, dtype=dtype)


class ClipStates(NamedTuple):
  """What CLIP makes of a batch of prompts, float32.

  Attributes:
    last: [B, T, d] token states after the last norm.
    penultimate: [B, T, d] token states on entry to the last block.
    pooled: [B, d] state at each row's first end token, or [B, projection_dim],
      its projection.
  """

  last: jax.Array
  penultimate: jax.Array
  pooled: jax.Array


class ClipBlock(nnx.Module):
  """Causal self-attention and a two-layer MLP, each on a normed residual."""

  def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
    dim, hidden = config.hidden_size, config.intermediate_size
    inward = dict(axes=("embed", "heads"), dtype=config.dtype, rngs=rngs)
    kwargs = dict(dtype=config.dtype, out_dtype=jnp.float32, rngs=rngs)
    self.norm_1 = layers.LayerNorm(dim, eps=config.layer_norm_eps)
    self.to_q = Linear(dim, dim, **inward)
    self.to_k = Linear(dim, dim, **inward)
    self.to_v = Linear(dim, dim, **inward)
    self.to_out = Linear(dim, dim, axes=("heads", "embed"), **kwargs)
    self.norm_2 = layers.LayerNorm(dim, eps=config.layer_norm_eps)
    self.linear_1 = Linear(dim, hidden, axes=("embed", "mlp"), **kwargs)
    self.linear_2 = Linear(hidden, dim, axes=("mlp", "embed"), **kwargs)
    self.num_heads = config.num_attention_heads
    self.activation = config.hidden_act

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, T, d] float32 -> [B, T, d] float32."""
    normed = self.norm_1(x)
    query, key, value = (
      project(normed).reshape(*x.shape[:2], self.num_heads, -1)
      for project in (self.to_q, self.to_k, self.to_v)
    )
    # jax 0.10's implementation mixes dtypes itself; allow it that here only.
    with jax.numpy_dtype_promotion("standard"):
      out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + self.to_out(out.reshape(x.shape))
    hidden = ACTIVATIONS[self.activation](self.linear_1(self.norm_2(x)))
    return x + self.linear_2(hidden)


class ClipTextEncoder(nnx.Module):
  """Token ids to token states and one pooled state per prompt."""

  def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
    dim, rows = config.hidden_size, config.max_position_embeddings
    kwargs = dict(stddev=0.02, rngs=rngs)
    self.config = config
    self.token_embedding = Embedding(
      config.vocab_size, dim, axes=("vocab", "embed"), **kwargs
    )
    self.position_embedding = Embedding(
      rows, dim, axes=(None, "embed"), **kwargs
    )
    self.blocks = layers.stack(
      lambda rngs: ClipBlock(config, rngs=rngs), config.num_hidden_layers, rngs
    )
    self.norm_out = layers.LayerNorm(dim, eps=config.layer_norm_eps)
    self.text_projection = (
      None
      if config.projection_dim is None
      else Linear(
        dim,
        config.projection_dim,
        axes=("embed", None),
        use_bias=False,
        dtype=config.dtype,
        out_dtype=jnp.float32,
        rngs=rngs,
      )
    )

  def __call__(self, ids: jax.Array) -> ClipStates:
    """ids: [B, T] int."""
    config = self.config
    length = ids.shape[1]
    if length > config.max_position_embeddings:
      raise UserError(
        f"CLIP got {length} tokens but has {config.max_position_embeddings} "
        "positions: lower the tokenizer's model_max_length"
      )
    positions = self.position_embedding(jnp.arange(length))
    x = self.token_embedding(ids) + positions[None]
    x, penultimate = layers.scan_blocks(
      self.blocks, lambda block, carry: (block(carry[0]), carry[0]), (x, x)
    )
    x = self.norm_out(x)
    # The first end token: padding may repeat it.
    legacy = config.eos_token_id == LEGACY_EOS_ID
    end = jnp.argmax(ids if legacy else ids == config.eos_token_id, axis=1)
    pooled = x[jnp.arange(x.shape[0]), end]
    if self.text_projection is not None:
      pooled = self.text_projection(pooled)
    return ClipStates(x, penultimate, pooled)


def clip_encode(
  graphdef: nnx.GraphDef, params: layers.Params, ids: jax.Array
) -> ClipStates:
  """Encodes prompts with CLIP.

  Args:
    graphdef: of a `ClipTextEncoder`, from `layers.split`.
    params: its parameters, any float dtype.
    ids: [B, T] int32 tokens, each row ended by the end token, then padded.

  Raises:
    UserError: T exceeds the model's positions.
  """
  return nnx.merge(graphdef, params)(ids)
