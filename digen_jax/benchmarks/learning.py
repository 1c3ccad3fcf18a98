"""Learning is not harmed: the embedded task with and without the techniques.

Every variant trains with the same seeds. TAG and RAT change who works and not
what is computed; TCSS trains on samples of the version before. The held-out
reward of each is compared with the on-policy one and the spread of its seeds.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from digen_jax.benchmarks import output
from digen_jax.errors import UserError
from digen_jax.svg import Series, line_chart

VARIANTS: Mapping[str, Mapping[str, Any]] = {
  "on-policy": {"tag": False, "rat": False, "tcss": 0.0},
  "TAG + RAT": {"tag": True, "rat": True, "tcss": 0.0},
  "TCSS 0.5": {"tag": False, "rat": False, "tcss": 0.5},
}
COLORS = ("#4477aa", "#228833", "#cc6677")
WIDTH, HEIGHT = 640, 320
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
STYLE = (
  "svg{background:#fff}.grid{stroke:#ddd}.axis{stroke:#888}"
  ".tick{font:12px sans-serif;fill:#555}"
  ".line{fill:none;stroke:var(--c);stroke-width:2.5}"
  ".dot{fill:var(--c)}.faint{opacity:.35;stroke-width:1}.hit{fill:none}"
)
TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


@dataclasses.dataclass(frozen=True)
class Curve:
  """Held-out reward of a variant.

  Attributes:
    steps: global steps of the evaluations.
    rewards: [seeds][evaluations].
    staleness: mean over the runs of `staleness_mean`, updates.
  """

  steps: list[int]
  rewards: list[list[float]]
  staleness: float

  def row(self, name: str) -> dict[str, Any]:
    """Its line in the table."""
    last = [rewards[-1] for rewards in self.rewards]
    return {
      "variant": name,
      "seeds": len(last),
      "reward before": statistics.mean(r[0] for r in self.rewards),
      "reward after": statistics.mean(last),
      "standard deviation": statistics.stdev(last) if len(last) > 1 else None,
      "staleness": self.staleness,
    }


def run(
  workdir: str | Path,
  *,
  config: str = "configs/tiny_shapes.py",
  steps: int = 50,
  seeds: Sequence[int] = (0, 1, 2),
  report: Callable[[str], None] = print,
) -> dict[str, Curve]:
  """Trains every variant with every seed; runs that are complete are kept.

  Args:
    workdir: gets a directory for each run, `learning.svg`, `learning.md` and
      `learning.json`.
    config: config file of the task.
    steps: global steps.
    seeds: of the runs.
    report: told the result of every run.

  Raises:
    UserError: a run failed.
  """
  curves = {}
  for name, switches in VARIANTS.items():
    rewards, stale = [], []
    for seed in seeds:
      folder = Path(workdir) / f"{_slug(name)}-{steps}-seed{seed}"
      _train(folder, config, steps, seed, switches)
      rows = json.loads((folder / "evaluation.json").read_text())
      rewards.append([row["reward_mean"] for row in rows])
      lines = (folder / "metrics.jsonl").read_text().splitlines()
      stale += [json.loads(line)["staleness_mean"] for line in lines]
      report(
        f"{name}, seed {seed}: {rewards[-1][0]:.3f} -> {rewards[-1][-1]:.3f}"
      )
    numbers = [row["step"] for row in rows]
    curves[name] = Curve(numbers, rewards, statistics.mean(stale))
  (Path(workdir) / "learning.svg").write_text(chart(curves))
  rows = [curve.row(name) for name, curve in curves.items()]
  details = {name: dataclasses.asdict(c) for name, c in curves.items()}
  output.save(workdir, "learning", rows, {"curves": details})
  return curves


def chart(curves: Mapping[str, Curve]) -> str:
  """Means as thick lines, seeds as faint ones: an SVG of its own."""
  series = []
  for (name, curve), color in zip(curves.items(), COLORS):
    for rewards in curve.rewards:
      points = list(zip(curve.steps, rewards))
      series.append(Series(name, color, points, faint=True))
    means = [statistics.mean(values) for values in zip(*curve.rewards)]
    points = list(zip(curve.steps, means))
    series.append(Series(name, color, points, marked=True))
  drawing = line_chart(series, WIDTH, HEIGHT)
  legend = "".join(
    f'<text x="{WIDTH - 130}" y="{HEIGHT - 40 - 18 * i}" fill="{color}" '
    f'font-family="sans-serif" font-size="13">{name}</text>'
    for i, (name, color) in enumerate(zip(curves, COLORS))
  )
  drawing = drawing.replace("<svg ", f"<svg {NAMESPACE} ", 1)
  head, rest = drawing.split(">", 1)
  return f"{head}><style>{STYLE}</style>{legend}{rest}"


def _train(
  folder: Path,
  config: str,
  steps: int,
  seed: int,
  switches: Mapping[str, Any],
) -> None:
  flags = {"steps": steps, "seed": seed, "eval_every": max(1, steps // 5)}
  flags |= {f"pipeline.{name}": value for name, value in switches.items()}
  command = [sys.executable, str(TRAIN), f"--config={config}"]
  command += [f"--workdir={folder}"]
  command += [f"--config.{name}={value}" for name, value in flags.items()]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError(
      f"the run in {folder} failed: {done.stderr.strip().splitlines()[-1]}"
    )


def _slug(name: str) -> str:
  return "".join(c if c.isalnum() else "-" for c in name.lower())
