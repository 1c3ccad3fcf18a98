"""Checkpoints of a run: asynchronous, atomic, loadable onto another layout.

A checkpoint holds the arrays of the training state (trainable parameters,
optimiser, averages) and, in the same atomic directory, a small JSON record:
step, policy version, random seed, data position, configuration. A kill while
one is written leaves the one before.
"""

from pathlib import Path
from typing import Any

import jax

from digen_jax.errors import UserError

# The optimiser's state refuses to load into another structure; these are the
# settings that determine it.
STRUCTURAL = ("train.lora_rank", "train.lora_targets", "train.ema_decay")


class Checkpoints:
  """The checkpoints under one directory. Call from the main thread only."""

  def __init__(
    self, directory: str | Path, keep: int = 2, *, writes: bool = True
  ):
    """Opens a directory of checkpoints.

    Args:
      directory: made if missing.
      keep: how many of the newest stay when another is saved.
      writes: False where a run is only looked at: what seems left behind by a
        killed writer may be what a live one is writing, and a part of what is
        there may be loaded.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    policies = ocp.training.preservation_policies
    self._partial = not writes
    context = ocp.Context()
    context.pytree.loading.partial_load = self._partial
    self._checkpointer = ocp.training.Checkpointer(
      Path(directory).absolute(),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
        1
      ),
      preservation_policy=policies.LatestN(keep),
      cleanup_tmp_directories=writes,
      context=context,
    )

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    found = self._checkpointer.latest
    return None if found is None else found.step

  def record(self, step: int) -> dict[str, Any]:
    """The JSON record of a checkpoint."""
    return self._checkpointer.metadata(step).custom_metadata

  def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Starts writing; the arrays may be donated as soon as this returns."""
    if self.latest() == step:
      return
    self._checkpointer.save_async(step, state, custom_metadata=record)

  def load(self, step: int, like: Any) -> Any:
    """Loads the arrays of a checkpoint.

    Args:
      step: which one.
      like: pytree of arrays or `jax.ShapeDtypeStruct`s with the shardings
        wanted, which need not be those it was saved with. A reader's may lack
        keys of the outermost dict: those are left on disk.

    Raises:
      UserError: the checkpoint holds other arrays than `like`.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      like,
    )
    saved = self._checkpointer.metadata(step).metadata
    if self._partial:
      saved = {key: saved[key] for key in abstract if key in saved}
    _compare(abstract, saved, f"{self._checkpointer.directory}/{step}")
    return self._checkpointer.load(step, abstract)

  def wait(self) -> None:
    """Blocks until what was started has been written."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits and releases what the writer holds."""
    self._checkpointer.close()


def _compare(wanted: Any, saved: Any, where: str) -> None:
  def shapes(tree: Any) -> dict[str, tuple]:
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
      for path, leaf in jax.tree.leaves_with_path(
        tree, is_leaf=lambda x: hasattr(x, "shape")
      )
    }

  want, have = shapes(wanted), shapes(saved)
  wrong = sorted(
    name
    for name in want.keys() | have.keys()
    if want.get(name) != have.get(name)
  )
  if wrong:
    name = wrong[0]
    raise UserError(
      f"checkpoint {where} does not fit this configuration: {name} is "
      f"{have.get(name, 'missing')} there, {want.get(name, 'absent')} here "
      f"({len(wrong)} such arrays); resume with the configuration it was made "
      f"with ({', '.join(STRUCTURAL)}), or choose another --workdir"
    )
