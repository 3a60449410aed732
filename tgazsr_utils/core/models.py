"""CLIP as the rest of the package sees it: pixels in [0,1] in, projected class and patch tokens out."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tgazsr_utils.core.encoder import run_compiled, with_larger_products
from tgazsr_utils.core.libraries import open_clip


class ImageTokens(NamedTuple):
    """One forward of the image encoder, both parts in the joint space and not normalised."""

    pooled: Tensor  # [B,D], from the class token
    patches: Tensor  # [B,P,D], row by row over the patch grid


class Numerics(NamedTuple):
    """How a model computes: what its numbers depend on besides its weights."""

    device: str = "cpu"  # type of device that it is meant for
    # "fp32", "fp16" or "bf16" weights; "amp_bf16", "amp_fp16": fp32 weights and such autocast in the image encoder
    precision: str = "fp32"
    compiled: bool = False  # the image encoder's blocks and an attack's steps, through torch.compile


AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Clip(nn.Module):
    """An open_clip ViT CLIP with its normalisation inside and its prompt embeddings kept.

    ``model`` is the open_clip model; only ``model.visual``, the image encoder, is ever tuned. Its text tower and logit
    scale stay frozen unless it is pre-trained. Raises ValueError for a model without a class token beside
    patch tokens.
    """

    def __init__(self, model: nn.Module, arch: str, numerics: Numerics = Numerics()):
        super().__init__()
        visual, library = model.visual, open_clip()
        if (
            not isinstance(visual, library.transformer.VisionTransformer)
            or visual.attn_pool is not None
            or visual.pool_type != "tok"
        ):
            raise ValueError(
                f"arch {arch!r} has no class token with patch tokens beside it, which text-guided attention needs; "
                "use a ViT with a class token such as ViT-B-32-quickgelu"
            )
        visual.output_tokens = True
        with_larger_products(visual)
        self.model: Any = model  # open_clip's own class, whose parts are called by name
        self.arch, self.numerics = arch, numerics
        # What made the weights, where that is known: method, settings, data and code.
        self.training_record: dict[str, Any] = {}
        self.tokenizer = library.get_tokenizer(arch)
        self.grid: tuple[int, int] = visual.grid_size
        self.image_size: tuple[int, int] = visual.image_size
        preprocess = library.get_model_preprocess_cfg(model)
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1))
        self._prompts: dict[str, Tensor] = {}

    mean: Tensor  # [3,1,1]
    std: Tensor

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def visual(self) -> Any:
        """The image encoder, open_clip's ``VisionTransformer``."""
        return self.model.visual

    def encode_image(self, pixels: Tensor) -> ImageTokens:
        """Tokens of images ``[B,3,H,W]`` in [0,1]; one forward. Raises ValueError for images of another size."""
        return encode(self, pixels)

    @property
    def compiles(self) -> bool:
        """Does it run compiled: is it meant to, and on the device it is meant for?"""
        return self.numerics.compiled and self.device.type == self.numerics.device

    def run(self, function: Callable, *arguments: Any) -> Any:
        """``function(*arguments)``, compiled if this model is."""
        return run_compiled(function, *arguments) if self.compiles else function(*arguments)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The image encoder without gradients, which compiled code makes also where only those of pixels are wanted."""
        tuned = [parameter for parameter in self.visual.parameters() if parameter.requires_grad]
        for parameter in tuned:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in tuned:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings ``[C,D]`` of prompts; each prompt is encoded once and kept.

        Raises ValueError for one that the text tower would cut.
        """
        missing = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        if missing:
            tokens = tokenize(self.tokenizer, missing, self.arch).to(self.device, non_blocking=True)
            embeddings = torch.cat([self.model.encode_text(part, normalize=True) for part in tokens.split(512)])
            self._prompts.update(zip(missing, embeddings))
        return torch.stack([self._prompts[p].to(self.device) for p in prompts])

    def similarity(self, pooled: Tensor, text: Tensor) -> Tensor:
        """``exp(logit_scale) * cosine``: logits ``[B,C]`` of pooled tokens ``[B,D]`` and unit-norm text ``[C,D]``."""
        scale = self.model.logit_scale.detach().exp().clamp(max=100.0)
        return scale * F.normalize(pooled.float(), dim=-1) @ text.float().T

    def logits(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Zero-shot logits ``[B,C]`` of images ``[B,3,H,W]`` in [0,1] against unit-norm text ``[C,D]``."""
        return self.similarity(self.encode_image(pixels).pooled, text)

    def without_autocast(self) -> "Clip":
        """The same model, sharing its weights, without autocast."""
        return self.under_autocast("fp32") if self.numerics.precision in AUTOCAST else self

    def under_autocast(self, precision: str) -> "Clip":
        """The same model, sharing its fp32 weights, with another precision of autocast, or "fp32" for none."""
        clone = copy.copy(self)
        clone.numerics = self.numerics._replace(precision=precision)
        return clone

    def frozen_copy(self) -> "Clip":
        """The same model with an image encoder of its own, without gradients; the text tower is shared."""
        clone = copy.copy(self)
        clone._modules = dict(self._modules)
        clone.model = copy.copy(self.model)
        clone.model._modules = {**self.model._modules, "visual": copy.deepcopy(self.visual)}
        clone.visual.eval().requires_grad_(False)
        return clone


def tokenize(tokenizer: Any, prompts: Sequence[str], arch: str) -> Tensor:
    """Tokens ``[C,n]`` (int64) of prompts, n the context length of the architecture's text tower.

    Raises ValueError for a prompt of more tokens: its end would be lost.
    """
    limit = tokenizer.context_length
    tokens, more = (tokenizer(list(prompts), context_length=n)[:, :limit] for n in (limit, limit + 1))
    for prompt, cut in zip(prompts, (tokens != more).any(1).tolist()):
        if cut:
            raise ValueError(f"prompt {prompt[:120]!r} is longer than the {limit} tokens that {arch} reads")
    return tokens


def encode(clip: Clip, pixels: Tensor, compiled: bool | None = None) -> ImageTokens:
    """What ``Clip.encode_image`` runs: tokens of the weights' own type, whatever autocast computes in.

    ``compiled`` (default: as the model is): embedding of patches and blocks.
    """
    if tuple(pixels.shape[-2:]) != tuple(clip.image_size):
        sizes = ["x".join(map(str, size)) for size in (pixels.shape[-2:], clip.image_size)]
        raise ValueError(f"images are {sizes[0]}; this {clip.arch} takes {sizes[1]}")
    visual, dtype = clip.visual, clip.visual.proj.dtype
    kind = AUTOCAST.get(clip.numerics.precision)
    autocast = torch.autocast(pixels.device.type, kind or torch.bfloat16, enabled=kind is not None)
    with autocast, _compiled(visual) if (clip.compiles if compiled is None else compiled) else nullcontext():
        pooled, tokens = visual(((pixels - clip.mean) / clip.std).to(dtype))
    tokens = tokens.to(dtype)
    if visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    return ImageTokens(pooled.to(dtype), tokens @ visual.proj)


@contextmanager
def _compiled(visual: Any) -> Iterator[None]:
    """An image encoder's embedding of patches, and its blocks, run compiled."""
    tuned = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in visual.parameters())
    parts = visual.conv1, visual.transformer.resblocks
    for part in parts:
        part.run = functools.partial(run_compiled, each_size=tuned)
    try:
        yield
    finally:
        for part in parts:
            part.run = None
