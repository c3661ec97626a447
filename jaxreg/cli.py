"""The command line: ``jaxreg compare``.

Bad input ends with exit status 2 and one line that names the argument; Ctrl-C with 130, after
the recipes that are finished have been written down.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jaxreg
from jaxreg import _check

if TYPE_CHECKING:
    from jaxreg.comparison import Outcome

INTERRUPTED = 130
TABLE_WIDTH = 100


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except _check.ArgumentError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name in ("flax", "jinja2", "matplotlib", "rich", "sklearn"):
            return _fail(f"the package {error.name} is missing: pip install 'jaxreg[cli]'")
        raise


def _fail(message: str) -> int:
    print(f"jaxreg: error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxreg", description=jaxreg.__doc__)
    parser.add_argument("--version", action="version", version=f"jaxreg {jaxreg.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="which regularizer helps on my data, and how much?",
        description="Trains the same Flax model under each recipe over several seeds, and shows "
        "which regularizer helps: a table here, and a report with plots in a folder.",
    )
    compare.set_defaults(run=_compare)
    add = compare.add_argument
    add(
        "--data",
        default="digits",
        metavar="NAME|FILE",
        help="digits (default), breast_cancer, wine, diabetes, mnist1d, or a file: .npz with "
        "arrays x and y, or .csv with a header row",
    )
    add("--target", metavar="COLUMN", help="the column of a .csv file to predict")
    add(
        "--task",
        default="auto",
        choices=("auto", "classification", "regression"),
        help="what the target of a file is (default: told from its values)",
    )
    add("--train-size", type=_whole, metavar="N", help="train on N rows; fewer overfit more")
    add(
        "--label-noise",
        type=_number,
        default=0.0,
        metavar="SHARE",
        help="share of training labels to corrupt, in [0, 1)",
    )
    add("--model", default="mlp", choices=("linear", "mlp", "cnn"), help="default: mlp")
    add("--recipes", nargs="+", metavar="NAME", help="some of the recipes (default: all)")
    add(
        "--strength",
        nargs="+",
        type=_assignment,
        default=[],
        metavar="RECIPE=VALUE",
        help="strengths other than the recipes' own, such as l1_prox=3e-4",
    )
    add("--seeds", type=_whole, metavar="N", help="repetitions, lanes of one program (default: 5)")
    add("--epochs", type=_whole, metavar="N", help="passes over the training rows (default: 100)")
    add("--batch-size", type=_whole, default=64, metavar="N", help="rows a step (default: 64)")
    add(
        "--learning-rate",
        type=_number,
        default=3e-3,
        metavar="RATE",
        help="Adam's peak rate (default: 0.003)",
    )
    add("--quick", action="store_true", help="a short look: 2 seeds and 10 epochs")
    add(
        "--out",
        type=Path,
        default=Path("jaxreg-report"),
        metavar="FOLDER",
        help="folder for the report (default: jaxreg-report); an earlier report there is kept "
        "under a new name",
    )
    return parser


def _compare(options: argparse.Namespace) -> int:
    folder = _ReportFolder(options.out)
    folder.check()

    # Imported late: help, and errors in what is above, should not wait for JAX.
    from rich.console import Console

    from jaxreg import comparison, data, report, training

    dataset = data.load(options.data, target=options.target, task=options.task)
    recipes = comparison.choose(_recipe_names(options.recipes), dict(options.strength), dataset.task)
    if options.model == "cnn" and dataset.x.ndim == 2:
        given = f"'cnn' for a table of {dataset.x.shape[1]} columns"
        raise _check.ArgumentError("--model", given, "linear or mlp; cnn for images and sequences")
    seeds = options.seeds or (2 if options.quick else 5)
    epochs = options.epochs or (10 if options.quick else 100)
    settings = training.Settings(epochs, options.batch_size, options.learning_rate)
    split = data.split(
        dataset, train_size=options.train_size, label_noise=options.label_noise, seeds=seeds
    )
    described = {
        "data": options.data,
        "target": options.target,
        "task": options.task,
        "train_size": options.train_size,
        "label_noise": options.label_noise,
        "model": options.model,
        "recipes": [recipe.name for recipe, _ in recipes],
        "strength": dict(options.strength),
        "seeds": seeds,
        "epochs": epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }

    finished: list[Outcome] = []

    def results(status: str) -> dict[str, Any]:
        records = [outcome.record for outcome in finished]
        return comparison.document(dataset, split, options.model, described, records, status)

    def run_all() -> None:
        with _Progress(len(recipes), epochs) as progress:
            for recipe, strength in recipes:
                on_epochs = progress.start(recipe.name)
                arguments = (recipe, strength, dataset, split, options.model, settings, on_epochs)
                finished.append(comparison.run_recipe(*arguments))
                folder.save(results("interrupted" if len(finished) < len(recipes) else "complete"))

    status = "complete"
    try:
        run_all()
    except KeyboardInterrupt:
        status = "interrupted"
    if finished:
        weights = {outcome.record["name"]: outcome.weights for outcome in finished}
        report.write_report(folder.path, results(status), weights)
        # Cells are never dropped: a narrower terminal wraps lines, and a pipe has no width.
        console = Console(width=max(Console().width, TABLE_WIDTH))
        console.print(report.table(results(status)))
        console.print(report.verdict(results(status)), highlight=False)
        folder.announce()
    if status == "interrupted":
        wrote = f"their results are in {folder.path}" if finished else "nothing was written"
        count = f"{len(finished)} of {len(recipes)} recipes"
        print(f"jaxreg: interrupted; {count} had finished, {wrote}", file=sys.stderr)
        return INTERRUPTED
    return 0


class _Progress:
    """A progress bar on the error stream: recipes, and the epochs of the one that runs."""

    def __init__(self, recipes: int, epochs: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:24s}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=recipes * epochs)
        self._epochs = epochs
        self._started = 0

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start(self, recipe: str) -> Callable[[int], None]:
        """Begins a recipe; returns the function to call with the epochs it has done."""
        before = self._started * self._epochs
        self._started += 1
        self._progress.update(self._task, description=f"{recipe} (compiling)", completed=before)

        def on_epochs(done: int) -> None:
            self._progress.update(self._task, description=recipe, completed=before + done)

        return on_epochs


class _ReportFolder:
    """The folder of a report. Nothing in it is overwritten but this run's own files."""

    def __init__(self, path: Path):
        self.path = path
        self.kept: Path | None = None
        self._ours = False

    def check(self) -> None:
        """Raises unless the folder can be made, is empty, or holds an earlier report."""
        accepted = "a folder that is new, empty, or holds an earlier jaxreg report"
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise _check.ArgumentError("--out", f"{str(self.path)!r}: {existing} is a file", accepted)
        if not os.access(existing, os.W_OK):
            raise _check.ArgumentError("--out", f"{str(self.path)!r}, which is not writable", accepted)
        if self.path.exists() and any(self.path.iterdir()) and not self._holds_a_report():
            raise _check.ArgumentError("--out", f"{str(self.path)!r}, which holds something else", accepted)

    def save(self, results: dict[str, Any]) -> None:
        """Writes ``results.json``, whole or not at all."""
        if not self._ours:
            self._claim()
        temporary = self.path / "results.json.partial"
        temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / "results.json")

    def announce(self) -> None:
        """Says where the report is, and where an earlier one went."""
        print(f"Report: {self.path / 'index.html'}")
        if self.kept:
            print(f"The earlier report is now in {self.kept}")

    def _claim(self) -> None:
        if self._holds_a_report():
            numbers = iter(range(1, sys.maxsize))
            free = (self.path.with_name(f"{self.path.name}-{n}") for n in numbers)
            self.kept = next(path for path in free if not path.exists())
            self.path.rename(self.kept)
        self.path.mkdir(parents=True, exist_ok=True)
        self._ours = True

    def _holds_a_report(self) -> bool:
        try:
            schema = json.loads((self.path / "results.json").read_text(encoding="utf-8"))["schema"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return str(schema).startswith("jaxreg.compare/")


def _recipe_names(given: list[str] | None) -> list[str] | None:
    """Names separated by spaces, commas or both."""
    return None if given is None else [name for part in given for name in part.split(",") if name]


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a whole number >= 1")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a finite number")
    return number


def _assignment(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: RECIPE=VALUE, as dropout=0.5")
    return name, _number(value)
