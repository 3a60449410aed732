"""Fine-tuning that survives: ``core.training.steps`` with files, resuming to the bit, Ctrl-C, several processes."""

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import Objective, Step, find_objective
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import FinetuneSettings
from tgazsr_utils.core.training import NotFinite, Update, batches, optimizer_of, steps, steps_in_all, warmed_up
from tgazsr_utils.datasets.files import resident
from tgazsr_utils.progress import progress
from tgazsr_utils.runtime import processes
from tgazsr_utils.runtime.checkpoints import Checkpoints
from tgazsr_utils.runtime.fingerprints import code_version, data_key, fingerprint
from tgazsr_utils.runtime.original_cache import OriginalCache
from tgazsr_utils.runtime.plugins import source_of
from tgazsr_utils.runtime.weights import load_alike, read_metadata, save_clip

READ_EVERY = {"cuda": 16}  # steps whose numbers are read at once: to read waits for the device, which then has no work
# Called with steps done, steps in all, what the history keeps of the last one.
Watch = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    clip: Clip  # tuned
    history: pd.DataFrame  # one row a step: lr, loss, the unweighted terms, batch accuracy on attacked images, seconds
    weights: Path


def tuned_path(folder: Path, objective: Objective, settings: FinetuneSettings, data: ImageSet, original: Clip) -> Path:
    """The weights file of a run; its name holds a digest of all the run depends on."""
    # Of a plugin the whole file; also of functions that a notebook cell defines.
    parts = [part for part in (objective.terms, objective.attack) if part is not None]
    source = source_of(objective) or [inspect.getsource(part) for part in parts]
    texts = {name: getattr(data, name) for name in objective.reads}
    depends = [settings.model_dump(), texts, data_key(data), fingerprint(original), original.numerics]
    key = digest(source, *depends, code_version(__name__))
    return folder / f"{objective.name}_seed{settings.seed}_{key}.safetensors"


def finetune(
    clip: Clip,
    data: ImageSet,
    objective: Objective | str,
    settings: FinetuneSettings,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
    number_of_processes: int = 1,
    watch: Watch | None = None,
) -> TrainResult:
    """Tunes a copy of ``clip``'s image encoder on ``data`` (``core.training.steps``); writes its weights to ``folder``.

    A checkpoint is written each epoch and on Ctrl-C, or when ``stop()`` is true after a step (both raise
    KeyboardInterrupt); the same call then goes on from there, and a finished run is only loaded. ``clip`` itself is
    not changed. So many processes of this machine share each batch (``processes.launch``); so do the processes that
    call this together, as torchrun starts them: the outcome is that of one process but for rounding. ``watch`` is
    called after each step, instead of a bar. Raises ValueError for an unknown objective, FloatingPointError for a
    loss, gradient or outcome that is not finite.
    """
    if isinstance(objective, str):
        objective = find_objective(objective)
    settings = objective.with_preset(settings)
    weights = tuned_path(folder, objective, settings, data, clip)
    if number_of_processes > 1 and not processes.are_started() and not weights.exists():
        processes.launch(number_of_processes, finetune, clip, data, objective, settings, folder)
    if processes.from_main(weights.exists):
        return TrainResult(load_alike(clip, weights), pd.DataFrame(read_metadata(weights)["history"]), weights)
    hidden = watch is not None or not processes.is_main()
    return _Run(clip, data, objective, settings, weights, hidden).finish(stop, watch)


_resident = functools.lru_cache(maxsize=1)(resident)  # of the set that methods are tuned on, one after another


