"""The command line: ``jaxreg compare``.

Exit status: 2 for bad input, with one line that names the argument and says what is accepted; 1
where the machine fails, such as a full disk or a missing package, with one line too; 130 for
Ctrl-C, after what the finished recipes gave has been written down.
"""

import argparse
import io
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import jaxreg
from jaxreg import _check
from jaxreg._folder import ReportFolder

if TYPE_CHECKING:
    from jaxreg.comparison import Outcome
    from jaxreg.data import Dataset
    from jaxreg.splits import Split

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
TABLE_WIDTH = 100
# All seeds are in memory at once, and every epoch is in the report.
MOST_SEEDS, MOST_EPOCHS = 1000, 100_000
LARGEST = 3.4e38  # in 32 bits
TASKS = ("auto", "classification", "regression")
MODELS = ("linear", "mlp", "cnn")


class _UsageError(Exception):
    """Arguments that are no command, such as an unknown option."""


class _Parser(argparse.ArgumentParser):
    """A parser that leaves it to its caller to show an error."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message.removeprefix("argument "))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except _UsageError as error:
        return _fail(BAD_INPUT, f"error: {error}")
    except _check.ArgumentError as error:
        option, *recipe = error.name.split(" ")  # such as "strength l1_prox"
        name = " ".join(["--" + option.replace("_", "-"), *recipe])
        return _fail(BAD_INPUT, f"error: {_check.ArgumentError(name, error.given, error.accepted)}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        return _fail(FAILED, f"error: the package {package} is missing: pip install 'jaxreg[cli]'")
    except (OSError, MemoryError) as error:
        return _fail(FAILED, f"error: {error}")
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; nothing was written")


def _fail(status: int, message: str) -> int:
    print("jaxreg:", " ".join(message.splitlines()), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    """The options as text; `_settings` reads it."""
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
        metavar="TASK",
        help="what the target of a file is: classification or regression (default: told from its "
        "values)",
    )
    add("--train-size", metavar="N", help="train on N rows; fewer overfit more (default: all)")
    add(
        "--label-noise",
        default="0",
        metavar="SHARE",
        help="share of training labels to corrupt, in [0, 1) (default: 0)",
    )
    add("--model", default="mlp", metavar="MODEL", help="linear, mlp (default) or cnn")
    add(
        "--recipes",
        nargs="*",
        action="extend",
        metavar="NAME",
        help="some of none, l2, weight_decay, l1_prox, elastic_net, group_lasso, nuclear, "
        "sparsity_target, pruning, n_m, dropout, label_smoothing, clip, early_stop, cocktail "
        "(default: all that suit the task)",
    )
    add(
        "--strength",
        nargs="+",
        action="extend",
        default=[],
        metavar="RECIPE=VALUE",
        help="strengths other than the recipes' own, such as l1_prox=3e-4",
    )
    add("--seeds", metavar="N", help="repetitions, lanes of one program (default: 5)")
    add("--epochs", metavar="N", help="passes over the training rows (default: 100)")
    add("--batch-size", metavar="N", help="rows a step (default: 64)")
    add("--learning-rate", default="0.003", metavar="RATE", help="Adam's peak (default: 0.003)")
    add("--quick", action="store_true", help="a short look: 2 seeds and 10 epochs")
    add(
        "--out",
        default="jaxreg-report",
        metavar="FOLDER",
        help="folder for the report (default: jaxreg-report); an earlier report there is kept "
        "under a new name",
    )
    return parser


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as numbers and names; ``results.json`` holds it too."""
    seeds, epochs = (2, 10) if options.quick else (5, 100)
    noise = _number("label_noise", options.label_noise)
    rate = _number("learning_rate", options.learning_rate)
    return {
        "data": options.data,
        "target": options.target,
        "task": _check.choice("task", options.task, TASKS),
        "train_size": _whole("train_size", options.train_size, None),
        "label_noise": _check.fraction("label_noise", noise),
        "model": _check.choice("model", options.model, MODELS),
        "recipes": None if options.recipes is None else _items(options.recipes),
        "strength": _strengths(_items(options.strength)),
        "seeds": _whole("seeds", options.seeds, seeds, MOST_SEEDS),
        "epochs": _whole("epochs", options.epochs, epochs, MOST_EPOCHS),
        "batch_size": _whole("batch_size", options.batch_size, 64),
        "learning_rate": _check.positive("learning_rate", rate),
    }


