"""What a run would take, before it runs: a config and costs in, a plan out."""

import dataclasses
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from digen_jax import auto_split
from digen_jax.atomic import write_text
from digen_jax.config import Config
from digen_jax.device_costs import DEVICES, Device, Job, assumptions
from digen_jax.errors import UserError
from digen_jax.ladder import ladder_chart, ladder_rows, ladder_text
from digen_jax.ladder import prediction_panels as panels
from digen_jax.metrics import format_seconds
from digen_jax.models import costs, find_family, vae
from digen_jax.models.published import MODELS, Published, find_model
from digen_jax.models.vae.costs import DECODERS
from digen_jax.page import page, section
from digen_jax.pipeline.cost_table import (
  CostTable,
  read_table,
  table_from_spans,
  write_table,
)
from digen_jax.pipeline.planner import (
  RUNGS,
  Prediction,
  Split,
  Techniques,
  equal_split,
  ladder,
  predict,
)
from digen_jax.pipeline.splits import best_splits
from digen_jax.pipeline.units import Workload
from digen_jax.svg import number
from digen_jax.timeline import read_trace, write_trace
from digen_jax.weights.load import module_directory, read_json


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `launch/plan.py` prints and writes.

  Attributes:
    table: what units cost.
    work: what a step consists of.
    devices: how many.
    configured: the step of the config as it is.
    rungs: the ladder on the config's split and unit sizes.
    best: the ladder where each rung has the split that serves it best.
    assumed: what the costs rest on, a line each.
    steps: global steps of the run.
    price: of a device for an hour; 0 if it is not known.
  """

  table: CostTable
  work: Workload
  devices: int
  configured: Prediction
  rungs: Mapping[str, Prediction]
  best: Mapping[str, Prediction]
  assumed: tuple[str, ...]
  steps: int
  price: float = 0.0

  @property
  def fastest(self) -> str:
    """The rung that is predicted to be the fastest."""
    return min(self.best, key=lambda rung: self.best[rung].step_seconds)


# What units cost


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
  else:
    transformer, sizes = _read(config.checkpoint, "transformer", find_family)
    autoencoder, decoder = _read(config.checkpoint, "vae", vae.find_family)
    published = _like(transformer)
  if transformer not in costs.DENOISERS or autoencoder not in DECODERS:
    raise UserError(f"there is no ledger of {transformer} with {autoencoder}")
  sampling = config.sampling
  shape = _latent_shape(config, find_family(transformer).video, decoder)
  text_length = sampling.text_length or published.text_length
  return Job(
    costs.DENOISERS[transformer](sizes, shape, text_length),
    DECODERS[autoencoder](decoder, shape),
    num_steps=sampling.num_steps,
    passes=1 if sampling.guidance_scale == 1.0 else 2,
    lora_rank=config.train.lora_rank,
    reference=config.train.kl_weight > 0,
    remat=config.train.remat,
  )


def _read(checkpoint: str, component: str, find: Any) -> tuple[str, Any]:
  raw = read_json(module_directory(checkpoint, component) / "config.json")
  name = raw.get("_class_name", "")
  return name, find(name).parse_config(raw)


def _like(transformer: str) -> Published:
  return next(m for m in MODELS.values() if m.transformer == transformer)


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


def measured_table(timeline: str | Path) -> CostTable:
  """The table of an earlier run, from its `timeline.json`.

  The `config.json` beside it says how many devices its lanes had; without one
  each had a single device.

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
  record = path.with_name("config.json")
  meshes = read_json(record).get("meshes", {}) if record.exists() else {}
  lanes = {span.lane for span in spans if span.name != "score"}
  devices = {n: math.prod(meshes.get(n, {"": 1}).values()) for n in lanes}
  shards = {n: meshes.get(n, {}).get("tensor", 1) for n in lanes}
  source = f"measured, {path}"
  return table_from_spans(spans, devices, shards=shards, source=source)


