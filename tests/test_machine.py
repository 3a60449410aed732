"""What the machine grants and how threads wait: said before PyTorch is imported, where the user has not said it.

And the ways to install.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tgazsr_utils import machine
from tgazsr_utils.paths import ROOT
from tgazsr_utils.progress import HEADLESS, progress


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("150000 100000\n", 1.5),
        ("50000 100000\n", 0.5),
        ("max 100000\n", None),
        ("100000 0\n", None),
        ("not numbers at all\n", None),
        ("", None),
    ],
)
def test_the_quota_of_a_control_group_of_version_2(tmp_path, text, quota):
    (tmp_path / "cpu.max").write_text(text, encoding="utf-8")
    assert machine._quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("limit", "period", "quota"), [("300000\n", "100000\n", 3.0), ("-1\n", "100000\n", None), ("100000\n", "0\n", None)]
)
def test_the_quota_of_a_control_group_of_version_1(tmp_path, limit, period, quota):
    (tmp_path / "cpu.cfs_quota_us").write_text(limit, encoding="utf-8")
    (tmp_path / "cpu.cfs_period_us").write_text(period, encoding="utf-8")
    assert machine._quota(tmp_path) == quota


def test_where_nothing_is_told_there_is_no_quota(tmp_path):
    assert machine._quota(tmp_path) is None
    (tmp_path / "cpu.cfs_quota_us").write_text("100000\n", encoding="utf-8")  # without its period
    assert machine._quota(tmp_path) is None


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """Sets the limits of control groups, {file: text}, and says in which this process is."""

    def tell(files, own=None):
        monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text, encoding="utf-8")
        if own is not None:
            (tmp_path / "own").write_text(own, encoding="utf-8")

    return tell


@pytest.mark.parametrize(
    ("affinity", "quota", "allowed"),
    [(8, "max", 8), (8, "200000", 2), (8, "150000", 2), (8, "10000", 1), (2, "400000", 2), (1, "max", 1)],
)
def test_processors_are_those_of_the_affinity_within_the_quota(monkeypatch, limits, affinity, quota, allowed):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    limits({"cpu.max": f"{quota} 100000\n"})
    assert machine.allowed_cpus() == allowed


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("text", "allowed"), [("1000000\n", 10**6), ("9223372036854771712\n", 10**9), ("max\n", 10**9), (None, 10**9)]
)
def test_memory_is_that_of_the_control_group(limits, name, text, allowed):
    """So that a container is not stopped for a batch that its machine could hold."""
    limits({} if text is None else {name: text})
    assert machine.allowed_memory(10**9) == allowed


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_a_jobs_limits_are_seen_in_its_own_control_group(monkeypatch, limits, version, above):
    """As under a scheduler such as Slurm: the root tells none; the job's folder does, or one above the step's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    told, job = ("job/step", "job") if above else ("job", "job")
    if version == 2:
        files = {f"{job}/cpu.max": "300000 100000\n", f"{job}/memory.max": "1000\n", f"{told}/cgroup.procs": ""}
        own = f"0::/{told}\n"
    else:
        files = {f"cpu/{job}/cpu.cfs_quota_us": "300000\n", f"cpu/{job}/cpu.cfs_period_us": "100000\n"}
        files |= {f"memory/{job}/memory.limit_in_bytes": "1000\n", "memory/memory.limit_in_bytes": "5000\n"}
        own = f"5:memory:/{told}\n4:cpu,cpuacct:/{told}\n1:name=systemd:/other\n0::/\n"
    limits(files | {"other/memory.max": "7\n", "other/cpu.max": "100000 100000\n"}, own)
    assert (machine.allowed_cpus(), machine.allowed_memory(10**9)) == (3, 1000)


@pytest.mark.parametrize("own", ["0::/gone/since\n", "not a line\n", "", "0::/../..\n"])
def test_a_control_group_that_is_not_found_limits_nothing(monkeypatch, limits, own):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    limits({"memory.max": "max\n"}, own)
    assert (machine.allowed_cpus(), machine.allowed_memory(10**9)) == (8, 10**9)


