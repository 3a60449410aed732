"""Text-guided attention: where an image encoder finds a prompt, and how far that moves under attack."""

import functools
import warnings
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.models import Clip, ImageTokens, encode

Variant = Literal["reference", "cosine"]
Metric = Literal["l2", "l1", "cos"]
Backend = Literal["auto", "triton", "torch"]
Target = Literal["batch", "true"]  # of Grad-CAM


def text_guided_attention(
    tokens: ImageTokens,
    text: Tensor,
    variant: Variant = "reference",
    size: int | tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention maps ``[B,h,w]`` in [0,1]: each patch token dotted with the prompt, min-max scaled per image.

    ``tokens``: pooled ``[B,D]`` and patches ``[B,P,D]``; ``text``: unit-norm embeddings ``[B,D]``, or ``[D]`` for all.
    ``variant``: how tokens are normalised first. ``reference`` divides each channel by its l2 norm over the 1+P tokens
    (class token included), as the released code does; ``cosine`` divides each token by its norm over the D channels,
    as the paper's formula reads. ``size``: bilinear resize (align_corners=False) to this side or (height, width); None
    keeps the patch grid. ``grid``: (rows, columns) of patches, needed only if it is not square. A constant map gives
    zeros, with finite gradients. ``backend``: "triton" (one fused pass, ``attention_kernel``; needs a CUDA device, or
    TRITON_INTERPRET=1), "torch" (the same in PyTorch, the reference), or "auto": the kernel where the tokens are on a
    CUDA device and it takes them. Raises ValueError for an unknown variant or a non-square grid.
    """
    (maps,) = _maps(tokens, [text], variant, grid, backend)
    return maps if size is None else resize(maps, size)


def complementary_attention(
    tokens: ImageTokens,
    text: Tensor,
    not_text: Tensor,
    variant: Variant = "reference",
    size: int | tuple[int, int] | Literal["nodes"] | None = None,
    grid: tuple[int, int] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``A(text) * (1 - A(not_text))`` (Comp-TGA, TPAMI 2026): what a prompt finds and its negation does not.

    Arguments and shapes as in ``text_guided_attention``. As released, both maps are resized to ``size`` before they
    are multiplied, which is not the resized product of the patch grids. ``size`` "nodes": at the patches and halfway
    between them, ``[B,2h-1,2w-1]``. A product of two bilinear interpolants is quadratic in either direction between
    patches, so these three values an interval hold it at any size: ``attention_distance(..., degree=2)`` compares them.
    """
    sides = _maps(tokens, [text, not_text], variant, grid, backend)
    if size == "nodes":
        sides = [_halfway(maps) for maps in sides]
    elif size is not None:
        sides = [resize(maps, size) for maps in sides]
    return sides[0] * (1 - sides[1])


def _halfway(maps: Tensor) -> Tensor:
    """Maps ``[B,h,w]`` with the values halfway between patches: ``[B,2h-1,2w-1]``."""
    twice = (torch.eye(n, device=maps.device, dtype=maps.dtype).repeat_interleave(2, 0) for n in maps.shape[-2:])
    rows, columns = ((each[1:] + each[:-1]) / 2 for each in twice)
    return rows @ maps @ columns.T


def _maps(
    tokens: ImageTokens, texts: list[Tensor], variant: str, grid: tuple[int, int] | None, backend: str
) -> list[Tensor]:
    """Maps ``[B,h,w]`` in [0,1], one for each of the texts."""
    shape = grid or _square_grid(tokens.patches.shape[1])
    if variant not in get_args(Variant):
        raise ValueError(f"attention variant {variant!r} is unknown; choose 'reference' or 'cosine'")
    if backend not in get_args(Backend):
        raise ValueError(f"attention backend {backend!r} is unknown; choose 'auto', 'triton' or 'torch'")
    if backend == "auto":
        backend = "triton" if tokens.patches.is_cuda and _kernel_takes(tokens) else "torch"
    if backend == "torch":
        return [min_max(_patch_scores(tokens, text, variant)).unflatten(1, shape) for text in texts]
    from tgazsr_utils.core.attention_kernel import attention  # imports triton, which CPU installations do without

    text = torch.stack([text.expand_as(tokens.pooled) for text in texts], dim=1)
    maps, _, _ = attention(tokens.pooled, tokens.patches, text, variant)
    return list(maps.unflatten(2, shape).unbind(1))


def _kernel_takes(tokens: ImageTokens) -> bool:
    if tokens.patches.dtype == torch.float64 or not _kernel_works(tokens.patches.device):
        return False
    from tgazsr_utils.core.attention_kernel import MAX_CHANNELS, MAX_PATCHES

    return tokens.patches.shape[1] <= MAX_PATCHES and tokens.patches.shape[2] <= MAX_CHANNELS


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Tried once: Triton may be missing, or the C compiler that it needs."""
    try:
        from tgazsr_utils.core.attention_kernel import attention

        one = torch.ones(1, 4, 16, device=device)
        attention(one[:, 0], one, one[:, :1], "reference")
        return True
    except Exception as error:  # whatever Triton and its compilers raise
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(f"attention goes on without its Triton kernel: {why}", stacklevel=2)
        return False


def grad_cam(
    clip: Clip,
    images: Tensor,
    text: Tensor,
    labels: Tensor,
    target: Target = "batch",
    size: int | tuple[int, int] | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Grad-CAM maps ``[B,h,w]`` in [0,1] of a class for each image (Selvaraju et al. 2017): attention without text.

    Activations A are the patch tokens that enter the last block's self-attention (after its first layer norm), the
    last ones that the class token still reads: ``relu(sum_d mean_p(d logit / d A_pd) * A_pd)``, resized to ``size`` if
    given and, as released, scaled to [0,1] after that. ``images`` ``[B,3,H,W]`` in [0,1], ``text`` ``[C,D]`` unit norm,
    ``labels`` ``[B]``. ``target``: the logit is that of the best among the batch's own classes ("batch", as released),
    or of the true class ("true"). ``differentiable`` keeps the graph, so that a loss on the maps trains the weights (a
    second derivative); otherwise the maps are constants.
    """
    scores = grad_cam_scores(clip, images, text, labels, target, differentiable)
    resized = scores if size is None else resize(scores, size)
    return min_max(resized.flatten(1)).view_as(resized)


def grad_cam_scores(
    clip: Clip, images: Tensor, text: Tensor, labels: Tensor, target: Target = "batch", differentiable: bool = False
) -> Tensor:
    """``grad_cam`` before it is resized and scaled: at least zero, ``[B,h,w]``."""
    kept = []
    handle = clip.visual.transformer.resblocks[-1].ln_1.register_forward_hook(
        lambda module, inputs, output: kept.append(output if output.requires_grad else output.requires_grad_(True))
    )
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # others have no second derivative
    try:
        with torch.enable_grad(), math_only:
            logits = clip.similarity(encode(clip, images, compiled=False).pooled, text)  # a hook might not be seen
            chosen = labels if target == "true" else labels[logits[:, labels].argmax(1)]
            score = logits.gather(1, chosen[:, None]).sum()
            (slope,) = torch.autograd.grad(score, kept[0], create_graph=differentiable)
    finally:
        handle.remove()
    dtype = clip.visual.proj.dtype  # maps are of the weights' type, whatever autocast computes in
    activations, slope = kept[0][:, 1:].to(dtype), slope[:, 1:].to(dtype)  # without the class token
    scores = (activations * slope.mean(1, keepdim=True)).sum(2).relu().unflatten(1, clip.grid)
    return scores if differentiable else scores.detach()


def _patch_scores(tokens: ImageTokens, text: Tensor, variant: str) -> Tensor:
    if variant == "reference":
        squares = tokens.pooled.square() + tokens.patches.square().sum(1)  # [B,D], over class and patch tokens
        norm = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # clamped first: sqrt has no slope at 0
        return torch.einsum("bpd,bd->bp", tokens.patches, text / norm)
    return torch.einsum("bpd,bd->bp", F.normalize(tokens.patches, dim=-1), text.expand_as(tokens.pooled))


def _square_grid(patches: int) -> tuple[int, int]:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches form no square grid; pass grid=(rows, columns)")
    return side, side


def min_max(scores: Tensor, of: Tensor | None = None) -> Tensor:
    """Scales each row of ``[B,P]`` to [0,1]; rows that are constant up to rounding become zeros.

    ``of`` ``[B,Q]``: values whose extremes go to 0 and 1, in place of the row's own.
    """
    of = scores if of is None else of
    low, high = of.amin(1, keepdim=True), of.amax(1, keepdim=True)
    spread = high - low
    constant = spread <= 16 * torch.finfo(scores.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, (scores - low) * 0, (scores - low) / torch.where(constant, 1, spread))


def min_max_at(scores: Tensor, size: int) -> Tensor:
    """Scores ``[B,h,w]``, scaled so that their resize to ``size`` x ``size`` would span [0,1]."""
    return min_max(scores.flatten(1), of=resize(scores, size).flatten(1)).view_as(scores)


def resize(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bilinear resize (align_corners=False) of maps ``[B,h,w]`` to a side or (height, width)."""
    ends = zip(maps.shape[-2:], (size, size) if isinstance(size, int) else size)
    rows, columns = (_weights(n, side, 1, False, maps.device, maps.dtype) for n, side in ends)
    return rows @ maps @ columns.T  # F.interpolate's gradient adds up in no fixed order on CUDA


def attention_distance(
    a: Tensor, b: Tensor, metric: Metric = "l2", size: int | None = 224, degree: Literal[1, 2] = 1
) -> Tensor:
    """Distance ``[B]`` of maps ``[B,h,w]``, each resized to ``size`` x ``size`` (None: as given) and taken as a vector.

    ``l2``: Euclidean norm of the difference; it grows with ``size``, and Alpha and Beta are meant for 224. ``l1``: mean
    absolute difference. ``cos``: 1 - cosine (eps 1e-8). ``degree`` 2: "nodes" of ``complementary_attention``,
    interpolated quadratically. For l2 and cos no resized map is made (see ``_interpolated``).
    Raises ValueError for an unknown metric.
    """
    if size is not None:
        a, b = (_interpolated(maps, size, degree, isometric=metric != "l1") for maps in (a, b))
    a, b = a.flatten(1), b.flatten(1)
    if metric == "l2":
        return torch.linalg.vector_norm(a - b, dim=1)
    if metric == "l1":
        return (a - b).abs().mean(1)
    if metric == "cos":
        return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)
    raise ValueError(f"distance metric {metric!r} is unknown; choose 'l2', 'l1' or 'cos'")


def _interpolated(maps: Tensor, size: int, degree: int, isometric: bool) -> Tensor:
    """Maps ``[B,h,w]`` at ``size`` x ``size``; or, ``isometric``, small ones of the same inner products up to rounding.

    An interpolated map is U a V' with weights U ``[size,h]`` and V ``[size,w]``. With U = QR, Q orthonormal, the inner
    products of R a S' are those of U a V': ``(U'U)`` applied on both sides, without forming it.
    """
    rows, columns = (_weights(n, size, degree, isometric, maps.device, maps.dtype) for n in maps.shape[-2:])
    return rows @ maps @ columns.T


@functools.lru_cache(maxsize=32)
def _weights(n: int, size: int, degree: int, isometric: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights ``[size,n]`` that interpolate n values at ``size`` places (align_corners=False); or R of their QR.

    ``degree`` 1: linear between the values. 2: quadratic through each odd value and its neighbours, where every other
    value is a patch.
    """
    patches = n if degree == 1 else (n + 1) // 2
    nodes = torch.eye(patches, dtype=torch.float64)[None]
    weights = F.interpolate(nodes, size=size, mode="linear", align_corners=False)[0].T  # [size,patches]
    if degree == 2:
        weights = _quadratic(weights)
    return (torch.linalg.qr(weights, mode="r").R if isometric else weights).to(device, dtype)


def _quadratic(linear: Tensor) -> Tensor:
    """From linear weights u of patches ``[S,h]``: u(2u - 1) at a patch and 4 u u' halfway to the next, ``[S,2h-1]``."""
    weights = linear.new_zeros(len(linear), 2 * linear.shape[1] - 1)
    weights[:, ::2], weights[:, 1::2] = linear * (2 * linear - 1), 4 * linear[:, :-1] * linear[:, 1:]
    return weights
