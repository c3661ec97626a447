"""The numbers of features that layers of Flax hold beside their weights."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from jaxreg import _check


def refuse_methods(function: Any) -> None:
    """An error for a method of a Flax module that is no function of its parameters."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if is_of(owner, "flax.nnx"):
        given, accepted = f"the method {name} of an NNX model", "the model: compress(model, x)"
        raise _check.ArgumentError("model", given, accepted)
    if is_of(function, "flax.linen") or (is_of(owner, "flax.linen") and name != "apply"):
        given = f"the method {name} of a Linen module" if owner else "a Linen module"
        accepted = "its function and variables: compress(module.apply, variables, x)"
        raise _check.ArgumentError("model", given, accepted)


def is_of(value: Any, package: str) -> bool:
    """Whether the class of a value, or one that it is derived from, is from a package."""
    return any(cls.__module__.startswith(package) for cls in type(value).__mro__)


# NNX ---------------------------------------------------------------------------------------------


def values_of_attention(model: Any, names: Collection[str]) -> list[str]:
    """The names of kernels whose outputs are as long as those of the keys."""
    from flax import nnx

    parts = nnx.iter_graph(model)
    attention = [path for path, part in parts if isinstance(part, nnx.MultiHeadAttention)]
    found = ("/".join([*map(str, path), "value", "kernel"]) for path in attention)
    return [name for name in found if name in names]  # not one that is shared or replaced


def set_features(layer: Any) -> None:
    """Makes the numbers of features that a layer of NNX was built with those of its weights."""
    for name, value in _features(layer).items():
        if hasattr(layer, name):
            setattr(layer, name, value)


def _features(layer: Any) -> dict[str, Any]:
    """The numbers of features of a layer, by the attributes that hold them."""
    from flax import nnx

    def shape(name: str) -> tuple[int, ...]:
        return tuple(getattr(getattr(layer, name, None), "shape", ()))

    kernel, own = shape("kernel"), getattr(layer, "in_features", None)
    if isinstance(layer, nnx.MultiHeadAttention):
        query, key, out = (
            getattr(getattr(part, "kernel", None), "shape", None)
            for part in (layer.query, layer.key, layer.out)
        )
        found = {}
        if query:  # a part may have been replaced by another layer
            inputs, heads, depth = query
            found |= {"num_heads": heads, "head_dim": depth, "qkv_features": heads * depth}
            found["in_features"] = inputs
        if key:
            found |= {"in_kv_features": key[0], "num_kv_heads": key[1]}
        return found | ({"out_features": out[-1]} if out else {})
    if isinstance(own, tuple):  # of several axes
        return {"in_features": kernel[: len(own)], "out_features": kernel[len(own) :]}
    if len(kernel) > 1:
        ends = kernel[-2:][::-1] if getattr(layer, "transpose_kernel", False) else kernel[-2:]
        inputs = ends[0] * getattr(layer, "feature_group_count", 1)
        return {"in_features": inputs, "out_features": ends[1], "kernel_shape": kernel}
    if shape("embedding"):
        return dict(zip(("num_embeddings", "features"), shape("embedding"), strict=True))
    if shape("lora_a"):
        return {"in_features": shape("lora_a")[0], "out_features": shape("lora_b")[-1]}
    norm = shape("scale") or shape("bias") or shape("mean")
    return {"num_features": norm[-1]} if norm else {}


# Linen -------------------------------------------------------------------------------------------


def at_widths_of_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which each layer of Linen has as many features as its weights."""

    def called(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, name = context.module, context.method_name
        features = _linen_features(layer)
        if features == getattr(layer, "features", None):
            return method(*args, **kwargs)
        if name == "setup":  # where embeddings define their weights, and would refuse others
            return None
        own = layer.clone(features=features, parent=None)
        return own.apply(layer.variables, *args, method=name, **kwargs)

    def at_widths(*args: Any) -> Any:
        from flax import linen  # here, as few functions need it

        with linen.intercept_methods(called):
            return function(*args)

    return at_widths


def _linen_features(layer: Any) -> Any:
    """The number of features of the weights of a layer, or its own where it has no such."""
    own, params = getattr(layer, "features", None), layer.variables.get("params", {})
    weights = jax.tree.leaves(params.get("kernel", params.get("embedding")))
    if own is None or not weights:
        return own
    shape = weights[0].shape
    if isinstance(own, int):
        return shape[-2 if getattr(layer, "transpose_kernel", False) else -1]
    return type(own)(shape[-len(own) :])
