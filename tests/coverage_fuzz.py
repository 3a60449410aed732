"""Coverage-guided fuzzing (atheris) of what reads files: ``python tests/coverage_fuzz.py CORPUS -runs=N``; called by test_safety.

The first byte picks the reader, the rest is the file. Each one takes a file or refuses it in one line.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tgazsr_utils", "json", "yaml"], enable_loader_override=False):
    from tgazsr_utils import runner
    from tgazsr_utils.files import load_tensors
    from tgazsr_utils.results import RecordStore
    from tgazsr_utils.settings import SettingsError

FOLDER = Path(tempfile.mkdtemp())
runner.PROFILES = FOLDER
READERS = (
    ("abc.yaml", lambda path: runner.load_profile("abc")),
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
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
