"""Opening what is on disk for use: a pipeline directory, or a run of ours."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from digen_jax.assemble import Assembly, assemble
from digen_jax.checkpoint import Checkpoints
from digen_jax.config import Config, check, from_config_dict
from digen_jax.errors import UserError
from digen_jax.optimizer import make_optimizer
from digen_jax.parallel.mesh import make_mesh, replicated
from digen_jax.sampler import Sampler
from digen_jax.weights.load import fingerprint


@dataclasses.dataclass(frozen=True)
class Policy:
  """A policy ready to sample, on all devices.

  Attributes:
    assembly: what it is made of.
    mesh: every device, as one data axis.
    trainable: the trained parameters, or those of the base checkpoint.
    base: the same parameters as the base checkpoint has them.
    step: global steps trained; 0 for a base checkpoint.
  """

  assembly: Assembly
  mesh: Mesh
  trainable: Any
  base: Any
  step: int

  def sampler(self) -> Sampler:
    """A sampler for it."""
    weights, whole = self.assembly.weights, replicated(self.mesh)
    return Sampler(
      self.assembly.recipe,
      self.mesh,
      jax.device_put(weights.frozen, whole),
      jax.device_put(weights.decoder, whole),
    )


def is_run(path: str | Path) -> bool:
  """Whether a directory is a run of ours rather than a pipeline."""
  return not (Path(path) / "model_index.json").exists() and (
    (Path(path) / "checkpoints").is_dir()
  )


def read_config(run: str | Path) -> Config:
  """The config a run was made with; UserError if it is not a run."""
  file = Path(run) / "config.json"
  if not is_run(run) or not file.exists():
    raise UserError(
      f"{run} is not a run: it needs config.json and checkpoints/, as "
      "launch/train.py writes them"
    )
  try:
    return from_config_dict(json.loads(file.read_text())["config"])
  except (ValueError, KeyError) as error:
    raise UserError(f"{file} cannot be read: {error}") from error


def open_policy(
  path: str | Path, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Policy:
  """Loads a run's newest checkpoint, or a diffusers pipeline directory.

  Args:
    path: the directory.
    overrides: section -> field -> value, e.g. {"eval": {"num_steps": 20}}.

  Raises:
    UserError: neither, incomplete, an override that cannot work, or the run
      started from other files than its checkpoint's directory holds now.
  """
  run = is_run(path)
  config = read_config(path) if run else Config(checkpoint=str(path))
  for section, values in (overrides or {}).items():
    changed = dataclasses.replace(getattr(config, section), **values)
    config = dataclasses.replace(config, **{section: changed})
  check(config)
  assembly = assemble(config)
  devices = jax.devices()
  mesh = make_mesh({"data": len(devices)}, devices)
  base = jax.device_put(assembly.weights.trainable, replicated(mesh))
  if not run:
    return Policy(assembly, mesh, base, base, 0)
  step, trained = _trained(config, base, mesh, Path(path))
  return Policy(assembly, mesh, trained, base, step)


def _trained(
  config: Config, base: Any, mesh: Mesh, path: Path
) -> tuple[int, Any]:
  """Newest parameters of a run, averaged if it keeps an average."""
  checkpoints = Checkpoints(path / "checkpoints", writes=False)
  step = checkpoints.latest()
  if step is None:
    raise UserError(f"{path}/checkpoints holds no complete checkpoint yet")
  start = fingerprint(config.checkpoint, config.train.lora_init)
  if checkpoints.record(step)["checkpoint"] != start:
    lora = config.train.lora_init and f" with {config.train.lora_init}"
    raise UserError(
      f"{path} was trained from other files than {config.checkpoint}{lora} "
      "holds now: put back those that it started from"
    )
  shapes = {
    "trainable": base,
    "optimizer": jax.eval_shape(make_optimizer(config.train, 1).init, base),
    "ema": base if config.train.ema_decay else None,
  }
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    shapes,
  )
  state = checkpoints.load(step, like)
  checkpoints.close()
  return step, state["ema"] if config.train.ema_decay else state["trainable"]
