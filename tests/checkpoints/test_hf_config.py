"""Configuration files of Hugging Face folders: each field is read, compared, refused by name, or causes a warning."""

import json
import re

import numpy as np
import pytest

from tests.checkpoints import trees, vits
from tests.checkpoints.test_hf import add
from upcycle import cli, warning
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.hf import t5
from upcycle.errors import UserError
from upcycle.models import identify

# All fields that transformers 4.57 and 5.24 write by default (`to_dict`), and those of older T5 and ViT files on the hub.
WRITTEN = """
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores
prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torchscript
transformers_version typical_p use_bfloat16 bos_token_id chunk_size_feed_forward add_cross_attention
cross_attention_hidden_size finetuning_task dtype torch_dtype _name_or_path output_past use_cache gradient_checkpointing
initializer_range initializer_factor dropout_rate classifier_dropout n_positions label2id
"""


def change(folder, name='config.json', **fields):
    file = folder / name
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (config | fields).items() if value != 'absent'}))


@pytest.fixture(params=['t5', 'vit'])
def family(request):
    return request.param


@pytest.fixture
def folders(tmp_path):
    def write(family):
        tree = trees.t5(False, state=False) if family == 't5' else vits.ours() | {'step': np.asarray(100, np.int32)}
        trees.write(tmp_path / family, 'huggingface', tree, {'facts': {'gelu': 'erf', 'norm_epsilon': 1e-12}})
        return tmp_path / family

    return write


def warnings_of(folder, capsys):
    warning.forget()
    capsys.readouterr()
    reader = open_checkpoint(folder)
    return reader, capsys.readouterr().err


def test_harmless_fields_are_no_warnings(folders, family, capsys):
    folder = folders(family)
    change(
        folder,
        **dict.fromkeys(WRITTEN.split(), 'a value'),
        is_decoder=False,
        pruned_heads={},
        tie_encoder_decoder=False,
    )
    change(folder, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, label2id={}, unused_null=None)
    change(
        folder, **({'tie_word_embeddings': True, 'encoder_stride': 16} if family == 'vit' else {'eos_token_id': [1]})
    )
    assert warnings_of(folder, capsys)[1] == ''


def test_any_other_field_is_a_warning_that_names_it(folders, family, capsys):
    folder = folders(family)
    change(folder, rope_theta=10000, mlp_bias=False)
    _, said = warnings_of(folder, capsys)
    assert said.count('warning:') == 1 and 'rope_theta = 10000, mlp_bias = False' in said and 'config.json' in said
    open_checkpoint(folder)
    assert capsys.readouterr().err == ''  # once a command


SIZES = {
    't5': {
        'vocab_size': 41,
        'd_model': 32,
        'd_kv': 4,
        'd_ff': 25,
        'num_layers': 3,
        'num_decoder_layers': 1,
        'num_heads': 3,
        'relative_attention_num_buckets': 64,
        'hidden_size': 32,
        'head_dim': 4,
        'num_attention_heads': 3,
        'num_hidden_layers': 3,
    },
    'vit': {
        'hidden_size': 32,
        'num_hidden_layers': 4,
        'intermediate_size': 33,
        'num_channels': 1,
        'image_size': 16,
        'patch_size': 6,
        'head_dim': 16,
        'num_labels': None,
        'id2label': {'0': 'cat'},
    },
}


@pytest.mark.parametrize(('family', 'field'), [(family, field) for family in SIZES for field in SIZES[family]])
def test_sizes_are_compared_with_the_arrays(folders, family, field):
    folder = folders(family)
    value = SIZES[family][field]
    change(folder, **({'id2label': 'absent', 'num_labels': 7} if field == 'num_labels' else {field: value}))
    with pytest.raises(UserError, match=f'config.json: .*{field if field != "id2label" else "num_labels"} (is|and) '):
        open_checkpoint(folder)


OTHERS = {
    't5': {
        'dense_act_fn': 'gelu',
        'is_gated_act': False,
        'feed_forward_proj': 'gated-tanh',
        'relative_attention_max_distance': 256,
        'layer_norm_epsilon': 1e-5,
        'is_encoder_decoder': False,
        'is_decoder': True,
        'tie_encoder_decoder': True,
        'pruned_heads': {'0': [1]},
        'quantization_config': {'bits': 8},
        'per_layer_config': {'0': {}},
        'd_model': 'wide',
        'scale_decoder_outputs': 1,
    },
    'vit': {
        'hidden_act': 'quick_gelu',
        'qkv_bias': False,
        'image_size': [12, 24],
        'patch_size': [4, 8],
        'pruned_heads': {'0': [1]},
        'is_decoder': True,
        'quantization_config': {'bits': 8},
        'layer_norm_eps': 0,
        'id2label': 5,
    },
}


