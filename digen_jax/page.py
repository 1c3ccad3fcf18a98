"""Parts of a page that loads nothing from elsewhere."""

from collections.abc import Sequence
from html import escape
from importlib import resources

from digen_jax.svg import BUBBLE


def page(title: str, body: str) -> str:
  """A whole HTML file.

  Args:
    title: of the window.
    body: HTML of what `<main>` holds.
  """
  assets = resources.files("digen_jax") / "assets" / "report"
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{escape(title)} · digen_jax</title>"
    f"<style>{(assets / 'style.css').read_text('utf-8')}</style></head><body>"
    f"{BUBBLE}<main>{body}</main>"
    f"<script>{(assets / 'picker.js').read_text('utf-8')}</script>"
    "</body></html>\n"
  )


def section(title: str, content: str) -> str:
  """A box with a heading; "" without content."""
  if not content:
    return ""
  return f"<section><h2>{escape(title)}</h2>{content}</section>"


def legend(entries: Sequence[tuple[str, str]]) -> str:
  """Names and their CSS colours."""
  return (
    '<p class="legend">'
    + "".join(
      f'<span><i style="background:{color}"></i>{escape(label)}</span>'
      for label, color in entries
    )
    + "</p>"
  )


def wide(chart: str) -> str:
  """A drawing that is scrolled rather than shrunk on a narrow page."""
  return f'<div class="wide">{chart}</div>'


def picker(panels: Sequence[tuple[str, str]]) -> str:
  """Panels of which one is visible, the last at first, and a slider."""
  control = (
    '<div class="control"><button aria-label="earlier">‹</button>'
    f'<input type="range" min="0" max="{len(panels) - 1}" '
    f'value="{len(panels) - 1}" aria-label="step">'
    '<button aria-label="later">›</button>'
    f"<output>{escape(panels[-1][0])}</output></div>"
  )
  return (
    '<div class="picker">'
    + (control if len(panels) > 1 else "")
    + "".join(
      f'<div class="panel" data-name="{escape(name)}"'
      f"{'' if i == len(panels) - 1 else ' hidden'}>{content}</div>"
      for i, (name, content) in enumerate(panels)
    )
    + "</div>"
  )
