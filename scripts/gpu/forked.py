"""A part of the check in a process of its own, so that whatever befalls it, the other parts and its own results so far are kept.

An illegal access poisons a CUDA context, a failed capture PyTorch's allocator, a compiler that aborts takes its process along, and
a kernel may hang: none of that reaches the next part here. The parent must never have initialised CUDA, which a fork does not survive.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

Row = dict[str, Any]  # one result, as it goes into the JSON
Work = Callable[[float], Iterable[Row]]  # given the time.monotonic() seconds by which it must end


def run_forked(work: Work, limit_s: float, keep: Callable[[Row], None]) -> str | None:
    """Run `work` in a child process and hand every row that it yields to `keep`, here, at once.

    Returns:
        None if it came to its end, else why it did not: what it raised, the signal that ended it, or that `limit_s` were over.
    """
    end_s = time.monotonic() + limit_s
    receiver, sender = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        receiver.close()
        _work(work, end_s, sender)
    sender.close()
    try:
        while receiver.poll(max(end_s - time.monotonic(), 0)):
            what, value = receiver.recv()
            if what != "row":
                return value
            keep(value)
        return f"ran past {limit_s:.0f} s"
    except EOFError:
        return _how_it_ended(child)
    finally:
        receiver.close()
        _end(child)


def _work(work: Work, end_s: float, sender: Connection) -> NoReturn:
    os.setsid()  # what it starts ends with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    last: tuple[str, str | None] = ("ended", None)
    try:
        for row in work(end_s):
            sender.send(("row", row))
    except BaseException as failure:  # whatever it is, its sentence belongs in the results
        last = ("ended", first_line(failure))
    try:
        sender.send(last)
    finally:
        os._exit(0)


def _how_it_ended(child: int) -> str:
    """The child is gone without a word."""
    info = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # left to `_end` to collect
    if info is not None and info.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
        return f"ended by {signal.Signals(info.si_status).name}"
    return f"ended with status {info.si_status if info else 'unknown'}"


def _end(child: int) -> None:
    for target in (-child, child):  # its whole session; itself alone if it has not come to open one
        try:
            os.kill(target, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    os.waitpid(child, 0)


def first_line(failure: BaseException) -> str:
    """`RuntimeError: what is wrong`, without the lines that may follow."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0]
