"""A GPU that is counted and cannot be used; what a device is called, without occupying it."""

import pytest
import torch

from tgazsr_utils.durable import devices, weights
from tgazsr_utils.durable.devices import device_name, pick_device
from tgazsr_utils.durable.weights import load_clip

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
def test_where_it_was_asked_for_it_is_refused_with_the_build(counted):
    with pytest.raises(ValueError, match=r"device 'cuda' cannot be used: .* \(PyTorch .* is built .*README") as error:
        pick_device("cuda")
    assert "\n" not in str(error.value)


@needs_none
def test_a_device_is_named_in_another_process(counted):
    assert device_name("cpu") == "cpu"
    assert device_name("auto") == "cpu"  # which has asked there: here a GPU is counted
    with pytest.raises(ValueError, match="^device 'cuda:7' cannot be used: "):
        device_name("cuda:7")
    assert not torch.cuda.is_initialized()


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
    monkeypatch.setattr(weights, "cuda_has_bf16", lambda: devices.has_bf16(torch.device("cuda")))
    chosen = load_clip("mini-clip", "mini", precision="auto", compiled=None, waiting=True)
    assert chosen.numerics == ("cuda", precision, True)
    assert load_clip("mini-clip", "mini", precision="fp16", waiting=True).numerics.precision == "fp16"


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    devices.compiles.cache_clear()
    yield
    devices.compiles.cache_clear()
    torch._dynamo.reset()


def test_without_a_compiler_nothing_is_compiled_and_it_is_told_once(no_compiler, capsys):
    assert not devices.compiles("cpu") and not devices.compiles("cpu")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("going on without torch.compile, which does not work here: ")


def test_a_kernel_that_does_not_run_leaves_attention_to_pytorch(monkeypatch, mini):
    from tgazsr_utils.core import attention, attention_kernel

    def fails(*arguments):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nmore")

    monkeypatch.setattr(attention_kernel, "attention", fails)
    attention._kernel_works.cache_clear()
    with pytest.warns(UserWarning, match="^attention goes on without its Triton kernel: Failed to find C compiler"):
        assert not attention._kernel_works(torch.device("cpu"))
    attention._kernel_works.cache_clear()
