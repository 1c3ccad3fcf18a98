"""The embedded checkpoint: a small FLUX on drawn shapes.

python launch/pretrain.py --config=configs/pretrain_shapes.py --workdir=DIR
"""

import ml_collections

from digen_jax import assets


def get_config():
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      scenes=36_000,
      captions=4,
      corruption=0.54,
      max_length=10,
      kl_weight=3e-5,
      autoencoder=dict(
        block_out_channels=(16, 16, 32),
        norm_num_groups=8,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
      ),
      transformer=dict(
        num_layers=1,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
        axes_dims_rope=(4, 14, 14),
      ),
      clip=dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
      ),
      t5=dict(
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
      ),
      autoencoder_training=dict(steps=1200, batch=16, learning_rate=4e-3),
      flow_training=dict(
        steps=16_000, batch=32, learning_rate=3e-3, warmup=100, ema=0.995
      ),
      cycle=dict(
        steps=15_000, batch=32, learning_rate=3e-3, warmup=100, ema=0.995
      ),
      cycles=2,
      detuning=dict(
        steps=300, batch=32, learning_rate=1e-3, warmup=20, ema=0.99
      ),
      eval_prompts=assets.path("prompts_heldout.txt"),
      eval_steps=10,
    )
  )
