"""How much longer is ``import jaxreg`` than ``import optax``?

Requirement: no more than 0.15 s, for the import alone and with every exported name touched after
it (names are loaded when they are first used). Each run is a new interpreter.

    python -m bench.imports
"""

import subprocess
import sys
from collections.abc import Callable

from bench import timing

ALLOWED_SECONDS = 0.15
STATEMENTS = (
    "import optax",
    "import jaxreg",
    "import optax, jaxreg",
    "import jaxreg; [getattr(jaxreg, n) for n in jaxreg.__all__]",
)


def main() -> None:
    """Runs the benchmark, prints its table and writes it down."""
    arguments = timing.parser("How much longer is import jaxreg than import optax?").parse_args()
    contenders = {statement: _in_new_interpreter(statement) for statement in STATEMENTS}
    timings = timing.interleaved(contenders, rounds=3 if arguments.quick else 15)
    rows = [
        (name, t.median, t.upper - t.lower, t.difference, _verdict(t.difference))
        for name, t in timings.items()
    ]
    table = timing.Table(
        "imports",
        "Seconds to start an interpreter and import",
        "Medians of interleaved runs; IQR is the interquartile range. Allowed: "
        f"{ALLOWED_SECONDS} s more than `{STATEMENTS[0]}`.",
        ("statement", "s", "IQR s", "s more than optax", "allowed"),
        rows,
    )
    timing.report("imports", "What importing costs", [table], arguments)


def _in_new_interpreter(statement: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True).returncode


def _verdict(difference: float) -> str:
    return "yes" if difference <= ALLOWED_SECONDS else "no"


if __name__ == "__main__":
    main()
