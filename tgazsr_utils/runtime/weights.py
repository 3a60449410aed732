"""Weights: where they are found and how they get into a model; ``weight_files`` reads what files hold."""

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import re
import socket
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tgazsr_utils.core.libraries import open_clip
from tgazsr_utils.core.models import Clip, Numerics, tokenize
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import Precision
from tgazsr_utils.paths import DATA, ROOT, resolve
from tgazsr_utils.runtime.devices import (
    compiler_error,
    compiles,
    cuda_elsewhere,
    has_bf16,
    pick_device,
    set_up_compiler,
)
from tgazsr_utils.runtime.files import DamagedFile, save_tensors
from tgazsr_utils.runtime.weight_files import (
    TORCHSCRIPT,
    Found,
    find_weights_in,
    is_safetensors,
    read_weight_file,
    said_of,
)

MINI_ARCH = "mini-clip"
SHIPPED = {"mini": DATA / "mini_clip.safetensors", "mini-tga-zsr": DATA / "mini_tga_zsr.safetensors"}
_DIGESTS = {
    SHIPPED["mini"]: "582544b978bd",
    SHIPPED["mini-tga-zsr"]: "7942c250c318",
}  # they were written without one in them
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SCHEMAS, _CONFIG = ("hf-hub:", "local-dir:"), "open_clip_config.json"
_PATIENCE = 10  # seconds for a server to say something
_OF_OPENAI = {"input_resolution", "context_length", "vocab_size"}  # beside the weights in OpenAI's archives
# Metadata that tell nothing of how weights were made.
_NOT_OF_TRAINING = {"arch", "model_cfg", "mean", "std", "history"}


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
    ``precision``: see ``core.models.Numerics``; "auto": "amp_bf16" on a CUDA device that has it (from sm_80), else
    "fp32". ``image_size``: side in pixels, other than the architecture's own; position embeddings are interpolated.
    ``compiled``: through torch.compile; None: on CUDA, where it works. ``waiting``: it stays on the CPU for processes
    that will each have a device of their own (``processes.launch``). Raises ValueError, one line, for an unknown name,
    or a file that is unreadable, of another architecture, or needs pickled code to be read.
    """
    model_config(arch)  # raises for an unknown one
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(get_args(Precision))}")
    target = pick_device("cpu" if waiting else device)
    numerics = _numerics(target, device, precision, compiled, waiting)
    weights = "fp32" if numerics.precision == "amp_bf16" else numerics.precision
    side = None if image_size == image_size_of(arch) else image_size
    with _named(arch, pretrained), _quiet():
        source = locate_weights(arch, pretrained)
        about = read_metadata(source) if isinstance(source, Path) else {}
        if isinstance(source, Path) and (recorded := _recorded(source, about)):
            _check_architecture(arch, *recorded)
        model = _build(arch, source, seed, precision=weights, device=target, force_image_size=side)
    clip = Clip(model, arch, numerics).to(target).eval().requires_grad_(False)
    for name in about.keys() & {"mean", "std"}:
        getattr(clip, name).copy_(torch.tensor(about[name]).view(3, 1, 1))
    clip.training_record = {name: value for name, value in about.items() if name not in _NOT_OF_TRAINING}
    return clip


def _numerics(target: torch.device, device: str, precision: str, compiled: bool | None, waiting: bool) -> Numerics:
    """How a model will compute on ``target``; or, ``waiting`` there, on what ``device`` is in other processes."""
    later = cuda_elsewhere() if waiting and device != "cpu" else None
    if waiting and device == "cuda" and later is None:
        raise ValueError("device 'cuda' cannot be used: there is none that works")
    kind = "cuda" if later else target.type
    bf16 = kind == "cuda" and (later.bf16 if later else has_bf16(target))
    if precision == "auto":
        precision = "amp_bf16" if bf16 else "fp32"
    if kind == "cuda" and precision.endswith("bf16") and not bf16:
        raise ValueError(f"precision {precision!r}: this GPU only imitates bfloat16, slowly; 'auto' is fp32 here")
    if compiled is None:
        compiled = kind == "cuda" and (later.compiled if later else compiles(str(target)))
    elif compiled and later is None and (error := compiler_error(str(target))):
        raise ValueError(
            f"compiled = True: torch.compile does not work here: {error} (None: it is used where it works)"
        )
    if compiled:
        set_up_compiler()
    return Numerics(kind, precision, compiled)


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
        with contextlib.nullcontext() if source.startswith("local-dir:") else _download():
            _check_architecture(arch, source, open_clip().get_model_config(source))
            return open_clip().create_model(source, **options, require_pretrained=True)
    device = options["device"]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with _download() if source else contextlib.nullcontext():
            return open_clip().create_model(arch, pretrained=source, **options)


def _with_weights_of(path: Path, arch: str, seed: int, options: dict[str, Any]) -> nn.Module:
    """A model with the weights of a file: all of them, or those of the image encoder, the rest then from OpenAI."""
    state = _read(path, arch)
    model = _build(arch, None, seed, **options)
    found = _that_fit(find_weights_in(state), model)
    best = found[0]
    if _OF_OPENAI & best.tensors.keys():
        _check_architecture(arch, "OpenAI's CLIP", model_config(arch) | {"quick_gelu": True})
    if not best.whole:
        if arch != MINI_ARCH and "openai" not in open_clip().list_pretrained_tags_by_model(arch):
            raise ValueError(f"this file holds an image encoder only, and {arch} has no 'openai' weights for the rest")
        model = _build(arch, SHIPPED["mini"] if arch == MINI_ARCH else "openai", seed, **options)
    parts = {name.split(".")[0] for name in model.state_dict()}
    # In fp32, since position embeddings in fp16 cannot be interpolated on the CPU.
    state = {name: value.float() for name, value in best.tensors.items() if name.split(".")[0] in parts}
    open_clip().model.resize_pos_embed(state, model)
    rest = {} if best.whole else {n: v for n, v in model.state_dict().items() if not n.startswith("visual.")}
    model.load_state_dict(rest | state)
    if path not in SHIPPED.values() and "arch" not in read_metadata(path):
        left = {name.split(".")[0] for name in best.tensors} - parts - _OF_OPENAI - {"attn_mask"}
        _tell_once(path, f"{path.name}: {said_of(found, sorted(left))}")
    return model


@functools.cache
def _tell_once(_path: Path, line: str) -> None:
    print(line, flush=True)


def _that_fit(found: list[Found], model: nn.Module) -> list[Found]:
    """Those of a model's shapes; all of them, if there is none, as what differs is said when they are put in."""
    own = {name: value.shape for name, value in model.visual.state_dict().items() if name != "positional_embedding"}
    fits = lambda one: all(getattr(one.tensors.get(f"visual.{n}"), "shape", None) == shape for n, shape in own.items())
    return [one for one in found if fits(one)] or found


