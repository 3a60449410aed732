"""What this machine lets us have: processors, and threads that do not get into each other's way.

Imported before PyTorch, which reads these variables once. What the user has set stays.
"""

import contextlib
import math
import os
import platform
import subprocess
from pathlib import Path

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def allowed_cpus() -> int:
    """Processors that this process may use: its affinity, and its control groups' quota (a container's, a job's)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups("cpu") if (quota := _quota(folder))]
    return max(1, min(count, *map(math.ceil, quotas))) if quotas else count


def allowed_memory(total: int) -> int:
    """Bytes that this process may use of a machine's ``total``: its control groups' lowest limit, if there is one."""
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of either version
            with contextlib.suppress(OSError, ValueError):
                total = min(total, int((folder / name).read_text(encoding="utf-8")))
    return total


def _groups(controller: str) -> list[Path]:
    """Folders that may tell a limit: of this process's control group of either version, and of all above it."""
    found = [CGROUPS, CGROUPS / controller]  # all that a container sees, whose own group is the root
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_CGROUP.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)  # "0::/job" of version 2, "5:cpu,cpuacct:/job" of version 1
            if not controllers or controller in controllers.split(","):
                root = CGROUPS / controller if controllers else CGROUPS
                own = root / path.lstrip("/")
                found += [folder for folder in (own, *own.parents) if root in folder.parents]
    return found


def _quota(folder: Path) -> float | None:
    """Processors' worth of time that a control group of either version grants; None: no limit is told."""
    try:
        limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            limit, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        except OSError:
            return None
    return int(limit) / int(period) if limit.strip().isdecimal() and int(period) else None


# Threads that wait soon sleep: beside another job, or a browser, spinning made everything up to ten times slower. They
# do not sleep at once, which costs some percent on an idle machine.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def set_threads() -> None:
    """How threads wait, and no more of them than processors, where a container has fewer than it shows."""
    if not os.environ.keys() & WAITING.keys():
        os.environ.update(WAITING)
    if allowed_cpus() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed_cpus()))


def cpu_name() -> str:
    """As its maker calls it, or else its kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]  # macOS
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return platform.processor() or platform.machine()
