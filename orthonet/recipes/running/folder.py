"""The folder of a run: one run at a time, and all that it needs is there before it starts."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import torch
from torch import distributed as dist

from orthonet import _checks
from orthonet.recipes.data.digits import require_package
from orthonet.recipes.running.log import writer_class
from orthonet.recipes.running.processes import rank_and_size

__all__ = ["claimed", "guarded", "require_device"]

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")
_HELD: set[Path] = set()
_GUARD = threading.Lock()


def guarded(run: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """Decorate the `run` of a recipe: claim its folder, and refuse at once what would fail later.

    `run` takes the configuration first, of the class that its annotation names, and the folder.
    Where the configuration has a field `device`, this machine must have that device; matplotlib
    must be installed, and TensorBoard if the keyword `tensorboard` is true.
    """

    @functools.wraps(run)
    def wrapper(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        bound = inspect.signature(run).bind(*args, **kwargs)
        (name, config), (_, out) = list(bound.arguments.items())[:2]
        wanted = typing.get_type_hints(run)[name]
        _checks.require(
            isinstance(config, wanted),
            run.__name__,
            f"{name} must be a {wanted.__name__}",
            f"Call {run.__name__}({wanted.__name__}(...), folder)",
            **{name: config},
        )
        _checks.require(
            isinstance(out, (str, os.PathLike)),
            run.__name__,
            "out must name a folder",
            'Pass e.g. out="runs/mine"',
            out=out,
        )
        require_package("matplotlib", "matplotlib")
        if kwargs.get("tensorboard"):
            writer_class()
        require_device(getattr(config, "device", "cpu"))
        with claimed(Path(out)):
            return run(*args, **kwargs)

    return wrapper


def require_device(device: str) -> None:
    """Require that this machine has a device.

    Raises:
        ValueError: It has not.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = "cpu" if here is None else f"cpu or {here.type}"
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    good = found is not None and found.type == "cpu"
    if found is not None and here is not None and found.type == here.type:
        good = (found.index or 0) < torch.accelerator.device_count()
    _checks.require(
        good, "orthonet", "device must be one of this machine", f"Choose {known}", device=device
    )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Make a folder and keep other runs out of it; of several processes, the first one does so.

    The operating system holds the claim and drops it when the process dies, however it dies.

    Raises:
        BlockingIOError: Another run uses the folder.
        OSError: The folder cannot be made or written to.
    """
    joined = dist.is_available() and dist.is_initialized()
    if (rank_and_size()[0] if joined else int(os.environ.get("RANK", "0"))) != 0:
        yield folder
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        _checks.fail(
            "orthonet",
            "out must be a folder, or the name of a new one",
            "Choose another name: a file has this one",
            NotADirectoryError,
            out=str(folder),
        )
    place = folder.resolve()
    with _GUARD:
        mine = place not in _HELD
        _HELD.add(place)
    if not mine:
        _refuse(folder, str(os.getpid()))
    try:
        with _locked(folder):
            yield folder
    finally:
        with _GUARD:
            _HELD.discard(place)
        if made:
            with contextlib.suppress(OSError):  # it holds results
                folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / ".lock"
    while True:
        file = path.open("a+")
        if not _lock(file):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            _refuse(folder, holder)
        # The run that held the lock may have removed the file after it was opened here.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        file.close()


def _lock(file: IO[str]) -> bool:
    """Lock a file, without waiting; unlike `flock`, children do not hold the lock as well."""
    try:
        import fcntl
    except ImportError:
        return _lock_windows(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _lock_windows(file: IO[str]) -> bool:
    import msvcrt

    module: Any = msvcrt
    try:
        file.seek(2**20)  # beyond the text, which others may read
        module.locking(file.fileno(), module.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def _refuse(folder: Path, process: str) -> None:
    _checks.fail(
        "orthonet",
        "only one run at a time may use a folder",
        "Wait for the other run or stop it, or name another folder with --out",
        BlockingIOError,
        folder=str(folder),
        process=process,
    )
