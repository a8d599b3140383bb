"""The team of several ranks: what rank 0 calls, all do."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from assay.pipelines import stopping
from assay.ranks.pulse import QUIET, Pulse, named
from assay.team import Team, find_function

T = TypeVar("T")

_POLL = 0.02
"""Seconds between two looks into the store."""

_PARTING = 5.0
"""Seconds that ranks have to part, when work is over, or was broken off at some of them only."""


class RankLostError(ChildProcessError):
    """A rank is gone, or was not heard of for too long."""


class Group(Team):
    """Ranks on one machine, that exchange tensors by gloo, or nccl where they are on GPUs.

    While rank 0 is at other work its followers wait for a call in torchrun's store, and in no
    exchange, whose wait would come to an end. The connections among the ranks are made by the first
    call.

    Args:
        rank: this one's number.
        size: ranks in all.
        connect: makes a connection to the store of all ranks.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Store]) -> None:
        self.rank, self.size = rank, size
        self._connect = connect
        self._store = connect()
        self._pulse = Pulse(self._store, rank, size, Team.timeout_seconds)
        self._calls = 0
        self._lock = threading.Lock()
        self._pulse.start()

    @property
    def timeout_seconds(self) -> float:
        """See `Team`. Followers hear rank 0's."""
        return self._pulse.timeout_seconds

    @timeout_seconds.setter
    def timeout_seconds(self, seconds: float) -> None:
        self._pulse.timeout_seconds = seconds

    def call(
        self,
        function: str,
        request: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        lead: Callable[[], Any] | None = None,
    ) -> Any:
        """See `Team.call`. Two threads' calls are one after the other."""
        with self._lock:
            number, self._calls = self._calls, self._calls + 1
            given = dict(tensors or {})
            payload = safetensors.torch.save(
                {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
            )
            order = {
                "function": function,
                "request": request,
                "bytes": len(payload),
                "timeout": self.timeout_seconds,
            }
            own, result = None, None
            try:
                text = json.dumps(order)
                self._store.set(f"call/{number}", text)
                self._open()
                self._broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
                if lead is not None:
                    result = lead()
                else:
                    result = find_function(function)(self, json.loads(text)["request"], given)
            except BaseException as error:  # it is raised below, or what caused it
                own = error
            self._settle(number, own)
            return result

    def _settle(self, number: int, own: BaseException | None) -> None:
        """Wait until all are done with a call, and raise what went wrong."""
        if own is not None and not isinstance(own, KeyboardInterrupt):
            self._store.set("failed", "0")
            _leave()  # so that nobody waits for this rank
        outcomes = self._outcomes(number, hurry=own is not None)
        failures = [each for each in outcomes.values() if each["kind"] in ("bad", "failed")]
        lost = isinstance(own, RankLostError)
        if own is not None and not lost and not isinstance(own, KeyboardInterrupt):
            raise own
        if failures:
            first = failures[0]
            kind = ValueError if first["kind"] == "bad" else ChildProcessError
            raise kind(f"rank {first['rank']}: {first['text']}") from None
        silent = [rank for rank in range(1, self.size) if rank not in outcomes]
        if silent:
            raise RankLostError(
                f"{named(silent)} of {self.size} is gone, or hangs: nothing is heard of it any"
                " more. The same command goes on from here"
            ) from None
        stopped = [each for each in outcomes.values() if each["kind"] == "stopped"]
        if stopped and stopped[0]["signal"] is not None:
            stopping.ask(stopped[0]["signal"])
        if stopped or isinstance(own, KeyboardInterrupt):
            raise KeyboardInterrupt
        if own is not None:
            raise own

    def _outcomes(self, number: int, *, hurry: bool) -> dict[int, dict[str, Any]]:
        """What became of a call at each follower; those that are not heard of are left out."""
        found: dict[int, dict[str, Any]] = {}
        waiting = set(range(1, self.size))
        began = time.monotonic()
        while waiting:
            for rank in sorted(waiting):
                key = f"done/{number}/{rank}"
                if self._store.check([key]):
                    found[rank] = json.loads(self._store.get(key))
                    waiting.discard(rank)
                elif self._pulse.silence(rank) > self._patience(
                    hurry=hurry or stopping.stop_is_asked()
                ):
                    waiting.discard(rank)
            if hurry and time.monotonic() - began > _PARTING:
                _leave()  # those that wait for this one shall not
            if hurry and time.monotonic() - began > self.timeout_seconds:
                break
            if waiting:
                time.sleep(_POLL)
        return found

    def _patience(self, *, hurry: bool) -> float:
        """Seconds of silence after which a rank is lost."""
        return min(self.timeout_seconds, _PARTING) if hurry else self.timeout_seconds

    def follow(self) -> None:
        """Do what rank 0 calls, until it ends. On the other ranks.

        Raises:
            RankLostError: rank 0 is gone.
        """
        with stopping.fit_in_progress():  # a stop is for what is called; rank 0 says when to end
            number = 0
            while (order := self._next(number)) is not None:
                outcome = self._serve(order)
                self._store.set(f"done/{number}/{self.rank}", json.dumps(outcome))
                number += 1
        self._store.set(f"bye/{self.rank}", "")

    def _next(self, number: int) -> dict[str, Any] | None:
        """What rank 0 calls next, None where it has ended."""
        began = time.monotonic()
        while not self._store.check([f"call/{number}"]):
            if self._store.check(["end"]):
                return None
            patience = self._patience(hurry=stopping.stop_is_asked())
            if self._pulse.silence(0) > patience:
                raise RankLostError(
                    f"rank 0 is gone, or was not heard of for {patience:.0f} s, so rank"
                    f" {self.rank} ends"
                )
            if stopping.stop_is_asked() and time.monotonic() - began > _PARTING:
                _leave()  # those that wait for this one shall not
            time.sleep(_POLL)
        order: dict[str, Any] = json.loads(self._store.get(f"call/{number}"))
        return order

    def _serve(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is called; what became of it."""
        try:
            self.timeout_seconds = order["timeout"]
            self._open()
            payload = torch.empty(order["bytes"], dtype=torch.uint8)
            self._broadcast(payload)
            tensors = safetensors.torch.load(payload.numpy().tobytes())
            with stopping.heeded():
                find_function(order["function"])(self, order["request"], tensors)
        except KeyboardInterrupt:
            return {"rank": self.rank, "kind": "stopped", "signal": stopping.signal_that_came()}
        except BaseException as error:  # rank 0 raises it
            self._store.set("failed", str(self.rank))
            _leave()
            lost = isinstance(error, RankLostError)
            kind = (
                "lost" if lost else "bad" if isinstance(error, ValueError | OSError) else "failed"
            )
            if kind == "failed":
                traceback.print_exception(error)
            text = str(error) if kind == "bad" else f"{type(error).__name__}: {error}"
            return {"rank": self.rank, "kind": kind, "text": text}
        return {"rank": self.rank, "kind": "done"}

    def end(self) -> None:
        """Let the followers go. On rank 0."""
        with suppress(dist.DistError):  # torchrun's store may be gone
            self._store.set("end", "")
            expiry = time.monotonic() + _PARTING
            while time.monotonic() < expiry and not all(
                self._store.check([f"bye/{rank}"]) or self._pulse.silence(rank) == math.inf
                for rank in range(1, self.size)
            ):
                time.sleep(_POLL)
        self.close()

    def close(self) -> None:
        """Give up the connections of this rank."""
        self._pulse.stop()
        _leave()

    def _open(self) -> None:
        """Connect to the other ranks."""
        if dist.is_initialized():
            return
        # One machine: no name service is asked, and no other network is used.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("group", self._connect()),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self.timeout_seconds),
            )
        except (RuntimeError, dist.DistError) as error:
            self._raise_lost(error)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `Team.all_gather`."""
        own = torch.tensor([len(tensor)], device=tensor.device)
        lengths = torch.cat(self._exchanged(lambda: _gathered(own, self.size))).tolist()
        padded = _padded(tensor, max(lengths))
        found = self._exchanged(lambda: _gathered(padded, self.size))
        return [each[:n] for each, n in zip(found, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        """See `Team.any`."""
        flags = torch.tensor([flag], dtype=torch.uint8)
        self._exchanged(lambda: dist.all_reduce(flags, dist.ReduceOp.MAX))
        return bool(flags.item())

    def _broadcast(self, payload: Tensor) -> None:
        if len(payload):
            self._exchanged(lambda: dist.broadcast(payload, 0))

    def _exchanged(self, exchange: Callable[[], T]) -> T:
        self._pulse.entered += 1
        try:
            return exchange()
        except (RuntimeError, ValueError, dist.DistError) as error:
            self._raise_lost(error)

    def _raise_lost(self, error: Exception) -> NoReturn:
        """Name the rank that keeps this one waiting no more, or too long."""
        expiry = time.monotonic() + 1.5 * QUIET
        while not self._store.check(["failed"]) and time.monotonic() < expiry:
            if self._pulse.silent():  # one that was killed is from now on
                break
            time.sleep(_POLL)
        raise RankLostError(
            f"{named(self._pulse.suspects())} of {self.size} is gone, or hangs: rank {self.rank}"
            f" waited for {self.timeout_seconds:.0f} s at the most ({str(error).splitlines()[0]})."
            " The same command goes on from here"
        ) from None


def _leave() -> None:
    """Close the connections to the other ranks: whoever waits for this one does so no more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor.contiguous()
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


def _gathered(tensor: Tensor, size: int) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(found, tensor)
    return found
