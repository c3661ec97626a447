"""What do the losses cost, in time and memory: here, in optax, in plain JAX and in torch?

The gradient of a cross-entropy takes an exponential for each logit, reads the logits and writes as
much. That, in one pass, is the limit of the tables of dense logits. A loss fused with the product
that its logits come from takes three matrix products, which are its limit. All contenders of a
table take turns.

    python -m bench.losses [--quick] [--out bench/results] [--tables dense-float32 linear ...]
"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg
from bench import peers, step, timing

SMOOTHING = 0.1
SCALE = 3.0  # of the logits' noise
MEGABYTE = 1e6
Loss = Callable[..., jax.Array]


class Linear(NamedTuple):
    """The sizes of a linear layer and its batch."""

    tokens: int
    features: int
    classes: int
    dtype: Any


class Sizes(NamedTuple):
    """How much a run measures."""

    dense: tuple[int, int]  # rows and classes
    linear: Linear
    block_sizes: tuple[int, ...]
    vocabularies: tuple[int, ...]
    memory: tuple[int, int]  # tokens and features, of each vocabulary
    accuracy: tuple[int, int]  # rows and classes
    rounds: int
    linear_rounds: int
    compiles_torch: bool  # for which its compiler takes half a minute


FULL_ON_CPU = Sizes(
    dense=(4096, 32_000),
    linear=Linear(4096, 512, 32_000, jnp.float32),
    block_sizes=(128, 256, 512, 1024),
    vocabularies=(1000, 8000, 32_000, 128_256, 151_936),
    memory=(1024, 256),
    accuracy=(512, 32_000),
    rounds=21,
    linear_rounds=7,
    compiles_torch=True,
)
FULL = FULL_ON_CPU._replace(
    linear=Linear(16_384, 4096, 128_256, jnp.bfloat16),
    block_sizes=(128, 256, 512, 1024, 2048, 4096),
    linear_rounds=21,
)
QUICK = Sizes(
    dense=(64, 500),
    linear=Linear(64, 16, 500, jnp.float32),
    block_sizes=(32,),
    vocabularies=(500, 1000),
    memory=(64, 16),
    accuracy=(16, 500),
    rounds=3,
    linear_rounds=3,
    compiles_torch=False,
)


def main() -> None:
    """Runs the benchmark, prints the tables and writes them down."""
    options = timing.parser("What do the losses cost, in time and memory?")
    makers: dict[str, Callable[[Sizes], timing.Table]] = {
        "dense-float32": lambda sizes: dense_table(sizes, jnp.float32, backward=True),
        "dense-bfloat16": lambda sizes: dense_table(sizes, jnp.bfloat16, backward=True),
        "forward-float32": lambda sizes: dense_table(sizes, jnp.float32, backward=False),
        "forward-bfloat16": lambda sizes: dense_table(sizes, jnp.bfloat16, backward=False),
        "linear": linear_table,
        "vocabularies": vocabularies_table,
        "accuracy": accuracy_table,
        FRESH: lambda sizes: dense_table(sizes, jnp.float32, backward=True, fresh=True),
    }
    options.add_argument("--tables", nargs="+", choices=makers, default=[*makers], help="or all")
    arguments = options.parse_args()
    # Before torch is imported: its idle threads would spin, on the cores that XLA needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Before JAX takes most of a GPU's memory, of which torch needs its part.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if step.in_torch():
        importlib.import_module("torch").set_num_threads(os.cpu_count() or 1)
    full = FULL_ON_CPU if jax.default_backend() == "cpu" else FULL
    tables = []
    # Kept memory from the start, before threads have arenas of their own; fresh memory at the end.
    peers.keep_freed_memory()
    for name in sorted(arguments.tables, key=lambda name: name == FRESH):
        if name == FRESH:
            peers.give_back_freed_memory()
        tables.append(makers[name](QUICK if arguments.quick else full))
    title = "What the losses cost, in time and memory"
    timing.report(f"losses-{jax.devices()[0].platform}", title, tables, arguments)


# --- Contenders ----------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Labels, and what only some contenders take: weights of the classes, and which exist."""

    labels: jax.Array
    weights: jax.Array
    exist: jax.Array


def targets(rows: int, classes: int) -> Targets:
    """Random ones. The labels are among the classes that exist, which are all but the last."""
    keys = jax.random.split(jax.random.key(1))
    labels = jax.random.randint(keys[0], (rows,), 0, classes - 1)
    weights = jax.random.uniform(keys[1], (classes,), minval=0.5, maxval=2.0)
    return Targets(labels, weights, jnp.arange(classes) < classes - 1)


