"""Islands in processes of their own: Ray actors (extra `cluster`).

Every lane is an actor with its own JAX runtime, devices and processor cores;
the process that drives them needs no accelerator. Ray starts by itself on this
machine, or joins the cluster that RAY_ADDRESS names.

What lanes give each other (weights, gradients of RAT) goes from actor to actor
through Ray's object store, and not through the driver.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from digen_jax.config import Config
from digen_jax.errors import LaneLost, UserError
from digen_jax.links import Hardware
from digen_jax.pipeline.scheduler import Lane

FREE_SECONDS = 60.0  # that others may take to let GPUs go
KIND = "accelerator_type:"  # with a kind of GPU, what every host with them has
SOME = 0.001  # of that: as much as Ray's own `accelerator_type` takes


@dataclasses.dataclass(frozen=True)
class Site:
  """Where a lane runs.

  Attributes:
    axes: sizes of its mesh axes.
    devices: how many devices that is.
    cores: processor cores it is pinned to; empty leaves it free.
    group: placement group with GPUs for all lanes; None on processors.
    bundle: which part of it is this lane's.
  """

  axes: Mapping[str, int]
  devices: int
  cores: tuple[int, ...] = ()
  group: Any = None
  bundle: int = 0

  @property
  def gpus(self) -> bool:
    """Whether its devices are GPUs, which Ray hands out."""
    return self.group is not None


def start() -> Any:
  """Starts Ray, or joins a running cluster: the module `ray`.

  Raises:
    UserError: Ray is not installed.
  """
  try:
    import ray
  except ImportError as error:
    raise UserError(
      "config.pipeline.lanes='ray' needs Ray: pip install 'digen-jax[cluster]'"
    ) from error
  if not ray.is_initialized():
    # The driver's own path, so that actors find the same code.
    paths = os.pathsep.join(path for path in sys.path if path)
    # By default actors run at nice 15, behind everything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Processes in reserve, which nobody asks for, would take time of the cores.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    ray.init(
      include_dashboard=False,
      log_to_driver=False,
      logging_level="ERROR",
      runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
  return ray


def gpus(ray: Any, kind: str = "") -> list[int]:
  """GPUs of every host in the cluster that has some.

  Args:
    ray: from `start`.
    kind: of GPU, as Ray calls it ("H100"); any if empty.

  Raises:
    UserError: there are TPUs, which lanes in Ray cannot use.
  """
  hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
  if any(host.get("TPU") for host in hosts):
    raise UserError(
      "config.pipeline.lanes='ray' runs on GPUs or on processors, and Ray found "
      "TPUs: set config.pipeline.lanes='local', which drives them from one process"
    )
  return [
    int(host["GPU"])
    for host in hosts
    if host.get("GPU") and (not kind or KIND + kind in host)
  ]


def check_hosts(
  ray: Any, counts: Mapping[str, int], kinds: Mapping[str, str]
) -> None:
  """Raises UserError where the GPUs of a lane are nowhere to be had.

  Args:
    ray: from `start`.
    counts: GPUs by lane name.
    kinds: of GPU by lane name; see `gpus`.
  """
  for name, count in counts.items():
    kind = kinds[name]
    hosts = gpus(ray, kind)
    if not hosts:
      known = {
        resource.removeprefix(KIND)
        for node in ray.nodes()
        if node["Alive"]
        for resource in node["Resources"]
        if resource.startswith(KIND)
      }
      raise UserError(
        f"config.mesh asks for GPUs of the kind {kind!r} for the {name} lane, "
        f"and the cluster has {', '.join(sorted(known)) or 'none with a name'}"
      )
    if count > max(hosts):
      raise UserError(
        f"config.mesh gives the {name} lane {count}{f' {kind}' * bool(kind)} "
        f"GPUs, and no host of the cluster has more than {max(hosts)}: a lane in "
        "Ray lives on one host; several rollout lanes are mesh.rollout=[4,4]"
      )
    alike = sum(n for lane, n in counts.items() if kinds[lane] == kind)
    if kind and alike > sum(hosts):
      raise UserError(
        f"config.mesh asks for {alike} {kind} GPUs, but the cluster has "
        f"{sum(hosts)}: lower config.mesh.rollout or config.mesh.trainer, or let "
        "one of them have another kind"
      )


def place(
  ray: Any,
  meshes: Mapping[str, Mapping[str, int]],
  kinds: Mapping[str, str] | None = None,
) -> dict[str, Site]:
  """Sites for lanes: GPUs where the cluster has them, else shares of the cores.

  Args:
    ray: from `start`.
    meshes: axis sizes by lane name.
    kinds: of GPU by lane name, see `gpus`; any if None.

  Raises:
    UserError: the cluster has TPUs, or its GPUs cannot be had.
  """
  counts = {name: math.prod(axes.values()) for name, axes in meshes.items()}
  if gpus(ray):
    group = _reserve(ray, counts, kinds or dict.fromkeys(counts, ""))
    return {
      name: Site(meshes[name], counts[name], group=group, bundle=i)
      for i, name in enumerate(meshes)
    }
  shares = _share(sorted(os.sched_getaffinity(0)), counts)
  return {n: Site(meshes[n], counts[n], shares[n]) for n in meshes}


def _reserve(
  ray: Any, counts: Mapping[str, int], kinds: Mapping[str, str]
) -> Any:
  """A placement group: the GPUs of each lane on one host, all of them or none.

  Actors that have been stopped may still hold theirs for a while.
  """
  group = ray.util.placement_group(
    [
      {"GPU": count} | ({KIND + kinds[name]: SOME} if kinds[name] else {})
      for name, count in counts.items()
    ]
  )
  if group.wait(FREE_SECONDS):
    return group
  ray.util.remove_placement_group(group)
  free = int(ray.available_resources().get("GPU", 0))
  lanes = " + ".join(
    f"{n} ({' '.join(filter(None, (name, kinds[name])))})"
    for name, n in counts.items()
  )
  raise UserError(
    f"config.mesh asks for {lanes} GPUs, each lane's on one host; the hosts "
    f"have {gpus(ray)}, of which {free} are free: end what uses the others, or "
    "give mesh.rollout and mesh.trainer fewer"
  )


def _share(
  cores: Sequence[int], counts: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
  """Cores in proportion to devices; none where there are too few."""
  if len(cores) < len(counts):
    return dict.fromkeys(counts, ())
  total, shares, first = sum(counts.values()), {}, 0
  names = list(counts)
  for i, name in enumerate(names):
    left = len(names) - i - 1
    share = max(1, round(len(cores) * counts[name] / total))
    share = min(share, len(cores) - first - left) if left else len(cores)
    shares[name] = tuple(cores[first : first + share])
    first += share
  return shares


@dataclasses.dataclass(frozen=True)
class Remote:
  """A result that an actor is making.

  It stays where it was made until it is asked for. Weights and gradients never
  are: they are arguments of calls to other actors.
  """

  ref: Any
  lane: str

  @functools.cached_property
  def future(self) -> concurrent.futures.Future:
    """Fetches the result into this process."""
    return self.ref.future()

  def ready(self) -> bool:
    """Whether it is there, or has failed."""
    return self.future.done()

  def result(self) -> Any:
    """The result on the host; raises what the actor raised.

    Raises:
      LaneLost: the actor has died.
    """
    import ray
    from ray import exceptions

    died = (
      exceptions.RayActorError,
      exceptions.ActorUnschedulableError,
      exceptions.NodeDiedError,
      exceptions.OutOfMemoryError,
    )
    try:
      return ray.get(self.ref)
    except exceptions.RayTaskError as error:
      cause = error.cause if isinstance(error.cause, Exception) else error
      if isinstance(cause, died):
        raise LaneLost(
          "",
          f"a process that lane {self.lane!r} was to hear from has died: the "
          "same command goes on from the last checkpoint",
        ) from error
      raise cause from None
    except died as error:
      raise LaneLost(
        self.lane,
        f"the process of lane {self.lane!r} has died (out of memory, or killed "
        "from outside): the same command goes on from the last checkpoint",
      ) from error


class RayLink:
  """An island in an actor."""

  def __init__(self, ray: Any, config: Config, lane: Lane, site: Site):
    """Starts the actor; `hardware` waits for it.

    Args:
      ray: from `start`.
      config: the run.
      lane: what it does.
      site: where.
    """
    self._ray, self._lane, self._group = ray, lane.name, site.group
    where: dict[str, Any] = {}
    if site.gpus:
      from ray.util.scheduling_strategies import (
        PlacementGroupSchedulingStrategy as Strategy,
      )

      strategy = Strategy(site.group, placement_group_bundle_index=site.bundle)
      where = {"num_gpus": site.devices, "scheduling_strategy": strategy}
    server = ray.remote(_server_class()).options(num_cpus=0, **where)
    told = {"axes": site.axes, "devices": site.devices}
    told |= {"cores": site.cores, "gpus": site.gpus}
    payload = pickle.dumps((config, lane))
    self._start = lambda: server.remote(told, payload)
    self._actor = self._start()

  @functools.cached_property
  def hardware(self) -> Hardware:
    """What the island runs on; waits until it is there."""
    return self._remote(self._actor.describe.remote()).result()

  def call(self, method: str, *args: Any) -> Remote:
    """Calls a method of the island."""
    return self._remote(self._actor.call.remote(method, *_refs(args)))

  def call_pair(self, method: str, *args: Any) -> tuple[Remote, Remote]:
    """Likewise, for a method that returns two things."""
    call = self._actor.call.options(num_returns=2)
    first, second = call.remote(method, *_refs(args))
    return self._remote(first), self._remote(second)

  def apply(self, function: Any, *args: Any) -> Remote:
    """Calls `function(island, *args)` there; it returns host values."""
    return self._remote(self._actor.apply.remote(function, *_refs(args)))

  def restart(self) -> bool:
    """Starts the actor anew; all that it has is what it loads."""
    self._ray.kill(self._actor)
    self._actor = self._start()
    return True

  def stop(self) -> None:
    """Ends the actor, and gives back the GPUs that were taken for all lanes."""
    self._ray.kill(self._actor)
    if self._group is not None:
      self._ray.util.remove_placement_group(self._group)

  def _remote(self, ref: Any) -> Remote:
    return Remote(ref, self._lane)


def _refs(args: Sequence[Any]) -> list[Any]:
  return [arg.ref if isinstance(arg, Remote) else arg for arg in args]


def _server_class() -> type:
  """The actor's class, which travels by value.

  It pins its process before anything of JAX is imported there: the thread
  pools of XLA take their size from the cores that they find.
  """

  class Server:
    def __init__(self, site: dict, payload: bytes):
      import os
      import pickle

      # Another host of the cluster may not have the cores of the driver's.
      if cores := set(site["cores"]) & os.sched_getaffinity(0):
        os.sched_setaffinity(0, cores)
      if site["devices"] > 1 and not site["gpus"]:
        os.environ.setdefault("PJRT_NPROC", str(2 * site["devices"]))
      import jax

      if not site["gpus"]:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", site["devices"])
      from digen_jax import serving

      self._error = None
      try:
        config, lane = pickle.loads(payload)
        self._served = serving.serve(config, lane, site["axes"])
      except Exception as error:  # from here an actor would seem to have died
        self._error = error

    def served(self) -> Any:
      if self._error is not None:
        raise self._error
      return self._served

    def describe(self) -> Any:
      return self.served().hardware

    def call(self, method: str, *args: Any) -> Any:
      return self.served().call(method, *args)

    def apply(self, function: Any, *args: Any) -> Any:
      return function(self.served().island, *args)

  return Server