def configured_split(config: Config, work: Workload, devices: int) -> Split:
  """The split that a config asks for; "auto" is what the other role leaves.

  Raises:
    UserError: more devices than there are, or no number of them.
  """
  sizes = {
    role: _count(role, getattr(config.mesh, role))
    for role in ("rollout", "trainer")
  }
  split = equal_split(work, devices)
  rollout, trainer = sizes["rollout"], sizes["trainer"]
  if rollout is None and trainer is None:
    return split
  rollout = devices - trainer if rollout is None else rollout
  trainer = devices - rollout if trainer is None else trainer
  if rollout + trainer > devices:
    raise UserError(
      f"config.mesh asks for {rollout} + {trainer} devices, but the plan is for "
      f"{devices}: raise --devices, or leave config.mesh at 'auto'"
    )
  return dataclasses.replace(split, rollout=rollout, trainer=trainer)


def _count(role: str, mesh: Any) -> int | None:
  if mesh == "auto":
    return None
  if isinstance(mesh, Mapping):
    return math.prod(mesh.values())
  if str(mesh).isdigit():
    return int(mesh)
  raise UserError(
    f"config.mesh.{role} takes a device count, axis sizes or 'auto'; got "
    f"{mesh!r}"
  )


# The plan


def make_plan(
  config: Config,
  work: Workload,
  table: CostTable,
  devices: int,
  *,
  most_lanes: int = 1,
  price: float = 0.0,
  assumed: tuple[str, ...] = (),
) -> Plan:
  """Predicts the config as it is, the ladder, and the best splits.

  Args:
    config: the run.
    work: its `assemble.workload`.
    table: what units cost.
    devices: how many.
    most_lanes: rollout lanes that the devices may be divided among.
    price: of a device for an hour.
    assumed: what the table rests on.
  """
  if not config.pipeline.tsp:  # rungs that have it fold all trained steps
    work = dataclasses.replace(work, pack=work.window)
  split = configured_split(config, work, devices)
  if auto_split.wanted(config, devices):
    choice = auto_split.compare(table, work, config.pipeline, devices)
    split = choice.best.split
  techniques = auto_split.techniques_of(config.pipeline)
  slots = config.pipeline.reward_slots
  rungs = {
    name: dataclasses.replace(rung, reward_slots=slots)
    for name, rung in RUNGS.items()
  }
  if devices == 1:
    techniques = dataclasses.replace(techniques, colocated=True)
    rungs = {"colocated": rungs["colocated"]}
  splits = best_splits(table, work, devices, rungs, most_lanes=most_lanes)
  return Plan(
    table=table,
    work=work,
    devices=devices,
    configured=predict(table, work, split, techniques),
    rungs=ladder(table, work, split, rungs),
    best=ladder(table, work, splits, rungs),
    assumed=assumed or (table.source,),
    steps=config.steps,
    price=price,
  )


def plan_text(plan: Plan) -> str:
  """A plan for a terminal."""
  work, configured = plan.work, plan.configured
  best = plan.best[plan.fastest]
  parts = [
    f"{plan.devices:,} devices; {work.samples:,} samples a step ({work.groups:,} "
    f"prompts × {work.group_size}), {work.window} steps of each trained",
    "costs:\n" + "\n".join(f"  {line}" for line in plan.assumed),
    *_memory(plan.table),
    f"as configured: {_describe(plan, configured)}",
    "ladder, split and unit sizes of the config:\n" + _text(plan.rungs),
    "ladder, each rung with the split that serves it best:\n"
    + _text(plan.best),
    f"best: {plan.fastest}, {_describe(plan, best)}\n  "
    + as_flags(best.split, best.techniques),
  ]
  return "\n\n".join(parts)


def _memory(table: CostTable) -> list[str]:
  """How many rows fit, where that is known."""
  roles = {"rollout": table.rollout, "trainer": table.trainer}
  if not all(role.max_rows for role in roles.values()):
    return []
  return [
    "memory: a Train unit may have "
    + ", ".join(
      f"{role.max_rows} rows on every {role.shards} of the {name} devices"
      if role.shards > 1
      else f"{role.max_rows} rows on each {name} device"
      for name, role in roles.items()
    )
  ]


def _text(rungs: Mapping[str, Prediction]) -> str:
  return ladder_text(*_ladder(rungs))


def _ladder(rungs: Mapping[str, Prediction]) -> tuple[dict[str, float], float]:
  seconds = {name: p.step_seconds for name, p in rungs.items()}
  return seconds, next(iter(rungs.values())).bound_seconds


