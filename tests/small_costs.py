"""A table of costs where generating is slow, and a step of a few groups."""

from digen_jax.config import from_config_dict
from digen_jax.pipeline.cost_table import CostTable, Rate, RoleCosts
from digen_jax.pipeline.units import Workload

ROLE = RoleCosts(
  generate=Rate(0.1, 6.0),
  train=Rate(0.1, 1.0),
  update=Rate(0.2),
  publish=Rate(0.2),
  switch=Rate(0.1),
)
TABLE = CostTable(ROLE, ROLE, score=Rate(0.01))
WORK = Workload(groups=8, group_size=4, window=4, pack=4)


def small_config(**pipeline):
  """A step of 32 pictures of 1024 x 1024, for plans."""
  return from_config_dict(
    {
      "batch": {"prompts": 4, "group_size": 8},
      "sampling": {
        "num_steps": 20,
        "window": 8,
        "height": 1024,
        "width": 1024,
      },
      "train": {"remat": "block"},
      "dtype": {"compute": "bfloat16"},
      "pipeline": pipeline,
    }
  )
