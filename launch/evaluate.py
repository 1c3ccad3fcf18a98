"""Reward of the base and the trained policy, same prompts, same noise.

python launch/evaluate.py --run=runs/first --prompts=held_out.txt
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import run_main, start_devices

_RUN = flags.DEFINE_string("run", None, "Directory of the run.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Prompt file, one per line.")
_OUT = flags.DEFINE_string(
  "out", None, "Directory for the results; default: RUN/evaluation."
)
_STEPS = flags.DEFINE_integer(
  "num_steps", None, "Denoising steps; default: the run's."
)
flags.mark_flags_as_required(["run", "prompts"])


def main() -> None:
  start_devices(1)
  from digen_jax import jobs

  base, trained = jobs.evaluate_run(
    _RUN.value, _PROMPTS.value, _OUT.value, _STEPS.value
  )
  print(jobs.table(base, trained))
  print(f"pictures: {_OUT.value or _RUN.value + '/evaluation'}")


if __name__ == "__main__":
  run_main(main)
