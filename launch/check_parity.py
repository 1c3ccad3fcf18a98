"""Checks our models against recorded outputs of their diffusers reference.

  python launch/check_parity.py --case=DIR --case=ANOTHER

A case is a diffusers module directory (config.json and safetensors) with
inputs.npz, outputs.npz and, if there, meta.json; or a recorded run of a whole
pipeline: pipeline/, trajectory.npz and meta.json, of which the latents after
every step and the pictures are compared. Prints one line an output; exits 1 if
any is out of tolerance.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import app, flags

from digen_jax import jobs
from digen_jax.errors import UserError
from digen_jax.weights import parity

_CASE = flags.DEFINE_multi_string("case", None, "A case's directory.")
flags.mark_flag_as_required("case")


def main(_: list[str]) -> None:
  passed = True
  try:
    for case in _CASE.value:
      recorded = (Path(case) / "pipeline").is_dir()
      check = jobs.check_recorded if recorded else parity.check_case
      for result in check(case):
        passed &= result.passed
        print(
          f"{Path(case).resolve().name} {result.output} "
          f"max_abs={result.max_abs:.2e} rel={result.relative:.2e} "
          f"tol={result.tolerance:.2e} {'PASS' if result.passed else 'FAIL'}",
          flush=True,
        )
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  sys.exit(not passed)


if __name__ == "__main__":
  app.run(main)
