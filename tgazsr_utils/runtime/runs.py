"""A run's folder, which people read, and the store beside it, where models and records lie by content for all runs."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tgazsr_utils.runtime.files import write_atomic


@dataclass(frozen=True)
class Run:
    """``runs/<name>/``: executed notebooks, HTML, figures, tables, and the models that this run shows."""

    folder: Path

    @property
    def store(self) -> Path:
        """Shared by all runs beside this one; a run that was started over has one of its own."""
        own = self.folder / "store"
        return own if own.is_dir() else self.folder.parent / "store"

    @property
    def stored_models(self) -> Path:
        return self.store / "models"

    @property
    def stored_records(self) -> Path:
        return self.store / "records"

    @property
    def models(self) -> Path:
        """Of this run: links into the store, the latest last in time. What "latest:NAME" is looked for in."""
        return self.folder / "models"

    def show(self, weights: Path) -> Path:
        """Puts stored weights among the models of this run, as the latest of their name (a link, or else a copy)."""
        if weights.parent == self.models:
            return weights

        def link(temporary: Path) -> None:
            try:
                temporary.symlink_to(os.path.relpath(weights, self.models))
            except OSError:  # Windows lets only some make links
                shutil.copy(weights, temporary)

        return write_atomic(self.models / weights.name, link)