@pytest.mark.parametrize(('family', 'field'), [(family, field) for family in OTHERS for field in OTHERS[family]])
def test_what_ours_does_not_do_is_refused_by_name(folders, family, field):
    folder = folders(family)
    change(folder, **{field: OTHERS[family][field]})
    with pytest.raises(UserError, match=f'config.json.*{field}') as caught:
        open_checkpoint(folder)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'feed_forward_proj': 'gated-gelu'}, ['gelu', 'linear']),
        ({'feed_forward_proj': 'gated-silu'}, ['silu', 'linear']),
        ({'feed_forward_proj': 'gated-gelu', 'dense_act_fn': 'relu', 'is_gated_act': True}, ['relu', 'linear']),
        ({'feed_forward_proj': 'relu', 'dense_act_fn': 'gelu_new', 'is_gated_act': True}, ['gelu', 'linear']),
        ({'feed_forward_proj': 'absent', 'model_type': 'mt5'}, ['gelu', 'linear']),
    ],
)
def test_dense_act_fn_overrides_feed_forward_proj(folders, fields, expected):
    folder = folders('t5')
    change(folder, **fields)
    reader = open_checkpoint(folder)
    assert reader.metadata['facts']['mlp_activations'] == expected
    assert list(identify.check('here', reader.leaves(), reader.metadata['facts']).config.mlp_activations) == expected


@pytest.mark.parametrize('activations', t5.ACTIVATIONS.values())
def test_activations_go_there_and_back(tmp_path, activations):
    tree = trees.t5(False, state=False, mlp_activations=activations)
    trees.write(tmp_path / 'x', 'huggingface', tree, {'facts': {'mlp_activations': list(activations)}})
    assert tuple(open_checkpoint(tmp_path / 'x').metadata['facts']['mlp_activations']) == activations


def test_names_of_one_size(folders, capsys):
    folder = folders('t5')
    change(folder, d_model='absent', num_heads='absent', hidden_size=16, num_attention_heads=2)
    reader, said = warnings_of(folder, capsys)
    assert reader.metadata['facts']['num_heads'] == 2 and said == ''


def test_squares_may_be_lists(folders, capsys):
    folder = folders('vit')
    change(folder, image_size=[12, 12], patch_size=[4, 4])
    reader, said = warnings_of(folder, capsys)
    assert said == '' and identify.check('here', reader.leaves(), reader.metadata['facts']).config.image_size == 12


def test_inputs_of_other_numbers_are_warnings(folders, capsys):
    folder = folders('t5')
    change(folder, pad_token_id=1, decoder_start_token_id=2, eos_token_id=2, architectures=['T5ForTokenClassification'])
    _, said = warnings_of(folder, capsys)
    for name in ('pad_token_id is 1', 'decoder_start_token_id is 2', 'eos_token_id is 2', 'T5ForTokenClassification'):
        assert name in said


@pytest.mark.parametrize('version', ['4.57.6', '5.24.0'])
def test_mt5_whose_head_is_tied(folders, capsys, version):
    folder = folders('t5')
    change(folder, model_type='mt5', tie_word_embeddings=True, transformers_version=version)
    assert ('tie_word_embeddings' in warnings_of(folder, capsys)[1]) == version.startswith('4')


