"""The embedded task."""

from digen_jax import assets
from digen_jax.config import default_config


def get_config():
  config = default_config()
  config.steps = 200
  config.checkpoint = assets.path("tiny_flux")
  config.prompts = assets.path("prompts_train.txt")
  config.reward = "shapes"
  config.eval_every = 50
  config.checkpoint_every = 50
  config.devices = 2

  config.batch.prompts = 24
  config.batch.group_size = 16

  config.sampling.num_steps = 8
  config.sampling.kernel = "flow_sde"
  config.sampling.noise_level = 0.9
  config.sampling.window = 2
  config.sampling.window_first = 5

  config.train.learning_rate = 2e-4
  config.train.adam_b2 = 0.99
  config.train.ema_decay = 0.9
  config.train.kl_weight = 0.003
  config.train.clip_range = 1e-3

  config.eval.prompts = assets.path("prompts_heldout.txt")
  config.eval.num_prompts = 96
  config.eval.num_steps = 10
  return config
