"""Adversarial fine-tuning of the image encoder: the algorithm, one optimiser step a turn."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.images import Batch, ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import Cache, Objective, Step, Term, weighted_sum
from tgazsr_utils.core.seeds import Noise, seeded
from tgazsr_utils.core.settings import FinetuneSettings

STARTS, ORDER = 1, 2  # of a run's random numbers: those of the attack, those of epochs
MakeAdversarial = Callable[[Step, Objective, FinetuneSettings, int], Tensor]


class NotFinite(FloatingPointError):
    """The loss or its gradient is not a number; the weights are as they were before this step."""

    def __init__(self, number: int, values: dict[str, float]):
        super().__init__(f"not finite at step {number}")
        self.number, self.values = number, values


class Update(NamedTuple):
    """What one optimiser step did."""

    number: int  # of the step, from 0
    lr: float
    names: list[str]
    numbers: Tensor  # [len(names)], on the device

    def values(self) -> dict[str, float]:
        """lr, loss, the unweighted terms, accuracy on the batch's attacked images, gradient norm.

        Waits for the device. Raises NotFinite.
        """
        values = {"lr": self.lr} | dict(zip(self.names, self.numbers.tolist()))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise NotFinite(self.number, values)
        return values


def steps(
    tuned: Clip,
    original: Clip,
    data: ImageSet,
    objective: Objective,
    settings: FinetuneSettings,
    optimizer: torch.optim.Optimizer,
    *,
    start: int = 0,
    cache: Cache | None = None,
    make_adversarial: MakeAdversarial | None = None,
) -> Iterator[Update]:
    """Tunes the image encoder of ``tuned`` on ``data`` from step ``start`` on: an optimiser step before each yield.

        minimise over f   sum_i weight_i * term_i(f, f0, x, x', y)

    with x' by PGD on the loss of the objective's attack (``attacked``, or ``make_adversarial``). ``settings`` must be
    complete (``Objective.with_preset``); ``cache``: see ``Step``. Nothing here waits for the device. A step that is not
    finite changes no weights, nor does one after it: ``Update.values`` raises NotFinite.
    """
    total = steps_in_all(data, settings)
    unsound = torch.zeros((), device=tuned.device)  # 1 from the first step on that is not finite
    stepped = False
    for number, batch in batches(data, settings, start, tuned.device):
        lr = settings.lr * warmup_cosine(number, settings.warmup_steps, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step = Step.of(data, batch, tuned, original, cache)
        if stepped:
            step.untouched = False  # to look would wait for the device

        step.adversarial = (make_adversarial or attacked)(step, objective, warmed_up(settings, number, total), number)
        terms = objective.terms(step, settings)
        loss = weighted_sum(terms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

        names, numbers = log_values(step, loss, terms, optimizer)
        unsound = torch.maximum(unsound, (~torch.stack([numbers[0], numbers[-1]]).isfinite().all()).float())
        # Fused optimisers then leave all as it is, as a gradient scaler asks them to.
        optimizer.found_inf = unsound  # type: ignore[attr-defined]
        optimizer.step()
        stepped = True
        yield Update(number, lr, names, numbers)


def attacked(
    step: Step, objective: Objective, settings: FinetuneSettings, number: int, positions: range | None = None
) -> Tensor:
    """x' ``[B,3,H,W]``: the step's images as the objective's attack makes them against the model being tuned.

    An image's random start is seeded by ``number``, that of the step, and its position in the batch; ``positions``: of
    these images there, if they are a part of it.
    """
    if objective.attack is None or not settings.train_eps:
        return step.images
    first, last = (0, len(step.images)) if positions is None else (positions.start, positions.stop)
    places = torch.arange(first, last, device=step.images.device)
    noise = Noise.named(places, "training", settings.seed, STARTS, number)
    bounds = settings.train_eps / 255, settings.train_stepsize / 255, settings.train_numsteps
    options: dict[str, Any] = {"start": settings.train_start, "loss": objective.attack(step), "generator": noise}
    options["trusted"] = True  # a set's pixels are in [0,1]; to see it would wait for the device
    return pgd(step.clip, step.images, step.labels, step.text, *bounds, **options)


def warmed_up(settings: FinetuneSettings, number: int, total: int) -> FinetuneSettings:
    """The settings of step ``number`` of ``total``: the training attack's epsilon and step size by ``attack_warmup``.

    Up to its first share of the steps they are 0, then they rise linearly until its second share, then they are held.
    """
    if not settings.attack_warmup:
        return settings
    (start, end), done = settings.attack_warmup, number / total
    part = (done - start) / (end - start) if start < done < end else float(done >= end)
    scaled = {name: part * getattr(settings, name) for name in ("train_eps", "train_stepsize")}
    return settings.model_copy(update=scaled)


@torch.no_grad()
def log_values(
    step: Step, loss: Tensor, terms: list[Term], optimizer: torch.optim.Optimizer
) -> tuple[list[str], Tensor]:
    """The numbers of a step after its backward, and their names."""
    logits = step.clip.similarity(step.adversarial_tokens.pooled, step.text)
    accuracy = (logits.argmax(1) == step.labels).float().mean()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    names = ["loss", *(term.name for term in terms), "robust_batch_accuracy", "gradient_norm"]
    return names, torch.stack([loss, *(term.value for term in terms), accuracy, norm])


def optimizer_of(tuned: Clip, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """The optimiser of what is tuned, SGD or AdamW; ``steps`` sets its learning rate."""
    parameters, decay = trainable(tuned.visual, settings.last_num_ft), settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, lr=0.0, momentum=settings.momentum, weight_decay=decay, fused=True)


def in_openai_order(visual: nn.Module) -> list[nn.Parameter]:
    """Parameters in the order of OpenAI's classes: in a block attn, ln_1, mlp, ln_2, where open_clip has ln_1 first."""
    first: dict[str, int] = {}  # place of each block
    entries = []
    for place, (name, parameter) in enumerate(visual.named_parameters()):
        found = re.match(r"(.*resblocks\.\d+)\.(attn|ln_1|mlp|ln_2)\.", name)
        block, part = found.groups() if found else (name, "attn")
        entries.append((first.setdefault(block, place), ("attn", "ln_1", "mlp", "ln_2").index(part), place, parameter))
    return [parameter for *_, parameter in sorted(entries, key=lambda entry: entry[:3])]


def trainable(visual: nn.Module, last: int) -> list[nn.Parameter]:
    """Freezes an image encoder but for its last ``last`` tensors, in OpenAI's order (0: all of them).

    Raises ValueError if there are not so many.
    """
    parameters = in_openai_order(visual.requires_grad_(False))
    if last > len(parameters):
        raise ValueError(f"last_num_ft is {last}; the image encoder has {len(parameters)} parameter tensors (0: all)")
    for parameter in parameters[-last:]:
        parameter.requires_grad_(True)
    return parameters[-last:]


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then cosine to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def steps_in_all(data: ImageSet, settings: FinetuneSettings) -> int:
    return math.ceil(len(data) / settings.batch_size) * settings.epochs


def batches(data: ImageSet, settings: FinetuneSettings, done: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Steps and their batches from step ``done`` on; the order depends on seed and epoch alone."""
    for epoch in range(settings.epochs):
        order = torch.randperm(len(data), generator=seeded("cpu", "training", settings.seed, ORDER, epoch))
        chunks = order.split(settings.batch_size)
        first = epoch * len(chunks)
        skip = min(max(done - first, 0), len(chunks))
        for batch in data.batches(chunks, device, skip):
            yield first + batch.number, batch
