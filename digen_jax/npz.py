"""Reading NumPy's `.npz` archives that others wrote."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from digen_jax.errors import UserError


def read_npz(
  file: str | Path, wanted: Callable[[str], bool] | None = None
) -> dict[str, np.ndarray]:
  """The arrays of an archive, by name.

  Args:
    file: an `.npz` file.
    wanted: which names to read; None means all.

  Raises:
    UserError: no such file, another kind of file, or a damaged one.
  """
  damaged = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
  try:
    with open(file, "rb") as stream:  # NumPy does not close what is damaged
      archive = np.load(stream, allow_pickle=False)
      if isinstance(archive, np.ndarray):
        raise ValueError("it holds a single array; write it with numpy.savez")
      names = filter(wanted, archive.files) if wanted else archive.files
      return {name: archive[name] for name in names}
  except damaged as error:
    reason = " ".join(str(error).split())
    raise UserError(f"cannot read {file}: {reason}") from error
