"""Images or videos from a diffusers pipeline directory or from a run.

  python launch/sample.py --checkpoint=runs/first --prompts=prompts.txt \\
    --out=pictures

A pipeline of a published model is sampled with that model's own settings where
no flag says otherwise, others at the `sample_size` of their autoencoder. The
sampler is deterministic; the noise of picture i follows from --seed and i.
With --inputs=FILE.npz in place of --prompts it starts from recorded noise and
embeddings (named as the arguments of the diffusers pipeline) and writes the
latents after every step to trajectory.npz.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import run_main, start_devices

_DEFAULT = "default: the run's, or what the published model is sampled with"
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Diffusers pipeline directory, or directory of a run."
)
_PROMPTS = flags.DEFINE_string("prompts", None, "Prompt file, one per line.")
_INPUTS = flags.DEFINE_string(
  "inputs", None, "Recorded noise and embeddings (.npz), in place of prompts."
)
_OUT = flags.DEFINE_string("out", None, "Directory for the pictures.")
_STEPS = flags.DEFINE_integer(
  "num_steps", None, f"Denoising steps; {_DEFAULT}."
)
_HEIGHT = flags.DEFINE_integer("height", None, f"Pixels; {_DEFAULT}.")
_WIDTH = flags.DEFINE_integer("width", None, f"Pixels; {_DEFAULT}.")
_FRAMES = flags.DEFINE_integer("num_frames", None, f"Of a video; {_DEFAULT}.")
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1
)
_REPEATS = flags.DEFINE_integer(
  "samples_per_prompt", 1, "Pictures a prompt.", lower_bound=1
)
_BATCH = flags.DEFINE_integer(
  "batch_size",
  None,
  "Samples made at once, rounded up to what the devices divide; default: the "
  "run's, or one for every copy of the model.",
)
_GUIDANCE = flags.DEFINE_float(
  "guidance_scale", None, f"Classifier-free guidance, 1 is off; {_DEFAULT}."
)
_EMBEDDED = flags.DEFINE_float(
  "embedded_guidance",
  None,
  f"Guidance fed to guidance-distilled models; {_DEFAULT}.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "What is computed in; default: the run's; of a pipeline, float32 on CPU and "
  "bfloat16 on accelerators.",
)
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt", None, "What classifier-free guidance leads away from."
)
_TILING = flags.DEFINE_integer(
  "vae_tiling",
  None,
  "Side of the tiles, in pixels, in which larger pictures are decoded, 0 is "
  f"whole; {_DEFAULT}.",
)
_FPS = flags.DEFINE_integer(
  "fps", None, "Frames per second of videos; default: the run's, or 16."
)
_LORA = flags.DEFINE_string(
  "lora", None, "LoRA file in diffusers' form, for a pipeline directory."
)
flags.mark_flags_as_required(["checkpoint", "out"])
flags.mark_flags_as_mutual_exclusive(["prompts", "inputs"], required=True)


def main() -> None:
  start_devices(1)
  from digen_jax import jobs

  sampling = {
    "height": _HEIGHT.value,
    "width": _WIDTH.value,
    "num_frames": _FRAMES.value,
    "guidance_scale": _GUIDANCE.value,
    "embedded_guidance": _EMBEDDED.value,
    "negative_prompt": _NEGATIVE.value,
  }
  evaluation = {
    "num_steps": _STEPS.value,
    "fps": _FPS.value,
    "batch_size": _BATCH.value,
  }
  dtype = {"compute": _DTYPE.value}
  overrides = {
    section: {k: v for k, v in values.items() if v is not None}
    for section, values in (
      ("sampling", sampling),
      ("eval", evaluation),
      ("dtype", dtype),
      ("vae", {"tiling": _TILING.value}),
    )
  }
  if _INPUTS.value:
    count = jobs.sample_recorded(
      _CHECKPOINT.value,
      _INPUTS.value,
      _OUT.value,
      overrides=overrides,
      lora=_LORA.value,
    )
    print(f"{count} pictures and trajectory.npz in {_OUT.value}")
    return
  count = jobs.sample_prompts(
    _CHECKPOINT.value,
    _PROMPTS.value,
    _OUT.value,
    overrides=overrides,
    seed=_SEED.value,
    samples_per_prompt=_REPEATS.value,
    lora=_LORA.value,
  )
  print(f"{count} pictures and grid.png in {_OUT.value}")


if __name__ == "__main__":
  run_main(main)
