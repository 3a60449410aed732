"""One page without an installation: the mini-CLIP's image encoders in the reader's browser, in one HTML file.

Images are attacked ahead by ``pgd``; an image or drawing of the reader's own is attacked there, by the same steps, for
which the exported model gives the gradient by the pixels. ``demo_page`` holds what the page is made of.
"""

import base64
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.models import Clip, encode
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.paths import resolve
from tgazsr_utils.runtime.files import write_atomic
from tgazsr_utils.runtime.weights import load_clip

MODELS = {"original": "mini", "tuned": "mini-tga-zsr"}
EPSILONS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)  # 1/255
START = 3.5  # where the slider stands at first: what the notebooks measure at
STEPS = 10  # of eps / 4 each
QUESTIONS = {  # task -> what is asked, and how many of its images are shown
    "shapes": ("Which shape?", 3),
    "letters": ("Which letter?", 2),
    "colours": ("Which colour?", 1),
    "scenes": ("Which background?", 1),
    "counts": ("How many?", 1),
}
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME_FILES = {"runtime": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}


def write_demo(path: Path) -> Path:
    """Writes the page to ``path``. Raises ValueError, one line, where a package, npm or the network is missing."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing or not _npm():
        raise ValueError(f"the demo needs {' and '.join(missing or ['npm'])}: pip install 'tgazsr-utils[demo]'")
    blobs = fetch_runtime()
    clips = {name: load_clip("mini-clip", weights, "cpu") for name, weights in MODELS.items()}
    facts, images, labels = chosen(clips)
    blobs["pixels"] = images.numpy().tobytes()
    for (name, clip), file in zip(clips.items(), exported(list(clips.values()))):
        blobs[f"model-{name}"] = file
        blobs[f"attacks-{name}"] = attacked(clip, facts, images, labels).numpy().tobytes()
    return write_atomic(path, lambda temporary: temporary.write_text(_page(facts, blobs), encoding="utf-8"))


def fetch_runtime() -> dict[str, bytes]:
    """The runtime's files, by npm: its script and WebAssembly. Raises ValueError if these are not those pinned."""
    with tempfile.TemporaryDirectory() as folder:
        command = [_npm(), "pack", RUNTIME, "--prefer-offline", "--silent", "--fetch-retries=1"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        packed = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or packed is None:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise ValueError(f"npm could not fetch {RUNTIME}: {reason}")
        if base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() != RUNTIME_SHA512:
            raise ValueError(f"what npm fetched is not the {RUNTIME} that the page is tested with")
        with tarfile.open(packed) as files:
            return {name: files.extractfile(f"package/dist/{file}").read() for name, file in RUNTIME_FILES.items()}


def _npm() -> str | None:
    """That of this environment before any other."""
    return shutil.which("npm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def exported(clips: Sequence[Clip]) -> list[bytes]:
    """ONNX of each of these models, which differ in weights only: one graph, exported once.

    It takes pixels ``[B,3,H,W]`` in [0,1], text ``[C,D]`` and one-hot labels ``[B,C]``, and gives the pooled and patch
    tokens of ``Clip.encode_image`` and the gradient ``[B,3,H,W]`` of the summed cross-entropy.
    """
    with warnings.catch_warnings(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        warnings.simplefilter("ignore")  # of PyTorch about itself
        model, names = _graph(clips[0])
    files = []
    for clip in clips:
        weights = dict(clip.named_parameters())
        for constant in model.graph.initializer:
            if constant.name in names:
                constant.raw_data = weights[names[constant.name]].detach().numpy().tobytes()
        files.append(model.SerializeToString())
    return files


def _graph(clip: Clip) -> tuple[Any, dict[str, str]]:
    """An ONNX model, and which of the parameters each of its constants is."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

    def step(pixels: Tensor, text: Tensor, one_hot: Tensor) -> tuple[Tensor, ...]:
        pixels = pixels.detach().requires_grad_(True)
        tokens = encode(clip, pixels, compiled=False)
        logits = clip.similarity(tokens.pooled, text)
        loss = (logits.logsumexp(1) - (logits * one_hot).sum(1)).sum()
        return *tokens, *torch.autograd.grad(loss, pixels)

    B, C = 5, 7  # unlike any other size, so that they are not taken for one
    given = torch.rand(B, 3, *clip.image_size), torch.rand(C, clip.visual.output_dim), torch.rand(B, C)
    graph = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*given)
    known = {id(parameter): name for name, parameter in clip.named_parameters()}
    names = {place: known[id(parameter)] for place, parameter in graph.named_parameters()}
    batch, classes = torch.export.Dim("batch"), torch.export.Dim("classes")
    program = torch.export.export(graph, given, dynamic_shapes=({0: batch}, {0: classes}, {0: batch, 1: classes}))
    called = {"input_names": ["pixels", "text", "labels"], "output_names": ["pooled", "patches", "gradient"]}
    model = torch.onnx.export(program, **called, dynamo=True, optimize=False, verbose=False).model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # lines and paths of this machine
    return model, names


def chosen(clips: dict[str, Clip]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What the page says in words and numbers, its images ``[N,3,H,W]`` (uint8) and their labels ``[N]``.

    The images are the first of each test set that all models get right; how an attack goes does not matter.
    """
    clip, tasks, shown, images = next(iter(clips.values())), {}, [], []
    for key, (question, count) in QUESTIONS.items():
        data = load_dataset(key, "test", n=40)
        text = clip.encode_text(data.prompts)
        pixels = data.images.float() / 255
        right = torch.stack([one.logits(pixels, text).argmax(1) == data.labels for one in clips.values()]).all(0)
        for row in right.nonzero().flatten()[:count].tolist():
            shown.append({"task": key, "label": int(data.labels[row])})
            images.append(data.images[row])
        words = {"question": question, "classes": data.class_names, "prompts": data.prompts}
        tasks[key] = words | {"text": _base64(text.numpy().tobytes())}
    facts = {"epsilons": EPSILONS, "start": START, "steps": STEPS, "side": clip.image_size[0], "grid": clip.grid}
    facts["scale"] = float(clip.model.logit_scale.exp().clamp(max=100))
    facts["viridis"] = [round(255 * value) for colour in matplotlib.colormaps["viridis"].colors for value in colour]
    return facts | {"tasks": tasks, "images": shown}, torch.stack(images), torch.tensor([one["label"] for one in shown])


def attacked(clip: Clip, facts: dict[str, Any], images: Tensor, labels: Tensor) -> Tensor:
    """Perturbations ``[N,E,3,H,W]`` (int8), one an epsilon, in 1/127 of it; cut towards zero, so within it.

    ``images`` ``[N,3,H,W]`` (uint8), ``labels`` ``[N]``.
    """
    found = torch.empty(len(images), len(EPSILONS), *images.shape[1:], dtype=torch.int8)
    for key, task in facts["tasks"].items():
        rows = torch.tensor([row for row, shown in enumerate(facts["images"]) if shown["task"] == key])
        text, pixels = clip.encode_text(task["prompts"]), images[rows].float() / 255
        for column, eps_255 in enumerate(EPSILONS):
            start, eps = torch.Generator().manual_seed(0), eps_255 / 255
            moved = pgd(clip, pixels, labels[rows], text, eps, eps / 4, STEPS, generator=start)
            found[rows, column] = (127 * (moved - pixels) / eps).trunc().clamp(-127, 127).to(torch.int8)
    return found


def _page(facts: dict[str, Any], blobs: dict[str, bytes]) -> str:
    """The template with everything in it; its script finds each blob by its id, packed."""
    folder = resources.files(__package__) / "demo_page"
    read = lambda name: (folder / name).read_text(encoding="utf-8")
    packed = [
        f'<script type="text/plain" id="{name}">{_base64(gzip.compress(blob, 9, mtime=0))}</script>'
        for name, blob in blobs.items()
    ]
    parts = {"STYLE": read("page.css"), "SCRIPT": read("page.js"), "BLOBS": "\n".join(packed)}
    parts |= {"FACTS": json.dumps(facts), "STEPS": str(STEPS), "RUNTIME": RUNTIME.replace("@", " ")}
    page = read("page.html")
    for name, part in parts.items():
        page = page.replace(f"@{name}@", part)
    return page


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main(arguments: Sequence[str]) -> int:
    """Writes the page to the file that is named, by default ``runs/demo/index.html``."""
    try:
        if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
            raise ValueError(f"--demo takes a file's name and nothing else, not {' '.join(arguments)}")
        path = resolve(arguments[0] if arguments else "runs/demo/index.html")
        if path.suffix != ".html":
            raise ValueError(f"the demo is one .html file; {path} is no name for it")
        print("exporting both models and attacking their images (some minutes)", file=sys.stderr)
        size = write_demo(path).stat().st_size / 1e6
        print(f"{path} ({size:.0f} MB): open it in a browser, or put it on any web server")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
