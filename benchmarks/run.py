"""What a step costs and how fast it is: ``python benchmarks/run.py``, or with the names of some measurements.

Writes ``benchmarks.json`` into --output and prints a table. ViT-B/32 at 224 with random weights: nothing is downloaded,
and neither operations nor time depend on what the weights are.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

import tgazsr_utils  # first: makes torchvision importable beside a CPU build of PyTorch
from released import released_step
from tgazsr_utils.attacks import pgd
from tgazsr_utils.attention import text_guided_attention
from tgazsr_utils.files import code_version, write_json
from tgazsr_utils.models import ImageTokens, load_clip, pick_device
from tgazsr_utils.objectives import Step, find_objective
from tgazsr_utils.settings import FinetuneSettings
from tgazsr_utils.training import attack_and_loss, trainable

ARCH = "ViT-B-32-quickgelu"
PEAK = {"H200": 790e12}  # dense bf16 FLOP/s, as measured; for the utilisation
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}  # bytes/s, by data sheet
TGA = find_objective("TGA-ZSR")
SETTINGS = TGA.with_preset(
    FinetuneSettings(
        Alpha=None, Beta=None, Distance_metric="l2", attention_variant="reference", epochs=1, batch_size=None, lr=None,
        warmup_steps=0, train_eps=None, train_stepsize=None, train_numsteps=None, seed=0,
    )  # fmt: skip
)


class Setup:
    """A model, a frozen copy, and a random batch; ``classes`` prompts."""

    def __init__(self, device: torch.device, batch: int, classes: int):
        torch.manual_seed(0)
        self.original = load_clip(ARCH, None, str(device))
        self.clip = self.original.frozen_copy()
        trainable(self.clip.visual, 0)
        self.images = torch.rand(batch, 3, 224, 224, device=device)
        self.labels = torch.arange(batch, device=device) % classes
        self.prompts = tuple(f"This is a photo of a thing number {i}" for i in range(classes))
        self.original.encode_text(self.prompts)  # once a run, before any step

    def ours(self, cache: Callable | None = None) -> torch.Tensor:
        step = Step(self.clip, self.original, self.images, self.labels, self.prompts, cache=cache)
        loss, _ = attack_and_loss(step, TGA, SETTINGS, 0)
        self.clip.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def released(self) -> torch.Tensor:
        clip, original = (self.original.frozen_copy() for _ in range(2))
        for model in (clip, original):
            model.model.requires_grad_(True)
        tokens = clip.tokenizer(list(self.prompts)).to(clip.device)
        return released_step(clip, original, self.images, self.labels, tokens, SETTINGS).detach()


def seconds(function: Callable[[], torch.Tensor], repeats: int) -> float:
    """Median wall time of a call, the first one not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function().sum().item()  # waits for the device
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def operations(device: torch.device) -> dict[str, Any]:
    """Floating-point operations of a step in forwards of its images; the prompts' share is that of 200 at batch 128."""
    batch, classes = 16, 25
    setup = Setup(device, batch, classes)

    def count(function: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator that the counter does not know
    try:
        with torch.no_grad():
            forward = count(lambda: setup.clip.encode_image(setup.images))
        kept = Step(setup.clip, setup.original, setup.images, setup.labels, setup.prompts)
        with torch.no_grad():
            maps = text_guided_attention(kept.original_tokens, kept.true_text)
        ours, cached, released = count(setup.ours), count(lambda: setup.ours(lambda *_: maps)), count(setup.released)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    found = {"forward_gflop_an_image": forward / batch / 1e9, "ours_forwards": ours / forward}
    found |= {"ours_forwards_after_the_first_epoch": cached / forward, "released_forwards": released / forward}
    return found | {"ratio": released / ours, "batch": batch, "classes": classes}


def step(device: torch.device) -> dict[str, Any]:
    """Wall time of a step, ours and as released, one after the other on the same device; fp32."""
    batch = 128 if device.type == "cuda" else 8
    repeats = 10 if device.type == "cuda" else 3
    setup = Setup(device, batch, 200)
    ours, released = seconds(setup.ours, repeats), seconds(setup.released, repeats)
    found = {"batch": batch, "classes": 200, "ours_seconds": ours, "released_seconds": released, "speed_up": released / ours}
    peak = next((v for k, v in PEAK.items() if device.type == "cuda" and k in torch.cuda.get_device_name(device)), None)
    if peak:
        found["flops_utilisation"] = 11 * 8.8e9 * batch / ours / peak  # forwards a step, see operations
    return found


def attack(device: torch.device) -> dict[str, Any]:
    """Images a second that PGD with ten steps attacks."""
    batch = 128 if device.type == "cuda" else 8
    setup = Setup(device, batch, 200)
    text = setup.original.encode_text(setup.prompts)
    run = lambda: pgd(setup.original, setup.images, setup.labels, text, 1 / 255, 1 / 255, 10)
    return {"batch": batch, "steps": 10, "images_a_second": batch / seconds(run, 3)}


def kernel(device: torch.device) -> dict[str, Any]:
    """The attention operator's forward and backward, as a share of the device's memory bandwidth; CUDA only."""
    if device.type != "cuda":
        return {"not_measured": "the kernel needs a CUDA device"}
    batch, patches, width = 1024, 49, 512
    shapes = (batch, width), (batch, patches, width), (batch, width)
    pooled, tokens, text = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    tokens.requires_grad_(True)
    pooled.requires_grad_(True)

    def both(attend: Callable) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            for _ in range(100):
                maps = attend(pooled, tokens, text)
                gradients = torch.autograd.grad(maps.square().sum(), (pooled, tokens))
            return gradients[0]

        return run

    attend = lambda backend: lambda p, t, x: text_guided_attention(ImageTokens(p, t), x, "reference", backend=backend)
    traffic = 3 * tokens.numel() * tokens.element_size()  # read forwards, read backwards, gradient written
    bandwidth = next((v for k, v in BANDWIDTH.items() if k in torch.cuda.get_device_name(device)), None)
    found: dict[str, Any] = {"batch": batch, "patches": patches, "width": width, "dtype": "bfloat16"}
    for name, function in (("triton", attend("triton")), ("eager", attend("torch")), ("compiled", torch.compile(attend("torch")))):
        found[f"{name}_microseconds"] = 1e6 * seconds(both(function), 5) / 100
        if bandwidth:
            found[f"{name}_share_of_bandwidth"] = traffic / (found[f"{name}_microseconds"] * 1e-6) / bandwidth
    return found


MEASUREMENTS = {f.__name__: f for f in (operations, step, attack, kernel)}


def peak_memory(device: torch.device) -> float:
    """GiB since the start of the process: of the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MEASUREMENTS], help="which measurements (default: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    device = pick_device(options.device)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "code": code_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(f"{ARCH} on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}", flush=True)
    found: dict[str, Any] = {"machine": machine}
    for name in options.names or MEASUREMENTS:
        found[name] = MEASUREMENTS[name](device) | {"peak_memory_gib": peak_memory(device)}
        print(f"\n{name}: {MEASUREMENTS[name].__doc__.splitlines()[0]}")
        print(pd.Series(found[name]).to_string(float_format="{:.3f}".format), flush=True)
        write_json(options.output / "benchmarks.json", found)


if __name__ == "__main__":
    main()
