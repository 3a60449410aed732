"""The attention kernels as compiled for GPUs, which need not be here: what the interpreter does not see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import size

from tgazsr_utils.paths import ROOT

pytest.importorskip("triton", minversion="3.4")
SHORT = [
    [80, "bfloat16", 49, 512, "reference", 1],
    [90, "float32", 49, 512, "cosine", 2],
    [80, "float32", 1024, 512, "cosine", 1],
    [90, "bfloat16", 1024, 512, "reference", 2],
]
# Any three of the six settings in all their combinations, some of every other: eight kinds a capability and width.
EVEN = [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)]
LONG = [
    [
        capability,
        ("float32", "float16" if capability == 75 else "bfloat16")[bits[0] ^ other],
        (49, 1024)[bits[1] ^ other],
        width,
        ("reference", "cosine")[bits[2] ^ other],
        (1, 2)[bits[3] ^ other],
    ]
    for i, capability in enumerate((75, 80, 90, 120))
    for j, width in enumerate((64, 512, 768, 1280))
    for bits in [EVEN[(i + j) % 4]]
    for other in (0, 1)
]


@pytest.fixture(scope="module")
def kernels():
    """What was compiled, as ``ahead_of_time.py`` says it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("ahead_of_time.py"), json.dumps(size(SHORT, LONG))]
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(size(SHORT, LONG))  # forward and backward
    return found


def test_all_fits_in_registers_and_in_every_gpus_shared_memory(kernels):
    for kernel in kernels:
        assert kernel["shared"] < 48 * 1024 and kernel["stack"] <= 64 and kernel["local"] == 0, kernel


def test_tokens_are_read_sixteen_bytes_at_a_time(kernels):
    for kernel in kernels:
        assert kernel["wide_bytes"] >= kernel["tile_bytes"], kernel


def test_nothing_is_computed_in_float64(kernels):
    assert not any(kernel["f64"] for kernel in kernels)
