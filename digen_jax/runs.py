"""Opening what is on disk for use: a pipeline directory, or a run of ours."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from digen_jax.assemble import Assembly, assemble
from digen_jax.checkpoint import Checkpoints
from digen_jax.config import (
  Config,
  Dtype,
  Eval,
  Sampling,
  Vae,
  check,
  from_config_dict,
)
from digen_jax.errors import UserError
from digen_jax.grpo.train_step import join
from digen_jax.models import Model, lora
from digen_jax.models.published import MODELS, recognise
from digen_jax.parallel.mesh import make_mesh
from digen_jax.parallel.rules import ROLLOUT, TRAINER, param_shardings
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
    mesh: every device; see `open_policy`.
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


Overrides = Mapping[str, Mapping[str, Any]]


def check_policy(
  path: str | Path, overrides: Overrides | None = None
) -> Assembly:
  """What `open_policy` opens, with shapes instead of weights.

  All is checked that can be without reading weights; arguments and errors as
  there.
  """
  run, overrides = is_run(path), overrides or {}
  config = read_config(path) if run else _pipeline_config(path, overrides)
  for section, values in overrides.items():
    changed = dataclasses.replace(getattr(config, section), **values)
    config = dataclasses.replace(config, **{section: changed})
  check(config)
  if run:
    _check_start(config, Path(path))
  return assemble(config, weights=False)


def open_policy(path: str | Path, overrides: Overrides | None = None) -> Policy:
  """Loads a run's newest checkpoint, or a diffusers pipeline directory.

  A run is sampled as its config says. A pipeline of a published model is
  sampled as `models/published.py` says, in bfloat16 where there is an
  accelerator; of others the picture size is the autoencoder's `sample_size`,
  or must be given. Pipelines make one sample at once for every copy of the
  model; over how many devices one is spread, `sampling_axes` says.

  Args:
    path: the directory.
    overrides: section -> field -> value, e.g. {"eval": {"num_steps": 20}}.

  Raises:
    UserError: neither, incomplete, a pipeline of unknown size, an override
      that cannot work, or the run started from other files than its
      checkpoint's directory holds now.
  """
  run, plan = is_run(path), check_policy(path, overrides)
  mesh = make_mesh(sampling_axes(plan, run), jax.devices())
  assembly = assemble(plan.config, mesh=mesh, rules=ROLLOUT, training=run)
  base = assembly.weights.trainable
  if not run:
    return Policy(assembly, mesh, base, base, 0)
  step, trained = _trained(plan.config, base, Path(path))
  return Policy(assembly, mesh, trained, base, step)


def read_trained(path: str | Path) -> Model:
  """What a run has trained, from its newest checkpoint, and nothing else.

  Args:
    path: directory of the run.

  Returns:
    The model with float32 arrays for what was trained, spread over all
    devices as far as they can be divided, and `jax.ShapeDtypeStruct`s for
    what was not.

  Raises:
    UserError: as `open_policy`.
  """
  plan = check_policy(path)
  model = plan.model
  mesh = make_mesh({"fsdp": jax.device_count()}, jax.devices())
  places = param_shardings(mesh, model.logical_axes, model.params, TRAINER)
  like = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=place),
    model.params,
    places,
  )
  mode = "lora" if plan.config.train.lora_rank else "full"
  like, rest = lora.split_trainable(like, mode)
  _, trained = _trained(plan.config, like, Path(path))
  return dataclasses.replace(model, params=join(trained, rest))


def sampling_axes(plan: Assembly, run: bool) -> dict[str, int]:
  """Axis sizes of the mesh, all devices, on which a policy samples.

  Every device has the whole model and a part of the batch, which needs no
  communication, as long as the parameters leave half of its memory to
  activations and the decoder; else as many devices as divide both all of them
  and the heads share one model.

  Args:
    plan: from `check_policy`.
    run: whether it is a run, of which base and trained parameters are held.
  """
  devices = jax.devices()
  room = (devices[0].memory_stats() or {}).get("bytes_limit", math.inf) / 2
  itemsize = jnp.dtype(plan.config.dtype.compute).itemsize
  if run and not plan.config.train.lora_rank:
    itemsize = 2 * 4
  count = sum(leaf.size for leaf in jax.tree.leaves(plan.model.params))
  if count * itemsize <= room:
    return {"data": len(devices)}
  tensor = math.gcd(plan.model.config.num_attention_heads, len(devices))
  return {"data": len(devices) // tensor, "tensor": tensor}


def _pipeline_config(
  path: str | Path, overrides: Mapping[str, Mapping[str, Any]]
) -> Config:
  """How a pipeline is sampled, as far as nothing is said about it."""
  pipeline = load_pipeline_config(path)
  name = recognise(load_abstract(pipeline.path).config)
  published = MODELS[name] if name else None
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
  tiling = settings.pop("tiling", Vae.tiling)
  cpu = jax.default_backend() == "cpu"
  return Config(
    checkpoint=str(path),
    sampling=Sampling(**settings),
    dtype=Dtype("float32" if cpu else "bfloat16"),
    vae=Vae(tiling=tiling),
    # Rounded up to one for every copy of the model.
    eval=Eval(num_steps=steps, batch_size=1),
  )


def _check_start(config: Config, path: Path) -> None:
  """Raises UserError without a checkpoint, or where its base has changed."""
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
  checkpoints.close()


def _trained(config: Config, base: Any, path: Path) -> tuple[int, Any]:
  """Newest parameters of a run, averaged if it keeps an average."""
  checkpoints = Checkpoints(path / "checkpoints", writes=False)
  kept = "ema" if config.train.ema_decay else "trainable"
  step = checkpoints.latest()
  state = checkpoints.load(step, {kept: base})
  checkpoints.close()
  return step, state[kept]
