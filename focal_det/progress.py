"""Progress bars that look alike."""

import sys
from typing import Any


def bar_options() -> dict[str, Any]:
    """For tqdm: where no one watches (a log file), few updates."""
    return {"mininterval": 0.2 if sys.stderr.isatty() else 15.0, "dynamic_ncols": True}
