"""A GPU that is counted and cannot be used; what a device is called, without occupying it."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import own_environment

from tgazsr_utils.runtime import devices, weights
from tgazsr_utils.runtime.devices import Able, device_name, pick_device
from tgazsr_utils.runtime.weights import load_clip

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which can be used")


@pytest.fixture
def counted(monkeypatch):
    """As under a driver too old for this PyTorch: NVML counts a device, and CUDA does not start."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    devices._cuda_works.cache_clear()
    yield
    devices._cuda_works.cache_clear()


@needs_none
def test_a_gpu_that_does_not_start_is_told_once_and_the_cpu_taken(counted, capsys):
    assert pick_device("auto").type == "cpu" and pick_device("auto").type == "cpu"
    clip = load_clip("mini-clip", "mini")
    assert clip.device.type == "cpu" and clip.numerics == ("cpu", "fp32", False)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("the GPU cannot be used: ") and "going on on the CPU" in told
    assert f"PyTorch {torch.__version__} is built " in told


@needs_none
def test_processes_that_are_to_have_one_each_get_none_that_does_not_start(counted, capfd):
    """Another process has tried it: here it is counted, and there it is not even that."""
    assert load_clip("mini-clip", "mini", waiting=True).numerics == ("cpu", "fp32", False)


@needs_none
def test_the_driver_that_is_needed_is_named_and_how_another_build_is_taken(monkeypatch):
    """As of a build for CUDA 13.0."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="^device 'cuda' cannot be used: ") as error:
        pick_device("cuda")
    assert "is built for CUDA 13.0 and needs a driver from 580 on; TORCH_INDEX=URL" in str(error.value)


@needs_none
def test_where_it_was_asked_for_it_is_refused_with_the_build(counted):
    with pytest.raises(ValueError, match=r"device 'cuda' cannot be used: .* \(PyTorch .*TORCH_INDEX") as error:
        pick_device("cuda")
    assert "\n" not in str(error.value)


@needs_none
def test_a_device_is_named_in_another_process(counted, monkeypatch):
    assert device_name("cpu") == "cpu"
    assert device_name("auto") == "cpu"  # which has asked there: here a GPU is counted
    with pytest.raises(ValueError, match="^device 'cuda:7' cannot be used: "):
        device_name("cuda:7")
    monkeypatch.setattr(devices, "pick_device", lambda device: pytest.fail("tried in this process"))
    assert device_name("auto") == "cpu"


def test_no_process_is_started_where_no_gpu_is_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.subprocess, "run", lambda *a, **k: pytest.fail("asked in another process"))
    assert device_name("auto") == device_name("cpu") == "cpu"


@needs_none
@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "amp_bf16"), ((12, 0), "amp_bf16")]
)
def test_a_gpu_that_only_pretends_to_have_bf16_gets_fp32(counted, monkeypatch, capability, precision):
    """Asked as before processes start, each with a device of its own: the model itself stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    able = Able(devices.has_bf16(torch.device("cuda")), True)
    monkeypatch.setattr(weights, "cuda_elsewhere", lambda: able)
    chosen = load_clip("mini-clip", "mini", precision="auto", compiled=None, waiting=True)
    assert chosen.numerics == ("cuda", precision, True)
    assert load_clip("mini-clip", "mini", precision="fp16", waiting=True).numerics.precision == "fp16"
    if not able.bf16:
        with pytest.raises(ValueError, match="precision 'amp_bf16': this GPU only imitates bfloat16"):
            load_clip("mini-clip", "mini", precision="amp_bf16", waiting=True)
    monkeypatch.setattr(weights, "cuda_elsewhere", lambda: Able(able.bf16, False))
    assert not load_clip("mini-clip", "mini", waiting=True).numerics.compiled  # there is no compiler


ASKED_TWICE_THEN_FOR_IT = """
from tgazsr_utils import load_clip
from tgazsr_utils.runtime import devices
print(devices.compiles("cpu"), devices.compiles("cpu"))
try:
    load_clip("mini-clip", "mini", "cpu", compiled=True)
except ValueError as error:
    print(error)
"""


def test_without_a_compiler_nothing_is_compiled_and_it_is_told_once(tmp_path):
    """In processes of their own: PyTorch keeps which compiler it found. What one has left cached proves nothing."""
    own = {name: value for name, value in own_environment().items() if name not in ("CC", "CXX")}
    own["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", ASKED_TWICE_THEN_FOR_IT]
    found, lacked = (
        subprocess.run(command, capture_output=True, text=True, env=own | more)
        for more in ({}, {"PATH": str(tmp_path)})
    )
    of_ours = lambda text: [line for line in text.splitlines() if "CUDA_HOME" not in line]  # of a build for CUDA
    assert (found.stdout, of_ours(found.stderr)) == ("True True\n", [])
    answer, refused = lacked.stdout.splitlines()
    (told,) = of_ours(lacked.stderr)
    assert answer == "False False" and told.startswith("going on without torch.compile, which does not work here: ")
    assert re.match(r"compiled = True: torch.compile does not work here: .*compiler.* \(None: ", refused)


def test_a_kernel_that_does_not_run_leaves_attention_to_pytorch(monkeypatch, mini):
    from tgazsr_utils.core import attention, attention_kernel

    def fails(*arguments):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nmore")

    monkeypatch.setattr(attention_kernel, "attention", fails)
    attention._kernel_works.cache_clear()
    with pytest.warns(UserWarning, match="^attention goes on without its Triton kernel: Failed to find C compiler"):
        assert not attention._kernel_works(torch.device("cpu"))
    attention._kernel_works.cache_clear()


def test_what_is_compiled_hangs_on_the_code_alone_and_compilers_speak_to_nobody():
    import torch._inductor.config as inductor

    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()  # those that pytest has set are not the run's
        devices.set_up_compiler.__wrapped__()
        for said in ("TensorFloat32 tensor cores for float32", "\nOnline softmax is disabled on the fly", "other"):
            warnings.warn(said, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["other"]
    assert all(getattr(inductor, choice, True) for choice in ("deterministic", "batch_invariant"))
    assert not torch._dynamo.config.automatic_dynamic_local_pgo
