"""What ``jaxreg compare`` does with its arguments, the terminal, its folder and Ctrl-C."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest

import jaxreg
from jaxreg import comparison, report
from jaxreg.cli import main

RECIPES = (
    "none, l2, weight_decay, l1_prox, elastic_net, group_lasso, nuclear, sparsity_target, pruning, "
    "n_m, dropout, label_smoothing, clip, early_stop, cocktail"
)
SMALL = ["compare", "--model", "linear", "--seeds", "2", "--epochs", "2", "--train-size", "60"]
OWN = ["compare", "--data", "good.csv", "--target", "label", *SMALL[1:-2]]
FIGURES = ("train_score", "test_score", "gap", "test_nll", "calibration_error", "zeros", "rank")
EARLIER = {"schema": "jaxreg.compare/1", "note": "an earlier report"}


class Ended(NamedTuple):
    """How a run ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capfd):
    """Runs the command line in this process."""

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        return Ended(main(arguments), *capfd.readouterr())

    return run


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with data sets good and bad and some folders."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [[*map(str, x), "yes" if x[0] > 0 else "no"] for x in rng.normal(size=(40, 3)).round(3)]

    def write(name: str, rows: list[list[str]], encoding: str = "utf-8") -> None:
        lines = [",".join(row) for row in [["a", "b", "c", "label"], *rows]]
        Path(name).write_text("\n".join(lines) + "\n", encoding=encoding)

    def with_cell(cell: str) -> list[list[str]]:
        return [[*row[:1], cell, *row[2:]] if i == 7 else row for i, row in enumerate(rows)]

    write("good.csv", rows, "utf-8-sig")
    write("text.csv", with_cell("about 3"))
    write("nan.csv", with_cell("nan"))
    write("gap.csv", with_cell(""))
    write("one_class.csv", [[*row[:3], "yes"] for row in rows])
    write("few.csv", rows[:7])
    Path("empty.csv").touch()
    Path("table.txt").write_text("a b")
    Path("damaged.npz").write_text("no archive")
    y = rng.integers(0, 3, 40)
    np.savez("images.npz", x=rng.normal(size=(40, 4, 4, 1)), y=y)
    np.savez("volumes.npz", x=rng.normal(size=(40, 2, 2, 2, 1)), y=y)
    np.savez("without_y.npz", x=rng.normal(size=(40, 3)))
    for name in ("thesis", "earlier", "new", "json"):
        Path(name).mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    Path("earlier/results.json").write_text(json.dumps(EARLIER))
    Path("json/results.json").write_text('{"schema": "of somebody else"}')
    return tmp_path


@pytest.fixture
def instant(monkeypatch):
    """Recipes that train in no time and a page of one word: the command alone is tested."""

    def run(self, recipe, strength, on_epochs):
        on_epochs(self.settings.epochs)
        seeds, epochs = len(self.split.train_x), self.settings.epochs
        parts = ("train", "validation", "test")
        names = [f"{part}_{kind}" for part in parts for kind in ("score", "nll")]
        record = {
            "name": recipe.name,
            "description": recipe.description,
            "settings": recipe.regularizers(strength).describe(),
            "target_zeros": recipe.regularizers(strength).target_zeros,
            "seeds": [
                {"seed": i, **dict.fromkeys(FIGURES, 0.5), "rank": 1.0, "best_epoch": 1}
                for i in range(seeds)
            ],
            "curves": {
                "epoch": [*range(1, epochs + 1)],
                **dict.fromkeys(names, [[0.5] * epochs] * seeds),
            },
            "compile_seconds": 1.0,
            "run_seconds": 1.0,
        }
        return comparison.Outcome(record, {})

    def write_report(folder: Path, results: Any, weights: Any) -> None:
        (folder / "index.html").write_text("page")

    monkeypatch.setattr(comparison.Comparison, "run", run)
    monkeypatch.setattr(report, "write_report", write_report)


def tree(folder: Path) -> dict[str, Any]:
    """All that a folder holds: the bytes of files, the targets of links."""

    def what(path: Path) -> Any:
        return path.is_dir() or (path.is_symlink() and os.readlink(path)) or path.read_bytes()

    return {str(path.relative_to(folder)): what(path) for path in sorted(folder.rglob("*"))}


