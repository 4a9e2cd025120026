"""Scanned and rematerialised stacks compute what the plain one does, with the same parameters."""

import dataclasses
import functools
import re
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.moe.quick import jit, random_params
from tests.small import (
    FEATURES,
    close_to_largest,
    image_batch,
    llm_batch,
    llm_moe,
    random_batch,
    small_llm,
    small_t5,
    small_vit,
    spec_of,
    vit_moe,
    with_moe,
)
from upcycle.errors import UserError
from upcycle.models import memory, stack
from upcycle.models.causal_lm import CausalLM
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.models.stack import Remat, apply_layers, segments
from upcycle.models.stack import _stack as stack_layers
from upcycle.moe.config import AdaptiveBalance, MoEConfig

SIZES = {'emb_dim': 32, 'mlp_dim': 64, 'num_heads': 2, 'head_dim': 16, 'num_encoder_layers': 4}


def model(**fields):
    # A loop of pairs in the encoder, of single layers in the decoder.
    config = with_moe(small_t5(**SIZES, num_decoder_layers=2, decoder_moe_layers=(0, 1)), num_experts=4)
    return EncoderDecoderModel(dataclasses.replace(config, **fields), aux_loss_factor=1.0)


def of_depth(depth):
    """Every other layer of both stacks is sparse."""
    return {'num_encoder_layers': depth, 'num_decoder_layers': depth, 'decoder_moe_layers': 'every_other'}


@functools.cache
def params_of(which):
    batch = random_batch(padding=3)
    return random_params(which.module(), **{name: batch[name] for name in FEATURES[:3]})


@functools.cache
def inputs():
    return random_batch(padding=3), params_of(model())


@functools.cache
def step(which):
    """Loss, metrics and gradients; the parameters are those of the plain form."""
    plain = dataclasses.replace(which.config, scan_layers=False, remat='none')
    batch, params = random_batch(padding=3), params_of(dataclasses.replace(which, config=plain))

    def loss(params):
        sums, moe_loss, metrics = which.forward(params, batch, jax.random.key(0), training=True)
        return sums['loss'] / sums['weight'] + moe_loss, metrics

    return jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    'fields',
    [
        {'scan_layers': True},
        {'scan_layers': True, 'remat': 'full'},
        {'remat': 'full'},
        {'remat': 'minimal'},
        {'remat': 'exchange'},
    ],
    ids=str,
)
@pytest.mark.parametrize('sizes', [{}, pytest.param(of_depth(4), marks=pytest.mark.exhaustive)], ids=['', 'deep'])
def test_the_form_of_the_program_changes_nothing(sizes, fields):
    (loss, metrics), grads = step(model(**sizes))
    (other, other_metrics), other_grads = step(model(**sizes, **fields))
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert other_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_(close_to_largest(a, b)), other_grads, grads)


def test_a_scanned_stack_is_compiled_once():
    """The program of eight layers in a loop is as long as that of four."""
    batch, _ = inputs()

    def length(depth, scan):
        deep = model(**of_depth(depth), scan_layers=scan)
        params = jax.eval_shape(lambda: random_params(deep.module(), **{name: batch[name] for name in FEATURES[:3]}))
        lowered = jax.jit(lambda params: deep.forward(params, batch, None, training=True)[0]['loss']).lower(params)
        return lowered.as_text().count('dot_general')

    assert length(8, scan=True) == length(4, scan=True)
    assert length(4, scan=False) > 1.8 * length(2, scan=False)


