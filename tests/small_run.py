"""A run of a few samples, shared by the tests of whole runs."""

import jax
import numpy as np

from digen_jax import assets
from digen_jax.config import default_config

PROMPTS = (
  "two red circles left of a blue square",
  "three green squares",
  "a red circle above a green triangle",
)


def write_prompts(folder):
  """A prompt file in `folder`."""
  file = folder / "prompts.txt"
  file.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
  return file


def small_config(prompts_file):
  """A few samples of the embedded checkpoint; discrete reward."""
  config = default_config()
  config.steps = 3
  config.checkpoint = assets.path("tiny_flux")
  config.prompts = str(prompts_file)
  config.reward = "shapes"
  config.batch.prompts, config.batch.group_size = 2, 8
  config.sampling.num_steps, config.sampling.noise_level = 5, 0.9
  config.sampling.window, config.sampling.window_first = 2, 3
  config.train.learning_rate = 2e-4
  config.train.kl_weight, config.train.ema_decay = 0.003, 0.9
  config.train.clip_range = 1e-3
  config.eval.num_prompts, config.eval.num_steps = 2, 4
  config.mesh.rollout, config.mesh.trainer = 1, 1
  return config


def distance(a, b):
  """Norm of the difference of two trees, relative to that of the first."""
  a, b = (
    np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(t)])
    for t in (a, b)
  )
  return np.linalg.norm(a - b) / np.linalg.norm(a)
