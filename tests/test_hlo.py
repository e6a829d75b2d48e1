"""The census against programs whose communication is known, from three compilers."""

import re
from functools import partial

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtx import hlo

MESH = {"pipeline": 1, "replica": 2, "data": 2, "context": 1, "expert": 1, "model": 2}
BATCH = ("replica", "data")
X = P(BATCH, "model")  # of f32[512,1024]: each of the 8 devices holds f32[128,512]
X_BYTES = 128 * 512 * 4


def devices_of(backend):
    if backend == "tpu":
        return aot.tpu_devices()
    if backend == "cuda":
        return aot.cuda_devices()
    devices = jax.devices("cpu")
    assert len(devices) == 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
    return devices


def make_mesh(backend, shape=MESH):
    devices = np.array(devices_of(backend)).reshape(tuple(shape.values()))
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


TPU, CUDA = (pytest.param(name, marks=pytest.mark.aot) for name in ("tpu", "cuda"))


@pytest.fixture(params=["cpu", TPU, CUDA])
def mesh(request):
    return make_mesh(request.param)


def array(mesh, shape, spec=X, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def program_text(f, *args) -> str:
    return compiled(f, *args).as_text() or ""


def manual_text(mesh, f, out_spec, *args):
    """The program of `f`, which writes its own collectives, on its arguments' shards."""
    specs = tuple(a.sharding.spec for a in args)
    g = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False)
    return program_text(g, *args)


def what(found):
    return [(c.kind, c.axes, c.dtype, c.bytes, c.loops) for c in found]


def without_annotations(text):
    stripped = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert '"known_trip_count"' not in stripped
    return stripped


# --- collectives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "axes", "scale", "out", "f"),
    [
        ("all-reduce", ("model",), 1, P(BATCH), lambda x: lax.psum(x, "model")),
        ("all-reduce", ("replica", "model"), 1, P("data"), lambda x: lax.psum(x, ("model", "replica"))),
        ("all-reduce", ("replica", "data", "model"), 1, P(), lambda x: lax.pmax(x, (*BATCH, "model"))),
        ("all-reduce", ("data",), 1, X, lambda x: lax.psum(x, ("pipeline", "data", "expert"))),
        ("all-gather", ("data",), 2, X, partial(lax.all_gather, axis_name="data", axis=0, tiled=True)),
        ("all-gather", BATCH, 4, X, partial(lax.all_gather, axis_name=BATCH, axis=0, tiled=True)),
        ("reduce-scatter", ("model",), 1, X, lambda x: lax.psum_scatter(x, "model", tiled=True)),
        ("collective-permute", ("data",), 1, X, lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)])),
        ("collective-permute", BATCH, 1, X, lambda x: lax.ppermute(x, BATCH, [(0, 1), (1, 2), (2, 3)])),
        ("all-to-all", ("data",), 1, X, lambda x: lax.all_to_all(x, "data", 0, 1, tiled=True)),
    ],
)
def test_kind_axes_and_full_bytes(mesh, kind, axes, scale, out, f):
    text = manual_text(mesh, lambda x: jnp.sin(f(jnp.sin(x))), out, array(mesh, (512, 1024)))
    assert what(hlo.collectives(text, mesh.shape)) == [(kind, axes, "f32", X_BYTES * scale, ())]


@pytest.mark.parametrize("backend", [TPU, CUDA])
def test_ragged_all_to_all(backend):
    mesh = make_mesh(backend)
    data = array(mesh, (512, 128), P(BATCH))
    counts = [array(mesh, (4, 2), P(BATCH), jnp.int32)] * 4

    def f(x, out, *counts):
        return lax.ragged_all_to_all(x, out, *(c[0] for c in counts), axis_name="data")

    text = manual_text(mesh, f, P(BATCH), data, data, *counts)
    assert what(hlo.collectives(text, mesh.shape)) == [("ragged-all-to-all", ("data",), "f32", 128 * 128 * 4, ())]