def _describe(plan: Plan, prediction: Prediction) -> str:
  """Lanes, seconds, busy parts, and what the whole run takes."""
  split, whole = prediction.split, plan.steps * prediction.step_seconds
  if prediction.techniques.colocated:
    lanes = f"{split.devices} devices for both roles"
  else:
    lanes = f"{split.rollout} devices generate, {split.trainer} train"
    if split.rollout_lanes > 1:
      lanes += f" ({split.rollout_lanes} rollout lanes)"
  busy = prediction.busy
  low, high = min(busy.values()), max(busy.values())
  shown = ", ".join(f"{name} {part:.0%}" for name, part in busy.items())
  if len(busy) > 4:
    shown = f"{len(busy)} lanes, {low:.0%} to {high:.0%}"
  text = (
    f"{number(prediction.step_seconds)} s a step ({lanes}; busy: {shown}); "
    f"{format_seconds(whole)} for {plan.steps:,} steps"
  )
  if plan.price:
    cost = whole / 3600 * plan.devices * plan.price
    text += f", {cost:,.0f} at {plan.price:g} a device hour"
  return text


def as_flags(split: Split, techniques: Techniques) -> str:
  """Flags of `launch/train.py` that ask for a split and its techniques."""
  mode = "colocated" if techniques.colocated else "disaggregated"
  values = {
    "pipeline.mode": mode,
    "pipeline.gap": techniques.gap,
    "pipeline.tsp": techniques.tsp,
    "pipeline.tag": techniques.tag,
    "pipeline.rat": techniques.rat,
    "pipeline.tcss": techniques.tcss,
    "mesh.rollout": split.rollout,
    "mesh.trainer": split.trainer,
    "pipeline.generate_size": split.generate_size,
    "pipeline.train_size": split.train_size,
    "pipeline.timesteps_per_pack": split.pack,
  }
  return " ".join(f"--config.{name}={value}" for name, value in values.items())


def plan_dict(plan: Plan) -> dict[str, Any]:
  """A plan as plain values, for `plan.json`."""

  def rung(prediction: Prediction) -> dict[str, Any]:
    return {
      "step_seconds": prediction.step_seconds,
      "bound_seconds": prediction.bound_seconds,
      "busy_fraction": prediction.busy,
      "split": dataclasses.asdict(prediction.split),
      "techniques": dataclasses.asdict(prediction.techniques),
    }

  def rungs(predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    return {
      row["rung"]: rung(predictions[row["rung"]]) | row
      for row in ladder_rows(*_ladder(predictions))
    }

  return {
    "devices": plan.devices,
    "samples": plan.work.samples,
    "assumptions": list(plan.assumed),
    "configured": rung(plan.configured),
    "ladder": rungs(plan.rungs),
    "best": rungs(plan.best),
    "fastest": plan.fastest,
  }


def write_plan(plan: Plan, out: str | Path) -> None:
  """Writes plan.json, plan.html, timeline.json (best split) and costs.json."""
  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  write_text(out / "plan.json", json.dumps(plan_dict(plan), indent=2) + "\n")
  write_text(out / "plan.html", plan_page(plan))
  write_trace(out / "timeline.json", plan.best[plan.fastest].spans)
  write_table(out / "costs.json", plan.table)


def plan_page(plan: Plan) -> str:
  """A plan as a page: both ladders, and the timeline of every rung."""
  title = f"Plan for {plan.devices:,} devices"
  best = plan.best[plan.fastest]
  header = (
    f"<header><h1>{title}</h1><p>{plan.work.samples:,} samples a step · "
    f"{escape(plan.table.source)}</p></header>"
  )
  said = (
    f'<p class="note">{escape(_describe(plan, best))}</p>'
    f"<pre>{escape(as_flags(best.split, best.techniques))}</pre>"
  )
  lines = "".join(f"<li>{escape(line)}</li>" for line in plan.assumed)
  parts = (
    ("As configured", ladder_chart(*_ladder(plan.rungs)) + panels(plan.rungs)),
    (
      "Each rung with the split that serves it best",
      ladder_chart(*_ladder(plan.best)) + said + panels(plan.best),
    ),
    ("What the costs rest on", f'<ul class="facts">{lines}</ul>'),
  )
  return page(title, header + "".join(section(*part) for part in parts))


__all__ = [
  "Plan",
  "assumptions",
  "find_device",
  "job_of",
  "make_plan",
  "measured_table",
  "plan_text",
  "read_table",
  "write_plan",
]
