"""CLIP as the rest of the package sees it: pixels in [0,1] in, projected class and patch tokens out."""

import contextlib
import copy
import functools
import glob
import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import CacheNotFound, constants, scan_cache_dir
from open_clip.factory import load_state_dict
from open_clip.model import resize_pos_embed
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import DATA
from .files import DamagedFile, digest, load_tensors, save_tensors, sha256_of
from .settings import Precision, resolve

torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution, and fp32 is to mean fp32

MINI_ARCH = "mini-clip"
SHIPPED = {"mini": DATA / "mini_clip.safetensors", "mini-tga-zsr": DATA / "mini_tga_zsr.safetensors"}
_DIGESTS = {SHIPPED["mini"]: "582544b978bd", SHIPPED["mini-tga-zsr"]: "7942c250c318"}  # they were written without one in them
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of weights

for _config in (Path(__file__).parent / "model_configs").glob("*.json"):
    open_clip.add_model_config(_config)


class ImageTokens(NamedTuple):
    """One forward of the image encoder, both parts in the joint space and not normalised."""

    pooled: Tensor  # [B, D], from the class token
    patches: Tensor  # [B, P, D], row by row over the patch grid


class Clip(nn.Module):
    """An open_clip ViT CLIP with its normalisation inside and its prompt embeddings kept.

    ``model`` is the open_clip model; only ``model.visual`` is ever tuned. Its text tower and logit scale stay frozen
    unless the workbook pre-trains it. ``precision`` "amp_bf16" runs the image encoder under bfloat16 autocast;
    ``compiled`` runs it, and each step of an attack on it, through torch.compile. ``target`` is the type of device it is
    meant for; a copy that waits elsewhere for the processes that will use it is not compiled there.
    """

    def __init__(self, model: nn.Module, arch: str, precision: str = "fp32", compiled: bool = False, target: str = "cpu"):
        super().__init__()
        visual = model.visual
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type != "tok":
            raise ValueError(
                f"arch {arch!r} has no class token with patch tokens beside it, which text-guided attention needs; "
                "use a ViT with a class token such as ViT-B-32-quickgelu"
            )
        visual.output_tokens = True
        self.model, self.arch = model, arch
        self.precision, self.compiled, self.target = precision, compiled, target
        self.training: dict[str, Any] = {}  # method, settings, data and code that made the weights, where that is known
        self.tokenizer = open_clip.get_tokenizer(arch)
        self.grid: tuple[int, int] = visual.grid_size
        self.image_size: tuple[int, int] = visual.image_size
        self.register_buffer("mean", torch.tensor(open_clip.get_model_preprocess_cfg(model)["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(open_clip.get_model_preprocess_cfg(model)["std"]).view(3, 1, 1))
        self._prompts: dict[str, Tensor] = {}
        self._hashed: tuple[list[tuple[int, int]], str] = ([], "")

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def visual(self) -> nn.Module:
        return self.model.visual

    def encode_image(self, pixels: Tensor) -> ImageTokens:
        """Tokens of images ``[B,3,H,W]`` in [0,1]; one forward. Raises ValueError for images of another size."""
        return self.run(encode, pixels)

    def run(self, function: Callable, *arguments: Any) -> Any:
        """``function(self, *arguments)``, compiled if this model is."""
        return (_compile(function) if self.compiled and self.device.type == self.target else function)(self, *arguments)

    @property
    def how(self) -> tuple[str, str, bool]:
        """What numbers may depend on besides the weights: type of device, precision, compiled or not."""
        return self.target, self.precision, self.compiled

    def in_full_precision(self) -> "Clip":
        """The same model, sharing its weights, without autocast."""
        clone = copy.copy(self)
        clone.precision = "fp32" if self.precision == "amp_bf16" else self.precision
        return clone

    @torch.no_grad()
    def encode_text(self, prompts: list[str] | tuple[str, ...]) -> Tensor:
        """Unit-norm embeddings ``[C,D]`` of prompts; each prompt is encoded once and kept."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        for chunk in (missing[i : i + 512] for i in range(0, len(missing), 512)):
            embeddings = self.model.encode_text(self.tokenizer(chunk).to(self.device), normalize=True)
            self._prompts.update(zip(chunk, embeddings))
        return torch.stack([self._prompts[p].to(self.device) for p in prompts])

    def similarity(self, pooled: Tensor, text: Tensor) -> Tensor:
        """``exp(logit_scale) * cosine``: logits ``[B,C]`` of pooled tokens ``[B,D]`` and text ``[C,D]``."""
        scale = self.model.logit_scale.detach().exp().clamp(max=100.0)
        return scale * F.normalize(pooled.float(), dim=-1) @ text.float().T

    def logits(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Zero-shot logits ``[B,C]`` of images ``[B,3,H,W]`` in [0,1] against unit-norm text ``[C,D]``."""
        return self.similarity(self.encode_image(pixels).pooled, text)

    def frozen_copy(self) -> "Clip":
        """The same model with an image encoder of its own, in eval mode and without gradients; the text tower is shared."""
        clone = copy.copy(self)
        clone._modules = dict(self._modules)
        clone.model = copy.copy(self.model)
        clone.model._modules = {**self.model._modules, "visual": copy.deepcopy(self.visual)}
        clone.visual.eval().requires_grad_(False)
        return clone

    def fingerprint(self) -> str:
        """Names the weights and the architecture: equal for equal models."""
        weights = list(self.model.state_dict().values())
        versions = [(value.data_ptr(), value._version) for value in weights]  # the latter counts in-place changes
        if self._hashed[0] != versions:
            self._hashed = versions, digest(self.arch, *weights)
        return self._hashed[1]


def encode(clip: Clip, pixels: Tensor) -> ImageTokens:
    """What ``Clip.encode_image`` runs: tokens of the weights' own type, whatever autocast computes in."""
    if tuple(pixels.shape[-2:]) != tuple(clip.image_size):
        sizes = ["x".join(map(str, size)) for size in (pixels.shape[-2:], clip.image_size)]
        raise ValueError(f"images are {sizes[0]}; this {clip.arch} takes {sizes[1]}")
    visual, dtype = clip.visual, clip.visual.proj.dtype
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=clip.precision == "amp_bf16"):
        pooled, tokens = visual(((pixels - clip.mean) / clip.std).to(dtype))
    tokens = tokens.to(dtype)
    if visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    return ImageTokens(pooled.to(dtype), tokens @ visual.proj)


@functools.cache
def _compile(function: Callable) -> Callable:
    """Compiled once for all models, whose weights are inputs of the graph, and soon for batches of all sizes."""
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)  # other norms, losses, precisions are other graphs
    if hasattr(config, "trace_autograd_ops"):  # an attack's gradient is part of its graph; older versions split it there
        config.trace_autograd_ops = True
    return torch.compile(function)


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one. Raises ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def load_clip(
    arch: str = MINI_ARCH,
    pretrained: str | Path | None = "mini",
    device: str = "auto",
    precision: Precision = "fp32",
    image_size: int | None = None,
    compiled: bool | None = False,
    processes: int = 1,
    seed: int = 0,
) -> Clip:
    """A CLIP through open_clip, in eval mode and without gradients for its weights.

    ``arch``: any open_clip ViT with a class token, or "mini-clip". ``pretrained``: an open_clip tag ("openai",
    "laion2b_s34b_b79k", ...) or "hf-hub:OWNER/NAME", both downloaded when first used; "local-dir:FOLDER"; a weights
    file; a checkpoint released with TGA-ZSR or TeCoA, which holds an image encoder only (the rest then comes from
    "openai"); "mini" or "mini-tga-zsr" (shipped, for "mini-clip"); or None for random weights (by ``seed``). ``precision``: of the
    weights, "fp32", "fp16" or "bf16"; "amp_bf16": fp32 weights and bfloat16 autocast in the image encoder; "auto": that on
    CUDA, else fp32. ``image_size``: side in pixels, other than the architecture's own; position embeddings are
    interpolated. ``compiled``: through torch.compile; None: on CUDA. ``processes``:
    where there are several, the model waits on the CPU for them (see ``distributed.launch``). Raises ValueError for an unknown name, or a file that is unreadable, of another architecture, or
    needs pickled code to be read.
    """
    if arch not in open_clip.list_models():
        raise ValueError(f"arch {arch!r} is unknown to open_clip; the workbook's own is {MINI_ARCH!r}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(get_args(Precision))}")
    target = pick_device(device if processes == 1 else "cpu")
    meant_for = target.type if processes == 1 or not torch.cuda.is_available() else "cuda"
    if precision == "auto":
        precision = "amp_bf16" if meant_for == "cuda" else "fp32"
    compiled = meant_for == "cuda" if compiled is None else compiled
    image_size = None if image_size == image_size_of(arch) else image_size
    try:
        source, encoder = _find_source(arch, pretrained)
        logging.disable(logging.WARNING)  # open_clip warns of random weights even where others are put in afterwards
        options = {"precision": "fp32" if precision == "amp_bf16" else precision, "device": target, "force_image_size": image_size}
        about = read_metadata(Path(source)) if source is not None and source.endswith(".safetensors") else {}
        normalisation = {name: torch.tensor(about[name]).view(3, 1, 1) for name in about.keys() & {"mean", "std"}}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*QuickGELU")  # the weights would run, with wrong numbers
            if source is not None and source.startswith(_SCHEMAS):
                model = open_clip.create_model(source, **options)
                if repr(model) != repr(open_clip.create_model(arch, **options)):
                    raise ValueError(f"what it holds is another architecture than {arch}")
            elif image_size is not None and source is not None and Path(source).is_file():
                model = open_clip.create_model(arch, **options)
                # In fp32, since open_clip cannot interpolate fp16 position embeddings on the CPU.
                state = {name: value.float() for name, value in load_state_dict(source).items()}
                resize_pos_embed(state, model)
                model.load_state_dict(state)
            else:
                with torch.random.fork_rng([target] if target.type == "cuda" else []):
                    torch.manual_seed(seed)
                    model = open_clip.create_model(arch, pretrained=source, **options)
        if encoder is not None:
            state = {f"visual.{name.removeprefix('module.')}": value.float() for name, value in encoder.items()}
            resize_pos_embed(state, model)
            model.visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
        _check_downloads(arch, source)
    except Exception as error:  # whatever a foreign file makes torch, safetensors or open_clip raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"pretrained {str(pretrained)!r} cannot be loaded into {arch}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
    clip = Clip(model, arch, precision, compiled, meant_for).to(target).eval().requires_grad_(False)
    for name, value in normalisation.items():
        getattr(clip, name).copy_(value)
    clip.training = {name: value for name, value in about.items() if name not in ("arch", "mean", "std", "history")}
    return clip


def load_alike(clip: Clip, weights: Path) -> Clip:
    """Other weights into a model that runs where and as ``clip`` does. Raises ValueError as ``load_clip``."""
    loaded = load_clip(clip.arch, weights, str(clip.device), clip.precision, clip.image_size[0], clip.compiled)
    loaded.target = clip.target
    return loaded


_SCHEMAS = ("hf-hub:", "local-dir:")
# Released checkpoints keep an accuracy beside the weights as a NumPy scalar, under this or that name by NumPy's version.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS = [np.dtype, type(np.dtype("float64")), *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def locate_weights(arch: str, pretrained: str | Path | None) -> str | Path | None:
    """A weights file that is there, or a name that open_clip knows for ``arch``. Raises ValueError for anything else."""
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if pretrained is None or pretrained in tags or str(pretrained).startswith(_SCHEMAS):
        return pretrained
    path = SHIPPED.get(str(pretrained)) or resolve(pretrained)
    if not path.is_file():
        named = ", ".join([*tags, *(SHIPPED if arch == MINI_ARCH else [])]) or "none"
        raise ValueError(f"{str(pretrained)!r} is neither a file nor a name known for {arch} ({named})")
    return path


def _find_source(arch: str, pretrained: str | Path | None) -> tuple[str | None, dict[str, Tensor] | None]:
    """(what open_clip is to load, an image encoder's weights to put in afterwards if there are any)."""
    path = locate_weights(arch, pretrained)
    if not isinstance(path, Path):
        return path, None
    open(path, "rb").close()  # safetensors calls a file missing that it may not read
    if path.suffix == ".safetensors":
        _check_content(path)
        return str(path), None
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("reading this file would run code that it brings along, which is refused") from None
    if "vision_encoder_state_dict" not in checkpoint:
        return str(path), None
    if arch != MINI_ARCH and "openai" not in open_clip.list_pretrained_tags_by_model(arch):
        raise ValueError(f"this file holds an image encoder only, and {arch} has no 'openai' weights for the rest")
    base = str(SHIPPED["mini"]) if arch == MINI_ARCH else "openai"
    return base, checkpoint["vision_encoder_state_dict"]


def _check_content(path: Path) -> None:
    """Raises DamagedFile for weights that are not as this workbook wrote them; others can't be told."""
    with safe_open(path, "pt") as file:
        told = "digest" in (file.metadata() or {})
    if told:
        load_tensors(path)
    elif path in _DIGESTS and digest(path) != _DIGESTS[path]:
        raise DamagedFile(f"{path} is damaged (its content is not what ships)")


def _check_downloads(arch: str, source: str | None) -> None:
    """Raises DamagedFile for weights that open_clip keeps from the Hugging Face Hub and that are not what was downloaded.

    There a large file is kept under its SHA-256. Those from plain addresses are checked by open_clip itself.
    """
    hub = "hf-hub:"
    if source and source.startswith(hub):
        name = source.removeprefix(hub)
    else:  # OWNER/NAME/FILE, the latter perhaps empty
        name = open_clip.get_pretrained_cfg(arch, source or "").get("hf_hub", "").rpartition("/")[0]
    if not name:
        return
    with contextlib.suppress(CacheNotFound):
        files = {file for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_id == name for revision in repo.revisions for file in revision.files}
        for file in files:
            if re.fullmatch("[0-9a-f]{64}", file.blob_path.name) and sha256_of(file.blob_path) != file.blob_path.name:
                raise DamagedFile(f"{file.file_name} is not what was downloaded; remove {file.blob_path} to get it again")


def image_size_of(arch: str) -> int:
    """Side in pixels of the images an open_clip architecture takes. Raises ValueError for an unknown one."""
    config = open_clip.get_model_config(arch)
    if config is None:
        raise ValueError(f"arch {arch!r} is unknown to open_clip; the workbook's own is {MINI_ARCH!r}")
    return config["vision_cfg"]["image_size"]


def find_weights(name: str | None, models: Path) -> str | None:
    """What to load for a notebook's model parameter: "latest:NAME" is the newest ``NAME_*`` in the folder ``models``."""
    if name is None or not name.startswith("latest:"):
        return name
    stem = name.removeprefix("latest:")
    found = sorted((p for p in models.glob(f"{glob.escape(stem)}_*.safetensors") if p.is_file()), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no model {stem!r} in {models}; run the notebook that makes it first")
    return str(found[-1])


def save_clip(clip: Clip, path: Path, precision: str = "fp32", **metadata: Any) -> Path:
    """Writes all weights as safetensors that plain open_clip loads too, with JSON-able ``metadata``; in one step."""
    weights = {k: v.detach().to(PRECISIONS[precision]).contiguous() for k, v in clip.model.state_dict().items()}
    own = {"arch": clip.arch, "mean": clip.mean.flatten().tolist(), "std": clip.std.flatten().tolist()}
    return save_tensors(path, weights, **metadata, **own)


def read_metadata(path: Path) -> dict[str, Any]:
    """What ``save_clip`` wrote beside the weights; nothing for a file of somebody else's. Raises ValueError for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return {k: json.loads(v) for k, v in metadata.items() if k != "digest"} if "arch" in metadata else {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights {path} are damaged: {' '.join(str(error).split())}") from None
