"""Checkpoints by their name on the Hugging Face hub, where there is a network.

Every loader that takes a checkpoint's path asks `local_checkpoint` first.
"""

import functools
import re
from pathlib import Path

from digen_jax.errors import UserError

# owner/name, or owner/name@revision.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Configurations, tokenizers, and the weights of a module or of a pipeline's
# components: no pickles, no code, and not the single files that often lie
# beside a pipeline, or in a folder of it. `*` matches slashes too.
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PATTERNS = (
  *("*.json", "*.txt", "*.model"),
  *("diffusion_pytorch_model*.safetensors", "model*.safetensors"),
  *(
    f"{d}/diffusion_pytorch_model*.safetensors" for d in ("transformer", "vae")
  ),
  *(f"{d}/model*.safetensors" for d in ENCODERS),
)
# The same weights in other precisions.
IGNORED = ("*.fp16*.safetensors", "*.non_ema*.safetensors")


def local_checkpoint(path: str | Path) -> Path:
  """Where a checkpoint lies on this machine, downloaded if it must be.

  Args:
    path: a directory, or a hub id "owner/name", with "@revision" for another
      revision than the newest. What exists here is never looked up.

  Raises:
    UserError: neither, or the hub cannot be reached and has not been before.
  """
  name, path = str(path), Path(path)
  if path.is_dir():
    return path
  if path.exists() or not HUB_ID.fullmatch(name):
    raise UserError(f"checkpoint directory {name} does not exist")
  return _download(name)


def pinned(name: str) -> str:
  """A hub id with the commit it stands for now, as "owner/name@commit".

  Its files are always the same. A directory of this machine is handed back.

  Args:
    name: see `local_checkpoint`.

  Raises:
    UserError: as `local_checkpoint`.
  """
  found = local_checkpoint(name)
  # A snapshot's directory is named by its commit.
  if Path(name).is_dir() or not COMMIT.fullmatch(found.name):
    return name
  return f"{name.partition('@')[0]}@{found.name}"


@functools.cache
def _download(name: str) -> Path:
  """The directory of a hub id; a process asks for each but once."""
  try:
    import huggingface_hub
  except ImportError as error:
    raise UserError(
      f"checkpoint directory {name} does not exist, and to get it from the "
      "hub needs a package: pip install huggingface_hub"
    ) from error
  repository, _, revision = name.partition("@")
  try:
    found = huggingface_hub.snapshot_download(
      repository,
      revision=revision or None,
      allow_patterns=list(PATTERNS),
      ignore_patterns=list(IGNORED),
    )
  # Connection, permission, disk: the hub's client raises what they lead to.
  except Exception as error:
    reason = " ".join(str(error).split())
    raise UserError(
      f"checkpoint directory {name} does not exist, and the hub did not give "
      f"{repository} ({type(error).__name__}: {reason}); check the name, the "
      "network and, for gated models, `hf auth login`"
    ) from error
  return Path(found)
