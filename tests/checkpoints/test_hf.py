"""Handwritten Hugging Face folders are read lazily from any number of files, and damage is named."""

import json

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import trees, vits
from upcycle.checkpoints import open_checkpoint, safetensors
from upcycle.checkpoints.hf.writer import HuggingFaceWriter
from upcycle.errors import UserError
from upcycle.transfer import transfer


def header_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def save(file, header, data):
    encoded = json.dumps(header).encode() if isinstance(header, dict) else header
    file.write_bytes(len(encoded).to_bytes(8, 'little') + encoded + data)


@pytest.fixture
def folder(tmp_path):
    trees.write(tmp_path / 'model', 'huggingface', trees.t5(False, state=False))
    return tmp_path / 'model'


def test_shards(tmp_path):
    tree = trees.t5(False, state=False)
    leaves = open_checkpoint(trees.write(tmp_path / 'x', 'upcycle', tree)).leaves()
    writer = HuggingFaceWriter(epath.Path(tmp_path / 'y'), leaves, {}, {}, shard_bytes=20_000)
    for name in writer.todo():
        writer.write(name, (), tree[name])
    writer.finish({})
    assert len(list((tmp_path / 'y').glob('model-*-of-*.safetensors'))) > 2
    trees.assert_same(open_checkpoint(tmp_path / 'y'), tree)
    trees.assert_same(open_checkpoint(tmp_path / 'y' / 'model.safetensors.index.json'), tree)


def test_the_library_reads_what_we_write(folder):
    numpy = pytest.importorskip('safetensors.numpy')
    theirs = numpy.load_file(folder / 'model.safetensors')
    tree = trees.t5(False, state=False)
    np.testing.assert_array_equal(theirs['lm_head.weight'].T, tree['params/decoder/logits_dense/kernel'])
    assert len(theirs) == len(tree) - 1


