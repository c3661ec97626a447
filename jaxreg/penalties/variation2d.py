r"""Total variation of images.

With D the differences to the neighbours below and to the right, $R(x) = s \|D x\|$ in a norm that
sums over the pixels. The prox at y is $y - D^T p$, where p minimizes $\|y - D^T p\|^2 / 2$ over
the fields bounded by $pull = step \cdot s$ in each pixel.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg.penalties.base import Penalty, number, penalty, static
from jaxreg.penalties.constraints import rounding
from jaxreg.penalties.separable import ratio

Number = float | jax.Array


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _check.ArgumentError(name, _check.describe(value), "True or False")
    return value


def _count(name: str, value: Any) -> int:
    return _check.whole_number(name, value, at_least=1)


@penalty
class TotalVariation2D(Penalty):
    r"""Total variation of images, $R(x) = s \sum_{ij} \|(Dx)_{ij}\|$: edges, and flat pixels.

    Images are the last two axes, and $(Dx)_{ij} = (x_{i+1,j} - x_{ij}, x_{i,j+1} - x_{ij})$ with 0
    across the border. The norm is Euclidean (isotropic), or the sum of absolute values.

    The prox is iterative: an accelerated projected gradient on the dual that restarts where its
    momentum points uphill. It ends once the duality gap of each image is at most $tolerance \cdot
    \|x - \mathrm{mean}(x)\|^2 / 2$, which bounds the distance of the result from the exact one by
    $\sqrt{tolerance} \, \|x - \mathrm{mean}(x)\|$. Below 4 units of the dtype (5e-7 in float32) the
    gap can't be told from rounding, and a smaller tolerance counts as that. The derivative is that
    of the exact solution whose flat pixels are those of the result: a linear system, solved by
    conjugate gradients.

    Sources: A. Beck and M. Teboulle, *Fast gradient-based algorithms for constrained total
    variation image denoising and deblurring problems*, IEEE TIP 18(11), 2009; the restart: B.
    O'Donoghue and E. Candès, *Adaptive restart for accelerated gradient schemes*, FoCM 15, 2015.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        isotropic: whether the norm of a pixel's differences is Euclidean.
        tolerance: a number > 0, or a traced scalar.
        max_iterations: where to end at the latest.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar, the tolerance is
            not > 0, or x has fewer than two axes.

    >>> import jax.numpy as jnp, jaxreg
    >>> image = jnp.array([[0.0, 0.0, 4.0], [0.0, 0.0, 4.0]])
    >>> smooth = jaxreg.TotalVariation2D(0.5, isotropic=False).prox(image)
    >>> [[f"{w:.2f}" for w in row] for row in smooth.tolist()]
    [['0.25', '0.25', '3.50'], ['0.25', '0.25', '3.50']]
    """

    convex = True

    strength: Number
    isotropic: bool = static(_flag, default=True, kw_only=True)
    tolerance: Number = number(_check.positive, default=1e-6, kw_only=True)
    max_iterations: int = static(_count, default=10_000, kw_only=True)

    def _value(self, x: jax.Array) -> jax.Array:
        images = _images(x)
        return self.strength * jnp.sum(jax.vmap(self._variation)(images))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        images, pull = _images(x), step * self.strength
        if x.size == 0:
            return x
        return jax.vmap(lambda y: self._prox_image(y, pull))(images).reshape(x.shape)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        images = _images(grad)
        total, size = jnp.sum(images, (1, 2)), jnp.sum(jnp.abs(images), (1, 2))
        balanced = jnp.all(jnp.abs(total) <= rounding(grad) * size)
        if grad.size == 0:
            return jnp.zeros((), grad.dtype)
        critical = jnp.max(jax.vmap(self._critical_pull)(-images))
        return jnp.where(balanced, ratio(critical, self.strength), jnp.inf)

    def _critical_pull(self, y: jax.Array) -> jax.Array:
        r"""The smallest pull at which the prox of y is constant.

        It is the largest $\langle y, x \rangle / \|D x\|$. The ratio at the prox of any pull below
        it is larger than that pull and no larger than the solution, so it is the next pull.
        """
        y = y - jnp.mean(y)

        def quotient(x: jax.Array) -> jax.Array:
            variation = self._variation(x)
            positive = variation > 0
            return jnp.where(positive, jnp.sum(y * x) / jnp.where(positive, variation, 1), 0)

        def raise_pull(state: Any) -> Any:
            x, pull, _ = state
            other = self._prox_image(y_fixed, pull)
            better = quotient(other) > pull * (1 + self.tolerance)
            x = jnp.where(better, other, x)
            return x, quotient(x), better

        y_fixed = jax.lax.stop_gradient(y)
        start = (y_fixed, jax.lax.stop_gradient(quotient(y)), True)
        return quotient(jax.lax.while_loop(lambda state: state[2], raise_pull, start)[0])

    def _variation(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self._norms(_differences(x)))

    def _norms(self, field: jax.Array) -> jax.Array:
        """Norms of the differences: for each pixel, or each difference where not isotropic."""
        if not self.isotropic:
            return jnp.abs(field)
        squares = jnp.sum(jnp.square(field), 0, keepdims=True)
        positive = squares > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)

    def _unit(self, field: jax.Array) -> jax.Array:
        norms = self._norms(field)
        return field / jnp.where(norms > 0, norms, 1)

    def _bounded(self, field: jax.Array, pull: jax.Array) -> jax.Array:
        """The nearest field of norms up to `pull`."""
        return self._unit(field) * jnp.minimum(self._norms(field), pull)

    def _prox_image(self, y: jax.Array, pull: jax.Array) -> jax.Array:
        fixed, fixed_pull = jax.lax.stop_gradient((y, pull))
        field = self._dual(fixed, fixed_pull)
        x = fixed - _adjoint(field)
        # A change that is 0, for its derivative: that of the data, and of the pull along p / pull.
        direction = jnp.where(
            fixed_pull > 0,
            field / jnp.where(fixed_pull > 0, fixed_pull, 1),
            self._unit(_differences(fixed)),
        )
        change = (y - fixed) - (pull - fixed_pull) * _adjoint(direction)
        return x + self._linearized(change, field, _differences(x), fixed_pull)

    def _dual(self, y: jax.Array, pull: jax.Array) -> jax.Array:
        """The bounded field p that minimizes ||y - D^T p||, up to the tolerance."""
        floor = 4 * float(jnp.finfo(y.dtype).eps)
        enough = jnp.maximum(jax.lax.stop_gradient(self.tolerance), floor) / 2
        enough = enough * jnp.sum(jnp.square(y - jnp.mean(y)))

        def gap(field: jax.Array) -> jax.Array:
            """Of the primal and dual objectives: a sum of terms >= 0, none of which cancels."""
            slope = _differences(y - _adjoint(field))
            return pull * jnp.sum(self._norms(slope)) - jnp.sum(slope * field)

        def improve(state: Any, _: None) -> tuple[Any, None]:
            field, ahead, momentum = state
            following = _gradient_step(y, ahead)
            following = self._bounded(following, pull)
            uphill = jnp.sum((ahead - following) * (following - field)) > 0
            momentum = jnp.where(uphill, 1, momentum)
            faster = (1 + jnp.sqrt(1 + 4 * jnp.square(momentum))) / 2
            ahead = following + (momentum - 1) / faster * (following - field)
            return (following, ahead, faster), None

        def improve_ten_times(state: Any) -> Any:
            inner, _, count = state
            inner, _ = jax.lax.scan(improve, inner, None, length=10)
            return inner, gap(inner[0]), count + 10

        start = jnp.zeros((2, *y.shape), y.dtype)
        inner = (start, start, jnp.ones((), y.dtype))
        inner, _, _ = jax.lax.while_loop(
            lambda state: (state[1] > enough) & (state[2] < self.max_iterations),
            improve_ten_times,
            (inner, gap(start), 0),
        )
        return inner[0]

    def _linearized(
        self, change: jax.Array, field: jax.Array, slope: jax.Array, pull: jax.Array
    ) -> jax.Array:
        r"""The derivative of the prox, applied to a change of the data.

        Where the dual field is inside its bound, differences stay 0. On the bound, it may turn
        (isotropic), by the change of the slope over its norm. With M the projection on the moves
        that this leaves, and $\Lambda = \|slope\| / pull$ on the bound: change - D^T q, where
        $(M D D^T M + \Lambda) q = M D change$.
        """
        ahead = field + slope / 8
        bound = self._norms(ahead) > pull
        # Of a field with the bound 0 nothing may move.
        stiffness = jnp.where(bound, 8 * (self._norms(ahead) - pull), 0)
        stiffness = stiffness / jnp.where(pull > 0, pull, 1)
        normal = self._unit(ahead)

        def free(q: jax.Array) -> jax.Array:
            along = normal * (
                jnp.sum(normal * q, 0, keepdims=True) if self.isotropic else q * normal
            )
            return jnp.where(pull > 0, q - jnp.where(bound, along, 0), 0)

        def system(q: jax.Array) -> jax.Array:
            return free(_differences(_adjoint(free(q)))) + stiffness * q

        q, _ = jax.scipy.sparse.linalg.cg(
            system,
            free(_differences(change)),
            tol=float(jnp.finfo(change.dtype).eps) ** (2 / 3),
            maxiter=self.max_iterations,
            M=lambda q: q / (4 + stiffness),
        )
        return change - _adjoint(free(q))


def _images(x: jax.Array) -> jax.Array:
    """The images, of shape (images, height, width)."""
    if x.ndim < 2:
        raise _check.ArgumentError("x", _check.describe(x), "an array of two axes or more")
    return x.reshape(-1, *x.shape[-2:]) if x.size else jnp.zeros((0, 1, 1), x.dtype)


def _differences(x: jax.Array) -> jax.Array:
    """Those to the neighbours below and to the right, of shape (2, height, width)."""
    down = jnp.pad(jnp.diff(x, axis=0), [(0, 1), (0, 0)])
    right = jnp.pad(jnp.diff(x, axis=1), [(0, 0), (0, 1)])
    return jnp.stack([down, right])


def _adjoint(field: jax.Array) -> jax.Array:
    """The adjoint of `_differences`."""
    down, right = field[0, :-1, :], field[1, :, :-1]
    below = jnp.pad(down, [(1, 0), (0, 0)]) - jnp.pad(down, [(0, 1), (0, 0)])
    return below + jnp.pad(right, [(0, 0), (1, 0)]) - jnp.pad(right, [(0, 0), (0, 1)])


def _gradient_step(y: jax.Array, field: jax.Array) -> jax.Array:
    """Down the gradient of ||y - D^T p||^2 / 2, whose curvature is at most 8."""
    return field + _differences(y - _adjoint(field)) / 8
