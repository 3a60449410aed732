"""Runs the workbook headlessly: ``python -m tgazsr_utils.runner`` (called by run_all.sh).

Executes a profile's notebooks with papermill, in order, with their progress live; skips what is done and unchanged;
leaves executed copies, HTML, figures, records and a manifest in the output folder. Under torchrun the processes share
the work of these notebooks instead (see ``take_part``).
"""

import argparse
import ast
import contextlib
import io
import json
import logging
import os
import platform
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import torch
import yaml
from filelock import FileLock, Timeout
from IPython.core.interactiveshell import InteractiveShell
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from tgazsr_utils.core.objectives import find_objective
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import Settings
from tgazsr_utils.datasets.layouts import list_datasets
from tgazsr_utils.durable import processes
from tgazsr_utils.durable.files import write_atomic, write_json
from tgazsr_utils.durable.fingerprints import code_version
from tgazsr_utils.durable.weights import SHIPPED, image_size_of, locate_weights, pick_device
from tgazsr_utils.parameters import NOTEBOOKS, SettingsError, unknown_parameter, validate
from tgazsr_utils.paths import ROOT, resolve
from tgazsr_utils.progress import HEADLESS

FOLDER = ROOT / "notebooks"
PROFILES = FOLDER / "profiles"
_PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "numpy",
    "pandas",
    "seaborn",
    "papermill",
    "jupyterlab",
    "ipywidgets",
)


class Profile(Settings):
    """A whole run: which notebooks, and their parameters where these differ from the notebooks' own."""

    description: str
    notebooks: list[str]
    parameters: dict[str, Any] = {}  # for every notebook that knows the name
    by_notebook: dict[str, dict[str, Any]] = {}


def load_profile(name: str) -> Profile:
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise SettingsError(f"profile {name!r} is unknown; there are: {there}")
    try:
        values = yaml.safe_load(path.read_text())
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # of a number or date that is none; of text that nests deeply
        raise SettingsError(f"profile {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"profile {path} must hold names and values")
    try:
        profile = validate(Profile, values)
    except SettingsError as error:
        raise SettingsError(f"profile {name!r}: {error}") from None
    for notebook in (*profile.notebooks, *profile.by_notebook):
        if notebook not in NOTEBOOKS:
            raise SettingsError(
                f"profile {name!r}: notebook {notebook!r} is unknown; there are: {', '.join(NOTEBOOKS)}"
            )
    return profile


def select(profile: Profile, numbers: list[str]) -> list[str]:
    """Names of the notebooks to run: the profile's own, or those with the given numbers."""
    if not numbers:
        return profile.notebooks
    by_number = {name[:2]: name for name in NOTEBOOKS}
    for number in numbers:
        if number.zfill(2) not in by_number:
            raise SettingsError(f"notebook {number!r} is unknown; there are: {', '.join(by_number)}")
    return [by_number[number.zfill(2)] for number in numbers]


def default_parameters(notebook: str) -> dict[str, Any]:
    """What a notebook's cell tagged ``parameters`` assigns."""
    book = nbformat.read(FOLDER / f"{notebook}.ipynb", as_version=4)
    (cell,) = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
    return {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(cell.source).body}


def parameters_of(notebook: str, profile: Profile, output: str, given: dict[str, Any]) -> dict[str, Any]:
    """Checked parameters of one notebook: its own defaults, then the profile's, then those given."""
    known = NOTEBOOKS[notebook].model_fields
    values = default_parameters(notebook) | {"output": output}
    for layer in (profile.parameters, profile.by_notebook.get(notebook, {}), given):
        values |= {name: value for name, value in layer.items() if name in known}
    try:
        return validate(NOTEBOOKS[notebook], values).model_dump(include=set(values))
    except SettingsError as error:
        raise SettingsError(f"{notebook}: {error}") from None


def check_choices(notebook: str, values: dict[str, Any]) -> None:
    """Sets, methods and models that parameters name must be there before anything runs, not hours later."""
    root, testdata = values.get("data_root"), values.get("testdata")
    keys = [values.get("dataset"), *(values.get("sets") or []), *(testdata if isinstance(testdata, list) else [])]
    cells = (FOLDER / f"{notebook}.ipynb").read_text()
    try:
        image_size_of(values["arch"])
        for name in ("pretrained", "tuned"):
            if not str(values.get(name)).startswith("latest:"):  # made by a notebook before
                locate_weights(values["arch"], values.get(name))
        there = list_datasets(root)
        for key in filter(None, keys):
            if key not in there and not (root and (resolve(root) / key).is_dir()):
                raise ValueError(f"image set {key!r} is not there; there are: {', '.join(there) or 'none'}")
        for method in [*values.get("methods", []), *values.get("overrides", {})]:
            if f'\\"{method}\\"' not in cells:  # it may define it itself
                find_objective(method)
    except ValueError as error:
        raise SettingsError(f"{notebook}: {error}") from None


def check_names(profile: Profile, given: dict[str, Any], notebooks: list[str]) -> None:
    """Every parameter must be known to a notebook that will run; in a profile, to any notebook."""
    everywhere = {name: None for model in NOTEBOOKS.values() for name in model.model_fields}
    here = {name: None for notebook in notebooks for name in NOTEBOOKS[notebook].model_fields}
    for names, known in ((profile.parameters, everywhere), (given, here)):
        for name in names:
            if name not in known:
                owners = [notebook for notebook, model in NOTEBOOKS.items() if name in model.model_fields]
                if owners:
                    raise SettingsError(f"parameter {name!r} is one of {', '.join(owners)}, not of what is to run")
                raise SettingsError(unknown_parameter(name, known))
    for notebook, values in profile.by_notebook.items():
        for name in values:
            if name not in NOTEBOOKS[notebook].model_fields:
                raise SettingsError(f"{notebook}: {unknown_parameter(name, NOTEBOOKS[notebook].model_fields)}")


def given_value(name: str, text: str) -> Any:
    """What ``-p name text`` sets: YAML, but for parameters that are text the text as it is, or None for "null"."""
    kinds = [model.model_fields[name].annotation for model in NOTEBOOKS.values() if name in model.model_fields]
    if kinds and kinds[0] in (str, str | None):
        return None if text in ("null", "None", "") and kinds[0] is not str else text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"parameter {name} = {text[:200]!r} is not valid YAML: {error}") from None


