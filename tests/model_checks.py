"""What holds of every family's transformer, checked the same way."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from digen_jax import models
from digen_jax.models import attention as attention_lib
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import make_mesh, replicated
from digen_jax.weights import export, load
from tests.references import jit, random_model


def channels_first(x):
  return np.moveaxis(np.array(x), -1, 1)


def channels_last(x):
  return np.moveaxis(np.asarray(x), 1, -1)


def run_module(model, *args):
  """The module itself, on arrays as its `__call__` takes them."""

  def run(params, args):
    return nnx.merge(model.graphdef, params)(*args)

  output = jit(run)(model.params, args)
  assert output.dtype == jnp.float32
  return output


def check_bfloat16(config, inputs, idle="nothing"):
  """In bfloat16 the rollout and the gradient compute the same bits.

  Args:
    config: of a tiny model, float32.
    inputs: latents, sigma, conditioning.
    idle: pattern of paths that must have no gradient; all others must.
  """
  model = random_model(base=config)
  full = jit(model.apply)(model.params, *inputs)
  half = random_model(base=config, dtype="bfloat16").apply
  plain = jax.jit(half)(model.params, *inputs)
  assert full.dtype == plain.dtype == jnp.float32
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


def check_layouts(config, inputs):
  """Both layouts on four devices give what one device gives."""
  model = random_model(base=config)
  plain = jit(model.apply)(model.params, *inputs)
  for sizes, table in (
    (dict(fsdp=2, tensor=2), rules.TRAINER),
    (dict(tensor=2, data=2), rules.ROLLOUT),
  ):
    mesh = make_mesh(sizes, jax.devices()[:4])
    layout = rules.param_shardings(
      mesh, model.logical_axes, model.params, table
    )
    params = jax.device_put(model.params, layout)
    whole = jax.device_put(inputs, replicated(mesh))
    actual = jit(model.apply)(params, *whole)
    np.testing.assert_allclose(actual, plain, atol=2e-5)


def check_fresh(config, inputs):
  """A fresh model predicts zero; every parameter names its axes."""
  model = models.create_model(config, jax.random.key(0))
  output = jit(model.apply)(model.params, *inputs)
  np.testing.assert_array_equal(output, 0)

  def check(path, leaf, axes):
    assert len(axes) == leaf.ndim
    stacked = any(re.search("block", key.key) for key in path)
    assert (axes[0] == "layers") == stacked

  jax.tree.map_with_path(check, model.params, model.logical_axes)


def check_round_trip(reference, directory):
  """Diffusers reads back, bit by bit, what we write.

  Returns:
    What it read.
  """
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
  for key, value in reference.config.items():
    if not key.startswith("_"):
      assert listed(again.config[key]) == listed(value), key
  return again.eval().requires_grad_(False)


def listed(value):
  return list(value) if isinstance(value, tuple) else value


def check_row_blocks(config, inputs, monkeypatch):
  """Attention by rows does not change the velocity."""
  model = random_model(base=config)
  expected = jit(model.apply)(model.params, *inputs)
  monkeypatch.setattr(attention_lib, "DIRECT_SCORES", 1)
  monkeypatch.setattr(attention_lib, "BLOCK", 8)
  # A function of its own: `jit` would find the trace of `model.apply`.
  actual = jit(lambda *args: model.apply(*args))(model.params, *inputs)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def check_video_size(model, inputs, tokens):
  """Neither forward nor gradient of a full-size model holds all scores."""

  def loss(params):
    return jnp.sum(model.apply(params, *inputs))

  scores = model.config.num_attention_heads * tokens**2
  # With blocks recomputed, the largest are the stream of all layers and
  # hidden units of one.
  stream = tokens * model.config.dim * 50
  assert stream < scores / 4
  assert largest_array(jax.grad(loss), model.params) < stream


def largest_array(function, *args):
  """Elements of the largest array anywhere in a traced function."""

  def visit(jaxpr):
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
      leaves = jax.tree.leaves(
        eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
      )
      for leaf in leaves:
        if isinstance(leaf, ClosedJaxpr):
          leaf = leaf.jaxpr
        if isinstance(leaf, Jaxpr):
          sizes.append(visit(leaf))
    return max(sizes, default=0)

  return visit(jax.make_jaxpr(function)(*args).jaxpr)
