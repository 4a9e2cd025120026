"""Traffic and FLOPs of Pallas kernels against counts by hand."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from upcycle.hlo import GRID, Program
from upcycle.kernel_steps import NotCountedError
from upcycle.kernels import Kernels, at_uniform_load

BLOCK = 128


def costs_of(function, *shapes):
    """Costs of the kernels in a function, by name."""
    kernels = Kernels(jax.jit(function).trace(*shapes).jaxpr)
    return {cost.name: cost for cost in map(kernels.cost, kernels.signatures())}


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def matmul(x, y):
    """(200, 512) @ (512, 256), in blocks of 128 x 256 x 128."""

    def body(x_ref, y_ref, out_ref, sum_ref):
        @pl.when(pl.program_id(2) == 0)
        def start():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def end():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        body,
        grid=(2, 2, 2),
        in_specs=[
            pl.BlockSpec((128, 256), lambda i, j, k: (i, k)),
            pl.BlockSpec((256, 128), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((128, 128), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((200, 256), jnp.float32),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=1, bytes_accessed=1, transcendentals=0),
        name='matmul',
    )(x, y)


def test_a_matrix_product_by_hand():
    """Both operands are read once for each block of the other, the result is written once; the last rows fill no block."""
    cost = costs_of(matmul, array(200, 512), array(512, 256))['matmul']
    assert cost.flops == 8 * 2 * 128 * 256 * 128
    assert cost.bytes == 2 * (200 * 512) * 2 + 2 * (512 * 256) * 2 + (200 * 256) * 4


def attention(q, k, v):
    """Causal attention of one head, blocks of 128; keys after the queries are neither read nor multiplied."""

    def body(q_ref, k_ref, v_ref, out_ref):
        i, j = pl.program_id(0), pl.program_id(1)

        @pl.when(j <= i)
        def run():
            def part(n, total):
                p = jnp.dot(q_ref[...], k_ref[pl.ds(n * 64, 64), :].T, preferred_element_type=jnp.float32)
                return total + jnp.dot(jnp.exp(p).astype(q_ref.dtype), v_ref[pl.ds(n * 64, 64), :])

            out_ref[...] = jax.lax.fori_loop(0, 2, part, jnp.zeros_like(out_ref))

    block = functools.partial(pl.BlockSpec, (BLOCK, 64))
    return pl.pallas_call(
        body,
        grid=(3, 3),
        in_specs=[
            block(lambda i, j: (i, 0)),
            block(lambda i, j: (jnp.minimum(i, j), 0)),
            block(lambda i, j: (jnp.where(j <= i, j, i), 0)),
        ],
        out_specs=block(lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name='attention',
    )(q, k, v)


def test_an_attention_by_hand():
    """Under `vmap`, `remat` and a loop. Of 9 pairs of blocks 6 are multiplied; keys are read for each block of queries."""

    def layers(q, k, v):
        one = jax.checkpoint(jax.vmap(attention))
        return jax.lax.scan(lambda x, _: (one(x, k, v), None), q, None, length=5)[0]

    cost = costs_of(layers, *[array(4, 384, 64)] * 3)['attention']
    assert cost.flops == 4 * 6 * 2 * (2 * BLOCK * BLOCK * 64)
    # Block indices of keys: 0 0 0, 0 1 1, 0 1 2: the second row begins with what the first has left.
    keys = 1 + 1 + 3
    assert cost.bytes == 4 * (3 + 2 * keys + 3) * BLOCK * 64 * 2


def grouped(x, sizes):
    """One product per tile of 16 rows and group, as many steps as tiles; the group of a step is read from an array."""

    def body(groups, x_ref, y_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], y_ref[...])

    @functools.partial(jax.jit, inline=False)
    def gmm(x, sizes):
        ends = jnp.cumsum(sizes)
        tiles = (ends + 15) // 16 - (ends - sizes) // 16
        steps = tiles.sum()
        groups = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(8), side='right')
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(steps,),
                in_specs=[
                    pl.BlockSpec((16, 32), lambda i, groups: (i, 0)),
                    pl.BlockSpec((None, 32, 8), lambda i, groups: (groups[i], 0, 0)),
                ],
                out_specs=pl.BlockSpec((16, 8), lambda i, groups: (i, 0)),
            ),
            out_shape=jax.ShapeDtypeStruct((128, 8), jnp.float32),
            name='grouped',
        )(groups, x, jnp.ones((4, 32, 8)))

    return gmm(x, sizes)


def test_groups_are_taken_as_equal_and_unaligned():
    """Groups of 17, 16, 16 and 15 rows meet 2 tiles each, but the last, which ends where rows end."""
    cost = costs_of(grouped, array(64, 32, dtype=jnp.float32), array(4, dtype=jnp.int32))['grouped']
    steps = 2 + 2 + 2 + 1
    assert cost.flops == steps * 2 * 16 * 32 * 8
    # There are 4 blocks of rows, after which nothing is left to read or write.
    assert cost.bytes == 8 * 4 + (4 * 16 * 32 + 4 * 32 * 8 + steps * 16 * 8) * 4


def test_a_share_of_the_rows_is_grouped():
    """One of four devices multiplies only the rows of the experts it holds: 16 of 64, in groups of 5, 4, 4 and 3 rows."""

    def loop(x, sizes):
        return jax.lax.scan(lambda x, _: (x, grouped(x, at_uniform_load(sizes + 1, 16))), x, None, length=3)

    cost = costs_of(loop, array(64, 32, dtype=jnp.float32), array(4, dtype=jnp.int32))['grouped']
    assert cost.flops == 4 * 2 * 16 * 32 * 8


def test_what_data_decide_is_refused():
    def sized(x, steps):
        return pl.pallas_call(
            lambda x_ref, out_ref: None, grid=(steps,), out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32)
        )(x)

    with pytest.raises(NotCountedError, match='size of its grid'):
        costs_of(sized, array(8, 128), array(dtype=jnp.int32))


def splash_loss(q, k, v):
    mask = masks.MultiHeadMask([masks.CausalMask((512, 512))] * 2)
    return jax.vmap(splash.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1))(q, k, v).sum()


def test_splash_attention_by_hand():
    """Forward and backward, causal, 3 x 2 heads, 4 x 4 blocks of 128 x 128, of which 10 are not masked."""
    costs = costs_of(jax.grad(splash_loss, argnums=(0, 1, 2)), *[array(3, 2, 512, 128)] * 3)
    heads, product = 3 * 2, 2 * BLOCK**3
    block, wide = BLOCK * BLOCK * 2, BLOCK * BLOCK * 4
    mask = 2 * 16  # two arrays of int8
    forward, dq, dkv = (
        costs[f'splash_mha_{name}'] for name in ('fwd_residuals', 'dq_no_residuals', 'dkv_no_residuals')
    )
    assert [cost.flops for cost in (forward, dq, dkv)] == [heads * 10 * count * product for count in (2, 3, 4)]
    # Keys of row i: blocks 0 to i, then block 0 again for the next row, so that the second row finds its first block.
    keys = 1 + 1 + 3 + 4
    # Before JAX 0.12 scratch arrays are results, one for each batch.
    scratch = wide if jax.version.__version_info__ < (0, 12) else 0
    # Statistics are float32 in 128 columns, positions of queries int32.
    assert forward.bytes == heads * (4 * block + 2 * keys * block + 4 * block + 2 * 4 * wide) + 3 * 3 * scratch + mask
    # A row each of the log of the sum and of the products' sum.
    rows = 4 * (block + block + block + wide) + 2 * 512 * 4
    assert dq.bytes == heads * (rows + 2 * keys * block) + 3 * scratch + mask


@pytest.mark.exhaustive
def test_megablox_by_hand():
    """512 rows in 4 groups, tiles of 128: 4 tiles, and 3 that two groups share."""

    def loss(x, y, sizes):
        return megablox.gmm(x, y, sizes, jnp.bfloat16, (128, 128, 128)).astype(jnp.float32).sum()

    shapes = array(512, 256), array(4, 256, 384), array(4, dtype=jnp.int32)
    kernels = Kernels(jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes).jaxpr)
    found = [kernels.cost(signature) for signature in kernels.signatures()]
    assert [cost.name for cost in found] == ['gmm', 'gmm', 'tgmm']
    assert {cost.flops for cost in found} == {7 * 2 * 128 * 256 * 384}
    scalars, block = (5 + 7 + 7 + 1) * 4, 128 * 128 * 2
    # Three columns, seven tiles of rows, two blocks of the inner axis: every step reads both operands.
    assert found[0].bytes == scalars + (2 * 3 * 7 * 2 + 3 * 4) * block


HLO = """
HloModule step, num_partitions=1

