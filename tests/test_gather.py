"""Split parameters, whole for a layer at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digen_jax.models import layers
from digen_jax.parallel import rules
from digen_jax.parallel.gather import reading
from digen_jax.parallel.mesh import batch_sharding, make_mesh

DEPTH, DIM = 5, 12


class Model(nnx.Module):
  def __init__(self, *, rngs):
    self.enter = layers.Linear(7, DIM, axes=("text", "embed"), rngs=rngs)
    self.blocks = layers.stack(
      lambda rngs: layers.FeedForward(
        DIM, 24, dtype=jnp.dtype("float32"), rngs=rngs
      ),
      DEPTH,
      rngs,
    )

  def __call__(self, x, remat):
    return layers.scan_blocks(
      self.blocks, lambda block, x: x + block(x), self.enter(x), remat
    )


@pytest.fixture(scope="module")
def model():
  return Model(rngs=nnx.Rngs(0))


def loss_of(graphdef, remat):
  def apply(params, x):
    return nnx.merge(graphdef, params)(x, remat)

  return apply


def compiled(model, apply, mesh, x):
  axes = layers.logical_axes(model)
  _, params = layers.split(model)
  layout = rules.param_shardings(mesh, axes, params, rules.TRAINER)
  params = jax.device_put(params, layout)
  apply = reading(apply, mesh, axes, layers.read_dtypes(model))
  gradient = jax.jit(
    jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2)),
    out_shardings=layout,
  )
  args = params, jax.device_put(x, batch_sharding(mesh))
  return gradient.lower(*args).compile(), args


def gathered_shapes(program):
  found = re.findall(r"f32\[([\d,]*)\][^=]* all-gather\(", program.as_text())
  return [tuple(map(int, dims.split(","))) for dims in found]


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_gradients_are_those_of_whole_parameters(model, remat, axes):
  mesh = make_mesh(axes, jax.devices()[:4])
  x = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)
  graphdef, params = layers.split(model)
  apply = loss_of(graphdef, remat)
  program, args = compiled(model, apply, mesh, x)
  want = jax.grad(lambda params: jnp.sum(apply(params, x) ** 2))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
    program(*args),
    want,
  )


def test_gradients_of_a_rollout_mesh_are_never_whole(model):
  mesh = make_mesh({"data": 4}, jax.devices()[:4])
  graphdef, params = layers.split(model)
  params = jax.tree.map(jnp.bfloat16, params)  # as they are sent
  axes, dtypes = layers.logical_axes(model), layers.read_dtypes(model)
  apply = reading(loss_of(graphdef, "block"), mesh, axes, dtypes)

  def loss(params, x):
    return jnp.sum(apply(params, x) ** 2)

  def gradient(params, x):
    return jax.grad(loss)(jax.tree.map(jnp.float32, params), x)

  parts = rules.param_shardings(mesh, axes, params, rules.PARTS)
  x = jax.device_put(np.ones((8, 7), np.float32), batch_sharding(mesh))
  program = jax.jit(gradient, out_shardings=parts).lower(params, x).compile()
  loops = [line for line in program.as_text().splitlines() if " while(" in line]
  assert len(loops) == 2  # there, and back with gradients in parts
  assert any(f"f32[{DEPTH},{DIM // 4},24]" in line for line in loops)


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_no_stack_is_ever_whole(model, remat):
  mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
  x = np.ones((8, 7), np.float32)
  graphdef, _ = layers.split(model)
  program, _ = compiled(model, loss_of(graphdef, remat), mesh, x)
  shapes = gathered_shapes(program)
  assert (DIM, 24) in [shape[-2:] for shape in shapes]
  for shape in shapes:
    assert np.prod(shape) <= 24 * DIM, shapes
  # The gradient of a stack comes out in parts, too.
  whole = re.findall(rf"f32\[{DEPTH},{DIM},24\]", program.as_text())
  assert not whole
