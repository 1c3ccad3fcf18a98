"""Published models by name, as sizes alone: for planning without a checkpoint.

Sizes are those of the checkpoints' `config.json`; what a record's defaults say
is left out.
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
class Published:
  """A model's sizes, and how it is used.

  Attributes:
    transformer: diffusers' class.
    autoencoder: diffusers' class.
    sizes: of the transformer.
    autoencoder_sizes: of the autoencoder.
    text_length: tokens of a prompt.
    guided: whether it is sampled with classifier-free guidance, two forward
      passes a step.
  """

  transformer: str
  autoencoder: str
  sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  autoencoder_sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  text_length: int = 512
  guided: bool = False

  @property
  def transformer_config(self) -> Any:
    """Config record of the transformer."""
    return find_family(self.transformer).config(**self.sizes)

  @property
  def autoencoder_config(self) -> Any:
    """Config record of the autoencoder."""
    return vae.find_family(self.autoencoder).config(**self.autoencoder_sizes)


MODELS = {
  "flux-dev": Published(
    "FluxTransformer2DModel",
    "AutoencoderKL",
    dict(guidance_embeds=True),
    KL,
  ),
  "qwen-image": Published(
    "QwenImageTransformer2DModel",
    "AutoencoderKLQwenImage",
    text_length=256,
    guided=True,
  ),
  "wan2.1-1.3b": Published(
    "WanTransformer3DModel",
    "AutoencoderKLWan",
    dict(num_layers=30, num_attention_heads=12, ffn_dim=8960),
    guided=True,
  ),
  "wan2.1-14b": Published(
    "WanTransformer3DModel", "AutoencoderKLWan", guided=True
  ),
  "hunyuan-video": Published(
    "HunyuanVideoTransformer3DModel",
    "AutoencoderKLHunyuanVideo",
    text_length=256,
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
    guided=True,
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
    guided=True,
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
