"""Published models by name: their sizes, and how they are sampled.

Sizes are those of the checkpoints' `config.json`, so that one can plan without
a checkpoint; what a record's defaults say is left out. Settings are those of
the models' cards, and of diffusers' pipelines where a card leaves them open.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from digen_jax.errors import UserError
from digen_jax.models import find_family, vae

KL = dict(
  block_out_channels=(128, 256, 512, 512),
  layers_per_block=2,
  latent_channels=16,
  use_quant_conv=False,
  use_post_quant_conv=False,
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a model is sampled; fields as in `config.Sampling`.

  `tiling` is that of `config.Vae`: where a card or diffusers' documentation
  always enables it, since whole pictures do not fit into memory.
  """

  height: int = 1024
  width: int = 1024
  num_frames: int = 1
  num_steps: int = 28
  guidance_scale: float = 1.0
  embedded_guidance: float = 3.5
  tiling: int = 0


@dataclasses.dataclass(frozen=True)
class Published:
  """A model's sizes, and how it is used.

  Attributes:
    transformer: diffusers' class.
    autoencoder: diffusers' class.
    sizes: of the transformer.
    autoencoder_sizes: of the autoencoder.
    text_length: tokens of a prompt.
    settings: how it is sampled.
  """

  transformer: str
  autoencoder: str
  sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  autoencoder_sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  text_length: int = 512
  settings: Settings = Settings()

  @property
  def guided(self) -> bool:
    """Whether a step takes two forward passes, for guidance."""
    return self.settings.guidance_scale != 1.0

  @property
  def transformer_config(self) -> Any:
    """Config record of the transformer."""
    return find_family(self.transformer).config(**self.sizes)

  @property
  def autoencoder_config(self) -> Any:
    """Config record of the autoencoder."""
    return vae.find_family(self.autoencoder).config(**self.autoencoder_sizes)


WAN = Settings(480, 832, 81, num_steps=50, guidance_scale=5.0)

MODELS = {
  "flux-dev": Published(
    "FluxTransformer2DModel",
    "AutoencoderKL",
    dict(guidance_embeds=True),
    KL,
  ),
  "flux-schnell": Published(
    "FluxTransformer2DModel",
    "AutoencoderKL",
    autoencoder_sizes=KL,
    text_length=256,
    settings=Settings(num_steps=4),
  ),
  "qwen-image": Published(
    "QwenImageTransformer2DModel",
    "AutoencoderKLQwenImage",
    text_length=256,
    settings=Settings(1328, 1328, num_steps=50, guidance_scale=4.0),
  ),
  "wan2.1-1.3b": Published(
    "WanTransformer3DModel",
    "AutoencoderKLWan",
    dict(num_layers=30, num_attention_heads=12, ffn_dim=8960),
    settings=WAN,
  ),
  "wan2.1-14b": Published(
    "WanTransformer3DModel", "AutoencoderKLWan", settings=WAN
  ),
  "hunyuan-video": Published(
    "HunyuanVideoTransformer3DModel",
    "AutoencoderKLHunyuanVideo",
    text_length=256,
    settings=Settings(
      720, 1280, 129, num_steps=50, embedded_guidance=6.0, tiling=256
    ),
  ),
  "sd3-medium": Published(
    "SD3Transformer2DModel",
    "AutoencoderKL",
    dict(
      num_layers=24,
      num_attention_heads=24,
      caption_projection_dim=1536,
      pos_embed_max_size=192,
    ),
    KL,
    text_length=333,
    settings=Settings(guidance_scale=7.0),
  ),
  "sd3.5-medium": Published(
    "SD3Transformer2DModel",
    "AutoencoderKL",
    dict(
      num_layers=24,
      num_attention_heads=24,
      caption_projection_dim=1536,
      pos_embed_max_size=384,
      dual_attention_layers=tuple(range(13)),
      qk_norm="rms_norm",
    ),
    KL,
    text_length=333,
    settings=Settings(num_steps=40, guidance_scale=4.5),
  ),
  "sd3.5-large": Published(
    "SD3Transformer2DModel",
    "AutoencoderKL",
    dict(
      num_layers=38,
      num_attention_heads=38,
      caption_projection_dim=2432,
      pos_embed_max_size=192,
      qk_norm="rms_norm",
    ),
    KL,
    text_length=333,
    settings=Settings(guidance_scale=3.5),
  ),
}


def find_model(name: str) -> Published:
  """A published model; UserError if there is none of that name."""
  if name not in MODELS:
    raise UserError(
      f"{name!r} is no published model known here: use one of "
      f"{', '.join(MODELS)}"
    )
  return MODELS[name]


def recognise(config: Any) -> str | None:
  """Name of the published model whose transformer has these sizes, if any.

  Sizes do not tell a model from its distilled or fine-tuned descendants.

  Args:
    config: record of the transformer.
  """
  for name, model in MODELS.items():
    known = model.transformer_config
    if isinstance(config, type(known)) and known == dataclasses.replace(
      config, dtype=known.dtype, remat=known.remat
    ):
      return name
  return None
