"""What a step costs and how fast it is: ``python benchmarks/run.py``, or with the names of some measurements.

Each measurement runs in a process of its own, one after the other. Writes ``benchmarks.json`` into --output and prints
a table. ViT-B/32 at 224 with random weights: nothing is downloaded, and neither operations nor time depend on the
weights.
"""

import tgazsr_utils  # noqa: F401  (before PyTorch: it says how threads wait)

# isort: split
import argparse
import contextlib
import ctypes
import functools
import gc
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from PIL import Image
from released import released_step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.attention import text_guided_attention
from tgazsr_utils.core.models import Clip, ImageTokens
from tgazsr_utils.core.objectives import Step, find_objective
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.core.training import attacked, trainable
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.display.explorer import Explorer, Models
from tgazsr_utils.measuring.measure import evaluate
from tgazsr_utils.parameters import ExplorerNotebook, validate
from tgazsr_utils.paths import resolve
from tgazsr_utils.profiles import default_parameters
from tgazsr_utils.runtime.devices import pick_device
from tgazsr_utils.runtime.files import write_json
from tgazsr_utils.runtime.finetuning import READ_EVERY, finetune
from tgazsr_utils.runtime.fingerprints import code_version
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import SHIPPED, load_clip

TGA = find_objective("TGA-ZSR")
SETTINGS = TGA.with_preset(
    FinetuneSettings(
        Alpha=None,
        Beta=None,
        Distance_metric="l2",
        attention_variant="reference",
        epochs=1,
        batch_size=None,
        lr=None,
        warmup_steps=0,
        train_eps=None,
        train_stepsize=None,
        train_numsteps=None,
        seed=0,
    )
)


class Setup:
    """A model, a frozen copy, and a random batch; ``classes`` prompts. In the workbook's own precision."""

    def __init__(self, arch: str, device: torch.device, batch: int, classes: int, compiled: bool | None = None):
        torch.manual_seed(0)
        self.original = load_clip(arch, None, str(device), "auto", compiled=compiled)
        self.clip = self.original.frozen_copy()
        trainable(self.clip.visual, 0)
        self.images = torch.rand(batch, 3, *self.clip.image_size, device=device)
        self.labels = torch.arange(batch, device=device) % classes
        self.prompts = tuple(f"This is a photo of a thing number {i}" for i in range(classes))
        with torch.no_grad():
            before = Step(self.clip, self.original, self.images, self.labels, self.prompts)
            self.maps = text_guided_attention(
                before.original_tokens, before.true_text
            )  # encodes the prompts, once a run

    def ours(self, cache: Callable | None = None) -> Tensor:
        step = Step(self.clip, self.original, self.images, self.labels, self.prompts, cache=cache)
        step.untouched = False  # as at any step but the first
        step.adversarial = attacked(step, TGA, SETTINGS, 0)
        loss = sum(term.weight * term.value for term in TGA.terms(step, SETTINGS))
        self.clip.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def ours_after_the_first_epoch(self) -> Tensor:
        """With the original model's maps kept."""
        return self.ours(lambda *_: self.maps)

    def as_released(self) -> Callable[[], Tensor]:
        """The released step of the same batch, in the same precision."""
        clip, original = (self.original.frozen_copy() for _ in range(2))
        clip.numerics = original.numerics = clip.numerics._replace(compiled=False)
        for model in (clip, original):
            model.model.requires_grad_(True)
        tokens = clip.tokenizer(list(self.prompts)).to(clip.device)

        def step() -> Tensor:
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=clip.numerics.precision == "amp_bf16"):
                loss = released_step(clip, original, self.images, self.labels, tokens, SETTINGS)
            for model in (clip, original):
                model.zero_grad(set_to_none=True)
            return loss.detach()

        return step


