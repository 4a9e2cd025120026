"""Groups, capacities, sparse layers, and what is refused."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from upcycle import schema
from upcycle.errors import UserError
from upcycle.models.base import known_fields
from upcycle.moe.config import AdaptiveBalance, MoEConfig
from upcycle.moe.groups import num_groups, sparse_layers
from upcycle.moe.routers import ROUTERS


class TestGroups:
    @pytest.mark.parametrize(
        ('num_tokens', 'group_size', 'multiple_of', 'expected'),
        [
            (4096 * 8, 4096, 1, 8),
            (4096 * 8, 4096, 16, 16),
            (8 * 64, 4096, 8, 8),  # the fixtures' encoder: 64 tokens a group
            (8 * 32, 4096, 8, 8),  # and decoder: 32
            (2048 * 512, 4096, 64, 256),  # T5 Base on 64 chips
            (128 * 114, 4096, 1, 4),  # a decoder's length: 14592 = 2^8 * 3 * 19 tokens
            (49, 49, 1, 1),
            (7 * 11, 10, 1, 11),  # 8, 9 and 10 do not divide 77
            (13, 4, 1, 13),
            (100, 1000, 1, 1),
        ],
    )
    def test_known_values(self, num_tokens, group_size, multiple_of, expected):
        assert num_groups(num_tokens, group_size, multiple_of) == expected

    @pytest.mark.parametrize('seed', range(15))
    def test_is_the_smallest_divisor_that_serves(self, seed):
        rng = np.random.default_rng(seed)
        multiple_of = int(rng.integers(1, 9))
        num_tokens = multiple_of * int(rng.integers(1, 400))
        group_size = int(rng.integers(1, 500))
        serves = [
            n
            for n in range(1, num_tokens + 1)
            if num_tokens % n == 0 and n % multiple_of == 0 and n >= math.ceil(num_tokens / group_size)
        ]
        if serves:
            assert num_groups(num_tokens, group_size, multiple_of) == min(serves)

    def test_refuses_a_multiple_that_does_not_divide_the_batch(self):
        with pytest.raises(UserError, match='GROUPS_MULTIPLE_OF = 3 .* 64 tokens'):
            num_groups(64, 32, 3)


class TestCapacity:
    @pytest.mark.parametrize(
        ('rule', 'router', 'factor', 'num_experts', 'tokens', 'expected'),
        [
            ('flaxformer', 'expert_choice', 2.0, 32, 4096, 256),
            ('flaxformer', 'top_k', 2.0, 32, 4096, 256),  # K is not multiplied in
            ('flaxformer', 'expert_choice', 2.0, 8, 64, 16),  # the fixtures
            ('flaxformer', 'top_k', 1.25, 8, 32, 5),
            ('flaxformer', 'top_k', 1.0, 32, 64, 4),  # 2, raised to the minimum
            ('flaxformer', 'top_k', 1.0, 8, 20, 4),  # 2.5
            ('flaxformer', 'top_k', 1.0, 8, 44, 6),  # 5.5, to even
            ('flaxformer', 'top_k', 1.0, 8, 3, 3),  # never more slots than tokens
            ('flaxformer', 'top_k', 32.0, 8, 64, 64),
            ('vmoe', 'expert_choice', 2.0, 32, 49, 4),  # one image of ViT-B/32: 3.06, up to 4
            ('vmoe', 'expert_choice', 2.0, 32, 8 * 49, 28),  # 24.5
            ('vmoe', 'expert_choice', 2.0, 32, 196, 16),  # one image of ViT-B/16: 12.25
            ('vmoe', 'expert_choice', 1.0, 32, 4096, 128),
            ('vmoe', 'top_k', 1.05, 32, 4096, 272),  # K = 2: 268.8
            ('vmoe', 'expert_choice', 1.1, 11, 40, 4),  # exactly 4, but 1.1 * 40 is a hair above 44
            ('vmoe', 'expert_choice', 2.0, 2, 7, 7),
        ],
    )
    def test_known_values(self, rule, router, factor, num_experts, tokens, expected):
        config = MoEConfig(num_experts=num_experts, router=router, train_capacity_factor=factor, capacity_rule=rule)
        assert config.capacity(tokens, training=True) == expected

    @pytest.mark.parametrize('seed', range(15))
    def test_is_the_definition_in_exact_arithmetic(self, seed):
        rng = np.random.default_rng(seed)
        hundredths = int(rng.integers(10, 400))
        E, S, K = (int(x) for x in rng.integers([2, 1, 1], [65, 3000, 3]))
        router = 'top_k' if seed % 2 else 'expert_choice'
        for rule in ('flaxformer', 'vmoe'):
            config = MoEConfig(
                num_experts=E,
                router=router,
                eval_capacity_factor=hundredths / 100,
                num_selected_experts=K,
                capacity_rule=rule,
            )
            exact = Fraction(hundredths, 100) * S / E
            if rule == 'vmoe':
                choices = K if router == 'top_k' else 1
                expected = math.ceil(Fraction(math.ceil(choices * exact), 4)) * 4
            else:
                expected = max(round(exact), 4)
            assert config.capacity(S, training=False) == min(expected, S), rule

    def test_has_a_factor_for_training_and_one_for_evaluation(self):
        config = MoEConfig(num_experts=8, train_capacity_factor=1.0, eval_capacity_factor=2.0)
        assert [config.capacity(256, training=training) for training in (True, False)] == [32, 64]

    def test_minimum_is_a_setting(self):
        config = MoEConfig(num_experts=8, train_capacity_factor=1.0, min_capacity=1)
        assert config.capacity(16, training=True) == 2


class TestSparseLayers:
    @pytest.mark.parametrize(
        ('spec', 'num_layers', 'expected'),
        [
            ('every_other', 12, (1, 3, 5, 7, 9, 11)),
            ('every_other', 5, (1, 3)),
            ('every_other', 1, ()),
            ('last_half', 12, (6, 7, 8, 9, 10, 11)),
            ('last_half', 5, (3, 4)),
            ('all', 3, (0, 1, 2)),
            ('none', 4, ()),
            ([3, 0], 4, (0, 3)),
            ((), 4, ()),
        ],
    )
    def test_known_values(self, spec, num_layers, expected):
        assert sparse_layers(spec, num_layers, 'MOE_LAYERS') == expected

    @pytest.mark.parametrize(
        ('spec', 'message'),
        [
            ('every_third', "MOE_LAYERS = 'every_third' is not one of every_other, last_half, all, none"),
            ([4], 'MOE_LAYERS names layer 4, but the stack has 4 layers'),
            ([-1], 'MOE_LAYERS names layer -1'),
            ([1.0], 'MOE_LAYERS names layer 1.0'),
            ([1, 1], 'MOE_LAYERS = .* names a layer twice'),
        ],
    )
    def test_refusals(self, spec, message):
        with pytest.raises(UserError, match=message):
            sparse_layers(spec, 4, 'MOE_LAYERS')


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'router': 'hash'}, "ROUTER = 'hash' is not one of expert_choice, top_k"),
        ({'fill_order': 'random'}, "FILL_ORDER = 'random' must be one of token_major"),
        ({'capacity_rule': 'gshard'}, "CAPACITY_RULE = 'gshard' must be one of flaxformer, vmoe"),
        ({'route_padding': True}, 'ROUTE_PADDING = True must be one of skip'),
        ({'dispatch': 'sort'}, "DISPATCH = 'sort' must be one of gather, einsum, ragged"),
        ({'dispatch': 'ragged'}, "DISPATCH = 'ragged' is dropless Top-K, and Expert Choice has"),
        ({'network_dtype': 'int8'}, "NETWORK_DTYPE = 'int8' must be one of float32, bfloat16, float16 or None"),
        ({'num_experts': 0}, 'NUM_EXPERTS = 0 must be'),
        ({'num_experts': 8.0}, 'NUM_EXPERTS = 8.0 must be a whole number'),
        ({'group_size': 0}, 'GROUP_SIZE = 0 must be'),
        ({'groups_multiple_of': 0}, 'GROUPS_MULTIPLE_OF = 0 must be'),
        ({'train_capacity_factor': 0.0}, 'TRAIN_EXPERT_CAPACITY_FACTOR = 0.0 must be a number above 0'),
        ({'eval_capacity_factor': float('nan')}, 'EVAL_EXPERT_CAPACITY_FACTOR = nan'),
        ({'jitter_noise': 1.0}, 'JITTER_NOISE = 1.0 must be a number in'),
        ({'granularity': 0}, 'EXPERT_GRANULARITY = 0 must be'),
        ({'router': 'top_k', 'balance_bias_rate': -1.0}, 'BALANCE_BIAS_RATE = -1.0 must be a number of at least 0'),
        ({'logit_normalization': 0.0}, 'ROUTER_LOGIT_NORMALIZATION = 0.0 must be a number above 0 or None'),
        ({'router': 'top_k', 'default_output_decay': 1.0}, 'DEFAULT_OUTPUT_DECAY = 1.0 must be a number in'),
        (
            {'router': 'top_k', 'default_output_decay': 0.9, 'normalize_combine_weights': True},
            'turn NORMALIZE_COMBINE_WEIGHTS and',
        ),
        (
            {'router': 'top_k', 'default_output_decay': 0.9, 'dispatch': 'ragged'},
            "which DISPATCH = 'ragged' does not keep",
        ),
        ({'router': 'top_k', 'adaptive_balance': {}, 'dispatch': 'ragged'}, "DISPATCH = 'ragged' drops none"),
        ({'router': 'merged', 'granularity': 2}, 'EXPERT_GRANULARITY = 2 makes experts parts'),
        ({'router': 'merged', 'merged_shared_weight': 2}, 'AVERAGE_SHARED_WEIGHT = 2 must be a number in'),
        ({'router': 'dense', 'dispatch': 'ragged'}, "the router 'dense' trains every expert"),
        ({'router': 'top_k', 'adaptive_balance': {'decay': 1.5}}, 'ADAPTIVE_BALANCE_DECAY = 1.5 must be a number in'),
        ({'router': 'top_k', 'logit_normalization': 1.0, 'gate_noise': 1.0}, "GATE_NOISE has the logits' scale"),
        ({'router': 'dense', 'inference_threshold': 1.0}, 'INFERENCE_THRESHOLD = 1.0 must lie between'),
        ({'num_shared_experts': -1}, 'NUM_SHARED_EXPERTS = -1 must be'),
        ({'shared_weights': 'half'}, "SHARED_WEIGHTS = 'half' must be one of one, xft"),
        ({'shared_weights': 'xft'}, "SHARED_WEIGHTS = 'xft' needs a shared expert"),
        (
            {'shared_weights': 'xft', 'num_shared_experts': 1, 'normalize_combine_weights': True},
            'NORMALIZE_COMBINE_WEIGHTS gives the routed ones all: turn it off',
        ),
        ({'causal': True}, "^ROUTER = 'expert_choice' .* leaks the future"),
        (
            {'router': 'top_k', 'num_selected_experts': 0},
            'NUM_SELECTED_EXPERTS = 0 must be a whole number of at least 1',
        ),
        ({'router': 'top_k', 'num_selected_experts': 9}, 'NUM_SELECTED_EXPERTS = 9 must lie'),
        ({'expert_mlp_dim': 64, 'granularity': 2}, 'EXPERT_MLP_DIM = 64 and EXPERT_GRANULARITY = 2 both'),
        ({'expert_mlp_dim': 0}, 'EXPERT_MLP_DIM = 0 must be a whole number of at least 1 or None'),
        ({'shared_mlp_dim': 64}, 'SHARED_MLP_DIM = 64 needs a shared expert: set NUM_SHARED_EXPERTS'),
        ({'shared_gate': True}, 'SHARED_GATE = True needs a shared expert'),
        ({'shared_gate': True, 'num_shared_experts': 1, 'shared_weights': 'xft'}, 'and SHARED_GATE both weigh'),
        ({'shared_gate': True, 'num_shared_experts': 1, 'router': 'merged'}, 'SHARED_GATE weighs shared experts'),
        ({'router': 'top_k', 'scores': 'relu'}, "ROUTER_SCORES = 'relu' must be one of softmax, sigmoid"),
        ({'router': 'top_k', 'score_groups': 3}, 'SCORE_GROUPS = 3 does not divide NUM_EXPERTS = 8'),
        ({'router': 'top_k', 'score_groups': 2}, 'set SELECTED_SCORE_GROUPS'),
        ({'router': 'top_k', 'score_groups': 2, 'selected_groups': 3}, 'SELECTED_SCORE_GROUPS = 3 must lie'),
        (
            {'router': 'top_k', 'selected_groups': 2},
            'SELECTED_SCORE_GROUPS = 2 must lie between 1 and SCORE_GROUPS = 1',
        ),
        (
            {'router': 'top_k', 'score_groups': 4, 'selected_groups': 1, 'num_selected_experts': 3},
            'SELECTED_SCORE_GROUPS = 1 groups hold 2 experts, fewer than NUM_SELECTED_EXPERTS = 3',
        ),
        ({'router': 'top_k', 'score_groups': 8, 'selected_groups': 2}, "no best two: set GROUP_SCORE = 'max'"),
        ({'router': 'top_k', 'weight_scale': 0.0}, 'ROUTED_WEIGHT_SCALE = 0.0 must be a number above 0'),
        (
            {'router': 'top_k', 'weight_scale': 2.0, 'shared_weights': 'xft', 'num_shared_experts': 1},
            "SHARED_WEIGHTS = 'xft' makes a token's weights sum to 1",
        ),
        ({'router': 'top_k', 'scores': 'sigmoid', 'balance_loss': 'importance_load'}, "do not choose by: use 'switch'"),
        ({'router': 'top_k', 'scores': 'sigmoid', 'default_output_decay': 0.9}, 'unset ROUTER_SCORES'),
        ({'router': 'top_k', 'causal': True, 'fill_order': 'priority'}, "FILL_ORDER = 'priority' .* use 'token_major'"),
    ],
)
def test_refusals_name_the_binding(fields, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**({'num_experts': 8} | fields))


def test_soft_moe_mixes_no_two_examples():
    soft = MoEConfig(8, router='soft', group_size=512)
    soft.check_examples(num_tokens=8 * 512, length=512, way_out='')
    MoEConfig(8).check_examples(num_tokens=8 * 32, length=32, way_out='')
    with pytest.raises(UserError, match='groups have 256 tokens, an example has 32. Set GROUP_SIZE = 32'):
        soft.check_examples(num_tokens=8 * 32, length=32, way_out='GROUP_SIZE = 32')


def test_an_expert_is_so_many_times_narrower():
    assert MoEConfig(8, granularity=4).expert_width(2048) == 512
    with pytest.raises(UserError, match='EXPERT_GRANULARITY = 3 does not divide MLP_DIM = 2048'):
        MoEConfig(8, granularity=3).expert_width(2048)


def test_widths_of_experts_and_shared_experts():
    assert MoEConfig(8, expert_mlp_dim=700).expert_width(2048) == 700
    assert MoEConfig(8, granularity=4, num_shared_experts=3).shared_width(2048) == 1536
    assert MoEConfig(8, num_shared_experts=1, shared_mlp_dim=5632).shared_width(2048) == 5632
    with pytest.raises(UserError, match="'merged' averages the shared experts, 4096 wide, with the others, 2048 wide"):
        MoEConfig(8, router='merged', num_shared_experts=2).shared_width(2048)


def test_words_may_be_plain_strings():
    assert MoEConfig(num_experts=8, router='top_k', dispatch='einsum') == MoEConfig(
        num_experts=8, router=MoEConfig(8, router='top_k').router, dispatch=MoEConfig(8, dispatch='einsum').dispatch
    )


def test_a_field_means_the_same_to_every_router():
    """gin files set it once, and config.gin holds one default."""
    seen = {}
    for kind in ROUTERS.values():
        for name, parameter in schema.parameters(kind).items():
            assert seen.setdefault(name, (parameter.annotation, parameter.default)) == (
                parameter.annotation,
                parameter.default,
            )
    assert seen.keys() | {'router'} == schema.parameters(MoEConfig).keys()


def test_metadata_of_a_layer():
    """A later version may say more; damage is told from it."""
    layer = MoEConfig(8, router='top_k', adaptive_balance=AdaptiveBalance(rate=0.5))
    told = json.loads(json.dumps(dataclasses.asdict(layer)))
    assert (
        MoEConfig(**known_fields(MoEConfig, told | {'later': 1, 'adaptive_balance': {'rate': 0.5, 'later': 1}}))
        == layer
    )
    for damage in ({'router': {}}, {'balance_loss': {}}, {'router': 'hash'}, {'num_experts': None}, {'fill_order': 3}):
        with pytest.raises(UserError, match='metadata is damaged'):
            known_fields(MoEConfig, told | damage)
    del told['num_experts']
    with pytest.raises(UserError, match='metadata is damaged: num_experts of its model is missing'):
        known_fields(MoEConfig, told)