@st.composite
def headers(draw):
    """Nearly valid headers, and the number of bytes after them."""
    header, end = {}, 0
    for name in draw(st.lists(st.sampled_from('abcd'), unique=True, max_size=3)):
        code, size = draw(st.sampled_from([('F32', 4), ('BF16', 2), ('BOOL', 1), ('I64', 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        length = int(np.prod(shape)) * size
        header[name] = {'dtype': code, 'shape': shape, 'data_offsets': [end, end + length]}
        end += length
    for entry in header.values():
        change = draw(st.sampled_from([None] * 14 + ['begin', 'end', 'both', 'shape', 'text', 'float', 'gone', 'type']))
        by = draw(st.sampled_from([-4, -1, 1, 4]))
        begin, last = entry['data_offsets']
        entry |= {
            'begin': {'data_offsets': [begin + by, last]},
            'end': {'data_offsets': [begin, last + by]},
            'both': {'data_offsets': [begin + by, last + by]},
            'shape': {'shape': [*entry['shape'], by]},
            'text': {'shape': [*entry['shape'], '1']},
            'float': {'data_offsets': [float(begin), last]},
            'type': {'dtype': 'F12'},
        }.get(change, {})
        if change == 'gone':
            del entry['shape']
    notes = draw(st.sampled_from([None, {}, {'step': '1'}, {'step': 1}, []]))
    return header | ({} if notes is None else {'__metadata__': notes}), max(
        0, end + draw(st.sampled_from([*[0] * 8, 1, -1]))
    )


def test_the_library_takes_and_refuses_the_same_files(tmp_path):
    """Compares with the safetensors library, which we do not use (see `safetensors.py`)."""
    library = pytest.importorskip('safetensors')
    file, taken = tmp_path / 'any.safetensors', []

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(headers())
    def run(case):
        header, size = case
        save(file, header, bytes(size))
        try:
            with library.safe_open(file, 'np') as theirs:
                expected = {name: theirs.get_slice(name).get_shape() for name in theirs.offset_keys()}
        except library.SafetensorError:
            with pytest.raises(UserError):
                safetensors.read_files(epath.Path(file))
            return
        tensors, _ = safetensors.read_files(epath.Path(file))
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
        taken.append(len(expected))

    run()
    assert 40 < len(taken) < 110 and max(taken) == 3


def test_opening_reads_the_header_and_a_region_its_rows(folder, monkeypatch):
    asked = []
    read = safetensors.Tensor.read
    monkeypatch.setattr(safetensors.Tensor, 'read', lambda self, region: asked.append(self.shape) or read(self, region))
    reader = open_checkpoint(folder)
    assert len(reader.leaves()) > 50 and asked == []
    name = 'params/token_embedder/embedding'
    whole = reader.read(name)
    np.testing.assert_array_equal(reader.read(name, region=(slice(3, 9), slice(0, 2))), whole[3:9, :2])
    assert asked == [(40, 16), (40, 16)]


def test_what_is_shared_may_be_repeated_if_it_is_the_same(folder):
    header, data = header_of(folder / 'model.safetensors')
    shared = header['shared.weight']
    begin, end = shared['data_offsets']
    copy = {**shared, 'data_offsets': [len(data), len(data) + end - begin]}
    header['encoder.embed_tokens.weight'] = copy
    save(folder / 'model.safetensors', header, data + data[begin:end])
    trees.assert_same(open_checkpoint(folder), trees.t5(False, state=False))
    save(folder / 'model.safetensors', header, data + data[begin:end][::-1])
    with pytest.raises(UserError, match='shared.weight and encoder.embed_tokens.weight of .* differ'):
        open_checkpoint(folder)


def add(folder, **more):
    """Adds float32 arrays at the end of the file."""
    header, data = header_of(folder / 'model.safetensors')
    for name, value in more.items():
        end = len(data) + value.nbytes
        header[name] = {'dtype': 'F32', 'shape': list(value.shape), 'data_offsets': [len(data), end]}
        data += value.tobytes()
    save(folder / 'model.safetensors', header, data)


OLD_TABLE = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'


def test_the_table_of_early_files_that_nothing_uses(folder, tmp_path, capsys):
    add(folder, **{OLD_TABLE: np.ones((32, 2), np.float32)})
    reader = open_checkpoint(folder)
    trees.assert_same(reader, trees.t5(False, state=False))
    assert list(reader.metadata['not_read']) == [OLD_TABLE]
    imported = transfer(folder, tmp_path / 'imported', 'upcycle')
    assert f'not read  {OLD_TABLE}: an unused table' in capsys.readouterr().out
    exported = open_checkpoint(transfer(imported, tmp_path / 'exported', 'huggingface'))
    trees.assert_same(exported, trees.t5(False, state=False))
    assert 'not_read' not in exported.metadata
    # transformers ignores this table in no other layer.
    add(folder, **{OLD_TABLE.replace('block.0', 'block.1'): np.ones((32, 2), np.float32)})
    with pytest.raises(UserError, match='holds unknown arrays: decoder.block.1.*EncDecAttention'):
        open_checkpoint(folder)


@pytest.mark.parametrize('prefix', ['', 'vit.'])
def test_the_token_of_masked_patches_is_not_read(tmp_path, prefix):
    tree = {name: value for name, value in vits.ours().items() if prefix or '/head/' not in name}
    trees.write(tmp_path / 'vit', 'huggingface', tree)
    add(tmp_path / 'vit', **{f'{prefix}embeddings.mask_token': np.ones((1, 1, vits.WIDTH), np.float32)})
    reader = open_checkpoint(tmp_path / 'vit')
    assert list(reader.metadata['not_read']) == [f'{prefix}embeddings.mask_token']
    trees.assert_same(reader, tree)


def test_a_pooler_below_a_classifier_is_not_read(tmp_path):
    """`ViTForImageClassification` has no pooler, and its head reads the token."""
    trees.write(tmp_path / 'vit', 'huggingface', vits.ours())
    width = np.ones(vits.WIDTH, np.float32)
    add(tmp_path / 'vit', **{'vit.pooler.dense.weight': np.diag(width), 'vit.pooler.dense.bias': width})
    reader = open_checkpoint(tmp_path / 'vit')
    assert list(reader.metadata['not_read']) == ['vit.pooler.dense.weight', 'vit.pooler.dense.bias']
    trees.assert_same(reader, vits.ours())


def vit_5(name):
    """Converts a name of transformers 4 to 5 (`ViTModel` in its conversion_mapping.py, in that order)."""
    for old, new in (
        ('encoder.layer.', 'layers.'),
        ('attention.attention.query', 'attention.q_proj'),
        ('attention.attention.key', 'attention.k_proj'),
        ('attention.attention.value', 'attention.v_proj'),
        ('attention.output.dense', 'attention.o_proj'),
        ('intermediate.dense', 'mlp.fc1'),
        ('output.dense', 'mlp.fc2'),
    ):
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize('bare', [False, True])
def test_vit_in_the_names_of_transformers_5(tmp_path, bare):
    tree = {name: value for name, value in vits.ours().items() if not bare or '/head/' not in name}
    trees.write(tmp_path / 'vit', 'huggingface', tree)
    header, data = header_of(tmp_path / 'vit' / 'model.safetensors')
    renamed = {vit_5(name): entry for name, entry in header.items()}
    assert sum(name not in header for name in renamed) == 12 * vits.LAYERS + 4 * vits.LAYERS
    save(tmp_path / 'vit' / 'model.safetensors', renamed, data)
    trees.assert_same(open_checkpoint(tmp_path / 'vit'), tree)
    transfer(tmp_path / 'vit', tmp_path / 'again', 'huggingface', dtype=None)
    assert header_of(tmp_path / 'again' / 'model.safetensors')[0].keys() == header.keys()


def test_a_head_that_is_missing_is_said(folder, capsys):
    header, data = header_of(folder / 'model.safetensors')
    begin, end = header.pop('lm_head.weight')['data_offsets']
    for entry in header.values():
        offsets = entry.get('data_offsets', [0, 0])
        offsets[:] = [offset - (end - begin) * (offset >= end) for offset in offsets]
    save(folder / 'model.safetensors', header, data[:begin] + data[end:])
    reader = open_checkpoint(folder)
    assert 'has no head (lm_head.weight): the embedding is used' in capsys.readouterr().err
    names = ('params/decoder/logits_dense/kernel', 'params/token_embedder/embedding')
    np.testing.assert_array_equal(*(reader.read(name) if 'token' in name else reader.read(name).T for name in names))


def change_header(**changes):
    def change(folder):
        header, data = header_of(folder / 'model.safetensors')
        for name, value in changes.items():
            name = name.replace('__', '.')
            if value is None:
                del header[name]
            else:
                header[name] |= value
        save(folder / 'model.safetensors', header, data)

    return change


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / 'config.json').read_text()) | changes
        (folder / 'config.json').write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def write_index(weight_map, file='model-00001-of-00001.safetensors'):
    def change(folder):
        names = [name for name in header_of(folder / 'model.safetensors')[0] if name != '__metadata__']
        (folder / 'model.safetensors').rename(folder / 'model-00001-of-00001.safetensors')
        (folder / 'model.safetensors.index.json').write_text(
            json.dumps({'weight_map': dict.fromkeys(names, file) | weight_map})
        )

    return change


def note_a_list(folder):
    header, data = header_of(folder / 'model.safetensors')
    save(folder / 'model.safetensors', {**header, '__metadata__': {'step': [0]}}, data)


def cut(folder):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-7])


