"""Weights: where they are found, what a file holds, how they get into a model. No code of a file is ever run."""

import contextlib
import glob
import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tgazsr_utils.core.libraries import open_clip
from tgazsr_utils.core.models import Clip, Numerics
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import Precision
from tgazsr_utils.durable.files import DamagedFile, load_tensors, save_tensors
from tgazsr_utils.paths import DATA, resolve

MINI_ARCH = "mini-clip"
SHIPPED = {"mini": DATA / "mini_clip.safetensors", "mini-tga-zsr": DATA / "mini_tga_zsr.safetensors"}
_DIGESTS = {
    SHIPPED["mini"]: "582544b978bd",
    SHIPPED["mini-tga-zsr"]: "7942c250c318",
}  # they were written without one in them
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SCHEMAS = ("hf-hub:", "local-dir:")
_PREFIXES = ("module.", "model.", "_orig_mod.", "visual.")
# Released checkpoints keep an accuracy beside the weights as a NumPy scalar, whose name depends on NumPy's version.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS = [
    np.dtype,
    type(np.dtype("float64")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def load_clip(
    arch: str = MINI_ARCH,
    pretrained: str | Path | None = "mini",
    device: str = "auto",
    precision: Precision = "fp32",
    image_size: int | None = None,
    compiled: bool | None = False,
    waiting: bool = False,
    seed: int = 0,
) -> Clip:
    """A CLIP through open_clip, in eval mode and without gradients for its weights.

    ``arch``: any open_clip ViT with a class token, or "mini-clip". ``pretrained``: an open_clip tag ("openai",
    "laion2b_s34b_b79k", ...) or "hf-hub:OWNER/NAME", both downloaded when first used; "local-dir:FOLDER"; a weights
    file, also of an image encoder alone as RobustVLM, TeCoA and TGA-ZSR release it (the rest then comes from "openai");
    "mini" or "mini-tga-zsr" (shipped, for "mini-clip"); or None for random weights (by ``seed``).
    ``precision``: see ``core.models.Numerics``; "auto": "amp_bf16" on CUDA, else "fp32". ``image_size``: side in
    pixels, other than the architecture's own; position embeddings are interpolated. ``compiled``: through
    torch.compile; None: on CUDA. ``waiting``: it stays on the CPU for processes that will each have a device of their
    own (``processes.launch``). Raises ValueError, one line, for an unknown name, or a file that is unreadable, of
    another architecture, or needs pickled code to be read.
    """
    if arch not in open_clip().list_models():
        raise ValueError(f"arch {arch!r} is unknown to open_clip; the workbook's own is {MINI_ARCH!r}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(get_args(Precision))}")
    target = pick_device("cpu" if waiting else device)
    kind = "cuda" if waiting and torch.cuda.is_available() else target.type
    if precision == "auto":
        precision = "amp_bf16" if kind == "cuda" else "fp32"
    numerics = Numerics(kind, precision, kind == "cuda" if compiled is None else compiled)
    weights = "fp32" if precision == "amp_bf16" else precision
    side = None if image_size == image_size_of(arch) else image_size
    with _named(arch, pretrained), _quiet():
        source = locate_weights(arch, pretrained)
        model = _build(arch, source, seed, precision=weights, device=target, force_image_size=side)
        about = read_metadata(source) if isinstance(source, Path) and source.suffix == ".safetensors" else {}
    clip = Clip(model, arch, numerics).to(target).eval().requires_grad_(False)
    for name in about.keys() & {"mean", "std"}:
        getattr(clip, name).copy_(torch.tensor(about[name]).view(3, 1, 1))
    clip.training_record = {
        name: value for name, value in about.items() if name not in ("arch", "mean", "std", "history")
    }
    return clip


def load_alike(clip: Clip, weights: Path) -> Clip:
    """Other weights into a model that runs where and as ``clip`` does. Raises ValueError as ``load_clip``."""
    device, precision, compiled = clip.numerics
    loaded = load_clip(clip.arch, weights, str(clip.device), precision, clip.image_size[0], compiled)
    loaded.numerics = clip.numerics
    return loaded


def _build(arch: str, source: str | Path | None, seed: int, **options: Any) -> nn.Module:
    """An open_clip model with the weights of a source that ``locate_weights`` has found."""
    if isinstance(source, Path):
        return _with_weights_of(source, arch, seed, options)
    if source is not None and source.startswith(_SCHEMAS):
        model = open_clip().create_model(source, **options)
        if repr(model) != repr(open_clip().create_model(arch, **options)):
            raise ValueError(f"what it holds is another architecture than {arch}")
        return model
    device = options["device"]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return open_clip().create_model(arch, pretrained=source, **options)


def _with_weights_of(path: Path, arch: str, seed: int, options: dict[str, Any]) -> nn.Module:
    """A model with the weights of a file: all of them, or those of the image encoder, the rest then from OpenAI."""
    state = _unwrapped(_read_checkpoint(path))
    encoder_only = "class_embedding" in state
    if not encoder_only:
        model = _build(arch, None, seed, **options)
    elif arch != MINI_ARCH and "openai" not in open_clip().list_pretrained_tags_by_model(arch):
        raise ValueError(f"this file holds an image encoder only, and {arch} has no 'openai' weights for the rest")
    else:
        model = _build(arch, SHIPPED["mini"] if arch == MINI_ARCH else "openai", seed, **options)
        state = {f"visual.{name}": value for name, value in state.items()}
    # In fp32, since position embeddings in fp16 cannot be interpolated on the CPU.
    state = {name: value.float() for name, value in state.items()}
    open_clip().model.resize_pos_embed(state, model)
    if encoder_only:
        model.visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
    else:
        model.load_state_dict(state)
    return model


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """Weights without the dictionaries and the prefixes of every name that training code puts around them.

    What is left of an image encoder alone is its own state dict, as RobustVLM, TeCoA and TGA-ZSR release it.
    """
    for outer in ("state_dict", "model", "vision_encoder_state_dict"):
        state = state.get(outer, state)
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What a weights file holds. Raises ValueError for one that would run code, DamagedFile for a damaged one."""
    open(path, "rb").close()  # safetensors calls a file missing that it may not read
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            ours = "digest" in (file.metadata() or {})
        if not ours and path in _DIGESTS and digest(path) != _DIGESTS[path]:
            raise DamagedFile(f"{path} is damaged (its content is not what ships)")
        return load_tensors(path)[0] if ours else load_file(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("reading this file would run code that it brings along, which is refused") from None
    return checkpoint


@contextlib.contextmanager
def _named(arch: str, pretrained: str | Path | None) -> Iterator[None]:
    """Whatever a foreign file makes torch, safetensors or open_clip raise becomes one line that names it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"pretrained {str(pretrained)!r} cannot be loaded into {arch}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights even where others are put in afterwards; only one of its warnings matters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*QuickGELU")  # the weights would run, with wrong numbers
            yield
    finally:
        logging.disable(logging.NOTSET)


