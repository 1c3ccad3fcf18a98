"""What a run would take: seconds a step, the ladder, the best split.

  python launch/plan.py --config=configs/X.py --timeline=runs/first/timeline.json
  python launch/plan.py --config=configs/X.py --costs=costs.json --devices=64
  python launch/plan.py --config=configs/X.py --device=H100 --devices=32 \\
    --model=wan2.1-14b --price=2.5

Units cost what an earlier run measured (--timeline), what a file says (--costs),
or what FLOPs and figures of a device come to (--device). With none of these a
unit of each kind is measured here, on the devices of the config. With --out it
leaves plan.html, plan.json, timeline.json and costs.json there.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import config_flag, run_main

_CONFIG = config_flag()
_COSTS = flags.DEFINE_string("costs", None, "Cost table, JSON.")
_TIMELINE = flags.DEFINE_string(
  "timeline", None, "timeline.json of an earlier run, whose costs are used."
)
_DEVICE = flags.DEFINE_string(
  "device", None, "Kind of device (H100, TPU v5p, ...), costs from ledgers."
)
_TRAINER = flags.DEFINE_string(
  "trainer_device", None, "--device: kind of the trainer's, if another."
)
_MODEL = flags.DEFINE_string(
  "model", "", "--device: a published model, in place of config.checkpoint."
)
_MFU = flags.DEFINE_float(
  "mfu", None, "--device: part of the peak that denoising and training reach."
)
_DEVICES = flags.DEFINE_integer(
  "devices", None, "Number of devices; default: config.devices."
)
_LANES = flags.DEFINE_integer(
  "rollout_lanes", 1, "Lanes the rollout devices may be divided among."
)
_PRICE = flags.DEFINE_float("price", 0.0, "Of a device for an hour.")
_OUT = flags.DEFINE_string("out", None, "Directory for page, JSON, timeline.")
flags.mark_flags_as_mutual_exclusive(["costs", "timeline", "device"])


def main() -> None:
  from digen_jax import assemble, planning
  from digen_jax.errors import UserError

  config = _CONFIG.get()
  devices = config.devices if _DEVICES.value is None else _DEVICES.value
  if devices < 1:
    raise UserError(f"--devices={devices}: a plan needs at least one")
  if _DEVICE.value:
    table, assumed = _ledger(config, devices)
  elif _COSTS.value:
    table, assumed = planning.read_table(_COSTS.value), ()
  elif _TIMELINE.value:
    table, assumed = planning.measured_table(_TIMELINE.value), ()
  else:
    table, assumed = _measured(config), NOT_MEASURED
  plan = planning.make_plan(
    config,
    assemble.workload(config),
    table,
    devices,
    most_lanes=_LANES.value,
    price=_PRICE.value,
    assumed=assumed,
  )
  print(planning.plan_text(plan))
  if _OUT.value:
    planning.write_plan(plan, _OUT.value)
    print(f"\nwritten: {_OUT.value}/plan.html, plan.json, timeline.json, "
          "costs.json")  # fmt: skip


NOT_MEASURED = ("the optimiser and the publish cost nothing",)


def _measured(config):  # noqa: ANN001, ANN202
  """Costs of units that run here once the run is placed."""
  import math
  import tempfile

  from digen_jax import training
  from digen_jax.launching import start_devices
  from digen_jax.pipeline.cost_table import table_from_measured

  start_devices(config.devices)
  with tempfile.TemporaryDirectory() as workdir:
    run = training.Run(config, workdir)
    measured = run.measure()
    run.close()
  meshes = {name: lane.shape for name, lane in run.hardware.items()}
  return table_from_measured(
    measured,
    {name: math.prod(mesh.values()) for name, mesh in meshes.items()},
    shards={name: mesh.get("tensor", 1) for name, mesh in meshes.items()},
    roles={name: name for name in meshes},
    source="measured here",
  )


def _ledger(config, devices):  # noqa: ANN001, ANN202
  import dataclasses

  from digen_jax import planning
  from digen_jax.device_costs import ledger_table
  from digen_jax.models.published import find_model

  kinds = [
    planning.find_device(name)
    for name in (_DEVICE.value, _TRAINER.value or _DEVICE.value)
  ]
  if _MFU.value is not None:
    parts = dict(generate=_MFU.value, train=_MFU.value)
    kinds = [dataclasses.replace(kind, **parts) for kind in kinds]
  sampling = config.sampling
  if _MODEL.value:  # a config of another model knows nothing of its size
    settings = find_model(_MODEL.value).settings
    names = ("height", "width", "num_frames", "guidance_scale")
    own = {name: getattr(settings, name) for name in names}
    sampling = dataclasses.replace(sampling, **own)
    config = dataclasses.replace(config, sampling=sampling)
  size = f"{sampling.num_frames} x {sampling.height} x {sampling.width}"
  job = planning.job_of(config, _MODEL.value)
  table = ledger_table(job, *kinds, devices)
  assumed = [
    f"frames x height x width: {size}; guidance {sampling.guidance_scale}",
    *planning.assumptions(job, kinds),
  ]
  return table, tuple(assumed)


if __name__ == "__main__":
  run_main(main)