def results(folder: str | Path = "jaxreg-report") -> dict[str, Any]:
    """The content of ``results.json``, checked against its schema."""
    schema = json.loads(Path(jaxreg.__file__).with_name("results.schema.json").read_text())
    content = json.loads(Path(folder, "results.json").read_text())
    jsonschema.validate(content, schema, cls=jsonschema.Draft202012Validator)
    return content


# ---------------------------------------------------------------- bad input

NAMES = "digits, breast_cancer, wine, diabetes, mnist1d, a .csv or .npz file that exists"
FOLDER = "a folder that is new, empty, or holds an earlier jaxreg report"
# The arguments, what is said of them, and what is said to be accepted.
BAD_INPUT = [
    ("", "required: COMMAND", ""),
    ("compar", "COMMAND: invalid choice: 'compar'", "compare"),
    ("compare more", "unrecognized arguments: more", ""),
    ("compare --sedes 3", "unrecognized arguments: --sedes 3", ""),
    ("compare --data", "--data", "expected one argument"),
    ("compare --data digit", "--data: got 'digit' (did you mean 'digits'?)", NAMES),
    ("compare --data missing.csv", "--data: got 'missing.csv'", NAMES),
    ("compare --data thesis", "--data: got 'thesis'", NAMES),
    ("compare --data table.txt", "--data: got 'table.txt'", "ends in .csv or .npz"),
    ("compare --data good.csv", "--target: got nothing", "'a', 'b', 'c', 'label'"),
    ("compare --data good.csv --target lable", "'lable' (did you mean 'label'?)", "'a', 'b', 'c'"),
    ("compare --data images.npz --target y", "--target: got 'y'", "with a .csv file only"),
    ("compare --target y", "--target: got 'y'", "with a .csv file only"),
    (
        "compare --data text.csv --target label",
        "--data: got 'about 3' in line 9, column 'b'",
        "num",
    ),
    ("compare --data nan.csv --target label", "--data: got 'nan' in line 9, column 'b'", "finite"),
    ("compare --data gap.csv --target label", "--data: got an empty cell in line 9", "finite"),
    ("compare --data one_class.csv --target label", "--data: got one class only", "2 classes"),
    ("compare --data few.csv --target label", "--data: got 7 rows", "at least 8 rows"),
    ("compare --data empty.csv --target label", "--data: got the empty file", "a header row"),
    ("compare --data damaged.npz", "--data: got 'damaged.npz'", "arrays x (numbers) and y"),
    ("compare --data without_y.npz", "--data: got no array 'y'", "arrays x (numbers) and y"),
    ("compare --task clustering", "--task: got 'clustering'", "auto, classification, regression"),
    ("compare --task regression", "--task: got 'regression'", "classification, the task of digits"),
    ("compare --train-size 5000", "--train-size: got 5000", "from 10 to 1078"),
    ("compare --train-size few", "--train-size: got 'few'", "a whole number"),
    ("compare --label-noise 1", "--label-noise: got 1.0", "[0, 1)"),
    ("compare --label-noise -0.1", "--label-noise: got -0.1", "[0, 1)"),
    ("compare --label-noise much", "--label-noise: got 'much'", "a finite number"),
    ("compare --model resnet", "--model: got 'resnet'", "linear, mlp, cnn"),
    ("compare --data wine --model cnn", "--model: got 'cnn' for inputs of shape (13,)", "linear"),
    ("compare --data volumes.npz --model cnn", "--model: got 'cnn' for inputs", "linear or mlp"),
    ("compare --recipes", "--recipes: got no name", RECIPES),
    ("compare --recipes ,", "--recipes: got no name", RECIPES),
    ("compare --recipes dropuot", "--recipes: got 'dropuot' (did you mean 'dropout'?)", RECIPES),
    ("compare --recipes none l2,none", "--recipes: got 'none' twice", "each name once"),
    (
        "compare --data diabetes --recipes label_smoothing",
        "--recipes: got 'label_smoothing', which is for classification",
        RECIPES.replace("label_smoothing, ", ""),
    ),
    ("compare --strength l2", "--strength: got 'l2'", "RECIPE=VALUE"),
    ("compare --strength l2=", "--strength: got 'l2='", "RECIPE=VALUE"),
    ("compare --strength l2=1 l2=2", "--strength: got 'l2=2'", "once a recipe"),
    ("compare --strength l2=1 --strength l2=2", "--strength: got 'l2=2'", "once a recipe"),
    ("compare --strength l2=nan", "--strength l2: got 'nan'", "a finite number"),
    ("compare --strength l2=1e39", "--strength l2: got '1e39'", "a finite number of 32 bits"),
    ("compare --strength l2=-1", "--strength l2: got -1.0", "a finite number >= 0"),
    ("compare --strength weight_decay=-1", "--strength weight_decay: got -1.0", ">= 0"),
    ("compare --strength dropout=1", "--strength dropout: got 1.0", "[0, 1)"),
    ("compare --strength clip=0", "--strength clip: got 0.0", "a number > 0"),
    ("compare --strength none=1", "--strength: got 'none'", "l2, weight_decay, l1_prox"),
    ("compare --recipes none l2 --strength clip=1", "--strength: got 'clip'", "accepted: l2."),
    ("compare --recipes none --strength clip=1", "--strength: got 'clip'", "nothing"),
    ("compare --seeds 0", "--seeds: got '0'", "a whole number from 1 to 1000"),
    ("compare --seeds 1001", "--seeds: got '1001'", "a whole number from 1 to 1000"),
    ("compare --seeds 2.5", "--seeds: got '2.5'", "a whole number from 1 to 1000"),
    (f"compare --seeds {'9' * 5000}", "--seeds: got '999", "a whole number from 1 to 1000"),
    ("compare --epochs 0", "--epochs: got '0'", "a whole number from 1 to 100000"),
    ("compare --batch-size 0", "--batch-size: got '0'", "a whole number from 1"),
    ("compare --learning-rate 0", "--learning-rate: got 0.0", "a number > 0"),
    ("compare --learning-rate -1", "--learning-rate: got -1.0", "a number > 0"),
    ("compare --learning-rate inf", "--learning-rate: got 'inf'", "a finite number"),
    ("compare --out table.txt", "--out: got 'table.txt'", FOLDER),
    ("compare --out table.txt/report", "--out: got 'table.txt/report'", FOLDER),
    ("compare --out thesis", "--out: got 'thesis', which holds something else", FOLDER),
    ("compare --out json", "--out: got 'json', which holds something else", FOLDER),
    ("compare --out .", "--out: got '.', which holds something else", FOLDER),
    ("compare --out earlier/..", "--out: got 'earlier/..', which holds something else", FOLDER),
    (f"compare --out {'x' * 300}", "--out: got 'xxx", FOLDER),
    pytest.param(
        "compare --out /proc/report",
        "--out: got '/proc/report', where nothing can be written",
        FOLDER,
        marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux alone has it"),
    ),
]


