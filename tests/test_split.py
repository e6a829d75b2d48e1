"""Backward passes cut in two: together they are the whole, in values and in work; what is put off, and what is left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtx.pipeline import split
from mtx.pipeline.split import Halves, halves

B, T, D, F = 4, 6, 8, 16
X, H = "float32[4,6,8]", "float32[4,6,16]"


@dataclass
class Back:
    """A layer's backward pass, whole and in its halves."""

    whole: Callable[..., Any]
    weights: list[jax.Array]
    rest: list[jax.Array]
    """What the forward pass kept, and gradients of what it made."""
    halves: Halves

    @property
    def left(self) -> list[jax.Array]:
        return self.halves.now(self.weights, self.rest)[2]

    @property
    def put_off(self) -> list[bool]:
        """Of which weights the gradients are."""
        return [gradient is None for gradient in self.halves.now(self.weights, self.rest)[0]]

    def check(self) -> None:
        """The halves' values are those of the whole, each gradient from one of them, with no product more or less."""
        with jax.disable_jit():  # operation by operation, as the halves do it here: else XLA rounds otherwise
            gradients, results = self.whole(self.weights, self.rest)
        done, found, left = self.halves.now(self.weights, self.rest)
        late = self.halves.later(self.weights, left)
        assert all((a is None) != (b is None) for a, b in zip(done, late, strict=True))
        merged = [b if a is None else a for a, b in zip(done, late, strict=True)]
        for one, other in zip([*merged, *found], [*gradients, *results], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
            assert np.isfinite(np.asarray(other, np.float32)).all()
        assert sum(self.products()) == products(self.whole, self.weights, self.rest)

    def products(self) -> tuple[int, int]:
        """How many are done now, how many later."""
        return (
            products(self.halves.now, self.weights, self.rest),
            products(self.halves.later, self.weights, self.left),
        )


def products(f: Callable[..., Any], *arguments: Any) -> int:
    def count(jaxpr: Any) -> int:
        inner = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
        mine = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        return mine + sum(count(one) for one in inner if hasattr(one, "eqns"))

    return count(jax.make_jaxpr(f)(*arguments).jaxpr)


def back(layer: Callable[..., Any], weights: list[jax.Array], *inputs: jax.Array) -> Back:
    """Of layer(weights, *inputs), whose residuals are arguments, but for those that are weights."""
    outputs, vjp = jax.vjp(layer, weights, *inputs)
    residuals, structure = jax.tree.flatten(vjp)
    weight_of = [next((i for i, w in enumerate(weights) if w is x), None) for x in residuals]
    kept = [x for x, i in zip(residuals, weight_of, strict=True) if i is None]
    made, outer = jax.tree.flatten(outputs)

    def whole(weights: list[Any], rest: list[Any]) -> tuple[list[Any], list[Any]]:
        given = iter(rest[: len(kept)])
        leaves = [next(given) if i is None else weights[i] for i in weight_of]
        gradients, *results = jax.tree.unflatten(structure, leaves)(jax.tree.unflatten(outer, rest[len(kept) :]))
        return gradients, results

    rest = [*kept, *(normal(y.shape, y.dtype, seed=100 + i) for i, y in enumerate(made))]
    return Back(whole, weights, rest, halves(whole, *jax.eval_shape(lambda *arrays: arrays, weights, rest)))


def normal(shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def said(arrays: list[jax.Array]) -> list[str]:
    return sorted(str(jax.typeof(x)) for x in arrays)


x_BTD = normal((B, T, D))
w_DF, w_FD = normal((D, F), seed=1), normal((F, D), seed=2)


def mlp(weights, x_BTD):
    in_DF, out_FD = weights
    h_BTF = jax.nn.silu(jnp.einsum("BTD,DF->BTF", x_BTD, in_DF))
    return x_BTD + jnp.einsum("BTF,FD->BTD", h_BTF, out_FD)


def jitted(weights, x_BTD):
    """As einsums are where they are not inlined."""
    into = jax.jit(lambda x_BTD, w_DF: jnp.einsum("BTD,DF->BTF", x_BTD, w_DF))
    out = jax.jit(jax.jit(lambda h_BTF, w_FD: jnp.einsum("BTF,FD->BTD", h_BTF, w_FD)))
    return x_BTD + out(jax.nn.gelu(into(x_BTD, weights[0])), weights[1])


@pytest.mark.parametrize(
    ("layer", "now"),
    [(mlp, 2), (jitted, 2), (jax.checkpoint(mlp), 3), (jax.jit(jax.checkpoint(jitted)), 3)],
    ids=["plain", "jit", "checkpoint", "jit of a checkpoint of jit"],
)
def test_products_for_weights_are_put_off_and_their_operands_left(layer, now):
    """Each one's are x_BTD or h_BTF, and the gradient of what it made; a checkpoint does one product again at once."""
    both = back(layer, [w_DF, w_FD], x_BTD)
    both.check()
    assert both.put_off == [True, True]
    assert both.products() == (now, 2)
    assert said(both.left) == [H, H, X, X]


def test_nothing_is_put_off_without_products(monkeypatch):
    """A control: the checks above would see it."""
    monkeypatch.setattr(split, "PRODUCTS", ())
    both = back(mlp, [w_DF, w_FD], x_BTD)
    both.check()
    assert (both.put_off, both.products(), both.left) == ([False, False], (4, 0), [])


def test_gradients_of_gains_and_biases_are_done_at_once():
    def layer(weights, x_BTD):
        gain_D, bias_D, in_DF, bias_F, out_FD = weights
        scale_BT1 = jax.lax.rsqrt(jnp.mean(x_BTD * x_BTD, -1, keepdims=True) + 1e-6)
        h_BTF = jnp.tanh(jnp.einsum("BTD,DF->BTF", x_BTD * scale_BT1 * gain_D + bias_D, in_DF) + bias_F)
        return x_BTD + jnp.einsum("BTF,FD->BTD", h_BTF, out_FD)

    weights = [normal((D,), seed=3), normal((D,), seed=4), w_DF, normal((F,), seed=5), w_FD]
    both = back(layer, weights, x_BTD)
    both.check()
    assert both.put_off == [False, False, True, False, True]
    assert both.products() == (2, 2)
    assert said(both.left) == [H, H, X, X]


def test_a_weight_used_twice():
    """The sum of its two gradients waits for both."""

    def layer(weights, x_BTD):
        (w_DF,) = weights
        return jnp.einsum("BTF,DF->BTD", jnp.tanh(jnp.einsum("BTD,DF->BTF", x_BTD, w_DF)), w_DF)

    both = back(layer, [w_DF], x_BTD)
    both.check()
    assert (both.put_off, both.products()) == ([True], (2, 2))
    assert said(both.left) == [H, H, X, X]


def test_a_gain_of_a_weight_waits_for_the_weights_product():
    def layer(weights, x_BTD):
        gain_F, w_DF = weights
        return jnp.einsum("BTD,DF->BTF", x_BTD, w_DF * gain_F)

    both = back(layer, [normal((F,), seed=3), w_DF], x_BTD)
    both.check()
    assert (both.put_off, both.products()) == ([True, True], (1, 1))


def test_weights_without_a_gradient_get_zeros_at_once():
    def layer(weights, x_BTD):
        in_DF, stopped_FD, out_FD, _ = weights
        return x_BTD @ in_DF @ (out_FD + jax.lax.stop_gradient(stopped_FD))

    both = back(layer, [w_DF, w_FD, w_FD + 1, normal((D, F), seed=3)], x_BTD)
    both.check()
    assert both.put_off == [True, False, True, False]
    _, stopped_FD, _, unused_DF = both.halves.now(both.weights, both.rest)[0]
    assert not np.any(stopped_FD) and not np.any(unused_DF)


def test_a_layer_of_two_inputs_and_two_outputs():
    def layer(weights, x_BTD, z_BTF):
        in_DF, out_FD = weights
        h_BTF = jnp.sin(jnp.einsum("BTD,DF->BTF", x_BTD, in_DF)) * z_BTF
        return {"x": x_BTD + jnp.einsum("BTF,FD->BTD", h_BTF, out_FD), "z": z_BTF + h_BTF}

    both = back(layer, [w_DF, w_FD], x_BTD, normal((B, T, F), seed=3))
    both.check()
    assert len(both.halves.now(both.weights, both.rest)[1]) == 2
    assert (both.put_off, both.products()) == ([True, True], (2, 2))
    assert said(both.left) == [H, H, X, X]


def test_products_between_activations_are_done_at_once():
    """Attention of one head: of its backward pass's 12 products, 4 are for weights."""

    def layer(weights, x_BTD):
        q_DF, k_DF, v_DF, out_FD = weights
        q_BTF, k_BTF, v_BTF = (jnp.einsum("BTD,DF->BTF", x_BTD, w_DF) for w_DF in (q_DF, k_DF, v_DF))
        p_BTS = jax.nn.softmax(jnp.einsum("BTF,BSF->BTS", q_BTF, k_BTF))
        return jnp.einsum("BTF,FD->BTD", jnp.einsum("BTS,BSF->BTF", p_BTS, v_BTF), out_FD)

    both = back(layer, [w_DF, w_DF + 1, w_DF - 1, w_FD], x_BTD)
    both.check()
    assert (both.put_off, both.products()) == ([True] * 4, (8, 4))
    assert said(both.left) == [H, H, H, H, X, X]


def test_what_is_done_again_for_weights_alone_is_put_off():
    """In a checkpoint without an activation function, h_BTF is needed for out_FD's gradient only."""

    @jax.checkpoint
    def layer(weights, x_BTD):
        return x_BTD @ weights[0] @ weights[1]

    both = back(layer, [w_DF, w_FD], x_BTD)
    both.check()
    assert (both.put_off, both.products()) == ([True, True], (2, 3))
    assert said(both.left) == [H, X, X]


def test_constants_of_the_backward_pass():
    """An array that a vjp rule closes over, which both halves read."""
    scale_DF = normal((D, F), seed=3)

    @jax.custom_vjp
    def product(x_BTD, w_DF):
        return jnp.einsum("BTD,DF->BTF", x_BTD, w_DF)

    def backward(kept, g_BTF):
        x_BTD, w_DF = kept
        gx_BTD = jnp.einsum("BTF,DF->BTD", g_BTF, w_DF * scale_DF)
        return gx_BTD, jnp.einsum("BTD,BTF->DF", x_BTD, g_BTF) * scale_DF

    product.defvjp(lambda x_BTD, w_DF: (product(x_BTD, w_DF), (x_BTD, w_DF)), backward)
    both = back(lambda weights, x_BTD: product(x_BTD, weights[0]), [w_DF], x_BTD)
    both.check()
    assert (both.put_off, both.products()) == ([True], (1, 1))
    assert said(both.left) == [H, X]


def test_bfloat16():
    """Weights in bfloat16, a gain in float32: what is left is in bfloat16."""

    def layer(weights, x_BTD):
        gain_D, in_DF, out_FD = weights
        n_BTD = (x_BTD.astype(jnp.float32) * gain_D).astype(jnp.bfloat16)
        h_BTF = jax.nn.silu(jnp.einsum("BTD,DF->BTF", n_BTD, in_DF))
        return x_BTD + jnp.einsum("BTF,FD->BTD", h_BTF, out_FD)

    weights = [normal((D,), seed=3), w_DF.astype(jnp.bfloat16), w_FD.astype(jnp.bfloat16)]
    both = back(layer, weights, x_BTD.astype(jnp.bfloat16))
    both.check()
    assert (both.put_off, both.products()) == ([False, True, True], (2, 2))
    assert said(both.left) == ["bfloat16[4,6,16]", "bfloat16[4,6,16]", "bfloat16[4,6,8]", "bfloat16[4,6,8]"]


def test_operands_are_left_as_they_are_not_as_copies(monkeypatch):
    """x_BTD in bfloat16, which the product for the weight reads transposed and in float32, not the copy of it."""

    @jax.checkpoint
    def layer(weights, x_BTD):
        return jnp.einsum("DTB,DF->TBF", x_BTD.astype(jnp.float32).transpose(2, 1, 0), weights[0])

    def left() -> list[str]:
        both = back(layer, [w_DF], x_BTD.astype(jnp.bfloat16))
        both.check()
        return said(both.left)

    assert left() == ["bfloat16[4,6,8]", "float32[6,4,16]"]
    monkeypatch.setattr(split, "MOVES", ())
    assert left() == ["float32[6,4,16]", "float32[8,6,4]"]


def test_an_operand_is_left_smaller_where_it_is_cast_down():
    """Of the operand and its cast, the cast."""

    @jax.checkpoint
    def layer(weights, x_BTD):
        return jnp.einsum("BTD,DF->BTF", x_BTD.astype(jnp.bfloat16), weights[0])

    both = back(layer, [w_DF.astype(jnp.bfloat16)], x_BTD)
    both.check()
    assert said(both.left) == ["bfloat16[4,6,16]", "bfloat16[4,6,8]"]


def test_the_halves_under_jit():
    """As the engine has them."""
    both = back(jax.checkpoint(mlp), [w_DF, w_FD], x_BTD)
    gradients, results = jax.jit(both.whole)(both.weights, both.rest)
    done, found, left = jax.jit(both.halves.now)(both.weights, both.rest)
    late = jax.jit(both.halves.later)(both.weights, left)
    assert done == [None, None]
    for one, other in zip([*late, *found], [*gradients, *results], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
