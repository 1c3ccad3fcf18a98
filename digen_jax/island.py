"""The arrays of one lane, and the functions of `policy.py` on its mesh.

A lane that generates holds the published version of the trained parameters;
the one that trains holds the training state. With TAG and RAT each can do the
other's work too. Both layouts come from the same logical axes.

Host arrays in; what comes out is on the devices of the lane and may still be
under way.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from digen_jax import policy
from digen_jax.checkpoint import Checkpoints
from digen_jax.models import layers
from digen_jax.parallel import rules
from digen_jax.parallel.allocator import keep_freed_memory
from digen_jax.parallel.gather import reading
from digen_jax.parallel.mesh import batch_sharding, replicated
from digen_jax.parallel.reshard import check, checksums, own, reshard
from digen_jax.pipeline.scheduler import Lane
from digen_jax.pipeline.units import Kind
from digen_jax.sampler import Sampler
from digen_jax.types import Conditioning, TrainBatch

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a run starts from, on the host or any device.

  Attributes:
    trainable: nested dict of parameters to train, float32.
    frozen: the others.
    decoder: autoencoder parameters.
    axes: logical axes of trainable and frozen together.
    dtypes: what they are rounded to when they are read, see
      `layers.read_dtypes`.
  """

  trainable: Any
  frozen: Any
  decoder: Any
  axes: Any
  dtypes: Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("params", "sums"),
  meta_fields=("version",),
)
@dataclasses.dataclass(frozen=True)
class Parcel:
  """Weights on their way to another lane.

  Attributes:
    version: policy version; of borrowed weights the update they are for.
    params: trainable parameters, as layers read them.
    sums: their checksums, by leaf.
  """

  version: int
  params: Any
  sums: Any


def _verified(parcel: Parcel, received: Any, sums: Any) -> Any:
  """What arrived; RuntimeError unless it is what was sent, bit by bit."""
  check(parcel.sums, sums)
  return received


