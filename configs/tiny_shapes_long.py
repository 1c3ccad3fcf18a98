"""As tiny_shapes.py, for 45 minutes or so.

Not measured yet on the checkpoint that ships.
"""

from configs import tiny_shapes


def get_config():
  config = tiny_shapes.get_config()
  config.steps = 500
  config.eval_every = 100
  config.checkpoint_every = 100
  return config
