"""The user's own losses, heads and data sets, named by ``FOCAL_DET_PLUGINS``."""

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path


def load_plugins(names: str | None = None) -> None:
    """Import the modules that register the user's parts; safe to call more than once.

    Args:
        names: comma-separated module names or paths of ``.py`` files; the value of the environment
            variable ``FOCAL_DET_PLUGINS`` if None.

    Raises:
        ImportError: an entry that cannot be found or that fails; it is named.
    """
    if names is None:
        names = os.environ.get("FOCAL_DET_PLUGINS", "")
    for entry in filter(None, (part.strip() for part in names.split(","))):
        try:
            if entry.endswith(".py"):
                _load_file(Path(entry).expanduser().resolve())
            else:
                importlib.import_module(entry)
        except Exception as error:
            raise ImportError(
                f"FOCAL_DET_PLUGINS: {entry!r}: {type(error).__name__}: {error}"
            ) from error


def _load_file(path: Path) -> None:
    # By its full path: two files of one name are two plugins.
    name = "focal_det_plugin_" + re.sub(r"\W", "_", str(path))
    if name in sys.modules:
        return
    if not path.is_file():
        raise ImportError(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # so that the next try does not take half a module for a whole one
        raise