def test_size_one_axes_are_no_collectives(mesh):
    def f(x):
        return lax.psum(jnp.sin(x), "expert") + lax.psum(jnp.cos(x), ("pipeline", "context"))

    assert hlo.collectives(manual_text(mesh, f, X, array(mesh, (512, 1024))), mesh.shape) == []


def test_combined_reductions_count_every_tensor(mesh):
    def f(x, y, z):
        return lax.psum((jnp.sin(x), y * 2, z + 1), BATCH)

    args = (
        array(mesh, (512, 1024)),
        array(mesh, (64, 32), P(BATCH), jnp.bfloat16),
        array(mesh, (128, 256), P(None, "model")),
    )
    out = (P(None, "model"), P(), P(None, "model"))
    found = hlo.collectives(manual_text(mesh, f, out, *args), mesh.shape)
    assert {(c.kind, c.axes, c.loops) for c in found} == {("all-reduce", BATCH, ())}
    sizes = sorted((c.dtype, c.bytes) for c in found)
    z_bytes = 128 * 128 * 4
    platform = mesh.devices.flat[0].platform
    y = ("f32", 16 * 32 * 4) if platform == "cpu" else ("bf16", 16 * 32 * 2)  # CPU promotes
    if platform in ("gpu", "cuda"):  # concatenates equal dtypes first
        assert sizes == [y, ("f32", z_bytes + X_BYTES)]
    else:
        assert sizes == [y, ("f32", z_bytes), ("f32", X_BYTES)]


def test_both_branches_of_a_conditional_are_listed(mesh):
    def f(x):
        return lax.cond(x.sum() > 0, lambda x: lax.psum(x, "data"), lambda x: lax.all_gather(x, "model").sum(0), x)

    found = hlo.collectives(manual_text(mesh, f, X, array(mesh, (512, 1024))), mesh.shape)
    assert sorted((c.kind, c.axes) for c in found) == [("all-gather", ("model",)), ("all-reduce", ("data",))]


def test_groups_that_are_no_axes_are_marked(mesh):
    text = manual_text(mesh, lambda x: lax.psum(x, "data"), X, array(mesh, (512, 1024)))
    assert [c.axes for c in hlo.collectives(text, {"data": 4, "model": 2})] == [hlo.UNKNOWN_AXES]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[4,2]<=[8]", ("model",)),
        ("[4,2]<=[4,2]T(0,1)", ("model",)),
        ("[2,4]<=[4,2]T(1,0)", BATCH),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("data",)),
        ("[1,8]<=[8]", ("replica", "data", "model")),
        ("{}", ("replica", "data", "model")),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("replica",)),
        ("{{4,0},{5,1},{6,2},{7,3}}", ("replica",)),
        ("{{0,4},{1,5},{2,7},{3,6}}", hlo.UNKNOWN_AXES),
        ("mesh['a'=4,'model'=2] {'model'}", ("model",)),
        ("mesh['a'=4,'b'=2] {'a'}", BATCH),
        ("mesh['a'=1,'b'=2,'c'=1,'d'=4], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", BATCH),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("replica",)),
    ],
)
def test_every_form_of_replica_groups(groups, axes):
    mesh = make_mesh("cpu")
    text = manual_text(mesh, lambda x: lax.psum(x, "data"), X, array(mesh, (512, 1024)))
    found = re.compile(r"replica_groups=(?:\{\{[\d,{}]*\}\}|mesh\[.*?\] \{.*?\})")
    text, count = found.subn(lambda _: f"replica_groups={groups}", text)
    assert count == 1
    assert [c.axes for c in hlo.collectives(text, mesh.shape)] == [axes]


# --- loops ------------------------------------------------------------------------------------------------


