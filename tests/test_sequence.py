"""What is sent to lanes, and tokens divided over devices, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax.benchmarks.cases import CASES, inputs
from digen_jax.models import create_model, layers
from digen_jax.parallel.mesh import (
  batch_sharding,
  make_mesh,
  on_mesh,
  replicated,
)
from tests.references import normal

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_computes_the_same_bits(name):
  case = CASES[name]
  config = case.config(tiny=True, dtype=jnp.dtype("bfloat16"))
  model = create_model(config, jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.1 * normal(1, *x.shape), model.params)
  sent = jax.jit(lambda x: layers.as_read(x, model.read_dtypes))(params)
  args = inputs(case, config, case.workload(0, tiny=True), batch=2)
  apply = jax.jit(model.apply)
  np.testing.assert_array_equal(apply(params, *args), apply(sent, *args))
  kernels = {
    path[-2].key: leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(sent)
    if path[-1].key == "kernel"
  }
  # Embeddings of times and vectors stay in float32, and nothing else.
  wide = {n for n, dtype in kernels.items() if dtype == jnp.float32}
  assert wide < {"linear_1", "linear_2", "linear", "proj_in", "proj_out"}
  assert sum(x.nbytes for x in jax.tree.leaves(sent)) < 0.8 * sum(
    x.nbytes for x in jax.tree.leaves(params)
  )


@pytest.mark.parametrize("name", CASES)
def test_divided_tokens_give_the_same_velocity(name):
  case = CASES[name]
  config = case.config(tiny=True)
  model = create_model(config, jax.random.key(0))
  # Fresh models have zero modulations, with which blocks do nothing.
  params = jax.tree.map(lambda x: x + 0.1 * normal(1, *x.shape), model.params)
  work = case.workload(0, tiny=True)
  args = inputs(case, config, work, batch=2)
  expected = jax.jit(model.apply)(params, *args)
  mesh = make_mesh({"data": 2, "sequence": 4}, jax.devices())
  placed = jax.device_put(args, batch_sharding(mesh))
  params = jax.device_put(params, replicated(mesh))
  program = jax.jit(on_mesh(model.apply, mesh)).lower(params, *placed)
  program = program.compile()
  np.testing.assert_allclose(
    program(params, *placed), expected, atol=2e-5, rtol=1e-5
  )
  # Between blocks a device has a quarter of a sample's tokens.
  tokens = int(np.prod(work.latents[:-1])) // 4
  width = config.num_attention_heads * config.attention_head_dim
  text = program.as_text()
  assert f"f32[1,{tokens // 4},{width}]" in text
