"""How a program ends: one line, and a status."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from digen_jax import launching
from digen_jax.errors import UserError
from digen_jax.pipeline.execute import UnitError
from digen_jax.pipeline.units import Kind, Unit

ROOT = Path(__file__).parents[1]


class Ended(Exception):
  pass


@pytest.fixture
def ended(monkeypatch):
  told = []

  def fail(message, status=launching.EXIT_BAD_INPUT):
    told.append((message, status))
    raise Ended

  monkeypatch.setattr(launching, "_fail", fail)
  return told


MEMORY = "RESOURCE_EXHAUSTED: 12 GiB are missing\n" + "allocated: 1\n" * 99


@pytest.mark.parametrize(
  ("error", "status", "words"),
  [
    (UserError("mend it"), launching.EXIT_BAD_INPUT, "mend it"),
    (KeyboardInterrupt(), 130, "goes on from its last checkpoint"),
    (PermissionError("no entry"), 1, "PermissionError: no entry"),
    (OSError(28, "No space left on device"), 1, "disk is full"),
    (Exception("I/O error: No space left on device (28)"), 1, "disk is full"),
    (
      ValueError("RESOURCE_EXHAUSTED: writing x: No space left on device"),
      1,
      "disk is full",
    ),
    (RuntimeError(MEMORY), 1, "12 GiB are missing.*generate_size"),
    (
      UnitError("trainer", Unit(Kind.TRAIN, 3, 0, 8), RuntimeError(MEMORY)),
      1,
      "train unit of samples 0:8 .*train_size",
    ),
  ],
)
def test_what_went_wrong_is_told_in_a_line(error, status, words, ended):
  def main():
    raise error

  if isinstance(error, Exception):
    error.add_note("(what was trained is saved)")
    words += r".*\(what was trained is saved\)$"
  with pytest.raises(Ended):
    launching._guarded(main)
  ((message, found),) = ended
  assert found == status
  assert "\n" not in message
  assert re.search(words, message)


def test_bugs_keep_their_traceback(ended):
  def main():
    raise KeyError("a bug")

  with pytest.raises(KeyError):
    launching._guarded(main)
  assert not ended


def test_quickstart_passes_its_arguments_on(tmp_path):
  """The script that sets up reads none of them."""
  for name in ("setup.sh", "quickstart.sh"):
    (tmp_path / "launch").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch" / name, tmp_path / "launch" / name)
  python = tmp_path / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\necho "$@"\n')
  python.chmod(0o755)
  (tmp_path / "pyproject.toml").write_text("")
  done = subprocess.run(
    ["bash", "launch/quickstart.sh", "--config.seed=1", "--workdir=x/y"],
    cwd=tmp_path,
    env=os.environ | {"PYTHON": sys.executable},
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  *_, install, ran = done.stdout.splitlines()
  assert install.endswith("--editable .")
  assert ran.endswith("tiny_shapes.py --config.seed=1 --workdir=x/y")
