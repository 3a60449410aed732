"""Does it matter how threads wait? PGD-10 of 64 mini images, alone and beside another job: ``python busy.py``.

Each measurement is made in a fresh process, with OMP_WAIT_POLICY PASSIVE (the package's choice) and ACTIVE by turns,
once idle and once beside a PyTorch job of two threads. Wanted: PASSIVE costs at most 5 % idle, and beside the other job
at most 2.5 times its idle time. Prints the fastest of each, which the machine's other work disturbs least, and ratios;
writes ``busy.json`` into --output. The machine should have nothing else to do.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tgazsr_utils.machine import WAITING
from tgazsr_utils.runtime.files import write_json

POLICIES, SITUATIONS = ("PASSIVE", "ACTIVE"), ("idle", "busy")
MOST_IDLE, MOST_BUSY = 1.05, 2.5  # PASSIVE idle to ACTIVE idle; PASSIVE busy to PASSIVE idle

MEASURED = """
import time
import tgazsr_utils
import torch
from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.runtime.weights import load_clip
torch.set_num_threads(2)
clip, data = load_clip("mini-clip", "mini", "cpu"), load_dataset("shapes", "test", n=64)
images, text = data.images / 255, clip.encode_text(data.prompts)
pgd(clip, images, data.labels, text, eps=3.5 / 255, step_size=1 / 255, steps=1)  # starts the threads
started = time.perf_counter()
pgd(clip, images, data.labels, text, eps=3.5 / 255, step_size=1 / 255, steps=10)
print(time.perf_counter() - started)
"""

OTHER = """
import os
import torch
torch.set_num_threads(2)
a = torch.rand(512, 512)
print("ready", flush=True)
parent = os.getppid()
while os.getppid() == parent:  # it ends with whoever started it
    a = (a @ a).softmax(1)
"""


def environment(policy: str) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return others | (WAITING if policy == "PASSIVE" else {"OMP_WAIT_POLICY": policy})


@contextlib.contextmanager
def beside_another_job(policy: str, wanted: bool) -> Iterator[None]:
    """A PyTorch job of two threads, of the same policy, if ``wanted``."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", OTHER], env=environment(policy), stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()  # it runs
            yield
        finally:
            other.kill()


def seconds(policy: str, situation: str) -> float:
    """Of PGD-10, in a fresh process."""
    command = [sys.executable, "-c", MEASURED]
    with beside_another_job(policy, situation == "busy"):
        done = subprocess.run(command, env=environment(policy), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measurement failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def summary(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Fastest of the seconds by policy and situation, the two ratios, and whether they are what is wanted."""
    fastest = {policy: {name: min(part) for name, part in kinds.items()} for policy, kinds in times.items()}
    passive, active = (fastest[policy] for policy in POLICIES)
    ratios = {
        "passive_to_active_idle": passive["idle"] / active["idle"],
        "passive_busy_to_idle": passive["busy"] / passive["idle"],
        "active_busy_to_idle": active["busy"] / active["idle"],
    }
    as_wanted = ratios["passive_to_active_idle"] <= MOST_IDLE and ratios["passive_busy_to_idle"] <= MOST_BUSY
    return {"seconds": times, "fastest": fastest, "ratios": ratios, "as_wanted": as_wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each of the four measurements")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {policy: {name: [] for name in SITUATIONS} for policy in POLICIES}
    for number in range(options.rounds):
        for policy in POLICIES if number % 2 else POLICIES[::-1]:  # neither is always the first
            for situation in SITUATIONS:
                times[policy][situation].append(seconds(policy, situation))
                print(f"round {number + 1}, {policy}, {situation}: {times[policy][situation][-1]:.2f} s", flush=True)
    found = summary(times)
    for policy, kinds in found["fastest"].items():
        print(f"{policy}: {kinds['idle']:.2f} s idle, {kinds['busy']:.2f} s beside another job")
    for name, ratio in found["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    print(f"wanted: the first at most {MOST_IDLE}, the second at most {MOST_BUSY}: {found['as_wanted']}")
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "busy.json", found)


if __name__ == "__main__":
    main()
