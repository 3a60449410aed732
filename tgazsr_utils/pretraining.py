"""Contrastive pre-training of a small CLIP from scratch, on the mini-world or on photographs of named classes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.training import warmup_cosine
from tgazsr_utils.datasets import miniworld
from tgazsr_utils.datasets.files import decoded
from tgazsr_utils.parameters import PretrainNotebook
from tgazsr_utils.progress import progress
from tgazsr_utils.runtime.checkpoints import Checkpoints
from tgazsr_utils.runtime.fingerprints import code_version, data_key
from tgazsr_utils.runtime.processes import deferred_interrupt
from tgazsr_utils.runtime.weights import load_clip, model_config

CAPTIONS_PER_IMAGE = 2
_RELEVANT = {"arch", "seed", "steps", "batch_size", "lr", "warmup_steps", "weight_decay"}
_PHOTO_TEMPLATES = ("This is a photo of a {}", "A photo of a {}", "An image of a {}", "{}")


class Pairs(NamedTuple):
    """One batch: ``images`` ``[B,3,H,W]`` uint8, M captions, and ``fits`` ``[B,M]`` bool, true wherever one holds."""

    images: Tensor
    captions: list[str]
    fits: Tensor


@dataclass(frozen=True)
class PairSource:
    """Where pairs come from: ``batch(step)``, the same for the same step, and what names the data behind it."""

    batch: Callable[[int], Pairs]
    fingerprint: str


def miniworld_pairs(batch_size: int, seed: int) -> PairSource:
    """Fresh mini-world images at every step; the held-out pairs of shape and colour are never shown."""

    def batch(step: int) -> Pairs:
        generator = torch.Generator().manual_seed(int(digest("pretraining", seed, step), 16))
        attributes = miniworld.sample_attributes(batch_size, generator, held_out=False)
        images, _ = miniworld.render(attributes, generator)
        drawn = [miniworld.sample_captions(attributes, generator) for _ in range(CAPTIONS_PER_IMAGE)]
        captions = [text for texts, _ in drawn for text in texts]
        fits = miniworld.caption_fits(torch.cat([demands for _, demands in drawn]), attributes)
        return Pairs(images, captions, fits.T)

    return PairSource(batch, "mini-world")


def photo_pairs(sets: Sequence[ImageSet], batch_size: int, seed: int, image_size: int) -> PairSource:
    """Augmented photographs with captions from their class names; a caption fits every image of a class so named."""
    sets = [decoded(data) for data in sets]
    images = torch.cat([data.images for data in sets])
    names = [data.class_names[label] for data in sets for label in data.labels.tolist()]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names))}
    classes = torch.tensor([ids[name] for name in names])

    def batch(step: int) -> Pairs:
        generator = torch.Generator().manual_seed(int(digest("pretraining", seed, step), 16))
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        templates = torch.randint(len(_PHOTO_TEMPLATES), (batch_size,), generator=generator).tolist()
        captions = [_PHOTO_TEMPLATES[t].format(names[i]) for t, i in zip(templates, chosen.tolist())]
        fits = classes[chosen][:, None] == classes[chosen][None]
        return Pairs(augment(images[chosen], image_size, generator), captions, fits)

    return PairSource(batch, digest([data_key(data) for data in sets], image_size))


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random resized crop, flip, brightness, contrast and saturation of ``[B,3,H,W]`` uint8, to ``size`` x ``size``."""
    n = len(images)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=generator)
    area, stretch = uniform(0.35, 1.0), uniform(-0.29, 0.29).exp()  # sides up to 4:3
    width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    pixels = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + uniform(0.6, 1.4, 1, 1, 1) * (pixels - grey)
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (middle + uniform(0.6, 1.4, 1, 1, 1) * (pixels - middle)) * uniform(0.6, 1.4, 1, 1, 1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def contrastive_loss(images: Tensor, texts: Tensor, fits: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy in which every pair that fits is a positive (UniCL, Yang et al. 2022).

    ``images`` ``[B,D]`` and ``texts`` ``[M,D]`` unit norm, ``fits`` ``[B,M]`` bool with a true in each row and column.
    """
    logits, weight = scale * images @ texts.T, fits.float()
    by_image = -(logits.log_softmax(1) * weight).sum(1) / weight.sum(1)
    by_text = -(logits.log_softmax(0) * weight).sum(0) / weight.sum(0)
    return (by_image.mean() + by_text.mean()) / 2


@dataclass(frozen=True)
class PretrainResult:
    clip: Clip
    history: pd.DataFrame  # one row a step: lr, loss, logit_scale


def pretrain(pairs: PairSource, settings: PretrainNotebook, folder: Path) -> PretrainResult:
    """Trains ``settings.arch`` from random weights with AdamW.

    A checkpoint in ``folder``, named after all the result depends on, is written every 200 steps, on Ctrl-C (which
    raises KeyboardInterrupt) and at the end; the same call goes on from there.
    """
    relevant = settings.model_dump(include=_RELEVANT)
    key = digest(relevant, pairs.fingerprint, model_config(settings.arch), code_version(__name__))
    checkpoints = Checkpoints(folder / f"pretrain_{settings.arch}_{key}")
    clip = load_clip(settings.arch, None, settings.device, seed=settings.seed).requires_grad_(True)
    optimizer = _optimizer(clip.model, settings.weight_decay)
    state = checkpoints.load(clip.model, optimizer)
    bar = progress(total=settings.steps, initial=state["step"], desc=f"pre-train {settings.arch}")
    with deferred_interrupt() as interrupted, bar:
        for step in range(state["step"], settings.steps):
            batch = pairs.batch(step)
            lr = settings.lr * warmup_cosine(step, settings.warmup_steps, settings.steps)
            loss = _step(clip, batch, optimizer, lr, step, checkpoints)
            scale = clip.model.logit_scale.exp().item()
            state["history"].append({"step": step, "lr": lr, "loss": loss, "logit_scale": scale})
            state["step"] = step + 1
            bar.set_postfix(loss=f"{loss:.3f}", scale=f"{scale:.1f}", refresh=False)
            bar.update()
            if interrupted() or state["step"] % 200 == 0 or state["step"] == settings.steps:
                with torch.no_grad():
                    after = _loss(clip, batch)
                if not after.isfinite():
                    problem = f"pre-training has diverged: its loss is not finite after step {step}"
                    raise FloatingPointError(f"{problem}; {checkpoints.description()}")
                checkpoints.save(state, clip.model, optimizer)
            if interrupted():
                raise KeyboardInterrupt(f"stopped after step {state['step']} of {settings.steps}; run again to go on")
    clip.eval().requires_grad_(False)
    return PretrainResult(clip, pd.DataFrame(state["history"]))


def _optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Without decay of biases, gains and the logit scale."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6)


def _loss(clip: Clip, batch: Pairs) -> Tensor:
    texts = clip.model.encode_text(clip.tokenizer(batch.captions).to(clip.device), normalize=True)
    images = F.normalize(clip.encode_image(batch.images.to(clip.device).float() / 255).pooled, dim=-1)
    return contrastive_loss(images, texts, batch.fits.to(clip.device), clip.model.logit_scale.exp())


def _step(
    clip: Clip, batch: Pairs, optimizer: torch.optim.Optimizer, lr: float, step: int, checkpoints: Checkpoints
) -> float:
    """One optimiser step; the loss before it. Raises FloatingPointError, and changes nothing, if that is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = _loss(clip, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(clip.model.parameters(), 1.0)
    if not (loss.isfinite() and norm.isfinite()):
        problem = f"contrastive loss {loss.item():g}, norm of its gradient {norm.item():g}"
        kept = f"nothing was changed by this step, {checkpoints.description()}"
        raise FloatingPointError(f"pre-training is not finite at step {step}: {problem}; {kept}")
    optimizer.step()
    with torch.no_grad():
        clip.model.logit_scale.clamp_(0, math.log(100))
    return loss.item()
