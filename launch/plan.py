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

import dataclasses
import math
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
  "model",
  "",
  "--device: a published model, in place of config.checkpoint; size, frames and "
  "guidance are its own where the config has the default.",
)
_MFU = flags.DEFINE_float(
  "mfu", None, "--device: part of the peak that denoising and training reach."
)
_DEVICES = flags.DEFINE_integer(
  "devices",
  None,
  "Number of devices; default: those that were measured, or config.devices.",
)
_LANES = flags.DEFINE_integer(
  "rollout_lanes", 1, "Lanes the rollout devices may be divided among."
)
_PRICE = flags.DEFINE_float("price", 0.0, "Of a device for an hour.")
_OUT = flags.DEFINE_string("out", None, "Directory for page, JSON, timeline.")
flags.mark_flags_as_mutual_exclusive(["costs", "timeline", "device"])


def main() -> None:
  from digen_jax import assemble, plan_basis, planning

  _check_flags()
  if _OUT.value:
    planning.check_out(_OUT.value)
  config = _CONFIG.get()
  plan_basis.row_axes(config, "rollout")  # told before anything is measured
  if _DEVICE.value:
    kinds = [_device(name) for name in (_DEVICE.value, _TRAINER.value) if name]
    devices = _DEVICES.value or config.devices
    basis = plan_basis.from_ledgers(
      config, kinds[0], kinds[-1], devices, _MODEL.value
    )
  elif _COSTS.value:
    basis = plan_basis.from_file(config, _COSTS.value)
  elif _TIMELINE.value:
    basis = plan_basis.from_timeline(config, _TIMELINE.value)
  else:
    basis = _measured(config)
  plan = planning.make_plan(
    config,
    assemble.workload(config),
    basis,
    _DEVICES.value or basis.devices or config.devices,
    most_lanes=_LANES.value,
    price=_PRICE.value,
  )
  print(planning.plan_text(plan))
  if _OUT.value:
    planning.write_plan(plan, _OUT.value)
    print(f"\nwritten: {_OUT.value}/plan.html, plan.json, timeline.json, "
          "costs.json")  # fmt: skip


def _check_flags() -> None:
  """Raises UserError for flags that would do nothing, or cannot be."""
  from digen_jax.errors import UserError

  for flag in (_MODEL, _MFU, _TRAINER):
    if flag.value not in (None, "") and not _DEVICE.value:
      raise UserError(
        f"--{flag.name}={flag.value} does nothing without --device: name the "
        "kind of device to plan for, such as --device=H100"
      )
  for flag in (_DEVICES, _LANES):
    if flag.value is not None and flag.value < 1:
      raise UserError(f"--{flag.name}={flag.value} must be at least 1")
  if _MFU.value is not None and not 0 < _MFU.value <= 1:
    raise UserError(
      f"--mfu={_MFU.value:g} is a part of the peak, above 0 and at most 1: "
      "give 0.4 for 40 %"
    )
  if not 0 <= _PRICE.value < math.inf:
    raise UserError(
      f"--price={_PRICE.value:g} is what a device costs an hour: give 0 or more"
    )


def _device(name):  # noqa: ANN001, ANN202
  """A kind of device, as fast as --mfu says."""
  from digen_jax import plan_basis

  kind = plan_basis.find_device(name)
  if _MFU.value is None:
    return kind
  return dataclasses.replace(kind, generate=_MFU.value, train=_MFU.value)


def _measured(config):  # noqa: ANN001, ANN202
  """Costs of units that run here once the run is placed."""
  import tempfile

  from digen_jax import auto_split, plan_basis, run_files, training
  from digen_jax.launching import start_run_devices
  from digen_jax.parallel.mesh import row_devices
  from digen_jax.pipeline.cost_table import table_from_measured

  start_run_devices(config)
  with tempfile.TemporaryDirectory() as workdir:
    run = training.Run(config, workdir, resume=False)
    measured = run.measure()
    run.close()
  hardware = run.hardware
  kinds = {name: lane.device_kind for name, lane in hardware.items()}
  where = f"{run_files.describe(hardware)}; {', '.join(set(kinds.values()))}"
  return plan_basis.Basis(
    table_from_measured(
      measured,
      {name: lane.size for name, lane in hardware.items()},
      shards={n: row_devices(lane.shape) for n, lane in hardware.items()},
      sequence={n: lane.shape["sequence"] for n, lane in hardware.items()},
      roles={name: plan_basis.role_of(name) for name in hardware},
      source="measured here",
    ),
    assumed=(f"measured here: {where}", auto_split.NOT_MEASURED),
    flops=run.flops,
    peaks=plan_basis.peaks_of(kinds),
    apart=len(set(kinds.values())) > 1,
    devices=sum(lane.size for lane in hardware.values()),
  )


if __name__ == "__main__":
  run_main(main)
