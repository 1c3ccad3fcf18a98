"""A table of costs where generating is slow, and a step of a few groups."""

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