def twice(folder):
    header, data = header_of(folder / 'model.safetensors')
    encoded = json.dumps(header)[:-1] + ', "shared.weight": ' + json.dumps(header['shared.weight']) + '}'
    save(folder / 'model.safetensors', encoded.encode(), data)


DAMAGE = {
    'offsets out of range': (change_header(shared__weight={'data_offsets': [0, 10**12]}), 'shared.weight of .* bytes'),
    'offsets that overlap': (change_header(shared__weight={'data_offsets': [0, 2560]}), 'begins at byte'),
    'negative offsets': (change_header(shared__weight={'data_offsets': [-2560, 0]}), 'shared.weight of'),
    'shape': (
        change_header(shared__weight={'shape': [40, 17]}),
        r'shared.weight of .*float32\[40, 17\] does not fit',
    ),
    'negative shape': (change_header(shared__weight={'shape': [-40, -16]}), 'shared.weight of'),
    'type': (change_header(shared__weight={'dtype': 'F8_E4M3'}), 'shared.weight of .* type F8_E4M3'),
    'a leaf is gone': (change_header(shared__weight=None), 'belong to no array|begins at byte'),
    'cut': (cut, 'ends at byte .* copy the checkpoint again'),
    'twice': (twice, 'shared.weight is there twice'),
    'header too long': (lambda f: (f / 'model.safetensors').write_bytes(b'\xff' * 40), 'its header would be'),
    'no header': (lambda f: save(f / 'model.safetensors', b'[1]', b''), 'is not a safetensors file'),
    'notes that are no texts': (note_a_list, 'its metadata is not a dictionary of strings'),
    'empty': (lambda f: (f / 'model.safetensors').write_bytes(b''), 'is not a safetensors file'),
    'index names a missing file': (
        write_index({'shared.weight': 'model-00002.safetensors'}),
        'model-00002.* is missing',
    ),
    'index names a file elsewhere': (write_index({'shared.weight': '../x.safetensors'}), 'outside its folder'),
    'index has a leaf more': (write_index({'extra': 'model-00001-of-00001.safetensors'}), 'does not hold extra'),
    'no configuration': (
        lambda f: (f / 'config.json').unlink(),
        'has no config.json: copy',
    ),
    'another model': (change_config(model_type='bert'), 'model_type bert: only T5, ViT, Llama'),
    'another activation': (change_config(feed_forward_proj='gated-tanh'), 'gated-tanh'),
    'another norm': (change_config(layer_norm_epsilon=1e-5), 'layer_norm_epsilon is 1e-05'),
    'fewer layers': (change_config(num_layers=1), 'num_layers is 1, but the arrays have 2'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_one_sentence(folder, damage):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder).leaves()
    assert str(folder) in str(caught.value) and '\n' not in str(caught.value)


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x04cos\nsystem\n')
    with pytest.raises(UserError, match='pytorch_model.bin, a pickle, which is never opened'):
        open_checkpoint(tmp_path)


def rename(folder, change):
    """Rewrites the file with other names; None removes the array."""
    header, data = header_of(folder / 'model.safetensors')
    arrays = {}
    for name, entry in header.items():
        if name != '__metadata__' and change(name) is not None:
            begin, end = entry['data_offsets']
            arrays[change(name)] = (entry, data[begin:end])
    made, data = {}, b''
    for name, (entry, part) in arrays.items():
        made[name] = {**entry, 'data_offsets': [len(data), len(data) + len(part)]}
        data += part
    save(folder / 'model.safetensors', made, data)


def test_an_encoder_alone(folder):
    """Such as a sentence encoder, or the text encoder of an image generator."""
    rename(folder, lambda name: None if name.startswith(('decoder.', 'lm_head')) else name)
    with pytest.raises(UserError, match='holds no decoder: our T5 needs encoder and decoder'):
        open_checkpoint(folder)


def test_position_biases_in_every_layer_of_a_model_that_is_no_umt5(folder):
    add(
        folder, **{'encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight': np.ones((32, 2), np.float32)}
    )
    with pytest.raises(UserError, match="position biases in every layer .*model_type of config.json is 't5'"):
        open_checkpoint(folder)


def test_a_model_inside_another_one_is_not_called_half(folder):
    rename(folder, lambda name: f'transformer.{name}')
    with pytest.raises(UserError, match="begin with 'transformer.', as if the model were a part"):
        open_checkpoint(folder)


def test_a_configuration_without_model_type(folder):
    """As of timm."""
    change_config(model_type=None)(folder)
    with pytest.raises(UserError, match='has no model_type'):
        open_checkpoint(folder)


def test_class_token_and_position_that_add_up_to_too_much(tmp_path):
    tree = {name: value.astype(np.float16) if name != 'step' else value for name, value in vits.ours().items()}
    tree['params/cls'][0, 0, 0] = 60_000
    trees.write(tmp_path / 'vit', 'huggingface', tree)
    header, data = header_of(tmp_path / 'vit' / 'model.safetensors')
    begin = header['vit.embeddings.position_embeddings']['data_offsets'][0]
    number = np.float16(60_000).tobytes()
    save(tmp_path / 'vit' / 'model.safetensors', header, data[:begin] + number + data[begin + 2 :])
    with pytest.raises(UserError, match='the class token plus its position overflows float16'):
        open_checkpoint(tmp_path / 'vit').read('params/cls')
