"""The device that models run on: which one can be used, and what it is called."""

import functools
import subprocess
import sys

import torch


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" is CUDA where it works, else the CPU. Raises ValueError for one that cannot be used.

    A GPU that is there and cannot be used, as under a driver too old for this PyTorch, is told.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and _cuda_works() else "cpu"
    try:
        return torch.ones(1, device=device).add(1).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {_first_line(error)}{_build(device)}") from None


@functools.cache
def _cuda_works() -> bool:
    """Does a kernel run on CUDA? Devices are counted without starting it, whatever the driver can do."""
    try:
        torch.ones(1, device="cuda").add(1)
        return True
    except (RuntimeError, AssertionError) as error:
        print(f"the GPU cannot be used: {_first_line(error)}{_build('cuda')}; going on on the CPU", file=sys.stderr)
        return False


def _build(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    made = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f" (PyTorch {torch.__version__} is built {made}; README says how to take another build)"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def device_name(device: str) -> str:
    """What ``pick_device`` would take is called; asked for in a process of its own, which leaves this one none of it.

    So a cluster's GPU that admits one process at a time stays free for the notebooks.
    """
    if device == "cpu" or device == "auto" and not torch.cuda.is_available():
        return "cpu"
    code = "import sys, torch; from tgazsr_utils.durable.devices import pick_device; d = pick_device(sys.argv[1]); "
    code += "print(torch.cuda.get_device_name(d) if d.type == 'cuda' else d)"
    asked = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, encoding="utf-8")
    sys.stderr.write(asked.stderr if not asked.returncode else "")
    if asked.returncode:
        raise ValueError(asked.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))
    return asked.stdout.strip()
