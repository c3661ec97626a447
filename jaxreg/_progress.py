"""What the user sees and may do while recipes run: a progress bar, and Ctrl-C."""

import signal
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.text import Text


class CtrlC:
    """Notes Ctrl-C, for `check` to raise KeyboardInterrupt at a safe point.

    Raised amid JAX's tracing or in a callback of its, the exception crashes Python or gets lost.
    A second Ctrl-C does not wait.
    """

    def __init__(self):
        self.pressed = False

    def __enter__(self) -> "CtrlC":
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: Any) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raises KeyboardInterrupt where Ctrl-C was pressed."""
        if self.pressed:
            raise KeyboardInterrupt


class RecipeProgress:
    """One bar for all recipes, on the error stream; the epochs of the recipe that runs move it."""

    def __init__(self, recipes: int, epochs: int, ctrl_c: CtrlC):
        self._bar = Progress(
            _Activity(ctrl_c),
            BarColumn(),
            "{task.percentage:3.0f}%",
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=recipes * epochs)
        self._epochs = epochs
        self._ctrl_c = ctrl_c
        self._started = 0

    def __enter__(self) -> "RecipeProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, recipe: str) -> Callable[[int], None]:
        """Begins a recipe; returns the function to call with the epochs it has done.

        Both raise KeyboardInterrupt where Ctrl-C was pressed.
        """
        before = self._started * self._epochs
        self._started += 1
        self._show(f"{recipe} (compiling)", before)
        return lambda done: self._show(recipe, before + done)

    def _show(self, activity: str, epochs: int) -> None:
        self._ctrl_c.check()
        self._bar.update(self._task, description=activity, completed=epochs)


class _Activity(ProgressColumn):
    """What goes on: it tells at once that Ctrl-C was heard."""

    def __init__(self, ctrl_c: CtrlC):
        super().__init__()
        self._ctrl_c = ctrl_c

    def render(self, task: Task) -> Text:
        activity = "stopping" if self._ctrl_c.pressed else task.description
        return Text(f"{activity:27s}")  # as wide as "label_smoothing (compiling)"
