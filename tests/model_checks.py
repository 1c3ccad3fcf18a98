"""What holds of every family's transformer, checked the same way."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from digen_jax import models
from digen_jax.parallel import mesh as mesh_lib
from digen_jax.parallel import rules
from digen_jax.weights import export, load
from tests.references import random_model


def check_bfloat16(config, inputs, idle="nothing"):
  """In bfloat16 the rollout and the gradient compute the same bits.

  Args:
    config: of a tiny model, float32.
    inputs: latents, sigma, conditioning.
    idle: pattern of paths that must have no gradient; all others must.
  """
  model = random_model(base=config)
  full = jax.jit(model.apply)(model.params, *inputs)
  half = random_model(base=config, dtype="bfloat16").apply
  plain = jax.jit(half)(model.params, *inputs)
  assert plain.dtype == jnp.float32
  error = np.linalg.norm(plain - full) / np.linalg.norm(full)
  assert 1e-4 < error < 0.02

  apply = random_model(base=config, dtype="bfloat16", remat="block").apply

  def loss(params):
    velocity = apply(params, *inputs)
    return jnp.mean(velocity**2), velocity

  gradient, velocity = jax.jit(jax.grad(loss, has_aux=True))(model.params)
  np.testing.assert_array_equal(velocity, plain)
  for path, leaf in jax.tree.leaves_with_path(gradient):
    assert leaf.dtype == jnp.float32
    name = ".".join(key.key for key in path)
    assert bool(jnp.all(leaf == 0)) == bool(re.search(idle, name)), name


def check_layout(config, inputs):
  """Parameters split both ways over four devices change nothing."""
  model = random_model(base=config)
  plain = jax.jit(model.apply)(model.params, *inputs)
  mesh = mesh_lib.make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4])
  layout = rules.param_shardings(
    mesh, model.logical_axes, model.params, rules.TRAINER
  )
  params = jax.device_put(model.params, layout)
  whole = jax.device_put(inputs, mesh_lib.replicated(mesh))
  actual = jax.jit(model.apply)(params, *whole)
  np.testing.assert_allclose(actual, plain, atol=2e-5)


def check_fresh(config):
  """A fresh model predicts zero; every parameter names its axes."""
  model = models.create_model(config, jax.random.key(0))
  for leaf in jax.tree.leaves(model.params["proj_out"]):
    np.testing.assert_array_equal(leaf, 0)

  def check(path, leaf, axes):
    assert len(axes) == leaf.ndim
    assert (axes[0] == "layers") == ("block" in path[0].key)

  jax.tree.map_with_path(check, model.params, model.logical_axes)


def check_round_trip(reference, directory):
  """Diffusers reads back, bit by bit, what we write."""
  reference.save_pretrained(directory / "in")
  model = load.load_model(directory / "in")
  raw = model.family.config_dict(model.config)
  export.save_module(directory / "out", model.params, raw)
  again, problems = type(reference).from_pretrained(
    directory / "out", output_loading_info=True
  )
  assert not any(problems.values()), problems
  expected, actual = reference.state_dict(), again.state_dict()
  assert actual.keys() == expected.keys()
  for name, tensor in actual.items():
    np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
  for key in model.family.config_dict(model.config):
    if not key.startswith("_"):
      assert list_or_value(again.config[key]) == list_or_value(
        reference.config[key]
      )
  return again.eval().requires_grad_(False)


def list_or_value(value):
  return list(value) if isinstance(value, tuple) else value
