"""The device that models run on: which one can be used, and what it is called."""

import ast
import functools
import subprocess
import sys
import warnings
from typing import NamedTuple

import torch

DRIVERS = {12: 525, 13: 580}  # CUDA's major version -> the oldest driver that its builds run with, on Linux


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


@functools.cache
def set_up_compiler() -> None:
    """What torch.compile makes is to hang on the code alone, not on timing or on what ran before."""
    import torch._inductor.config as inductor  # slow to import

    for choice in ("deterministic", "batch_invariant"):  # no kernels picked by timing; older versions have no choice
        if hasattr(inductor, choice):
            setattr(inductor, choice, True)
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)  # other norms, precisions, frozen weights: other graphs
    config.automatic_dynamic_local_pgo = False  # an earlier run's sizes are not to choose this run's graphs
    # fp32 is to mean fp32; what the compiler tells its own authors
    for message in ("TensorFloat32 tensor cores", "\nOnline softmax is disabled"):
        warnings.filterwarnings("ignore", message=message)


@functools.cache
def compiler_error(device: str) -> str | None:
    """Why no code can be generated for this type of device; None: it can. Tried once: it needs a C compiler."""
    try:
        torch.compile(lambda x: (2 * x).sin().sum())(torch.ones(8, device=device))
        return None
    except Exception as error:  # Inductor lets through whatever its compilers raise
        return _first_line(getattr(error, "inner_exception", error))


@functools.cache
def compiles(device: str) -> bool:
    """Can code be generated for this type of device here? If not, it is told that all goes on without."""
    if error := compiler_error(device):
        print(f"going on without torch.compile, which does not work here: {error}", file=sys.stderr)
    return error is None


def _build(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    if not torch.version.cuda:
        return f" (PyTorch {torch.__version__} is built without CUDA; {_OTHER_BUILD})"
    needed = DRIVERS.get(int(torch.version.cuda.split(".")[0]))
    wanted = f"a driver from {needed} on" if needed else "a newer driver"
    made = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda} and needs {wanted}"
    return f" ({made}; {_OTHER_BUILD})"


_OTHER_BUILD = "TORCH_INDEX=URL ./run_all.sh, after .venv was removed, takes another build; -p device cpu does without"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def has_bf16(device: torch.device) -> bool:
    """Does it compute in bfloat16 itself? GPUs below compute capability 8.0 only pretend to."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def device_name(device: str) -> str:
    """What ``pick_device`` would take is called."""
    if device == "cpu" or device == "auto" and not torch.cuda.is_available():
        return "cpu"
    return _asked("torch.cuda.get_device_name(chosen) if chosen.type == 'cuda' else str(chosen)", device)


class Able(NamedTuple):
    """What CUDA can do here."""

    bf16: bool  # see ``has_bf16``
    compiled: bool  # see ``compiles``


@functools.cache
def cuda_elsewhere() -> Able | None:
    """What CUDA can do, where this process must not start it; None where it does not work, which is told."""
    if not torch.cuda.is_available():
        return None
    answer = _asked("(has_bf16(chosen), compiles('cuda')) if chosen.type == 'cuda' else None", "auto")
    found = ast.literal_eval(answer)
    return None if found is None else Able(*found)


def _asked(question: str, device: str) -> str:
    """The answer of another process, which leaves this one, and a GPU that admits one at a time, without CUDA."""
    try:
        torch.device("cuda" if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} cannot be used: {_first_line(error)}") from None
    code = f"import sys, torch; from {__name__} import *; chosen = pick_device(sys.argv[1]); print({question})"
    asked = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, encoding="utf-8")
    if asked.returncode:
        raise ValueError(asked.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))
    sys.stderr.write(asked.stderr)
    return asked.stdout.strip()
