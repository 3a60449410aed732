"""Notebook 03's table of accuracy over Alpha and Beta, and where a point lies among what it holds."""

from pathlib import Path

import numpy as np
import pandas as pd

from tgazsr_utils.paths import DATA

KINDS = ("robust", "clean", "average")  # of accuracy
REFERENCE = DATA / "reference" / "mini" / "tables" / "ablation_alpha_beta.csv"  # of the mini-world


def recorded_sweep(output: Path, world: str) -> tuple[pd.DataFrame | None, str]:
    """The table and where it is from: the folder ``output``, else for the mini-world the kept reference.

    Raises ValueError, one line, for a table that is damaged.
    """
    own = output / "tables" / REFERENCE.name
    if own.exists():
        return _read(own), "measured here by notebook 03"
    if world == "mini-world" and REFERENCE.exists():
        return _read(REFERENCE), "the kept reference, three seeds"
    return None, "no sweep is recorded: run notebook 03"


def _read(path: Path) -> pd.DataFrame:
    try:
        sweep = pd.read_csv(path)
        if sweep.empty:
            raise ValueError("it has no rows")
        return sweep.astype(dict.fromkeys(("Alpha", "Beta", *KINDS), float))
    except (ValueError, KeyError) as error:  # also pandas' own, and bytes that are no text
        raise ValueError(f"table {path} is damaged ({' '.join(str(error).split())}); run notebook 03 again") from None


def nearest_measured(sweep: pd.DataFrame, Alpha: float, Beta: float) -> pd.Series:
    """The row of ``sweep`` nearest to (Alpha, Beta), a step of the measured grid counted as one in either direction."""
    away = 0
    for name, value in (("Alpha", Alpha), ("Beta", Beta)):
        away = away + (grid_position(sweep[name], sweep[name]) - grid_position(sweep[name], value)) ** 2
    return sweep.iloc[int(np.argmin(away))]


def grid_position(values: pd.Series, value: float | pd.Series) -> float | np.ndarray:
    """Where ``value``, or each of several, lies among the sorted distinct ``values``, from 0 on; held at the ends."""
    grid = np.unique(values)
    return np.interp(value, grid, np.arange(len(grid)))
