"""Published set-ups, simulated: what each technique should add at their size.

32 devices, 32 samples a step, 20 to 40 sampling steps of which 0.4 or 0.6 are
trained, four families, one or two kinds of device. Nothing is measured: units
cost what ledgers and stated figures of devices come to (`device_costs.py`).
Beside it stand the ratios that DigenRL (arXiv 2606.24369) reports for its own
ladder. They are relative to another baseline, so both are shown relative to
the disaggregated rung, too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from digen_jax.atomic import write_text
from digen_jax.benchmarks import output
from digen_jax.device_costs import (
  DEVICES,
  Job,
  assumptions,
  ledger_table,
)
from digen_jax.ladder import ladder_chart, timeline_panels
from digen_jax.models.costs import DENOISERS
from digen_jax.models.published import find_model
from digen_jax.models.vae.costs import DECODERS
from digen_jax.page import page, section
from digen_jax.pipeline.planner import RUNGS, Prediction, equal_split, ladder
from digen_jax.pipeline.splits import best_splits, fitting_start
from digen_jax.pipeline.units import Workload

COUNT = 32  # devices
GROUPS, GROUP_SIZE = 4, 8
NUM_STEPS = (20, 30, 40)
FRACTIONS = (0.4, 0.6)
# Latents of a sample: 1024 x 1024 pixels; 480 x 832, 81 and 53 frames.
FAMILIES: Mapping[str, tuple[int, ...]] = {
  "flux-dev": (128, 128, 16),
  "qwen-image": (128, 128, 16),
  "wan2.1-14b": (21, 60, 104, 16),
  "hunyuan-video": (14, 60, 104, 16),
}
# What generates, and what trains: half of the devices each where they differ.
FLEETS = {"32 H100": ("H100", "H100"), "16 A100 + 16 H100": ("A100", "H100")}
# Times faster than the baseline, as reported.
REPORTED: Mapping[str, Mapping[str, float]] = {
  "hunyuan-video": dict(sequential=1.52, gap=1.84, tsp=2.14, tag=3.05, tcss=3.34),
  "wan2.1-14b": dict(sequential=1.58, gap=1.70, tsp=2.10, tag=2.79, tcss=2.85),
}  # fmt: skip


def run(
  workdir: str | Path, *, report: Callable[[str], None] = print
) -> list[dict[str, Any]]:
  """Simulates all set-ups.

  Args:
    workdir: for published.md, .json and .html.
    report: told what happens, a line at a time.

  Returns:
    A row per set-up: seconds of the disaggregated rung, how many times faster
    each other rung is, and the part of the bound that the last one reaches.
  """
  rows, shown = [], {}
  for fleet in FLEETS:
    for family in FAMILIES:
      for steps in NUM_STEPS:
        for fraction in FRACTIONS:
          rungs = simulate_setup(family, steps, fraction, fleet)
          rows.append(_row(family, steps, fraction, fleet, rungs))
          if (steps, fraction) == (NUM_STEPS[0], FRACTIONS[0]):
            shown[f"{family}, {fleet}"] = rungs
      report(f"{fleet}: {family}")
  fixed = {
    family: simulate_setup(family, NUM_STEPS[0], FRACTIONS[0], fixed=True)
    for family in REPORTED
  }
  compared = compare(rows, fixed)
  lines = assumed()
  for line in lines:
    report(f"assumed: {line}")
  report(output.markdown(compared))
  output.save(
    workdir,
    "published",
    rows,
    {"assumptions": lines, "compared": compared},
  )
  write_text(Path(workdir) / "published.html", _page(shown, lines))
  return rows


def simulate_setup(
  family: str,
  num_steps: int,
  fraction: float,
  fleet: str = "32 H100",
  *,
  fixed: bool = False,
) -> dict[str, Prediction]:
  """The ladder of one set-up.

  Args:
    family: of `FAMILIES`.
    num_steps: denoising steps.
    fraction: of them that is trained.
    fleet: of `FLEETS`.
    fixed: half of the devices for each role and one group to a unit on every
      rung, or as much of one to a Train unit as fits; otherwise each rung has
      the split that serves it best.
  """
  window = round(fraction * num_steps)
  work = Workload(GROUPS, GROUP_SIZE, window, pack=window)
  kinds = [DEVICES[name] for name in FLEETS[fleet]]
  table = ledger_table(_job(family, num_steps), *kinds, COUNT)
  if fixed:
    halves = [equal_split(work, COUNT)]
    fits = {n: fitting_start(table, work, halves, t) for n, t in RUNGS.items()}
    return ladder(table, work, fits)
  rollout = COUNT // 2 if kinds[0] != kinds[1] else 0
  splits = best_splits(table, work, COUNT, rollout=rollout)
  return ladder(table, work, splits, {name: RUNGS[name] for name in splits})


def _job(family: str, num_steps: int) -> Job:
  model, shape = find_model(family), FAMILIES[family]
  denoiser = DENOISERS[model.transformer]
  return Job(
    denoiser(model.transformer_config, shape, model.text_length),
    DECODERS[model.autoencoder](model.autoencoder_config, shape),
    num_steps=num_steps,
    passes=2 if model.guided else 1,
    score_seconds=0.02,
  )


def _row(
  family: str,
  num_steps: int,
  fraction: float,
  fleet: str,
  rungs: Mapping[str, Prediction],
) -> dict[str, Any]:
  sequential, last = rungs["sequential"], rungs["tcss"]
  split = last.split
  return {
    "devices": fleet,
    "family": family,
    "steps": num_steps,
    "trained": fraction,
    "sequential s": sequential.step_seconds,
    **{
      name: sequential.step_seconds / p.step_seconds
      for name, p in rungs.items()
      if name != "sequential"
    },
    "of bound": last.bound_seconds / last.step_seconds,
    "split": f"{split.rollout}+{split.trainer}",
  }


def compare(
  rows: Sequence[Mapping[str, Any]], fixed: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """The reported ladders beside ours, all relative to the disaggregated rung.

  Args:
    rows: of `run`.
    fixed: by family, the ladder on one split.
  """
  compared = []
  names = [name for name in RUNGS if name not in ("colocated", "sequential")]
  for family, reported in REPORTED.items():
    base = reported["sequential"]
    ours = [
      row
      for row in rows
      if row["family"] == family and row["devices"] == "32 H100"
    ]
    split = fixed[family]
    seconds = split["sequential"].step_seconds
    compared += [
      {"family": family, "ladder": "reported"}
      | {n: reported[n] / base if n in reported else None for n in names},
      {"family": family, "ladder": "ours, best splits, lowest"}
      | {n: min(row[n] for row in ours) for n in names},
      {"family": family, "ladder": "ours, best splits, highest"}
      | {n: max(row[n] for row in ours) for n in names},
      {"family": family, "ladder": "ours, 16+16, a group a unit"}
      | {n: seconds / split[n].step_seconds for n in names},
    ]
  return compared


def assumed() -> list[str]:
  """What the figures rest on, a line each."""
  lines = [
    f"{COUNT} devices, {GROUPS} prompts x {GROUP_SIZE} samples a step, one "
    "update; the mini-batch of 32 is taken to be all samples of a step",
    "pictures of 1024 x 1024 pixels; videos of 480 x 832 pixels, 81 frames "
    "(Wan) and 53 (HunyuanVideo): what was used is not known to us",
    "guidance with two passes for Qwen-Image and Wan, distilled for the others",
    "two kinds: 16 A100 generate, 16 H100 train; a colocated lane over both "
    "goes at the pace of the slower",
    "each rung has the split and unit sizes that serve it best, of those that "
    "fit; with a group a unit, Train units take what fits of one",
  ]
  kinds = [DEVICES[n] for names in FLEETS.values() for n in names]
  for family in FAMILIES:
    first, *rest = assumptions(_job(family, NUM_STEPS[0]), kinds)
    lines.append(f"{family}: {first}")
  return lines + rest


def _page(
  shown: Mapping[str, Mapping[str, Prediction]], lines: Sequence[str]
) -> str:
  """Ladders and timelines of the set-ups with the fewest steps."""
  setting = f"{NUM_STEPS[0]} steps, {FRACTIONS[0]} of them trained"
  parts = []
  for title, rungs in shown.items():
    seconds = {name: p.step_seconds for name, p in rungs.items()}
    bound = next(iter(rungs.values())).bound_seconds
    chart = ladder_chart(seconds, bound) + timeline_panels(rungs)
    parts.append(section(title, chart))
  facts = "".join(f"<li>{line}</li>" for line in lines)
  parts.append(section("Assumed", f'<ul class="facts">{facts}</ul>'))
  header = (
    "<header><h1>Published set-ups, simulated</h1>"
    f"<p>{COUNT} devices · {GROUPS * GROUP_SIZE} samples a step · {setting}</p>"
    "</header>"
  )
  return page("Published set-ups", header + "".join(parts))
