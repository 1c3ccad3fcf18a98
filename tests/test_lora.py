"""Low-rank adapters on stacked blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax.errors import UserError
from digen_jax.grpo.train_step import join
from digen_jax.models import lora
from tests.references import arguments, random_model

TARGETS = (r"blocks\.attn\.", "x_embedder")
ALPHA = 6.0


def adapted(base, **overrides):
  options = dict(rank=2, alpha=ALPHA, targets=TARGETS, key=jax.random.key(1))
  return lora.adapt(base, **options | overrides)


def perturb(params):
  """Nonzero adapters, as after training."""
  return jax.tree.map_with_path(
    lambda path, x: (
      jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype)
      * 0.2
      if path[-1].key == "lora_b"
      else x
    ),
    params,
  )


def test_adapters_are_where_the_targets_say():
  model = adapted(random_model())
  attn = model.params["double_blocks"]["attn"]
  assert attn["to_q"]["lora_a"].shape == (2, 48, 2)
  assert attn["to_q"]["lora_b"].shape == (2, 2, 48)
  assert model.params["x_embedder"]["lora_a"].shape == (16, 2)
  assert "lora_a" not in model.params["double_blocks"]["ff"]["linear_1"]
  axes = model.logical_axes["double_blocks"]["attn"]["to_q"]
  assert axes["lora_a"] == ("layers", "embed", "rank")
  assert axes["lora_b"] == ("layers", "rank", "heads")
  a = attn["to_q"]["lora_a"]
  np.testing.assert_allclose(a.std(), 48**-0.5, rtol=0.25)
  assert float(jnp.abs(a[0] - a[1]).max()) > 0.05


def test_zero_at_first_then_the_merged_weights():
  base = random_model()
  model = adapted(base)
  plain = jax.jit(base.apply)(base.params, *arguments())
  apply = jax.jit(model.apply)
  fresh = apply(model.params, *arguments())
  np.testing.assert_array_equal(fresh, plain)

  params = perturb(model.params)
  trained = apply(params, *arguments())
  assert float(jnp.abs(trained - plain).max()) > 0.05
  merged = lora.merge_lora(params, ALPHA)
  assert jax.tree.structure(merged) == jax.tree.structure(base.params)
  actual = jax.jit(base.apply)(merged, *arguments())
  np.testing.assert_allclose(actual, trained, atol=2e-5)
  layer = params["double_blocks"]["attn"]["to_q"]
  expected = layer["kernel"] + ALPHA / 2 * layer["lora_a"] @ layer["lora_b"]
  actual = merged["double_blocks"]["attn"]["to_q"]["kernel"]
  np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_only_adapters_are_trained():
  model = adapted(random_model())
  trainable, frozen = lora.split_trainable(model.params, "lora")
  names = {path[-1].key for path, _ in jax.tree.leaves_with_path(trainable)}
  assert names == {"lora_a", "lora_b"}
  joined = join(trainable, frozen)
  assert jax.tree.structure(joined) == jax.tree.structure(model.params)
  jax.tree.map(np.testing.assert_array_equal, joined, model.params)

  def loss(trainable):
    return jnp.sum(model.apply(join(trainable, frozen), *arguments()) ** 2)

  gradient = jax.jit(jax.grad(loss))(trainable)
  largest = {
    kind: [
      float(jnp.abs(leaf).max())
      for path, leaf in jax.tree.leaves_with_path(gradient)
      if path[-1].key == kind
    ]
    for kind in ("lora_a", "lora_b")
  }
  assert max(largest["lora_a"]) == 0  # B is zero
  assert min(largest["lora_b"]) > 0

  whole, nothing = lora.split_trainable(model.params, "full")
  assert jax.tree.structure(whole) == jax.tree.structure(model.params)
  assert nothing == {}


def test_shapes_without_arrays():
  base = random_model()
  model = adapted(base)

  def params(key):
    return adapted(base, key=key).params

  abstract = jax.eval_shape(params, jax.random.key(0))
  assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(
    jnp.shape, model.params
  )
  shapes = dataclasses.replace(
    base,
    params=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base.params
    ),
  )
  assert adapted(shapes).logical_axes == model.logical_axes


def test_bad_options_are_named():
  base = random_model()
  with pytest.raises(UserError, match=r"'to_z'.*double_blocks.attn.to_q"):
    adapted(base, targets=("to_q", "to_z"))
  with pytest.raises(UserError, match="rank is 0"):
    adapted(base, rank=0)
  with pytest.raises(UserError, match="no LoRA adapters"):
    lora.split_trainable(base.params, "lora")
  with pytest.raises(UserError, match="'lro'"):
    lora.split_trainable(base.params, "lro")
