"""A run's policy as a diffusers pipeline directory.

python launch/export.py --run=runs/first --out=exported [--merge]
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import run_main, start_devices

_RUN = flags.DEFINE_string("run", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; new or empty.")
_MERGE = flags.DEFINE_bool(
  "merge", False, "Fold LoRA adapters into the weights they adapt."
)
flags.mark_flags_as_required(["run", "out"])


def main() -> None:
  start_devices(1)
  from digen_jax import jobs

  jobs.export_run(_RUN.value, _OUT.value, _MERGE.value)
  print(
    f"wrote {_OUT.value}; in diffusers: "
    f"DiffusionPipeline.from_pretrained({_OUT.value!r})"
  )


if __name__ == "__main__":
  run_main(main)
