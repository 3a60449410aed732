"""Runs the workbook headlessly: what ``python -m tgazsr_utils`` does but for its verbs that need no PyTorch.

Executes a profile's notebooks with papermill, in order, with their progress live; skips what is done and unchanged;
leaves executed copies, HTML, figures, tables and a manifest in the run's folder, models and records in the store. Under
torchrun the processes share the work of these notebooks instead (see ``together``).
"""

import argparse
import contextlib
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from traitlets.config import Config

from tgazsr_utils import profiles, together
from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.datasets.__main__ import fetch_missing
from tgazsr_utils.display.report import answer_path
from tgazsr_utils.listing import SECTIONS, show_list
from tgazsr_utils.manifests import (
    compare_runs,
    earlier_runs,
    environment_of,
    load_manifest,
    report,
    show,
    show_plan,
    show_store,
)
from tgazsr_utils.measuring.challenge import challenge, submit
from tgazsr_utils.parameters import NOTEBOOKS, SettingsError, named_weights
from tgazsr_utils.paths import DATA, ROOT, files_below, resolve
from tgazsr_utils.profiles import PROFILES, Profile, cells_digest, default_parameters, parameters_of, shown
from tgazsr_utils.progress import HEADLESS
from tgazsr_utils.runtime.files import write_atomic, write_json
from tgazsr_utils.runtime.fingerprints import code_version
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import SHIPPED, find_weights, load_clip
from tgazsr_utils.surroundings import own_kernel, print_anything


