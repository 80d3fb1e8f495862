"""Work beside the training: one function in a thread of its own, its outcome fetched by whoever started it."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """Begins at once. The function may not communicate with other ranks; it does not keep the process alive when everything else has ended."""

    def __init__(self, function: Callable[[], T], name: str):
        self._function = function
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, within so many seconds from now."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Waits for the end; what the function returned, or raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]
