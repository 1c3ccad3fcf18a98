"""What holds of every video transformer, checked the same way."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh

from digen_jax import models
from digen_jax.models import attention as attention_lib
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import AXES, make_mesh, replicated
from digen_jax.weights import export, load, names
from tests import references


def randomise(module, seed):
  """As `references.randomise`, with modulation tables that matter."""
  references.randomise(module, seed)
  generator = torch.Generator().manual_seed(seed + 1)
  for name, parameter in module.named_parameters():
    if name.endswith("scale_shift_table"):
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.data = 0.4 * noise
  return module


def random_model(config, seed=0, **overrides):
  """A model with every parameter random; a fresh one outputs zero."""
  config = dataclasses.replace(config, **overrides)
  (family,) = (
    f for f in models.FAMILIES.values() if isinstance(config, f.config)
  )
  model = models.abstract_model(family, config)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    kind = path[-1].key
    stacked = any("blocks" in key.key for key in path)
    fan_in = math.prod(leaf.shape[stacked:-1]) if kind == "kernel" else 16
    noise = rng.normal(size=leaf.shape) / fan_in**0.5
    return jnp.asarray(noise + (kind == "scale"), jnp.float32)

  params = jax.tree.map_with_path(draw, model.params)
  return dataclasses.replace(model, params=params)


def channels_first(x):
  return np.moveaxis(np.array(x), -1, 1)


def channels_last(x):
  return np.moveaxis(np.asarray(x), 1, -1)


def run_module(model, *args):
  """The module itself, on arrays as its `__call__` takes them."""

  @jax.jit
  def run(params, args):
    return nnx.merge(model.graphdef, params)(*args)

  output = run(model.params, args)
  assert output.dtype == jnp.float32
  return output


def check_same_bits(config, inputs):
  """The forward of a gradient, recomputed or not, is the plain one."""
  model = random_model(config)
  plain = jax.jit(model.apply)(model.params, *inputs)
  apply = random_model(config, remat="block").apply

  def loss(params):
    velocity = apply(params, *inputs)
    return jnp.mean(velocity**2), velocity

  gradient, velocity = jax.jit(jax.grad(loss, has_aux=True))(model.params)
  np.testing.assert_array_equal(velocity, plain)
  for path, leaf in jax.tree.leaves_with_path(gradient):
    assert leaf.dtype == jnp.float32
    assert bool(jnp.any(leaf != 0)), f"{path} has no influence"


def check_bfloat16(config, inputs):
  """Computing in bfloat16 changes the velocity by the precision it has."""
  outputs = []
  for dtype in ("float32", "bfloat16"):
    model = random_model(config, dtype=dtype)
    output = jax.jit(model.apply)(model.params, *inputs)
    assert output.dtype == jnp.float32
    outputs.append(np.asarray(output))
  error = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
  assert 1e-4 < error < 0.02


def check_row_blocks(config, inputs, monkeypatch):
  """Attention by rows does not change the velocity."""
  model = random_model(config)
  expected = jax.jit(model.apply)(model.params, *inputs)
  monkeypatch.setattr(attention_lib, "DIRECT_SCORES", 1)
  monkeypatch.setattr(attention_lib, "BLOCK", 8)
  # A function of its own: `jit` would find the trace of `model.apply`.
  actual = jax.jit(lambda *args: model.apply(*args))(model.params, *inputs)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def check_layouts(config, inputs):
  """Both layouts on four devices give what one device gives."""
  model = random_model(config)
  plain = jax.jit(model.apply)(model.params, *inputs)
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
    actual = jax.jit(model.apply)(params, *whole)
    np.testing.assert_allclose(actual, plain, atol=2e-5)


def check_fresh(config, inputs):
  """A fresh model predicts zero; every parameter names its axes."""
  model = models.create_model(config, jax.random.key(0))
  output = jax.jit(model.apply)(model.params, *inputs)
  np.testing.assert_array_equal(output, 0)

  def check(path, leaf, axes):
    assert len(axes) == leaf.ndim
    stacked = any("blocks" in key.key for key in path)
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
      assert _listed(again.config[key]) == _listed(value), key
  return again.eval().requires_grad_(False)


def check_full_size(cls, overrides, count):
  """Names, shapes and number of parameters are those of diffusers' class.

  Returns:
    Our abstract model.
  """
  with torch.device("meta"):
    reference = cls(**overrides)
  family = models.find_family(cls.__name__)
  model = models.abstract_model(family, family.parse_config(reference.config))
  expected = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
  actual = {
    name: entry.tensor_shape
    for entry in names.entries(model.params, names.NAME_MAPS[cls.__name__])
    for name in entry.names
  }
  assert actual == expected
  assert sum(math.prod(shape) for shape in actual.values()) == count
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(model.params)) == count
  return model


def check_full_size_layouts(model, tensors):
  """Both layouts are legal, and split what they should.

  Args:
    model: abstract.
    tensors: devices -> the largest tensor axis.
  """
  heads = model.config.num_attention_heads
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(model.params))

  def shard_sizes(mesh, table):
    rules.check_heads(mesh.shape, heads, "the model")
    layout = rules.param_shardings(
      mesh, model.logical_axes, model.params, table
    )
    return jax.tree.map(
      lambda x, sharding: math.prod(sharding.shard_shape(x.shape)),
      model.params,
      layout,
    )

  for devices, tensor in tensors.items():
    sizes = shard_sizes(
      AbstractMesh((devices // tensor, 1, tensor), AXES), rules.ROLLOUT
    )

    def check(leaf, size, axes, tensor=tensor):
      if "heads" in axes or "mlp" in axes:
        assert size * tensor == math.prod(leaf.shape)

    jax.tree.map(check, model.params, sizes, model.logical_axes)
    sizes = shard_sizes(AbstractMesh((1, devices, 1), AXES), rules.TRAINER)
    assert sum(jax.tree.leaves(sizes)) < 1.01 * total / devices


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


def _listed(value):
  return list(value) if isinstance(value, tuple) else value
