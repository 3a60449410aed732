"""What this machine lets us have: processors, and threads that do not get into each other's way.

Imported before PyTorch, which reads these variables once. What the user has set stays.
"""

import math
import os
from pathlib import Path


def allowed_cpus() -> int:
    """Processors that this process may use: its affinity, and its control group's quota (a container's limit)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup"))
    return max(1, min(count, math.ceil(quota))) if quota else count


def _quota(root: Path) -> float | None:
    """Processors' worth of time that a control group of either version grants; None: no limit is told."""
    try:
        limit, period = (root / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            limit, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        except OSError:
            return None
    return int(limit) / int(period) if limit.strip().isdecimal() and int(period) else None


def set_threads() -> None:
    """Threads that wait do not spin: beside another job, or a browser, that made everything up to ten times slower.

    And no more of them than there are processors for, where a container has fewer than it shows.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if allowed_cpus() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed_cpus()))
