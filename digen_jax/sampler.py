"""Pictures from a policy: fixed noise, deterministic sampler, in batches."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from digen_jax import policy
from digen_jax.data.embeddings import match_text
from digen_jax.parallel.mesh import (
  batch_sharding,
  on_mesh,
  padded_size,
  replicated,
)
from digen_jax.types import Conditioning


class Sampler:
  """`policy.sample` on one mesh, for any number of prompts."""

  def __init__(
    self,
    recipe: policy.Recipe,
    mesh: Mesh,
    frozen: Any,
    decoder: Any,
  ):
    """Compiles nothing yet.

    Args:
      recipe: the run.
      mesh: where to sample.
      frozen: parameters that are not trained, placed on the mesh.
      decoder: autoencoder parameters, placed on the mesh.
    """
    self._mesh, self._frozen, self._decoder = mesh, frozen, decoder
    self._batch_size = recipe.eval_batch_size
    recipe = dataclasses.replace(
      recipe, mesh=mesh, apply=on_mesh(recipe.apply, mesh)
    )
    self._sample = jax.jit(
      functools.partial(policy.sample, recipe),
      out_shardings=batch_sharding(mesh),
    )

  def __call__(
    self,
    trainable: Any,
    conditioning: Conditioning,
    negative: Conditioning | None,
    seed: int,
    part: range | None = None,
  ) -> np.ndarray:
    """Samples one image per row of the conditioning; arguments as `batches`.

    Returns:
      [N, H, W, 3] uint8, or [N, F, H, W, 3] videos.
    """
    batches = self.batches(trainable, conditioning, negative, seed, part=part)
    return np.concatenate(list(batches))

  def batches(
    self,
    trainable: Any,
    conditioning: Conditioning,
    negative: Conditioning | None,
    seed: int,
    rows: np.ndarray | None = None,
    part: range | None = None,
  ) -> Iterator[np.ndarray]:
    """Samples in batches: the host need not hold more than one.

    Args:
      trainable: parameters on the mesh.
      conditioning: [P, ...] host arrays.
      negative: [1, ...] host arrays, with classifier-free guidance.
      seed: of the noise, which with its number fixes that of a sample.
      rows: [N] which row of the conditioning each sample has; by default
        0 ... P-1.
      part: which of the N samples; all by default.

    Yields:
      Samples 0 ... N-1, or those of `part`, in order, n at a time:
      [n, H, W, 3] uint8, or [n, F, H, W, 3] videos.
    """
    conditioning, negative = match_text(conditioning, negative)
    rows = np.arange(len(conditioning.text)) if rows is None else rows
    part = range(len(rows)) if part is None else part
    spread, whole = batch_sharding(self._mesh), replicated(self._mesh)
    fixed = jax.device_put((negative, np.uint32(seed)), whole)
    size = padded_size(min(self._batch_size, len(part)), self._mesh)
    for first in range(part.start, part.stop, size):
      # The last batch repeats its last sample: one shape, one compilation.
      number = np.minimum(np.arange(first, first + size), part.stop - 1)
      batch = jax.tree.map(lambda x: x[rows[number]], conditioning)  # noqa: B023
      batch, number = jax.device_put((batch, number.astype(np.uint32)), spread)
      args = (trainable, self._frozen, self._decoder, batch, *fixed, number)
      yield np.asarray(self._sample(*args))[: part.stop - first]
