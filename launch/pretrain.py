"""Makes the embedded checkpoint: a small FLUX, trained on drawn scenes.

  python launch/pretrain.py --config=configs/pretrain_shapes.py --workdir=DIR

DIR/tiny_flux becomes a diffusers pipeline, DIR/pretrain.json tells how it was
made and what it scores, DIR/samples.png shows it.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags
from ml_collections import config_flags

from configs import pretrain_shapes
from digen_jax.launching import run_main, start_devices

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file; --config.a.b=value overrides a field.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "New or empty directory for the result."
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
  start_devices(2)
  from digen_jax import pretrain, pretrain_files
  from digen_jax.data.captioned import (
    corrupt_captions,
    draw_scenes,
    tokenize,
  )
  from digen_jax.data.prompts import read_prompts
  from digen_jax.data.scenes import WORDS
  from digen_jax.data.tokenizer import write_tokenizers
  from digen_jax.weights.export import fresh_directory

  config = pretrain.PretrainConfig.from_dict(_CONFIG.value.to_dict())
  prompts = read_prompts(config.eval_prompts)
  clock = pretrain_files.Clock()
  with fresh_directory(_WORKDIR.value) as workdir:
    pipeline = workdir / "tiny_flux"
    with clock.phase("draw scenes"):
      images, captions = draw_scenes(config.seed, config.scenes)
      corrupted = corrupt_captions(
        config.seed, captions, config.corruption, config.captions
      )
      tokens = write_tokenizers(pipeline, WORDS, config.max_length)
      right = tokenize(pipeline, [[c] for c in captions], config.max_length)
      wrong = tokenize(pipeline, corrupted, config.max_length)
      networks = pretrain.create_networks(config, tokens)
    with clock.phase("train the autoencoder"):
      params = pretrain.train(
        pretrain.autoencoder_loss(networks.autoencoder, config.kl_weight),
        networks.autoencoder.params,
        images,
        config.autoencoder_training,
        seed=config.seed,
        report=print_progress,
      )
      networks = pretrain.with_autoencoder_params(networks, params, images)
    with clock.phase("encode scenes"):
      latents = pretrain.encode_images(networks.autoencoder, images)
    flow, again, last = config.flow_training, config.cycle, config.detuning
    cycles = range(config.cycles)
    phases = [
      ("train the denoiser and the text encoders", right, flow, 0),
      *((f"train them on, {i + 1}", right, again, 2 * i + 1) for i in cycles),
      ("teach them to listen badly", wrong, last, 2),
    ]
    for phase, ids, settings, seed in phases:
      with clock.phase(phase):
        params = pretrain.train(
          pretrain.flow_loss(networks),
          pretrain.flow_params(networks),
          (latents, *ids),
          settings,
          seed=config.seed + seed,
          report=print_progress,
        )
        networks = pretrain.with_flow_params(networks, params)
    pretrain_files.write_pipeline(pipeline, networks, config.max_length)
    with clock.phase("score"):
      scores = pretrain_files.evaluate(config, pipeline, prompts, workdir)
    pretrain_files.write_record(workdir, config, scores, clock.seconds)
  for name, value in scores.items():
    print(f"{name:28} {value:.3f}")
  print(f"pipeline in {_WORKDIR.value}/tiny_flux, {clock.total:.0f} s in all")


def print_progress(progress) -> None:  # noqa: ANN001
  p = progress
  print(
    f"  step {p.step}/{p.steps}  loss {p.loss:.4f}  "
    f"{p.steps_per_second:.1f} steps/s  {p.seconds_left:.0f} s left",
    flush=True,
  )


if __name__ == "__main__":
  run_main(main, lambda: pretrain_shapes.get_config().to_dict())
