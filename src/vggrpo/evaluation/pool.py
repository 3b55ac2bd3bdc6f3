"""A function over many videos in several processes, none of which can take the run down with it.

Processes are spawned (fork and threaded libraries don't mix) and each uses one thread. Where one dies, as it does when
the memory runs out or a library crashes, the videos that were under way are tried again one at a time; the one that
kills its process again is the culprit and yields `Died`, the others go on.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from vggrpo.evaluation.models import EvaluationModels

Job = TypeVar("Job")
Result = TypeVar("Result")


class Died(Exception):
    """Instead of a result: the process that worked on it ended."""


def each(
    function: Callable[[Job, EvaluationModels], Result], jobs: Sequence[Job], models: EvaluationModels, workers: int
) -> Iterator[tuple[Job, Result | Died]]:
    """Yield each job with its result, as they finish; with one worker, in order and in this process."""
    if workers <= 1 or not jobs:
        for job in jobs:
            yield job, function(job, models)
        return
    suspects: list[Job] = []
    waiting = deque(jobs)
    while waiting:
        yield from _until_broken(function, waiting, models, min(workers, len(jobs)), suspects)
        while suspects:  # one at a time, so that it is clear who did it
            suspect = suspects.pop(0)
            alone: list[Job] = []
            yield from _until_broken(function, deque([suspect]), models, 1, alone)
            if alone:
                yield suspect, Died("the process that measured it ended unexpectedly, often for want of memory")


def _until_broken(
    function: Callable[[Job, EvaluationModels], Result],
    waiting: deque[Job],
    models: EvaluationModels,
    workers: int,
    unfinished: list[Job],
) -> Iterator[tuple[Job, Result | Died]]:
    """Work off `waiting`; when a process dies, stop with the jobs that were under way in `unfinished`."""
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Result], Job] = {}
    with ProcessPoolExecutor(workers, context, _start, (function, models)) as pool:
        while waiting or running:
            try:
                with _interrupts_held():
                    while waiting and len(running) < workers:  # no queue: what isn't running can't be a suspect
                        running[pool.submit(_work, waiting[0])] = waiting[0]
                        waiting.popleft()
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = future.result()
                    yield running.pop(future), result
            except BrokenProcessPool:
                unfinished.extend(running.values())
                return


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches the processes too: those that start in here hold it back until `_start` lets them end of it."""
    resource_tracker.ensure_running()  # started in here, it would let interrupts through again
    held: list[int] = []
    ours = threading.current_thread() is threading.main_thread()  # no other gets interrupts
    # A thread of some library may take the signal, whose mask is not this thread's: Python would then raise here.
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if ours else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if ours:
            signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


_state: list[Any] = []  # the function and the models in a worker process, nothing elsewhere


def _start(function: Callable[[Any, EvaluationModels], Any], models: EvaluationModels) -> None:
    import cv2
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an end without a traceback; the first process says what happened
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    _state[:] = [function, models]


def _work(job: Any) -> Any:
    function, models = _state
    return function(job, models)
