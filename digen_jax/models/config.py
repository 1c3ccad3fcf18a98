"""Reading diffusers' `config.json` into the families' config records."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from digen_jax.errors import UserError

T = TypeVar("T")

# Fields of ours that say how to compute, not what the checkpoint is.
COMPUTE_FIELDS = ("dtype", "remat", "tiling", "sequential")


def from_dict(
  cls: type[T],
  raw: Mapping[str, Any],
  *,
  class_name: str,
  fixed: Mapping[str, Any] | None = None,
  ignored: tuple[str, ...] = (),
  **compute: Any,
) -> T:
  """Builds a config record from a checkpoint's `config.json`.

  Args:
    cls: frozen dataclass whose fields are named as in the file.
    raw: the file's content. Keys that start with "_" are bookkeeping.
    class_name: the `_class_name` that `cls` describes.
    fixed: keys outside of `cls` that must have this value if present; a
      string also accepts a list of nothing but that string.
    ignored: keys without influence on the computation.
    **compute: values for the fields in `COMPUTE_FIELDS`.

  Raises:
    UserError: another class, an unknown key, or an unsupported value.
  """
  fixed = fixed or {}
  found = raw.get("_class_name", class_name)
  if found != class_name:
    raise UserError(f"config.json describes a {found}, not a {class_name}")
  fields = {f.name for f in dataclasses.fields(cls)} - set(COMPUTE_FIELDS)
  values = {}
  for key, value in raw.items():
    if key in fields:
      values[key] = tuple(value) if isinstance(value, list) else value
    elif key in fixed:
      if value != fixed[key] and not _all_equal(value, fixed[key]):
        raise UserError(
          f"{class_name} with {key}={value!r} is not supported; only "
          f"{fixed[key]!r} is"
        )
    elif not key.startswith("_") and key not in ignored:
      raise UserError(
        f"{class_name}'s config.json has an unknown key {key!r} "
        f"(= {value!r}); known: {', '.join(sorted(fields | set(fixed)))}"
      )
  return cls(**values, **compute)


def to_dict(config: Any, *, class_name: str) -> dict[str, Any]:
  """The `config.json` content of a config record, without compute fields."""
  values = {
    f.name: getattr(config, f.name)
    for f in dataclasses.fields(config)
    if f.name not in COMPUTE_FIELDS
  }
  return {"_class_name": class_name} | values


def _all_equal(value: Any, allowed: Any) -> bool:
  return isinstance(value, list | tuple) and all(v == allowed for v in value)
