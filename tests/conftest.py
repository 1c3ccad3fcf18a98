"""Settings of the whole suite: eight devices, no silent promotion."""

import gc
import os

# More host threads than devices: fewer deadlock in XLA's CPU collectives.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from tests.small_run import write_prompts

# What tests leave behind are programs, which live on: looking for garbage at
# the usual pace takes a twentieth of the time.
gc.set_threshold(20_000, 20, 50)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
  """Programs that several tests build are compiled once a session.

  What is loaded is the machine code that the compiler made, bit by bit. Only
  this process reads it: the tests kill those that they start, and JAX does not
  write entries atomically.
  """
  directory = tmp_path_factory.mktemp("compiled_programs")
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module")
def compiled_quickly():
  """For tests that compile more than they compute: machine code as it comes.

  What has to show in optimised programs, such as equal bits in rollout and
  training, is tested without this.
  """
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compiled_fully(compiled_quickly):
  """For a test among those, of what optimised programs compute."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def prompts_file(tmp_path):
  """A prompt file of the embedded task."""
  return write_prompts(tmp_path)
