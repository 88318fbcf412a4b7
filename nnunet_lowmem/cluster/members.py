"""Which workers there are, and whether each gives the labels that the command's own machine would give."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_lowmem.cluster.tasks import GPU, MEMORY, Described, describe, machine
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.names import shown
from nnunet_lowmem.sizes import format_gib

logger = logging.getLogger(__name__)

# how long a scheduler may take to say who is there
_ANSWER_S = 10.0
# processes are told apart by it, where a new one has the address of one that has gone
_OWN = "local_directory"


@dataclass(frozen=True)
class Member:
    """One worker.

    Attributes
    ----------
    address, process, name : str
    memory_bytes : int
        That a case may take; 0 where nothing limits it.
    resources : tuple of (str, float)
        Which of its resources a task of ours takes: all of its memory, and a graphics card.
    is_ready : bool
        It takes tasks; one that is paused or about to end does not.
    on_machine : int
        Workers of the cluster that share its machine, itself among them.
    """

    address: str
    process: str
    name: str
    memory_bytes: int
    resources: tuple[tuple[str, float], ...]
    is_ready: bool
    on_machine: int = 1

    @property
    def limit(self) -> float:
        """Bytes that a case may take."""
        return self.memory_bytes or float("inf")

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from a worker that begins in its place."""
        return self.address, self.process

    def in_words(self) -> str:
        """Name it, with its memory."""
        return f"{self.name} ({format_gib(self.memory_bytes)})" if self.memory_bytes else self.name


class Members:
    """The workers of a cluster that have said, once each, what they are.

    Parameters
    ----------
    client : distributed.Client
    folders : sequence of Path
        Which each has to see.
    model_folder : Path
    device : str
        Type of the network's device.
    allows_mixed : bool
        Workers may differ from this machine, and labels with them.
    """

    def __init__(
        self, client: Any, folders: Sequence[Path], model_folder: Path, device: str, allows_mixed: bool
    ) -> None:
        self._client, self._needs_gpu, self._allows_mixed = client, device == "cuda", allows_mixed
        self._arguments = list(folders), model_folder
        self._due = self._compared(machine())
        self._card: str | None = None
        self._asked: dict[tuple[str, str], Any] = {}
        self._told: dict[tuple[str, str], Described] = {}
        self._refused: set[tuple[str, str]] = set()
        self._unfetched: Counter[tuple[str, str]] = Counter()
        self._by_gpu = False
        #: Whether a worker that does not do ends the command; later it is left out.
        self.is_strict = True

    @property
    def is_waiting(self) -> bool:
        """Whether somebody has not answered yet."""
        return bool(self._asked)

    def refuse(self, member: Member, why: object) -> None:
        """Leave a worker out from now on."""
        logger.warning("worker %s is left out: %s", member.in_words(), why)
        self._refused.add(member.key)

    def now(self) -> list[Member]:
        """Return the workers there are that will do, those with most memory first; who is new is asked first.

        Raises
        ------
        UsageError
            If one, at the beginning, does not see the output or the model, or would give other labels.
        OSError, TimeoutError
            If the scheduler does not answer.
        """
        # what `scheduler_info` returns may be of none, since Dask's client asks beside us for its own purposes
        identity, client = self._client.scheduler.identity, self._client
        known = {
            (address, str(told.get(_OWN))): told
            for address, told in client.sync(identity, n_workers=-1, callback_timeout=_ANSWER_S)["workers"].items()
        }
        for key in [key for key in self._asked if key not in known]:
            client.cancel([self._asked.pop(key)], force=True)
        self._by_gpu = self._by_gpu or (self._needs_gpu and any(map(_states_gpu, known.values())))
        if self._by_gpu:  # others are not asked, nor do they take anything from now on
            known = {key: told for key, told in known.items() if _states_gpu(told)}
        for key in known.keys() - self._asked.keys() - self._told.keys() - self._refused:
            self._asked[key] = client.submit(
                describe, *self._arguments, workers=[key[0]], allow_other_workers=False, pure=False
            )
        for key, future in list(self._asked.items()):
            if future.done():
                del self._asked[key]
                self._hear(key, known[key], future)
        hosts = Counter(str(told.get("host")) for told in known.values())
        usable = [key for key in known if key in self._told and key not in self._refused]
        there = [self._member(key, known[key], hosts[str(known[key].get("host"))]) for key in usable]
        return sorted(there, key=lambda member: -member.limit)

    def _hear(self, key: tuple[str, str], known: Mapping[str, Any], future: Any) -> None:
        if future.status == "error":
            error = future.exception()
            told = shown(" ".join(str(error).split()) or type(error).__name__)
            self._turn_away(key, f"worker {_name(known)} at {key[0]} cannot run nnunet_lowmem: {told}")
        elif future.status == "finished":
            try:
                answer: Described = future.result(timeout=_ANSWER_S)
            except Exception as error:  # it has gone, or nobody reaches it
                self._unfetched[key] += 1
                if self._unfetched[key] > 1:
                    self._turn_away(key, f"worker {_name(known)} at {key[0]} cannot be reached: {error}")
                return
            self._told[key] = answer
            if answer.unseen:
                self._turn_away(
                    key,
                    f"worker {_name(known)} does not see {', '.join(answer.unseen)}: images, model and output have to "
                    "be on storage that all workers see under the same path",
                )
            else:
                self._compare(key, _name(known), answer)

    def _compare(self, key: tuple[str, str], name: str, answer: Described) -> None:
        due, found = self._due, self._compared(answer.machine)
        if self._needs_gpu:
            self._card = self._card or answer.machine["cuda"]
            due, found = due | {"cuda": self._card}, found | {"cuda": answer.machine["cuda"]}
        if due == found:
            return
        table = _table([("this machine", due), (f"worker {name}", found)])
        if self._allows_mixed:
            logger.warning("a worker differs from this machine, and its labels may:\n%s", table)
            return
        self._turn_away(
            key,
            f"worker {name} differs from this machine, so its labels may differ, too:\n{table}\nGive --allow-mixed to "
            "accept that, or use workers that are alike",
        )

    def _turn_away(self, key: tuple[str, str], why: str) -> None:
        if self.is_strict:
            raise UsageError(why)
        logger.warning("left out: %s", why)
        self._refused.add(key)

    def _member(self, key: tuple[str, str], known: Mapping[str, Any], on_machine: int) -> Member:
        stated = dict(known.get("resources") or {})
        wanted = {MEMORY: stated[MEMORY]} if MEMORY in stated else {}
        if self._needs_gpu and stated.get(GPU):
            wanted[GPU] = 1
        is_ready = known.get("status", "running") == "running"
        return Member(*key, _name(known), self._told[key].memory_bytes, tuple(wanted.items()), is_ready, on_machine)

    def _compared(self, told: Mapping[str, str]) -> dict[str, str]:
        # a submitting machine need not have the graphics card, and the processor is not what computes beside one
        left_out = ("cuda", *(("processor", "oneDNN") if self._needs_gpu else ()))
        return {name: value for name, value in told.items() if name not in left_out}


def _states_gpu(known: Mapping[str, Any]) -> bool:
    return bool((known.get("resources") or {}).get(GPU))


def _name(known: Mapping[str, Any]) -> str:
    return shown(str(known.get("name", "")))


def _table(rows: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Say who has what, of what is not the same everywhere."""
    names = [name for name in rows[0][1] if len({row.get(name) for _, row in rows}) > 1]
    lines = [["", *names], *([who, *(row.get(name, "") for name in names)] for who, row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