@pytest.mark.parametrize(("arguments", "said", "accepted"), BAD_INPUT)
def test_bad_input_ends_with_status_2_and_one_line_and_changes_nothing(
    run, place, arguments, said, accepted
):
    before = tree(place)
    ended = run(*arguments.split())
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith("jaxreg: error: ")
    assert ended.err.endswith("\n")
    assert ended.err.count("\n") == 1
    assert said in ended.err
    assert accepted in ended.err.partition(said)[2]
    assert tree(place) == before


def test_an_error_about_text_of_several_lines_is_one_line(run, place):
    assert run("compare", "a\nb").err == "jaxreg: error: unrecognized arguments: a b\n"


def test_an_earlier_report_that_cannot_get_a_new_name_is_left_alone(run, place, monkeypatch):
    monkeypatch.chdir("earlier")
    before = tree(place)
    ended = run(*SMALL, "--out", ".")
    assert ended.status == 2
    assert ended.err.startswith("jaxreg: error: --out: got '.', which holds an earlier report and")
    assert tree(place) == before


def test_help_names_every_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    words = {word.strip(",()") for word in capsys.readouterr().out.split()}
    assert set(RECIPES.split(", ")) <= words


def test_help_and_errors_in_options_or_data_do_not_wait_for_jax(place):
    script = """
import contextlib, sys
from jaxreg.cli import main
for line in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        assert main(line.split()) == 2, line
print(*{"jax", "optax", "flax", "matplotlib", "rich"} & set(sys.modules))
"""
    lines = ["compare --help", "compare --seeds 0", "compare --out thesis", "compare --data digit"]
    lines += ["compare --data nan.csv --target label", "compare --data good.csv --label-noise 1"]
    command = [sys.executable, "-c", script, *lines]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == ""


# ---------------------------------------------------------------- what comes out


