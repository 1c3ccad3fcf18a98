"""As tiny_shapes.py, for 45 minutes."""

from configs import tiny_shapes


def get_config():
  config = tiny_shapes.get_config()
  config.steps = 1200
  config.eval_every = 100
  config.checkpoint_every = 100
  return config
