"""Attention experts: what they compute, as the definition says it, and who knows of them. See also `test_decoder.py`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.moe.quick import jit, random_params
from tests.small import llm_moe, small_llm
from upcycle import cost
from upcycle.errors import UserError
from upcycle.evaluate import token_statistics
from upcycle.evaluate.diversity import diversity
from upcycle.models import identify
from upcycle.models.attention_experts import AttentionExperts
from upcycle.models.causal_lm import CausalLM
from upcycle.moe import state as moe_state
from upcycle.moe.config import MoEConfig
from upcycle.surgery.plan import Action, Surgery
from upcycle.surgery.planning import plan_surgery

MOE = llm_moe(num_experts=3, balance_bias_rate=0.01)
MODEL = CausalLM(small_llm(moe=MOE, attention_moe=MOE, moe_output_bias=True))
PATHS = [f'decoder/layers_{i}/{name}' for i in range(2) for name in ('self_attention', 'mlp')]
BATCH = {
    'tokens': jnp.ones((2, 4), jnp.int32),
    'targets': jnp.ones((2, 4), jnp.int32),
    'loss_weights': jnp.ones((2, 4), jnp.float32),
}


def test_is_the_definition():
    """Head by head, without RoPE: expert e of choice j makes query head m, which uses key head m."""
    B, L, D, M, N, K = 2, 5, 48, 2, 16, 2
    config = dataclasses.replace(MODEL.config, rope_layers='none')
    module = AttentionExperts(config, config.kinds()[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)
    inputs = (x, jnp.ones((B, L), bool), None, None, 0, False, None)
    params = random_params(on_arrays(module, inputs), x)
    y = np.asarray(jit(lambda params, x: module.apply({'params': params}, x, *inputs[1:]))(params, x))
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(params, sep='/').items()}
    x = np.asarray(x, np.float64)
    logits = x @ p['router/router_weights/w/kernel']
    chosen = np.argsort(-softmax(logits) - p['router_state/bias'], axis=-1)[..., :K]
    weight = np.take_along_axis(softmax(logits), chosen, axis=-1)
    weight /= weight.sum(axis=-1, keepdims=True)
    key, value = (x @ p[f'{name}/kernel'] for name in ('key', 'value'))
    for b, t in np.ndindex(B, L):
        expected = p['output_bias'].copy()
        for j, e in enumerate(chosen[b, t]):
            query = x[b, t] @ p['expert/query/kernel'][e]
            seen = []
            for m in range(M):
                head = slice(m * N, (m + 1) * N)
                shares = softmax(key[b, : t + 1, head] @ query[head] * N**-0.5)
                seen.append(shares @ value[b, : t + 1, head])
            expected += weight[b, t, j] * np.concatenate(seen) @ p['expert/out/kernel'][e]
        np.testing.assert_allclose(y[b, t], expected, atol=1e-5)


def softmax(x):
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def on_arrays(module, inputs):
    """A module for `random_params`, which is applied to arrays only."""

    class Bound:
        def init(self, key, x):
            return module.init(key, x, *inputs[1:])

    return Bound()


def test_metrics_and_state_of_both_routers_of_a_layer():
    shapes = jax.eval_shape(lambda key: MODEL.init(key, {'tokens': ((2, 4), 'int32')}), jax.random.key(0))
    params = jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda x: hasattr(x, 'value'))
    assert list(MODEL.moe_layers()) == PATHS

    def metrics(params):
        found = MODEL.forward(params, BATCH, None, training=True)[2]
        trained, state = moe_state.split(params)
        assert len(state) == len(PATHS)
        moe_state.follow(trained, state, found, MODEL.moe_layers())
        return found | diversity(params, PATHS) | token_statistics.token_statistics(params, BATCH, model=MODEL)

    found = jax.eval_shape(metrics, params)
    for layer in ('decoder/layers_1', 'decoder/layers_1/self_attention'):
        names = ('load', 'auxiliary_loss', 'expert_cosine', 'router_cosine', 'token_information')
        assert {f'experts/{layer}/{name}' for name in names} <= found.keys()


def test_the_balance_loss_is_the_mean_of_all_routers():
    params = random_params(MODEL.module(), BATCH['tokens'])
    _, loss, metrics = jit(functools.partial(MODEL.forward, rng=None, training=False))(params, BATCH)
    layers = ('decoder/layers_0', 'decoder/layers_1')
    names = [*layers, *(f'{layer}/self_attention' for layer in layers)]
    each = [metrics[f'experts/{name}/auxiliary_loss'] for name in names]
    assert len(set(map(float, each))) == 4
    np.testing.assert_allclose(loss, MODEL.aux_loss_factor * np.mean(each), rtol=1e-6)


def test_cost():
    spec = {'tokens': ((2, 8), 'int32')}
    flops, dense = (model.forward_flops(spec, training=True) for model in (MODEL, MODEL.dense()))
    D, W, tokens = 48, 32, 16
    more = 2 * cost.matmul(tokens, D, W) + 2 * 2 * cost.matmul(8, W, 8)  # two heads more: projections, then attention
    assert flops['attention'] == dense['attention'] + 2 * more
    assert flops['router'] == 4 * cost.matmul(tokens, D, 3)
    params = {path: jnp.zeros(shape) for path, shape in identify.shapes(MODEL).items()}
    inside = sum(leaf.size for path, leaf in params.items() if '/expert/' in path)
    active = cost.num_active_parameters({p.removeprefix('params/'): x for p, x in params.items()}, MODEL.moe_layers())
    assert active == sum(leaf.size for leaf in params.values()) - inside / 3


def leaves_of(model):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in identify.shapes(model).items()}


def test_surgery_copies_them_and_makes_none():
    leaves = leaves_of(MODEL)
    plan = plan_surgery(leaves, leaves, Surgery(operator=None))
    assert {row.action for row in plan.rows} == {Action.KEEP}
    for source, target, operator in (
        (MODEL.dense(), MODEL, 'copy'),
        (MODEL, MODEL.with_moe(num_experts=6), 'grow'),
    ):
        with pytest.raises(
            UserError,
            match='would make the attention experts of decoder/layers_0/self_attention, .*ATTENTION_MOE = None',
        ):
            plan_surgery(leaves_of(source), leaves_of(target), Surgery(operator=operator))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'attention_moe': MoEConfig(num_experts=4, router='top_k')}, "must have .*DISPATCH = 'ragged'"),
        ({'attention_moe': llm_moe(num_selected_experts=3)}, r'NUM_HEADS = 4 must be .* 3 \* 2'),
        ({'attention_moe': MOE, 'qkv_bias': True}, 'set QKV_BIAS = False'),
        ({'attention_moe': MOE, 'qk_norm': 'projection'}, "QK_NORM = 'none' or 'head'"),
        ({'attention_moe': llm_moe(num_shared_experts=1)}, 'without shared ones'),
        ({'moe_output_bias': True}, 'MOE_OUTPUT_BIAS = True needs MoE layers'),
    ],
)
def test_refusals_name_the_binding(settings, message):
    with pytest.raises(UserError, match=message):
        small_llm(**settings)
