"""Coverage-guided fuzzing (atheris) of what reads files: ``python tests/coverage_fuzz.py CORPUS -runs=N``.

Called by test_safety. The first byte picks the reader, the rest is the file. Each takes it or refuses it in one line.
"""

import resource
import sys
import tempfile
from pathlib import Path

import atheris
import psutil

with atheris.instrument_imports(include=["tgazsr_utils", "json", "yaml"], enable_loader_override=False):
    from tgazsr_utils import profiles, runner
    from tgazsr_utils.measuring.records import RecordStore
    from tgazsr_utils.parameters import SettingsError
    from tgazsr_utils.runtime.files import load_tensors

FOLDER = Path(tempfile.mkdtemp())
profiles.PROFILES = FOLDER
READERS = (
    ("abc.yaml", lambda path: profiles.load_profile("abc")),
    ("abc.json", lambda path: RecordStore(FOLDER).get("abc")),
    ("manifest.json", runner.load_manifest),
    ("abc.ckpt", load_tensors),
)


def read(data: bytes) -> None:
    if not data:
        return
    name, reader = READERS[data[0] % len(READERS)]
    path = FOLDER / name
    path.write_bytes(data[1:])
    try:
        reader(path)
    except (SettingsError, ValueError) as error:
        assert "\n" not in str(error).strip() and ("abc" in str(error) or "manifest" in str(error)), str(error)


if __name__ == "__main__":
    # libFuzzer's own limit reads the process's peak, which it inherits from the process that started it: so it is off,
    # and this makes an allocation beyond 1 GiB a MemoryError.
    allowed = psutil.Process().memory_info().data + 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    atheris.Setup([*sys.argv, "-rss_limit_mb=0"], read)
    atheris.Fuzz()
