"""Usage: ./run_all.sh [profile] [notebook numbers...] [-p name value]... [--fresh | --dry-run | --export-parameters]
       ./run_all.sh --list [profiles | notebooks | methods | attacks | defences | parameters]
       ./run_all.sh compare runs/A runs/B
       ./run_all.sh submit METHOD --by WHO [runs/A]
       ./run_all.sh challenge [FILE...]
       ./run_all.sh --test [--long] [pytest arguments...]
       ./run_all.sh --lab [JupyterLab's arguments...]
       ./run_all.sh --demo [FILE.html]

Where the workbook is installed (a wheel, Windows) python -m tgazsr_utils takes the place of ./run_all.sh. In any order:
  profile           mini (default), or another file of notebooks/profiles
  notebook numbers  such as 01 04: run only these (also those a profile leaves out, or notebooks/NN_*.ipynb of yours)
  -p name value     set a parameter of the notebooks; may be repeated
  --fresh           start over, with nothing that is stored; earlier results of the run are moved aside
  --dry-run         say what would run, what is done already and how long it took before; run and write nothing
  --export-parameters  write what each notebook would run with as a file that plain papermill -f takes
  --list            what there is: profiles, notebooks, methods, attacks, defences, parameters; or one of these
  compare           print what differs between two runs: parameters, and paired differences of methods
  submit            write the file of a run's method for the challenge (docs/challenge.md) and print its row
  challenge         check such files (default: those of data/challenge) and show them side by side
  --test            run the tests; --long: with every count that the documents state
  --lab             open the workbook in JupyterLab, at a page of what there is and what came out last
  --demo            write one page in which the mini-CLIP runs in the browser (runs/demo/index.html; docs/demo.md)
  --help            show this

Results go to runs/<profile>/, or with other parameters to a folder named after them; models and records to runs/store,
for all runs. What is done and unchanged is skipped; an interrupted run goes on where it was.

./run_all.sh alone sets up what it needs: it uses the active environment if the workbook is installed there, else .venv,
which it makes on the first call.
  --locked          in .venv, with the very versions of requirements.lock, which the kept results were made with
PyTorch is taken as built for this machine's driver, or for the CPU where there is no GPU: a CUDA build is several GB,
one for the CPU 0.2. TORCH_INDEX=URL takes it from that package index instead.
"""

import importlib.util
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tgazsr_utils import clean_notebook, start_page
from tgazsr_utils.paths import NOTEBOOKS, ROOT
from tgazsr_utils.surroundings import own_kernel, print_anything


def main(arguments: Sequence[str] | None = None) -> int:
    """All verbs; but for those that need no PyTorch they are the runner's."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    print_anything()
    asked = [verb for verb in ("--test", "--lab", "--demo") if verb in given]
    if {"--help", "-h"} & {*given}:
        print(Path(__file__).read_text(encoding="utf-8").split('"""')[1], end="")  # also where Python drops docstrings
        return 0
    if len(asked) > 1:
        print(f"error: {' and '.join(asked[:2])} are two calls", file=sys.stderr)
        return 2
    clean_notebook.install(ROOT)
    if not asked:
        from tgazsr_utils import runner  # slow to import

        return runner.main(given)
    rest = [argument for argument in given if argument != asked[0]]
    return {"--test": _test, "--lab": _lab, "--demo": _demo}[asked[0]](rest)


def _test(arguments: list[str]) -> int:
    if not (ROOT / "tests").is_dir() or not importlib.util.find_spec("pytest"):
        print(
            f"error: the tests are in the workbook's repository, and need pip install -e {ROOT}[test]", file=sys.stderr
        )
        return 2
    return _become("pytest", arguments)


def _lab(arguments: list[str]) -> int:
    print(
        "from another machine: ssh -N -L 8888:127.0.0.1:8888 THIS-ONE, then open the address below there",
        file=sys.stderr,
    )
    # Containers and rented machines run as root; it stays on this machine, behind its token.
    root = ["--ServerApp.allow_root=True"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="tgazsr-") as folder, own_kernel(folder):
        return _become("jupyterlab", ["--ServerApp.ip=127.0.0.1", *root, *_start(), *arguments])


def _start() -> list[str]:
    """Where it opens: at the page that ``start_page`` writes; of an installed wheel, at its notebooks."""
    if not NOTEBOOKS.is_relative_to(ROOT):
        return [str(NOTEBOOKS)]
    from jupyterlab.commands import get_app_dir  # slow to import

    page = start_page.write(ROOT, NOTEBOOKS).relative_to(ROOT).as_posix()
    settings = start_page.settings(ROOT, Path(get_app_dir()) / "settings")
    return [
        f"--ServerApp.root_dir={ROOT}",
        "--FileContentsManager.post_save_hook=tgazsr_utils.clean_notebook.after_save",
        f"--LabApp.default_url=/lab/tree/{page}?file-browser-path=/",
        f"--LabApp.app_settings_dir={settings}",
        "--LabApp.news_url=None",
    ]


def _demo(arguments: list[str]) -> int:
    from tgazsr_utils.display.demo import main  # slow to import

    return main(arguments)


def _become(module: str, arguments: list[str]) -> int:
    """``python -m module`` in this very process, which signals reach, in the workbook's folder."""
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0
