"""Penalties: construction, selectors, and what peers get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg
from jaxreg import where

pytestmark = pytest.mark.core


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), True, "0.1", None, [0.1, 0.2]])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (jaxreg.L1, "strength"),
        (jaxreg.L2, "strength"),
        (lambda s: jaxreg.ElasticNet(s, 1.0), "l1"),
        (lambda s: jaxreg.ElasticNet(1.0, s), "l2"),
    ],
)
def test_a_bad_strength_names_the_argument_and_what_is_accepted(make, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: a finite number >= 0\.$"):
        make(bad)


def test_a_strength_of_wrong_shape_is_refused_when_traced_too():
    with pytest.raises(ValueError, match=r"strength: got an array of shape \(2,\)"):
        jax.jit(lambda s: jaxreg.L1(s).prox(jnp.ones(2)))(jnp.ones(2))


def test_box_refuses_bounds_in_the_wrong_order():
    with pytest.raises(ValueError, match=r"upper: got 0.0; accepted: a number >= lower = 1.0"):
        jaxreg.Box(1, 0)
    with pytest.raises(ValueError, match="lower: got nan"):
        jaxreg.Box(float("nan"), 0)


def test_box_takes_infinite_bounds():
    box = jaxreg.Box(-np.inf, 1.0)
    assert box.prox(jnp.array([-5.0, 5.0])).tolist() == [-5.0, 1.0]
    assert box.subdiff_distance(jnp.array([1.0]), jnp.array([-3.0])).tolist() == [0.0]


def test_an_infeasible_point_has_infinite_value_and_distance():
    for constraint in (jaxreg.Box(-1, 1), jaxreg.NonNegative()):
        x = jnp.array([-2.0, 0.5])
        assert constraint.value(x) == jnp.inf
        assert constraint.subdiff_distance(x, jnp.zeros(2)).tolist() == [jnp.inf, 0.0]


def test_on_gives_the_same_penalty_for_other_leaves():
    penalty = jaxreg.ElasticNet(0.1, 0.2).on("head/**")
    assert penalty.where == where.path("head/**")
    assert (penalty.l1, penalty.l2) == (0.1, 0.2)
    assert repr(penalty) == "ElasticNet(0.1, 0.2).on(where.path('head/**'))"
    assert repr(jaxreg.L1(0.1)) == "L1(0.1)"


def test_a_path_pattern_may_stand_for_the_selector_at_construction_too():
    assert jaxreg.L1(0.1, where="head/**").where == where.path("head/**")
    assert jaxreg.NonNegative(where="head/**").where == where.path("head/**")
    with pytest.raises(ValueError, match="where: got 3"):
        jaxreg.L1(0.1, where=3)


def test_a_tree_in_place_of_an_array_is_refused():
    for tree in ({"w": jnp.ones(2)}, [jnp.ones(2), jnp.ones(3)], "w"):
        with pytest.raises(ValueError, match="x: got a .*; accepted: (one array|a real floating)"):
            jaxreg.L1(0.1).value(tree)


def test_a_schedule_in_place_of_a_strength_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"strength: got a function.*inject_hyperparams"):
        jaxreg.L1(lambda count: 0.1)


def test_a_penalty_is_immutable():
    with pytest.raises(AttributeError):
        jaxreg.L1(0.1).strength = 0.2  # pyright: ignore


def test_strength_zero_at_zero_has_no_nan_in_value_prox_or_gradient():
    zero = jnp.zeros(3)
    for penalty in (jaxreg.L1(0), jaxreg.L2(0), jaxreg.ElasticNet(0, 0)):
        assert penalty.value(zero) == 0
        assert not jnp.isnan(jax.jacobian(penalty.prox)(zero)).any()
        assert penalty.critical_multiplier(zero) == 0
    assert jaxreg.L1(0).critical_multiplier(jnp.ones(3)) == jnp.inf
    gradient = jax.grad(lambda s: jaxreg.L1(s).critical_multiplier(jnp.ones(3)))(2.0)
    assert gradient == -0.25


def test_int_array_and_traced_strengths_agree():
    x = jnp.array([-3.0, 0.5, 2.0])
    expected = [-2.0, 0.0, 1.0]
    for strength in (1, np.int32(1), np.float64(1), jnp.array(1), jnp.array(1.0, jnp.bfloat16)):
        assert jaxreg.L1(strength).prox(x).tolist() == expected
    assert jax.jit(lambda s: jaxreg.L1(s).prox(x))(1).tolist() == expected


def test_keras_l2_is_twice_the_strength():
    x = jnp.array([1.0, -2.0])
    keras = 0.1 * jnp.sum(x**2)
    assert jaxreg.L2(0.2).value(x) == pytest.approx(float(keras))


def test_the_derivative_with_respect_to_the_strength_is_that_of_the_formula():
    x = jnp.array([-3.0, 0.25, 2.0])
    derivative = jax.jacobian(lambda s: jaxreg.L1(s).prox(x, 0.5))(1.0)
    assert derivative.tolist() == [0.5, 0.0, -0.5]
