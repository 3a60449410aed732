"""Does robustness hold? Models under attacks of other steps and losses, without gradients, against other models."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tgazsr_utils.measuring.ablations import UNTUNED, Variant, base_training, variant
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import combined, paired_difference, per_seed

ALL = "all of these"  # an image counts if it withstands every attack
BASELINE = "TeCoA"
Done = Sequence[tuple[Variant, list[Record]]]


def models(s: Any) -> dict[str, tuple[str, dict[str, float]]]:
    """Name -> method and what is not as it was published: the untuned model, methods, TGA-ZSR's neighbours."""
    own, found = base_training(s), {name: (name, {}) for name in (UNTUNED, *s.methods)}
    found |= {f"TGA-ZSR, Beta {b:g}": ("TGA-ZSR", {"Beta": b}) for b in s.Beta_list if b != own.Beta}
    return found | {f"TGA-ZSR, Alpha {a:g}": ("TGA-ZSR", {"Alpha": a}) for a in s.Alpha_list if a != own.Alpha}


def attacks(s: Any) -> dict[str, dict[str, Any]]:
    """Name -> what ``ablations.variant`` takes of it, that of the paper first: PGD with steps as long as epsilon."""
    n, eps, most = s.test_numsteps, s.test_eps, max(s.test_numsteps, *s.test_numsteps_list)
    of = lambda name, steps=n, part=1, **more: (
        {"attack": name, "test_numsteps": steps, "test_stepsize": eps / part} | more
    )
    found: dict[str, dict[str, Any]] = {f"PGD-{n}, step ε": {"attack": of("pgd")}}
    for steps in sorted({n, *s.test_numsteps_list}):
        for part, step in ((1, "ε"), (4, "ε/4")):
            found[f"PGD-{steps}, step {step}"] = {"attack": of("pgd", steps, part)}
    found[f"PGD-{n}, fp16 as released"] = {"attack": of("pgd", attack_precision="released-fp16")}
    found[f"CW-{n}"] = {"attack": of("cw")}
    found["APGD-CE"], found["APGD-T"] = ({"attack": of(name, most)} for name in ("apgd-ce", "apgd-t"))
    found["Square"] = {"attack": of("square", square_queries=s.square_queries)}
    found[f"PGD-{most} made on {UNTUNED}"] = {"attack": of("pgd", most, 4), "transfer": True}
    return found


def variants(s: Any) -> list[Variant]:
    """Each model under each attack; the untuned one is not attacked against itself once more."""
    return [
        variant(
            s, {"model": model, "attack": name}, method, own=True, protocol="last", few_images=True, **attack, **tuned
        )
        for model, (method, tuned) in models(s).items()
        for name, attack in attacks(s).items()
        if not (model == UNTUNED and attack.get("transfer"))
    ]


def by_model(done: Done) -> dict[str, dict[str, list[Record]]]:
    """model -> attack -> records, in order, with ``ALL`` at the end."""
    found: dict[str, dict[str, list[Record]]] = {}
    for v, records in done:
        found.setdefault(v.label["model"], {})[v.label["attack"]] = records
    return {model: of | {ALL: _combined(np.logical_and, *of.values())} for model, of in found.items()}


def with_all(done: Done) -> list[tuple[Variant, list[Record]]]:
    """The same, and each model under ``ALL``."""
    together = {model: of[ALL] for model, of in by_model(done).items()}
    last = {v.label["model"]: v for v, _ in done}
    rows = [(replace(v, label=v.label | {"attack": ALL}), together[model]) for model, v in last.items()]
    return sorted([*done, *rows], key=lambda row: list(last).index(row[0].label["model"]))


def _combined(of_bits: np.ufunc, *parts: Sequence[Record]) -> list[Record]:
    return combined(of_bits, *parts, attack=ALL, settings={}, protocol="worst")


def answer(done: Done) -> str:
    """A sentence a model, and one that says whether the published attack flatters one more than ``BASELINE``."""
    lines, flattered = [], {}
    attacked = lambda records: [r for r in records if r.attack != "none"]
    for model, of in by_model(done).items():
        (name, first), together = next(iter(of.items())), of[ALL]
        if not attacked(first):
            lines.append(f"{model}: not counted, as the attack cannot be trusted.")
            continue
        flattered[model] = attacked(_combined(np.greater, first, together))
        before, after = (per_seed(records).robust.mean() for records in (first, together))
        more, low, high = paired_difference(attacked(together), attacked(first))
        interval = f" [{low:+.1f}, {min(high, 0.0):+.1f}]" if low < high else ""  # nothing is won by more attacks
        change = f"{more:+.1f} points{interval}"
        lines.append(f"{model}: {before:.1f} % withstands {name}, {after:.1f} % {ALL}: {change}.")
    others = [model for model in flattered if model not in (UNTUNED, BASELINE) and BASELINE in flattered]
    for model in others:
        more, low, high = paired_difference(flattered[model], flattered[BASELINE])
        by = f"{more:+.1f} points [{low:+.1f}, {high:+.1f}]"
        if low <= 0 <= high:
            lines.append(f"Whether the published attack flatters {model} more than {BASELINE} is undecided: {by}.")
        else:
            lines.append(
                f"The published attack flatters {model} {'more' if low > 0 else 'less'} than {BASELINE}: {by}."
            )
    return "\n".join(lines)