def jaxreg_loss(x: jax.Array, y: Targets, **options: Any) -> jax.Array:
    """The mean loss of jaxreg."""
    options = {"smoothing": SMOOTHING, "reduction": "mean", **options}
    return jaxreg.smoothed_cross_entropy(x, y.labels, **options)


def optax_loss(x: jax.Array, y: Targets, smoothing: float = SMOOTHING) -> jax.Array:
    """The mean loss by optax's `smooth_labels` of a one-hot array."""
    x = x.astype(jnp.float32)
    q = optax.smooth_labels(jax.nn.one_hot(y.labels, x.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(x, q))


def optax_integer_loss(x: jax.Array, y: Targets) -> jax.Array:
    """The mean loss of optax without smoothing."""
    x = x.astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, y.labels))


def plain_loss(x: jax.Array, y: Targets) -> jax.Array:
    """The mean loss as one writes it by hand."""
    x = x.astype(jnp.float32)
    at_label = jnp.take_along_axis(x, y.labels[:, None], -1)[:, 0]
    kept = (1 - SMOOTHING) * at_label + SMOOTHING * jnp.mean(x, -1)
    return jnp.mean(jax.nn.logsumexp(x, -1) - kept)


FRESH = "dense-float32-fresh"
OPTAX, TORCH, EXPONENTIALS = "optax smooth_labels", "torch", "exp(x - m)"
LOSSES: Mapping[str, Loss] = {
    OPTAX: optax_loss,
    "optax integer labels, not smoothed": optax_integer_loss,
    "plain JAX": plain_loss,
    "jaxreg": jaxreg_loss,
    "jaxreg, not smoothed": lambda x, y: jaxreg_loss(x, y, smoothing=0.0),
    "jaxreg, z_loss": lambda x, y: jaxreg_loss(x, y, z_loss=1e-4),
    "jaxreg, class_weights": lambda x, y: jaxreg_loss(x, y, class_weights=y.weights),
    "jaxreg, where": lambda x, y: jaxreg_loss(x, y, where=y.exist),
}


class Call:
    """A call of a function, which is compiled at once for arguments or their shapes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.arguments = arguments
        self.compiled = jax.jit(function).lower(*arguments).compile()

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)

    def temporary_bytes(self) -> int | None:
        """Bytes that XLA allocates besides arguments and results; None where it doesn't say."""
        return getattr(self.compiled.memory_analysis(), "temp_size_in_bytes", None)

    def fits(self) -> bool:
        """Whether that and a result have a place in memory, as far as XLA says."""
        result = getattr(self.compiled.memory_analysis(), "output_size_in_bytes", 0)
        return (self.temporary_bytes() or 0) + result < step.memory()


class OfTorch:
    """What torch has computed; it can be waited for, like an array of JAX's."""

    def __init__(self, *tensors: Any):
        self.tensors = tensors

    def block_until_ready(self) -> None:
        """Waits for the device; `jax.block_until_ready` calls it."""
        if self.tensors[0].is_cuda:
            importlib.import_module("torch").cuda.synchronize()


def tensor(x: jax.Array) -> Any:
    """A copy for torch, on the device that JAX uses."""
    torch = importlib.import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    # Of float32, since NumPy has no bfloat16 that torch knows.
    host = np.array(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x)
    dtype = torch.int64 if host.dtype.kind == "i" else getattr(torch, x.dtype.name)
    return torch.from_numpy(host).to(device, dtype)


def torch_loss(x: Any, labels: Any, smoothing: float = SMOOTHING, reduction: str = "mean") -> Any:
    """The loss of torch."""
    loss = importlib.import_module("torch").nn.functional.cross_entropy
    return loss(x, labels, label_smoothing=smoothing, reduction=reduction)


def torch_call(loss: Callable[..., Any], *arrays: Any, backward: bool) -> Callable[[], OfTorch]:
    """A call of torch's: a loss of arrays, and its gradient in all of them."""
    torch = importlib.import_module("torch")

    def call() -> OfTorch:
        with torch.set_grad_enabled(backward):
            value = loss(*arrays)
        return OfTorch(value, *(torch.autograd.grad(value, arrays) if backward else ()))

    for x in arrays:
        x.requires_grad_(backward)
    return call


# --- Dense logits --------------------------------------------------------------------------------


