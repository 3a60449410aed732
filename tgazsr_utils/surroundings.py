"""What a site or a user has set up around the workbook, and the workbook is not to depend on."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator


def print_anything() -> None:
    """A terminal that lacks an arrow shows "?" in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def own_kernel(folder: str) -> Iterator[None]:
    """Within, Jupyter's kernel "python3" is this Python, whatever a site or a home folder has under that name."""
    from ipykernel.kernelspec import write_kernel_spec  # slow to import

    write_kernel_spec(os.path.join(folder, "kernels", "python3"))
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
    try:
        yield
    finally:
        del os.environ["JUPYTER_PATH"]
        os.environ |= {} if before is None else {"JUPYTER_PATH": before}
