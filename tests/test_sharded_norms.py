"""Norms and clips of gradients whose leaves are sharded along the axes of a mesh."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxreg
from jaxreg import norms

pytestmark = pytest.mark.core

P = PartitionSpec
SPECS = {"x": P("x"), "y": P(None, "y"), "both": P("x", "y"), "joint": P(("x", "y")), "none": P()}
AXES = ("x", "y")


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), AXES, axis_types=(kind, kind))


def grads(scale=1.0):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(scale * rng.normal(size=(8, 4)), jnp.float32) for name in SPECS}


@pytest.fixture
def by_select(monkeypatch):
    """The way that norms are taken on GPUs and TPUs."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *, cpu, default: default())


def mapped(function, out_specs, specs=SPECS, check_vma=True):
    whole = jax.shard_map(
        function, mesh=mesh_of(), in_specs=(specs,), out_specs=out_specs, check_vma=check_vma
    )
    return jax.jit(whole)  # op by op, 8 devices compile each of them


def clipped(tx):
    """The clipped gradient and the norms that the clip saw."""

    def update(tree):
        updates, state = tx.update(tree, tx.init(tree))
        return updates, (state.norm, state.clipped_norm, state.coefficients)

    return update


# Inside shard_map --------------------------------------------------------------------------------


NORMS = {
    "global_norm": jaxreg.global_norm,
    "leaf_norms": jaxreg.leaf_norms,
    "rms": jaxreg.rms,
}


def all_norms(tree, **options):
    return [norm(tree, **options) for norm in NORMS.values()]


def norms_of_pieces(specs=SPECS, **options):
    return mapped(lambda tree: all_norms(tree, axis_name=AXES), P(), specs, **options)


def test_norms_of_pieces_are_those_of_the_whole():
    found = norms_of_pieces()
    for scale in (1.0, 1e25, 1e-25):
        chex.assert_trees_all_close(found(grads(scale)), all_norms(grads(scale)), rtol=1e-6)


@pytest.mark.usefixtures("by_select")
def test_norms_of_pieces_are_those_of_the_whole_on_gpus():
    found = norms_of_pieces()
    for scale in (1.0, 1e25, 1e-25):
        chex.assert_trees_all_close(found(grads(scale)), all_norms(grads(scale)), rtol=1e-6)


def test_norms_of_leaves_that_all_lack_an_axis():
    """A leaf that is on all devices along an axis counts once, also where no other is sharded."""
    for specs in (dict.fromkeys(SPECS, P("x")), dict.fromkeys(SPECS, P())):
        chex.assert_trees_all_close(norms_of_pieces(specs)(grads()), all_norms(grads()), rtol=1e-6)


def test_without_check_vma_leaves_count_as_sharded():
    found = norms_of_pieces(dict.fromkeys(SPECS, P("x", "y")), check_vma=False)(grads())
    chex.assert_trees_all_close(found, all_norms(grads()), rtol=1e-6)


def test_one_axis_of_two_gives_the_norm_of_each_slice():
    specs = {"w": P("x", "y")}
    w = grads()["x"]
    found = mapped(lambda t: jaxreg.global_norm(t, axis_name="x")[None], P("y"), specs)({"w": w})
    expected = jnp.stack([jaxreg.global_norm(w[:, :2]), jaxreg.global_norm(w[:, 2:])])
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_an_empty_leaf_and_an_empty_tree():
    tree, specs = {"a": jnp.zeros((0, 4)), "b": jnp.ones((8, 4))}, {"a": P(), "b": P("x")}
    found = mapped(lambda t: jaxreg.global_norm(t, axis_name=AXES), P(), specs)(tree)
    np.testing.assert_allclose(found, 32**0.5, rtol=1e-6)
    assert float(mapped(lambda t: jaxreg.rms(t, axis_name=AXES), P(), {})({})) == 0


@pytest.mark.parametrize("where", ["x", ("x", "y")])
def test_gradients_pass_through_the_collective(where):
    specs = {"w": P(where)}
    w = grads()["x"]
    function = lambda t: jaxreg.global_norm(t, axis_name=where)  # noqa: E731
    found = jax.grad(mapped(function, P(), specs))({"w": w})["w"]
    chex.assert_trees_all_close(found, w / jaxreg.global_norm(w), rtol=1e-5)


