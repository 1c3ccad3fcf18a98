"""Encodes a prompt file once, for all runs that train or sample with it.

  python launch/encode_prompts.py --checkpoint=path/to/pipeline \\
    --prompts=prompts.txt --out=embeddings

Kill it whenever you like: the same command goes on. A run uses the set with
--config.embeddings=embeddings, if its encoder and settings are the same.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags

from digen_jax.launching import run_main, start_devices

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Diffusers pipeline directory, or its id on the hub."
)
_PROMPTS = flags.DEFINE_multi_string(
  "prompts", None, "Prompt file, one per line; may be given several times."
)
_OUT = flags.DEFINE_string("out", None, "Directory of the set.")
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt", "", "Encoded too, for classifier-free guidance."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  ("float32", "bfloat16"),
  "Of encoders and embeddings; a run wants that of its config.dtype.compute.",
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  0,
  "Tokens that prompts are padded or cut to; 0: as the family's pipeline does.",
  lower_bound=0,
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Prompts at once.", lower_bound=1
)
_TENSOR = flags.DEFINE_integer(
  "tensor",
  1,
  "Devices that an encoder is split over; the rest split the batch.",
  lower_bound=1,
)
flags.mark_flags_as_required(["checkpoint", "prompts", "out"])


def main() -> None:
  start_devices(1)
  import jax

  from digen_jax.data.embeddings import cached_embeddings
  from digen_jax.data.prompt_encoder import load_prompt_encoder
  from digen_jax.data.prompts import read_prompts
  from digen_jax.errors import UserError
  from digen_jax.metrics import pace_reporter
  from digen_jax.parallel.mesh import make_mesh

  devices, tensor = jax.devices(), _TENSOR.value
  if len(devices) % tensor:
    raise UserError(
      f"--tensor={tensor} does not divide the {len(devices)} devices"
    )
  mesh = make_mesh({"data": len(devices) // tensor, "tensor": tensor}, devices)
  prompts = [text for file in _PROMPTS.value for text in read_prompts(file)]
  count = len(set(prompts))
  prompts.append(_NEGATIVE.value)
  encoder = load_prompt_encoder(
    _CHECKPOINT.value,
    dtype=_DTYPE.value,
    max_length=_MAX_LENGTH.value or None,
    batch_size=_BATCH_SIZE.value,
    mesh=mesh,
  )
  cached_embeddings(
    encoder, prompts, _OUT.value, pace_reporter("encoded prompts")
  )
  print(f"{count} prompts and the negative one in {_OUT.value}")


if __name__ == "__main__":
  run_main(main)
