"""Tokens of a sample divided over devices, for every family."""

import jax
import numpy as np
import pytest

from digen_jax.benchmarks.cases import CASES, inputs
from digen_jax.models import create_model
from digen_jax.parallel.mesh import (
  batch_sharding,
  make_mesh,
  on_mesh,
  replicated,
)
from tests.references import normal

pytestmark = pytest.mark.usefixtures("compiled_quickly")


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
