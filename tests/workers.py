"""Ranks for tests: one pool of gloo processes per world size, started at first use and kept for the whole session.

A task is a function at the top level of a test file; it runs on all ranks, and what it returns or raises comes back. A
pool in which anything failed is killed, as its ranks may wait for each other; the next task starts a new one. Processes
are forked from a server that has imported torch and Lightning once, so a new pool costs about a second.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 120.0
"""Seconds that a task may take."""
GRACE = 15.0
"""Seconds that the other ranks have to end once one has failed."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "pytorch_lightning", "lightning.pytorch", "peft"])


class RanksFailed(Exception):
    """A task raised on at least one rank.

    Attributes:
        errors: What each rank raised, as ``Type: message`` and its traceback; None where it returned.
    """

    def __init__(self, errors: list[str | None]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"rank {r}: {e}" for r, e in enumerate(errors) if e is not None))


class Pool:
    """Processes that form one gloo group, with the environment that `torchrun` would give them.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.mkdtemp(prefix="ranks-")
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs, rank, size, self.folder), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether all ranks can take a task."""
        return bool(self.processes) and all(p.is_alive() for p in self.processes)

    def run(self, task: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Runs ``task(*args)`` on all ranks and returns what each returned, in rank order.

        Raises:
            RanksFailed: If a rank raised, died, or did not end in time; the pool is killed then.
        """
        order = pickle.dumps((Path(inspect.getfile(task)).stem, task.__qualname__, args))
        pending = dict(zip(self.connections, range(self.size), strict=True))
        results: list[Any] = [None] * self.size
        errors: list[str | None] = [None] * self.size
        deadline = time.monotonic() + timeout
        for connection in self.connections:
            connection.send_bytes(order)
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in pending.values():
                    errors[rank] = "TimeoutError: did not end in time"
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                errors[rank], results[rank] = _receive(connection)
                if errors[rank] is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if any(errors):
            self.close()
            raise RanksFailed(errors)
        return results

    def close(self) -> None:
        """Kills all ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []
        shutil.rmtree(self.folder, ignore_errors=True)


def _receive(connection: Connection) -> tuple[str | None, Any]:
    try:
        answer: tuple[str | None, Any] = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return "ProcessDied: killed, or crashed", None
    return answer


_pools: dict[int, Pool] = {}


def ranks(size: int) -> Pool:
    """The pool of ``size`` ranks: the one of this session, or a new one if that is gone."""
    if size not in _pools or not _pools[size].alive:
        if size in _pools:
            _pools[size].close()
        _pools[size] = Pool(size)
    return _pools[size]


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()


def fork(task: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> int | None:
    """Runs ``task(*args)`` in a process of its own and returns its exit code: -9 if it was killed.

    Raises:
        TimeoutError: If it did not end in time.
    """
    stem = Path(inspect.getfile(task)).stem
    process = _context.Process(target=_call, args=(stem, task.__qualname__, args), daemon=True)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join(10)
        raise TimeoutError(f"{task.__qualname__} did not end in {timeout} s")
    return process.exitcode


def _call(stem: str, name: str, args: Any) -> Any:
    _quiet()
    return getattr(importlib.import_module(stem), name)(*args)


def _quiet() -> None:
    import logging
    import warnings

    import torch

    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def _serve(connection: Connection, rank: int, size: int, folder: str) -> None:
    """The life of a rank: joins the group, then does what comes through ``connection`` until that is closed."""
    import torch.distributed as dist

    _quiet()
    elastic = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    os.environ.update({k: str(v) for k, v in elastic.items()})
    # A file tells the ranks of each other, so no port is chosen that another program may take meanwhile.
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "tests"})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            stem, name, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer: tuple[str | None, Any] = (None, getattr(importlib.import_module(stem), name)(*args))
        except BaseException as error:  # SystemExit too: a rank goes on until it is killed
            answer = (f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None)
        connection.send_bytes(pickle.dumps(answer))
