"""Diffusers' transformers, called with the product's arguments.

torch and diffusers are extras: only benchmarks and tests import this module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch

from digen_jax.types import Conditioning


def build(
  raw: Mapping[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> torch.nn.Module:
  """A randomly initialised transformer, made on its device in its dtype.

  Args:
    raw: content of `config.json`.
    dtype: of the parameters.
    device: torch's name of it.
  """
  before = torch.get_default_dtype()
  torch.set_default_dtype(dtype)
  try:
    with torch.device(device):
      return getattr(diffusers, raw["_class_name"]).from_config(raw)
  finally:
    torch.set_default_dtype(before)


def velocity(
  module: torch.nn.Module,
  latents: torch.Tensor,
  sigma: torch.Tensor,
  conditioning: Conditioning,
) -> torch.Tensor:
  """What the family's `apply` computes, by diffusers.

  Args:
    module: a transformer of one of the families, LoRA adapters included.
    latents: [B, h, w, c] or [B, f, h, w, c], in the module's dtype.
    sigma: [B] float32 in [0, 1].
    conditioning: of tensors, features in the module's dtype.

  Returns:
    The velocity, shape and dtype of `latents`.
  """
  return CALLS[type(module).__name__](module, latents, sigma, conditioning)


def _flux(
  module: Any, latents: torch.Tensor, sigma: torch.Tensor, told: Conditioning
) -> torch.Tensor:
  _, height, width, _ = latents.shape
  rows = torch.arange(height // 2, device=latents.device)
  columns = torch.arange(width // 2, device=latents.device)
  zero = torch.zeros(1, dtype=rows.dtype, device=latents.device)
  ids = torch.cartesian_prod(zero, rows, columns)
  tokens = module(
    hidden_states=_pack(latents),
    encoder_hidden_states=told.text,
    pooled_projections=told.pooled,
    timestep=sigma.to(latents.dtype),
    img_ids=ids.to(latents.dtype),
    txt_ids=torch.zeros(told.text.shape[1], 3).to(latents),
    guidance=told.guidance,
    return_dict=False,
  )[0]
  return _unpack(tokens, height, width)


def _qwen_image(
  module: Any, latents: torch.Tensor, sigma: torch.Tensor, told: Conditioning
) -> torch.Tensor:
  batch, height, width, _ = latents.shape
  tokens = module(
    hidden_states=_pack(latents),
    encoder_hidden_states=told.text,
    encoder_hidden_states_mask=told.mask,
    timestep=sigma.to(latents.dtype),
    img_shapes=[[(1, height // 2, width // 2)]] * batch,
    return_dict=False,
  )[0]
  return _unpack(tokens, height, width)


def _sd3(
  module: Any, latents: torch.Tensor, sigma: torch.Tensor, told: Conditioning
) -> torch.Tensor:
  return module(
    hidden_states=latents.movedim(-1, 1),
    encoder_hidden_states=told.text,
    pooled_projections=told.pooled,
    timestep=sigma * 1000,
    return_dict=False,
  )[0].movedim(1, -1)


def _wan(
  module: Any, latents: torch.Tensor, sigma: torch.Tensor, told: Conditioning
) -> torch.Tensor:
  return module(
    hidden_states=latents.movedim(-1, 1),
    timestep=sigma * 1000,
    encoder_hidden_states=told.text,
    return_dict=False,
  )[0].movedim(1, -1)


def _hunyuan_video(
  module: Any, latents: torch.Tensor, sigma: torch.Tensor, told: Conditioning
) -> torch.Tensor:
  return module(
    hidden_states=latents.movedim(-1, 1),
    timestep=sigma * 1000,
    encoder_hidden_states=told.text,
    encoder_attention_mask=told.mask,
    pooled_projections=told.pooled,
    guidance=told.guidance * 1000,
    return_dict=False,
  )[0].movedim(1, -1)


def _pack(latents: torch.Tensor) -> torch.Tensor:
  """[B, h, w, c] -> [B, h/2 w/2, 4c]; features in the order (c, 2, 2)."""
  batch, height, width, channels = latents.shape
  x = latents.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, 4 * channels)


def _unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
  x = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
  x = x.permute(0, 1, 4, 2, 5, 3)
  return x.reshape(len(tokens), height, width, -1)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
  "FluxTransformer2DModel": _flux,
  "QwenImageTransformer2DModel": _qwen_image,
  "SD3Transformer2DModel": _sd3,
  "WanTransformer3DModel": _wan,
  "HunyuanVideoTransformer3DModel": _hunyuan_video,
}