def test_known_trip_counts(mesh):
    def f(x):
        def inner(c, _):
            return jnp.tanh(lax.psum(c, "model") * 0.1), None

        def outer(c, _):
            return lax.scan(inner, lax.psum(c, "data") * 0.1, None, length=5)[0], None

        return lax.pmax(lax.scan(outer, x, None, length=3)[0], "replica")

    text = manual_text(mesh, f, X, array(mesh, (512, 1024)))
    for t in (text, without_annotations(text)):
        found = hlo.collectives(t, mesh.shape)
        assert sorted((c.axes, c.loops) for c in found) == [
            (("data",), (3,)),
            (("model",), (3, 5)),
            (("replica",), ()),
        ]


@pytest.mark.parametrize(
    ("start", "go_on", "step", "count"),
    [
        (2, lambda i: i < 9, 1, 7),
        (2, lambda i: i <= 9, 1, 8),
        (0, lambda i: i < 10, 3, 4),
        (9, lambda i: i > 0, -2, 5),
        (9, lambda i: i >= 0, -3, 4),
        (2, lambda i: i < 9, -1, None),
    ],
)
def test_trip_counts_of_other_loops(mesh, start, go_on, step, count):
    def f(x):
        def body(carry):
            return carry[0] + step, jnp.tanh(lax.psum(carry[1], "model") * 0.1)

        return lax.while_loop(lambda carry: go_on(carry[0]), body, (start, x))[1]

    text = manual_text(mesh, f, X, array(mesh, (512, 1024)))
    for t in (text, without_annotations(text)):
        assert [c.loops for c in hlo.collectives(t, mesh.shape)] == [(count,)]


def test_a_loop_that_stops_by_its_data_has_no_trip_count(mesh):
    def f(x):
        def body(carry):
            return carry[0] + 1, jnp.tanh(lax.psum(carry[1], "data"))

        return lax.while_loop(lambda c: (c[0] < 9) & (c[1][0, 0] > 0), body, (0, x))[1]

    text = manual_text(mesh, f, X, array(mesh, (512, 1024)))
    assert [c.loops for c in hlo.collectives(text, mesh.shape)] == [(None,)]


def test_an_unusual_condition_gives_no_trip_count(mesh):
    def f(x):
        def body(carry):
            return carry[0] + 1, jnp.tanh(lax.psum(carry[1], "data"))

        return lax.while_loop(lambda c: c[0] != 9, body, (0, x))[1]

    text = without_annotations(manual_text(mesh, f, X, array(mesh, (512, 1024))))
    assert [c.loops for c in hlo.collectives(text, mesh.shape)] == [(None,)]


def test_traced_trip_count_is_unknown_and_can_be_given(mesh):
    def f(x, n):
        def layer(c, _):
            return jnp.tanh(lax.psum(c, "model") * 0.1), None

        def microbatch(_, c):
            return lax.scan(layer, lax.psum(c, "data") * 0.1, None, length=3)[0]

        return lax.fori_loop(0, n, microbatch, x)

    text = manual_text(mesh, f, X, array(mesh, (512, 1024)), array(mesh, (), P(), jnp.int32))
    data, model = hlo.census(text, mesh.shape, trips=4)
    assert (data.loops, data.kind, data.axes, data.count) == ((None,), "all-reduce", ("data",), 1)
    assert (data.pass_bytes, data.times, data.bytes) == (X_BYTES, 4, 4 * X_BYTES)
    assert (model.loops, model.axes, model.count, model.times) == ((None, 3), ("model",), 1, 12)
    assert [r.bytes for r in hlo.census(text, mesh.shape)] == [X_BYTES, 3 * X_BYTES]


def test_a_loop_condition_runs_once_more_than_the_body(mesh):
    def f(x):
        def go_on(carry):
            return (carry[0] < 4) & (lax.psum(carry[1], "model")[0, 0] < 1e9)

        return lax.while_loop(go_on, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x))[1]

    text = manual_text(mesh, f, X, array(mesh, (512, 1024)))
    annotated = re.sub(r"(body=%?[\w.\-]+)", r'\1, backend_config={"known_trip_count":{"n":"4"}}', text)
    assert [c.loops for c in hlo.collectives(text, mesh.shape)] == [(None,)]
    assert [c.loops for c in hlo.collectives(annotated, mesh.shape)] == [(5,)]


