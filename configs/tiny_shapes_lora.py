"""As tiny_shapes.py, but LoRA adapters are trained instead of every parameter.

Not measured yet on the checkpoint that ships.
"""

from configs import tiny_shapes


def get_config():
  config = tiny_shapes.get_config()
  config.train.lora_rank = 16
  config.train.lora_alpha = 32.0
  config.train.learning_rate = 1e-3
  return config