HALF = {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3, 'do_normalize': True}
ALIKE = {
    'of transformers': {**HALF, 'do_rescale': True, 'rescale_factor': 1 / 255, 'do_resize': True, 'resample': 2},
    'old': {'do_normalize': True, 'do_resize': True, 'image_mean': [0.5] * 3, 'image_std': [0.5] * 3, 'size': 12},
    'a list': {'size': [12, 12]},
    'square': {
        'size': {'height': 12, 'width': 12},
        'image_processor_type': 'ViTImageProcessorFast',
        'do_convert_rgb': None,
    },
    'without rescaling': {'do_rescale': False, 'image_mean': [127.5] * 3, 'image_std': [127.5] * 3},
    'to [-1, 1] in one': {'rescale_factor': 1 / 127.5, 'image_mean': 1.0, 'image_std': [1.0] * 3},
    'cropped': {'size': {'shortest_edge': 16}, 'crop_size': {'height': 12, 'width': 12}, 'do_center_crop': True},
}
UNLIKE = {
    'of ImageNet': ({'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}, 'image_mean.*image_std'),
    'one channel differs': ({'image_mean': [0.5, 0.5, 0.4]}, 'image_mean'),
    'not normalised': ({'do_normalize': False}, r'do_normalize = False.*VALUE_RANGE = \(0, 1\)'),
    'not rescaled': ({'do_rescale': False}, 'do_rescale'),
    'rescaled otherwise': ({'rescale_factor': 1.0}, 'rescale_factor'),
    'a number for each of two channels': ({'image_mean': [0.5, 0.5], 'image_std': [0.5] * 3}, 'image_mean'),
    'texts': ({'image_mean': 'imagenet'}, 'image_mean'),
    'another size': ({'size': {'height': 24, 'width': 24}}, 'size .*24.*image_size'),
    'an old size': ({'size': 24}, 'size = 24'),
    'a rectangle': ({'size': {'height': 12, 'width': 24}}, 'size .*24'),
    'another crop': ({'do_center_crop': True, 'crop_size': 24, 'size': 28}, 'crop_size = 24'),
    'the shorter side': ({'size': {'shortest_edge': 12}}, 'shortest_edge'),
    'bicubic': ({'resample': 3}, r'resample = 3 \(bicubic\)'),
    'a text for a switch': ({'do_resize': 'no'}, "do_resize = 'no' must be True or False"),
    'no sides': ({'size': []}, 'size = '),
    'not resized': ({'do_resize': False}, 'do_resize'),
    'blue first': ({'do_flip_channel_order': True}, 'do_flip_channel_order'),
    'another processor': ({'image_processor_type': 'CLIPImageProcessor'}, 'CLIPImageProcessor'),
    'an unknown field': ({'do_sharpen': True}, 'unknown fields: do_sharpen'),
}


@pytest.mark.parametrize('kind', ALIKE)
def test_images_that_our_pipelines_make(folders, capsys, kind):
    folder = folders('vit')
    change(folder, 'preprocessor_config.json', **ALIKE[kind])
    assert warnings_of(folder, capsys)[1] == ''


@pytest.mark.parametrize('kind', UNLIKE)
def test_other_images_are_a_warning_that_names_the_field(folders, capsys, kind):
    fields, message = UNLIKE[kind]
    folder = folders('vit')
    change(folder, 'preprocessor_config.json', **HALF | fields)
    _, said = warnings_of(folder, capsys)
    assert said.count('warning:') == 1 and 'preprocessor_config.json' in said and re.search(message, said), said


def test_a_damaged_preprocessor_is_one_sentence(folders):
    folder = folders('vit')
    (folder / 'preprocessor_config.json').write_text('{')
    with pytest.raises(UserError, match='preprocessor_config.json is damaged'):
        open_checkpoint(folder)


def test_the_image_processor_of_a_whole_processor_counts_first(folders, capsys):
    folder = folders('vit')
    change(folder, 'preprocessor_config.json', **HALF)
    change(folder, 'processor_config.json', processor_class='Some')
    assert warnings_of(folder, capsys)[1] == ''
    change(folder, 'processor_config.json', image_processor=HALF | {'image_mean': 0.4})
    assert 'warning: ' + str(folder / 'processor_config.json') in warnings_of(folder, capsys)[1]
    change(folder, 'processor_config.json', image_processor='ViT')
    with pytest.raises(UserError, match='processor_config.json is damaged'):
        open_checkpoint(folder)


MODEL = ('--gin_file=models/vit_mini.gin', '--gin_file=moe/vit.gin')
VIT = {
    'EMBED_DIM': 16,
    'NUM_HEADS': 2,
    'MLP_DIM': 32,
    'NUM_LAYERS': 3,
    'PATCH_SIZE': 4,
    'IMAGE_SIZE': 12,
    'NUM_CLASSES': 5,
}
VIT |= {'POOLING': 'token', 'IMAGE_CHANNELS': 3, 'GELU': 'erf', 'NORM_EPSILON': 1e-12, 'NUM_EXPERTS': 2}
TASK = ('--gin_file=tasks/synthetic_images.gin', '--gin_file=runs/upcycle.gin', "--gin.OPTIMIZER_STATE='fresh'")
COMMANDS = {
    'inspect': ['inspect', 'FROM'],
    'import': ['import', '--from=FROM', '--to=TO'],
    'export': ['export', '--from=FROM', '--to=TO', '--format=vit_npz'],
    'plan': ['plan', '--from=FROM', *MODEL, *TASK, '--gin.TRAIN_STEPS=109', '--gin.MODEL_DIR=TO'],
    'convert': ['convert', '--from=FROM', '--to=TO', *MODEL, '--optimizer_state=none'],
}


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_warns_once(folders, tmp_path, capfd, command):
    folder = folders('vit')
    change(folder, 'preprocessor_config.json', **HALF | {'image_mean': [0.4, 0.5, 0.6]})
    change(folder, some_scale=2.0)
    add(folder, **{'vit.embeddings.mask_token': np.ones((1, 1, vits.WIDTH), np.float32)})
    arguments = [
        word.replace('FROM', str(folder)).replace('TO', str(tmp_path / 'to.npz')) for word in COMMANDS[command]
    ]
    if command in ('plan', 'convert'):
        arguments += [f'--gin.{name}={value!r}' for name, value in VIT.items()]
    if command == 'plan':
        arguments.append('--gin.WARMUP_STEPS=1')
    capfd.readouterr()
    assert cli.run(arguments) == 0
    out, said = capfd.readouterr()
    assert 'not read  vit.embeddings.mask_token: the token of masked patches' in out
    assert said.count('warning:') == 2 and said.count('image_mean') == said.count('some_scale = 2.0') == 1
