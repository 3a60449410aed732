"""Nothing from outside is executed, written elsewhere, or open to others."""

import ast
import functools
import http.server
import importlib.util
import io
import json
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
import torchvision.datasets
from conftest import own_environment, size
from miniatures import write_all

from tgazsr_utils.core.seeds import digest
from tgazsr_utils.datasets import __main__ as datasets_command
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.display.panels import attacked_html
from tgazsr_utils.measuring.attacked_image import attack_image
from tgazsr_utils.paths import ROOT
from tgazsr_utils.runner import main
from tgazsr_utils.runtime.files import save_tensors

SOURCES = [
    *sorted((ROOT / "tgazsr_utils").rglob("*.py")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


class RunsCode:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def calls(path):
    """(dotted name, keyword names and constants) of each call in a module or notebook."""
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    else:
        text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), keywords


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_call_that_would_run_what_a_file_or_a_person_says(path):
    for name, keywords in calls(path):
        assert name not in {
            "eval",
            "exec",
            "os.system",
            "pickle.load",
            "pickle.loads",
            "yaml.load",
            "joblib.load",
            "pd.read_pickle",
        }, name
        # One reads through an unpickler of our own, which is tried in test_models.py.
        assert not name.endswith("torch.load") or keywords.get("weights_only") is True or path.name == "weight_files.py"
        assert not keywords.get("shell") and not keywords.get("allow_pickle")


def test_a_pickle_in_place_of_a_published_set_is_not_read(tmp_path):
    """CIFAR comes as pickles: only those with the published checksums are opened."""
    root, trace = write_all(tmp_path / "sets"), tmp_path / "ran"
    for name in ("test_batch", "batches.meta"):
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(RunsCode(trace)))
    with pytest.raises(ValueError, match="'cifar10' in .* cannot be read"):
        load_dataset("cifar10", "test", root)
    assert not trace.exists()


@pytest.fixture
def served(tmp_path):
    """(folder, address on loopback where its files can be got)."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    (tmp_path / "served").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("member", ["../../../outside.txt", "/{root}/outside.txt", "link"])
def test_an_archive_cannot_write_outside_of_its_folder(served, tmp_path, monkeypatch, capsys, member):
    """FGVC-Aircraft is a tar without a checksum."""
    archive = served[0] / "fgvc-aircraft-2013b.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        if member == "link":
            link = tarfile.TarInfo("fgvc-aircraft-2013b/out")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(link)
        name = (
            "fgvc-aircraft-2013b/out/outside.txt" if member == "link" else member.format(root=str(tmp_path).lstrip("/"))
        )
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    monkeypatch.setattr(torchvision.datasets.FGVCAircraft, "_URL", f"{served[1]}/{archive.name}")
    assert datasets_command.main(["fetch", "fgvc_aircraft", "--root", str(tmp_path / "deep" / "sets")]) == 1
    said = capsys.readouterr().out
    if not hasattr(tarfile, "data_filter"):  # Debian 12's Python 3.11.2
        assert "this Python cannot keep an archive inside a folder" in said
    elif not member.startswith("/"):  # a slash is dropped
        assert "fgvc_aircraft: failed: " in said and ("outside" in said or "absolute" in said)
    assert not [
        path for path in tmp_path.rglob("outside.txt") if tmp_path / "deep" / "sets" / ".fetching" not in path.parents
    ]


def test_a_zip_cannot_either(served, tmp_path, monkeypatch):
    """Tiny-ImageNet is a zip without a checksum."""
    archive = served[0] / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../../outside.txt", "evil")
        file.writestr("tiny-imagenet-200/wnids.txt", "n01")
    spec = datasets_command.KNOWN["tinyImageNet"]
    monkeypatch.setitem(datasets_command.KNOWN, "tinyImageNet", replace(spec, source=f"{served[1]}/{archive.name}"))
    assert datasets_command.main(["fetch", "tinyImageNet", "--root", str(tmp_path / "deep" / "sets")]) == 0
    sets = tmp_path / "deep" / "sets"
    assert (sets / "tiny-imagenet-200" / "wnids.txt").exists() and not [
        path for path in tmp_path.rglob("outside.txt") if sets not in path.parents
    ]


def test_what_a_person_passes_is_never_run(smoke, tmp_path, capsys):
    """Neither by the shell nor in a notebook that papermill writes it into."""
    trace = tmp_path / "ran"
    assert all(part in smoke.folder.name for part in ("'", '"', "$(touch ran)", "`touch ran`", "; touch ran", "\\n"))
    assert (smoke.folder / "tables" / "before_and_after.csv").exists() and not (smoke.folder.parent / "ran").exists()
    code = f'"); open("{trace}", "w"); ("'
    for name in ("dataset", "arch", "pretrained", "prompt", "device"):
        assert main(["smoke", "02", "-p", name, json.dumps(code)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not trace.exists() and not (ROOT / "ran").exists()


def test_names_from_outside_are_text_in_the_explorers_html(mini, shapes):
    attacked = attack_image(mini, shapes, 0, "a cross", 1.0, 1, "reference")
    evil = "<img src=x onerror=alert(1)>"
    shown = attacked_html({evil: replace(attacked, label=evil, before=[(evil, 0.9)], after=[(evil, 0.8)])})
    assert evil not in shown and shown.count("&lt;img src=x onerror=alert(1)&gt;") == 7


def test_jupyter_listens_on_loopback_and_wants_its_token(tmp_path):
    """Whatever address the person's own configuration names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    (tmp_path / "JUPYTER_CONFIG_DIR").mkdir()
    (tmp_path / "JUPYTER_CONFIG_DIR" / "jupyter_server_config.py").write_text("c.ServerApp.ip = '0.0.0.0'\n")
    command = ["bash", str(ROOT / "run_all.sh"), "--lab", "--no-browser", "--allow-root", f"--port={port}"]
    with open(tmp_path / "log", "w") as log:
        environment = own_environment() | own
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        status = None
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents").close()
                status = 200
            except urllib.error.HTTPError as error:
                status = error.code
            except OSError:
                time.sleep(0.5)
                continue
            break
        addresses = {
            c.laddr.ip for c in psutil.Process(server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN
        }
        assert status == 403, (tmp_path / "log").read_text()
        assert addresses and addresses <= {"127.0.0.1", "::1"}
        token = re.search(r"token=(\w{20,})", (tmp_path / "log").read_text())[1]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents?token={token}").status == 200
    finally:
        server.terminate()
        server.wait()


@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris is not installed (pip install atheris)")
def test_coverage_guided_fuzzing_finds_nothing(tmp_path):
    record = {"key": "abc", "method": "CLIP", "model": "m", "n": 2, "hits": "80"}
    seeds = [
        b"\x00" + (ROOT / "notebooks" / "profiles" / "mini.yaml").read_bytes(),
        b"\x01" + json.dumps(record | {"checksum": digest(record)}).encode(),
        b"\x02" + json.dumps({"notebooks": {"01": {"status": "finished"}}}).encode(),
        b"\x03" + save_tensors(tmp_path / "a", {"values": torch.rand(3)}, run="a").read_bytes(),
    ]
    (tmp_path / "corpus").mkdir()
    for number, seed in enumerate(seeds):
        (tmp_path / "corpus" / str(number)).write_bytes(seed)
    script, runs = str(Path(__file__).with_name("coverage_fuzz.py")), size(2_000, 20_000)
    done = subprocess.run(
        [sys.executable, script, str(tmp_path / "corpus"), f"-runs={runs}", "-seed=1", "-max_len=600"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"Done {runs}" in done.stderr, done.stdout[-2000:] + done.stderr[-3000:]
