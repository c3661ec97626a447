"""Regularization for JAX: pure functions, composed as optax gradient transformations."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxreg import where as where
    from jaxreg._check import ArgumentError as ArgumentError
    from jaxreg._tree import global_norm as global_norm
    from jaxreg.losses import smoothed_cross_entropy as smoothed_cross_entropy
    from jaxreg.noise import dropout as dropout
    from jaxreg.optimizers import prox_adam as prox_adam
    from jaxreg.optimizers import prox_sgd as prox_sgd
    from jaxreg.optimizers import regularize as regularize
    from jaxreg.penalties import L1 as L1
    from jaxreg.penalties import L2 as L2
    from jaxreg.penalties import Box as Box
    from jaxreg.penalties import ElasticNet as ElasticNet
    from jaxreg.penalties import NonNegative as NonNegative
    from jaxreg.penalties import Penalty as Penalty
    from jaxreg.transforms import clip_by_global_norm as clip_by_global_norm
    from jaxreg.transforms import l2_decay as l2_decay
    from jaxreg.transforms import metric as metric
    from jaxreg.transforms import proximal as proximal
    from jaxreg.transforms import weight_decay as weight_decay

__version__ = "0.1.0"

# Where each public name lives. Modules are loaded when a name is first used (PEP 562), so that
# `import jaxreg` costs next to nothing and needs no optional dependency.
_HOMES = {
    "ArgumentError": "jaxreg._check",
    "L1": "jaxreg.penalties",
    "L2": "jaxreg.penalties",
    "Box": "jaxreg.penalties",
    "ElasticNet": "jaxreg.penalties",
    "NonNegative": "jaxreg.penalties",
    "Penalty": "jaxreg.penalties",
    "clip_by_global_norm": "jaxreg.transforms",
    "dropout": "jaxreg.noise",
    "global_norm": "jaxreg._tree",
    "l2_decay": "jaxreg.transforms",
    "metric": "jaxreg.transforms.metric",
    "prox_adam": "jaxreg.optimizers",
    "prox_sgd": "jaxreg.optimizers",
    "proximal": "jaxreg.transforms",
    "regularize": "jaxreg.optimizers",
    "smoothed_cross_entropy": "jaxreg.losses",
    "weight_decay": "jaxreg.transforms",
    "where": "jaxreg.where",
}

__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxreg' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if module.__name__.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
