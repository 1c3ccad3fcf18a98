"""What launch scripts share: flags, devices, errors in one line."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from digen_jax import config as config_lib
from digen_jax.errors import LaneLost, UserError

EXIT_BAD_INPUT = 2


class ConfigFlag:
  """`--config=FILE.py` with overrides `--config.a.b=value`."""

  def __init__(self) -> None:
    from ml_collections import config_flags

    self._holder = config_flags.DEFINE_config_file(
      "config",
      None,
      "Config file (see configs/); --config.a.b=value overrides a field.",
      lock_config=False,
    )

  def get(self) -> config_lib.Config:
    """The checked config; UserError names what is wrong with it."""
    from ml_collections import config_flags

    try:  # a file that is missing shows when its content is looked at
      return config_lib.from_config_dict(self._holder.value)
    except OSError as error:
      file = config_flags.get_config_filename(flags.FLAGS["config"])
      raise UserError(f"config file {file} does not exist") from error


def config_flag() -> ConfigFlag:
  """Defines `--config` and marks it as required."""
  flag = ConfigFlag()
  flags.mark_flag_as_required("config")
  return flag


def _training_fields() -> dict[str, Any]:
  return config_lib.to_dict(config_lib.Config())


def run_main(
  main: Callable[[], None],
  fields: Callable[[], dict[str, Any]] = _training_fields,
) -> None:
  """Parses flags and runs `main`.

  Args:
    main: the program.
    fields: what --config may hold, nested, to tell what a typo meant.

  A `UserError`, a failed unit, a lost lane or a flag that cannot be parsed ends the
  program with one line on standard error and a non-zero status.
  """
  logging.set_verbosity(logging.WARNING)  # Orbax tells every rename
  logging.get_absl_handler().setFormatter(None)
  app.run(
    lambda _: _guarded(main),
    flags_parser=lambda argv: _parse(argv, fields),
  )


def start_run_devices(config: config_lib.Config) -> None:
  """`start_devices` of a run.

  With Ray every accelerator belongs to a lane's process. This one stays on the
  CPU: JAX would take most of the memory of each that it can see.
  """
  if config.pipeline.lanes == "local":
    return start_devices(config.devices)
  import jax

  jax.config.update("jax_platforms", "cpu")
  return start_devices(1)


def start_devices(cpu_devices: int) -> None:
  """Call before anything touches a device.

  Args:
    cpu_devices: how many devices the host is split into where there is no
      accelerator.
  """
  # Threads of XLA's CPU client. Collectives on two meshes can use up one a
  # device and wait for ever; many more than cores cost a quarter of the speed.
  if cpu_devices > 1:
    os.environ.setdefault("PJRT_NPROC", str(2 * cpu_devices))
  import jax

  jax.config.update("jax_num_cpu_devices", cpu_devices)


def _guarded(main: Callable[[], None]) -> None:
  from digen_jax.pipeline.execute import UnitError

  try:
    main()
  except (UserError, UnitError, LaneLost) as error:
    status = EXIT_BAD_INPUT if isinstance(error, UserError) else 1
    _fail(_with_notes(error, _plain(error)), status)
  except KeyboardInterrupt:
    _fail(
      "interrupted: start the same command again; a run goes on from its last "
      "checkpoint",
      130,
    )
  except OSError as error:
    said = _plain(error)
    if said == str(error):
      said = f"{type(error).__name__}: {said}"
    _fail(_with_notes(error, said), 1)
  except Exception as error:
    said = _plain(error)
    if said == str(error):
      raise
    _fail(_with_notes(error, said), 1)


def _with_notes(error: Exception, said: str) -> str:
  return " ".join([said, *getattr(error, "__notes__", ())])


FULL = "No space left on device"


def _plain(error: Exception) -> str:
  """What an error says, in plain words where a library says it at length."""
  said = str(error)
  first = (said.splitlines() or [""])[0]
  if FULL in said:  # safetensors and Orbax have errors of their own for it
    return (
      f"the disk is full ({first}): make room, and start the same command "
      "again; a run goes on from its last checkpoint"
    )
  if "RESOURCE_EXHAUSTED" in said:
    return (
      f"out of memory ({first}): choose a smaller pipeline.generate_size, "
      "pipeline.train_size, pipeline.timesteps_per_pack or eval.batch_size, "
      "dtype.compute=bfloat16, train.remat=block, pipeline.tag_layout=trainer, "
      "or vae.tiling=256"
    )
  return said


def _parse(
  argv: Sequence[str], fields: Callable[[], dict[str, Any]]
) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # A config file that raises arrives with its whole traceback as text.
    lines = str(error).splitlines()
    _fail(lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}")
  except FileNotFoundError as error:
    _fail(f"config file {error.filename or error} does not exist")
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    _fail(_config_error(argv, error, fields()))


def _config_error(
  argv: Sequence[str], error: Exception, known: dict[str, Any]
) -> str:
  """One line for an override or a config file that ml_collections refuses."""
  for argument in argv[1:]:
    match = re.match(r"--config\.([\w.]+)", argument)
    section, prefix = known, ""
    for name in match.group(1).split(".") if match else ():
      if not isinstance(section, dict):
        break
      if name not in section:
        return config_lib.unknown_field(prefix + name, section, prefix)
      section, prefix = section.get(name), f"{prefix}{name}."
  return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, status: int = EXIT_BAD_INPUT) -> None:
  sys.stdout.flush()
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  logging.flush()
  # The interpreter's exit would wait for reward threads that may never end.
  sys.stderr.flush()
  os._exit(status)
