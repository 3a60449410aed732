"""Several processes, one a device: who works on what, and how the parts of a training step come together.

In training every process holds the whole batch and computes the whole loss, but its models encode only its own share
of the images and gather the tokens of all (``SharedClip``); so an objective sees what it sees in one process, whatever
it does across the batch. Measurements need no talk: they are shared out as jobs (``own_part``). All functions also
work in one process.
"""

import contextlib
import copy
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tgazsr_utils.core.models import Clip, ImageTokens
from tgazsr_utils.core.objectives import Objective, Step
from tgazsr_utils.core.settings import FinetuneSettings
from tgazsr_utils.core.training import attacked
from tgazsr_utils.machine import allowed_cpus

Job = TypeVar("Job")
MOST_PROCESSES = 4  # each takes memory of its own
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
_apart: list[bool] = []  # not empty while this process works by itself


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _apart else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _apart else 0


def are_started() -> bool:
    """Is this one of several, be it one that works by itself?"""
    return dist.is_initialized()


def is_main() -> bool:
    return rank() == 0


def own_part(jobs: Sequence[Job], costs: Sequence[float] | None = None) -> list[Job]:
    """Those of the jobs that this process does: each, the most costly first, is for whom least is to do so far."""
    costs, load, own = costs or [1.0] * len(jobs), [0.0] * count(), []
    for number in sorted(range(len(jobs)), key=lambda number: -costs[number]):
        free = load.index(min(load))
        load[free] += costs[number]
        if free == rank():
            own.append(number)
    return [jobs[number] for number in sorted(own)]