def test_a_comparison_gives_a_table_a_verdict_and_a_report(run, place):
    ended = run(*SMALL, "--recipes", "none", "l1_prox", "--strength", "l1_prox=0.5")
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert sum(line.startswith(("none ", "l1_prox ")) for line in lines) == 2
    assert "On digits with 60 training rows, " in ended.out
    assert lines[-1] == "Report: jaxreg-report/index.html"
    assert "100%" in ended.err
    written = {path.name for path in Path("jaxreg-report").iterdir()}
    assert {"index.html", "results.json"} <= written
    assert any(name.endswith(".png") for name in written)
    content = results()
    assert content["status"] == "complete"
    assert content["model"] == {"name": "linear", "description": "64-10", "parameters": 650}
    assert content["settings"]["strength"] == {"l1_prox": 0.5}
    assert [recipe["settings"] for recipe in content["recipes"]] == [{}, {"penalty": "L1(0.5)"}]
    zeros = [[seed["zeros"] for seed in recipe["seeds"]] for recipe in content["recipes"]]
    assert zeros[0] == [0, 0]
    assert min(zeros[1]) > 0.05


@pytest.mark.thorough
def test_own_images_can_be_compared_with_a_cnn(run, place):
    command = ["compare", "--data", "images.npz", "--model", "cnn", "--batch-size", "1000"]
    assert run(*command, "--recipes", "none", "--epochs", "1", "--seeds", "1").status == 0
    assert results()["data"]["features"] == [4, 4, 1]
    assert results()["model"]["description"] == "conv 16, 32; dense 32-3"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"data": "digits", "model": "mlp", "seeds": 5, "epochs": 100, "batch_size": 64}),
        ("", {"learning_rate": 0.003, "label_noise": 0, "train_size": None, "strength": {}}),
        ("", {"recipes": RECIPES.split(", ")}),
        ("--data diabetes", {"recipes": RECIPES.replace("label_smoothing, ", "").split(", ")}),
        ("--quick", {"seeds": 2, "epochs": 10}),
        ("--quick --epochs 3", {"seeds": 2, "epochs": 3}),
        ("--recipes clip,l2 --recipes none", {"recipes": ["clip", "l2", "none"]}),
        (
            "--strength l2=1,clip=2 --strength dropout=.5",
            {"strength": {"l2": 1, "clip": 2, "dropout": 0.5}},
        ),
        ("--label-noise 0.25 --train-size 100", {"label_noise": 0.25, "train_size": 100}),
        ("--learning-rate 1e-2 --batch-size 7", {"learning_rate": 0.01, "batch_size": 7}),
    ],
)
def test_options_are_in_the_results(run, place, instant, arguments, expected):
    assert run("compare", *arguments.split()).status == 0
    settings = results()["settings"]
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("columns", ["20", "60", "200"])
def test_no_width_of_the_terminal_cuts_the_table(run, place, instant, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    ended = run(*SMALL)
    (row,) = [line for line in ended.out.splitlines() if line.startswith("label_smoothing ")]
    assert row.count("50.0") == 5
    assert "…" not in ended.out


def test_a_terminal_that_knows_only_ascii_gets_the_table_too(place, instant, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main([*SMALL, "--recipes", "none"]) == 0
    terminal.flush()
    assert b"none  |" in terminal.buffer.getvalue()


# ---------------------------------------------------------------- the folder


def test_an_earlier_report_is_kept_under_a_new_name(run, place, instant):
    before = tree(place / "earlier")
    first = run(*SMALL, "--recipes", "none", "--out", "earlier")
    assert first.out.endswith(
        "Report: earlier/index.html\nThe earlier report is now in earlier-1\n"
    )
    assert tree(place / "earlier-1") == before
    second = tree(place / "earlier")
    assert "earlier-2" in run(*SMALL, "--recipes", "none", "--out", "earlier").out
    assert tree(place / "earlier-1") == before
    assert tree(place / "earlier-2") == second


def test_a_link_leads_to_the_folder_and_stays(run, place, instant):
    Path("link").symlink_to("earlier")
    before = tree(place / "earlier")
    assert run(*SMALL, "--recipes", "none", "--out", "link").status == 0
    assert os.readlink("link") == "earlier"
    assert tree(place / "earlier-1") == before
    assert results("earlier")["status"] == "complete"


def test_an_empty_current_folder_can_take_the_report(run, place, instant, monkeypatch):
    monkeypatch.chdir("new")
    assert run(*SMALL, "--recipes", "none", "--out", ".").status == 0
    assert results(place / "new")["status"] == "complete"


def test_missing_folders_are_made(run, place, instant):
    assert run(*SMALL, "--recipes", "none", "--out", "in/a/folder").status == 0
    assert results("in/a/folder")["status"] == "complete"


def test_a_full_disk_is_one_line_and_leaves_what_was_written(run, place, instant, monkeypatch):
    replace = os.replace

    def full(source, target):
        if len(json.loads(Path(source).read_text())["recipes"]) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    ended = run(*SMALL, "--recipes", "none,l2")
    assert ended.status == 1
    assert ended.err.splitlines()[-1] == (
        "jaxreg: error: [Errno 28] No space left on device; 1 of 2 recipes had finished, "
        "their results are in jaxreg-report"
    )
    assert [recipe["name"] for recipe in results()["recipes"]] == ["none"]
    assert list(tree(place / "jaxreg-report")) == ["results.json"]


# ---------------------------------------------------------------- Ctrl-C


@pytest.fixture(autouse=True)
def sigint():
    """Python's own handler: a shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_at(monkeypatch, moment: Any, name: str, calls: int) -> None:
    """Lets Ctrl-C be pressed in the n-th call of a function."""
    function = getattr(moment, name)

    def pressed(*arguments, **named):
        nonlocal calls
        calls -= 1
        if calls == 0:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **named)

    monkeypatch.setattr(moment, name, pressed)


def test_ctrl_c_in_the_first_recipe_writes_nothing(run, place, instant, monkeypatch):
    press_at(monkeypatch, comparison.Comparison, "run", 1)
    before = tree(place)
    ended = run(*SMALL, "--recipes", "none,l2", "--out", "earlier")
    assert ended.status == 130
    assert ended.out == ""
    said = "jaxreg: interrupted; 0 of 2 recipes had finished, nothing was written"
    assert ended.err.splitlines()[-1] == said
    assert tree(place) == before


def test_ctrl_c_while_the_report_is_written_lets_it_be_finished(run, place, instant, monkeypatch):
    press_at(monkeypatch, report, "write_report", 1)
    ended = run(*SMALL, "--recipes", "none,l2")
    assert ended.status == 130
    assert ended.err.splitlines()[-1].startswith("jaxreg: interrupted; 2 of 2 recipes had finished")
    assert results()["status"] == "complete"
    assert Path("jaxreg-report/index.html").exists()


def test_a_second_ctrl_c_does_not_wait(run, place, instant, monkeypatch):
    def stuck(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it waited")

    monkeypatch.setattr(report, "write_report", stuck)
    ended = run(*SMALL, "--recipes", "none")
    assert ended.status == 130
    assert ended.err.endswith("their results are in jaxreg-report\n")


def test_ctrl_c_before_the_recipes_start_is_one_line(run, place, monkeypatch):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxreg.data.load", load)
    assert run(*SMALL) == (130, "", "jaxreg: interrupted; nothing was written\n")


@pytest.mark.thorough
def test_ctrl_c_leaves_the_finished_recipes_on_disk(place):
    command = [sys.executable, "-m", "jaxreg", *OWN, "--recipes", "none", "l2", "l1_prox"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        deadline = time.monotonic() + 50
        while not Path("jaxreg-report/results.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    content = results()
    assert content["status"] == "interrupted"
    assert [recipe["name"] for recipe in content["recipes"]] == ["none"]
    assert "none " in out
    said = "jaxreg: interrupted; 1 of 3 recipes had finished, their results are in jaxreg-report"
    assert err.splitlines()[-1] == said
    assert "Traceback" not in err


# ---------------------------------------------------------------- the process


def test_python_m_jaxreg_is_the_command():
    command = [sys.executable, "-m", "jaxreg"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"jaxreg {jaxreg.__version__}\n"
    bad = subprocess.run([*command, "compare", "--seeds", "x"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("jaxreg: error: --seeds: got 'x'; accepted: ")


@pytest.mark.parametrize("package", ["rich", "matplotlib", "flax"])
def test_a_missing_package_is_one_line_that_says_how_to_get_it(place, package):
    script = """
import sys
sys.modules[sys.argv[1]] = None
from jaxreg.cli import main
sys.exit(main(["compare", "--data", "good.csv", "--target", "label"]))
"""
    before = tree(place)
    command = [sys.executable, "-c", script, package]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    said = f"jaxreg: error: the package {package} is missing: pip install 'jaxreg[cli]'\n"
    assert ended.stderr == said
    assert tree(place) == before
