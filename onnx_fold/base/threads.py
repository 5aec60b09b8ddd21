"""Two computations at a time: while one reads, rounds or decides, the other has the processor."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from threadpoolctl import threadpool_limits

__all__ = ["once", "processors", "two_at_a_time"]

T = TypeVar("T")


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _OneCoreEach:
    """Products of the process take one core, as long as anyone is inside."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._inside = 0
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._turn:
            if not self._inside:
                self._limits = threadpool_limits(1, "blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


_ONE_CORE_EACH = _OneCoreEach()


@contextlib.contextmanager
def two_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """Threads for two computations. Products in them use all cores, and one where there are two.

    A product gives each of its threads an equal share and waits for the last one: beside another
    computation that is the thread whose core is taken. While this runs, products of the whole
    process are limited so.
    """
    threads = ThreadPoolExecutor(2)
    with _ONE_CORE_EACH if processors() <= 2 else contextlib.nullcontext():
        try:
            yield threads
        finally:
            threads.shutdown(cancel_futures=True)


class once(Generic[T]):  # noqa: N801 - a decorator
    """A property that is worked out when it is first asked for; threads that ask meanwhile wait.

    The lock is that of one object: ``functools.cached_property`` has none, and in Python 3.11 one
    for all objects of a class.
    """

    def __init__(self, find: Callable[[Any], T]) -> None:
        self.__doc__ = find.__doc__
        self._find = find
        self._name = find.__name__

    def __get__(self, instance: object, owner: object = None) -> T:
        held = vars(instance)
        with held.setdefault(f"{self._name} is worked out", threading.RLock()):
            if self._name not in held:
                held[self._name] = self._find(instance)
        found: T = held[self._name]
        return found
