"""What a plan rests on: costs that were measured, read, or counted.

Each function here gives a `Basis`, which `planning.make_plan` takes.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digen_jax.config import Config, Sampling
from digen_jax.data.prompt_encoder import load_prompt_encoder
from digen_jax.device_costs import (
  DEVICES,
  Device,
  Job,
  Memory,
  assumptions,
  ledger_table,
  memories,
)
from digen_jax.errors import UserError
from digen_jax.models import costs, find_family, vae
from digen_jax.models.published import find_model
from digen_jax.models.vae.costs import DECODERS
from digen_jax.parallel.mesh import ROW_AXES, row_devices
from digen_jax.pipeline.cost_table import (
  CostTable,
  read_table,
  table_from_spans,
)
from digen_jax.throughput import UnitFlops, peak_tflops
from digen_jax.timeline import read_trace
from digen_jax.weights.load import module_directory, read_json

ROLES = ("rollout", "trainer")


@dataclasses.dataclass(frozen=True)
class Basis:
  """What a plan rests on.

  Attributes:
    table: what units cost.
    assumed: what that rests on, a line each.
    flops: of units; None without ledgers of the model.
    peaks: dense bfloat16 TFLOP/s of a device by role, "rollout" and "trainer";
      empty where they are not known.
    memory: of a device by role; empty where it is not known.
    apart: whether the roles have devices of two kinds: none of a role's can
      serve the other.
    devices: how many were measured; 0 if none were.
  """

  table: CostTable
  assumed: tuple[str, ...] = ()
  flops: UnitFlops | None = None
  peaks: Mapping[str, float] = dataclasses.field(default_factory=dict)
  memory: Mapping[str, Memory] = dataclasses.field(default_factory=dict)
  apart: bool = False
  devices: int = 0


def job_of(config: Config, model: str = "") -> Job:
  """The model of a config and how it is used.

  Args:
    config: the run.
    model: name of a published model, where there is no checkpoint to read
      sizes from.

  Raises:
    UserError: unknown model, or one without a ledger.
  """
  if model:
    published = find_model(model)
    transformer, autoencoder = published.transformer, published.autoencoder
    sizes, decoder = published.transformer_config, published.autoencoder_config
    text_length = config.sampling.text_length or published.text_length
  else:
    transformer, sizes = _read(config.checkpoint, "transformer", find_family)
    autoencoder, decoder = _read(config.checkpoint, "vae", vae.find_family)
    text_length = (
      config.sampling.text_length
      or load_prompt_encoder(config.checkpoint).max_length
    )
  if transformer not in costs.DENOISERS or autoencoder not in DECODERS:
    raise UserError(f"there is no ledger of {transformer} with {autoencoder}")
  sampling = config.sampling
  shape = _latent_shape(config, find_family(transformer).video, decoder)
  return Job(
    costs.DENOISERS[transformer](sizes, shape, text_length),
    DECODERS[autoencoder](decoder, shape),
    num_steps=sampling.num_steps,
    passes=1 if sampling.guidance_scale == 1.0 else 2,
    lora_rank=config.train.lora_rank,
    reference=config.train.kl_weight > 0,
    average=config.train.ema_decay > 0,
    held=config.pipeline.held_gradients,
    borrows=config.train.updates_per_batch > 1,
    remat=config.train.remat,
    itemsize=2 if config.dtype.compute == "bfloat16" else 4,
  )


def _read(checkpoint: str, component: str, find: Any) -> tuple[str, Any]:
  raw = read_json(module_directory(checkpoint, component) / "config.json")
  name = raw.get("_class_name", "")
  return name, find(name).parse_config(raw)


def _latent_shape(config: Config, video: bool, decoder: Any) -> tuple[int, ...]:
  sampling = config.sampling
  shape = (
    sampling.height // decoder.downscale,
    sampling.width // decoder.downscale,
    decoder.latent_channels,
  )
  if not video:
    return shape
  return ((sampling.num_frames - 1) // decoder.temporal_downscale + 1, *shape)


def find_device(name: str) -> Device:
  """A kind of device; UserError if its figures are not known."""
  if name not in DEVICES:
    raise UserError(
      f"no figures of a device {name!r}: use one of {', '.join(DEVICES)}, or "
      "give a table with --costs"
    )
  return DEVICES[name]


def from_ledgers(
  config: Config,
  rollout: Device,
  trainer: Device,
  devices: int,
  model: str = "",
) -> Basis:
  """Costs of devices that are not there; see `device_costs`.

  Args:
    config: the run.
    rollout: what generates.
    trainer: what trains.
    devices: of both roles.
    model: name of a published model in place of the config's; size, frames
      and guidance are its own where the config has the default.

  Raises:
    UserError: unknown model, or it does not fit.
  """
  sampling = config.sampling
  if model:
    settings = find_model(model).settings
    names = ("height", "width", "num_frames", "guidance_scale")
    own = {
      name: getattr(settings, name)
      for name in names
      if getattr(sampling, name) == getattr(Sampling, name)  # not set
    }
    sampling = dataclasses.replace(sampling, **own)
    config = dataclasses.replace(config, sampling=sampling)
  job, kinds = job_of(config, model), (rollout, trainer)
  rows = {role: row_axes(config, role) or {} for role in ROLES}
  rows["colocated"] = rows["trainer"]
  size = f"{sampling.num_frames} x {sampling.height} x {sampling.width}"
  return Basis(
    ledger_table(job, *kinds, devices, rows),
    assumed=(
      f"frames x height x width: {size}; guidance {sampling.guidance_scale}",
      *assumptions(job, kinds),
    ),
    flops=job.flops,
    peaks={"rollout": rollout.tflops, "trainer": trainer.tflops},
    memory=memories(job, *kinds, devices, rows),
    apart=rollout.name != trainer.name,
  )


def row_axes(config: Config, role: str) -> dict[str, int] | None:
  """Axes over which devices share a row in a role; None if all is "auto".

  Raises:
    UserError: they differ from lane to lane.
  """
  mesh = getattr(config.mesh, role)
  lanes = mesh if isinstance(mesh, list | tuple) and mesh else [mesh]
  shapes = [lane if isinstance(lane, Mapping) else {} for lane in lanes]
  found = [{n: shape.get(n, 1) for n in ROW_AXES} for shape in shapes]
  if any(axes != found[0] for axes in found):
    raise UserError(
      f"config.mesh.{role}={list(mesh)} has lanes that share a row in different "
      f"ways ({' and '.join(ROW_AXES)} axes), and plans know one: plan them one "
      "by one"
    )
  return None if all(lane == "auto" for lane in lanes) else found[0]


def role_of(lane: str) -> str:
  """The role of a lane: "rollout" of "rollout1"."""
  return lane.rstrip("0123456789")


def from_timeline(config: Config, timeline: str | Path) -> Basis:
  """Costs that an earlier run measured, from its `timeline.json`.

  The `config.json` beside it says what its lanes were, and since which step;
  without one each had a single device.

  Args:
    config: the run to plan.
    timeline: the file.

  Raises:
    UserError: no such file, or no whole step in it.
  """
  path = Path(timeline)
  if not path.exists():
    raise UserError(f"--timeline={path} does not exist; name a timeline.json")
  try:
    spans = read_trace(path)
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is not a timeline: {error!r}") from error
  file = path.with_name("config.json")
  record = read_json(file) if file.exists() else {}
  meshes, since = record.get("meshes", {}), record.get("placed_at_step", 0)
  # A run that was resumed on another split has spans of both.
  spans = [
    span
    for span in spans
    if span.args.get("step", 0) >= since
    and (span.lane in meshes or not meshes or span.name == "score")
  ]
  lanes = {span.lane for span in spans if span.name != "score"}
  sizes = {n: math.prod(meshes.get(n, {"": 1}).values()) for n in lanes}
  shards = {n: row_devices(meshes.get(n, {})) for n in lanes}
  source = f"measured, {path}"
  sequence = {n: meshes.get(n, {}).get("sequence", 1) for n in lanes}
  table = table_from_spans(
    spans, sizes, shards=shards, sequence=sequence, source=source
  )
  kinds = record.get("devices", {})
  return Basis(
    table,
    flops=_flops(config),
    peaks=peaks_of(kinds),
    apart=len(set(kinds.values())) > 1,
    devices=sum(sizes.values()) if meshes else 0,
  )


def from_file(config: Config, path: str | Path) -> Basis:
  """Costs as a table has them; UserError as for `read_table`."""
  return Basis(read_table(path), flops=_flops(config))


def _flops(config: Config) -> UnitFlops | None:
  """Of the units of a run; None where its checkpoint is not here.

  One on the hub is not fetched for that.
  """
  if not Path(config.checkpoint).is_dir():
    return None
  try:
    return job_of(config).flops
  except UserError:
    return None


def peaks_of(kinds: Mapping[str, str]) -> dict[str, float]:
  """Peak TFLOP/s of a device by role; empty if one is not known.

  Args:
    kinds: `device_kind` of JAX by lane.
  """
  by_role = {role_of(lane): kind for lane, kind in kinds.items()}
  both = by_role.get("colocated", "")
  peaks = {role: peak_tflops(by_role.get(role, both)) for role in ROLES}
  known = {role: peak for role, peak in peaks.items() if peak}
  return known if len(known) == len(peaks) else {}