%body (t: (s32[], bf16[200,512])) -> (s32[], bf16[200,512]) {
  %t = (s32[], bf16[200,512]) parameter(0)
  %x = bf16[200,512]{1,0} get-tuple-element(%t), index=1
  %y = bf16[512,256]{1,0} constant({...})
  %matmul.7 = f32[200,256]{1,0:T(8,128)S(1)} custom-call(%x, %y), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[200,512]{1,0}, bf16[512,256]{1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 128}"
}}, backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"1","transcendentals":"0","bytes_accessed":"3"}}}
  %other.2 = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[200,512]{1,0}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"5","bytes_accessed":"7"}}}
  ROOT %out = (s32[], bf16[200,512]) tuple(%t)
}

%condition (t: (s32[], bf16[200,512])) -> pred[] {
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%n, %n), direction=LT
}

ENTRY %main (a: bf16[200,512]) -> bf16[200,512] {
  %a = bf16[200,512]{1,0} parameter(0)
  ROOT %loop = (s32[], bf16[200,512]) while(%a), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_compiled_program_says_how_often_a_kernel_runs():
    """An estimate of the kernel's author counts only for kernels that were not traced, and never less than the operands."""
    kernels = Kernels(jax.jit(matmul).trace(array(200, 512), array(512, 256)).jaxpr)
    cost = kernels.cost(*kernels.signatures())
    program = Program(HLO)
    found = program.kernels(kernels.cost)
    assert found['matmul'].counted == GRID
    assert (found['matmul'].count, found['matmul'].flops, found['matmul'].bytes) == (
        12,
        12 * cost.flops,
        12 * cost.bytes,
    )
    assert (found['other'].flops, found['other'].bytes) == (12 * 5, 12 * (200 * 512 * 2 + 8 * 128 * 4))
    assert found['other'].counted != GRID
    assert program.matmul_flops(kernels.cost) == 12 * (cost.flops + 5)
    # XLA counts a loop once.
    assert program.estimated_bytes() == 3 + 7


COMPILED = """
import json, jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tests.test_kernels import splash_loss
from upcycle.hlo import Program
from upcycle.kernels import Kernels

device = topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1').devices[0]

def loss(q, k, v):
    layer = jax.checkpoint(lambda x: x + splash_loss(x, k, v))
    return jax.lax.scan(lambda x, _: (layer(x), None), q, None, length=5)[0].sum()

x = jax.ShapeDtypeStruct((3, 2, 512, 128), 'bfloat16', sharding=SingleDeviceSharding(device))
traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
program = Program(traced.lower().compile().as_text())
print(json.dumps({name: [calls.count, calls.counted] for name, calls in program.kernels(Kernels(traced.jaxpr).cost).items()}))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_kernels_of_a_compiled_program_are_recognised():
    """Rematerialised in a loop of 5: the forward kernel runs again in the backward pass."""
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    done = subprocess.run([sys.executable, '-c', COMPILED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {counted for _, counted in found.values()} == {GRID}
    counts = {name: count for name, (count, _) in found.items()}
    assert counts['splash_mha_dq_no_residuals'] == counts['splash_mha_dkv_no_residuals'] == 5
    assert sum(count for name, count in counts.items() if 'fwd' in name) == 10
