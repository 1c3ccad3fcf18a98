"""Decoding one sample after the other, on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax import policy
from digen_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from digen_jax.weights import load
from tests import references
from tests.autoencoders import HUNYUAN, WAN, build, save

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def recipe_of(autoencoder, **changes):
  fields = dataclasses.fields(policy.Recipe)
  recipe = policy.Recipe(*[None] * len(fields))
  return dataclasses.replace(recipe, decode=autoencoder.decode, **changes)


@pytest.mark.parametrize(
  "class_name, frames, sizes",
  [
    (WAN, 3, dict(data=2, tensor=2)),
    pytest.param(HUNYUAN, 6, dict(fsdp=4), marks=pytest.mark.slow),
  ],
)
def test_the_same_pictures(class_name, frames, sizes, tmp_path):
  path = save(build(class_name, 9), tmp_path)
  mesh = make_mesh(sizes, jax.devices()[:4])
  latents = references.normal(1, 4, frames, 4, 2, 4)

  def run(sequential):
    model = load.load_autoencoder(path, sequential=sequential, mesh=mesh)
    recipe = recipe_of(model, sequential=sequential, mesh=mesh)
    x = jax.device_put(latents, batch_sharding(mesh))
    images = references.jit(
      lambda params, x: policy._decode(recipe, params, x),
      out_shardings=batch_sharding(mesh),
    )(model.params, x)
    return np.asarray(images)

  whole, parts = run(False), run(True)
  assert whole.dtype == parts.dtype == np.uint8
  assert whole.std() > 10
  assert np.abs(whole.astype(int) - parts).max() <= 1  # where one half rounds


def test_memory_does_not_grow_with_the_batch(tmp_path):
  path = save(build(HUNYUAN, 9), tmp_path)
  mesh = make_mesh(dict(data=2), jax.devices()[:2])

  def working_memory(batch, sequential):
    """Bytes of a device beyond its pictures and latents."""
    model = load.load_autoencoder(path, mesh=mesh)
    recipe = recipe_of(model, sequential=sequential, mesh=mesh)
    x = jax.ShapeDtypeStruct(
      (batch, 3, 8, 8, 4), jnp.float32, sharding=batch_sharding(mesh)
    )
    params = jax.tree.map(
      lambda p: jax.ShapeDtypeStruct(
        p.shape, p.dtype, sharding=replicated(mesh)
      ),
      model.params,
    )
    compiled = (
      jax.jit(lambda params, x: policy._decode(recipe, params, x))
      .lower(params, x)
      .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  many = working_memory(8, True)
  assert many < 1.5 * working_memory(2, True)
  assert working_memory(8, False) > 2 * many
