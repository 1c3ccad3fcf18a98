"""Strict settings for the whole suite: eight devices, no silent promotion."""

import os

# More host threads than devices: fewer deadlock in XLA's CPU collectives.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from tests.small_run import write_prompts

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def prompts_file(tmp_path):
  """A prompt file of the embedded task."""
  return write_prompts(tmp_path)
