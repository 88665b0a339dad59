"""A researcher's own .py file as a module that runs once in a process.

Knows nothing of cells; __init__.py finds the cell in the module.
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import ModuleType

from seqlm.errors import InputError

_ONE_AT_A_TIME = RLock()  # sys.path is the whole process's


def module_of(path: Path) -> ModuleType:
    """The module of the file, which runs again only if its text has changed.

    The module stands in sys.modules, as @dataclass and pickle need it.  A file beside it can be
    imported while it runs.
    """
    try:
        if not path.is_file():
            raise InputError(f"The cell file {path} does not exist. Check the path.")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"Cannot read the cell file {path}: {error.strerror}. Check its permissions."
        ) from error
    identity = hashlib.sha256(os.fsencode(path.resolve()) + b"\0" + text).hexdigest()
    name = f"seqlm_cell_{path.stem}_{identity[:16]}"
    with _ONE_AT_A_TIME:
        if name not in sys.modules:
            _run(path, text, name)
        return sys.modules[name]


def _run(path: Path, text: bytes, name: str) -> None:
    """Put the module into sys.modules; InputError if the file raises."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path  # None only for a name that ends in no known suffix
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with _importable(path.resolve().parent):
            # not spec.loader, which may take bytecode of the same second and size for this text
            exec(compile(text, path, "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        # the researcher's code: whatever it raises is a fault of the file, but not Ctrl-C
        if not isinstance(error, Exception | SystemExit):
            raise
        raise InputError(
            f"The cell file {path} cannot be imported: {type(error).__name__}: {error}. Correct "
            "it; --debug shows where."
        ) from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Files of the folder can be imported in the block.

    Afterwards sys.path is as before, and sys.modules has none of them: another cell's folder may
    have a file of the same name.
    """
    before = {*sys.modules}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # the file beside it may be new
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in sys.modules.keys() - before:
            origin = getattr(sys.modules[name], "__file__", None)
            # site-packages may lie in a folder below, so only files of the folder itself
            if origin and Path(origin).parent == folder and not name.startswith("seqlm_cell_"):
                del sys.modules[name]
