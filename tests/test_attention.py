"""One attention, several ways to compute it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from digen_jax.models import attention as attention_lib
from digen_jax.models.attention import (
  DIRECT_SCORES,
  attention,
  choose,
  cudnn,
  direct,
  row_blocks,
  splash_attention,
)
from digen_jax.parallel.mesh import BATCH_AXES, make_mesh, on_mesh
from tests.references import normal


def inputs(rows=37, keys=29, heads=3, head_dim=8, batch=2):
  query = normal(0, batch, rows, heads, head_dim)
  key, value = normal(1, 2, batch, keys, heads, head_dim)
  # In the middle too: a mask need not leave a prefix.
  mask = np.random.default_rng(2).uniform(size=(batch, keys)) < 0.6
  return query, key, value, mask


def value_and_gradients(function, query, key, value, mask, dtype=jnp.float32):
  def loss(*args):
    out = function(*args, mask)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.sum(out.astype(jnp.float32) * weights.reshape(out.shape)), out

  args = (jnp.asarray(x, dtype) for x in (query, key, value))
  run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
  gradients, out = run(*args)
  return [out, *gradients]


OTHERS = {
  "row_blocks": functools.partial(row_blocks, rows=16),
  "one_row_block": functools.partial(row_blocks, rows=64),
  "cudnn": functools.partial(cudnn, implementation="xla"),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_every_method_is_direct_attention(name, masked):
  query, key, value, mask = inputs()
  mask = mask if masked else None
  expected = value_and_gradients(direct, query, key, value, mask)
  actual = value_and_gradients(OTHERS[name], query, key, value, mask)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("head_dim", [128, 64])
def test_splash_is_direct_attention(head_dim):
  query, key, value, mask = inputs(130, 140, heads=2, head_dim=head_dim)
  expected = value_and_gradients(direct, query, key, value, mask)
  interpreted = functools.partial(splash_attention, size=128, interpret=True)
  actual = value_and_gradients(interpreted, query, key, value, mask)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_row_blocks_in_bfloat16_round_like_direct():
  query, key, value, mask = inputs()
  args = (query, key, value, mask, jnp.bfloat16)
  expected = value_and_gradients(direct, *args)
  actual = value_and_gradients(OTHERS["row_blocks"], *args)
  for a, b in zip(actual, expected):
    assert a.dtype == jnp.bfloat16
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5)
    assert np.mean(a != b) < 0.02  # a rounding that fell the other way


def test_long_sequences_are_never_all_scores():
  size = 2100
  assert size**2 > DIRECT_SCORES
  query, key, value, mask = inputs(size, size, heads=1, batch=1)
  expected = jax.jit(direct)(query, key, value, mask)
  actual = jax.jit(attention)(query, key, value, mask)
  np.testing.assert_allclose(actual, expected, atol=2e-6)

  def memory(function, size):
    def loss(*args):
      return jnp.sum(function(*args) ** 2)

    shape = jax.ShapeDtypeStruct((1, size, 1, 8), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  size = 32760  # Wan at 480 x 832, 81 frames
  assert memory(attention, size) < 12 * 4 * DIRECT_SCORES
  assert memory(direct, size) > 4 * size**2


@pytest.mark.parametrize("method", [direct, *OTHERS.values()])
def test_a_row_without_keys_is_finite(method):
  query, key, value, mask = inputs()
  mask[1] = False
  for x in value_and_gradients(method, query, key, value, mask):
    assert bool(jnp.isfinite(x).all())


def test_row_blocks_split_over_a_mesh():
  query, key, value, mask = inputs(heads=4)
  expected = value_and_gradients(direct, query, key, value, mask)
  mesh = make_mesh(dict(data=2, tensor=2), jax.devices()[:4])
  heads = NamedSharding(mesh, P("data", None, "tensor"))
  args = [jax.device_put(x, heads) for x in (query, key, value)]
  mask = jax.device_put(mask, NamedSharding(mesh, P("data")))
  actual = value_and_gradients(OTHERS["row_blocks"], *args, mask)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, atol=3e-6)
  run = jax.jit(OTHERS["row_blocks"])
  assert "all-gather" not in run.lower(*args, mask).compile().as_text()


def test_a_fused_kernel_runs_on_every_device(monkeypatch):
  interpreted = functools.partial(splash_attention, size=128, interpret=True)
  monkeypatch.setitem(attention_lib.METHODS, "splash", interpreted)
  monkeypatch.setattr(attention_lib, "DIRECT_SCORES", 0)
  query, key, value, mask = inputs(130, 140, heads=4, head_dim=64, batch=4)
  expected = value_and_gradients(direct, query, key, value, mask)
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices())
  monkeypatch.setattr(
    attention_lib,
    "_device_kind",
    lambda shape: "tpu" if attention_lib._divides(shape) else "other",
  )
  monkeypatch.setattr(attention_lib, "choose", choose_in_float32)
  chosen.clear()
  heads = NamedSharding(mesh, P(BATCH_AXES, None, "tensor"))
  args = [jax.device_put(x, heads) for x in (query, key, value)]
  mask = jax.device_put(mask, NamedSharding(mesh, P(BATCH_AXES)))
  function = on_mesh(attention, mesh)
  actual = value_and_gradients(function, *args, mask)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, atol=5e-6)
  program = jax.jit(function).lower(*args, mask).compile().as_text()
  assert "all-gather" not in program and "all-to-all" not in program
  assert set(chosen) == {"splash"}
  # Neither three samples nor a program that nothing is said about.
  function(query[:3], key[:3], value[:3])
  attention(query, key, value)
  assert chosen[-2:] == ["row_blocks"] * 2


@pytest.mark.parametrize("rows", [37, 40])
@pytest.mark.parametrize("method", ["direct", "row_blocks"])
def test_rows_of_a_sample_are_divided(method, rows, monkeypatch):
  monkeypatch.setattr(attention_lib, "choose", lambda *_: method)
  query, key, value, mask = inputs(rows=rows, heads=4)
  expected = value_and_gradients(direct, query, key, value, mask)
  mesh = make_mesh(dict(data=2, sequence=2, tensor=2), jax.devices())
  heads = NamedSharding(mesh, P("data", None, "tensor"))
  args = [jax.device_put(x, heads) for x in (query, key, value)]
  mask = jax.device_put(mask, NamedSharding(mesh, P("data")))
  function = on_mesh(attention, mesh)
  actual = value_and_gradients(function, *args, mask)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, atol=3e-6)
  half = -(-rows // 2)
  program = jax.jit(function).lower(*args, mask).compile().as_text()
  assert f"f32[1,{half},2,8]" in program  # a sample, rows, heads, head


chosen = []


def choose_in_float32(shape, keys, dtype, device):
  chosen.append(choose(shape, keys, jnp.bfloat16, device))
  return chosen[-1]


@pytest.mark.parametrize(
  ("shape", "keys", "dtype", "device", "method"),
  [
    ((1, 1024, 24, 128), 1536, "float32", "other", "direct"),
    ((4, 2048, 24, 128), 2048, "bfloat16", "other", "direct"),
    ((1, 32760, 12, 128), 32760, "float32", "other", "row_blocks"),
    ((1, 32760, 12, 128), 512, "bfloat16", "other", "row_blocks"),
    ((1, 32760, 12, 128), 32760, "bfloat16", "gpu", "cudnn"),
    ((1, 256, 24, 64), 256, "bfloat16", "gpu", "cudnn"),
    ((1, 256, 2, 20), 256, "bfloat16", "gpu", "direct"),
    ((1, 32760, 12, 128), 32760, "float32", "gpu", "row_blocks"),
    ((1, 16384, 1, 512), 16384, "bfloat16", "gpu", "row_blocks"),
    ((1, 32760, 12, 128), 32760, "bfloat16", "tpu", "splash"),
    ((1, 4429, 24, 64), 4429, "bfloat16", "tpu", "splash"),
    ((1, 4429, 24, 64), 4429, "float32", "tpu", "row_blocks"),
    ((1, 256, 24, 128), 256, "bfloat16", "tpu", "direct"),
  ],
)
def test_choice(shape, keys, dtype, device, method):
  assert choose(shape, keys, dtype, device) == method
  assert method in attention_lib.METHODS