_OUTPUTS = {"output", "weights"}  # parameters that name what a notebook writes, not what it reads


def fingerprint(notebook: str, parameters: dict[str, Any], before: str) -> str:
    """Names a notebook's inputs: itself, its parameters and the files they name, the code, what runs before it."""
    values = [v for name, v in parameters.items() if name not in _OUTPUTS and isinstance(v, str)]
    paths = [Path(SHIPPED.get(value) or resolve(value)) for value in values]
    contents = [path for path in paths if path.is_file()]
    listings = [
        [f"{p.relative_to(path)} {p.stat().st_size if p.exists() else 'missing'}" for p in sorted(path.rglob("*"))]
        for path in paths
        if path.is_dir()
    ]
    return digest(FOLDER / f"{notebook}.ipynb", parameters, *contents, listings, code_version(), before)


def execute(notebook: str, parameters: dict[str, Any], folder: Path) -> None:
    """Runs one notebook with papermill into ``folder``, its output echoed live, and exports it to HTML."""
    executed = folder / "notebooks" / f"{notebook}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    html = folder / "html" / f"{notebook}.html"
    with tempfile.TemporaryDirectory(prefix="tgazsr-") as sockets:
        kernel = {"transport": "ipc", "ip": f"{sockets}/kernel", "shutdown_wait_time": 60.0}  # ipc: no open port
        try:
            papermill.execute_notebook(
                FOLDER / f"{notebook}.ipynb",
                executed,
                parameters,
                kernel_name="python3",
                cwd=ROOT,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                config=Config({"KernelManager": kernel}),
                extra_arguments=[
                    "--IPKernelApp.log_level=50"
                ],  # a kernel that is interrupted fills the log with its own troubles
            )
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong first is what is to be told
                export_html(executed, html)
            raise
    export_html(executed, html)