def seconds(function: Callable[[], Tensor], repeats: int) -> float:
    """Median wall time of a call, the first one, which may compile, not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function().sum().item()  # waits for the device
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def noise_files(folder: str, part: str, images: int, classes: int) -> None:
    """A data root with ``set``, whose ``part`` has so many images of 64 pixels in so many classes."""
    for number in range(images):
        path = Path(folder) / "set" / part / f"class {number % classes}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()).save(path)


def median_growth(kept: list[float]) -> float:
    """From one round to the next. An allocator takes a new arena now and then; what leaks does so in every round."""
    return statistics.median(after - before for before, after in zip(kept, kept[1:]))


def resident() -> float:
    """MiB that this process holds: what is free within is given back first, where the C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


def count(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call, of models that are not compiled."""
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator that the counter does not know
    try:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def calls_a_second(function: Callable[[], Tensor]) -> float:
    """Under load: counted over a second, after another of the same, in which clocks and temperature settle."""
    for _ in range(2):
        calls, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < 1:
            for _ in range(10):
                result = function()
            result.flatten()[0].item()  # waits for the device
            calls += 10
    return calls / passed


def device_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time of a call on a CUDA device by its own clock, without launches: all calls are queued at once."""
    function()  # may compile
    stream, events = torch.cuda.current_stream(device), [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for event in events:
        event.record(stream)
        function()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:])) / 1000


def product_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product, in bfloat16 on CUDA and float32 elsewhere: what this machine can do at most."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 * calls_a_second(lambda: a @ b)


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written by a copy of a GiB in the device's memory."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 * calls_a_second(lambda: target.copy_(source))


def operations(arch: str, device: torch.device) -> dict[str, Any]:
    """Floating-point operations of a step in forwards of its images; the prompts' share is that of 200 at batch 128."""
    batch, classes = 16, 25
    setup = Setup(arch, device, batch, classes, compiled=False)
    with torch.no_grad():
        forward = count(lambda: setup.clip.encode_image(setup.images))
    ours, cached, released = (count(f) for f in (setup.ours, setup.ours_after_the_first_epoch, setup.as_released()))
    found = {"forward_gflop_an_image": forward / batch / 1e9, "ours_forwards": ours / forward}
    found |= {"ours_forwards_after_the_first_epoch": cached / forward, "released_forwards": released / forward}
    return found | {"ratio": released / ours, "batch": batch, "classes": classes}


def step(arch: str, device: torch.device) -> dict[str, Any]:
    """Wall time of a training step's attack, loss and backward after the first epoch; share of the machine's rate.

    Without the optimiser, the images' resize and the history, which ``training`` has.
    """
    batch = 128 if device.type == "cuda" else 8
    setup = Setup(arch, device, batch, 200)
    cached = setup.ours_after_the_first_epoch
    found = {
        "batch": batch,
        "classes": 200,
        "precision": setup.clip.numerics.precision,
        "compiled": setup.clip.numerics.compiled,
    }
    started = time.perf_counter()
    cached().item()
    found["seconds_of_the_first"] = time.perf_counter() - started  # compiles
    found["seconds"] = seconds(cached, 20 if device.type == "cuda" else 3)
    found["peak_memory_gib"] = peak_memory(device)
    setup.clip.numerics = setup.original.numerics = setup.clip.numerics._replace(compiled=False)
    found["teraflop"], rate = count(cached) / 1e12, product_rate(device)
    return found | {
        "teraflop_s_of_a_matrix_product": rate / 1e12,
        "utilisation": 1e12 * found["teraflop"] / found["seconds"] / rate,
    }


def training(arch: str, device: torch.device) -> dict[str, Any]:
    """Images a second of ``finetune``: a step with resize, optimiser and history, of image files of 64 pixels."""
    batch, steps = (128, 64) if device.type == "cuda" else (8, 12)
    first = 2 * READ_EVERY.get(device.type, 2)  # these compile, encode and fill caches; those read at once share times
    clip = load_clip(arch, None, str(device), "auto", compiled=None)
    with tempfile.TemporaryDirectory() as folder:
        noise_files(folder, "train", batch * steps, classes=min(200, batch * steps))
        data = load_dataset("set", "train", folder, image_size=clip.image_size[0], decode=False)
        settings = SETTINGS.model_copy(update={"batch_size": batch})
        history = finetune(clip, data, TGA, settings, Path(folder), watch=lambda *_: None).history
    found = {"batch": batch, "steps": steps - first, "classes": len(data.prompts)}
    found |= {"precision": clip.numerics.precision, "compiled": clip.numerics.compiled}
    return found | {"images_a_second": batch / history.seconds[first:].mean()}


