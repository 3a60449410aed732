"""Adversarial fine-tuning of the image encoder, resumable to the bit."""

import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from . import distributed
from .attacks import generators, pgd
from .checkpoints import Checkpoints
from .datasets import Batch, ImageSet
from .files import code_version, digest, seeded
from .frozen import FrozenCache
from .models import Clip, load_alike, read_metadata, save_clip
from .objectives import Objective, Step, find_objective
from .progress import progress
from .settings import FinetuneSettings

MODULES = ("models", "attention", "attention_kernel", "attacks", "checkpoints", "distributed", "objectives", "frozen", "datasets", "training")  # the source a tuned model depends on


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


def tuned_path(folder: Path, objective: Objective, settings: FinetuneSettings, data: ImageSet, original: Clip) -> Path:
    """The weights file of a run; its name holds a digest of all the run depends on."""
    # Also of functions that a notebook cell defines.
    source = [inspect.getsource(part) for part in (objective.terms, objective.attack) if part is not None]
    key = digest(
        source, settings.model_dump(), data.fingerprint(), original.fingerprint(), original.how, code_version(MODULES)
    )
    return folder / f"{objective.name}_seed{settings.seed}_{key}.safetensors"


def finetune(
    clip: Clip,
    data: ImageSet,
    objective: Objective | str,
    settings: FinetuneSettings,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
    processes: int = 1,
    watch: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> TrainResult:
    """Tunes a copy of ``clip``'s image encoder on ``data`` and writes its weights to ``folder``.

    Each step attacks the batch (PGD on cross-entropy, pixels only), lets the objective compute its terms and takes an
    SGD step. A checkpoint is written each epoch and on Ctrl-C, or when ``stop()`` is true after a step (both raise
    KeyboardInterrupt); the same call then goes on from there, and a finished run is only loaded. ``clip`` itself is
    not changed. ``processes`` of this machine share each batch (``distributed.launch``); so do the processes that call
    this together, as torchrun starts them: the outcome is that of one process but for rounding. ``watch`` is called after each
    step, instead of a bar, with the number of steps done and in all and what the history keeps of the step. Raises ValueError for an unknown objective, FloatingPointError for a loss, gradient or outcome that is not finite.
    """
    if isinstance(objective, str):
        objective = find_objective(objective)
    settings = objective.with_preset(settings)
    weights = tuned_path(folder, objective, settings, data, clip)
    if processes > 1 and distributed.processes() == 1 and not weights.exists():
        distributed.launch(processes, _finetune_with_others, clip, data, objective, settings, folder)
    if distributed.of_main(weights.exists):
        weights.touch()  # now the latest of its method
        return TrainResult(load_alike(clip, weights), pd.DataFrame(read_metadata(weights)["history"]), weights)

    original, tuned = clip.frozen_copy(), clip.frozen_copy()
    tuned.training = {"method": objective.name, "settings": settings.model_dump(), "data": data.fingerprint(), "code": code_version(MODULES)}
    data = data.resident(clip.device)
    cache = FrozenCache(original, data, folder / "unfinished" / weights.stem, quiet=watch is not None)
    parameters = trainable(tuned.visual, settings.last_num_ft)
    optimizer = torch.optim.SGD(
        parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    checkpoints = Checkpoints(weights.with_suffix(""))
    state = checkpoints.load(tuned.visual, optimizer)
    per_epoch = math.ceil(len(data) / settings.batch_size)
    total = per_epoch * settings.epochs
    main = distributed.rank() == 0
    hidden = watch is not None or not main
    bar = progress(total=total, initial=state["step"], desc=f"{objective.name} seed {settings.seed}", disable=hidden)
    with deferred_interrupt() as interrupted, bar:
        for step, chunk in batches(data, settings, state["step"], clip.device):
            started = time.perf_counter()
            optimizer.param_groups[0]["lr"] = settings.lr * warmup_cosine(step, settings.warmup_steps, total)
            batch = Step(tuned, original, chunk.images, chunk.labels, data.prompts, rows=chunk.rows, cache=cache)
            try:
                loss, values = attack_and_loss(batch, objective, settings, step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                distributed.average_gradients(parameters)
                values["gradient_norm"] = gradient_norm(batch, objective, settings, parameters, step)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; nothing was changed by this step, {checkpoints.said()}") from None
            optimizer.step()

            row = {"step": step, "lr": optimizer.param_groups[0]["lr"], **values, "seconds": time.perf_counter() - started}
            state["history"].append(row)
            state["step"] = step + 1
            bar.set_postfix({name: f"{v:.3f}" for name, v in values.items() if name not in ("robust_batch_accuracy", "gradient_norm")}, refresh=False)
            bar.update()
            if watch is not None:
                watch(state["step"], total, row)
            wanted = distributed.in_any(stop() or interrupted(), clip.device)
            if wanted or state["step"] % per_epoch == 0:
                with torch.no_grad():
                    tokens = tuned.encode_image(chunk.images[:8])
                if not all(part.isfinite().all() for part in tokens):
                    raise FloatingPointError(f"{objective.name} has diverged: its model gives no finite numbers after step {step}; {checkpoints.said()}")
                if main:
                    checkpoints.save(state, tuned.visual, optimizer)
            if wanted:
                raise KeyboardInterrupt(f"stopped after step {state['step']} of {total}; the same call goes on from there")
    if main:
        save_clip(tuned, weights, history=state["history"], **tuned.training)
        checkpoints.remove()
        cache.remove()
    distributed.wait()
    return TrainResult(tuned.requires_grad_(False), pd.DataFrame(state["history"]), weights)


def _finetune_with_others(
    clip: Clip, data: ImageSet, objective: Objective, settings: FinetuneSettings, folder: Path, device: torch.device
) -> None:
    finetune(clip.to(device), data, objective, settings, folder)


def attack_and_loss(
    batch: Step, objective: Objective, settings: FinetuneSettings, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Attacks the batch; the loss to minimise, and what to note: its value, the unweighted terms, accuracy on attacked images."""
    batch.adversarial = attacked(batch, objective, settings, step)
    terms = objective.terms(batch, settings)
    loss = sum(term.weight * term.value for term in terms)
    with torch.no_grad():
        logits = batch.clip.similarity(batch.adversarial_tokens.pooled, batch.text)
        accuracy = (logits.argmax(1) == batch.labels).float().mean()
        values = torch.stack([loss, *(term.value for term in terms), accuracy]).tolist()  # one wait for the device, not one each
    noted = dict(zip(["loss", *(term.name for term in terms), "robust_batch_accuracy"], values))
    if not math.isfinite(noted["loss"]):
        listed = ", ".join(f"{term.name} {noted[term.name]:g}" for term in terms)
        raise FloatingPointError(f"loss of {objective.name} is not finite at step {step}: {listed}")
    return loss, noted


def gradient_norm(
    batch: Step, objective: Objective, settings: FinetuneSettings, parameters: list[nn.Parameter], step: int
) -> float:
    """Euclidean norm of the gradients that the weights have now. Raises FloatingPointError, with the terms at fault, if it is not finite."""
    norm = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])).norm().item()
    if not math.isfinite(norm):
        again = replace(batch)  # its graph is used up
        faults = []
        for term in objective.terms(again, settings):
            slopes = torch.autograd.grad(term.value, parameters, retain_graph=True, allow_unused=True)
            if not all(torch.isfinite(slope).all() for slope in slopes if slope is not None):
                faults.append(term.name)
        raise FloatingPointError(f"gradient of {objective.name} is not finite at step {step}: that of {', '.join(faults) or 'their sum'}")
    return norm


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
    n = len(batch.images)
    part = batch if distributed.processes() == 1 else batch.part(distributed.share(n))
    adversarial = pgd(
        part.clip,
        part.images,
        part.labels,
        part.text,
        settings.train_eps / 255,
        settings.train_stepsize / 255,
        settings.train_numsteps,
        loss=objective.attack(part),
        generator=generators(batch.images.device, range(n)[distributed.share(n)], "training", settings.seed, 1, step),
    )
    return distributed.gather(adversarial, n)


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
        order = torch.randperm(len(data), generator=seeded("cpu", "training", settings.seed, 2, epoch))
        chunks = order.split(size)
        first = epoch * len(chunks)
        skip = min(max(start - first, 0), len(chunks))
        for batch in data.batches(chunks, device, skip):
            yield first + batch.number, batch


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C (SIGINT) only sets a flag, so that a step is never left half done; yields the flag's reader.

    With several processes so does SIGTERM, which is how they are told to stop.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT] if distributed.processes() == 1 else [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
