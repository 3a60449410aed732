"""What parameters do not do: values that change nothing in a run, and units that are easily mistaken."""

from collections.abc import Mapping
from typing import Any

from tgazsr_utils.core.objectives import OBJECTIVES
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings, Settings
from tgazsr_utils.measuring.ablations import ABLATIONS
from tgazsr_utils.parameters import AblationNotebook, EvaluateNotebook, ExplorerNotebook, HoldNotebook


def units(values: Mapping[str, Any]) -> list[str]:
    """A line for each epsilon or step that is so small that it may be meant as a part of 1, not of 255."""
    lines = []
    for name, given in values.items():
        if "eps" in name or "stepsize" in name:
            small = [v for v in (given if isinstance(given, list) else [given]) if isinstance(v, float) and 0 < v < 0.1]
            lines += [f"{name} = {v:g} is in 1/255; for {v:g} of the pixel range give {255 * v:g}" for v in small]
    return lines


# Methods whose loss compares no attention.
_INATTENTIVE = {"FT-Clean", "FT-Adv.", "TeCoA", "PMG-AFT", "PMG-AFT-scaled", "FARE", "FARE-RobustVLM"}
_INATTENTIVE |= {"Sim-CLIP", "UCAT", "AGFT", "AdvFLYP"}
_OF_ATTENTION = "Alpha", "Beta", "Distance_metric", "attention_variant", "distance_size", "attention_backend"
_OF_AN_ATTACK = "train_eps", "train_stepsize", "train_numsteps", "train_start", "attack_warmup"
_READ_BY = {  # parameter of notebook 03 -> ablations that it is for
    **dict.fromkeys(("Alpha_list", "Beta_list"), {"alpha_beta"}),
    **dict.fromkeys(("train_eps_list", "test_eps_list", "train_numsteps_list"), {"epsilon"}),
    **dict.fromkeys(("test_numsteps_list", "attack_images", "attack_sets"), {"epsilon"}),
    "last_num_ft_list": {"tuned_part"},
    "methods": {"seeds", "learning_rate"},
    "lr_list": {"learning_rate"},
}


def without_effect(settings: Settings) -> dict[str, str]:
    """Parameter -> why its value changes nothing in a notebook with these settings."""
    s, found = settings, {}
    if isinstance(s, ExplorerNotebook):
        names = ("attack", "norm", "square_queries", "test_stepsize", "attack_precision")
        found |= dict.fromkeys(names, "the explorer attacks by PGD in linf with a quarter of epsilon a step")
    elif isinstance(s, AblationNotebook):
        chosen = {*ABLATIONS} if s.ablations in ("cut", "all") else {*s.ablations}
        of = {name: readers for name, readers in _READ_BY.items() if not readers & chosen}
        found |= {name: f"it is for the ablations {', '.join(sorted(readers))}" for name, readers in of.items()}
    elif isinstance(s, HoldNotebook):
        names = ("attack", "test_stepsize", "attack_precision", "protocol")
        found |= dict.fromkeys(names, "this notebook runs attacks of its own")
    elif isinstance(s, AttackSettings):
        attacks = {s.attack, *getattr(s, "other_attacks", ())}
        if "square" not in attacks:
            found["square_queries"] = f"attack is {s.attack!r}"
        if attacks <= {"apgd", "apgd-ce", "apgd-t", "standard", "square"}:
            found["test_stepsize"] = "AutoAttack chooses its own steps"
        if attacks <= {"standard", "square"}:
            found["test_numsteps"] = f"attack {' and '.join(sorted(attacks))} has its own number of steps"
    if isinstance(s, FinetuneSettings) and s.optimizer == "adamw":
        found["momentum"] = "optimizer is 'adamw'"
    if isinstance(s, EvaluateNotebook):  # 02 takes a step of TGA-ZSR by hand, whatever its methods
        methods = {*s.methods}
        if not methods:
            names = {*FinetuneSettings.model_fields, "dataset", "train_images", "overrides", "seeds"} - {"seed"}
            names |= {"descriptions", "interpolate"}
            return found | dict.fromkeys(names, "there is no method to train")
        if methods <= _INATTENTIVE:
            found |= dict.fromkeys(_OF_ATTENTION, "none of the methods compares attention")
        if methods <= OBJECTIVES.keys() and not any("descriptions" in OBJECTIVES[name].reads for name in methods):
            found["descriptions"] = "none of the methods reads them (SAFT does)"
        if methods <= {"FT-Clean"}:
            found |= dict.fromkeys(_OF_AN_ATTACK, "FT-Clean trains on clean images")
    return found
