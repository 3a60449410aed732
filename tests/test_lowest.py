"""The lowest versions that pyproject.toml allows: put into an environment of their own, and used there."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
from conftest import own_environment

from tgazsr_utils.paths import ROOT

TESTS = ["test_models.py", "test_reading.py", "test_datasets.py", "test_settings.py", "test_training.py"]
TESTS += ["test_explorer.py", "test_published.py", "test_runner.py::test_the_whole_workbook_runs_in_the_smoke_profile"]

UV = shutil.which("uv", path=own_environment()["PATH"])


@pytest.mark.long
@pytest.mark.skipif(not UV, reason="uv finds the lowest versions, and is not there: pip install uv")
def test_the_lowest_versions_do(tmp_path):
    """PyTorch is this environment's where its index of CPU builds is out of reach; others bring gigabytes of CUDA."""
    python, versions = tmp_path / "lowest" / "bin" / "python", tmp_path / "versions.txt"

    def uv(*arguments):
        return subprocess.run([UV, *map(str, arguments)], capture_output=True, text=True)

    lowest = ["pip", "compile", "-q", "--python", sys.executable, "--resolution", "lowest-direct", "--extra", "test"]
    lowest += [ROOT / "pyproject.toml", "-o", versions, "--no-annotate", "--no-header"]
    backend = ["--torch-backend", "cpu"]
    if uv(*lowest, *backend).returncode:
        backend = []
        if (done := uv(*lowest)).returncode:
            pytest.skip(f"no versions could be looked up: {done.stderr.strip()[-300:]}")
        ours = ("torch==", "torchvision==", "triton==", "nvidia-")
        lines = [line for line in versions.read_text().splitlines() if not line.startswith(ours)]
        versions.write_text("\n".join(lines))
    assert uv("venv", "--python", sys.executable, tmp_path / "lowest").returncode == 0
    done = uv("pip", "install", "--python", python, "--no-deps", "-r", versions, *backend)
    assert done.returncode == 0, done.stderr
    (site,) = tmp_path.glob("lowest/lib/python*/site-packages")
    if not backend:
        (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # behind what is in the new environment
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ["-n", "2", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-k", "not quickly"]
    command = [python, "-m", "pytest", *options, *(f"tests/{name}" for name in TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
