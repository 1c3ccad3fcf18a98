"""Autoencoders: images to latents and back, and their registry."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from digen_jax.models import layers
from digen_jax.models.layers import Params
from digen_jax.models.vae import autoencoder_kl


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
  """An image autoencoder: static definition and parameters.

  Attributes:
    config: its config record; `config.downscale` is pixels per latent pixel.
    graphdef: static definition of the module.
    params: nested dict of arrays.
    logical_axes: nested like `params`; tuples of dimension names.
  """

  config: autoencoder_kl.AutoencoderKLConfig
  graphdef: nnx.GraphDef
  params: Params
  logical_axes: Params

  @property
  def encode(self) -> layers.Bound:
    """`encode(params, images [B, H, W, 3] in [0, 1])` -> latents."""
    return layers.Bound(autoencoder_kl.encode, self.graphdef)

  @property
  def decode(self) -> layers.Bound:
    """`decode(params, latents [B, h, w, c])` -> images in [0, 1]."""
    return layers.Bound(autoencoder_kl.decode, self.graphdef)


def create_autoencoder(
  config: autoencoder_kl.AutoencoderKLConfig, key: jax.Array
) -> Autoencoder:
  """A freshly initialised autoencoder, float32 parameters."""

  def init(key: jax.Array) -> Params:
    module = autoencoder_kl.AutoencoderKL(config, rngs=nnx.Rngs(key))
    return layers.split(module)[1]

  params = jax.jit(init)(key)
  return dataclasses.replace(abstract_autoencoder(config), params=params)


def abstract_autoencoder(config: Any) -> Autoencoder:
  """An autoencoder whose params are `jax.ShapeDtypeStruct`."""
  module = nnx.eval_shape(
    lambda: autoencoder_kl.AutoencoderKL(config, rngs=nnx.Rngs(0))
  )
  graphdef, params = layers.split(module)
  return Autoencoder(config, graphdef, params, layers.logical_axes(module))
