"""Denoisers: one file per family, and the registry that names them.

A family is looked up by the class name in a checkpoint's `config.json`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import config as config_lib
from digen_jax.models import flux, hunyuan_video, layers, qwen_image, sd3, wan
from digen_jax.models.layers import Params


@dataclasses.dataclass(frozen=True)
class Family:
  """What a model family is made of.

  Attributes:
    class_name: diffusers' name of the transformer class.
    pipeline_name: diffusers' name of the pipeline class.
    config: record type of the sizes.
    module: `module(config, rngs=...)`, the definition.
    apply: `apply(graphdef, params, latents, sigma, conditioning)`.
    fixed: keys of `config.json` of which one value is supported.
    ignored: keys of `config.json` without influence on the computation.
    video: whether latents have frames, [B, f, h, w, c].
    masks_text: whether padding of the text is masked.
    schedule_base: see `sampling.schedule_from_config`.
    rescale_guidance: see `types.Guidance`.
  """

  class_name: str
  pipeline_name: str
  config: type
  module: Callable[..., nnx.Module]
  apply: Callable[..., jax.Array]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  video: bool = False
  masks_text: bool = False
  schedule_base: Literal["uniform", "table"] = "uniform"
  rescale_guidance: bool = False

  def parse_config(self, raw: Mapping[str, Any], **compute: Any) -> Any:
    """`config.json` content -> config record; raises UserError."""
    return config_lib.from_dict(
      self.config,
      raw,
      class_name=self.class_name,
      fixed=self.fixed,
      ignored=self.ignored,
      **compute,
    )

  def config_dict(self, config: Any) -> dict[str, Any]:
    """Config record -> `config.json` content; undoes `parse_config`."""
    return config_lib.to_dict(config, class_name=self.class_name)


FAMILIES = {
  family.class_name: family
  for family in (
    Family(
      "FluxTransformer2DModel",
      "FluxPipeline",
      flux.FluxConfig,
      flux.FluxTransformer,
      flux.flux_apply,
    ),
    Family(
      "QwenImageTransformer2DModel",
      "QwenImagePipeline",
      qwen_image.QwenImageConfig,
      qwen_image.QwenImageTransformer,
      qwen_image.qwen_image_apply,
      fixed=qwen_image.FIXED,
      ignored=("pooled_projection_dim",),  # published, of an unused embedder
      masks_text=True,
      rescale_guidance=True,
    ),
    Family(
      "SD3Transformer2DModel",
      "StableDiffusion3Pipeline",
      sd3.SD3Config,
      sd3.SD3Transformer,
      sd3.sd3_apply,
      schedule_base="table",
    ),
    Family(
      "WanTransformer3DModel",
      "WanPipeline",
      wan.WanConfig,
      wan.WanTransformer,
      wan.wan_apply,
      fixed=wan.FIXED,
      video=True,
      schedule_base="table",
    ),
    Family(
      "HunyuanVideoTransformer3DModel",
      "HunyuanVideoPipeline",
      hunyuan_video.HunyuanVideoConfig,
      hunyuan_video.HunyuanVideoTransformer,
      hunyuan_video.hunyuan_video_apply,
      fixed=hunyuan_video.FIXED,
      video=True,
      masks_text=True,
    ),
  )
}


def find_family(class_name: str) -> Family:
  """The family of a diffusers transformer class; UserError if unknown."""
  if class_name not in FAMILIES:
    raise UserError(
      f"{class_name!r} is not a supported transformer; supported: "
      f"{', '.join(sorted(FAMILIES))}"
    )
  return FAMILIES[class_name]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A denoiser: static definition, parameters, and how to apply it.

  Attributes:
    family: its entry in `FAMILIES`.
    config: the family's config record.
    graphdef: static definition of the module.
    params: nested dict of arrays; repeated blocks have a leading layer axis.
    logical_axes: nested like `params`; tuples of dimension names.
  """

  family: Family
  config: Any
  graphdef: nnx.GraphDef
  params: Params
  logical_axes: Params

  @property
  def apply(self) -> layers.Bound:
    """`apply(params, latents, sigma, conditioning)` -> velocity.

    A pure function of its arguments; it holds no parameters, and those of
    equal models are equal, so it may be a static argument of `jax.jit`.
    """
    return layers.Bound(self.family.apply, self.graphdef)

  @property
  def read_dtypes(self) -> Params:
    """What parameters are rounded to when they are read: nested like them."""
    return layers.read_dtypes(nnx.merge(self.graphdef, self.params))


def create_model(config: Any, key: jax.Array) -> Model:
  """A freshly initialised model, float32 parameters.

  Like DiT (Peebles & Xie 2022) a fresh model has zero modulations and a zero
  output layer: its velocity is 0 until it is trained.

  Args:
    config: a config record of one of the families.
    key: typed PRNG key.
  """
  for family in FAMILIES.values():
    if isinstance(config, family.config):
      break
  else:
    raise UserError(f"{type(config).__name__} is no config of a known family")
  abstract = abstract_model(family, config)

  def init(key: jax.Array) -> Params:
    return layers.split(family.module(config, rngs=nnx.Rngs(key)))[1]

  return dataclasses.replace(abstract, params=jax.jit(init)(key))


def abstract_model(family: Family, config: Any) -> Model:
  """A model whose params are `jax.ShapeDtypeStruct`, nothing allocated."""
  return Model(family, config, *layers.define(family.module, config))
