"""Files that ship with the package: the embedded checkpoint and prompts."""

from pathlib import Path

from digen_jax.errors import UserError


def path(name: str) -> str:
  """Where an embedded file or directory lies.

  Raises:
    UserError: there is none of that name.
  """
  found = Path(__file__).parent / name
  if not found.exists():
    have = sorted(
      p.name for p in found.parent.iterdir() if not p.name.startswith("_")
    )
    raise UserError(f"no embedded asset {name!r}; there are {', '.join(have)}")
  return str(found)
