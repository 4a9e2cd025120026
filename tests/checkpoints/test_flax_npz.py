"""ViT `.npz` files of all layouts give the same tree, read lazily; a bad file gives a clear error."""

import concurrent.futures
import gc
import pickle
import weakref
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from tests.checkpoints import vits
from tests.checkpoints.trees import assert_same
from tests.fixtures import fixtures_dir, requires_fixtures
from upcycle.checkpoints import Reader, npz, open_checkpoint
from upcycle.errors import UserError
from upcycle.transfer import transfer


def save(path, arrays, compressed=False):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize('pre_linen', [True, False])
@pytest.mark.parametrize('compressed', [True, False])
def test_vision_transformer(tmp_path, pre_linen, compressed):
    file, expected = vits.vision_transformer(vits.ours(representation=True), pre_linen)
    reader = open_checkpoint(save(tmp_path / 'B_16.npz', file, compressed))
    assert isinstance(reader, Reader)
    assert_same(reader, expected)
    assert (reader.format, reader.path) == ('vit_npz', str(tmp_path / 'B_16.npz'))
    assert reader.metadata == {
        'family': 'vit',
        'facts': {'gelu': 'tanh', 'norm_epsilon': 1e-6},
        'not_read': {},
    }


def test_many_threads_read_what_is_there(tmp_path):
    """Concurrent reads of whole leaves and parts, which a shared `ZipFile` of Python 3.12.1 breaks."""
    tree = {**vits.ours(), 'params/stack': np.random.default_rng(0).normal(size=(50, 30, 20)).astype('f')}
    tree = {f'params/{i}/{name}': value for i in range(3) for name, value in tree.items()}
    np.savez(tmp_path / 'any.npz', **tree)
    members, _ = npz.read_members(epath.Path(tmp_path / 'any.npz'))

    def read(number):
        name = list(tree)[number % len(tree)]
        region = (slice(10, 20),) if 'stack' in name else ()
        return np.array_equal(members[name].read(region), tree[name][region] if region else tree[name])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(3000)))


def test_an_archive_is_closed_with_its_reader(tmp_path):
    """Also after its checksums were compared."""
    reader = open_checkpoint(save(tmp_path / 'x.npz', vits.ours()))
    reader.read('params/embedding/kernel', region=(slice(0, 2),))
    archive = weakref.ref(reader._sources['params/embedding/kernel'].archive)
    assert archive() is not None
    del reader
    gc.collect()
    assert archive() is None


@pytest.mark.parametrize('pooling', ['gap', 'token', 'map'])
@pytest.mark.parametrize('prefix', ['', 'params/', 'opt/target/'])
def test_big_vision(tmp_path, pooling, prefix):
    params = vits.ours(pooling)
    file = {name.replace('params/', prefix, 1): value for name, value in params.items()}
    expected = params
    if prefix == 'opt/target/':
        file['opt/state/step'] = np.int64(300)
        file['opt/state/param_states/head/bias/m'] = np.zeros(5, 'f')
        expected = {**params, 'step': np.int64(300)}
    reader = open_checkpoint(save(tmp_path / 'vit.npz', file))
    assert_same(reader, expected)
    assert list(reader.metadata['not_read']) == [name for name in file if 'param_states' in name]


def test_adds_the_tokens_position_only_where_it_has_one(tmp_path):
    params = vits.ours('token')
    file = {name.removeprefix('params/'): value for name, value in params.items()}
    file['Transformer/pos_embedding'] = file.pop('pos_embedding')
    assert_same(open_checkpoint(save(tmp_path / 'a.npz', file)), params)
    row = np.ones((1, 1, vits.WIDTH), 'f')
    file['Transformer/pos_embedding'] = np.concatenate([row, file['Transformer/pos_embedding']], axis=1)
    assert_same(open_checkpoint(save(tmp_path / 'b.npz', file)), params | {'params/cls': params['params/cls'] + row})


def test_bfloat16_is_stored_as_void(tmp_path):
    params = vits.ours(dtype='bfloat16')
    path = save(tmp_path / 'vit.npz', {name: value.view('V2') for name, value in params.items()})
    assert_same(open_checkpoint(path), params)
    with np.load(path) as arrays:
        assert arrays['params/cls'].dtype == np.dtype('V2')


def test_a_stack_is_read_layer_by_layer(tmp_path):
    params = vits.ours('map')
    assert_same(open_checkpoint(save(tmp_path / 'vit.npz', vits.scanned(params))), params)


