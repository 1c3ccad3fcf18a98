"""The embedded task: GRPO on a small FLUX that listens badly, two meshes.

  python launch/train.py --config=configs/tiny_shapes.py --workdir=DIR

Measured on 2 cores of an Intel Xeon (jax 0.10.2, 1 + 1 devices), held-out
reward (384 prompts) before, and after 25, 50, 75 and 100 steps:

  seed 0  0.305  0.540  0.673  0.694  0.694   7 min 59 s, installation included
  seed 1  0.305  0.521  0.636  0.679  0.686   8 min 14 s, other work beside it
  seed 2  0.305  0.537  0.628  0.653  0.657   7 min 47 s, other work beside it
"""

from digen_jax import assets
from digen_jax.config import default_config


def get_config():
  config = default_config()
  config.steps = 100
  config.checkpoint = assets.path("tiny_flux")
  config.prompts = assets.path("prompts_train.txt")
  config.reward = "shapes"
  config.eval_every = 25
  config.checkpoint_every = 25
  config.devices = 2

  config.batch.prompts = 24
  config.batch.group_size = 16

  config.sampling.num_steps = 8
  config.sampling.kernel = "flow_sde"
  config.sampling.noise_level = 0.9
  config.sampling.window = 2
  config.sampling.window_first = 5
  # Rewards of a group then differ by what the window drew, and by nothing
  # else.
  config.sampling.shared_noise = True

  config.train.learning_rate = 4e-4
  config.train.schedule = "cosine"
  config.train.updates_per_batch = 2
  config.train.adam_b2 = 0.99
  config.train.ema_decay = 0.9
  config.train.weight_by_noise = True
  config.train.clip_range = 1e-3
  config.train.remat = "dots"  # on a CPU writing residuals costs more

  config.pipeline.tag = config.pipeline.rat = True
  # Four groups fill a core better than one, and still make a pipeline.
  config.pipeline.generate_size = 64
  config.pipeline.train_size = 64

  config.eval.prompts = assets.path("prompts_heldout.txt")
  config.eval.num_prompts = 384
  config.eval.num_steps = 10
  return config
