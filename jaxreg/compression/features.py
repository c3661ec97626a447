"""The numbers of features that layers of Flax NNX hold beside their weights."""

from typing import Any


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
        inputs, heads, depth = layer.query.kernel.shape
        found = {"num_heads": heads, "head_dim": depth, "qkv_features": heads * depth}
        found |= {"in_features": inputs, "out_features": layer.out.kernel.shape[-1]}
        others, key_heads, _ = layer.key.kernel.shape
        return found | {"in_kv_features": others, "num_kv_heads": key_heads}
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
