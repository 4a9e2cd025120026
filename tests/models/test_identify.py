"""What is recognised as a whole checkpoint."""

import jax
import pytest

from tests.small import random_batch, small_t5, with_moe
from tests.surgery.in_memory import abstract
from upcycle.errors import UserError
from upcycle.models import identify
from upcycle.models.encoder_decoder import EncoderDecoderModel

LAYERS = {
    'routed': {},
    'narrow and shared': {'granularity': 2, 'num_shared_experts': 2, 'shared_weights': 'xft'},
    'balanced by a bias': {'balance_bias_rate': 0.1},
    'with defaults': {'default_output_decay': 0.9},
    'soft': {'router': 'soft', 'slots_per_expert': 3},
    'merged': {'router': 'merged'},
}


def leaves_of(**moe):
    return abstract(EncoderDecoderModel(with_moe(small_t5(), **moe)), random_batch())[0]


@pytest.mark.parametrize('kind', LAYERS)
def test_moe_layers_of_every_kind(kind):
    identify.check('here', leaves_of(**LAYERS[kind]))


def test_a_router_for_other_experts():
    leaves = leaves_of()
    name = 'params/encoder/layers_1/mlp/router/router_weights/w/kernel'
    leaves[name] = jax.ShapeDtypeStruct((128, 12), leaves[name].dtype)
    with pytest.raises(UserError, match='w/kernel .* does not route to 8 experts'):
        identify.check('here', leaves)
