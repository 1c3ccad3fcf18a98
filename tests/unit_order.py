"""What must come before what, told from samples: not by the plan itself."""

from digen_jax.pipeline.units import Kind


def must_precede(a, b, work):
  """Whether unit `a` has to end before `b` of the same step may start."""
  if b.kind == Kind.SCORE:
    return a.kind == Kind.GENERATE and overlap(a.start, a.stop, b.start, b.stop)
  if b.kind == Kind.TRAIN:
    if a.kind == Kind.SCORE and work.gap and work.scope == "group":
      first = b.start // work.group_size * work.group_size
      last = -(-b.stop // work.group_size) * work.group_size
      return overlap(a.start, a.stop, first, last)
    return a.kind == Kind.SCORE or (
      a.kind == Kind.UPDATE and a.update < b.update
    )
  if b.kind == Kind.UPDATE:
    if a.kind == Kind.UPDATE:
      return a.update < b.update
    return a.kind == Kind.TRAIN and a.update == b.update
  return b.kind == Kind.PUBLISH and a.kind == Kind.UPDATE


def overlap(start, stop, other_start, other_stop):
  return start < other_stop and other_start < stop
