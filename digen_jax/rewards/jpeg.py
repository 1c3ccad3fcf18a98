"""How well a picture compresses as JPEG: rewards that need no model.

The tasks of Black et al., "Training Diffusion Models with Reinforcement
Learning" (DDPO, arXiv:2305.13301), section 4.1: size of the file at quality
95, in kB of 1000 bytes.
"""

import io

import numpy as np
from PIL import Image

from digen_jax.rewards.protocol import to_uint8

QUALITY = 95


def jpeg_kilobytes(images: np.ndarray) -> np.ndarray:
  """JPEG sizes of [N, H, W, 3] images in [0, 1]: [N] float32, in kB.

  Of [N, F, H, W, 3] videos the mean over frames.
  """
  if images.ndim == 5:
    return np.stack([jpeg_kilobytes(video).mean() for video in images])
  sizes = []
  for image in to_uint8(images):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    sizes.append(buffer.tell() / 1000)
  return np.asarray(sizes, np.float32)


def incompressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:  # noqa: ARG001
  """Reward for detail: the size in kB."""
  return jpeg_kilobytes(images)


def compressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:  # noqa: ARG001
  """Reward for plainness: minus the size in kB."""
  return -jpeg_kilobytes(images)
