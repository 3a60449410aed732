"""Thin package behind the TGA-ZSR workbook: attention, attacks, objectives, evaluation."""

from pathlib import Path

from . import _torchvision  # noqa: F401  (first: open_clip imports torchvision)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
