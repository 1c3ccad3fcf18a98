"""Calling an island: in this process here, in another one in `cluster.py`.

A call returns at once with what is pending. What is pending on one island may
be an argument of a call to another.
"""

import concurrent.futures
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
from jax.sharding import Mesh

from digen_jax.island import Island
from digen_jax.parallel.mesh import batch_shards


class Pending(Protocol):
  """A result under way.

  Attributes:
    future: done when `ready` is true; None where that must be asked.
  """

  future: concurrent.futures.Future | None

  def ready(self) -> bool:
    """Whether it is there, or has failed; does not block."""
    ...

  def result(self) -> Any:
    """The result; blocks until it is there, raises what failed."""
    ...


@dataclasses.dataclass(frozen=True)
class Hardware:
  """What an island runs on.

  Attributes:
    shape: sizes of its mesh axes.
    size: number of devices.
    shards: into how many parts a batch is split.
    device_kind: as JAX calls it.
  """

  shape: Mapping[str, int]
  size: int
  shards: int
  device_kind: str

  @classmethod
  def of(cls, mesh: Mesh) -> "Hardware":
    """Describes a mesh."""
    kind = mesh.devices.flat[0].device_kind
    return cls(dict(mesh.shape), mesh.size, batch_shards(mesh), kind)


class Link(Protocol):
  """The way to an island."""

  hardware: Hardware

  def call(self, method: str, *args: Any) -> Pending:
    """Calls a method of the island."""
    ...

  def call_pair(self, method: str, *args: Any) -> tuple[Pending, Pending]:
    """Calls a method that returns two things, which are apart from then on."""
    ...

  def restart(self) -> bool:
    """Starts the island's process anew; False if it has none of its own."""
    ...

  def stop(self) -> None:
    """Lets the island go."""
    ...


@dataclasses.dataclass(frozen=True)
class Computing:
  """Arrays of this process, computed asynchronously."""

  value: Any
  future: ClassVar[None] = None

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
    self.island, self.hardware = island, Hardware.of(island.mesh)

  def call(self, method: str, *args: Any) -> Computing:
    """Calls a method; it dispatches, and returns."""
    args = [a.result() if isinstance(a, Computing) else a for a in args]
    return Computing(getattr(self.island, method)(*args))

  def call_pair(self, method: str, *args: Any) -> tuple[Computing, Computing]:
    """Likewise, for a method that returns two things."""
    first, second = self.call(method, *args).value
    return Computing(first), Computing(second)

  def restart(self) -> bool:
    """It lives as long as this process does: False."""
    return False

  def stop(self) -> None:
    """Nothing to do: its arrays go with the run."""
