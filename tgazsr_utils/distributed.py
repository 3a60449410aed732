"""Several processes, one a device: which rows each one works on, and how their parts come together.

Every process holds the whole batch and computes the whole loss, but encodes and attacks only its own share of the images.
So an objective sees what it sees in one process, whatever it does across the batch. All functions also work in one process.
"""

import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState, notebook_launcher
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int, process: int | None = None) -> slice:
    """The rows of ``n`` that a process (default: this one) works on: all of them, if there are fewer than processes."""
    if n < processes():
        return slice(0, n)
    process = rank() if process is None else process
    return slice(n * process // processes(), n * (process + 1) // processes())


def gather(part: Tensor, n: int) -> Tensor:
    """All ``n`` rows, in order, from each process's ``share(n)`` of them. Differentiable, if every process computes the same with them."""
    return part if n < processes() or processes() == 1 else _Gather.apply(part, n)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, part: Tensor, n: int) -> Tensor:
        context.n = n
        rows = [share(n, process) for process in range(processes())]
        longest = max(own.stop - own.start for own in rows)
        padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        return torch.cat([whole[: own.stop - own.start] for whole, own in zip(parts, rows)])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each process has the same loss and passes on its own share's part of the gradient: the mean over processes, which
        # is right for what all of them compute, wants that part as often as there are processes.
        return gradient[share(context.n)] * processes(), None


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if processes() > 1 and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, (flat / processes()).split(sizes)):
            gradient.copy_(mean.view_as(gradient))


def largest(values: Tensor, device: torch.device) -> Tensor:
    """The largest of each value over processes; ``device`` is where they can talk."""
    if processes() == 1:
        return values
    there = values.to(device, copy=True)
    dist.all_reduce(there, op=dist.ReduceOp.MAX)
    return there.to(values.device)


def in_any(flag: bool, device: torch.device) -> bool:
    """Is ``flag`` true in one of the processes?"""
    return bool(largest(torch.tensor(int(flag)), device))


def of_main(compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives in the main process: what is on the disk, they must all see alike."""
    box = [compute() if rank() == 0 else None]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def wait() -> None:
    """Until all processes are here."""
    if processes() > 1:
        dist.barrier()


def launch(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls ``function(*arguments, device)`` in ``count`` processes of this machine, each with a device of its own.

    Functions that a notebook defines are known there, since processes are forked (by accelerate's notebook_launcher); so
    CUDA must not be in use yet. Raises RuntimeError with the first error of any of them, KeyboardInterrupt on Ctrl-C.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"processes = {count}: CUDA is in use in this process, which therefore cannot be forked; "
            "restart the kernel and load models with load_clip(..., processes=...), which leaves them on the CPU until then"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        notebook_launcher(_work, (function, arguments), num_processes=count, use_port=str(port))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        reason = failure.message.get("message", "") if isinstance(failure.message, dict) else failure.message
        raise RuntimeError(f"one of {count} processes failed: {reason}") from error
    except SignalException:
        raise KeyboardInterrupt(f"{count} processes were stopped; the same call goes on from there") from None
    finally:
        for number, handler in handlers.items():  # the launcher leaves its own behind
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _work(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the threads of the process that was forked are not here, and waiting for them never ends
    with joined() as device:
        function(*arguments, device)


@contextmanager
def joined() -> Iterator[torch.device]:
    """Within, this is one of the processes that torchrun or ``launch`` started; yields its device."""
    state = PartialState(timeout=timedelta(days=7))  # one may have much more to do than another
    try:
        yield state.device
    finally:
        state.destroy_process_group()
        PartialState._reset_state()