def dense_table(sizes: Sizes, dtype: Any, *, backward: bool, fresh: bool = False) -> timing.Table:
    """All losses of given logits, with their gradient or without; where memory is fresh or kept."""
    rows, classes = sizes.dense
    x = (SCALE * jax.random.normal(jax.random.key(0), sizes.dense)).astype(dtype)
    y = targets(rows, classes)
    calls: dict[str, Callable[[], Any]] = {
        name: Call(jax.value_and_grad(loss) if backward else loss, x, y)
        for name, loss in LOSSES.items()
    }
    calls[EXPONENTIALS] = Call(exponentials, x, jnp.max(x, 1, keepdims=True))
    if step.in_torch():
        calls |= dense_in_torch(sizes, x, y, backward=backward)
    times = timing.interleaved(calls, sizes.rounds)
    found: list[tuple[timing.Cell, ...]] = []
    for name, call in calls.items():
        t = times[name]
        to_torch = t.ratio / times[TORCH].ratio if TORCH in times else None
        limit = 100 * times[EXPONENTIALS].ratio / t.ratio
        temporary = call.temporary_bytes() if isinstance(call, Call) else None
        each = None if temporary is None else temporary / x.size
        spread = 1e3 * (t.upper - t.lower)
        found.append((name, 1e3 * t.median, spread, t.ratio, to_torch, limit, each))
    label = jnp.dtype(dtype).name
    kind = "Forward and backward" if backward else "Forward alone"
    write = (
        "as large as the gradient"
        if backward
        else "as large as the logits, which the loss alone does not need, so that less is possible"
    )
    memory = (
        "Memory as glibc gives it: an array of this size has fresh pages in each call, of which "
        "temporaries take more."
        if fresh
        else "glibc keeps freed memory, for all: no one pays for fresh pages."
    )
    name = FRESH if fresh else f"{'dense' if backward else 'forward'}-{label}"
    title = f"{kind}: {rows:,} x {classes:,} {label} logits{', in fresh memory' if fresh else ''}"
    return timing.Table(
        name,
        title,
        f"The mean over rows, smoothing {SMOOTHING}. Ratios are of times, to optax and to torch. "
        f"Limit: the time of {EXPONENTIALS}, m being the rows' largest logits that it is given, in "
        "percent of the loss's own. It reads the logits, takes one exponential of each in float32 "
        f"and writes an array {write}. Temp: what XLA allocates besides arguments and results. "
        "Logits of 16 bits are cast to float32 for optax and plain JAX, as is usual; jaxreg and "
        f"torch get them as they are. {memory}{step.torch_note()}",
        ("loss", "ms", "IQR ms", "to optax", "to torch", "limit %", "temp bytes a logit"),
        found,
    )


def dense_in_torch(
    sizes: Sizes, x: jax.Array, y: Targets, *, backward: bool
) -> dict[str, Callable[[], OfTorch]]:
    """The loss of torch, and what its compiler makes of it where that works."""
    torch = importlib.import_module("torch")
    labels, logits = tensor(y.labels), tensor(x)
    calls = {TORCH: torch_call(lambda x: torch_loss(x, labels), logits, backward=backward)}
    if sizes.compiles_torch:
        compiled = torch.compile(torch_loss)
        call = torch_call(lambda x: compiled(x, labels), logits, backward=backward)
        try:
            call()
        except Exception as found:  # of many kinds: where there is no compiler of C++, say
            print(f"torch.compile does not work here: {found}")
        else:
            calls[f"{TORCH}.compile"] = call
    return calls


def exponentials(x: jax.Array, largest: jax.Array) -> jax.Array:
    """The least that a gradient takes: an exponential of each logit."""
    return jnp.exp(x.astype(jnp.float32) - largest.astype(jnp.float32)).astype(x.dtype)


# --- Fused with the product ----------------------------------------------------------------------


DENSE, OPTAX_LINEAR, PRODUCT = "jaxreg of hidden @ kernel", "optax of hidden @ kernel", "product"
FUSED = "linear_cross_entropy"


def linear_losses(block_sizes: tuple[int, ...]) -> dict[str, Loss]:
    """The mean loss of hidden, kernel and targets, by each contender in JAX."""

    def fused(**options: Any) -> Loss:
        options = {"reduction": "mean", **options}
        return lambda hidden, kernel, y: jaxreg.linear_cross_entropy(
            hidden, kernel, y.labels, smoothing=SMOOTHING, **options
        )

    by_token = fused(reduction="none")
    return {
        DENSE: lambda hidden, kernel, y: jaxreg_loss(hidden @ kernel, y),
        OPTAX_LINEAR: lambda hidden, kernel, y: optax_loss(hidden @ kernel, y),
        FUSED: fused(),
        **{f"{FUSED}, block_size {n}": fused(block_size=n) for n in block_sizes},
        f"{FUSED}, none": lambda hidden, kernel, y: jnp.mean(by_token(hidden, kernel, y)),
    }


