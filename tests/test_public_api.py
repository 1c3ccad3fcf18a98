"""What a user imports, and the example of the README."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest

import digen_jax as dj


def test_import_is_light():
  heavy = (
    "torch ray orbax ml_collections transformers absl flax optax diffusers PIL"
  )
  code = (
    "import sys, digen_jax; "
    f"print([m for m in {heavy.split()} if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
  for name in dj.__all__:
    assert getattr(dj, name).__doc__, name
  with pytest.raises(AttributeError, match="no attribute 'flow_sdee'"):
    dj.flow_sdee  # noqa: B018


def test_load_model_is_that_of_the_weights_package():
  from digen_jax.weights import load

  assert dj.load_model is load.load_model


def test_the_example_of_the_readme_learns(capsys):
  readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
  (example,) = [
    block
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    if "import digen_jax" in block
  ]
  with jax.numpy_dtype_promotion("standard"):  # as it is by default
    exec(compile(example, "README.md", "exec"), {})
  rewards = re.findall(r"reward (-?[\d.]+)", capsys.readouterr().out)
  assert float(rewards[0]) < 0.1
  assert float(rewards[-1]) > 0.5