class Batch:
    """One headless run: notebooks with their parameters, and the folder that its results go to."""

    def __init__(
        self, profile_name: str, profile: Profile, chosen: Sequence[str], given: Mapping[str, Any], folder: Path
    ):
        self.profile_name, self.profile, self.chosen, self.folder = profile_name, profile, chosen, folder
        others = [name for name in chosen if name not in profile.notebooks]
        of_ones_own = [name for name in others if name not in NOTEBOOKS]  # they look at what the others have made
        in_order = [*(name for name in others if name in NOTEBOOKS), *profile.notebooks, *of_ones_own]
        self.parameters = {name: self._parameters(name, given) for name in in_order}
        for number, name in enumerate(chosen):
            profiles.check_choices(name, self.parameters[name])
            self._check_models(name, chosen[:number])
        if not profile.fetch:
            self._check_sets()
        profiles.check_effect(given, {name: self.parameters[name] for name in chosen})
        self.manifest_path = folder / "manifest.json"
        self.ahead: dict[str, float] = {}  # seconds of notebooks whose work several processes have done already

    def _parameters(self, notebook: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of one that does not run, the profile's as they stand, if it could not run with what is given."""
        try:
            return parameters_of(notebook, self.profile, str(self.folder), given)
        except SettingsError:
            if notebook in self.chosen:
                raise
            return default_parameters(notebook) | profiles.layered(notebook, self.profile, {})

    def _check_models(self, notebook: str, before: Sequence[str]) -> None:
        """What it takes as "latest:NAME" must be there, or made by a notebook before."""
        made = {method for name in before for method in self.parameters[name].get("methods", [])}
        made |= {"pretrained"} if "00_pretrain_mini_clip" in before else set()
        for name, _, wanted in named_weights(self.parameters[notebook]):
            if str(wanted).startswith("latest:") and wanted.removeprefix("latest:") not in made:
                try:
                    find_weights(wanted, Run(self.folder).models)
                except ValueError as error:
                    raise SettingsError(f"{notebook}: {name} = {wanted!r}: {error}") from None

    def _check_sets(self) -> None:
        for name in self.chosen:
            profiles.check_sets(name, self.parameters[name])

    def run(self, fresh: bool) -> int:
        """0, or 1 after a notebook failed."""
        environment = environment_of(next(iter(self.parameters.values())).get("device", "auto"))
        print(f"{self.profile_name}: {self.profile.description.strip()}", flush=True)
        if self.profile.fetch:
            here = [self.parameters[name] for name in self.chosen]
            keys = dict.fromkeys(key for values in here for key in profiles.named_sets(values))
            fetch_missing(list(keys), here[0]["data_root"])
            self._check_sets()
        if fresh:
            start_over(self.folder)
        self.folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=self.folder).close()  # raises OSError now rather than after hours
        manifest = load_manifest(self.manifest_path) | {"profile": self.profile_name}
        print(f"results go to {shown(self.folder)}", flush=True)
        try:
            if self._all(manifest, environment):
                return 1
        finally:
            report(self.folder, manifest, self.profile.description)
        show(self.folder, with_table=any(name.startswith("04") for name in self.chosen))
        return 0

    def _all(self, manifest: dict[str, Any], environment: Mapping[str, Any]) -> bool:
        """Says what is to run, and runs it, each when its turn comes; did a notebook fail?"""
        earlier, usual = earlier_runs(self.folder, self.profile_name), self.profile.minutes
        minutes = show_plan([(n, why) for n, _, why in self.plan(manifest)], self.parameters, earlier, usual, "runs")
        self.show_store()
        started, total = time.time(), len(minutes)
        shared = {name: self.parameters[name] for name in minutes if together.asked(self.parameters[name]) > 1}
        for name, inputs, why in self.plan(manifest):
            if why is None:
                continue
            if name in shared:
                self.ahead, shared = together.ahead(shared), {}
                spent = {name: seconds / 60 for name, seconds in self.ahead.items() if minutes[name] is not None}
                minutes |= {name: max(0.0, minutes[name] - already) for name, already in spent.items()}
            left = [*minutes.values()]
            heading = f"{total - len(left) + 1}/{total} · {name} · {_so_far(started, left)}"
            minutes.pop(name, None)
            if name in manifest["notebooks"]:
                print(f"{name}: runs again, as {why}", flush=True)
            entry = {"status": "running", "inputs": inputs, "parameters": self.parameters[name]}
            manifest["notebooks"][name] = entry = entry | {"environment": environment}
            print(f"\n=== [{heading}]", flush=True)
            if self._execute(name, entry, lambda: write_json(self.manifest_path, manifest)):
                return True
            report(self.folder, manifest, self.profile.description)
        return False

    def show_store(self) -> None:
        methods = [method for name in self.chosen for method in self.parameters[name].get("methods", [])]
        show_store(Run(self.folder), dict.fromkeys(methods))

    def plan(self, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
        """(notebook, its inputs, why it is to run; None: it is done), each when its turn comes."""
        before = ""
        for name, parameters in self.parameters.items():
            inputs = before = fingerprint(name, parameters, before)
            if name in self.chosen:
                yield name, inputs, self._why(name, manifest["notebooks"].get(name, {}), inputs)

    def _why(self, name: str, entry: Mapping[str, Any], inputs: str) -> str | None:
        if entry.get("status") != "finished":
            return "it did not end" if entry else "it has not run here yet"
        if entry.get("inputs") != inputs:
            known, now = entry.get("parameters", {}), self.parameters[name]
            other = sorted(key for key in known.keys() | now.keys() if known.get(key) != now.get(key))
            return f"{', '.join(other) or 'its cells, files, the code or what runs before it'} changed"
        changed = [file for file, content in entry.get("files", {}).items() if _content(self.folder / file) != content]
        if changed or not (self.folder / "notebooks" / f"{name}.ipynb").exists():
            return f"{(changed or ['its executed copy'])[0]} is not as it was written"
        return None

    def _execute(self, name: str, entry: dict[str, Any], save: Callable[[], Any]) -> bool:
        """Runs a notebook and keeps in ``entry`` what became of it; did it fail?"""
        from papermill.exceptions import PapermillExecutionError  # slow to import

        answer_path(self.folder, name).unlink(missing_ok=True)
        started, earlier = time.time() - self.ahead.get(name, 0), _outputs(self.folder)
        entry["started"] = datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")
        save()
        failure = None
        try:
            own = default_parameters(name)
            values = entry["parameters"] | ({"processes": 1} if name in self.ahead else {})
            changed = {k: v for k, v in values.items() if k not in own or own[k] != v}
            execute(name, changed, self.folder, self.chosen)
        except PapermillExecutionError as error:
            failure = f"stopped in cell {error.exec_count}: {error.ename}: {error.evalue}"
        except KeyboardInterrupt:
            failure = "was interrupted; the same command goes on from here"
        except Exception as error:  # a kernel that died or did not start
            failure = f"stopped: {type(error).__name__}: {' '.join(str(error).split())}"
        entry |= {"status": "failed" if failure else "finished", "seconds": round(time.time() - started, 1)}
        if failure:  # said first: the disk may be full
            copy = self.folder / "notebooks" / f"{name}.ipynb"
            print(f"\n{name} {failure}\nexecuted copy: {copy}", file=sys.stderr)
            entry["error"] = failure
        else:
            written = [path for path, state in _outputs(self.folder).items() if earlier.get(path) != state]
            entry["files"] = {str(path.relative_to(self.folder)): _content(path) for path in written}
            print(f"{name}: {entry['seconds']:.0f} s", flush=True)
        save()
        return bool(failure)


def batch_of(profile_name: str, numbers: Sequence[str], given: Mapping[str, Any], looking: bool = False) -> Batch:
    """What these arguments ask for, or SettingsError; if only ``looking``, no weights are loaded, no folder is made."""
    profile = profiles.load_profile(profile_name)
    chosen = profiles.select(profile, numbers)
    profiles.check_names(profile, given, chosen)
    if profile.fetch and "data_root" not in given and (root := profile.parameters.get("data_root")):
        if not looking:
            resolve(root).mkdir(parents=True, exist_ok=True)
        elif not resolve(root).exists():  # the sets are not there yet: any folder stands in
            profile = profile.model_copy(update={"parameters": profile.parameters | {"data_root": str(PROFILES)}})
    if not looking:
        profile = with_weights(profile, chosen, given)
    return Batch(profile_name, profile, chosen, given, folder_of(profile_name, profile, chosen, given))


def dry_run(profile_name: str, numbers: Sequence[str], given: Mapping[str, Any], fresh: bool) -> int:
    """Says what ``run`` would do; does and writes nothing."""
    batch = batch_of(profile_name, numbers, given, looking=True)
    planned, again = batch.plan(load_manifest(batch.manifest_path)), "--fresh starts over"
    plan = [(name, again if fresh else why) for name, _, why in planned]
    print(f"{profile_name}: {batch.profile.description.strip()}\nresults would go to {shown(batch.folder)}")
    show_plan(plan, batch.parameters, earlier_runs(batch.folder, profile_name), batch.profile.minutes)
    batch.show_store()
    return 0


def export_parameters(profile_name: str, numbers: Sequence[str], given: Mapping[str, Any]) -> int:
    """Writes the parameters that notebooks would run with as files for plain papermill, and says how it takes them."""
    batch = batch_of(profile_name, numbers, given, looking=True)
    for name in batch.chosen:
        values = batch.parameters[name] | {"output": shown(batch.folder)}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        path = batch.folder / "parameters" / f"{name}.yaml"
        write_atomic(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        source, target = shown(profiles.file_of(name)), shown(batch.folder / f"{name}.ipynb")
        print(shlex.join(["papermill", _verbatim(source), _verbatim(target), "-f", shown(path)]))
    return 0


def run(profile_name: str, numbers: Sequence[str], given: Mapping[str, Any], fresh: bool) -> int:
    """Runs a profile; 0, or 1 after a notebook failed. Raises SettingsError before anything starts."""
    batch = batch_of(profile_name, numbers, given)
    folder, parts = batch.folder, {name: batch.parameters[name] for name in batch.chosen}
    if started := together.are_started():
        together.check(parts, fresh)
    folder.parent.mkdir(parents=True, exist_ok=True)
    first = not started or together.is_first()
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0) if first else contextlib.nullcontext():
            if not started:
                return batch.run(fresh)
            together.take_part(parts)
            return 0
    except Timeout:
        raise SettingsError(
            f"another run writes to {shown(folder)} now; wait for it, or give this one a folder with -p output"
        ) from None


def with_weights(profile: Profile, chosen: Sequence[str], given: Mapping[str, Any]) -> Profile:
    """The profile; if weights that it names cannot be had, with what it says is to take over, which is said loudly."""
    if not profile.without_weights or {"arch", "pretrained", "models"} & given.keys():
        return profile
    layers = [default_parameters(name) | profiles.layered(name, profile, given) for name in chosen]
    for _, arch, weights in dict.fromkeys(named for values in layers for named in named_weights(values)):
        try:
            load_clip(arch, weights, "cpu")
        except ValueError as error:
            print(f"{PLUMBING.upper()}: other weights stand in, as {error}", flush=True)
            return profile.model_copy(update={"by_notebook": dict.fromkeys(chosen, profile.without_weights)})
    return profile


def folder_of(profile_name: str, profile: Profile, chosen: Sequence[str], given: Mapping[str, Any]) -> Path:
    """The folder asked for; else one below runs/ that is named after the profile and what is not as it has it."""
    asked = given.get("output", profile.parameters.get("output"))
    if asked:
        return resolve(str(asked))
    changes: dict[str, Any] = {}
    root = {key: given[key] for key in ("data_root",) if key in given}  # the profile's own need not be there then
    for name in chosen:
        usual, wanted = (parameters_of(name, profile, "", values) for values in (root, given))
        own = default_parameters(name) | profile.parameters | profile.by_notebook.get(name, {})
        usual["data_root"] = own.get("data_root")
        changes |= {key: given[key] for key in given if key in wanted and wanted[key] != usual.get(key)}
    return ROOT / "runs" / profiles.folder_name(profile_name, changes)


def start_over(folder: Path) -> None:
    """Moves aside what an earlier run has left; the next one has a store of its own, where nothing is measured yet."""
    if folder.exists() and any(folder.iterdir()):
        if ROOT.is_relative_to(folder) or not (folder / "manifest.json").exists():
            raise SettingsError(
                f"--fresh moves aside what an earlier run has left; {folder} is not such a folder (it needs a "
                "manifest.json and must not hold the workbook)"
            )
        aside = folder.with_name(f"{folder.name}-before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        print(f"earlier results were moved to {aside.name}")
    (folder / "store").mkdir(parents=True)


def fingerprint(notebook: str, parameters: Mapping[str, Any], before: str) -> str:
    """Names a notebook's inputs: its cells, its parameters and the files they name, the code, what runs before it."""
    weights = [_place_of(path, parameters) for *_, path in named_weights(parameters) if path]
    named = [parameters.get("data_root"), parameters.get("descriptions"), *weights, *parameters.get("plugins", [])]
    paths = [Path(SHIPPED.get(value) or resolve(value)) for value in filter(None, named)]
    contents = [DATA / "learning_rates.yaml", *(path for path in paths if path.is_file())]
    listings = [files_below(path) for path in paths if path.is_dir()]
    portable = {name: _portable(value) for name, value in parameters.items() if name != "output"}
    return digest(cells_digest(notebook), portable, *contents, listings, code_version(), before)


def _portable(value: Any) -> Any:
    """A parameter with paths in the workbook's folder relative to it: a copy of it elsewhere finds its runs done."""
    if isinstance(value, Mapping):
        return {name: _portable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(one) for one in value]
    return value.replace(f"{ROOT}{os.sep}", "") if isinstance(value, str) else value


def _place_of(weights: str, parameters: Mapping[str, Any]) -> str:
    """The file, or folder, that weights are read from; other names as they are."""
    with contextlib.suppress(ValueError):  # none there yet
        weights = find_weights(weights, Run(resolve(parameters["output"] or "runs")).models)
    return weights.removeprefix("local-dir:")


def execute(notebook: str, parameters: Mapping[str, Any], folder: Path, books: Sequence[str] = ()) -> None:
    """Runs one notebook with papermill into ``folder``, its output echoed live; as HTML it leads to those beside it."""
    import papermill  # slow to import

    from tgazsr_utils.display import pages  # slow to import

    executed = folder / "notebooks" / f"{notebook}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    html, links = folder / "html" / f"{notebook}.html", {"report": "../index.html"}
    links |= {name: f"{name}.html" for name in books if name != notebook}
    output = {"progress_bar": False, "stdout_file": sys.stdout, "stderr_file": sys.stderr}
    # A socket's whole path has to fit into 107 bytes, or 103 on macOS.
    short = None if len(os.fsencode(tempfile.gettempdir())) < 70 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="tgazsr-", dir=short) as sockets, own_kernel(sockets):
        ipc = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{sockets}/kernel"}  # no open port
        manager = Config({"KernelManager": {"shutdown_wait_time": 60.0, **ipc}})
        kernel = {"kernel_name": "python3", "language": "python", "cwd": ROOT, "config": manager}
        # An interrupted one fills the log with its troubles; colours of a traceback are control characters.
        kernel["extra_arguments"] = ["--IPKernelApp.log_level=50", "--InteractiveShell.colors=nocolor"]
        kernel["start_timeout"] = 600  # seconds; a machine may be slow and busy
        source = profiles.file_of(notebook)
        try:
            papermill.execute_notebook(_verbatim(source), _verbatim(executed), dict(parameters), **kernel, **output)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong first is what is to be told
                pages.export(executed, html, links)
            raise
    try:
        pages.export(executed, html, links)
    except Exception as error:  # the notebook itself is finished
        print(f"no HTML copy of {notebook} could be made: {' '.join(str(error).split())}", file=sys.stderr)


def _verbatim(path: Path) -> str:
    """A path as papermill takes it, which fills in what is in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _so_far(started: float, minutes: Sequence[float | None]) -> str:
    """How long it has run, and what is left is likely to take."""
    passed = (time.time() - started) / 60
    if None in minutes:
        return f"{passed:.0f} min so far"
    return f"{passed:.0f} of about {passed + sum(minutes):.0f} min"


def _outputs(folder: Path) -> dict[Path, tuple[int, int]]:
    """Files that notebooks write for people to read, and what changes when one is written again."""
    kinds = ("html", "tables", "figures", "records", "answers")
    files = [path for kind in kinds for path in folder.glob(f"{kind}/[!.]*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(files)}


def _content(path: Path) -> str | None:
    return digest(path) if path.is_file() else None


def on_runs(verb: str, words: Sequence[str], by: str | None) -> int:
    """What is done with runs that are there."""
    if verb == "compare":
        if len(words) != 2:
            raise SettingsError(f"compare takes two folders of runs; {len(words)} were given")
        return compare_runs(*words)
    if verb == "challenge":
        return challenge(words)
    if not by or len(words) not in (1, 2):
        raise SettingsError('submit takes a method, --by "WHO" and, if it is not the latest, the folder of a run')
    submit(words[0], by, *words[1:])
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run_all.sh", description="Run the workbook's notebooks headlessly.")
    profiles_there = "a file of notebooks/profiles (default: mini), or compare, submit, challenge"
    parser.add_argument("profile", nargs="?", default="mini", help=profiles_there)
    which = "notebooks to run, such as 01 04 (default: the profile's); what compare, submit, challenge take"
    parser.add_argument("numbers", nargs="*", help=which)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--by", metavar="WHO", help="who submits")
    parser.add_argument("--fresh", action="store_true", help="start over; earlier results are moved aside")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    export = "write parameters as files for plain papermill"
    parser.add_argument("--export-parameters", action="store_true", help=export)
    parser.add_argument("--list", nargs="?", const="all", choices=["all", *SECTIONS], help="say what there is")
    allowed = "a profile, notebook numbers, -p NAME VALUE, --fresh, --dry-run, --export-parameters, --list, --by WHO"
    parser.error = lambda message: parser.exit(2, f"error: {message}; there are {allowed}; --help says more\n")
    options = parser.parse_intermixed_args(arguments)
    profile, numbers = options.profile, options.numbers
    if profile.isdigit():
        profile, numbers = "mini", [profile, *numbers]
    os.environ[HEADLESS] = "1"
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of what no cell lists; all is checked here
    try:
        if profile in ("compare", "submit", "challenge"):
            return on_runs(profile, numbers, options.by)
        given = {name: profiles.given_value(name, text) for name, text in options.p}
        if options.list:
            return show_list(options.list, given.get("plugins"))
        if options.export_parameters:
            return export_parameters(profile, numbers, given)
        return (dry_run if options.dry_run else run)(profile, numbers, given, options.fresh)
    except KeyboardInterrupt:  # while image sets are fetched
        error = "interrupted; the same command goes on from here"
    except (SettingsError, ValueError, OSError) as failure:
        error = failure
    print(f"error: {SettingsError(str(error))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    print_anything()
    sys.exit(main())
