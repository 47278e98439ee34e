"""Work that goes on beside training: one thread, whose error is kept until it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs `work` in a thread that does not keep a dying process alive."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: Exception | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        """True once it ended with an error."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until it has ended; raise its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
