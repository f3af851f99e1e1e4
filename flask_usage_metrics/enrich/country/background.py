"""Asks a source that may block, in a thread of its own: once an address, within limits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from threading import Condition, Thread, current_thread
from typing import Protocol
from weakref import finalize, ref

import msgspec

from flask_usage_metrics.enrich.country.answer import KNOWN, UNKNOWN, Answer
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.runtime.caches import ExpiringCache
from flask_usage_metrics.runtime.faults import Faults

THREAD_NAME = "flask_usage_metrics country"

_LINGER_SECONDS = 5.0
"""Seconds that connections to a service stay open for another question."""


class Reply(msgspec.Struct, frozen=True):
    """The reply of a blocking source.

    Attributes:
        country: A code of `ISO_CODES`; None: unknown.
        keep_seconds: How long not to ask again.
        ip_info: A JSON object; as text it is an eighth of the size of the dict, and whoever gets
            an answer gets a dict that nobody else changes.
    """

    country: str | None
    keep_seconds: float
    ip_info: bytes | None = None


class BlockingSource(Protocol):
    """A place to learn a country from that may block, such as a service."""

    @property
    def is_local(self) -> bool:
        """Whether a scrape may wait some milliseconds for it, as for a function of the app."""

    def accepts(self, address: str) -> bool:
        """Tell whether it may be asked for an address, now; never blocks."""

    def asking(self) -> AbstractContextManager[Callable[[str], Reply]]:
        """Return a context manager that yields the function to ask with; for one thread."""


class BackgroundLookup:
    """A `CountrySource` that answers None while a blocking source is being asked.

    `locate` is called by one thread at a time; the asking thread shares the condition with it.
    While there is no question, that thread refers to the lookup and its source weakly: an app may
    be dropped meanwhile.

    Args:
        source: The source to ask.
        answered: Notified when an answer arrived; its lock guards all that is shared.
        limits: Most questions, answers and threads, and how long they take.
        faults: Where failures are reported.
    """

    is_static = False

    def __init__(
        self, source: BlockingSource, answered: Condition, limits: Limits, faults: Faults
    ) -> None:
        self.is_local = source.is_local
        self.arrived = 0
        self._source = source
        self._limits = limits
        self._faults = faults
        self.reset_after_fork(answered)

    def reset_after_fork(self, answered: Condition) -> None:
        """Forget thread, questions and answers; the parent's thread may leave them half done."""
        self._answered = answered
        self._replies: ExpiringCache[str, Reply] = ExpiringCache(
            lambda reply: len(reply.ip_info or b""),
            most=self._limits.answers,
            most_weight=self._limits.answers_bytes,
        )
        self._deadlines: dict[str, float] = {}
        self._new_questions()
        self._thread: Thread | None = None
        self._asking_since: float | None = None
        self._left_behind: list[Thread] = []

    def locate(self, address: str | None, headers: tuple[str, ...], trusted: bool) -> Answer | None:
        """Return the kept answer; else ask once, and return None until the deadline."""
        if address is None:
            return UNKNOWN
        now = self._limits.clock()
        with self._answered:
            reply = self._replies.get(address, now)
            deadline = self._deadlines.get(address)
            late = reply is None and deadline is not None and now >= deadline
            if late:
                self._deadlines[address] = float("-inf")
        if reply is not None:
            if reply.ip_info is None:
                return UNKNOWN if reply.country is None else KNOWN[reply.country]
            return Answer(reply.country, msgspec.json.decode(reply.ip_info))
        if deadline is None:
            return self._ask(address, now)
        if not late:
            return None
        if deadline > float("-inf"):
            self._report("a slow country source did not answer in time")
        return UNKNOWN

    def next_deadline(self) -> float | None:
        """Return when the first question under way is given up; None without one. Hold the lock."""
        now = self._limits.clock()
        return min((moment for moment in self._deadlines.values() if moment > now), default=None)

    def close(self) -> None:
        """Forget all questions and end the thread; the next question starts another."""
        thread, self._thread = self._thread, None
        self._questions.put(None)
        self._new_questions()
        with self._answered:
            self._deadlines.clear()
            self._answered.notify_all()
        if thread is not None:
            thread.join(1.0)

    def _new_questions(self) -> None:
        self._questions: SimpleQueue[str | None] = SimpleQueue()
        finalize(self, self._questions.put, None).atexit = False

    # ---------------------------------------------------------------- the thread that calls locate

    def _ask(self, address: str, now: float) -> Answer | None:
        if not self._source.accepts(address):
            return UNKNOWN
        self._ensure_thread(now)
        with self._answered:
            full = len(self._deadlines) >= self._limits.questions
            if not full:
                self._deadlines[address] = now + self._limits.deadline_seconds
        if full:
            self._report("too many questions for a slow country source")
            return UNKNOWN
        self._questions.put(address)
        return None

    def _ensure_thread(self, now: float) -> None:
        # Raises RuntimeError when there can be no more threads, or at the interpreter's end.
        thread = self._thread
        if thread is not None and thread.is_alive():
            since = self._asking_since
            if since is None or now - since < self._limits.stuck_seconds:
                return
            # It may hang for ever, as in a socket without a timeout; and perhaps not the next one.
            self._left_behind = [left for left in self._left_behind if left.is_alive()]
            if len(self._left_behind) >= self._limits.stuck_threads:
                return
            self._left_behind.append(thread)
        self._thread = Thread(
            target=_run, args=(ref(self), self._questions), name=THREAD_NAME, daemon=True
        )
        self._asking_since = None
        self._thread.start()

    # ---------------------------------------------------------------- the thread that asks

    def ask_all(self, address: str, questions: SimpleQueue[str | None]) -> bool:
        """Ask for an address, and for all in the queue: those that follow soon, if of a service.

        Returns:
            Whether the thread goes on.
        """
        found: str | None = address
        linger = 0.0 if self.is_local else _LINGER_SECONDS
        with self._source.asking() as ask:
            while found is not None:
                self._asking_since = self._limits.clock()
                reply = None
                try:
                    if self._source.accepts(found):  # a pause may have begun
                        reply = ask(found)
                except BaseException as error:  # noqa: BLE001 - the app's, which may even exit()
                    self._faults.report("country", error, "a country is unknown")
                    reply = Reply(None, self._limits.keep_raised_seconds)
                self._take(found, reply)
                if self._thread is not current_thread():
                    return False  # left behind or closed; another one asks, if any
                self._asking_since = None
                try:
                    found = questions.get(timeout=linger)
                except Empty:
                    return True
        return False

    def _take(self, address: str, reply: Reply | None) -> None:
        with self._answered:
            self._deadlines.pop(address, None)
            if reply is not None:
                self._replies.put(address, reply, self._limits.clock() + reply.keep_seconds)
            self.arrived += 1
            self._answered.notify_all()

    def _report(self, what: str) -> None:
        self._faults.report("country", what, "a country is unknown")


def _run(find: ref[BackgroundLookup], questions: SimpleQueue[str | None]) -> None:
    while (address := questions.get()) is not None and (lookup := find()) is not None:
        if not lookup.ask_all(address, questions):
            return
        del lookup
