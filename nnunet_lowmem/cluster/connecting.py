"""The way to a cluster: one that runs, by its address or file, or workers in this machine, which end with the block."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nnunet_lowmem.budget.machine import ram_limit
from nnunet_lowmem.errors import UsageError, because
from nnunet_lowmem.options import Options
from nnunet_lowmem.sizes import format_gib
from nnunet_lowmem.system.platform import usable_cores

logger = logging.getLogger(__name__)

# of a process with its libraries and a small model
_LEAST_BYTES = 2**30
# for a scheduler that begins at the same time
_PATIENCE_S = 30.0
#: Dask's own variable for the address.
ADDRESS_VARIABLE = "DASK_SCHEDULER_ADDRESS"
# memory rules by the resident set, which counts mapped files and libraries: our own budget is what binds
_MEMORY_RULES = {f"distributed.worker.memory.{rule}": False for rule in ("target", "spill", "pause", "terminate")}


@contextmanager
def connected(options: Options) -> Iterator[Any]:
    """Give a client of the cluster that is asked for; one that was given stays open.

    Raises
    ------
    UsageError
        If Dask is not installed, the wishes contradict each other, or nobody answers.
    """
    ways = [options.scheduler, options.scheduler_file, options.workers, options.client]
    if sum(way is not None for way in ways) > 1:
        raise UsageError("--scheduler, --scheduler-file, --workers and client exclude each other: give one")
    if options.client is not None:
        if getattr(options.client, "asynchronous", False):
            raise UsageError("client is asynchronous: give one that waits for its answers")
        if options.client.status != "running":
            raise UsageError(f"client is {options.client.status}: give one that is connected")
        yield options.client
        return
    distributed = _dask()
    if options.workers is not None:
        if options.tls_ca_file or options.tls_cert or options.tls_key:
            raise UsageError("--workers are reached from this machine alone: no --tls flags")
        with (
            _workers_here(int(options.workers), options) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
        ):
            yield client
        return
    address = options.scheduler or os.environ.get(ADDRESS_VARIABLE)
    if options.scheduler is not None and not address:
        raise UsageError(f"--scheduler needs an address, tcp://HOST:PORT, here or in {ADDRESS_VARIABLE}")
    where = {"address": address}
    if options.scheduler_file is not None:
        where = {"scheduler_file": os.fspath(options.scheduler_file)}
        _wait_for(Path(options.scheduler_file))
    try:
        client = distributed.Client(**where, security=_security(options), set_as_default=False, timeout=_PATIENCE_S)
    except (OSError, ValueError, TypeError) as error:  # the last of a scheduler that asks for certificates
        reason = str(error) or type(error).__name__
        raise because(
            UsageError, f"no scheduler answers at {options.scheduler_file or address}: {reason}", error
        ) from error
    with client:
        yield client


def _wait_for(file: Path) -> None:
    """Wait until a scheduler that begins has written its file; Dask's client would for ever."""
    until = time.monotonic() + _PATIENCE_S
    while not file.exists():
        if time.monotonic() > until:
            raise UsageError(f"--scheduler-file: {file} is not there, so no scheduler has begun")
        time.sleep(0.1)


def _dask() -> Any:
    return import_module("distributed")  # which nobody else loads, and ships few types


def _security(options: Options) -> Any:
    """Return Dask's TLS settings; without ours its configuration stands."""
    files = {
        "tls_ca_file": options.tls_ca_file,
        "tls_client_cert": options.tls_cert,
        "tls_client_key": options.tls_key,
    }
    given = {name: os.fspath(file) for name, file in files.items() if file is not None}
    return _dask().Security(**given, require_encryption=True) if given else None


@contextmanager
def _workers_here(count: int, options: Options) -> Iterator[Any]:
    """Start workers in this machine, each with its share of memory and cores."""
    if count < 1:
        raise UsageError(f"--workers must be at least 1, got {count}")
    limit, in_use = ram_limit(options.max_ram)
    share = 0 if limit is None else max(0, limit - in_use) // count
    if limit is not None and share < _LEAST_BYTES:
        raise UsageError(
            f"--workers {count}: of {format_gib(limit)} this process has {format_gib(in_use)}, which leaves "
            f"{format_gib(share)} for each; a worker needs {format_gib(_LEAST_BYTES)} before it has a case"
        )
    cores = max(1, usable_cores() // count)
    logger.info("%d workers in this machine, each with %d cores and %s", count, cores, format_gib(share))
    with (
        import_module("dask").config.set(_MEMORY_RULES),
        _dask().LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            memory_limit=share,
            dashboard_address=None,
            local_directory=None if options.tmp_dir is None else os.fspath(options.tmp_dir),
            silence_logs=40,
        ) as cluster,
    ):
        yield cluster
