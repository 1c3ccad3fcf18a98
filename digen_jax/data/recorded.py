"""Inputs of a diffusers pipeline call as arrays in a file, and its latents.

An `.npz` file with the arrays that a pipeline takes in place of prompts, under
the names of its arguments and in its layout: `latents`, `prompt_embeds`,
`pooled_prompt_embeds`, `prompt_embeds_mask` or `prompt_attention_mask`, and
the same with `negative_` in front. With them our sampler and diffusers' start
from the same numbers, and their steps can be compared.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from digen_jax.errors import UserError
from digen_jax.npz import read_npz
from digen_jax.types import Conditioning


@dataclasses.dataclass(frozen=True)
class Recorded:
  """What such a file holds, in our layout.

  Attributes:
    latents: [B, h, w, c] or [B, f, h, w, c] float32 initial noise.
    prompts: [B, ...] conditioning.
    negative: likewise; None if the file has none.
    packed: whether the file's latents are tokens [B, (h/2)(w/2), 4c].
  """

  latents: np.ndarray
  prompts: Conditioning
  negative: Conditioning | None
  packed: bool

  def theirs(self, latents: np.ndarray) -> np.ndarray:
    """[n, B, ...] latents in our layout -> in that of the file."""
    if self.packed:
      n, b, h, w, c = latents.shape
      tokens = latents.reshape(n, b, h // 2, 2, w // 2, 2, c)
      tokens = tokens.transpose(0, 1, 2, 4, 6, 3, 5)
      return tokens.reshape(n, b, -1, 4 * c)
    return np.moveaxis(latents, -1, 2)


def read_recorded(file: str | Path, latent_shape: tuple[int, ...]) -> Recorded:
  """Reads a file of pipeline inputs.

  Args:
    file: the `.npz` file.
    latent_shape: of one sample, as the checkpoint and the size asked for have
      it.

  Raises:
    UserError: no such file, an array it lacks, or latents of another size.
  """
  arrays = read_npz(file, _is_input)
  for name in ("latents", "prompt_embeds"):
    if name not in arrays:
      raise UserError(
        f"{file} lacks {name!r}; it has to hold the arrays that the diffusers "
        "pipeline takes, under the names of its arguments"
      )
  latents, packed = arrays["latents"].astype(np.float32), False
  if latents.ndim == 3:
    latents, packed = _unpack(file, latents, latent_shape), True
  else:
    latents = np.moveaxis(latents, 1, -1)
  if latents.shape[1:] != latent_shape:
    raise UserError(
      f"the latents of {file} are {latents.shape[1:]}, this checkpoint and "
      f"size take {latent_shape}: give the size in pixels they were made for"
    )
  negative = None
  if "negative_prompt_embeds" in arrays:
    negative = _conditioning(arrays, "negative_")
  return Recorded(latents, _conditioning(arrays, ""), negative, packed)


def _is_input(name: str) -> bool:
  return name == "latents" or "prompt" in name


def _unpack(
  file: str | Path, tokens: np.ndarray, latent_shape: tuple[int, ...]
) -> np.ndarray:
  """[B, (h/2)(w/2), 4c] -> [B, h, w, c]."""
  height, width, channels = latent_shape[-3:]
  wanted = (height // 2 * (width // 2), 4 * channels)
  if tokens.shape[1:] != wanted:
    raise UserError(
      f"the latents of {file} are {tokens.shape[1:]} tokens, this checkpoint "
      f"and size take {wanted}: give the size in pixels they were made for"
    )
  x = tokens.reshape(-1, height // 2, width // 2, channels, 2, 2)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(-1, height, width, channels)


def _conditioning(
  arrays: Mapping[str, np.ndarray], prefix: str
) -> Conditioning:
  mask = arrays.get(f"{prefix}prompt_embeds_mask")
  if mask is None:
    mask = arrays.get(f"{prefix}prompt_attention_mask")
  return Conditioning(
    text=arrays[f"{prefix}prompt_embeds"],
    pooled=arrays.get(f"{prefix}pooled_prompt_embeds"),
    mask=None if mask is None else mask.astype(bool),
  )