def linear_table(sizes: Sizes) -> timing.Table:
    """Losses of a linear layer, dense and fused."""
    tokens, features, classes, dtype = sizes.linear
    keys = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(keys[0], (tokens, features)).astype(dtype)
    kernel = SCALE / features**0.5 * jax.random.normal(keys[1], (features, classes))
    kernel = kernel.astype(dtype)
    y = targets(tokens, classes)
    compiled = {
        name: Call(jax.value_and_grad(loss, (0, 1)), hidden, kernel, y)
        for name, loss in linear_losses(sizes.block_sizes).items()
    }
    calls: dict[str, Callable[[], Any]] = {n: call for n, call in compiled.items() if call.fits()}
    calls[PRODUCT] = Call(jnp.matmul, hidden, kernel)
    if DENSE in calls:
        calls |= linear_in_torch(hidden, kernel, y)
    times = timing.interleaved(calls, sizes.linear_rounds)
    operations = 6 * tokens * features * classes
    dense = compiled[DENSE].temporary_bytes()
    rows: list[tuple[timing.Cell, ...]] = []
    for name in {**compiled, **calls}:
        figures: list[timing.Cell] = [None] * 5
        if name in times:
            t = times[name]
            to_dense = t.ratio / times[DENSE].ratio if DENSE in times else None
            figures = [1e3 * t.median, 1e3 * (t.upper - t.lower), to_dense]
            if name != PRODUCT:
                share = 100 * 3 * times[PRODUCT].ratio / t.ratio
                figures += [operations / t.median / 1e9, share]
            else:
                figures += [operations / 3 / t.median / 1e9, None]
        temporary = compiled[name].temporary_bytes() if name in compiled else None
        memory: list[timing.Cell] = [None, None]
        if temporary is not None and dense:
            memory = [temporary / MEGABYTE, temporary / dense]
        rows.append((name, *figures, *memory))
    left_out = "; ".join(name for name in compiled if name not in calls)
    return timing.Table(
        "linear",
        f"Linear layer and loss: {tokens:,} tokens x {features:,} x {classes:,} classes, "
        f"{jnp.dtype(dtype).name}",
        "The mean over tokens and its gradient in hidden and kernel. Ratios are to the dense loss "
        f"({DENSE}). GFLOP/s are of the three products without which it can't be done; limit: "
        "three times the measured time of one (hidden @ kernel), in percent of the loss's own. "
        '"none" makes the logits once more, for the backward pass: four products. Temp: what XLA '
        "allocates besides arguments and results, to which the gradients belong. glibc keeps freed "
        f"memory, for all.{step.torch_note()}"
        + (f" Not enough memory for: {left_out}." if left_out else ""),
        (
            *("loss", "ms", "IQR ms", "to dense", "GFLOP/s", "limit %"),
            *("temp MB", "temp / dense"),
        ),
        rows,
    )


def linear_in_torch(
    hidden: jax.Array, kernel: jax.Array, y: Targets
) -> dict[str, Callable[[], OfTorch]]:
    """The layer and loss of torch, and Liger's fused ones, where they are installed."""
    if not step.in_torch():
        return {}
    labels, arrays = tensor(y.labels), (tensor(hidden), tensor(kernel.T))
    linear = importlib.import_module("torch").nn.functional.linear
    losses: dict[str, Callable[..., Any]] = {
        "torch linear, cross_entropy": lambda hidden, kernel: torch_loss(
            linear(hidden, kernel), labels
        )
    }
    if peers.installed("liger_kernel") and jax.default_backend() == "gpu":
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        fused = module.LigerFusedLinearCrossEntropyLoss(label_smoothing=SMOOTHING)
        losses["Liger fused"] = lambda hidden, kernel: fused(kernel, hidden, labels)
    return {name: torch_call(loss, *arrays, backward=True) for name, loss in losses.items()}


# --- Memory against vocabulary -------------------------------------------------------------------