def _read(path: Path, arch: str) -> Any:
    """What a weights file holds; of TorchScript archives the very file that OpenAI publishes, whose code is known."""
    if path in _DIGESTS and digest(path) != _DIGESTS[path]:
        raise DamagedFile(f"{path} is damaged (its content is not what ships)")
    try:
        return read_weight_file(path)
    except ValueError as error:
        if TORCHSCRIPT not in str(error) or not _is_openais(path, arch):
            raise
    return dict(torch.jit.load(path, map_location="cpu").state_dict())


def _is_openais(path: Path, arch: str) -> bool:
    """Is this the very file that OpenAI publishes for ``arch``, by the SHA-256 in its address?"""
    published = str(open_clip().get_pretrained_cfg(arch, "openai").get("url", "")).split("/")
    return hashlib.sha256(path.read_bytes()).hexdigest() in published


def _check_architecture(arch: str, whose: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError if weights are of another architecture than ``arch``; only the images' size may differ."""
    ours, theirs = _flat(model_config(arch)), _flat(config)
    names = sorted((ours.keys() | theirs.keys()) - {"vision_cfg.image_size"})
    if differs := [f"{n} is {theirs.get(n)}, not {ours.get(n)}" for n in names if ours.get(n) != theirs.get(n)]:
        raise ValueError(f"these weights are of {whose}, another architecture than {arch}: {'; '.join(differs)}")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """An open_clip configuration with its defaults, each value by a name such as "vision_cfg.width"."""
    kinds = {"vision_cfg": open_clip().model.CLIPVisionCfg, "text_cfg": open_clip().model.CLIPTextCfg}
    flat = {"quick_gelu": False} | {name: value for name, value in config.items() if name not in kinds}
    for part, kind in kinds.items():
        flat |= {f"{part}.{name}": value for name, value in (asdict(kind()) | config.get(part, {})).items()}
    return flat


def _recorded(path: Path, about: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, configuration) of the architecture that a file, or the Hub's description beside it, says it is of."""
    if "arch" in about:
        config = about.get("model_cfg") or open_clip().get_model_config(about["arch"])
        return (about["arch"], config) if config else None
    beside = path.parent / _CONFIG
    if path.name.startswith("open_clip_") and beside.is_file():
        return str(beside), json.loads(beside.read_text(encoding="utf-8"))["model_cfg"]
    return None


@contextlib.contextmanager
def _download() -> Iterator[None]:
    """Within, weights that are not kept from before are fetched, or refused within seconds where nothing answers."""
    import huggingface_hub as hub  # slow to import, and rarely needed

    before, unreachable = (socket.getdefaulttimeout(), hub.constants.HF_HUB_OFFLINE), ""
    socket.setdefaulttimeout(_PATIENCE)  # of what does not come from the hub
    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # asked for each file, and more than once, it would take minutes
        hub.constants.HF_HUB_OFFLINE = True
        unreachable = f"{hub.constants.ENDPOINT} cannot be reached ({_in_short(error, 120)})"
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not any(isinstance(cause, OSError) for cause in (error, error.__cause__, error.__context__)):
            raise
        hint = "a file from elsewhere does as well: pretrained = '/path/to/file', or -p pretrained /path/to/file"
        raise ValueError(f"{unreachable or _in_short(error, 200)}; {hint}") from error
    finally:
        socket.setdefaulttimeout(before[0])
        hub.constants.HF_HUB_OFFLINE = before[1]


def _in_short(error: Exception, length: int) -> str:
    return textwrap.shorten(str(error), length, placeholder=" ...") or type(error).__name__


@contextlib.contextmanager
def _named(arch: str, pretrained: str | Path | None) -> Iterator[None]:
    """Whatever a foreign file makes torch, safetensors or open_clip raise becomes one line that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"pretrained {str(pretrained)!r} cannot be loaded into {arch}: {_in_short(error, 400)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights even where others are put in afterwards; what it calls an error it raises."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def locate_weights(arch: str, pretrained: str | Path | None) -> str | Path | None:
    """A weights file that is there, or a name that open_clip knows for ``arch``. Raises ValueError for other things."""
    tags = open_clip().list_pretrained_tags_by_model(arch)
    if pretrained in tags:  # open_clip only warns of another activation
        quick = open_clip().get_pretrained_cfg(arch, pretrained).get("quick_gelu", False)
        other = f"{arch}-quickgelu" if quick else arch.removesuffix("-quickgelu")
        _check_architecture(arch, other, model_config(arch) | {"quick_gelu": quick})
    if pretrained is None or pretrained in tags or str(pretrained).startswith(_SCHEMAS):
        return pretrained
    # Links are not followed: beside them lies what describes the weights.
    path = SHIPPED.get(str(pretrained)) or ROOT / Path(pretrained).expanduser()
    if not path.is_file():
        known = ", ".join([*tags, *(SHIPPED if arch == MINI_ARCH else [])]) or "none"
        raise ValueError(f"{str(pretrained)!r} is neither a file ({path}) nor a name known for {arch} ({known})")
    return path


def described_architecture(pretrained: str | None) -> str | None:
    """open_clip's name for what a Hub's repository, or a folder as there, says that it holds; None: it does not say."""
    place = next((pretrained.removeprefix(s) for s in _SCHEMAS if pretrained and pretrained.startswith(s)), None)
    if place is None:
        return None
    with _named("any architecture", pretrained), _quiet():
        path = Path(place) / _CONFIG
        if pretrained.startswith("hf-hub:"):
            from huggingface_hub import hf_hub_download  # slow to import, and rarely needed

            with _download():
                path = Path(hf_hub_download(place, _CONFIG))
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        return next((name for name in open_clip().list_models() if open_clip().get_model_config(name) == config), None)


def find_weights(name: str | None, models: Path) -> str | None:
    """What to load for a notebook's model parameter; "latest:NAME" is the newest ``NAME_*`` in ``models``."""
    if name is None or not name.startswith("latest:"):
        return name
    stem = name.removeprefix("latest:")
    there = (p for p in models.glob("*.safetensors") if p.name.startswith(f"{stem}_") and p.is_file())
    found = sorted(there, key=lambda p: p.lstat().st_mtime)
    if not found:
        raise ValueError(f"no model {stem!r} in {models}; run the notebook that makes it first")
    return str(found[-1])


def model_config(arch: str) -> dict[str, Any]:
    """open_clip's description of an architecture. Raises ValueError for an unknown one."""
    config = None if ":" in arch else open_clip().get_model_config(arch)  # not one from the Hub, or of a folder
    if config is None:
        plain = lambda name: re.sub(r"[^a-z0-9]", "", name.lower())
        known = {plain(name): name for name in reversed(open_clip().list_models())}
        # OpenAI's names are those of the quickgelu variants, which its weights are of.
        close = [known[n] for n in (plain(arch) + "quickgelu", plain(arch)) if n in known]
        close += [known[n] for n in difflib.get_close_matches(plain(arch), known, n=1)]
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"arch {arch!r} is unknown to open_clip; {hint}the workbook's own is {MINI_ARCH!r}")
    return config