CLIPS = {
    "clip_by_global_norm": lambda **kw: jaxreg.clip_by_global_norm(0.5, **kw),
    "torch": lambda **kw: jaxreg.clip_by_global_norm(0.5, semantics="torch", **kw),
    "optax": lambda **kw: jaxreg.clip_by_global_norm(0.5, semantics="optax", **kw),
    "keras": lambda **kw: jaxreg.clip_by_global_norm(0.5, semantics="keras", **kw),
    "clip_by_leaf_norm": lambda **kw: jaxreg.clip_by_leaf_norm(0.5, **kw),
    "clip_by_group_norm": lambda **kw: jaxreg.clip_by_group_norm({"?o*": 0.5, "x": 0.1}, **kw),
    "clip_update_rms": lambda **kw: jaxreg.clip_update_rms(0.1, **kw),
    "autoclip": lambda **kw: jaxreg.autoclip(10, **kw),
    "zclip": lambda **kw: jaxreg.zclip(warm_up=2, **kw),
    "adagc": lambda **kw: jaxreg.adagc(**kw),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips_of_pieces_are_those_of_the_whole(name):
    make = CLIPS[name]
    found = mapped(clipped(make(axis_name=AXES)), (SPECS, P()))(grads())
    whole = jax.jit(clipped(make()))(grads())
    chex.assert_trees_all_close(found, whole, rtol=2e-6, atol=1e-7)


def test_without_axis_name_a_shard_clips_by_its_own_norm_and_with_it_by_that_of_all():
    """optax, silently: a norm of 2.83, as each of 8 devices clips its own piece to 1."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def run(**options):
        tx = jaxreg.clip_by_global_norm(1.0, **options)
        update = lambda g: tx.update(g, tx.init(g))[0]  # noqa: E731
        mapped = jax.shard_map(update, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        return jax.jit(mapped)(jnp.ones(64))

    np.testing.assert_allclose(jnp.linalg.norm(run()), 8**0.5, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(run(axis_name="d")), 1, rtol=1e-6)


def test_a_bad_entry_on_one_device_is_seen_by_all():
    tree = grads()
    tree["x"] = tree["x"].at[0, 0].set(jnp.nan)
    for policy in ("skip", "zero"):
        tx = jaxreg.clip_by_global_norm(0.5, axis_name=AXES, on_nonfinite=policy)
        update = lambda t, tx=tx: (lambda u, s: (u, s.nonfinite))(*tx.update(t, tx.init(t)))  # noqa: E731
        updates, count = mapped(update, (SPECS, P()))(tree)
        assert count == 1
        cleaned = tree | {"x": tree["x"].at[0, 0].set(0)}
        alone = clipped(jaxreg.clip_by_global_norm(0.5))(cleaned)[0]
        expected = alone if policy == "zero" else jax.tree.map(jnp.zeros_like, tree)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_adaptive_clip_refuses_the_pieces_of_units():
    """Their norms are not those of the units: under jit sharded units are whole."""
    tx = jaxreg.adaptive_clip(0.01)
    update = lambda g, w: tx.update(g, tx.init(w), w)[0]  # noqa: E731
    for specs in ((P("x", "y"), P("x", "y")), (P("x"), P()), (P(), P("y"))):
        both = jax.shard_map(update, mesh=mesh_of(), in_specs=specs, out_specs=P("x", "y"))
        with pytest.raises(ValueError, match=r"^updates: got arrays that differ .*; accepted"):
            jax.jit(both)(jnp.ones((8, 4)), jnp.ones((8, 4)))
    whole = jax.shard_map(update, mesh=mesh_of(), in_specs=P(), out_specs=P())
    found = jax.jit(whole)(jnp.ones((8, 4)), jnp.ones((8, 4)))
    np.testing.assert_allclose(found, 0.01, rtol=1e-6)


def test_skip_step_and_value_clips_decide_together():
    tree = grads()
    tree["both"] = tree["both"].at[0, 0].set(jnp.inf)
    for make in (
        lambda: jaxreg.skip_step(jaxreg.l2_decay(0.0), axis_name=AXES),
        lambda: jaxreg.clip_by_value(0.1, axis_name=AXES, on_nonfinite="skip"),
    ):
        tx = make()
        update = lambda t, tx=tx: (lambda u, s: (u, s.nonfinite))(*tx.update(t, tx.init(t), t))  # noqa: E731
        updates, count = mapped(update, (SPECS, P()))(tree)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, tree))
        assert count == 1


@pytest.mark.parametrize("norm", [jaxreg.global_norm, jaxreg.leaf_norms, jaxreg.rms])
def test_an_axis_that_is_not_bound_is_named(norm):
    with pytest.raises(ValueError, match="axis_name: got 'data', which is not bound; accepted"):
        norm(grads(), axis_name="data")
    with pytest.raises(ValueError, match="axis_name: got 'data', which is not bound"):
        jax.vmap(lambda x: norm([x], axis_name=("i", "data")), axis_name="i")(jnp.ones((2, 3)))


@pytest.mark.parametrize("bad", [3, "", ("x", "x"), ("x", 1)], ids=str)
def test_an_axis_name_that_is_none_is_refused(bad):
    for tree in (grads(), [jnp.zeros((0, 3))], {}):
        with pytest.raises(ValueError, match=r"^axis_name: got .*; accepted: the name of a mesh"):
            jaxreg.global_norm(tree, axis_name=bad)


# Other transformations that take an axis; a value clip needs it under one policy only.
WITH_AXIS = CLIPS | {
    "clip_by_value": lambda **kw: jaxreg.clip_by_value(0.1, **kw),
    "spike_aware_clip": lambda **kw: jaxreg.spike_aware_clip(optax.scale_by_adam(), **kw),
    "clip_update_rms of a direction": lambda **kw: jaxreg.clip_update_rms(
        direction=optax.scale_by_adam(), **kw
    ),
    "skip_step": lambda **kw: jaxreg.skip_step(optax.identity(), **kw),
}


@pytest.mark.parametrize("name", WITH_AXIS)
def test_a_clip_names_an_axis_that_is_not_bound(name):
    for tree in (grads(), {}):
        for axis_name in ("data", 3):
            tx = WITH_AXIS[name](axis_name=axis_name)
            with pytest.raises(ValueError, match=f"^axis_name: got {axis_name!r}"):
                tx.update(tree, tx.init(tree))


def test_an_axis_of_vmap_is_one():
    x = grads()["x"]
    found = jax.vmap(lambda row: jaxreg.global_norm(row, axis_name="i"), axis_name="i")(x)
    np.testing.assert_allclose(found, jnp.full(8, jnp.linalg.norm(x)), rtol=1e-6)


# Collectives -------------------------------------------------------------------------------------

COLLECTIVE = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def collectives(function, *args):
    """How often each occurs in the compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    found = re.findall(COLLECTIVE, text)
    return {kind: found.count(kind) for kind in set(found)}


@pytest.mark.usefixtures("by_select")
@pytest.mark.parametrize("name", NORMS)
def test_one_collective_serves_the_whole_tree(name):
    function = mapped(lambda tree: NORMS[name](tree, axis_name=AXES), P())
    assert collectives(function, grads()) == {"all-reduce": 1}


@pytest.mark.parametrize("name", NORMS)
def test_a_cpu_has_a_second_collective_in_the_branch_alone(name):
    function = mapped(lambda tree: NORMS[name](tree, axis_name=AXES), P())
    text = jax.jit(function).lower(grads()).compile().as_text()
    counts = {  # by computation
        part.split(" ", 1)[0]: len(re.findall(COLLECTIVE, part)) for part in re.split(r"\n\n", text)
    }
    assert sorted(count for count in counts.values() if count) == [1, 1]
    branch = next(name for name, count in counts.items() if count and name != "ENTRY")
    assert "conditional(" in text
    assert re.search(rf"(branch_computations|true_computation|false_computation).*{branch}", text)


def collectives_of(tx):
    """In a step, of which the numbers that all devices share are kept."""

    def update(tree):
        updates, state = tx.update(tree, tx.init(tree), tree)
        return updates, [x for x in jax.tree.leaves(state) if not norms.varying_axes(x)]

    return collectives(mapped(update, (SPECS, P())), grads())


# Of those that need another number: cuts of entries look at all of them under "skip" alone, and a
# direction is given what was skipped before its updates are clipped.
NUMBERS = {
    "clip_by_value": {"propagate": 0, "zero": 0},
    "spike_aware_clip": {"propagate": 0, "zero": 0},
    "clip_update_rms of a direction": {"skip": 2},
}


@pytest.mark.usefixtures("by_select")
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("name", WITH_AXIS)
def test_one_collective_serves_a_clip(name, policy):
    found = collectives_of(WITH_AXIS[name](axis_name=AXES, on_nonfinite=policy))
    number = NUMBERS.get(name, {}).get(policy, 1)
    assert found == ({"all-reduce": number} if number else {})


@pytest.mark.usefixtures("by_select")
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("name", CLIPS)
def test_a_step_that_may_be_left_out_shares_the_norm_of_its_clip(name, policy):
    clip = CLIPS[name](axis_name=AXES)
    tx = jaxreg.skip_step(clip, axis_name=AXES, on_nonfinite=policy)
    assert collectives_of(tx) == collectives_of(clip) == {"all-reduce": 1}


@pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 10),
    reason="XLA combined the sums of different leaves less before",
)
@pytest.mark.usefixtures("by_select")
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
def test_one_collective_serves_gradients_that_are_clipped_example_by_example(policy):
    loss = lambda w, x: jnp.sum(w["a"] @ x) + jnp.sum(w["b"] * x)  # noqa: E731
    clip = jaxreg.per_example_clip(loss, 1.0, axis_name="x", on_nonfinite=policy)
    function = jax.shard_map(
        lambda w, x: clip(w, x)[0], mesh=mesh_of(), in_specs=(P(), P("x")), out_specs=P()
    )
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}
    assert collectives(function, params, jnp.ones((8, 4))) == {"all-reduce": 1}


# Under jit ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_select")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_under_jit_norms_and_clips_of_sharded_arrays_are_global(kind):
    mesh = mesh_of(kind)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    tree = jax.device_put(grads(), shardings)
    tx = jaxreg.clip_by_global_norm(0.5)
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(jax.jit(all_norms)(tree), all_norms(grads()), rtol=1e-6)
        updates, _ = jax.jit(clipped(tx))(tree)
        expected, _ = clipped(tx)(grads())
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
        for name, sharding in shardings.items():
            assert updates[name].sharding.is_equivalent_to(sharding, 2)
        # Beside the norm's own sums over devices nothing moves.
        own = collectives(jaxreg.global_norm, tree)
        assert set(own) == {"all-reduce"}
        assert collectives(clipped(tx), tree) == own