def _items(parts: list[str]) -> list[str]:
    """What is separated by spaces, commas or both."""
    return [item for part in parts for item in part.replace(",", " ").split()]


def _strengths(items: list[str]) -> dict[str, float]:
    strengths: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition("=")
        if not name or not value or name in strengths:
            accepted = "RECIPE=VALUE, such as dropout=0.5, once a recipe"
            raise _check.ArgumentError("strength", repr(item), accepted)
        strengths[name] = _number(f"strength {name}", value)
    return strengths


def _whole(name: str, text: str | None, default: int | None, most: int = 10**9) -> int | None:
    if text is None:
        return default
    # A longer one is out of range, and Python refuses to read thousands of digits.
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= number <= most:
        raise _check.ArgumentError(name, _check.describe(text), f"a whole number from 1 to {most}")
    return number


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < LARGEST:
        raise _check.ArgumentError(name, _check.describe(text), "a finite number of 32 bits")
    return number


def _compare(options: argparse.Namespace) -> int:
    asked = _settings(options)
    folder = ReportFolder(options.out)
    dataset, split = _read_data(asked)

    # Imported here: what is wrong above is said without waiting for JAX.
    from jaxreg._progress import CtrlC, RecipeProgress

    with CtrlC() as ctrl_c:
        from jax.errors import JaxRuntimeError

        from jaxreg import report, training
        from jaxreg.comparison import Comparison, choose

        recipes = choose(asked["recipes"], asked["strength"], dataset.task)
        asked["recipes"] = [recipe.name for recipe, _ in recipes]
        pace = training.Settings(asked["epochs"], asked["batch_size"], asked["learning_rate"])
        comparison = Comparison(dataset, split, asked["model"], pace)
        finished: list[Outcome] = []

        def stopped(status: int, why: str) -> int:
            where = f"their results are in {folder.path}" if finished else "nothing was written"
            count = f"{len(finished)} of {len(recipes)} recipes"
            return _fail(status, f"{why}; {count} had finished, {where}")

        try:
            progress = RecipeProgress(len(recipes), pace.epochs, ctrl_c)
            with suppress(KeyboardInterrupt), progress:
                for recipe, strength in recipes:
                    outcome = comparison.run(recipe, strength, progress.start(recipe.name))
                    folder.save(comparison.results(asked, [*finished, outcome]))
                    finished.append(outcome)
            with suppress(KeyboardInterrupt):
                if finished:
                    results = comparison.results(asked, finished)
                    weights = {outcome.record["name"]: outcome.weights for outcome in finished}
                    report.write_report(folder.path, results, weights)
                    _show(results, folder)
        except (OSError, JaxRuntimeError) as error:  # a full disk; too little memory
            return stopped(FAILED, f"error: {error}")
    return stopped(INTERRUPTED, "interrupted") if ctrl_c.pressed else 0


def _read_data(asked: dict[str, Any]) -> "tuple[Dataset, Split]":
    from jaxreg import data, splits

    dataset = data.load(asked["data"], target=asked["target"], task=asked["task"])
    if asked["model"] == "cnn" and dataset.x.ndim not in (3, 4):
        given = f"'cnn' for inputs of shape {dataset.x.shape[1:]}"
        accepted = "linear or mlp; cnn for (length, channels) and (height, width, channels)"
        raise _check.ArgumentError("model", given, accepted)
    size, noise, seeds = asked["train_size"], asked["label_noise"], asked["seeds"]
    return dataset, splits.split(dataset, train_size=size, label_noise=noise, seeds=seeds)


def _show(results: dict[str, Any], folder: ReportFolder) -> None:
    """The table and the verdict, and where the report is and an earlier one went."""
    from rich.console import Console

    from jaxreg import report

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # such as ± where only ASCII is known
    console = Console(highlight=False, markup=False)
    # Cells are never dropped: a narrower terminal wraps lines, and a pipe has no width.
    Console(width=max(console.width, TABLE_WIDTH)).print(report.table(results))
    console.print(report.verdict(results))
    for note in report.notes(results):
        console.print("-", note)
    console.print(f"Report: {folder.path / 'index.html'}", soft_wrap=True)
    if folder.kept:
        console.print(f"The earlier report is now in {folder.kept}", soft_wrap=True)