# --- what compilers do to collectives ---------------------------------------------------------------------


@pytest.mark.aot
def test_tpu_clones_of_one_gather_count_once():
    mesh = make_mesh("tpu", {"model": 8})

    def f(x, w):
        def layer(x, w):
            for w_DF, w_FD in ((w[0], w[1]), (w[2], w[3])):
                h = jnp.tanh(lax.all_gather(x, "model", axis=1, tiled=True) @ w_DF)
                x += lax.psum_scatter(h @ w_FD.T, "model", scatter_dimension=1, tiled=True)
            return x, None

        return lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

    x = array(mesh, (2, 256, 512), P(None, "model"), jnp.bfloat16)
    w = array(mesh, (3, 4, 512, 2048), P(None, None, None, "model"), jnp.bfloat16)
    specs = (x.sharding.spec, w.sharding.spec)
    grad = jax.shard_map(jax.grad(f, (0, 1)), mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    text = program_text(grad, x, w)
    # Forward 2; backward 2, the transposes of the scatters.
    found = [c for c in hlo.collectives(text, mesh.shape) if c.kind == "all-gather"]
    assert {(c.dtype, c.bytes, c.loops) for c in found} == {("bf16", 2 * 256 * 512 * 2, (3,))}
    assert len(found) == 4
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) > 4, "no clones: the test shows nothing"


@pytest.mark.parametrize(
    ("backend", "kind", "fused"),
    [
        pytest.param("cpu", "all-reduce", False),
        pytest.param("tpu", "reduce-scatter", True, marks=pytest.mark.aot),
        pytest.param("cuda", "reduce-scatter", False, marks=pytest.mark.aot),
    ],
)
def test_compiler_made_reduce_scatter(backend, kind, fused):
    mesh = make_mesh(backend, {"data": 1, "model": 8})
    x, w = array(mesh, (1024, 2048), P(None, "model")), array(mesh, (2048, 512), P("model"))
    scattered = NamedSharding(mesh, P("model"))
    text = program_text(lambda x, w: lax.with_sharding_constraint(x @ w, scattered), x, w)
    found = hlo.collectives(text, mesh.shape)
    assert [(c.kind, c.axes, c.bytes, c.fused) for c in found] == [(kind, ("model",), 1024 * 512 * 4, fused)]


# --- refusals ---------------------------------------------------------------------------------------------


def loop_text(backend):
    def f(x):
        return lax.scan(lambda c, _: (jnp.tanh(lax.psum(c, "model")), None), x, None, length=5)[0]

    mesh = make_mesh(backend)
    return manual_text(mesh, f, X, array(mesh, (512, 1024)))


@pytest.mark.parametrize("backend", ["cpu", TPU, CUDA])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"replica_groups=", "groups=", "replica groups"),
        (r"(all-reduce(?:-start)?)\(%[\w.\-]+\)", r"\1()", "operands"),
        (r"body=%", "corpus=%", "body"),
        (r" while\(", " whilst(", "callers"),
        (r"= f32\[128,512\](\S* all-reduce)", r"is f32[128,512]\1", "cannot read the instruction"),
        (r"ENTRY ", "", "no ENTRY"),
    ],
)
def test_what_cannot_be_read_is_refused(backend, old, new, message):
    text, count = re.subn(old, new, loop_text(backend))
    assert count
    with pytest.raises(ValueError, match=message):
        hlo.collectives(text, MESH)


def test_wrong_mesh_is_refused():
    with pytest.raises(ValueError, match=r"8 partitions.*has 4 devices"):
        hlo.collectives(loop_text("cpu"), {"data": 2, "model": 2})


# --- FLOPs ------------------------------------------------------------------------------------------------

M, L, B, D, F = 4, 3, 64, 128, 256


