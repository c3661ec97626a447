"""What does a clipped AdamW step cost: here, in optax, in torch, and at the memory's own speed?

The step reads weights, gradients and two moments and writes all but the gradients; a clip has to
read the gradients once more, before. So 32 bytes a float32 parameter are the least, and the limit
is a copy in place of as many bytes. All contenders of a table take turns.

    python -m bench.step [--quick] [--out bench/results] [--tables float32 leaves ...]
"""

import functools
import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxreg
from bench import compare, peers, timing

PyTree = Any
Transformation = optax.GradientTransformation
RATE, DECAY, MAX_NORM = 1e-3, 0.01, 1.0
GRADIENT_NORM = 10.0  # every clip acts, which makes no difference to its cost
PASSES = 8  # over arrays as large as the parameters, of clip and AdamW at the least
COPY = "copy in place"


class Sizes(NamedTuple):
    """How much a run measures."""

    width: int  # of the transformer
    vocabulary: int
    layers: int
    small_leaves: int
    parameters: tuple[int, ...]
    leaves: tuple[int, ...]
    entries: int  # of the trees with that many leaves
    rounds: int


FULL = Sizes(
    width=512,
    vocabulary=23_296,
    layers=12,
    small_leaves=10_000,
    parameters=tuple(10**k for k in range(4, 10)),
    leaves=(1, 10, 100, 1000, 10_000),
    entries=10**7,
    rounds=21,
)
# XLA's compiler for CPUs takes time as the square of the number of leaves: 10,000 take an hour, and
# for optax's chain more than 24 GB. They have a table of their own, and a file where it is alone.
FULL_ON_CPU = FULL._replace(small_leaves=1000, leaves=(1, 10, 100, 1000))
MANY_LEAVES = "many-leaves"
QUICK = Sizes(
    width=16,
    vocabulary=64,
    layers=0,  # the embeddings alone: compiling takes the time
    small_leaves=20,
    parameters=(10**4,),
    leaves=(1, 4),
    entries=10**4,
    rounds=3,
)


def main() -> None:
    """Runs the benchmark, prints the tables and writes them down."""
    options = timing.parser("What does a clipped AdamW step cost?")
    makers = {
        "float32": lambda sizes: contenders_table(sizes, jnp.float32, in_jax()),
        "bfloat16": lambda sizes: contenders_table(sizes, jnp.bfloat16, main_in_jax()),
        "small-leaves": small_leaves_table,
        "parameters": parameters_table,
        "leaves": leaves_table,
    }
    usual = [*makers]
    makers[MANY_LEAVES] = lambda sizes: small_leaves_table(sizes if sizes is QUICK else FULL)
    help_text = f"all but {MANY_LEAVES} by default: on a CPU that compiles for an hour"
    options.add_argument("--tables", nargs="+", choices=makers, default=usual, help=help_text)
    arguments = options.parse_args()
    # Before torch is imported: its idle threads would spin, on the cores that XLA needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    full = FULL_ON_CPU if jax.default_backend() == "cpu" else FULL
    tables = [makers[name](QUICK if arguments.quick else full) for name in arguments.tables]
    title = "What a clipped AdamW step costs"
    name = f"step-{MANY_LEAVES}" if arguments.tables == [MANY_LEAVES] else "step"
    timing.report(f"{name}-{jax.devices()[0].platform}", title, tables, arguments)


# --- Parameters ----------------------------------------------------------------------------------


def transformer(sizes: Sizes, dtype: Any) -> PyTree:
    """Weights with the shapes of a GPT: 12 leaves a layer and 2 embeddings."""
    width = sizes.width
    keys = iter(jax.random.split(jax.random.key(0), 4 * sizes.layers + 2))

    def normal(n: int, m: int) -> jax.Array:
        return (jax.random.normal(next(keys), (n, m)) / n**0.5).astype(dtype)

    def dense(n: int, m: int) -> dict[str, jax.Array]:
        return {"kernel": normal(n, m), "bias": jnp.zeros(m, dtype)}

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)}

    def layer() -> PyTree:
        return {
            "attention": {"qkv": dense(width, 3 * width), "out": dense(width, width)},
            "mlp": {"up": dense(width, 4 * width), "down": dense(4 * width, width)},
            "norms": [norm(), norm()],
        }

    embeddings = {"tokens": normal(sizes.vocabulary, width), "positions": normal(width, width)}
    return {"embeddings": embeddings, "layers": [layer() for _ in range(sizes.layers)]}


