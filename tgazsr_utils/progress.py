"""Progress bars: widgets in JupyterLab; in a headless run one plain line every few seconds, live in the log."""

import os
import sys

from tqdm.auto import tqdm as auto_tqdm
from tqdm.std import tqdm as plain_tqdm

HEADLESS = "TGAZSR_HEADLESS"  # set by the runner
SECONDS = 10.0  # between two lines of a headless run

_UP = "\x1b[A"  # a bar inside another one moves the cursor


class _Lines:
    """A stream on which each redraw of a bar is a line of its own, unless the count is still the same."""

    last = ""

    def write(self, text: str) -> None:
        text = text.replace(_UP, "").strip("\r\n ")
        if text and text.split(" [")[0] != self.last:
            self.last = text.split(" [")[0]
            sys.stdout.write(text + "\n")

    def flush(self) -> None:
        sys.stdout.flush()


def progress(iterable=None, **options):
    """``tqdm(iterable, **options)`` in the form that suits where it runs."""
    if not os.environ.get(HEADLESS):
        return auto_tqdm(iterable, **options)
    bar = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return plain_tqdm(iterable, **{"file": _Lines(), "mininterval": SECONDS, "bar_format": bar, **options})
