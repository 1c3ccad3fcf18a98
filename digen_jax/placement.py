"""Where the arrays of a run live, and the compiled functions beside them.

One lane (colocated) or two (disaggregated): the rollout lane holds the
trainable parameters of the published version, the trainer lane the training
state. Both layouts come from the same logical axes.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from digen_jax import policy
from digen_jax.parallel import rules
from digen_jax.parallel.mesh import batch_sharding, replicated
from digen_jax.parallel.reshard import own, reshard, verify
from digen_jax.types import Conditioning, TrainBatch


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a run starts from, on the host or any device.

  Attributes:
    trainable: nested dict of parameters to train, float32.
    frozen: the others.
    decoder: autoencoder parameters.
    axes: logical axes of trainable and frozen together.
  """

  trainable: Any
  frozen: Any
  decoder: Any
  axes: Any


@dataclasses.dataclass(frozen=True)
class Call:
  """A compiled function and its arguments, on the devices of its lane."""

  name: str
  args: tuple


class Placement:
  """Arrays by lane, and the functions of `policy.py` compiled for them."""

  def __init__(
    self,
    recipe: policy.Recipe,
    optimizer: optax.GradientTransformation,
    meshes: dict[str, Mesh],
    weights: Weights,
  ):
    self.recipe, self.meshes = recipe, meshes
    lanes = list(meshes)
    self.rollout_lane, self.trainer_lane = lanes[0], lanes[-1]
    rollout, trainer = meshes[self.rollout_lane], meshes[self.trainer_lane]

    self._axes = weights.axes
    self._rollout_layout = self._layout(
      rollout, weights.trainable, rules.ROLLOUT
    )
    self._trainer_layout = self._layout(
      trainer, weights.trainable, rules.TRAINER
    )
    # Once per layout, also where both roles share a mesh.
    self.frozen_rollout = reshard(
      weights.frozen, self._layout(rollout, weights.frozen, rules.ROLLOUT)
    )
    self.frozen_trainer = reshard(
      weights.frozen, self._layout(trainer, weights.frozen, rules.TRAINER)
    )
    self.decoder = jax.device_put(weights.decoder, replicated(rollout))
    trainable = own(reshard(weights.trainable, self._trainer_layout))
    self.reference = (
      reshard(weights.trainable, self._trainer_layout)
      if recipe.kl_weight
      else None
    )
    self.state = {
      "trainable": trainable,
      "optimizer": self._init_optimizer(optimizer, trainable, trainer),
      "ema": own(trainable) if recipe.ema_decay else None,
    }
    self.published = reshard(trainable, self._rollout_layout)
    self._functions = self._define(optimizer)
    self._compiled: dict[str, Callable] = {}

  def _init_optimizer(
    self, optimizer: optax.GradientTransformation, params: Any, mesh: Mesh
  ) -> Any:
    """Optimiser state laid out like the parameters it belongs to."""
    shapes = jax.eval_shape(optimizer.init, params)
    layout = optax.tree.map_params(
      optimizer,
      lambda _, sharding: sharding,
      shapes,
      self._trainer_layout,
      transform_non_params=lambda _: replicated(mesh),
    )
    return jax.jit(optimizer.init, out_shardings=layout)(params)

  def _layout(self, mesh: Mesh, tree: Any, table: rules.Rules) -> Any:
    """Shardings of any part of the parameters."""
    axes = _like(tree, self._axes)
    return rules.param_shardings(mesh, axes, tree, table)

  def _define(
    self, optimizer: optax.GradientTransformation
  ) -> dict[str, Callable]:
    rollout = self.meshes[self.rollout_lane]
    trainer = self.meshes[self.trainer_lane]
    recipe = self.recipe

    def gather(tree: Any) -> Any:
      layout = self._layout(trainer, tree, rules.ROLLOUT)
      return jax.lax.with_sharding_constraint(tree, layout)

    return {
      "generate": jax.jit(
        functools.partial(policy.generate, recipe),
        out_shardings=batch_sharding(rollout),
      ),
      "gradients": jax.jit(
        functools.partial(policy.gradients, recipe, gather),
        out_shardings=(self._trainer_layout, replicated(trainer)),
      ),
      "add": jax.jit(
        functools.partial(jax.tree.map, jnp.add),
        out_shardings=self._trainer_layout,
        donate_argnums=(0,),
      ),
      "update": jax.jit(
        functools.partial(policy.update, recipe, optimizer),
        out_shardings=(
          jax.tree.map(lambda x: x.sharding, self.state),
          replicated(trainer),
        ),
        donate_argnums=(0,),
      ),
    }

  def generate(
    self,
    prompts: Conditioning,
    negative: Conditioning | None,
    rows: np.ndarray,
    start: np.ndarray,
    numbers: tuple[np.ndarray, ...],
  ) -> Call:
    """`policy.generate` with the published version; host arrays in."""
    lane = self.rollout_lane
    args = (
      self.published,
      self.frozen_rollout,
      self.decoder,
      *self._put(lane, prompts, negative),
      *self._put_rows(lane, rows, start),
      (*self._put(lane, *numbers[:2]), *self._put_rows(lane, *numbers[2:])),
    )
    return Call("generate", args)

  def gradients(
    self,
    batch: TrainBatch,
    rows: np.ndarray,
    prompts: Conditioning,
    negative: Conditioning | None,
  ) -> Call:
    """`policy.gradients` on the trainer lane; host arrays in."""
    args = (
      self.state["trainable"],
      self.frozen_trainer,
      self.reference,
      *self._put_rows(self.trainer_lane, batch, rows),
      *self._put(self.trainer_lane, prompts, negative),
    )
    return Call("gradients", args)

  def add(self, total: Any, gradient: Any) -> Any:
    """Sum of two gradients; `total` is None at the start, and is consumed."""
    if total is None:
      return gradient
    return self.run(Call("add", (total, gradient)))

  def update(self, gradient: Any) -> dict[str, jax.Array]:
    """`policy.update` in place; no gradient at all counts as zero."""
    if gradient is None:
      gradient = jax.tree.map(jnp.zeros_like, self.state["trainable"])
    self.state, metrics = self.run(Call("update", (self.state, gradient)))
    return metrics

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on from a checkpoint's state, laid out like `self.state`."""
    self.state = own(state)
    self.publish()

  def publish(self) -> int:
    """Makes the trained parameters the rollout's, checked bit by bit.

    Returns:
      Bytes copied.

    Raises:
      RuntimeError: what arrived is not what was sent; the previous version
        stays in use.
    """
    received = reshard(self.state["trainable"], self._rollout_layout)
    verify(self.state["trainable"], received)
    self.published = received
    return sum(leaf.nbytes for leaf in jax.tree.leaves(received))

  def evaluated(self) -> Any:
    """What evaluation samples with: the average if there is one."""
    tree = self.state["ema"] if self.recipe.ema_decay else None
    return reshard(tree or self.state["trainable"], self._rollout_layout)

  def run(self, call: Call) -> Any:
    """Dispatches a call; compiles first if that was not done before."""
    if call.name not in self._compiled:
      self._compile(call)
    return self._compiled[call.name](*call.args)

  def compile(self, generate: Call, gradients: Call) -> None:
    """Compiles every function, both lanes in parallel; executes nothing.

    Args:
      generate: a call with the shapes that all later ones have.
      gradients: likewise.
    """
    params = self.state["trainable"]
    trainer = (
      gradients,
      Call("add", (params, params)),
      Call("update", (self.state, params)),
    )
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      work = [
        pool.submit(lambda calls: [self._compile(c) for c in calls], calls)
        for calls in ((generate,), trainer)
      ]
      for future in work:
        future.result()

  def _compile(self, call: Call) -> None:
    function = self._functions[call.name]
    self._compiled[call.name] = function.lower(*call.args).compile()

  def _put(self, lane: str, *trees: Any) -> Any:
    """On every device of the lane."""
    return jax.device_put(trees, replicated(self.meshes[lane]))

  def _put_rows(self, lane: str, *trees: Any) -> Any:
    """Split over the batch axes of the lane."""
    return jax.device_put(trees, batch_sharding(self.meshes[lane]))


def _like(tree: Any, whole: Any) -> Any:
  """The part of nested dict `whole` that has the keys of `tree`."""
  if not isinstance(tree, Mapping):
    return whole
  return {key: _like(value, whole[key]) for key, value in tree.items()}