def do_apart(jobs: Sequence[Callable[[], Any]]) -> None:
    """Each of the jobs in one process, as if there were no others; but for what is left of them after whole rounds."""
    own = own_part(jobs[: len(jobs) // count() * count()])
    _apart.append(True)
    try:
        for job in own:
            job()
    finally:
        _apart.pop()
    wait()


# --- one training step


def share(n: int, process: int | None = None) -> slice:
    """The rows of ``n`` that a process (default: this one) works on: all of them, if there are fewer than processes."""
    if n < count():
        return slice(0, n)
    process = rank() if process is None else process
    return slice(n * process // count(), n * (process + 1) // count())


class SharedClip(Clip):
    """A model that encodes its process's share of a batch and gathers the tokens of all."""

    def encode_image(self, pixels: Tensor) -> ImageTokens:
        own = super().encode_image(pixels[share(len(pixels))])
        return ImageTokens(*(_gather(part, len(pixels)) for part in own))


def shared(clip: Clip) -> Clip:
    """The same model, shared among the processes where there are several."""
    return _as(SharedClip, clip) if count() > 1 else clip


def alone(clip: Clip) -> Clip:
    """The same model, of this process alone."""
    return _as(Clip, clip) if isinstance(clip, SharedClip) else clip


def _as(kind: type[Clip], clip: Clip) -> Clip:
    same = copy.copy(clip)
    same.__class__ = kind
    return same


def shared_attack(step: Step, objective: Objective, settings: FinetuneSettings, number: int) -> Tensor:
    """``core.training.attacked`` in which each process attacks its share of the images, or all if it must."""
    n = len(step.images)
    if count() == 1 or objective.attack is None or objective.whole_batch or not settings.train_eps:
        return attacked(step, objective, settings, number)
    own = share(n)
    models = {"clip": alone(step.clip), "original": alone(step.original)}
    rows = None if step.rows is None else step.rows[own]
    captions = None if step.captions is None else step.captions[own]
    part = replace(step, **models, images=step.images[own], labels=step.labels[own], rows=rows, captions=captions)
    return _gather(attacked(part, objective, settings, number, range(n)[own]), n)


def average_gradients_of(parameters: Iterable[nn.Parameter]) -> None:
    """From now on each gradient is its mean over processes, as soon as a backward has it."""
    if count() > 1:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= count()


def _gather(part: Tensor, n: int) -> Tensor:
    """All ``n`` rows, from each process's ``share(n)``. Differentiable, if all compute the same with them."""
    return part if n < count() or count() == 1 else _Gather.apply(part, n)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, part: Tensor, n: int) -> Tensor:
        context.n = n
        rows = [share(n, process) for process in range(count())]
        longest = max(own.stop - own.start for own in rows)
        padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        return torch.cat([whole[: own.stop - own.start] for whole, own in zip(parts, rows)])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each process passes on its own share's part of the gradient of the same loss; the mean over processes, right
        # for what all of them compute, wants that part as often as there are processes.
        return gradient[share(context.n)] * count(), None


# --- agreement


def in_any(flag: bool, device: torch.device) -> bool:
    """Is ``flag`` true in one of the processes? ``device`` is where they can talk."""
    if count() == 1:
        return flag
    box = torch.tensor(int(flag), device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box)


def from_main(compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives in the main process: what is on the disk, they must all see alike."""
    box = [compute() if is_main() else None]
    if count() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


# --- start and stop


def that_suit(device: str) -> int:
    """How many processes do most on this machine: of a small model on the CPU, one a processor, to ``MOST_PROCESSES``.

    One, where there is a GPU or another device was chosen, and where processes are not forked.
    """
    forked = sys.platform == "linux" and device in ("auto", "cpu") and not torch.cuda.is_available()
    return min(MOST_PROCESSES, allowed_cpus()) if forked and not are_started() else 1


def launch(number: int, function: Callable[..., Any], clip: Clip, *arguments: Any) -> None:
    """Calls ``function(clip, *arguments)`` in ``number`` processes of this machine, each with a device of its own.

    Functions that a notebook defines are known there, since processes are forked (by accelerate's notebook_launcher);
    so CUDA must not be in use yet. Raises RuntimeError with the first error of any of them, or FloatingPointError if
    it is one; KeyboardInterrupt on Ctrl-C.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"processes = {number}: CUDA is in use in this process, which therefore cannot be forked; "
            "restart the kernel and load models with load_clip(..., waiting=True), which leaves them on the CPU"
        )
    from accelerate import notebook_launcher  # slow to import, and rarely needed

    work = (sys.stdout, function, clip, *arguments)
    with _failures(number), contextlib.redirect_stdout(io.StringIO()):  # it speaks of CUDA on any device
        notebook_launcher(_work, work, num_processes=number, use_port=_free_port())


def launch_anew(number: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function(*arguments)``, which can be imported, in ``number`` fresh processes, as torchrun starts them.

    Gives what the first of them does. CUDA may be in use here. Errors are those of ``launch``.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # slow to import, and rarely needed
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{_free_port()}", "rdzv_configs": {"rank": 0}}
    with _failures(number), tempfile.TemporaryDirectory() as logs:
        of_run = {"run_id": "run", "max_restarts": 0, "start_method": "spawn"}
        config = LaunchConfig(1, 1, number, logs_specs=DefaultLogsSpecs(log_dir=logs), **of_run, **where)
        return elastic_launch(config, function)(*arguments)[0]


def run_in_own_session(command: Sequence[str]) -> None:
    """Runs a command to its end. It is sent the signals that this process gets, but for those that this one ignores."""
    seen: list[int] = []
    started: list[subprocess.Popen] = []
    heeded = [one for one in _SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    pass_on = lambda number, _: (seen.append(number), [process.send_signal(number) for process in started])
    handlers = {one: signal.signal(one, pass_on) for one in heeded}
    try:
        started.append(subprocess.Popen(command, start_new_session=True))
        for one in seen:  # before it was there
            started[0].send_signal(one)
        started[0].wait()
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    for one in seen[:1]:
        signal.raise_signal(one)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def _failures(number: int) -> Iterator[None]:
    """Says in one line what went wrong in a process within; leaves signals and what is logged as they were."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    handlers, quiet = {one: signal.getsignal(one) for one in _SIGNALS}, logging.root.manager.disable
    logging.disable()  # the launcher tells its own authors of what is raised below
    try:
        yield
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        reason = failure.message.get("message", "") if isinstance(failure.message, dict) else failure.message
        kind = FloatingPointError if str(reason).startswith("FloatingPointError") else RuntimeError
        raise kind(f"one of {number} processes failed: {reason}") from error
    except SignalException:
        raise KeyboardInterrupt(f"{number} processes were stopped; the same call goes on from there") from None
    finally:
        logging.disable(quiet)
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
        for one, handler in handlers.items():  # the launcher leaves its own behind
            if signal.getsignal(one) is not handler:
                signal.signal(one, handler)


def use_one_thread() -> None:
    """One thread for this process; accelerate, where the variable is not set, takes others and warns of it."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _work(shown: TextIO, function: Callable[..., Any], clip: Clip, *arguments: Any) -> None:
    sys.stdout = shown
    use_one_thread()  # the threads of the process that was forked are not here, and waiting for them never ends
    with joined(on_cpu=clip.numerics.device == "cpu") as device:
        function(clip.to(device), *arguments)


@contextlib.contextmanager
def joined(on_cpu: bool = False) -> Iterator[torch.device]:
    """Within, this is one of the processes that torchrun or ``launch`` started; yields its device."""
    from accelerate import PartialState  # slow to import, and rarely needed

    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # one may have much more to do than another
    try:
        yield state.device
        state.destroy_process_group()  # not after an error: others would fail of that, and be told of first
    finally:
        PartialState._reset_state()  # private: accelerate keeps the first state for ever; a second launch needs another


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C (SIGINT) only sets a flag, so that a step is never left half done; yields the flag's reader.

    With several processes so does SIGTERM, which is how they are told to stop.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT]
    if are_started():  # what their launcher ignores, as of "command &" in sh, they ignore: it would wait for them
        numbers = [one for one in (*numbers, signal.SIGTERM) if signal.getsignal(one) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
