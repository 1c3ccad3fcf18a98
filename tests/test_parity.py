"""Cases of recorded inputs and outputs, and the command that checks them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from digen_jax.errors import UserError
from digen_jax.weights import parity
from tests import references

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def write_case(directory, outputs, inputs):
  np.savez(directory / "inputs.npz", **inputs)
  np.savez(directory / "outputs.npz", **outputs)


def test_parity_of_an_autoencoder_case(tmp_path):
  reference = references.autoencoder(seed=3)
  reference.save_pretrained(tmp_path)
  inputs = {"sample": references.normal(0, 2, 3, 12, 8)}
  inputs |= {"z": references.normal(1, 1, 4, 3, 5)}
  inputs |= {"z_one": references.normal(2, 1, 4, 2, 2)}
  posterior = reference.encode(torch.from_numpy(inputs["sample"])).latent_dist
  decoded = {
    key: reference.decode(torch.from_numpy(inputs[key])).sample.numpy()
    for key in ("z", "z_one")
  }
  outputs = {
    "encode.parameters": posterior.parameters.numpy(),
    "encode.mean": posterior.mean.numpy(),
    "encode.logvar": posterior.logvar.numpy(),
    "encode.std": posterior.std.numpy(),
    "decode": decoded["z"],
    "decode:z_one": decoded["z_one"] + 3e-5,
    "decode:tiled": decoded["z"],
    "forward_mode": reference(
      torch.from_numpy(inputs["sample"])
    ).sample.numpy(),
    "sliced": decoded["z"],
  }
  write_case(tmp_path, outputs, inputs)
  results = {r.output: r for r in parity.check_case(tmp_path)}
  assert list(results) == list(outputs)[:-1]
  assert [r.output for r in results.values() if not r.passed] == [
    "decode:z_one"
  ]
  np.testing.assert_allclose(results["decode:z_one"].max_abs, 3e-5, rtol=0.2)

  meta = {"fp32_vs_fp64": {"decode:z_one": {"max_abs": 5e-6}}}
  (tmp_path / "meta.json").write_text(json.dumps(meta))
  assert all(r.passed for r in parity.check_case(tmp_path))
  write_case(tmp_path, {"decode": np.full((1, 3, 6, 10), np.nan)}, inputs)
  assert not parity.check_case(tmp_path)[0].passed
  write_case(tmp_path, {"decode": decoded["z"][:, :, 1:]}, inputs)
  assert parity.check_case(tmp_path)[0].max_abs == np.inf
  write_case(tmp_path, {"decode": decoded["z"]}, {})
  with pytest.raises(UserError, match="lacks 'z'"):
    parity.check_case(tmp_path)
  write_case(tmp_path, {"sliced": decoded["z"]}, inputs)
  with pytest.raises(UserError, match="nothing to compare"):
    parity.check_case(tmp_path)


def test_tolerance():
  meta = {
    "fp32_vs_fp64": {"a": {"max_abs": 1e-6}, "b": {"max_abs": 1e-5}},
    "time_table_ulp_sens": {"c": 1e-5},
  }
  tolerances = [parity.tolerance(name, meta) for name in "abcd"]
  np.testing.assert_allclose(tolerances, [2e-5, 8e-5, 4e-5, 2e-5])


def test_check_parity_command(tmp_path):
  reference, copy = references.flux(seed=7), tmp_path / "transformer"
  reference.save_pretrained(copy)
  inputs = references.flux_inputs(1, 2, (3, 2), 4, guidance=True)
  sample = references.run_flux(reference, inputs)
  write_case(copy, {"sample": sample}, inputs)
  meta = {"time_table_ulp_sens": {"sample": 1e-5}}
  (copy / "meta.json").write_text(json.dumps(meta))
  bad = shutil.copytree(copy, tmp_path / "bad")
  write_case(bad, {"sample": sample + 1e-3}, inputs)
  script = Path(__file__).parents[1] / "launch" / "check_parity.py"

  def run(*cases):
    return subprocess.run(
      [sys.executable, script, *(f"--case={case}" for case in cases)],
      capture_output=True,
      text=True,
      cwd=script.parents[1],
      env=os.environ | {"PYTHONPATH": str(script.parents[1])},
    )

  result = run(copy, bad)
  first, second = result.stdout.splitlines()
  assert first.startswith("transformer sample max_abs=")
  assert " rel=" in first
  assert first.endswith("tol=4.00e-05 PASS")
  assert second.startswith("bad sample max_abs=1.0")
  assert second.endswith("FAIL")
  assert result.returncode == 1
  result = run(tmp_path / "nowhere")
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1
  assert "nowhere does not exist" in result.stderr
