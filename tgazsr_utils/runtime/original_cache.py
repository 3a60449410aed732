"""What the original model makes of the training images: it never changes, so it is computed once a run and kept."""

import glob
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import Step
from tgazsr_utils.progress import progress
from tgazsr_utils.runtime import processes
from tgazsr_utils.runtime.files import DamagedFile, load_tensors, save_tensors

BATCH = 128  # a fixed partition, so that values do not depend on the order of training


class OriginalCache:
    """Values of each image of ``data`` under ``original``, one file ``<run>_<name>.safetensors`` for each quantity.

    ``run`` names all that training depends on (``finetuning.tuned_path``), so no stale file is taken; a damaged one
    is made anew.
    """

    def __init__(self, original: Clip, data: ImageSet, run: Path, quiet: bool = False):
        self.original, self.data, self.run, self.quiet = original, data, run, quiet
        self._kept: dict[str, Tensor] = {}

    def remove(self) -> None:
        """Deletes the files, which a finished run has no use for."""
        for path in self.run.parent.glob(f"{glob.escape(self.run.name)}_*"):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.run.parent / f"{self.run.name}_{name}.safetensors"

    def __call__(self, name: str, compute: Callable[[Step], Tensor], rows: Tensor) -> Tensor:
        """Values ``[len(rows), ...]`` on the model's device; ``compute`` gives those of a Step that is not attacked."""
        if name not in self._kept:
            values = self._read(name)
            if processes.in_any(values is None, self.original.device):
                values = self._make(name, compute)
                if processes.is_main():
                    save_tensors(self._path(name), {"values": values}, run=self.run.name, name=name)
            self._kept[name] = values.to(self.original.device)
        return self._kept[name][rows.to(self.original.device, non_blocking=True)]

    def _read(self, name: str) -> Tensor | None:
        try:
            return load_tensors(self._path(name), run=self.run.name, name=name)[0]["values"]
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            print(f"{error}; making it anew", flush=True)
            return None

    @torch.no_grad()
    def _make(self, name: str, compute: Callable[[Step], Tensor]) -> Tensor:
        """Values ``[N, ...]`` of all images, fp32 on the CPU."""
        values = None
        with progress(total=len(self.data), desc=f"original model, {name}", unit="image", disable=self.quiet) as bar:
            for batch in self.data.batches(BATCH, self.original.device):
                part = compute(Step.of(self.data, batch, self.original, self.original)).float().cpu()
                if values is None:
                    values = part.new_zeros(len(self.data), *part.shape[1:])  # zeros: of images that cannot be read
                values[batch.rows] = part
                bar.update(len(batch.rows))
        return values