def image_size_of(arch: str) -> int:
    """Side in pixels of the images an open_clip architecture takes. Raises ValueError for an unknown one."""
    return model_config(arch)["vision_cfg"]["image_size"]


def same_tokens(arch: str, prompts: Sequence[str]) -> list[list[str]]:
    """Groups of prompts that an architecture's text tower reads as the same tokens.

    Raises ValueError for one that it would cut. No weights are needed.
    """
    prompts = list(dict.fromkeys(prompts))
    groups: dict[tuple[int, ...], list[str]] = {}
    for prompt, row in zip(prompts, tokenize(_tokenizer(arch), prompts, arch).tolist()):
        groups.setdefault(tuple(row), []).append(prompt)
    return [group for group in groups.values() if len(group) > 1]


@functools.cache
def _tokenizer(arch: str) -> Any:
    return open_clip().get_tokenizer(arch)


def save_clip(clip: Clip, path: Path, precision: str = "fp32", **metadata: Any) -> Path:
    """Writes all weights as safetensors that plain open_clip loads too, with JSON-able ``metadata``; in one step."""
    weights: dict[str, Tensor] = {
        k: v.detach().to(_TYPES[precision]).contiguous() for k, v in clip.model.state_dict().items()
    }
    own = {"arch": clip.arch, "mean": clip.mean.flatten().tolist(), "std": clip.std.flatten().tolist()}
    own["model_cfg"] = model_config(clip.arch)
    return save_tensors(path, weights, **metadata, **own)


def read_metadata(path: Path) -> dict[str, Any]:
    """What ``save_clip`` wrote beside the weights; nothing for a foreign file. Raises ValueError for a damaged one."""
    if not is_safetensors(path):
        return {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return {k: json.loads(v) for k, v in metadata.items() if k != "digest"} if "arch" in metadata else {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights {path} are damaged: {' '.join(str(error).split())}") from None


def training_in_words(weights: str | Path | None) -> str:
    """What a file of weights says of how they were tuned; nothing, if it does not, or if they are no such file."""
    if weights is None:
        return ""
    file = SHIPPED.get(str(weights)) or resolve(weights)
    about = read_metadata(file) if file.is_file() else {}
    words, settings, steps = [str(about.get("method", ""))], about.get("settings", {}), len(about.get("history", []))
    if steps and settings.get("epochs"):
        epochs, each = settings["epochs"], round(steps / settings["epochs"])
        plural = "s" if epochs > 1 else ""
        words.append(f"{epochs} epoch{plural} of {each} steps with {settings['batch_size']} images each")
    return ", ".join(filter(None, words))