def test_attention_pooling_without_a_module(tmp_path):
    params = vits.ours('map')
    file = {name.removeprefix('params/').removeprefix('MAPHead_0/'): value for name, value in params.items()}
    assert_same(open_checkpoint(save(tmp_path / 'vit.npz', file)), params)


@pytest.mark.parametrize('pooling', ['gap', 'map'])
def test_vmoe_names(tmp_path, pooling):
    params = vits.ours(pooling, moe=(1, 2))
    assert_same(open_checkpoint(save(tmp_path / 'vmoe.npz', vits.vmoe(params))), params)


@requires_fixtures
@pytest.mark.parametrize(('part', 'experts'), [('dense', 0), ('moe', 8)])
def test_trees_written_by_vmoe(part, experts):
    reader = open_checkpoint(f'{fixtures_dir()}/vmoe_reference.npz:{part}')
    with np.load(fixtures_dir() / 'vmoe_reference.npz') as stored:
        values = {name: stored[name] for name in stored.files if name.startswith(f'{part}/params/')}
    assert len(reader.leaves()) == len(values)
    # The same numbers in each leaf: the map loses or duplicates nothing.
    read = {name: reader.read(name) for name in reader.leaves()}
    assert sorted(value.tobytes() for value in read.values()) == sorted(value.tobytes() for value in values.values())
    block = 'params/Transformer/encoderblock_1'
    inside = f'{part}/params/Encoder/encoderblock_1'
    attention = read[f'{block}/MultiHeadDotProductAttention_0/out/kernel']
    np.testing.assert_array_equal(attention, values[f'{inside}/SelfAttention/out/kernel'])
    if experts:
        wo = read[f'{block}/MlpBlock_0/expert/Dense_1/kernel']
        np.testing.assert_array_equal(wo, values[f'{inside}/Moe/Mlp/Dense_1/kernel'])
        assert read[f'{block}/MlpBlock_0/router/router_weights/w/kernel'].shape == (64, experts)


def test_a_part_of_a_larger_checkpoint(tmp_path):
    params = vits.ours('map')
    file = {name.replace('params/', 'params/img/'): value for name, value in params.items()}
    file |= {'params/t': np.ones(1, 'f'), 'params/txt/head/bias': np.ones(3, 'f')}
    path = save(tmp_path / 'siglip.npz', file)
    assert_same(open_checkpoint(f'{path}:img'), params)
    with pytest.raises(UserError, match='img/.*siglip.npz:SUBTREE'):
        open_checkpoint(path)
    with pytest.raises(UserError, match="no arrays below 'image', only below params"):
        open_checkpoint(f'{path}:image')


def test_opening_reads_headers_and_reading_one_array(tmp_path, monkeypatch):
    path = save(tmp_path / 'vit.npz', vits.scanned(vits.ours('map')))
    asked = []
    read = npz.Member._bytes

    def count(member, start, count):
        asked.append(member.info.filename)
        return read(member, start, count)

    monkeypatch.setattr(npz.Member, '_bytes', count)
    reader = open_checkpoint(path)
    assert len(reader.leaves()) > 50 and asked == []
    kernel = 'params/Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel'
    whole = reader.read(kernel)
    assert asked == ['params/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel.npy']
    np.testing.assert_array_equal(reader.read(kernel, region=(slice(2, 5), slice(1, 3))), whole[2:5, 1:3])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = reader.read(kernel, here, ml_dtypes.bfloat16)
    assert placed.sharding == here
    np.testing.assert_array_equal(placed, whole.astype(ml_dtypes.bfloat16))


def test_fortran_order(tmp_path):
    params = vits.ours()
    file = {name: np.asfortranarray(value) for name, value in params.items()}
    assert_same(open_checkpoint(save(tmp_path / 'vit.npz', file)), params)


class _Pickled:
    def __reduce__(self):
        return (pytest.fail, ('unpickled',))