def vocabularies_table(sizes: Sizes) -> timing.Table:
    """What XLA would allocate, by the number of classes; nothing is run."""
    tokens, features = sizes.memory
    losses = linear_losses(())
    rows: list[tuple[timing.Cell, ...]] = []
    for classes in sizes.vocabularies:
        shapes = (
            jax.ShapeDtypeStruct((tokens, features), jnp.float32),
            jax.ShapeDtypeStruct((features, classes), jnp.float32),
            jax.eval_shape(lambda classes=classes: targets(tokens, classes)),
        )
        found: list[timing.Cell] = []
        for name in (OPTAX_LINEAR, DENSE, FUSED):
            total = Call(jax.value_and_grad(losses[name], (0, 1)), *shapes).temporary_bytes()
            found.append(None if total is None else total / MEGABYTE)
        logits, kernel = (4 * n * classes / MEGABYTE for n in (tokens, features))
        rows.append((classes, *found, logits, kernel))
    return timing.Table(
        "vocabularies",
        f"Memory by vocabulary: {tokens:,} tokens x {features:,} features, float32",
        "MB that XLA allocates for a linear layer, its mean loss and the gradient in hidden and "
        "kernel, besides arguments and results. Compiled, not run. The last columns are what one "
        "array of the logits takes, and one of the kernel.",
        ("classes", OPTAX_LINEAR, DENSE, FUSED, "logits MB", "kernel MB"),
        rows,
    )


# --- Accuracy ------------------------------------------------------------------------------------


def accuracy_table(sizes: Sizes) -> timing.Table:
    """How far gradients are from those of float64."""
    y = targets(*sizes.accuracy)
    rows: list[tuple[timing.Cell, ...]] = []
    for dtype in (jnp.float32, jnp.bfloat16):
        for kind in ("ordinary", "confident"):
            x = predictions(y.labels, sizes.accuracy, confident=kind == "confident").astype(dtype)
            for e in (0.0, SMOOTHING):
                found = gradients(x, y, e)
                true = true_gradient(np.asarray(x, np.float64), np.asarray(y.labels), e)
                errors = [
                    f"{error(found[name], true):.1e}" if name in found else None
                    for name in (JAXREG, OPTAX, TORCH)
                ]
                rows.append((jnp.dtype(dtype).name, kind, e, *errors))
    count, classes = sizes.accuracy
    return timing.Table(
        "accuracy",
        f"Error of the gradient: {count:,} rows of {classes:,} logits",
        "The norm of a row's error over that of the row's gradient, the largest of all rows; the "
        f"truth is in float64, of the same logits. Ordinary: noise of scale {SCALE}. Confident: "
        "the label has a probability above 1 - 1e-6. Logits of 16 bits are cast to float32 for "
        "optax; jaxreg and torch get them as they are. The gradient has the logits' dtype, whose "
        f"rounding is up to 6.0e-08 in float32 and 3.9e-03 in bfloat16.{step.torch_note()}",
        ("logits", "predictions", "smoothing", JAXREG, OPTAX, TORCH),
        rows,
    )


JAXREG = "jaxreg"


def predictions(labels: jax.Array, shape: tuple[int, int], *, confident: bool) -> jax.Array:
    """Logits of noise; where they are confident, the label's is 15 to 20 above all others' sum."""
    x = SCALE * jax.random.normal(jax.random.key(0), shape)
    if not confident:
        return x
    is_label = jnp.arange(shape[1]) == labels[:, None]
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, x), 1, keepdims=True)
    above = jnp.linspace(15, 20, shape[0])[:, None]
    return jnp.where(is_label, others + above, x)


def gradients(x: jax.Array, y: Targets, smoothing: float) -> dict[str, np.ndarray]:
    """Of the losses' sum, by each contender."""

    def summed(loss: Loss) -> np.ndarray:
        call = jax.jit(jax.grad(lambda x: len(x) * loss(x, y, smoothing=smoothing)))
        return np.asarray(call(x), np.float64)

    found = {JAXREG: summed(jaxreg_loss), OPTAX: summed(optax_loss)}
    if step.in_torch():
        labels = tensor(y.labels)
        call = torch_call(
            lambda x: torch_loss(x, labels, smoothing, "sum"), tensor(x), backward=True
        )
        found[TORCH] = call().tensors[1].double().cpu().numpy()
    return found


def true_gradient(x: np.ndarray, labels: np.ndarray, smoothing: float) -> np.ndarray:
    """The gradient p - v; of the label (1 - v) - (1 - p), with 1 - p as the others' sum."""
    classes, rows = x.shape[1], np.arange(len(x))
    exponentials = np.exp(x - x.max(1, keepdims=True))
    total = exponentials.sum(1)
    others = exponentials.copy()
    others[rows, labels] = 0
    gradient = exponentials / total[:, None] - smoothing / classes
    gradient[rows, labels] = smoothing * (classes - 1) / classes - others.sum(1) / total
    return gradient


def error(found: np.ndarray, true: np.ndarray) -> float:
    """The norm of a row's error over that of the row, the largest of all."""
    norm = np.linalg.norm
    return float(np.max(norm(found - true, axis=1) / norm(true, axis=1)))


if __name__ == "__main__":
    main()
