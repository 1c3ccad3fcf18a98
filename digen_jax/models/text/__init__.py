"""Text encoders: token ids to what a denoiser is told."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.layers import Params
from digen_jax.models.text import clip, decoder, t5

Config = clip.ClipTextConfig | t5.T5Config | decoder.DecoderConfig

# model_type in `config.json` -> its reader.
PARSERS = {
  "clip_text_model": clip.parse_config,
  "t5": t5.parse_config,
  "umt5": t5.parse_config,
  "llama": decoder.parse_config,
  "qwen2_5_vl": decoder.parse_config,
}


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
  """A text encoder: static definition and parameters.

  Attributes:
    config: its config record.
    graphdef: static definition of the module.
    params: nested dict of arrays; blocks have a leading layer axis.
    logical_axes: nested like `params`; tuples of dimension names.
  """

  config: Config
  graphdef: nnx.GraphDef
  params: Params
  logical_axes: Params

  @property
  def encode(self) -> layers.Bound:
    """`encode(params, ids, ...)`: the encoder's `*_encode` function."""
    _, function = _kind(self.config)
    return layers.Bound(function, self.graphdef)


@dataclasses.dataclass(frozen=True)
class NoEncoder:
  """In place of an encoder that a pipeline leaves out; its states are zeros.

  Attributes:
    width: of the states.
    params: none.
  """

  width: int
  params: tuple[()] = ()

  def encode(self, params: tuple[()], ids: jax.Array) -> jax.Array:
    """[B, T] -> [B, T, width] float32."""
    del params
    return jnp.zeros((*ids.shape, self.width))


def _kind(config: Config) -> tuple[type[nnx.Module], Any]:
  """The module class and the pure function of a config record."""
  if isinstance(config, clip.ClipTextConfig):
    return clip.ClipTextEncoder, clip.clip_encode
  if isinstance(config, decoder.DecoderConfig):
    return decoder.Decoder, decoder.decoder_encode
  return t5.T5Encoder, t5.t5_encode


def create_text_encoder(config: Config, key: jax.Array) -> TextEncoder:
  """A freshly initialised text encoder, float32 parameters."""
  module, _ = _kind(config)

  def init(key: jax.Array) -> Params:
    return layers.split(module(config, rngs=nnx.Rngs(key)))[1]

  abstract = abstract_text_encoder(config)
  return dataclasses.replace(abstract, params=jax.jit(init)(key))


def abstract_text_encoder(config: Config) -> TextEncoder:
  """A text encoder whose params are `jax.ShapeDtypeStruct`."""
  cls, _ = _kind(config)
  return TextEncoder(config, *layers.define(cls, config))


def parse_config(
  raw: Mapping[str, Any], *, dtype: DTypeLike = jnp.float32
) -> Config:
  """transformers' `config.json` content -> config record.

  Only the sizes are read; the file also holds training and generation
  settings without influence on the encoder. Absent sizes take transformers'
  defaults.

  Raises:
    UserError: not a supported encoder, or an unsupported value.
  """
  kind = raw.get("model_type")
  if kind not in PARSERS:
    raise UserError(
      f"text encoder of model_type {kind!r} is not supported; supported: "
      f"{', '.join(PARSERS)}"
    )
  return PARSERS[kind](raw, dtype)
