"""What a run would take: seconds a step, the ladder, the best split.

  python launch/plan.py --config=configs/X.py --timeline=runs/first/timeline.json
  python launch/plan.py --config=configs/X.py --costs=costs.json --devices=64
  python launch/plan.py --config=configs/X.py --device=H100 --devices=32 \\
    --model=wan2.1-14b --price=2.5

Nothing runs: units cost what an earlier run measured (--timeline), what a file
says (--costs), or what FLOPs and figures of a device come to (--device). With
--out it leaves plan.html, plan.json, timeline.json and costs.json there.
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
flags.mark_flags_as_mutual_exclusive(
  ["costs", "timeline", "device"], required=True
)


def main() -> None:
  from digen_jax import assemble, planning
  from digen_jax.errors import UserError

  config = _CONFIG.get()
  devices = config.devices if _DEVICES.value is None else _DEVICES.value
  if devices < 1:
    raise UserError(f"--devices={devices}: a plan needs at least one")
  if _DEVICE.value:
    table, assumed = _ledger(config, devices)
  else:
    if _COSTS.value:
      table = planning.read_table(_COSTS.value)
    else:
      table = planning.measured_table(_TIMELINE.value)
    assumed = ()
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


def _ledger(config, devices):  # noqa: ANN001, ANN202
  import dataclasses

  from digen_jax import planning
  from digen_jax.device_costs import ledger_table

  kinds = [
    planning.find_device(name)
    for name in (_DEVICE.value, _TRAINER.value or _DEVICE.value)
  ]
  if _MFU.value is not None:
    parts = dict(generate=_MFU.value, train=_MFU.value)
    kinds = [dataclasses.replace(kind, **parts) for kind in kinds]
  job = planning.job_of(config, _MODEL.value)
  table = ledger_table(job, *kinds, devices)
  return table, tuple(planning.assumptions(job, kinds))


if __name__ == "__main__":
  run_main(main)
