"""Unfinished training on the disk: its last two states, each whole and checked before it is used."""

import glob
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tgazsr_utils.runtime import processes
from tgazsr_utils.runtime.files import DamagedFile, load_tensors, save_tensors

KEPT = 2


class Checkpoints:
    """Files ``<run>.step<N>.ckpt``; ``run`` is a path whose name tells all that training depends on."""

    def __init__(self, run: Path):
        self.run = run

    def _files(self, hidden: str = "") -> list[Path]:
        """Newest first."""
        found = self.run.parent.glob(f"{hidden}{glob.escape(self.run.name)}.step*.ckpt")
        steps = {path: re.search(r"\.step(\d+)[^.]*\.ckpt$", path.name) for path in found}
        return sorted((path for path, step in steps.items() if step), key=lambda path: -int(steps[path][1]))

    def newest(self) -> Path | None:
        return next(iter(self._files()), None)

    def description(self) -> str:
        """For an error message."""
        return f"the last good checkpoint is {self.newest()}" if self.newest() else "there is no checkpoint yet"

    def save(self, state: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keeps ``state`` ("step" and what else JSON can hold), weights and optimiser; of these the last KEPT."""
        own = optimizer.state_dict()
        tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
        tensors |= {
            f"optimizer.{i}.{name}": value
            for i, values in own["state"].items()
            for name, value in values.items()
            if value is not None
        }
        tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
        path = self.run.with_name(f"{self.run.name}.step{state['step']}.ckpt")
        save_tensors(path, tensors, run=self.run.name, state=state, groups=own["param_groups"])
        for old in self._files()[KEPT:]:
            old.unlink(missing_ok=True)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restores the newest state that is whole, and gives what was kept with it; step 0 if there is none.

        What is damaged is named. Raises ValueError if nothing else is there.
        """
        path = processes.from_main(self._newest_whole)
        if path is None:
            return {"step": 0, "history": []}
        tensors, about = load_tensors(path, run=self.run.name)
        own = {name: value for name, value in tensors.items() if name.startswith("module.")}
        module.load_state_dict({name.removeprefix("module."): value for name, value in own.items()})
        states: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, quantity = name.split(".", 2)
                states.setdefault(int(number), {})[quantity] = value
        optimizer.load_state_dict({"state": states, "param_groups": about["groups"]})
        return about["state"]

    def _newest_whole(self) -> Path | None:
        damaged: dict[Path, str] = {}
        for path in self._files():
            try:
                load_tensors(path, run=self.run.name)
            except DamagedFile as error:
                damaged[path] = str(error)
                continue
            except FileNotFoundError:  # another process has finished this run
                continue
            for other, problem in damaged.items():
                print(f"checkpoint {problem}; going on from {path.name}", flush=True)
                other.rename(other.with_suffix(".ckpt.damaged"))  # no longer one of the last two
            return path
        if damaged:
            raise ValueError(f"checkpoint {' and '.join(damaged.values())}; remove it to train from the start")
        return None

    def remove(self) -> None:
        """Deletes the files, also what killed processes have left half written."""
        damaged = self.run.parent.glob(f"{glob.escape(self.run.name)}.step*.ckpt.damaged")
        for path in [*self._files(), *self._files("."), *damaged]:
            path.unlink(missing_ok=True)
