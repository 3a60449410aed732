"""Thin package behind the TGA-ZSR workbook: attention, attacks, objectives, evaluation.

The names that notebooks use come from here, each loaded when it is first asked for; ``core`` is the method.
"""

import importlib
import os
from typing import Any

from tgazsr_utils.machine import set_threads

set_threads()  # before PyTorch, which reads once how its threads are to wait
# The driver is asked for devices without starting CUDA here, which would keep a notebook from forking.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

_PUBLIC = {
    "core.attacks": "cw pgd",
    "core.evaluation": "predict predictor",
    "core.defences": "defence find_defence",
    "core.attention": "attention_distance complementary_attention grad_cam text_guided_attention",
    "core.images": "ImageSet",
    "core.models": "Clip",
    "core.objectives": "Step Term find_objective objective weighted_sum",
    "core.settings": "AttackSettings FinetuneSettings",
    "core.training": "steps trainable",
    "datasets.loading": "choose_datasets list_datasets load_dataset",
    "runtime.finetuning": "finetune",
    "runtime.weights": "find_weights load_clip save_clip",
    "measuring.attention_shift": "attention_under_attack",
    "measuring.autoattack": "autoattack",
    "measuring.bench": "Bench",
    "measuring.measure": "evaluate",
    "measuring.records": "Record RecordStore",
    "measuring.scoring": "score",
    "measuring.tables": "leaderboard paired_difference",
    "workbook": "open_workbook",
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