def even(parameters: int, leaves: int) -> PyTree:
    """Leaves of one size."""
    return [jnp.ones(parameters // leaves) for _ in range(leaves)]


def gradients(params: PyTree) -> PyTree:
    """Noise of about GRADIENT_NORM for parameters."""
    each = GRADIENT_NORM / entries(params) ** 0.5
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draws = (jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True))
    noise = [(each * draw).astype(x.dtype) for draw, x in zip(draws, leaves, strict=True)]
    return treedef.unflatten(noise)


def entries(tree: PyTree) -> int:
    """How many a tree's leaves have."""
    return sum(x.size for x in jax.tree.leaves(tree))


# --- Contenders ----------------------------------------------------------------------------------


class Contender(NamedTuple):
    """An optimizer, and what it is compared to.

    Attributes:
        build: makes the optimizer; for torch the step, from parameters and gradients.
        alone: the name of AdamW without a clip, of the same library.
        peer: the name of optax's optimizer that does the same; None where it has none.
        passes: over arrays as large as the parameters, at the least.
    """

    build: Callable[..., Any]
    alone: str
    peer: str | None
    passes: int = PASSES


def optax_adamw(*before: Transformation) -> Transformation:
    """AdamW of optax behind other transformations."""
    adamw = optax.adamw(RATE, weight_decay=DECAY)
    return optax.chain(*before, adamw) if before else adamw


def jaxreg_adamw(clip: Any = None) -> Transformation:
    """AdamW as `jaxreg.regularize` makes it; all leaves decay, as in optax and torch."""
    decay = jaxreg.weight_decay(DECAY, where=jaxreg.where.everything)
    return jaxreg.regularize(optax.scale_by_adam(), RATE, clip=clip, decay=decay)


def optax_clipped() -> Transformation:
    """The chain of optax's own parts."""
    return optax_adamw(optax.clip_by_global_norm(MAX_NORM))


def in_jax() -> dict[str, Contender]:
    """The contenders that are optax transformations, by name."""
    optaxs, ours, clipped = "optax AdamW", "jaxreg AdamW", "optax clip + AdamW"
    finite = "optax apply_if_finite(clip + AdamW)"
    adaptive = "optax adaptive_grad_clip + AdamW"

    def clip(name: str, *args: Any, **options: Any) -> Callable[[], Transformation]:
        return lambda: jaxreg_adamw(getattr(jaxreg, name)(*args, **options))

    return {
        optaxs: Contender(optax_adamw, optaxs, optaxs, passes=7),
        ours: Contender(jaxreg_adamw, ours, optaxs, passes=7),
        clipped: Contender(optax_clipped, optaxs, clipped),
        "jaxreg clip + AdamW": Contender(lambda: jaxreg_adamw(MAX_NORM), ours, clipped),
        "jaxreg clip + optax AdamW": Contender(
            lambda: optax_adamw(jaxreg.clip_by_global_norm(MAX_NORM)), optaxs, clipped
        ),
        'jaxreg clip, "zero", + AdamW': Contender(
            clip("clip_by_global_norm", MAX_NORM, on_nonfinite="zero"), ours, None
        ),
        'jaxreg clip, "skip", + AdamW': Contender(
            clip("clip_by_global_norm", MAX_NORM, on_nonfinite="skip"), ours, None
        ),
        finite: Contender(lambda: optax.apply_if_finite(optax_clipped(), 5), optaxs, finite),
        "jaxreg skip_step(clip + AdamW)": Contender(
            lambda: jaxreg.skip_step(jaxreg_adamw(MAX_NORM)), ours, finite
        ),
        "jaxreg clip_by_leaf_norm + AdamW": Contender(
            clip("clip_by_leaf_norm", MAX_NORM), ours, None
        ),
        adaptive: Contender(
            lambda: optax_adamw(optax.adaptive_grad_clip(0.01)), optaxs, adaptive, passes=9
        ),
        "jaxreg adaptive_clip + AdamW": Contender(
            clip("adaptive_clip", 0.01), ours, adaptive, passes=9
        ),
        "jaxreg autoclip + AdamW": Contender(clip("autoclip"), ours, None),
        "jaxreg zclip + AdamW": Contender(clip("zclip"), ours, None),
        "jaxreg adagc + AdamW": Contender(clip("adagc"), ours, None),
    }


def main_in_jax() -> dict[str, Contender]:
    """Both libraries' AdamW, alone and behind the clip by the global norm."""
    names = ("optax AdamW", "optax clip + AdamW", "jaxreg AdamW", "jaxreg clip + AdamW")
    return {name: in_jax()[name] for name in names}


def in_torch() -> dict[str, Contender]:
    """AdamW of torch in its two fast forms, where torch is installed for JAX's platform."""
    platform = jax.devices()[0].platform
    if not peers.installed("torch") or platform not in ("cpu", "gpu"):
        return {}
    torch = importlib.import_module("torch")
    if platform == "gpu" and not torch.cuda.is_available():
        return {}
    found = {}
    for form in ("fused", "foreach"):
        alone = f"torch {form} AdamW"
        step = functools.partial(TorchStep, form, "cuda" if platform == "gpu" else "cpu")
        found[alone] = Contender(step, alone, "optax AdamW", passes=7)
        found[f"torch clip + {form} AdamW"] = Contender(
            functools.partial(step, clips=True), alone, "optax clip + AdamW"
        )
    return found


class TorchStep:
    """torch's step; as its own result it can be waited for, like an array of JAX's."""

    def __init__(
        self, form: str, device: str, params: PyTree, grads: PyTree, *, clips: bool = False
    ):
        self.torch = importlib.import_module("torch")
        self.device = device
        self.params = [self._tensor(x).requires_grad_() for x in jax.tree.leaves(params)]
        for p, g in zip(self.params, jax.tree.leaves(grads), strict=True):
            p.grad = self._tensor(g)
        self.optimizer = self.torch.optim.AdamW(
            self.params, lr=RATE, weight_decay=DECAY, **{form: True}
        )
        self.clips = clips

    def __call__(self) -> "TorchStep":
        if self.clips:
            # In place: from the second step on the norm is at the limit, and the product is made
            # as ever.
            self.torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()
        return self

    def block_until_ready(self) -> None:
        """Waits for the device; `jax.block_until_ready` calls it."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _tensor(self, x: jax.Array) -> Any:
        dtype = getattr(self.torch, x.dtype.name)
        # Of float32, since NumPy has no bfloat16 that torch knows.
        return self.torch.tensor(jax.device_get(x.astype(jnp.float32))).to(self.device, dtype)


class Step(compare.Step):
    """A step fed with its own output, whose tracing and compilation are timed."""

    def __init__(self, function: Callable[..., Any], state: Any, constants: tuple[Any, ...]):
        super().__init__(function, state, constants)
        started = time.perf_counter()
        lowered = self.function.lower(self.state, *self.constants)
        traced = time.perf_counter()
        self._compiled = lowered.compile()
        self.trace_seconds = traced - started
        self.compile_seconds = time.perf_counter() - traced

    def __call__(self) -> Any:
        self.state = self._compiled(self.state, *self.constants)
        return self.state

    def fusions(self) -> int | None:
        """How many loops XLA has made of it; None where it doesn't say."""
        text = self._compiled.as_text()
        return text.count(" fusion(") if text else None


def optimizer_step(tx: Transformation, params: PyTree, grads: PyTree) -> Step:
    """The update of parameters by gradients that are given."""
    state = compare.copy(params), tx.init(params)
    return Step(compare.optimizer_step(tx), state, (grads,))


def copy_step(parameters: int, dtype: Any) -> Step:
    """Reads and writes PASSES arrays of so many entries: half of them, each in place."""
    arrays = [jnp.ones(parameters, dtype) for _ in range(PASSES // 2)]
    # Not -x, for which XLA's loop on a CPU is half again as slow; nor x * c, which drifts.
    return Step(lambda arrays: [1 - x for x in arrays], arrays, ())


# --- All contenders ------------------------------------------------------------------------------


def contenders_table(sizes: Sizes, dtype: Any, chosen: Mapping[str, Contender]) -> timing.Table:
    """The chosen contenders and torch's on the transformer."""
    params = transformer(sizes, dtype)
    grads, total = gradients(params), entries(params)
    contenders = {**chosen, **in_torch()}
    steps: dict[str, Any] = {COPY: copy_step(total, dtype)}
    for name, contender in chosen.items():
        steps[name] = optimizer_step(contender.build(), params, grads)
    for name, contender in in_torch().items():
        steps[name] = contender.build(params, grads)
    times = timing.interleaved(steps, sizes.rounds)
    name, leaves = jnp.dtype(dtype).name, len(jax.tree.leaves(params))
    rows: list[tuple[timing.Cell, ...]] = []
    for label, step in steps.items():
        figures = 1e3 * times[label].median, 1e3 * (times[label].upper - times[label].lower)
        ratios = [None, None, 100.0]
        if label != COPY:
            ratios = compared(contenders[label], times, label)
        rows.append((label, *figures, *ratios, *counted(step, total)))
    return timing.Table(
        name,
        f"One step: {total:,} {name} parameters in {leaves} leaves",
        "Gradients given, buffers donated. Ratios: to the same library's AdamW alone, and to "
        f"optax's optimizer that does the same. {LIMIT} AdamW alone: {7 * size(dtype)} bytes; "
        f"clip and AdamW: {8 * size(dtype)}; adaptive_clip, which needs the norms of the weights "
        f"too: {9 * size(dtype)}. Bytes are XLA's own count of what is read and written, in which "
        "both sides of a branch count; temp is what it allocates besides; fusions are the loops "
        f"that it has made.{torch_note()}",
        (
            *("step", "ms", "IQR ms", "to AdamW", "to optax", "limit %"),
            *("bytes a parameter", "temp bytes a parameter", "fusions"),
        ),
        rows,
    )


LIMIT = (
    "Limit: the time in which the least of bytes would be copied in place, in percent of the "
    "step's own. It is of memory, not of caches: it says nothing about small sizes."
)


def compared(
    contender: Contender, times: Mapping[str, timing.Timing], label: str
) -> list[float | None]:
    """A step's time over that of AdamW alone and of optax's peer, and its percents of the limit."""
    ratio = times[label].ratio  # to the copy, in each round
    alone = ratio / times[contender.alone].ratio
    peer = None if contender.peer is None else ratio / times[contender.peer].ratio
    return [alone, peer, 100 * contender.passes / PASSES / ratio]


def counted(step: Any, parameters: int) -> list[float | int | None]:
    """What XLA says of a step: bytes and temporary bytes a parameter, and fusions."""
    if not isinstance(step, Step):
        return [None, None, None]
    totals = step.bytes_accessed(), step.temporary_bytes()
    return [*(None if n is None else n / parameters for n in totals), step.fusions()]


def size(dtype: Any) -> int:
    """Bytes of an entry."""
    return jnp.dtype(dtype).itemsize


def torch_note() -> str:
    """Its version and threads, where it takes part."""
    if not in_torch():
        return ""
    torch = importlib.import_module("torch")
    version = importlib.metadata.version("torch")
    return f" torch is {version}, with {torch.get_num_threads()} threads."


# --- Many small leaves ---------------------------------------------------------------------------


def small_leaves_table(sizes: Sizes, each: int = 64) -> timing.Table:
    """What a leaf costs, at running and at compiling."""
    leaves = sizes.small_leaves
    params = even(each * leaves, leaves)
    grads = gradients(params)
    steps: dict[str, Any] = {
        name: optimizer_step(contender.build(), params, grads)
        for name, contender in main_in_jax().items()
    }
    for name, contender in in_torch().items():
        steps[name] = contender.build(params, grads)
    times = timing.interleaved(steps, sizes.rounds)
    rows: list[tuple[timing.Cell, ...]] = []
    for name, step in steps.items():
        made = [None, None, None]
        if isinstance(step, Step):
            made = [step.trace_seconds, step.compile_seconds, step.fusions()]
        t = times[name]
        rows.append((name, 1e3 * t.median, 1e3 * (t.upper - t.lower), t.ratio, *made))
    return timing.Table(
        "small-leaves",
        f"One step: {leaves:,} leaves of {each} float32 entries",
        f"Ratio: to optax's AdamW. torch does not compile.{torch_note()}",
        ("step", "ms", "IQR ms", "ratio", "trace s", "compile s", "fusions"),
        rows,
    )


# --- Scaling -------------------------------------------------------------------------------------


def parameters_table(sizes: Sizes, leaves: int = 10) -> timing.Table:
    """Clip and AdamW of jaxreg and optax, from few parameters to all that fit."""
    fitting = [n for n in sizes.parameters if BYTES_A_PARAMETER * n <= memory()]
    rows = [(n, *scaling_row(n, leaves, sizes.rounds)) for n in fitting]
    return timing.Table(
        "parameters",
        f"One step of clip and AdamW by parameters, float32 in {leaves} leaves",
        f"{LIMIT} Copied: GB read and written a second. Sizes that do not fit into memory are "
        "left out.",
        ("parameters", *SCALING_COLUMNS),
        rows,
    )


def leaves_table(sizes: Sizes) -> timing.Table:
    """The same at one number of parameters, in few leaves or many."""
    rows = [(n, *scaling_row(sizes.entries, n, sizes.rounds)) for n in sizes.leaves]
    return timing.Table(
        "leaves",
        f"One step of clip and AdamW by leaves, {sizes.entries:,} float32 parameters",
        LIMIT,
        ("leaves", *SCALING_COLUMNS),
        rows,
    )


SCALING_COLUMNS = (
    *("GB/s copied", "optax ms", "jaxreg ms", "jaxreg / optax", "optax limit %", "jaxreg limit %"),
    *("optax compile s", "jaxreg compile s"),
)
# Of the copy 16, of each optimizer 12, of the gradients 4, of optax's temporary 4, and some more.
BYTES_A_PARAMETER = 60


def scaling_row(parameters: int, leaves: int, rounds: int) -> list[timing.Cell]:
    """One row in the order of SCALING_COLUMNS."""
    params = even(parameters, leaves)
    grads = gradients(params)
    optax_step = optimizer_step(optax_clipped(), params, grads)
    jaxreg_step = optimizer_step(jaxreg_adamw(MAX_NORM), params, grads)
    del params
    steps = {COPY: copy_step(parameters, jnp.float32), "optax": optax_step, "jaxreg": jaxreg_step}
    times = timing.interleaved(steps, rounds)
    peer, own = times["optax"], times["jaxreg"]
    copied = PASSES * size(jnp.float32) * parameters / times[COPY].median
    return [
        *(copied / 1e9, 1e3 * peer.median, 1e3 * own.median, own.ratio / peer.ratio),
        *(100 / peer.ratio, 100 / own.ratio),
        *(optax_step.compile_seconds, jaxreg_step.compile_seconds),
    ]


def memory() -> float:
    """The bytes that arrays may take: the device's limit, or half of the host's memory."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


if __name__ == "__main__":
    main()
