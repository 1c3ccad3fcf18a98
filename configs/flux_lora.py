"""LoRA of FLUX.1-dev at 512 x 512, in bfloat16: Flow-GRPO's recipe for it.

  python launch/train.py --config=configs/flux_lora.py --workdir=DIR \
    --config.checkpoint=black-forest-labs/FLUX.1-dev \
    --config.prompts=prompts.txt --config.reward=my_rewards.py:score

Hyper-parameters are those that Flow-GRPO (arXiv 2505.05470) publishes for
FLUX.1-dev with PickScore: 48 groups of 24, 6 steps in training and 28 in
evaluation, guidance 3.5, rank 64. Not measured here; what a step takes on your
devices: `python launch/plan.py --config=... --device=H100 --model=flux-dev`.
"""

from digen_jax.config import default_config


def get_config():
  config = default_config()
  config.steps = 500
  config.eval_every = 20
  config.checkpoint_every = 20
  config.dtype.compute = "bfloat16"

  config.batch.prompts = 48
  config.batch.group_size = 24
  config.advantage.scope = "global"

  config.sampling.height = config.sampling.width = 512
  config.sampling.num_steps = 6
  config.sampling.kernel = "flow_sde"
  config.sampling.noise_level = 0.9
  config.sampling.embedded_guidance = 3.5

  config.train.lora_rank = 64
  config.train.lora_alpha = 128.0
  config.train.learning_rate = 3e-4
  config.train.weight_decay = 1e-4
  config.train.ema_decay = 0.9
  config.train.clip_range = 1e-4
  config.train.remat = "block"

  # Parts of a group: activations of so many pictures at a time.
  config.pipeline.generate_size = 12
  config.pipeline.train_size = 12
  config.pipeline.tag = config.pipeline.rat = True

  config.eval.num_steps = 28
  config.eval.batch_size = 12
  return config