def released(arch: str, device: torch.device) -> dict[str, Any]:
    """Wall time of the same step as released, in the same precision; see released.py."""
    batch = 128 if device.type == "cuda" else 8
    setup = Setup(arch, device, batch, 200)
    found = {"batch": batch, "classes": 200, "precision": setup.clip.numerics.precision}
    return found | {"seconds": seconds(setup.as_released(), 5 if device.type == "cuda" else 1)}


def attack(arch: str, device: torch.device) -> dict[str, Any]:
    """Images a second that PGD with ten steps attacks."""
    batch = 512 if device.type == "cuda" else 8
    setup = Setup(arch, device, batch, 200)
    text = setup.original.encode_text(setup.prompts)
    noise = Noise(0, torch.arange(batch, device=device))  # as ``measuring`` draws it
    run = lambda: pgd(setup.original, setup.images, setup.labels, text, 1 / 255, 1 / 255, 10, generator=noise)
    found = {
        "batch": batch,
        "steps": 10,
        "precision": setup.clip.numerics.precision,
        "compiled": setup.clip.numerics.compiled,
    }
    return found | {"images_a_second": batch / seconds(run, 3)}


def attention_calls(clip: Clip, images: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Attention's forward and backward on random tokens as ``clip`` makes them, by each of the ways to compute it."""
    tokens = clip.encode_image(torch.rand(1, 3, *clip.image_size, device=clip.device))
    kind = {"dtype": tokens.patches.dtype, "device": clip.device, "requires_grad": True}
    pooled, patches = (torch.randn(images, *part.shape[1:], **kind) for part in tokens)
    text, slopes = torch.randn_like(pooled), torch.randn(images, *clip.grid, device=clip.device)
    attend = lambda backend: functools.partial(text_guided_attention, grid=clip.grid, backend=backend)

    def both(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(ImageTokens(pooled, patches), text), (pooled, patches), slopes)

    ways = {"triton": attend("triton"), "eager": attend("torch"), "compiled": torch.compile(attend("torch"))}
    return {name: both(function) for name, function in ways.items()}


def kernel(arch: str, device: torch.device) -> dict[str, Any]:
    """Time of the attention operator's forward and backward on CUDA, and its share of the device's copying rate."""
    if device.type != "cuda":
        return {"not_measured": "the kernel needs a CUDA device"}
    images = 32_000  # gigabytes: no cache holds them, and no launch is longer than its work
    calls = attention_calls(load_clip(arch, None, str(device), "auto", compiled=False), images)
    _, gradient = calls["triton"]()
    found: dict[str, Any] = {"images": images, "patches": gradient.shape[1], "width": gradient.shape[2]}
    found |= {"dtype": str(gradient.dtype).removeprefix("torch."), "copy_terabyte_s": copy_rate(device) / 1e12}
    traffic = 3 * gradient.nbytes / 1e12  # tokens are read forwards and backwards, their gradient is written
    for name, call in calls.items():
        spent = device_seconds(call, device)
        found[f"{name}_microseconds"] = 1e6 * spent
        found[f"{name}_share_of_bandwidth"] = traffic / spent / found["copy_terabyte_s"]
    return found


def explorer(arch: str, device: torch.device) -> dict[str, Any]:
    """Of notebook 05 on the mini-CLIP: seconds until what a slider moves is redrawn; what 200 moves keep.

    Alpha: mixer and map; epsilon: an image attacked before two models.
    """
    original = load_clip("mini-clip", "mini", str(device), "auto", compiled=False)
    train, test = (load_dataset("shapes", part, n=64) for part in ("train", "test"))
    settings = validate(ExplorerNotebook, default_parameters("05_alpha_beta_explorer") | {"output": "runs/benchmarks"})
    run = Run(resolve(settings.output))
    models = Models(original, SHIPPED["mini-tga-zsr"], run)
    training, attack = settings.only(FinetuneSettings), settings.only(AttackSettings)
    shown = Explorer(models, test, train, training, attack, run.folder)

    def timed(slider: Any, moves: int) -> float:
        """Median seconds of a move of a slider, until its panels are redrawn."""
        times = []
        for number in range(moves):
            started = time.perf_counter()
            slider.value = slider.min + (number % 50 + 1) * slider.step
            times.append(time.perf_counter() - started)
        return sorted(times)[moves // 2]

    found = {
        "seconds_of_an_alpha_move": timed(shown.Alpha, 200),
        "seconds_of_an_epsilon_move": timed(shown.attack.eps, 20),
    }
    kept = []
    for _ in range(5):
        timed(shown.Alpha, 25), timed(shown.attack.eps, 25)
        kept.append(resident())
    return found | {"mib_kept_by_200_moves": 4 * median_growth(kept)}


def evaluation(arch: str, device: torch.device) -> dict[str, Any]:
    """Of the mini-CLIP: the memory that measuring thousands of image files keeps, clean and under PGD-1."""
    clip = load_clip("mini-clip", "mini", str(device), "auto", compiled=False)
    attack = AttackSettings(test_eps=1, test_stepsize=1, test_numsteps=1)
    rounds, images = 10, 512  # so many images have workers
    with tempfile.TemporaryDirectory() as folder:
        noise_files(folder, "test", images, classes=4)
        kept = []
        for number in range(2 + rounds):  # the first two fill caches
            data = load_dataset("set", "test", folder, image_size=clip.image_size[0], decode=False)
            evaluate(clip, data, None, method="CLIP", seed=number)
            evaluate(clip, data, attack, method="CLIP", seed=number)
            kept.append(resident())
    found = {"images": rounds * images, "mib_kept": kept[-1] - kept[1], "mib_kept_a_round": median_growth(kept[1:])}
    return found | {"mib_after_each_round": kept}


MEASUREMENTS = {f.__name__: f for f in (operations, step, training, released, attack, kernel, explorer, evaluation)}


def peak_memory(device: torch.device) -> float:
    """GiB so far: of the device, or resident where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measured(name: str, arch: str, device: str) -> dict[str, Any]:
    """One measurement, with the peak memory of this process."""
    target = pick_device(device)
    if target.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(target)
    found = MEASUREMENTS[name](arch, target)
    return {"peak_memory_gib": peak_memory(target)} | found


def machine(asked: str) -> dict[str, Any]:
    device = pick_device(asked)
    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "code": code_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _apart(function: Callable[..., Any], *given: Any) -> Any:
    """In a process of its own: a GPU may admit one at a time, and its peak of memory is of this call alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *given).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *MEASUREMENTS], help="which measurements (default: all)")
    parser.add_argument("--arch", default="ViT-B-32-quickgelu", help="an open_clip ViT")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--here", action="store_true", help="all in this process, where starting one takes long")
    options = parser.parse_args()
    run = lambda function, *given: function(*given) if options.here else _apart(function, *given)
    found: dict[str, Any] = {"machine": run(machine, options.device), "arch": options.arch}
    print(f"{options.arch} on {found['machine']['device']}, torch {torch.__version__}", flush=True)
    for name in options.names or MEASUREMENTS:
        found[name] = run(measured, name, options.arch, options.device)
        if name == "released" and "step" in found:
            found["speed_up"] = found["released"]["seconds"] / found["step"]["seconds"]
            print(f"\nspeed-up of a step: {found['speed_up']:.2f}")
        meaning = (MEASUREMENTS[name].__doc__ or "").split("\n")[0]
        print(f"\n{name}: {meaning}")
        print(pd.Series(found[name]).to_string(float_format="{:.3f}".format), flush=True)
        write_json(options.output / "benchmarks.json", found)


if __name__ == "__main__":
    main()