def turned(params, order):
    """The same numbers in another byte order."""
    return {name: np.asarray(value, value.dtype.newbyteorder(order)) for name, value in params.items()}


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('order', ['>', '<'])
def test_byte_order(tmp_path, order, dtype):
    params = vits.ours(dtype=dtype)
    file, expected = vits.vision_transformer(params)
    reader = open_checkpoint(save(tmp_path / 'a.npz', turned(file, order) | {'step': np.asarray(7, f'{order}i4')}))
    assert_same(reader, expected | {'step': np.asarray(7, np.int32)})
    assert all(leaf.dtype.isnative for leaf in reader.leaves().values()) and reader.step == 7
    stacks = open_checkpoint(save(tmp_path / 'b.npz', turned(vits.scanned(params), order)))
    assert_same(stacks, params)
    name = 'params/Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel'
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for opened in (reader, stacks):
        np.testing.assert_array_equal(opened.read(name, sharding), expected[name])
        np.testing.assert_array_equal(opened.read(name, region=(slice(2, 5),)), expected[name][2:5])


def test_arrays_of_another_byte_order_go_everywhere(tmp_path):
    file, expected = vits.vision_transformer(vits.ours())
    source = save(tmp_path / 'vit.npz', turned(file, '>'))
    for format in ('upcycle', 'huggingface', 'vit_npz'):
        target = transfer(source, tmp_path / (f'{format}.npz' if format == 'vit_npz' else format), format, step=3)
        reader = open_checkpoint(target)
        for name in ('params/cls', 'params/head/kernel'):
            assert reader.read(name).tobytes() == expected[name].tobytes()


@pytest.mark.parametrize(
    'strange',
    [
        np.zeros((16, 5), [('re', '<f4'), ('im', '<f4')]),
        np.zeros((16, 5), '>f8'),
        np.zeros((16, 5), '>c8'),
        np.zeros((16, 5), '>i4'),
        np.zeros((16, 5), 'datetime64[s]'),
        np.full((16, 5), 'a text'),
        np.zeros((16, 5), bool),
    ],
    ids=lambda strange: strange.dtype.str,
)
def test_types_that_no_weights_have(tmp_path, strange):
    file = vits.ours() | {'params/head/kernel': strange}
    with pytest.raises(UserError, match='unknown types .params/head/kernel is') as caught:
        open_checkpoint(save(tmp_path / 'vit.npz', file)).leaves()
    assert '\n' not in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / 'vit.npz'
    path.write_bytes(pickle.dumps(_Pickled()))
    with pytest.raises(UserError, match=r'vit.npz is not a zip archive of arrays .*nothing in it was unpickled'):
        open_checkpoint(path)
    np.savez(path, **vits.ours(), x=np.array([_Pickled()], dtype=object))
    with pytest.raises(UserError, match='x of .* holds pickled Python objects'):
        open_checkpoint(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('head/bias.npy', pickle.dumps(_Pickled()))
    with pytest.raises(UserError, match='head/bias of .* is not an array'):
        open_checkpoint(path)


def _twice(path):
    with zipfile.ZipFile(path, 'a') as archive, pytest.warns(UserWarning):
        archive.writestr('params/head/bias.npy', archive.read('params/head/bias.npy'))


def _shorter_than_said(path):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-4] if name == 'params/head/bias.npy' else data)


def _with(**more):
    def change(path):
        np.savez(path, **{**vits.ours(), **{name.replace('__', '/'): value for name, value in more.items()}})

    return change


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), 'is not a zip archive of arrays'),
        (_twice, 'two arrays named params/head/bias'),
        (_shorter_than_said, r'params/head/bias of .* is damaged .float32\[5\] does not fit into its 16 bytes'),
        (_with(params__head__bias=np.ones(5)), 'params/head/bias is float64'),
        (_with(params__conv_root__kernel=np.ones(2, 'f')), 'that our ViT does not have: conv_root/kernel'),
        (
            _with(params__Transformer__posembed_input__pos_embedding=np.ones((1, 9, vits.WIDTH), 'f')),
            'two arrays for pos_embedding',
        ),
        (
            _with(params__Transformer__encoderblock_0__LayerNorm_2__bias=np.ones(16, 'f')),
            'two arrays for Transformer/encoderblock_0/LayerNorm_1/bias',
        ),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, damage, message):
    path = save(tmp_path / 'vit.npz', vits.ours())
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(path).leaves()
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_changed_byte_is_noticed(tmp_path):
    params = vits.scanned(vits.ours())
    path = save(tmp_path / 'vit.npz', params)
    data = path.read_bytes()
    stack = 'params/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel'
    for stored, read in ((stack, stack.replace('block/', 'block_0/')), ('params/head/kernel', 'params/head/kernel')):
        at = data.index(params[stored].tobytes()) + params[stored].nbytes - 3
        path.write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        with pytest.raises(UserError, match=f'{read} of .*Bad CRC'):
            open_checkpoint(path).read(read)
