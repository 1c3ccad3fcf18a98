"""Files that are replaced as a whole, or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
  """A path to write to instead; on leaving, what is there becomes `path`.

  A kill or an exception leaves `path` as it was. The content is on disk before
  the name points to it.

    with replacing("report.html") as path:
      path.write_text(page)
  """
  path = Path(path)
  # Processes of other hosts, which may have the same number, write here too.
  token = f"{os.getpid()}-{secrets.token_hex(4)}"
  temporary = path.with_name(f".{path.name}.{token}.tmp")
  try:
    yield temporary
    with open(temporary, "rb+") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
  """Replaces the content of a UTF-8 file."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8", newline="\n")
