"""Autoencoders: pictures to latents and back, one file per architecture.

An autoencoder is looked up by the class name in a checkpoint's `config.json`.
Its module (`module.encode`, `module.decode`) works on pixels in [-1, 1] and
raw latents; what the rest of the package sees are pixels in [0, 1] and
latents normalised as the denoiser wants them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.layers import Params
from digen_jax.models.vae import autoencoder_kl, hunyuan_video, wan
from digen_jax.models.vae.tiling import Tiling

__all__ = [
  "FAMILIES",
  "Autoencoder",
  "Family",
  "Tiling",
  "abstract_autoencoder",
  "create_autoencoder",
  "decode",
  "denormalise",
  "encode",
  "find_family",
  "normalise",
]


@dataclasses.dataclass(frozen=True)
class Family:
  """What a class of autoencoders is made of.

  Attributes:
    class_name: diffusers' name of the class.
    config: record type of the sizes. All have `downscale`,
      `temporal_downscale`, `latent_channels`, `latents_shift` and
      `latents_scale`, and the compute fields `dtype`, `tiling` and
      `sequential`.
    module: `module(config, rngs=...)`, the definition.
    parse_config: `config.json` content and compute fields -> config record.
    config_dict: config record -> `config.json` content.
  """

  class_name: str
  config: type
  module: Callable[..., nnx.Module]
  parse_config: Callable[..., Any]
  config_dict: Callable[[Any], dict[str, Any]]


FAMILIES = {
  family.class_name: family
  for family in (
    Family(
      "AutoencoderKL",
      autoencoder_kl.AutoencoderKLConfig,
      autoencoder_kl.AutoencoderKL,
      autoencoder_kl.parse_config,
      autoencoder_kl.config_dict,
    ),
    Family(
      "AutoencoderKLWan",
      wan.AutoencoderKLWanConfig,
      wan.AutoencoderKLWan,
      wan.parse_wan_config,
      wan.wan_config_dict,
    ),
    Family(
      "AutoencoderKLQwenImage",
      wan.AutoencoderKLQwenImageConfig,
      wan.AutoencoderKLWan,
      wan.parse_qwen_image_config,
      wan.qwen_image_config_dict,
    ),
    Family(
      "AutoencoderKLHunyuanVideo",
      hunyuan_video.AutoencoderKLHunyuanVideoConfig,
      hunyuan_video.AutoencoderKLHunyuanVideo,
      hunyuan_video.parse_config,
      hunyuan_video.config_dict,
    ),
  )
}


def find_family(class_name: str) -> Family:
  """The family of a diffusers autoencoder class; UserError if unknown."""
  if class_name not in FAMILIES:
    raise UserError(
      f"{class_name!r} is not a supported autoencoder; supported: "
      f"{', '.join(sorted(FAMILIES))}"
    )
  return FAMILIES[class_name]


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
  """An autoencoder: static definition and parameters.

  Attributes:
    config: its config record; `config.downscale` is pixels per latent pixel,
      `config.temporal_downscale` frames per latent frame.
    graphdef: static definition of the module.
    params: nested dict of arrays.
    logical_axes: nested like `params`; tuples of dimension names.
  """

  config: Any
  graphdef: nnx.GraphDef
  params: Params
  logical_axes: Params

  @property
  def encode(self) -> layers.Bound:
    """`encode(params, pixels in [0, 1])` -> latents; see `vae.encode`."""
    return layers.Bound(encode, self.graphdef)

  @property
  def decode(self) -> layers.Bound:
    """`decode(params, latents)` -> pixels in [0, 1]; see `vae.decode`."""
    return layers.Bound(decode, self.graphdef)


def create_autoencoder(config: Any, key: jax.Array) -> Autoencoder:
  """A freshly initialised autoencoder, float32 parameters.

  Args:
    config: a config record of one of the families.
    key: typed PRNG key.
  """
  module = _family_of(config).module

  def init(key: jax.Array) -> Params:
    return layers.split(module(config, rngs=nnx.Rngs(key)))[1]

  params = jax.jit(init)(key)
  return dataclasses.replace(abstract_autoencoder(config), params=params)


def abstract_autoencoder(config: Any) -> Autoencoder:
  """An autoencoder whose params are `jax.ShapeDtypeStruct`."""
  return Autoencoder(config, *layers.define(_family_of(config).module, config))


def normalise(z: jax.Array, config: Any) -> jax.Array:
  """Raw latents -> what the denoiser sees: (z - shift) * scale.

  Args:
    z: [..., c] float32.
    config: of the autoencoder; shift and scale are numbers, or per channel.
  """
  shift, scale = _shift_and_scale(z, config)
  return (z - shift) * scale


def denormalise(latents: jax.Array, config: Any) -> jax.Array:
  """The denoiser's latents -> raw latents; the inverse of `normalise`."""
  shift, scale = _shift_and_scale(latents, config)
  return latents / scale + shift


def encode(
  graphdef: nnx.GraphDef, params: Params, pixels: jax.Array
) -> jax.Array:
  """Pixels -> normalised latents, the posterior mean.

  Args:
    graphdef: of an autoencoder module, from `layers.split`.
    params: its parameters.
    pixels: [B, H, W, 3] float32 in [0, 1], or [B, F, H, W, 3] for those that
      know videos. H and W are multiples of `config.downscale`, F is one more
      than a multiple of `config.temporal_downscale`.

  Returns:
    [B, h, w, c] or [B, f, h, w, c] float32.

  Raises:
    UserError: other sizes.
  """
  module = nnx.merge(graphdef, params)
  _check_sizes(pixels.shape, module.config)
  mean, _ = module.encode(pixels * 2.0 - 1.0)
  return normalise(mean, module.config)


def decode(
  graphdef: nnx.GraphDef, params: Params, latents: jax.Array
) -> jax.Array:
  """Normalised latents -> pixels in [0, 1]; shapes as `encode`, backwards."""
  module = nnx.merge(graphdef, params)
  pixels = module.decode(denormalise(latents, module.config))
  return jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0)


def _family_of(config: Any) -> Family:
  for family in FAMILIES.values():
    if type(config) is family.config:
      return family
  raise UserError(
    f"{type(config).__name__} is no config of a known autoencoder"
  )


def _shift_and_scale(
  z: jax.Array, config: Any
) -> tuple[jax.Array | float, jax.Array | float]:
  def shaped(value: Any) -> jax.Array | float:
    if isinstance(value, float):
      return value
    return jnp.asarray(value, jnp.float32).reshape((1,) * (z.ndim - 1) + (-1,))

  return shaped(config.latents_shift), shaped(config.latents_scale)


def _check_sizes(shape: tuple[int, ...], config: Any) -> None:
  *_, height, width, _ = shape
  if height % config.downscale or width % config.downscale:
    raise UserError(
      f"cannot encode pictures of {height} x {width}: both sides must be "
      f"multiples of {config.downscale}"
    )
  if len(shape) == 5 and (shape[1] - 1) % config.temporal_downscale:
    raise UserError(
      f"cannot encode videos of {shape[1]} frames: the number must be one "
      f"more than a multiple of {config.temporal_downscale}"
    )
