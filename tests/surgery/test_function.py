"""How far each operator preserves the dense function: the receipt's check on both families."""

import dataclasses
import functools

import pytest

from tests.small import image_batch, random_batch, small_t5, small_vit, vit_moe, with_moe
from tests.surgery.in_memory import leaves_of, params_of, plan_for, upcycle
from upcycle.errors import UserError
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.surgery.operators import Drop, Granular, Partial
from upcycle.surgery.plan import Surgery
from upcycle.surgery.receipt import check_layer

MOE = {'num_experts': 8, 'num_selected_experts': 4, 'eval_capacity_factor': 4.0, 'normalize_combine_weights': True}


def model_of(family, **moe):
    """A small model with at most 2 sparse layers, and a batch."""
    settings = {**MOE, **moe}
    if family == 't5':
        return EncoderDecoderModel(with_moe(small_t5(), **settings)), random_batch(padding=3)
    config = small_vit(num_layers=2, moe=vit_moe(**settings), moe_layers='last_half')
    return ImageClassifier(config), image_batch(config)


@functools.cache
def dense_params(family):
    model, batch = model_of(family)
    return params_of(model.dense(), batch)


def layers(family, spec, router_stddev=0.3, **moe):
    """The function check of each MoE layer."""
    model, batch = model_of(family, **moe)
    spec = dataclasses.replace(spec, router_stddev=router_stddev)
    sparse = leaves_of(upcycle(model, dense_params(family), spec, batch))
    dense = leaves_of(dense_params(family))

    def below(leaves, path):
        start = f'params/{path}/'
        return {name.removeprefix(start): leaf for name, leaf in leaves.items() if name.startswith(start)}

    paths = model.moe_layers()
    return [dataclasses.asdict(check_layer(model, path, below(dense, path), below(sparse, path), 64)) for path in paths]


@pytest.mark.parametrize('family', ['t5', 'vit'])
@pytest.mark.parametrize('operator', [Granular(shards=2), Granular(shards=4), Partial(shards=2, ratio=0.0)])
def test_shards_add_up_to_the_dense_mlp(family, operator):
    for layer in layers(family, Surgery(operator=operator), granularity=operator.shards):
        assert layer['covered'] > 0.5
        assert layer['max_abs_difference_covered'] < 1e-5 * max(layer['dense_rms'], 1)
        assert layer['max_abs_on_uncovered'] == 0
        assert layer['ratio'] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ('operator', 'gap'),
    [
        # Without virtual groups, a token visits shards of several copies; without scaling it gets 1 / G; with 'partial' half of
        # the neurons are noise; with 'nvidia', GELU is not homogeneous.
        (Granular(virtual_groups=False), 0.1),
        (Granular(scale='none'), 0.49),
        (Partial(ratio=0.5), 0.5),
        (Granular(scale='nvidia'), 0.01),
    ],
)
def test_what_does_not_keep_the_function_says_so(operator, gap):
    for layer in layers('t5', Surgery(operator=operator), granularity=2):
        assert layer['gap'] > gap
        assert layer['max_abs_difference_covered'] > 1e-3


def test_half_a_copy_is_not_the_mlp():
    _, decoder = layers('t5', Surgery(operator=Granular(shards=4)), granularity=4, num_selected_experts=2)
    assert decoder['gap'] > 0.1


def test_nvidias_scale_makes_up_for_raw_weights():
    """T raw weights of a uniform softmax over E experts sum to s = T / E; the output has about the dense scale."""
    spec = Surgery(operator=Granular(scale='nvidia', normalized=False, num_selected_experts=4))
    for layer in layers('t5', spec, 0.02, normalize_combine_weights=False, granularity=2):
        assert 0.7 < layer['ratio'] < 1.4


@pytest.mark.parametrize('family', ['t5', 'vit'])
@pytest.mark.parametrize('granularity', [1, 2])
def test_a_shared_expert_with_xfts_weights_keeps_the_function_for_every_token(family, granularity):
    operator = Granular(shards=granularity) if granularity > 1 else 'copy'
    moe = {'num_shared_experts': granularity, 'shared_weights': 'xft', 'normalize_combine_weights': False}
    for layer in layers(family, Surgery(operator=operator), granularity=granularity, eval_capacity_factor=1.0, **moe):
        assert layer['covered'] < 1
        # If raw weights of whole shards sum to s, routed experts give s of the MLP and the shared one the rest.
        assert layer['gap'] < 1e-5


def test_a_shared_expert_of_weight_1_is_added():
    for layer in layers('t5', Surgery(), num_shared_experts=1):
        assert layer['ratio'] == pytest.approx(2, abs=1e-5)
        assert layer['max_abs_on_uncovered'] < 1e-5


def test_drop_says_how_much_it_changed():
    gaps = [[layer['gap'] for layer in layers('vit', Surgery(operator=Drop(ratio=r)))] for r in (0.1, 0.9)]
    assert all(0.01 < low < high for low, high in zip(*gaps, strict=True))


@pytest.mark.parametrize(
    ('spec', 'moe', 'message'),
    [
        (
            {'operator': 'copy'},
            {'granularity': 2},
            "EXPERT_GRANULARITY makes experts narrower: use EXPERT_OPERATOR = 'granular'",
        ),
        ({'operator': Granular(shards=2)}, {'granularity': 4}, 'needs a source of shape'),
        ({'operator': Granular(shards=4)}, {'granularity': 4, 'num_experts': 6}, 'NUM_EXPERTS = 6 is not a multiple'),
        (
            {'operator': 'copy'},
            {'expert_mlp_dim': 24},
            "with another EXPERT_MLP_DIM than the dense MLP's width use 'random'",
        ),
        (
            {'operator': Granular(shards=2)},
            {'granularity': 2, 'num_shared_experts': 1},
            'set NUM_SHARED_EXPERTS = EXPERT_GRANULARITY',
        ),
    ],
)
def test_plans_that_are_refused(spec, moe, message):
    model, batch = model_of('t5', **moe)
    with pytest.raises(UserError, match=message):
        plan_for(model, dense_params('t5'), Surgery(**spec), batch)


def test_tiled_state_needs_the_dense_shapes():
    with pytest.raises(UserError, match="'granular' changes them: set OPTIMIZER_STATE = 'fresh'"):
        Surgery(operator='granular', optimizer_state='tile')