class Island:
  """One lane's mesh and everything on it."""

  def __init__(
    self,
    lane: Lane,
    mesh: Mesh,
    recipe: policy.Recipe,
    weights: Weights,
    optimizer: optax.GradientTransformation,
  ):
    """Places the weights; compiles nothing.

    Args:
      lane: what it does, by itself and for others.
      mesh: its devices.
      recipe: the run.
      weights: version 0.
      optimizer: from `make_optimizer`.
    """
    if mesh.devices.flat[0].platform == "cpu":
      keep_freed_memory()
    self.lane, self.mesh = lane, mesh
    self.recipe = dataclasses.replace(recipe, mesh=mesh)
    self.generates = Kind.GENERATE in lane.kinds
    self.trains = Kind.TRAIN in lane.kinds
    self._axes = weights.axes
    self._optimizer = optimizer
    self._rollout_layout = self._layout(weights.trainable, rules.ROLLOUT)
    self._trainer_layout = self._layout(weights.trainable, rules.TRAINER)
    self._parts = self._layout(weights.trainable, rules.PARTS)
    self._frozen_layout = self._layout(weights.frozen, rules.ROLLOUT)
    self._dtypes = weights.dtypes
    dtypes = _like(weights.trainable, weights.dtypes)
    self._read = jax.jit(functools.partial(layers.as_read, dtypes=dtypes))

    self.decoder = self.reference = self._incoming = None
    self._borrowed = self._lent = self.checkpoints = None
    if Kind.GENERATE in lane.kinds | lane.assists:
      self.decoder = jax.device_put(weights.decoder, replicated(mesh))
    if self.generates:
      self._published = self._as_read(weights.trainable, self._rollout_layout)
      # Never donated: it may share buffers with what it was loaded into.
      self.frozen = jax.device_put(weights.frozen, self._frozen_layout)
      self.version = 0
    if self.trains:
      layout = self._layout(weights.frozen, rules.TRAINER)
      # Whoever generates holds it whole; a second, split copy saves nothing.
      self.frozen_train = (
        self.frozen
        if self.generates
        else jax.device_put(weights.frozen, layout)
      )
      trainable = own(reshard(weights.trainable, self._trainer_layout))
      self.state = {
        "trainable": trainable,
        "optimizer": self._init_optimizer(trainable),
        "ema": own(trainable) if recipe.ema_decay else None,
      }
      self.state_version = 0
    if recipe.kl_weight and Kind.TRAIN in lane.kinds | lane.assists:
      layout = self._trainer_layout if self.trains else self._rollout_layout
      self.reference = self._as_read(weights.trainable, layout)
    self._block: tuple[Any, Any] | None = None  # of an assisting trainer
    self._gradients: dict[int, Any] = {}
    self.total: Any = None
    self._kept: Any = None  # training state to go back to
    self._unkept = ""  # why there is none
    self._added = 0
    self._functions = self._define()
    self._compiled: dict[tuple, Callable] = {}

  # Generating.

  @property
  def published(self) -> Any:
    """Trainable parameters of the newest version received, checked."""
    if self._incoming is not None:
      arrived, self._incoming = self._incoming, None
      self._published = _verified(*arrived)
      self.version = arrived[0].version
    return self._published

  def receive(self, parcel: Parcel) -> None:
    """Takes in a new version. It is checked before it is first used."""
    _ = self.published  # stale units may need the one before
    self._incoming = self._arrived(parcel)
    self._borrowed = self._lent = None

  def borrow(self, parcel: Parcel) -> Any:
    """Takes in the trainer's weights between two updates of a step.

    Gradients are taken of them until the next version comes, or other weights
    are borrowed. Like a version they are checked before they are first used.
    """
    self._lent = self._arrived(parcel)
    return self._lent[1]

  def _arrived(self, parcel: Parcel) -> tuple[Parcel, Any, Any]:
    """The parcel, its parameters on this mesh, and their checksums."""
    received = reshard(parcel.params, self._rollout_layout)
    return parcel, received, checksums(received)

  @property
  def borrowed(self) -> Any:
    """What was borrowed last, checked; None if the version is newer."""
    if self._lent is not None:
      lent, self._lent = self._lent, None
      self._borrowed = _verified(*lent)
    return self._borrowed

  def generate(
    self, version: int, *args: Any
  ) -> tuple[policy.Trajectory, jax.Array]:
    """`policy.generate` with a version that this lane must hold.

    Args:
      version: policy version.
      *args: prompts, negative, rows, start and numbers of `policy.generate`.
    """
    return self._run("generate", *self._generate_args(version, *args))

  def _generate_args(
    self,
    version: int,
    prompts: Conditioning,
    negative: Conditioning | None,
    rows: np.ndarray,
    start: np.ndarray,
    numbers: tuple[np.ndarray, ...],
  ) -> tuple:
    return (
      *self._generator(version),
      self.decoder,
      *self._put(prompts, negative),
      *self._put_rows(rows, start),
      (*self._put(*numbers[:2]), *self._put_rows(*numbers[2:])),
    )

  def _generator(self, version: int) -> tuple[Any, Any]:
    """Trainable and frozen parameters to generate with."""
    if self.generates:
      if version != self.version:
        _ = self.published  # adopts what has come
      self._require(version, self.version)
      return self._published, self.frozen
    self._require(version, self.state_version)
    return self._block or (self.state["trainable"], self.frozen_train)

  def switch(self, resharded: bool) -> Any:
    """Prepares a trainer lane for a block of Generate units.

    Args:
      resharded: into the generator's layout, for as long as the block lasts;
        otherwise parameters are gathered layer by layer in every denoising
        step.
    """
    self._block = None
    if self.trains and not self.generates and resharded:
      params = self._as_read(self.state["trainable"], self._rollout_layout)
      frozen = jax.device_put(self.frozen_train, self._frozen_layout)
      self._block = params, frozen
    return self._block

  def sample(
    self,
    params: Any,
    conditioning: Conditioning,
    negative: Conditioning | None,
    seed: int,
    part: range | None = None,
  ) -> np.ndarray:
    """Deterministic samples for evaluation: see `sampler.Sampler`.

    Args:
      params: trainable parameters, in any layout; see `averaged`.
      conditioning: [N, ...] host arrays.
      negative: [1, ...] host arrays, with guidance.
      seed: of the noise.
      part: which of the samples; all by default.
    """
    params = reshard(params, self._rollout_layout)
    return self._sampler(params, conditioning, negative, seed, part)

  @functools.cached_property
  def _sampler(self) -> Sampler:
    return Sampler(self.recipe, self.mesh, self.frozen, self.decoder)

  # Training.

  def gradients(self, number: int, *args: Any) -> tuple[dict, Any]:
    """`policy.gradients` of a pack.

    Args:
      number: the owner of the training state keeps the gradient under it.
      *args: batch, rows, prompts, negative of `policy.gradients`.

    Returns:
      Metrics, and the gradient if this lane does not own the training state.
    """
    self._block = None
    gradient, metrics = self._run("gradients", *self._gradients_args(*args))
    if not self.trains:
      return metrics, gradient
    self._gradients[number] = gradient
    return metrics, None

  def _gradients_args(
    self,
    batch: TrainBatch,
    rows: np.ndarray,
    prompts: Conditioning,
    negative: Conditioning | None,
  ) -> tuple:
    if self.trains:
      params, frozen = self.state["trainable"], self.frozen_train
    else:
      params, frozen = self.borrowed or self.published, self.frozen
    return (
      params,
      frozen,
      self.reference,
      *self._put_rows(batch, rows),
      *self._put(prompts, negative),
    )

  def add(self, gradient: Any) -> None:
    """Adds to the accumulated gradient.

    Args:
      gradient: the number of a pack of this lane's, or a gradient.
    """
    if isinstance(gradient, int):
      gradient = self._gradients.pop(gradient)
    else:
      gradient = reshard(gradient, self._trainer_layout)
      gradient = own(gradient) if self.total is None else gradient
    if self.total is not None:
      gradient = self._run("add", self.total, gradient)
    self.total = gradient
    self._added += 1

  def update(self, expected: int) -> dict[str, jax.Array]:
    """`policy.update` in place; no gradient at all counts as zero.

    Args:
      expected: how many gradients have been given to `add` since the last one.

    Raises:
      RuntimeError: another number has come; the state is as it was.
    """
    if self._added != expected:
      raise RuntimeError(
        f"{expected} gradients were sent to lane {self.lane.name!r} for this "
        f"update and {self._added} have come"
      )
    self._added = 0
    gradient, self.total, self._block = self.total, None, None
    if gradient is None:
      gradient = jax.tree.map(jnp.zeros_like, self.state["trainable"])
    self.state_version = None
    self.state, metrics = self._run("update", self.state, gradient)
    return metrics

  def holds(self) -> int | None:
    """Version of the training state; None amid a step's updates."""
    return self.state_version

  def keep(self) -> None:
    """Copies the training state to the host's memory, for `roll_back`.

    Where there is no room for it nothing is kept from then on, with a warning.
    """
    self._kept = None  # before there are two of them
    if self._unkept:
      return
    try:
      self._kept = _in_memory(self.state, "pinned_host")
    except (RuntimeError, ValueError) as error:
      self._unkept = " ".join(str(error).split())
      _log.warning(
        "what is trained cannot be kept in the host's memory (%s): a failure "
        "between the updates of a step would go back to the last checkpoint; "
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB raises what XLA takes of it (64)",
        self._unkept,
      )

  def roll_back(self) -> None:
    """Goes back to the training state that was kept last.

    Raises:
      RuntimeError: there was no room to keep it.
    """
    if self._kept is None:
      raise RuntimeError(f"there was no room to keep it: {self._unkept}")
    self.state = self.total = self._block = None
    self._gradients.clear()
    self.state = _in_memory(self._kept, "device")

  def outgoing(self, version: int) -> tuple[int, Parcel]:
    """What was trained, as a new version: its bytes, and itself."""
    self.state_version = version
    parcel = self.interim(version)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parcel.params)), parcel

  def interim(self, update: int) -> Parcel:
    """What was trained so far in a step, for the gradients of `update`."""
    params = self._read(self.state["trainable"])
    return Parcel(update, params, checksums(params))

  def averaged(self) -> Any:
    """What evaluation samples with, as layers read it: the average if any."""
    return self._read(
      self.state["ema" if self.recipe.ema_decay else "trainable"]
    )

  # Checkpoints.

  def sees(self, file: str | Path) -> bool:
    """Whether a file is there, on the host of this lane."""
    return Path(file).exists()

  def open_checkpoints(self, directory: str | Path, keep: int) -> None:
    """Where the training state is kept; see `checkpoint.Checkpoints`."""
    self.checkpoints = Checkpoints(directory, keep)

  def latest(self) -> int | None:
    """Step of the newest checkpoint, or None."""
    return self.checkpoints.latest()

  def save(self, step: int, record: dict[str, Any]) -> None:
    """Starts a checkpoint of the training state."""
    self.checkpoints.save(step, self.state, record)

  def restore(self, step: int) -> None:
    """Goes on from a checkpoint; what is published follows."""
    self.state = own(self.checkpoints.load(step, self.state))
    self.state_version = step

  def wait(self) -> None:
    """Until the last checkpoint has been written."""
    self.checkpoints.wait()

  def close(self) -> None:
    """Waits, and releases what writes checkpoints."""
    if self.checkpoints is not None:
      self.checkpoints.close()

  # Compiling and calibrating.

  def prepare(self, name: str, *args: Any) -> None:
    """Compiles "generate" or "gradients" for the shapes of `args`.

    The owner of the training state compiles "add" and "update" with it.
    """
    if name == "generate":
      self._compile(name, *self._generate_args(*args))
      return
    self._compile(name, *self._gradients_args(*args[1:]))
    if self.trains:
      params = self.state["trainable"]
      self._compile("add", params, params)
      self._compile("update", self.state, params)

  def measure(self, name: str, *args: Any) -> float:
    """Seconds that "generate", "gradients" or "switch" takes; the second run.

    Changes nothing that lasts.
    """
    try:
      for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(getattr(self, name)(*args))
        seconds = time.perf_counter() - start
    finally:  # a smaller pack may fit where this one did not
      self._gradients.clear()
    return seconds

  def _run(self, name: str, *args: Any) -> Any:
    """Dispatches a function."""
    self._compile(name, *args)
    return self._compiled[self._key(name, args)](*args)

  def _compile(self, name: str, *args: Any) -> None:
    """Compiles a function, if that was not done before."""
    key = self._key(name, args)
    if key not in self._compiled:
      lowered = self._functions[name].lower(*args)
      self._compiled[key] = lowered.compile()

  def _key(self, name: str, args: tuple) -> tuple:
    """Which compiled form: units of several sizes, blocks in either layout."""
    if name not in ("generate", "gradients"):
      return (name,)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(args[3:]))
    return name, shapes, name == "generate" and self._block is not None

  def _define(self) -> dict[str, Callable]:
    recipe = self.recipe
    apply = reading(recipe.apply, self.mesh, self._axes, self._dtypes)
    recipe = dataclasses.replace(recipe, apply=apply)
    layout = self._trainer_layout if self.trains else self._parts
    functions = {
      "generate": jax.jit(
        functools.partial(policy.generate, recipe),
        out_shardings=batch_sharding(self.mesh),
      ),
      "gradients": jax.jit(
        functools.partial(policy.gradients, recipe),
        out_shardings=(layout, replicated(self.mesh)),
      ),
    }
    if self.trains:
      functions["add"] = jax.jit(
        functools.partial(jax.tree.map, jnp.add),
        out_shardings=layout,
        donate_argnums=(0,),
      )
      functions["update"] = jax.jit(
        functools.partial(policy.update, recipe, self._optimizer),
        out_shardings=(
          jax.tree.map(lambda x: x.sharding, self.state),
          replicated(self.mesh),
        ),
        donate_argnums=(0,),
      )
    return functions

  def _init_optimizer(self, params: Any) -> Any:
    """Optimiser state laid out like the parameters it belongs to."""
    layout = optax.tree.map_params(
      self._optimizer,
      lambda _, sharding: sharding,
      jax.eval_shape(self._optimizer.init, params),
      self._trainer_layout,
      transform_non_params=lambda _: replicated(self.mesh),
    )
    return jax.jit(self._optimizer.init, out_shardings=layout)(params)

  def _layout(self, tree: Any, table: rules.Rules) -> Any:
    """Shardings of any part of the parameters."""
    return rules.param_shardings(
      self.mesh, _like(tree, self._axes), tree, table
    )

  def _as_read(self, trainable: Any, layout: Any) -> Any:
    """Trainable parameters as layers read them, in a layout of this lane."""
    return reshard(self._read(trainable), layout)

  def _put(self, *trees: Any) -> Any:
    """On every device of the lane."""
    return jax.device_put(trees, replicated(self.mesh))

  def _put_rows(self, *trees: Any) -> Any:
    """Split over the batch axes of the lane."""
    return jax.device_put(trees, batch_sharding(self.mesh))

  def _require(self, wanted: int, held: int | None) -> None:
    if wanted != held:
      raise RuntimeError(
        f"lane {self.lane.name!r} was asked for policy version {wanted} and "
        f"holds {held}"
      )


def _in_memory(tree: Any, kind: str) -> Any:
  """A copy of the arrays in another memory of the same devices."""
  layout = jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)
  return jax.device_put(tree, layout)


def _like(tree: Any, whole: Any) -> Any:
  """The part of nested dict `whole` that has the keys of `tree`."""
  if not isinstance(tree, Mapping):
    return whole
  return {key: _like(value, whole[key]) for key, value in tree.items()}
