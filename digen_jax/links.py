"""Calling an island: in this process here, in another one in `cluster.py`.

A call returns at once with what is pending. What is pending on one island may
be an argument of a call to another.
"""

import dataclasses
from typing import Any, Protocol

import jax

from digen_jax.island import Island


class Pending(Protocol):
  """A result under way."""

  def ready(self) -> bool:
    """Whether it is there, or has failed; does not block."""
    ...

  def result(self) -> Any:
    """The result; blocks until it is there, raises what failed."""
    ...


class Link(Protocol):
  """The way to an island.

  Attributes:
    shards: into how many parts the island splits a batch.
  """

  shards: int

  def call(self, method: str, *args: Any) -> Pending:
    """Calls a method of the island."""
    ...

  def call_pair(self, method: str, *args: Any) -> tuple[Pending, Pending]:
    """Calls a method that returns two things, which are apart from then on."""
    ...


@dataclasses.dataclass(frozen=True)
class Computing:
  """Arrays of this process, computed asynchronously."""

  value: Any

  def ready(self) -> bool:
    """Whether every array has been computed."""
    return all(
      leaf.is_ready()
      for leaf in jax.tree.leaves(self.value)
      if isinstance(leaf, jax.Array)
    )

  def result(self) -> Any:
    """The arrays, which may still be under way."""
    return self.value


class LocalLink:
  """An island of this process. Call from one thread."""

  def __init__(self, island: Island):
    self.island, self.shards = island, island.shards

  def call(self, method: str, *args: Any) -> Computing:
    """Calls a method; it dispatches, and returns."""
    args = [a.result() if isinstance(a, Computing) else a for a in args]
    return Computing(getattr(self.island, method)(*args))

  def call_pair(self, method: str, *args: Any) -> tuple[Computing, Computing]:
    """Likewise, for a method that returns two things."""
    first, second = self.call(method, *args).value
    return Computing(first), Computing(second)
