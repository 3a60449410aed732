"""Thin package behind the TGA-ZSR workbook: attention, attacks, objectives, evaluation."""

import os
from pathlib import Path

# The driver is asked for devices without starting CUDA here, which would keep a notebook from forking (see distributed).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from . import _torchvision  # noqa: F401  (first: open_clip imports torchvision)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