def locate_weights(arch: str, pretrained: str | Path | None) -> str | Path | None:
    """A weights file that is there, or a name that open_clip knows for ``arch``. Raises ValueError for other things."""
    tags = open_clip().list_pretrained_tags_by_model(arch)
    if pretrained is None or pretrained in tags or str(pretrained).startswith(_SCHEMAS):
        return pretrained
    path = SHIPPED.get(str(pretrained)) or resolve(pretrained)
    if not path.is_file():
        known = ", ".join([*tags, *(SHIPPED if arch == MINI_ARCH else [])]) or "none"
        raise ValueError(f"{str(pretrained)!r} is neither a file nor a name known for {arch} ({known})")
    return path


def find_weights(name: str | None, models: Path) -> str | None:
    """What to load for a notebook's model parameter; "latest:NAME" is the newest ``NAME_*`` in ``models``."""
    if name is None or not name.startswith("latest:"):
        return name
    stem = name.removeprefix("latest:")
    found = sorted(
        (p for p in models.glob(f"{glob.escape(stem)}_*.safetensors") if p.is_file()), key=lambda p: p.lstat().st_mtime
    )
    if not found:
        raise ValueError(f"no model {stem!r} in {models}; run the notebook that makes it first")
    return str(found[-1])


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one. Raises ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def model_config(arch: str) -> dict[str, Any]:
    """open_clip's description of an architecture. Raises ValueError for an unknown one."""
    config = open_clip().get_model_config(arch)
    if config is None:
        raise ValueError(f"arch {arch!r} is unknown to open_clip; the workbook's own is {MINI_ARCH!r}")
    return config


def image_size_of(arch: str) -> int:
    """Side in pixels of the images an open_clip architecture takes. Raises ValueError for an unknown one."""
    return model_config(arch)["vision_cfg"]["image_size"]


def save_clip(clip: Clip, path: Path, precision: str = "fp32", **metadata: Any) -> Path:
    """Writes all weights as safetensors that plain open_clip loads too, with JSON-able ``metadata``; in one step."""
    weights: dict[str, Tensor] = {
        k: v.detach().to(_TYPES[precision]).contiguous() for k, v in clip.model.state_dict().items()
    }
    own = {"arch": clip.arch, "mean": clip.mean.flatten().tolist(), "std": clip.std.flatten().tolist()}
    return save_tensors(path, weights, **metadata, **own)


def read_metadata(path: Path) -> dict[str, Any]:
    """What ``save_clip`` wrote beside the weights; nothing for a foreign file. Raises ValueError for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return {k: json.loads(v) for k, v in metadata.items() if k != "digest"} if "arch" in metadata else {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights {path} are damaged: {' '.join(str(error).split())}") from None