def take_part(notebook: str, parameters: dict[str, Any]) -> None:
    """Runs a notebook's cells as one of the processes that torchrun started: together they train and measure what it asks for.

    Tables and figures are written, an executed copy is not; ``./run_all.sh`` makes one from what is stored then.
    """
    book = nbformat.read(FOLDER / f"{notebook}.ipynb", as_version=4)
    shell = InteractiveShell()
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        shell.run_cell(cell.source, store_history=True).raise_error()
        if "parameters" in cell.metadata.get("tags", []):
            given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
            shell.run_cell(given, store_history=True).raise_error()


def export_html(executed: Path, target: Path) -> None:
    if executed.exists():
        html, _ = HTMLExporter().from_filename(str(executed))
        write_atomic(target, lambda temporary: temporary.write_text(html))


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on beyond its parameters."""
    target = pick_device(device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "code": code_version(),
        "note": "other versions, devices or thread counts may change results by rounding",
    }


def load_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"notebooks": {}}
    try:
        notebooks = json.loads(path.read_bytes())["notebooks"]
        if not all(
            isinstance(entry, dict) and isinstance(entry.get("files", {}), dict) for entry in notebooks.values()
        ):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SettingsError(
            f"manifest {path} is damaged; remove it to run the notebooks again, which goes on from what is stored"
        ) from None
    return {"notebooks": notebooks}


def run(profile_name: str, numbers: list[str], given: dict[str, Any], fresh: bool) -> int:
    """Runs a profile; 0, or 1 after a notebook failed. Raises SettingsError before anything starts."""
    profile = load_profile(profile_name)
    chosen = select(profile, numbers)
    check_names(profile, given, chosen)
    output = str(given.get("output", profile.parameters.get("output", f"runs/{profile_name}")))
    folder = resolve(output)
    extra = [name for name in chosen if name not in profile.notebooks]
    in_order = [*extra, *profile.notebooks]
    parameters = {name: parameters_of(name, profile, output, given) for name in in_order}
    for name in chosen:
        check_choices(name, parameters[name])
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if together:
        unsuitable = {
            name
            for name in ("device", "processes")
            for values in parameters.values()
            if values.get(name, "auto") not in ("auto", 1)
        }
        if unsuitable or fresh or "00_pretrain_mini_clip" in chosen:
            raise SettingsError(
                "under torchrun each process takes its own device: no device, no processes, no --fresh, and not notebook 00"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes of torchrun
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0) if first else contextlib.nullcontext():
            if not together:
                return _run_in(folder, profile_name, profile, in_order, chosen, parameters, fresh)
            with processes.joined(), contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
                for name in chosen:
                    print(f"\n=== {name}, in {processes.count()} processes", flush=True)
                    take_part(name, parameters[name])
            return 0
    except Timeout:
        raise SettingsError(
            f"another run writes to {output} now; wait for it, or give this one a folder of its own with -p output"
        ) from None


def _run_in(
    folder: Path,
    profile_name: str,
    profile: Profile,
    in_order: list[str],
    chosen: list[str],
    parameters: dict[str, dict[str, Any]],
    fresh: bool,
) -> int:
    now = environment(next(iter(parameters.values()))["device"])
    if fresh and folder.exists() and any(folder.iterdir()):
        if ROOT.is_relative_to(folder) or not (folder / "manifest.json").exists():
            raise SettingsError(
                f"--fresh moves aside what an earlier run has left; {folder} is not such a folder (it needs a manifest.json and must not hold the workbook)"
            )
        aside = folder.with_name(f"{folder.name}-before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        print(f"earlier results were moved to {aside.name}")
    folder.mkdir(exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # raises OSError now rather than after hours
    manifest_path = folder / "manifest.json"
    manifest = load_manifest(manifest_path)
    manifest["profile"] = profile_name
    print(f"{profile_name}: {profile.description.strip()}\nresults go to {os.path.relpath(folder, ROOT)}", flush=True)
    before = ""
    for name in in_order:
        inputs = before = fingerprint(name, parameters[name], before)
        if name not in chosen:
            continue
        entry = manifest["notebooks"].get(name, {})
        if entry.get("status") == "finished" and entry.get("inputs") == inputs:
            changed = [file for file, content in entry.get("files", {}).items() if _content(folder / file) != content]
            if not changed and (folder / "notebooks" / f"{name}.ipynb").exists():
                print(f"{name}: done already with the same inputs (--fresh starts over)", flush=True)
                continue
            print(
                f"{name}: runs again, as {(changed or ['its executed copy'])[0]} is not as it was written", flush=True
            )
        print(f"\n=== {name}", flush=True)
        started, earlier = time.time(), _outputs(folder)
        entry = {"status": "running", "inputs": inputs, "parameters": parameters[name], "environment": now}
        entry["started"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        manifest["notebooks"][name] = entry
        write_json(manifest_path, manifest)
        failure = None
        try:
            own = default_parameters(name)
            execute(name, {k: v for k, v in parameters[name].items() if k not in own or own[k] != v}, folder)
        except PapermillExecutionError as error:
            failure = f"stopped in cell {error.exec_count}: {error.ename}: {error.evalue}"
        except KeyboardInterrupt:
            failure = "was interrupted; the same command goes on from here"
        except Exception as error:  # a kernel that died or did not start
            failure = f"stopped: {type(error).__name__}: {' '.join(str(error).split())}"
        entry |= {"status": "failed" if failure else "finished", "seconds": round(time.time() - started, 1)}
        if failure:  # said first: the disk may be full
            print(f"\n{name} {failure}\nexecuted copy: {folder / 'notebooks' / name}.ipynb", file=sys.stderr)
            entry["error"] = failure
        else:
            written = [path for path, state in _outputs(folder).items() if earlier.get(path) != state]
            entry["files"] = {str(path.relative_to(folder)): _content(path) for path in written}
        write_json(manifest_path, manifest)
        if failure:
            return 1
        print(f"{name}: {entry['seconds']:.0f} s", flush=True)
    show(folder, with_table=any(name.startswith("04") for name in chosen))
    return 0


def _outputs(folder: Path) -> dict[Path, tuple[int, int]]:
    """Files that notebooks write for people to read, and what changes when one is written again."""
    files = [path for kind in ("html", "tables", "figures") for path in folder.glob(f"{kind}/[!.]*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(files)}


def _content(path: Path) -> str | None:
    return digest(path) if path.is_file() else None


def show(folder: Path, with_table: bool) -> None:
    """Prints the leaderboard and where the figures are."""
    table = folder / "tables" / "leaderboard.csv"
    if with_table and table.exists():
        print("\n" + pd.read_csv(table, index_col=0).to_string(float_format="%.1f", na_rep="-"))
    figures = sorted(path for path in folder.glob("figures/*") if path.suffix in (".png", ".html"))
    print("\nfigures:" if figures else "\nno figures", *(f"\n  {os.path.relpath(p)}" for p in figures), sep="")
    print(f"notebooks as HTML: {os.path.relpath(folder / 'html')}/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run_all.sh", description="Run the workbook's notebooks headlessly.")
    parser.add_argument("profile", nargs="?", default="mini", help="a file of notebooks/profiles (default: mini)")
    parser.add_argument("numbers", nargs="*", help="notebooks to run, such as 01 04 (default: the profile's)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--fresh", action="store_true", help="start over; earlier results are moved aside")
    options = parser.parse_args(arguments)
    profile, numbers = options.profile, options.numbers
    if profile.isdigit():
        profile, numbers = "mini", [profile, *numbers]
    os.environ[HEADLESS] = "1"
    logging.getLogger("papermill").setLevel(
        logging.ERROR
    )  # it warns of parameters that a cell does not list; all are checked here
    os.environ["JUPYTER_PREFER_ENV_PATH"] = (
        "1"  # this environment's kernel, not one of the same name in the home folder
    )
    try:
        given = {name: given_value(name, text) for name, text in options.p}
        return run(profile, numbers, given, options.fresh)
    except (SettingsError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
