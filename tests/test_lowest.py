"""The lowest versions that pyproject.toml allows: put into an environment of their own, and used there."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import own_environment

from tgazsr_utils.paths import ROOT

# What another version may do otherwise: where the inside of a library is known here, and what is said or kept in its
# form. Mathematics of our own would say nothing there.
TESTS = [
    "test_models.py",  # open_clip, safetensors, what PyTorch and NumPy pickle
    "test_reading.py",  # Pillow
    "test_datasets.py",  # Pillow, to the bit, and threads that decode
    "test_published_sets.py::test_torchvisions_classes_keep_their_lists_where_we_read_them",
    "test_published_sets.py::test_the_published_layout_is_read",  # h5py, scipy's .mat files
    "test_encoder.py",  # PyTorch's attention, whose inside decides; its compiler
    "test_fast_path.py::test_only_an_attacks_graphs_serve_all_sizes",
    "test_attacks.py::test_a_part_of_autoattack_that_needs_more_classes_is_left_out",  # pyautoattack
    "test_attacks.py::test_the_standard_autoattack_runs_all_its_attacks",
    "test_attacks.py::test_the_square_attack_repeats_itself_and_gives_the_clean_image_where_none_fools",
    "test_attacks.py::test_autoattack_leaves_tracing_as_it_was",
    "test_distributed.py::test_two_processes_train_as_one_does[TGA-ZSR]",  # accelerate
    "test_distributed.py::test_what_goes_wrong_in_one_of_them_is_said",
    "test_settings.py",  # pydantic and PyYAML
    "test_explorer.py",  # ipywidgets
    "test_figures.py",  # matplotlib
    "test_report.py::test_html_asks_no_other_host_and_formulas_are_pictures",  # nbconvert, matplotlib's formulas
    "test_report.py::test_every_formula_of_the_workbook_is_drawn",
    "test_lab.py",  # jupyter_server
    "test_runner.py::test_the_whole_workbook_runs_in_the_smoke_profile",  # all of them together
]

UV = shutil.which("uv", path=own_environment()["PATH"])


@pytest.mark.long
@pytest.mark.skipif(not UV, reason="uv finds the lowest versions, and is not there: pip install uv")
def test_the_lowest_versions_do(tmp_path):
    python, versions = tmp_path / "lowest" / "bin" / "python", tmp_path / "versions.txt"

    def uv(*arguments):
        return subprocess.run([UV, *map(str, arguments)], capture_output=True, text=True)

    lowest = ["pip", "compile", "-q", "--python", sys.executable, "--resolution", "lowest-direct", "--extra", "test"]
    lowest += [ROOT / "pyproject.toml", "-o", versions, "--no-annotate", "--no-header"]
    backend = ["--torch-backend", "cpu"]
    if uv(*lowest, *backend).returncode:  # PyTorch's own index is out of reach: the build for CUDA, of several GB
        backend = []
        if (done := uv(*lowest)).returncode:
            pytest.skip(f"no versions could be looked up: {done.stderr.strip()[-300:]}")
    assert uv("venv", "--python", sys.executable, tmp_path / "lowest").returncode == 0
    done = uv("pip", "install", "--python", python, "--no-deps", "-r", versions, *backend)
    assert done.returncode == 0, done.stderr
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)  # without which worker this is: it would share a smoke run
    options = ["-n", "0", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    command = [python, "-m", "pytest", *options, *(f"tests/{name}" for name in TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    shutil.rmtree(tmp_path / "lowest")
    assert done.returncode == 0, done.stdout[-5000:]
