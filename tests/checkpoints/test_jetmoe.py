"""What the layout of JetMoE cannot hold, and configurations that it refuses. Its outputs are compared in `test_llm_logits.py`."""

import pytest

from tests.checkpoints import llms
from tests.fixtures import requires_fixtures
from upcycle.checkpoints import hf, open_checkpoint
from upcycle.errors import UserError

pytestmark = requires_fixtures


def stored(reader, **changes):
    """Shapes and metadata of a checkpoint whose model has other settings."""
    shapes = {name.removeprefix('params/'): leaf.shape for name, leaf in reader.leaves().items()}
    model = reader.metadata['model']
    return shapes, reader.metadata | {'model': model | {'config': model['config'] | changes}}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'norm_epsilon': 1e-5}, 'norm_epsilon = 1e-05 would become 1e-06'),
        ({'window': 8}, 'window = 8 would become None'),
        (
            {'attention_moe': {'num_experts': 8, 'num_selected_experts': 2}},
            "attention_moe = .*'num_experts': 8.* would",
        ),
        ({'attention_moe': None}, 'attention_moe = None would become'),
        ({'moe': None}, "moe = None would become 'experts'"),
        ({'qk_norm': 'head'}, "qk_norm = 'head' would become 'none'"),
        ({'moe_layers': [0, 1]}, r'moe_layers = \[0, 1\] would become .all.'),
    ],
)
def test_a_model_that_the_layout_would_change_is_refused(changes, message):
    shapes, metadata = stored(open_checkpoint(llms.FOLDERS / 'jetmoe'), **changes)
    with pytest.raises(UserError, match=message):
        hf.of_leaves(shapes, metadata, 'jetmoe')


def test_other_layouts_have_no_attention_experts():
    shapes, metadata = stored(open_checkpoint(llms.FOLDERS / 'jetmoe'))
    with pytest.raises(UserError, match='attention_moe = .* would become None.*Use --layout=jetmoe'):
        hf.of_leaves(shapes, metadata, 'mixtral')
    shapes, metadata = stored(open_checkpoint(llms.FOLDERS / 'mixtral'))
    with pytest.raises(UserError, match='attention_moe = None would become'):
        hf.of_leaves(shapes, metadata, 'jetmoe')


def test_a_model_without_biases_gets_zeros():
    shapes, metadata = stored(open_checkpoint(llms.FOLDERS / 'jetmoe'), moe_output_bias=False)
    layout = hf.of_leaves(shapes, metadata)
    constants = layout.constants(layout.sizes_for(shapes, metadata))
    biases = [f'decoder/layers_{i}/{name}/output_bias' for i in range(3) for name in ('self_attention', 'mlp')]
    assert constants == dict.fromkeys(biases, ((40,), 0.0))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'kv_channels': 10}, r'input_linear.weight .* \[4, 24, 40\] .it must be \[4, 20, 40\]'),
        ({'num_key_value_heads': 1}, r'input_linear.weight .* \[4, 24, 40\] .it must be \[4, 12, 40\]'),
        ({'num_local_experts': 5}, 'asks for|wrong shape'),
        ({'num_experts_per_tok': 5}, 'num_experts_per_tok is 5, but num_local_experts is 4'),
        ({'activation_function': 'tanh'}, "activation_function is 'tanh': it must be one of"),
        ({'attention_bias': True}, 'attention_bias is True'),
        ({'head_dim': 10}, 'head_dim and kv_channels are names of the same field'),
        ({'glu': False}, 'unknown fields .*glu'),
    ],
)
def test_a_config_that_contradicts_the_tensors(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_checkpoint(llms.copy('jetmoe', tmp_path / 'copy', **fields))
