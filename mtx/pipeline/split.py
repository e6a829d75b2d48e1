"""A backward pass cut in two: what the stage before waits for, and the weights' gradients, which nobody waits for.

Works on the jaxpr, so that no model knows of it. Put off are matrix products that lead to weights' gradients alone, and
all that needs them; what else leads there (sums for gains and biases) is cheap, and done at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
"""Primitives that only call a jaxpr. In a backward pass, nothing of a checkpoint is left to protect."""
MOVES = ("transpose", "reshape", "convert_element_type", "squeeze", "broadcast_in_dim")


@dataclass(frozen=True)
class Halves:
    """A backward pass f(weights, *rest) -> (gradients of weights, *results) as two functions over flat lists."""

    now: Callable[..., tuple[list[Any], list[Any], list[Any]]]
    """(weights, rest) -> (gradients of weights, None where put off; results; what `later` needs)."""
    later: Callable[..., list[Any]]
    """(weights, what `now` left) -> gradients of weights, None where they were not put off."""


def halves(f: Callable[..., Any], weights: Sequence[Any], rest: Sequence[Any]) -> Halves:
    """Cuts f(list of weights, list of the rest) -> (list of gradients, list of results); shapes are enough."""
    whole, (made, _) = jax.make_jaxpr(f, return_shape=True)(list(weights), list(rest))
    flat = _inlined(whole)
    jaxpr, count = flat.jaxpr, len(weights)
    gradients, results = jaxpr.outvars[: len(made)], jaxpr.outvars[len(made) :]
    at_once = _needed(jaxpr.eqns, results)
    put_off, off_vars = [], set()
    for i, eqn in enumerate(jaxpr.eqns):
        if i not in at_once and (eqn.primitive.name in PRODUCTS or any(v in off_vars for v in _vars(eqn.invars))):
            put_off.append(i)
            off_vars |= set(eqn.outvars)
    _with_moves(jaxpr, put_off, at_once)
    later_eqns = [jaxpr.eqns[i] for i in sorted(put_off)]
    now_eqns = [eqn for i, eqn in enumerate(jaxpr.eqns) if i not in put_off]
    made_later = {v for eqn in later_eqns for v in eqn.outvars}
    known = {*jaxpr.invars[:count], *jaxpr.constvars}
    wanted = [v for eqn in later_eqns for v in _vars(eqn.invars)]
    left = list(dict.fromkeys(v for v in wanted if v not in made_later and v not in known))
    off = [not isinstance(v, Literal) and v in made_later for v in gradients]

    def now(weights: Sequence[Any], rest: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        env = _Values(jaxpr.constvars, flat.consts).bind(jaxpr.invars, [*weights, *rest])
        env.run(now_eqns)
        done = [None if put else env[v] for v, put in zip(gradients, off, strict=True)]
        return done, [env[v] for v in results], [env[v] for v in left]

    def later(weights: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        env = _Values(jaxpr.constvars, flat.consts).bind(jaxpr.invars[:count], weights).bind(left, given)
        env.run(later_eqns)
        return [env[v] if put else None for v, put in zip(gradients, off, strict=True)]

    return Halves(now, later)


def _needed(eqns: Sequence[Any], results: Sequence[Any]) -> set[int]:
    """Indices of the equations that results depend on."""
    wanted, found = set(_vars(results)), set()
    for i in reversed(range(len(eqns))):
        if any(v in wanted for v in eqns[i].outvars):
            found.add(i)
            wanted |= set(_vars(eqns[i].invars))
    return found


def _with_moves(jaxpr: Any, put_off: list[int], at_once: set[int]) -> None:
    """Puts off too what only moves an operand of what is put off, so that the operand itself is left and no copy."""
    off = set(put_off)
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        if i in off or i in at_once or eqn.primitive.name not in MOVES:
            continue
        made = set(eqn.outvars)
        users = {j for j, other in enumerate(jaxpr.eqns) if made & set(_vars(other.invars))}
        grows = eqn.outvars[0].aval.size * eqn.outvars[0].aval.dtype.itemsize
        shrinks = eqn.invars[0].aval.size * eqn.invars[0].aval.dtype.itemsize
        if users and users <= off and shrinks <= grows:
            off.add(i)
            put_off.append(i)


def _inlined(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same without calls."""

    def run(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        env = _Values(jaxpr.constvars, consts).bind(jaxpr.invars, arguments)
        for eqn in jaxpr.eqns:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")) if eqn.primitive.name in CALLS else None
            if inner is None:
                env.run([eqn])
                continue
            body, inner_consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            env.bind(eqn.outvars, run(body, inner_consts, [env[v] for v in eqn.invars]))
        return [env[v] for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *given: run(closed.jaxpr, closed.consts, given))(*closed.in_avals)


class _Values(dict):
    """Values of a jaxpr's variables while it runs."""

    def __init__(self, names: Sequence[Any], values: Sequence[Any]):
        super().__init__(zip(names, values, strict=True))

    def __getitem__(self, name: Any) -> Any:
        return name.val if isinstance(name, Literal) else super().__getitem__(name)

    def bind(self, names: Sequence[Any], values: Sequence[Any]) -> "_Values":
        self.update(zip(names, values, strict=True))
        return self

    def run(self, eqns: Sequence[Any]) -> None:
        for eqn in eqns:
            found = eqn.primitive.bind(*(self[v] for v in eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
            self.bind(eqn.outvars, found if eqn.primitive.multiple_results else [found])


def _vars(names: Sequence[Any]) -> list[Any]:
    return [name for name in names if not isinstance(name, Literal)]
