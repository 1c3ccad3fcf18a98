"""Trains a model with GRPO, resuming by itself what is in the workdir.

  python launch/train.py --config=configs/tiny_shapes.py --workdir=runs/first

Any field of the config can be overridden: --config.train.learning_rate=1e-4
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import config_flag, run_main, start_run_devices

_CONFIG = config_flag()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; an earlier run in it is resumed."
)
flags.mark_flag_as_required("workdir")


def main() -> None:
  config = _CONFIG.get()
  start_run_devices(config)
  from digen_jax import training

  result = training.train(config, _WORKDIR.value)
  before, after = result["before"], result["after"]
  workdir = _WORKDIR.value
  lanes = f"lanes        {result['lanes']}\n" if result["lanes"] else ""
  print(
    f"\n{result['label']} reward {before:.3f} -> {after:.3f} "
    f"({after - before:+.3f})\n"
    f"{lanes}"
    f"report       {workdir}/report.html\n"
    f"pictures     {workdir}/samples/\n"
    f"checkpoints  {workdir}/checkpoints/\n"
    "the same command resumes; --config.steps=… trains longer"
  )


if __name__ == "__main__":
  run_main(main)
