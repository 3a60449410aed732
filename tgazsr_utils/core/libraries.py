"""open_clip and torchvision, imported when they are first needed: that takes seconds, and torchvision may need mending.

A torchvision wheel built for CUDA fails to import beside a CPU-only torch, since its compiled operators are missing.
Nothing here uses those operators; their schemas are enough. So ask for either library here, not by an import.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

_kept: list[Any] = []  # what must outlive the import


@functools.cache
def torchvision() -> Any:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _kept[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


@functools.cache
def open_clip() -> Any:
    """With the workbook's own architectures."""
    torchvision()
    library = importlib.import_module("open_clip")
    for config in (Path(__file__).parent / "model_configs").glob("*.json"):
        library.add_model_config(config)
    return library
