"""How a program ends: one line, and a status."""

import re

import pytest

from digen_jax import launching
from digen_jax.errors import UserError
from digen_jax.pipeline.execute import UnitError
from digen_jax.pipeline.units import Kind, Unit


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
    (KeyboardInterrupt(), 130, "goes on from what is saved"),
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
