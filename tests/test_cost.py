"""Analytic costs against XLA's own counts of the compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import init, random_batch, small_t5, spec_of, with_moe
from upcycle import cost
from upcycle.hlo import Program
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.moe.config import MoEConfig

CONFIGS = {
    'dense': small_t5(),
    'gather': with_moe(small_t5(), num_experts=8),
    'einsum': with_moe(small_t5(), num_experts=8, dispatch='einsum', group_size=128),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_flops_are_those_that_xla_counts(name):
    """XLA also counts what is elementwise, a tenth at this width."""
    batch = random_batch(batch=8, inputs=64, targets=32)
    model = EncoderDecoderModel(CONFIGS[name])
    params, _ = init(model, batch)
    forward = functools.partial(model.forward, rng=None, training=True)

    def loss(params, batch):
        return forward(params, batch)[0]['loss']

    analytic = cost.forward_flops(model, spec_of(batch), training=True)
    compiled = jax.jit(loss).lower(params, batch).compile()
    assert analytic == pytest.approx(compiled.cost_analysis()['flops'], rel=0.1)
    grad = jax.jit(jax.grad(loss)).lower(params, batch).compile()
    assert cost.step_flops(model, spec_of(batch)) == pytest.approx(grad.cost_analysis()['flops'], rel=0.1)


@pytest.mark.parametrize('name', CONFIGS)
def test_matrix_products_are_counted_exactly(name):
    batch = random_batch(batch=8, inputs=64, targets=32)
    model = EncoderDecoderModel(CONFIGS[name])
    params, _ = init(model, batch)
    compiled = (
        jax.jit(lambda params, batch: model.forward(params, batch, None, training=True)[0]['loss'])
        .lower(params, batch)
        .compile(compiler_options={'xla_backend_optimization_level': 0})
    )
    parts = model.forward_flops(spec_of(batch), training=True)
    if name == 'gather':
        # Its weighting is elementwise.
        parts = {part: count for part, count in parts.items() if not part.endswith('combine')}
    assert Program(compiled.as_text()).matmul_flops() == pytest.approx(sum(parts.values()), rel=1e-6)


def test_a_loop_counts_as_often_as_it_runs():
    x, w = jnp.ones((64, 64)), jnp.ones((5, 64, 64))
    compiled = jax.jit(lambda x, w: jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0]).lower(x, w).compile()
    assert Program(compiled.as_text()).matmul_flops() == 5 * 2 * 64**3


TPU = """
HloModule step, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (p: f32[64,128]) -> f32[16,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %ar = f32[64,128]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %ds = f32[16,128]{1,0} dynamic-slice(%ar), dynamic_slice_sizes={16,128}
}

%body (t: (s32[], bf16[8,32,16])) -> (s32[], bf16[8,32,16]) {
  %t = (s32[], bf16[8,32,16]) parameter(0)
  %x = bf16[8,32,16]{2,1,0} get-tuple-element(%t), index=1
  %a2a = bf16[8,32,16]{2,1,0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={1}
  %w = bf16[8,16,48]{2,1,0} constant({...})
  %kernel = bf16[32,48]{1,0} custom-call(%x), backend_config={"cost_estimate":{"flops":"98304"}}
  %metadata = s32[9]{0} custom-call(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %fast = s32[9]{0} fusion(%x), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"7"}
  %conv = bf16[8,32,48]{2,1,0} convolution(%a2a, %w), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
  ROOT %out = (s32[], bf16[8,32,16]) tuple(%t)
}

%condition (t: (s32[], bf16[8,32,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%n, %n), direction=LT
}

ENTRY %main (a: f32[64,128]) -> f32[16,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %loop = (s32[], bf16[8,32,16]) while(%a), condition=%condition, body=%body
  %gather = f32[256,128]{1,0} all-gather(%a), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  %other = f32[256,128]{1,0} all-gather(%a), replica_groups=mesh['i'=2,'j'=4], device_ids=([4,2]T(1,0)) {'j'}, dimensions={0}
  %everybody = f32[64,128]{1,0} all-reduce(%a), replica_groups={}, to_apply=%add
  ROOT %fusion = f32[16,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_reads_a_tpu_program():
    """Loops multiply; a batched product, written as a dilated window, counts its real overlaps only; kernels say what they do."""
    program = Program(TPU)
    assert program.matmul_flops() == 12 * (2 * 8 * 32 * 16 * 48 + 98304)
    # The compiler gives its largest number for what it does not estimate.
    assert program.estimated_cycles() == 12 * 7
    found = program.collectives()
    assert found['all-to-all'].count == 12
    assert found['all-to-all'].operand_bytes == 12 * 8 * 32 * 16 * 2
    assert found['all-to-all'].wire_bytes == pytest.approx(12 * 8 * 32 * 16 * 2 * 3 / 4)
    assert found['all-gather'].result_bytes == 2 * 4 * 64 * 128 * 4
    assert found['reduce-scatter'].operand_bytes == 64 * 128 * 4
    # No groups: all devices together.
    assert found['all-reduce'].count == 1
    assert found['all-reduce'].wire_bytes == pytest.approx(2 * 64 * 128 * 4 * 7 / 8)


def test_tokens_of_a_batch():
    batch = random_batch()
    tokens = EncoderDecoderModel(CONFIGS['dense']).num_tokens(spec_of(batch))
    assert tokens == sum(batch[f'{stack}_input_tokens'].size for stack in ('encoder', 'decoder'))


def test_active_parameters():
    """Of 8 experts a token visits cf = 2 on average with Expert Choice, and K = 3 with Top-3."""
    params = {'a': {'mlp': {'expert': {'wi': np.zeros((8, 4, 6))}, 'router': {'w': np.zeros((4, 8))}}}}
    for fields, visited in (({}, 2), ({'router': 'top_k', 'num_selected_experts': 3}, 3), ({'router': 'soft'}, 8)):
        active = cost.num_active_parameters(params, {'a/mlp': MoEConfig(num_experts=8, **fields)})
        assert active == visited * 24 + 32
    assert cost.num_parameters(params) == 8 * 24 + 32


def test_core_days():
    assert cost.core_days(86400e12, 1e12, 0.5) == 2.0
