"""Adversarial fine-tuning of the image encoder, resumable to the bit."""

import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from .attacks import pgd
from .datasets import Batch, ImageSet
from .files import code_version, digest, write_atomic
from .frozen import FrozenCache
from .models import Clip, load_clip, read_metadata, save_clip
from .objectives import Objective, Step, Term, find_objective
from .progress import progress
from .settings import FinetuneSettings

MODULES = ("models", "attention", "attention_kernel", "attacks", "objectives", "frozen", "training")  # the source a tuned model depends on


@dataclass(frozen=True)
class TrainResult:
    clip: Clip  # tuned
    history: pd.DataFrame  # one row a step: lr, loss, the unweighted terms, batch accuracy on attacked images
    weights: Path


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then cosine to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def tuned_path(folder: Path, objective: Objective, settings: FinetuneSettings, data: ImageSet, original: str) -> Path:
    """The weights file of a run; its name holds a digest of all the run depends on."""
    # Also of functions that a notebook cell defines.
    source = [inspect.getsource(part) for part in (objective.terms, objective.attack) if part is not None]
    key = digest(source, settings.model_dump(), data.fingerprint(), original, code_version(MODULES))
    return folder / f"{objective.name}_seed{settings.seed}_{key}.safetensors"


def finetune(
    clip: Clip,
    data: ImageSet,
    objective: Objective | str,
    settings: FinetuneSettings,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Tunes a copy of ``clip``'s image encoder on ``data`` and writes its weights to ``folder``.

    Each step attacks the batch (PGD on cross-entropy, pixels only), lets the objective compute its terms and takes an
    SGD step. A checkpoint is written each epoch and on Ctrl-C, or when ``stop()`` is true after a step (both raise
    KeyboardInterrupt); the same call then goes on from there, and a finished run is only loaded. ``clip`` itself is
    not changed. Raises ValueError for an unknown objective, FloatingPointError for a loss that is not finite.
    """
    if isinstance(objective, str):
        objective = find_objective(objective)
    settings = objective.with_preset(settings)
    weights = tuned_path(folder, objective, settings, data, clip.fingerprint())
    if weights.exists():
        weights.touch()  # now the latest of its method
        tuned = load_clip(clip.arch, weights, str(clip.device), image_size=clip.image_size[0])
        return TrainResult(tuned, pd.DataFrame(read_metadata(weights)["history"]), weights)

    original, tuned = clip.frozen_copy(), clip.frozen_copy()
    cache = FrozenCache(original, data, folder / "unfinished" / weights.stem)
    parameters = trainable(tuned.visual, settings.last_num_ft)
    optimizer = torch.optim.SGD(
        parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    checkpoint = weights.with_suffix(".ckpt")
    state = load_checkpoint(checkpoint, tuned.visual, optimizer)
    per_epoch = math.ceil(len(data) / settings.batch_size)
    total = per_epoch * settings.epochs
    bar = progress(total=total, initial=state["step"], desc=f"{objective.name} seed {settings.seed}")
    with deferred_interrupt() as interrupted, bar:
        for step, chunk in batches(data, settings, state["step"], clip.device):
            started = time.perf_counter()
            optimizer.param_groups[0]["lr"] = settings.lr * warmup_cosine(step, settings.warmup_steps, total)
            batch = Step(tuned, original, chunk.images, chunk.labels, data.prompts, rows=chunk.rows, cache=cache)
            loss, terms = attack_and_loss(batch, objective, settings, step)
            with torch.no_grad():
                correct = tuned.similarity(batch.adversarial_tokens.pooled, batch.text).argmax(1) == batch.labels
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            row = {"step": step, "lr": optimizer.param_groups[0]["lr"], "loss": loss.item()}
            row |= {term.name: term.value.item() for term in terms}
            row |= {"robust_batch_accuracy": correct.float().mean().item(), "seconds": time.perf_counter() - started}
            state["history"].append(row)
            state["step"] = step + 1
            bar.set_postfix({name: f"{row[name]:.3f}" for name in ["loss", *(term.name for term in terms)]}, refresh=False)
            bar.update()
            wanted = stop() or interrupted()
            if wanted or state["step"] % per_epoch == 0:
                save_checkpoint(checkpoint, state, tuned.visual, optimizer)
            if wanted:
                raise KeyboardInterrupt(f"stopped after step {state['step']} of {total}; the same call goes on from there")
    save_clip(tuned, weights, method=objective.name, settings=settings.model_dump(), history=state["history"])
    checkpoint.unlink(missing_ok=True)
    cache.remove()
    return TrainResult(tuned.requires_grad_(False), pd.DataFrame(state["history"]), weights)


def attack_and_loss(
    batch: Step, objective: Objective, settings: FinetuneSettings, step: int
) -> tuple[Tensor, list[Term]]:
    """Attacks the batch; the loss to minimise and the terms it is the weighted sum of."""
    batch.adversarial = attacked(batch, objective, settings, step)
    terms = objective.terms(batch, settings)
    loss = sum(term.weight * term.value for term in terms)
    if not torch.isfinite(loss):
        values = ", ".join(f"{term.name} {term.value.item():g}" for term in terms)
        raise FloatingPointError(f"loss of {objective.name} is not finite at step {step}: {values}")
    return loss, terms


def seconds_per_step(clip: Clip, data: ImageSet, objective: Objective, settings: FinetuneSettings) -> float:
    """Wall time of one training step, measured on a copy of ``clip``; a first step, which is slower, is not counted."""
    settings = objective.with_preset(settings)
    original, tuned = clip.frozen_copy(), clip.frozen_copy()
    trainable(tuned.visual, settings.last_num_ft)
    _, chunk = next(batches(data, settings, 0, clip.device))
    for step in range(2):
        started = time.perf_counter()
        loss, _ = attack_and_loss(Step(tuned, original, chunk.images, chunk.labels, data.prompts), objective, settings, step)
        loss.backward()
        loss.item()  # waits for the device
    return time.perf_counter() - started


def attacked(batch: Step, objective: Objective, settings: FinetuneSettings, step: int) -> Tensor:
    """The batch's images as the objective's attack makes them against the model being tuned; seeded by the step."""
    if objective.attack is None:
        return batch.images
    return pgd(
        batch.clip,
        batch.images,
        batch.labels,
        batch.text,
        settings.train_eps / 255,
        settings.train_stepsize / 255,
        settings.train_numsteps,
        loss=objective.attack(batch),
        generator=torch.Generator().manual_seed(_seed(settings.seed, 1, step)),
    )


def trainable(visual: nn.Module, last: int) -> list[nn.Parameter]:
    """Switches gradients on for all of an image encoder's parameter tensors, or for its last ``last`` ones.

    Raises ValueError if there are not so many.
    """
    parameters = list(visual.parameters())
    if last > len(parameters):
        raise ValueError(f"last_num_ft is {last}; the image encoder has {len(parameters)} parameter tensors (0: all)")
    parameters = parameters[-last:]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def batches(
    data: ImageSet, settings: FinetuneSettings, start: int, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """Steps and their batches from step ``start`` on; the order depends on seed and epoch alone."""
    size = settings.batch_size
    for epoch in range(settings.epochs):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(_seed(settings.seed, 2, epoch)))
        chunks = order.split(size)
        first = epoch * len(chunks)
        skip = min(max(start - first, 0), len(chunks))
        for batch in data.batches(chunks, device, skip):
            yield first + batch.number, batch


def _seed(seed: int, stream: int, index: int) -> int:
    return int(digest("training", seed, stream, index), 16)


def save_checkpoint(path: Path, state: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    whole = state | {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    write_atomic(path, lambda temporary: torch.save(whole, temporary))


def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores module and optimiser from ``path`` if it is there; the step to go on from and the history so far."""
    if not path.exists():
        return {"step": 0, "history": []}
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state.pop("module"))
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C (SIGINT) only sets a flag, so that a step is never left half done; yields the flag's reader."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