@pytest.mark.parametrize(
    ('kinds', 'expected'),
    [
        ('aaaa', [(0, 1, 4)]),
        ('abab', [(0, 2, 2)]),
        ('aabb', [(0, 1, 2), (2, 1, 2)]),
        ('aba', [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        ('a', [(0, 1, 1)]),
        ('', []),
    ],
)
def test_segments(kinds, expected):
    assert segments(kinds) == expected


def test_dropout_differs_from_layer_to_layer_of_a_loop():
    """Two equal layers of a loop must not drop the same neurons."""

    class Masks(nn.Module):
        config: Any
        kind: Any

        @nn.compact
        def __call__(self, x_BxLxD):
            scale = self.param('scale', nn.initializers.ones, ())
            # Kept entries leave one of four digits: which layers kept an entry can be read from the sum.
            return 4.0 * x_BxLxD + scale * nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x_BxLxD)) / 2

    class Stack(nn.Module):
        config: Any

        @nn.compact
        def __call__(self, x_BxLxD):
            return apply_layers(self, Masks, 'aa', x_BxLxD, (), (), last=True)

    params = {f'layers_{i}': {'scale': jnp.ones(())} for i in range(2)}

    def masks(scan, seed):
        rngs = {'dropout': jax.random.key(seed)}
        config = types.SimpleNamespace(dtype=jnp.float32, remat=Remat.NONE, scan_layers=scan)
        digits = np.asarray(Stack(config).apply({'params': params}, jnp.zeros((4, 8, 16)), rngs=rngs))
        return np.stack([digits // 4, digits % 4])

    looped = masks(True, 0)
    assert set(np.unique(looped)) == {0, 1}
    # Of 512 entries about half are kept by exactly one of the two.
    assert 200 < (looped[0] != looped[1]).sum() < 312
    np.testing.assert_array_equal(looped, masks(True, 0))
    assert (looped != masks(True, 1)).any()


def test_minimal_keeps_the_products_of_experts_too():
    """Recomputed are elementwise operations, not the products with the weights of MLPs and experts."""
    batch, params = inputs()

    def products(remat):
        which = model(remat=remat)

        def loss(params):
            return which.forward(params, batch, None, training=True)[0]['loss']

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        return text.count('dot_general[')

    # Attention's own products, of two activations, are computed again; a layer has two of them, the decoder's four.
    again = 2 * model().config.num_encoder_layers + 4 * model().config.num_decoder_layers
    assert products('minimal') <= products('none') + again < products('full')


def test_a_rematerialised_loop_holds_its_parameters_once():
    """Gradients take the places of the stacked parameters: JAX's own derivative of a loop holds both, 2.4 times them here."""
    batch, _ = inputs()

    def sizes(depth):
        """Bytes of temporaries, and of the layers' parameters, which most of them are."""
        deep = model(**of_depth(depth), mlp_dim=2048, scan_layers=True, remat='full')
        params = jax.eval_shape(lambda: random_params(deep.module(), **{name: batch[name] for name in FEATURES[:3]}))

        def loss(params):
            return deep.forward(params, batch, None, training=True)[0]['loss']

        compiled = jit(jax.grad(loss)).lower(params).compile()
        leaves = jax.tree.leaves((params['encoder'], params['decoder']))
        return np.array([compiled.memory_analysis().temp_size_in_bytes, sum(4 * leaf.size for leaf in leaves)])

    temporaries, parameters = sizes(8) - sizes(4)
    assert temporaries < 1.9 * parameters


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="REMAT = 'some' must be one of none, minimal, exchange, full"):
        small_t5(remat='some')
    assert small_t5(remat='full').remat is Remat.FULL


def vit_model(**fields):
    moe = vit_moe(router='top_k', num_experts=4, gate_noise=1.0, balance_loss='importance_load', fill_order='priority')
    return ImageClassifier(small_vit(moe=moe, moe_layers=(0, 1), num_layers=2, emb_dim=32, mlp_dim=64, **fields))


def llm_model(**fields):
    return CausalLM(small_llm(moe=llm_moe(), attention_moe=llm_moe(), **fields))


ROUTED = {
    't5': (model, {'num_encoder_layers': 2, 'encoder_moe_layers': (0, 1)}),
    'ragged': (model, {'encoder_moe': None, 'decoder_moe': MoEConfig(4, router='top_k', dispatch='ragged')}),
    'vit': (vit_model, {}),
    'attention experts': (llm_model, {}),
}


@functools.cache
def decisions(kind, **form):
    """How often the program of a gradient chooses experts or tokens, and puts tokens in order."""
    build, fields = ROUTED[kind]
    which = build(**fields, **form, dtype='bfloat16')
    batches = {'vit': lambda: image_batch(which.config), 'attention experts': llm_batch}
    batch = batches.get(kind, lambda: random_batch(padding=3))()
    params = nn.unbox(jax.eval_shape(lambda key: which.init(key, spec_of(batch)), jax.random.key(0)))

    def loss(params):
        sums, moe_loss, _ = which.forward(params, batch, jax.random.key(0), training=True)
        return sums['loss'] + moe_loss

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    # What `ragged` sorts is integers that were decided.
    return text.count('top_k['), 0 if kind in ('ragged', 'attention experts') else text.count('sort[')


@pytest.mark.parametrize('scan', [False, True], ids=['', 'scan'])
@pytest.mark.parametrize(
    ('kind', 'remat'),
    [
        pytest.param(
            kind,
            remat,
            marks=[] if kind != 'attention experts' and remat == 'full' or kind == 't5' else pytest.mark.exhaustive,
        )
        for kind in ROUTED
        for remat in ('full', 'minimal', 'exchange')
        if (kind, remat) != ('t5', 'exchange')
    ],
)
def test_the_backward_pass_takes_no_decision_again(kind, remat, scan):
    """In bfloat16 a recomputed router may choose otherwise, and a token's gradient would go to an expert that never saw it."""
    chosen, _ = expected = decisions(kind, scan_layers=scan)
    assert chosen > 0
    assert decisions(kind, scan_layers=scan, remat=remat) == expected


def test_a_loop_keeps_decisions_and_no_constants(monkeypatch):
    """Besides its input `Remat.FULL` holds a few integers a token for each layer."""
    kept = []

    class Kept(memory._Constant):
        def __init__(self, value):
            kept.append(value.shape)
            super().__init__(value)

    monkeypatch.setattr(memory, '_Constant', jax.tree_util.register_static(Kept))
    which = model(scan_layers=True, remat='full', position_biases='every_layer')
    batch = random_batch(batch=3)  # no number of layers, since masks are (3, 16, 16)
    params = nn.unbox(jax.eval_shape(lambda key: which.init(key, spec_of(batch)), jax.random.key(0)))

    def loss(params):
        return which.forward(params, batch, None, training=True)[0]['loss']

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert (16, 16) in kept and (8, 8) in kept  # which bucket the distance of two tokens falls into
    assert not re.search(r'(i32|bool)\[[124],16,16\]', text)


@pytest.mark.parametrize('family', ['t5', 'vit'])
def test_a_stack_has_the_types_that_its_layers_read(family, monkeypatch):
    """Matrices and T5's norms are cast by their own modules, a ViT's norms and what routing keeps are not."""
    types = {}

    def stacked(layers, axes, dtypes):
        for path, dtype in flatten_dict(dtypes, sep='/').items():
            types.setdefault(dtype.name, set()).add(path)
        return stack_layers(layers, axes, dtypes)

    monkeypatch.setattr(stack, '_stack', stacked)
    form = {'scan_layers': True, 'dtype': 'bfloat16'}
    if family == 't5':
        moe = MoEConfig(4, router='top_k', balance_bias_rate=0.1, adaptive_balance=AdaptiveBalance())
        which, batch = model(**form, encoder_moe=moe, decoder_moe=moe), random_batch()
    else:
        which = vit_model(**form)
        batch = image_batch(which.config)
    params = nn.unbox(jax.eval_shape(lambda key: which.init(key, spec_of(batch)), jax.random.key(0)))
    jax.eval_shape(lambda params: which.forward(params, batch, jax.random.key(0), training=True), params)
    state = {'mlp/router_state/bias', 'mlp/router_state/loss_weight'}
    router = 'router/router_weights/w/kernel'
    norms = {f'LayerNorm_{i}/{name}' for i in (0, 1) for name in ('scale', 'bias')}
    assert types['float32'] == ({f'mlp/{router}', *state} if family == 't5' else {f'MlpBlock_0/{router}', *norms})
    assert any('/expert/' in path for path in types['bfloat16'])


@pytest.mark.parametrize('family', [pytest.param('t5', marks=pytest.mark.exhaustive), 'vit'])
def test_the_gradient_of_a_deep_stack_reads_no_more_of_each_layer(family):
    """XLA:CPU may fuse the sum of residual branches across layers: each layer would add up all of them again."""
    if family == 't5':
        config, build = model().config, EncoderDecoderModel
        fields, batch = of_depth, random_batch()
    else:
        config, build = small_vit(moe=vit_moe(), moe_layers='every_other'), ImageClassifier
        fields, batch = lambda depth: {'num_layers': depth}, image_batch(config)

    def operands(depth):
        """Of all fused operations."""
        deep = build(dataclasses.replace(config, **fields(depth)))
        spec = {name: (array.shape, array.dtype) for name, array in batch.items()}
        params = nn.unbox(jax.eval_shape(lambda key: deep.init(key, spec), jax.random.key(0)))

        def loss(params):
            return deep.forward(params, batch, None, training=True)[0]['loss']

        text = jit(jax.grad(loss)).lower(params).compile().as_text()
        return sum(fusion.count('%') for fusion in re.findall(r' fusion\((.*?)\), kind', text))

    assert operands(8) < 2.1 * operands(4)


@pytest.mark.parametrize('family', ['t5', 'vit'])
def test_a_rematerialised_loop_takes_bfloat16(family):
    """Gradients have the types of the stacks that they are written into, also where a layer computes in float32."""
    form = {'scan_layers': True, 'remat': 'full', 'dtype': 'bfloat16'}
    if family == 't5':
        which, batch = model(**form), inputs()[0]
    else:
        config = small_vit(moe=vit_moe(), moe_layers='last_half', **form)
        which, batch = ImageClassifier(config), image_batch(config)
    spec = {name: (array.shape, array.dtype) for name, array in batch.items()}
    params = nn.unbox(jax.eval_shape(lambda key: which.init(key, spec), jax.random.key(0)))

    def loss(params):
        return which.forward(params, batch, None, training=True)[0]['loss']

    grads = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