def test_without_an_affinity_all_processors_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "_groups", lambda controller: [])
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.allowed_cpus() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.allowed_cpus() == 1


@pytest.mark.parametrize(
    ("own", "allowed", "expected"),
    [
        ({}, 4, machine.WAITING),  # all there are: PyTorch's own choice
        ({}, 2, machine.WAITING | {"OMP_NUM_THREADS": "2"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 2, {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"}),
        ({"GOMP_SPINCOUNT": "7"}, 4, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_NUM_THREADS": "3"}, 2, machine.WAITING | {"OMP_NUM_THREADS": "3"}),
    ],
)
def test_threads_are_set_where_the_user_has_not(monkeypatch, own, allowed, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "allowed_cpus", lambda: allowed)
    machine.set_threads()
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


SCRIPT = """
import builtins, os, sys
plain, seen = builtins.__import__, []

def watched(name, *rest, **options):
    if name.split(".")[0] == "torch" and not seen:
        seen.append([os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")])
    return plain(name, *rest, **options)

os.cpu_count = lambda: 1 + len(os.sched_getaffinity(0))  # as in a container that has fewer than it shows
builtins.__import__ = watched
import tgazsr_utils
import torch
builtins.__import__ = plain
print(*seen[0], torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system knows no affinity")
def test_they_are_set_before_pytorch_is_imported():
    """A fresh process that may use one of its processors: PyTorch finds the variables set, and follows."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    one = sorted(os.sched_getaffinity(0))[0]
    pinned = f"import os; os.sched_setaffinity(0, {{{one}}})\n"
    done = subprocess.run([sys.executable, "-c", pinned + SCRIPT], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PASSIVE", "1000", "1", "1"]


HOSTED = """
from tgazsr_utils import load_clip
from tgazsr_utils.workbook import open_workbook
clip = load_clip("mini-clip", "mini")
test_images = 2
book = open_workbook("01_attention_shift", globals())
from tgazsr_utils.measuring import recorded_sweep
from tgazsr_utils.measuring.published import published
import tgazsr_utils
print(tgazsr_utils.__file__, len(book.test), len(published()) > 0, recorded_sweep.REFERENCE.exists())
"""


@pytest.mark.long
def test_an_installed_wheel_has_all_it_needs_and_writes_where_it_is_called(tmp_path):
    """Built as ``pip install`` does, put into a folder of its own, and used in an empty one."""
    source, empty = tmp_path / "source", tmp_path / "empty"
    source.mkdir()
    empty.mkdir()
    for name in ("tgazsr_utils", "notebooks", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("sets", "photos", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip, options = [sys.executable, "-m", "pip"], {"capture_output": True, "text": True}
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    assert (done := subprocess.run(build, **options)).returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20e6  # reference results stay in the repository
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, **options)
    options |= {"cwd": empty, "env": os.environ | {"PYTHONPATH": str(tmp_path / "site")}}
    done = subprocess.run([sys.executable, "-c", HOSTED], **options)
    said = f"results go to runs/mini-test_images-2\n(?s:.*){tmp_path / 'site'}/tgazsr_utils/__init__.py 2 True True"
    assert re.search(said, done.stdout), done.stderr
    command = [sys.executable, "-m", "tgazsr_utils.runner", "smoke", "01", "-p", "test_images", "2"]
    assert (done := subprocess.run(command, **options)).returncode == 0, done.stderr
    assert len(list(empty.glob("runs/smoke-test_images-2/figures/01_*.png"))) == 4


def test_bars_of_a_headless_run_are_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv(HEADLESS, "1")
    with progress(total=2, desc="outer", mininterval=0) as outer:
        outer.update(1)
        for _ in progress(range(3), desc="inner", mininterval=0):
            pass
        outer.update(1)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines) and lines[-1].startswith("outer: 2/2")
    assert any(line.startswith("inner: 3/3") for line in lines) and "" not in lines
