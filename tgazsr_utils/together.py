"""Several processes that share the work of a run's notebooks: as torchrun starts them, or as a run does, once for all.

Each runs the notebooks' cells, which train and measure together; what is stored then, ``./run_all.sh`` only reads.
Tables and figures are written, executed copies are not.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

from tgazsr_utils import profiles
from tgazsr_utils.parameters import SettingsError
from tgazsr_utils.runtime import processes
from tgazsr_utils.runtime.files import write_json
from tgazsr_utils.surroundings import print_anything

Parameters = Mapping[str, Mapping[str, Any]]  # of notebooks, by their names


def are_started() -> bool:
    """Is this one of several processes that torchrun has started? SettingsError for what another launcher has left."""
    if torch.distributed.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"]) > 1
    for name, alone in (("WORLD_SIZE", "1"), ("RANK", "0")):
        if (value := os.environ.get(name) or alone) != alone:
            raise SettingsError(
                f"{name} = {value!r} is set as for several processes, but torchrun has not started this one; unset "
                f"{name}, or start with torchrun"
            )
    return False


def is_first() -> bool:
    return os.environ["RANK"] == "0"


def check(notebooks: Parameters, fresh: bool) -> None:
    """Raises SettingsError for what torchrun's processes cannot do."""
    own = any(p.get("device", "auto") not in ("auto", "cuda") or asked(p) > 1 for p in notebooks.values())
    if own or fresh or "00_pretrain_mini_clip" in notebooks:
        raise SettingsError(
            "under torchrun each process takes its own device: no device (but cuda), no processes, no --fresh, "
            "not notebook 00"
        )


def asked(parameters: Mapping[str, Any]) -> int:
    """How many processes a person wants a notebook's work to be shared by; 1, where the machine is to say."""
    number = parameters.get("processes", 1)
    return 1 if number == "auto" else number


def ahead(notebooks: Parameters) -> dict[str, float]:
    """Has processes that are started once do all work of these notebooks; the seconds of each.

    None are given if that failed, which is said: notebooks then start processes of their own, and show what is wrong.
    """
    number = max(map(asked, notebooks.values()))
    with tempfile.TemporaryDirectory(prefix="tgazsr-") as folder:
        given, outcome = Path(folder) / "notebooks.json", Path(folder) / "outcome.json"
        given.write_text(json.dumps(notebooks), encoding="utf-8")
        command = [sys.executable, "-m", "tgazsr_utils.together", str(number), folder]
        # In a session of its own: under nohup, a terminal that is closed stops neither this process nor those.
        processes.run_in_own_session(command)
        if not outcome.exists():  # killed
            outcome.write_text(json.dumps("it was killed"), encoding="utf-8")
        found = json.loads(outcome.read_text(encoding="utf-8"))
    if isinstance(found, dict):
        return found
    print(f"{found}; the notebooks go on from there", file=sys.stderr, flush=True)
    return {}


def _launch(number: str, folder: str) -> None:
    """Starts the processes, and leaves in ``folder`` the seconds of each notebook or what went wrong."""
    notebooks = json.loads((Path(folder) / "notebooks.json").read_text(encoding="utf-8"))
    try:
        found: Any = processes.launch_anew(int(number), _take_part_on_one_thread, notebooks)
    except (Exception, KeyboardInterrupt) as error:  # of theirs, or of the launcher's
        found = " ".join(str(error).split())
    write_json(Path(folder) / "outcome.json", found)


def _take_part_on_one_thread(notebooks: Parameters) -> dict[str, float]:
    print_anything()
    processes.use_one_thread()  # as torchrun has it
    try:
        return take_part({name: {**values, "processes": 1} for name, values in notebooks.items()})
    except KeyboardInterrupt:  # which multiprocessing drops, and the launcher would wait for this process for ever
        raise RuntimeError("it was interrupted") from None


def take_part(notebooks: Parameters) -> dict[str, float]:
    """Runs their cells as one of several processes; the seconds of each. What cells display is not shown."""
    seconds = {}
    with processes.joined(), contextlib.redirect_stdout(sys.stdout if is_first() else io.StringIO()):
        for name, parameters in notebooks.items():
            print(f"\n=== {name}, in {processes.count()} processes", flush=True)
            InteractiveShell.clear_instance()  # display() asks for the latest
            started, shell = time.monotonic(), InteractiveShell.instance(display_pub_class=CapturingDisplayPublisher)
            shell.showtraceback = lambda *_, **__: None  # it is raised
            for cell in profiles.code_cells(name):
                shell.run_cell(cell.source, silent=True).raise_error()
                if "parameters" in cell.tags:
                    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
                    shell.run_cell(given, silent=True).raise_error()
            seconds[name] = time.monotonic() - started
    return seconds


if __name__ == "__main__":
    _launch(*sys.argv[1:])