def nested_scans(w_LDF, w_LFD, x_MBD):
    def layer(x_BD, w):
        return jnp.tanh(jnp.tanh(x_BD @ w[0]) @ w[1]), None

    def microbatch(total, x_BD):
        return total + lax.scan(layer, x_BD, (w_LDF, w_LFD))[0].astype(jnp.float32).sum(), None

    return lax.scan(microbatch, 0.0, x_MBD)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dot_flops_of_nested_scans_and_their_gradient(mesh, dtype):
    args = [array(mesh, s, P(), dtype) for s in ((L, D, F), (L, F, D), (M, B, D))]
    forward = M * L * 2 * (2 * B * D * F)
    assert hlo.dot_flops(program_text(nested_scans, *args)) == forward
    assert hlo.dot_flops(program_text(jax.grad(nested_scans, (0, 1)), *args)) == 3 * forward


def test_dot_flops_are_per_device(mesh):
    args = array(mesh, (512, 256), P(BATCH)), array(mesh, (256, 128), P(None, "model"))
    assert hlo.dot_flops(program_text(jnp.matmul, *args)) == 2 * 512 * 256 * 128 // 8


def test_dot_flops_with_batch_dimensions(mesh):
    args = [array(mesh, s, P()) for s in ((2, 64, 4, 32), (2, 48, 4, 32))]
    text = program_text(partial(jnp.einsum, "bthd,bshd->bhts"), *args)
    assert hlo.dot_flops(text) == 2 * (2 * 4 * 64 * 48 * 32)


def test_dot_flops_of_a_traced_loop_and_a_conditional(mesh):
    def f(x, n):
        loop = lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)
        return lax.cond(n > 3, lambda x: x @ jnp.tanh(x @ x), lambda x: x @ x, loop)

    text = program_text(f, array(mesh, (256, 256), P()), array(mesh, (), P(), jnp.int32))
    assert [hlo.dot_flops(text, trips=n) for n in (0, 1, 5)] == [2 * 256**3 * n for n in (2, 3, 7)]


def test_convolution_flops_are_what_xla_counts():
    x, w = jax.ShapeDtypeStruct((3, 8, 20, 31), jnp.float32), jax.ShapeDtypeStruct((6, 4, 3, 5), jnp.float32)
    program = compiled(
        lambda x, w: lax.conv_general_dilated(
            x, w, (2, 3), ((6, 0), (1, 4)), lhs_dilation=(1, 2), rhs_dilation=(3, 1), feature_group_count=2
        ),
        x,
        w,
    )
    text = program.as_text() or ""
    assert " convolution(" in text
    assert hlo.dot_flops(text) == (program.cost_analysis() or {})["flops"]


def test_gemm_library_calls_count():
    """By hand, after XLA's GemmRewriter: without a GPU to tune on, the compiler never makes this call."""
    text = """HloModule m
ENTRY %main (x: bf16[64,256], w: bf16[128,256]) -> bf16[64,128] {
  %x = bf16[64,256]{1,0} parameter(0)
  %w = bf16[128,256]{1,0} parameter(1)
  %gemm = (bf16[64,128]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %y = bf16[64,128]{1,0} get-tuple-element(%gemm), index=0
}
"""
    assert hlo.dot_flops(text) == 2 * 64 * 128 * 256
    with pytest.raises(ValueError, match="contracted dimensions"):
        hlo.dot_flops(text.replace("lhs_contracting_dimensions", "lhs_summed_dimensions"))


# --- the table --------------------------------------------------------------------------------------------


def test_show():
    rows = [
        hlo.Row((), "reduce-scatter", ("data",), "f32", 2, 1, 2_000_000, 1),
        hlo.Row((None, 3), "all-reduce", BATCH, "bf16", 5, 0, 2_621_440, 12),
    ]
    assert hlo.show(rows) == (
        "loops  kind                      axes          dtype  count  MB/pass  times       MB\n"
        "top    reduce-scatter (1 fused)  data          f32        2        2      1        2\n"
        "?x3    all-reduce                replica+data  bf16       5  2.62144     12  31.4573"
    )