class _Run:
    """One training under way: what ``core.training.steps`` needs, and where its state is kept."""

    def __init__(
        self, clip: Clip, data: ImageSet, objective: Objective, settings: FinetuneSettings, weights: Path, hidden: bool
    ):
        self.objective, self.settings, self.weights, self.hidden = objective, settings, weights, hidden
        self.original, self.tuned = (processes.shared(clip.frozen_copy()) for _ in range(2))
        about = {"method": objective.name, "settings": settings.model_dump(), "data": fingerprint(data)}
        about |= {name: digest(getattr(data, name)) for name in objective.reads}
        self.tuned.training_record = about | {"code": code_version(__name__)}
        self.data = _resident(data, clip.device)
        self.cache = OriginalCache(self.original, self.data, weights.parent / "unfinished" / weights.stem, hidden)
        self.optimizer = optimizer_of(self.tuned, settings)
        self.parameters = self.optimizer.param_groups[0]["params"]
        processes.average_gradients_of(self.parameters)
        self.checkpoints = Checkpoints(weights.with_suffix(""))
        self.state = self.checkpoints.load(self.tuned.visual, self.optimizer)
        self.unread: list[Update] = []
        self.read = time.perf_counter()
        self._what = self.tuned, self.original, self.data, self.objective, self.settings, self.optimizer
        self._how = {"cache": self.cache, "make_adversarial": processes.shared_attack}

    def finish(self, stop: Callable[[], bool], watch: Watch | None) -> TrainResult:
        per_epoch, total = math.ceil(len(self.data) / self.settings.batch_size), steps_in_all(self.data, self.settings)
        name = f"{self.objective.name} seed {self.settings.seed}"
        bar = progress(total=total, initial=self.state["step"], desc=name, disable=self.hidden)
        with processes.deferred_interrupt() as interrupted, bar:
            for update in steps(*self._what, start=self.state["step"], **self._how):
                self.unread.append(update)
                self.state["step"] = done = update.number + 1
                wanted = processes.in_any(stop() or interrupted(), self.tuned.device)
                keep = wanted or done % per_epoch == 0
                if keep or len(self.unread) == READ_EVERY.get(self.tuned.device.type, 1):
                    for row in self._read():
                        shown = [name for name in row if name == "loss" or name in update.names[1:-2]]
                        bar.set_postfix({name: f"{row[name]:.3f}" for name in shown}, refresh=False)
                        bar.update()
                        if watch is not None:
                            watch(row["step"] + 1, total, row)
                if keep:
                    self._keep()
                if wanted:
                    raise KeyboardInterrupt(f"stopped after step {done} of {total}; the same call goes on from there")
        if processes.is_main():
            save_clip(self.tuned, self.weights, history=self.state["history"], **self.tuned.training_record)
            self.checkpoints.remove()
            self.cache.remove()
        processes.wait()
        tuned = processes.alone(self.tuned).requires_grad_(False)
        return TrainResult(tuned, pd.DataFrame(self.state["history"]), self.weights)

    def _read(self) -> Iterator[dict[str, float]]:
        """History of the unread steps, which share the time since those before were read.

        What is not finite is told with the term at fault and the last good checkpoint.
        """
        try:
            values = [update.values() for update in self.unread]
        except NotFinite as error:
            kept = f"nothing was changed by this step, {self.checkpoints.description()}"
            raise FloatingPointError(f"{self._diagnosis(error)}; {kept}") from None
        seconds, self.read = (time.perf_counter() - self.read) / len(self.unread), time.perf_counter()
        for update, row in zip(self.unread, values):
            self.state["history"].append({"step": update.number, **row, "seconds": seconds})
            yield self.state["history"][-1]
        self.unread.clear()

    def _keep(self) -> None:
        """Writes a checkpoint, of a model that still works."""
        with torch.no_grad():
            tokens = self.tuned.encode_image(next(self.data.batches(8, self.tuned.device)).images)
        if not all(part.isfinite().all() for part in tokens):
            problem = f"its model gives no finite numbers after step {self.state['step'] - 1}"
            raise FloatingPointError(f"{self.objective.name} has diverged: {problem}; {self.checkpoints.description()}")
        if processes.is_main():
            self.checkpoints.save(self.state, self.tuned.visual, self.optimizer)

    def _diagnosis(self, error: NotFinite) -> str:
        """Which terms of a step are not finite, or whose gradients are not; the weights still are as it found them."""
        tuned, original, data, objective, settings, _ = self._what
        _, batch = next(batches(data, settings, error.number, tuned.device))
        step = Step.of(data, batch, tuned, original, self.cache)
        now = warmed_up(settings, error.number, steps_in_all(data, settings))
        step.adversarial = processes.shared_attack(step, objective, now, error.number)
        terms = objective.terms(step, settings)
        if not math.isfinite(error.values["loss"]):
            listed = ", ".join(f"{term.name} {error.values[term.name]:g}" for term in terms)
            return f"loss of {objective.name} is not finite at step {error.number}: {listed}"
        faults = []
        for term in (term for term in terms if term.value.requires_grad):
            slopes = torch.autograd.grad(term.value, self.parameters, retain_graph=True, allow_unused=True)
            if not all(torch.isfinite(slope).all() for slope in slopes if slope is not None):
                faults.append(term.name)
        at_fault = ", ".join(faults) or "their sum"
        return f"gradient of {objective.name} is not finite at step {error.number}: that of {at_fault}"
