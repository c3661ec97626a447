"""The README's table of penalties, from the classes; ``python docs/reference.py`` writes it."""

import dataclasses
import re
from pathlib import Path

import jaxreg

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- penalties: written by docs/reference.py -->", "<!-- end of penalties -->"


def penalties() -> list[type[jaxreg.Penalty]]:
    """Every exported penalty: those that are no constraint first, each in order of its name."""
    found = [getattr(jaxreg, name) for name in jaxreg.__all__]
    classes = [c for c in found if isinstance(c, type) and issubclass(c, jaxreg.Penalty)]
    classes.remove(jaxreg.Penalty)
    return sorted(classes, key=lambda c: (c.scales == (), c.__name__.lower()))


def signature(cls: type[jaxreg.Penalty]) -> str:
    """How it is called, without the selector that all have."""
    by_position, by_name = [], []
    for field in dataclasses.fields(cls):
        if field.name != "where":
            given = field.default is not dataclasses.MISSING
            shown = f"{field.name}={field.default!r}" if given else field.name
            (by_name if field.kw_only else by_position).append(shown)
    star = ["*"] if by_name else []
    return f"{cls.__name__}({', '.join(by_position + star + by_name)})"


def summary(cls: type[jaxreg.Penalty]) -> str:
    """The first sentence of its docstring, fit for a table of GitHub's Markdown."""
    text = " ".join((cls.__doc__ or "").partition("\n\n")[0].split()).rstrip(".")
    return re.sub(r"\\?\|", lambda bar: r"\Vert " if len(bar[0]) == 2 else r"\vert ", text)


def _flag(value: object) -> str:
    if isinstance(value, property):  # as the penalty that it is made of
        return "as its part"
    return "yes" if value else ""


def table() -> str:
    """The table in Markdown."""
    rows = [
        "| penalty or constraint | R(x) | convex | exact zeros | elementwise step |",
        "|:--|:--|:--|:--|:--|",
    ]
    for cls in penalties():
        flags = (cls.convex, cls.sparse, cls.elementwise_step)
        cells = [f"`{signature(cls)}`", summary(cls), *map(_flag, flags)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """The README with the table between its two marks."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
