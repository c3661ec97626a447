"""What a comparison says of the structure of weights; without JAX, as the report is."""

from collections.abc import Mapping
from statistics import mean
from typing import Any


def structure_notes(results: Mapping[str, Any]) -> list[str]:
    """What the structure of the weights came to: targets of zeros that were missed, low ranks.

    Args:
        results: the content of ``results.json``.
    """
    said = []
    for recipe in results["recipes"]:
        name, target = recipe["name"], recipe["target_zeros"]
        zeros, ranks = ([seed[key] for seed in recipe["seeds"]] for key in ("zeros", "rank"))
        if None in (*zeros, *ranks):
            continue  # diverged
        share, rank = mean(zeros), mean(ranks)
        if target is not None and abs(share - target) > 0.01:
            missed = f"{name} missed its target of {target:.0%} zeros: it has {share:.1%}"
            said.append(f"{missed}. More epochs may reach it." if share < target else f"{missed}.")
        if rank < 0.95:
            said.append(f"Kernels of {name} have {rank:.0%} of the rank they could have.")
    return said
