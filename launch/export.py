"""A run's policy for diffusers: its LoRA adapters, or a whole pipeline.

python launch/export.py --run=runs/first --out=exported [--merge]
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import run_main, start_devices

_RUN = flags.DEFINE_string("run", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; new or empty.")
_FORMAT = flags.DEFINE_enum(
  "format",
  None,
  ["lora", "pipeline"],
  "Adapters as one file, or a whole pipeline with adapters folded in; default: "
  "lora for a run that trained adapters.",
)
_MERGE = flags.DEFINE_bool("merge", False, "The same as --format=pipeline.")
flags.mark_flags_as_required(["run", "out"])


def main() -> None:
  start_devices(1)
  from digen_jax import jobs
  from digen_jax.errors import UserError

  if _MERGE.value and _FORMAT.value == "lora":
    raise UserError("--merge writes a pipeline: drop it or --format=lora")
  form = "pipeline" if _MERGE.value else _FORMAT.value
  print(jobs.export_run(_RUN.value, _OUT.value, form))


if __name__ == "__main__":
  run_main(main)
