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
from digen_jax.models.text import clip, t5

Config = clip.ClipTextConfig | t5.T5Config


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
    """`encode(params, ids)`: `clip_encode` or `t5_encode`."""
    _, function = _kind(self.config)
    return layers.Bound(function, self.graphdef)


def _kind(config: Config) -> tuple[type[nnx.Module], Any]:
  """The module class and the pure function of a config record."""
  if isinstance(config, clip.ClipTextConfig):
    return clip.ClipTextEncoder, clip.clip_encode
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
  module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
  graphdef, params = layers.split(module)
  return TextEncoder(config, graphdef, params, layers.logical_axes(module))


CONFIGS = {"clip_text_model": clip.ClipTextConfig, "t5": t5.T5Config}


def parse_config(
  raw: Mapping[str, Any], *, dtype: DTypeLike = jnp.float32
) -> Config:
  """transformers' `config.json` content -> config record.

  Only the sizes are read; the file also holds training and generation
  settings without influence on the encoder. Absent sizes take transformers'
  defaults, which are those of the records.

  Raises:
    UserError: not a supported encoder, or an unsupported value.
  """
  kind = raw.get("model_type")
  if kind not in CONFIGS:
    raise UserError(
      f"text encoder of model_type {kind!r} is not supported; supported: "
      f"{', '.join(CONFIGS)}"
    )
  cls = CONFIGS[kind]
  names = {f.name for f in dataclasses.fields(cls)} - {"dtype"}
  sizes = {name: raw[name] for name in names & raw.keys()}
  return cls(**sizes, dtype=dtype)
