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
from digen_jax.config import (
  Config,
  Dtype,
  Eval,
  Sampling,
  check,
  from_config_dict,
)
from digen_jax.errors import UserError
from digen_jax.models.published import MODELS, recognise
from digen_jax.optimizer import make_optimizer
from digen_jax.parallel.mesh import make_mesh, replicated
from digen_jax.sampler import Sampler
from digen_jax.weights.load import (
  fingerprint,
  load_abstract,
  load_pipeline_config,
  module_directory,
  read_json,
)


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
    weights = self.assembly.weights
    return Sampler(
      self.assembly.recipe,
      self.mesh,
      weights.frozen,
      weights.decoder,
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

  A run is sampled as its config says. A pipeline of a published model is
  sampled as `models/published.py` says, in bfloat16 where there is an
  accelerator; of others the picture size is the autoencoder's
  `sample_size`, or must be given.

  Args:
    path: the directory.
    overrides: section -> field -> value, e.g. {"eval": {"num_steps": 20}}.

  Raises:
    UserError: neither, incomplete, a pipeline of unknown size, an override
      that cannot work, or the run started from other files than its
      checkpoint's directory holds now.
  """
  run, overrides = is_run(path), overrides or {}
  config = read_config(path) if run else _pipeline_config(path, overrides)
  for section, values in overrides.items():
    changed = dataclasses.replace(getattr(config, section), **values)
    config = dataclasses.replace(config, **{section: changed})
  check(config)
  devices = jax.devices()
  mesh = make_mesh({"data": len(devices)}, devices)
  assembly = assemble(config, mesh=mesh, training=run)
  base = assembly.weights.trainable
  if not run:
    return Policy(assembly, mesh, base, base, 0)
  step, trained = _trained(config, base, mesh, Path(path))
  return Policy(assembly, mesh, trained, base, step)


def _pipeline_config(
  path: str | Path, overrides: Mapping[str, Mapping[str, Any]]
) -> Config:
  """How a pipeline is sampled, as far as nothing is said about it."""
  pipeline = load_pipeline_config(path)
  published = recognise(load_abstract(pipeline.path).config)
  told = overrides.get("sampling", {})
  vae = read_json(module_directory(pipeline.path, "vae") / "config.json")
  size = None if published else vae.get("sample_size")
  if not (published or size or {"height", "width"} <= told.keys()):
    raise UserError(
      f"{path} is none of the models whose picture size is known "
      f"({', '.join(MODELS)}): give --height and --width, and --num_frames for "
      "videos"
    )
  settings = dict(height=size, width=size) if size else {}
  if published:
    settings = dataclasses.asdict(published.settings)
  steps = settings.pop("num_steps", Eval.num_steps)
  cpu = jax.default_backend() == "cpu"
  return Config(
    checkpoint=str(path),
    sampling=Sampling(**settings),
    dtype=Dtype("float32" if cpu else "bfloat16"),
    eval=Eval(num_steps=steps),
  )


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
