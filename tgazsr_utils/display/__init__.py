"""What people look at: figures and the explorer's panels."""

import os

# Before matplotlib: a matplotlibrc of one's own may not even be readable, and a backend may need a display.
os.environ["MATPLOTLIBRC"] = os.devnull
if "inline" not in os.environ.get("MPLBACKEND", "inline"):
    os.environ["MPLBACKEND"] = "agg"
