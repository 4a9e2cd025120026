import pathlib
import shutil

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from tests.fixtures import fixtures_dir, requires_fixtures
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.errors import UserError

FORMATS = {'t5x_dense_legacy': 't5x_legacy', 't5x_dense_orbax': 't5x_orbax'}


@pytest.fixture(scope='module')
def reference():
    with np.load(fixtures_dir() / 't5x_dense_reference.npz') as arrays:
        return dict(arrays)


def copy_of(name, tmp_path):
    # Not `copytree`'s default copy: the fixtures may be read-only, and so would be what is copied with its mode.
    return pathlib.Path(shutil.copytree(fixtures_dir() / name, tmp_path / name, copy_function=shutil.copyfile))


@requires_fixtures
@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('inner', ['', 'checkpoint_100'])
def test_equals_what_t5x_restored(name, inner, reference):
    reader = open_checkpoint(fixtures_dir() / name / inner)
    assert isinstance(reader, Reader)
    assert (reader.format, reader.step, reader.metadata) == (FORMATS[name], 100, {})
    expected = {key: value for key, value in reference.items() if key.startswith('params/')}
    expected |= {
        f'opt_state/{key}': value
        for key, value in reference.items()
        if key.startswith('param_states/') and value.shape != (1,)
    }
    expected |= {'step': np.int32(100), 'opt_state/count': np.int32(100)}
    leaves = reader.leaves()
    assert leaves.keys() == expected.keys() and len(expected) == 272
    for key, value in expected.items():
        read = reader.read(key)
        assert (leaves[key].shape, leaves[key].dtype) == (read.shape, read.dtype) == (value.shape, value.dtype)
        assert read.tobytes() == value.tobytes()


@requires_fixtures
@pytest.mark.parametrize('name', FORMATS)
def test_reads_onto_devices_in_another_dtype(name, reference):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    # One leaf that lies in an array of its own and, in the legacy format, one that is inline in the index.
    for leaf in ('params/decoder/layers_0/mlp/wo/kernel', 'opt_state/param_states/token_embedder/embedding/v_col'):
        value = open_checkpoint(fixtures_dir() / name).read(leaf, sharding, jnp.bfloat16)
        assert value.sharding == sharding
        np.testing.assert_array_equal(value, reference[leaf.removeprefix('opt_state/')].astype(jnp.bfloat16))


@requires_fixtures
def test_legacy_is_lazy_and_names_what_is_missing(tmp_path, reference):
    folder = copy_of('t5x_dense_legacy', tmp_path) / 'checkpoint_100'
    kept, cut = 'token_embedder/embedding', 'decoder/logits_dense/kernel'
    for path in folder.iterdir():
        if path.is_dir() and path.name not in ('target.token_embedder.embedding', 'target.decoder.logits_dense.kernel'):
            shutil.rmtree(path)
    chunk = folder / 'target.decoder.logits_dense.kernel' / '0.0'
    chunk.write_bytes(chunk.read_bytes()[:100])
    reader = open_checkpoint(folder)
    assert len(reader.leaves()) == 272
    np.testing.assert_array_equal(reader.read(f'params/{kept}'), reference[f'params/{kept}'])
    with pytest.raises(UserError, match=f'params/{cut} of .*checkpoint_100 cannot be read'):
        reader.read(f'params/{cut}')
    chunk.unlink()
    with pytest.raises(UserError, match=f'params/{cut} of .*chunk .* is missing'):
        open_checkpoint(folder).read(f'params/{cut}')
    with pytest.raises(UserError, match='params/encoder/encoder_norm/scale of .*does not exist'):
        reader.read('params/encoder/encoder_norm/scale')


@requires_fixtures
def test_orbax_without_its_index_is_no_checkpoint(tmp_path):
    folder = copy_of('t5x_dense_orbax', tmp_path)
    (folder / 'checkpoint_100' / 'state' / '_METADATA').unlink()
    with pytest.raises(UserError, match='holds no checkpoint'):
        open_checkpoint(folder)


def spec(path, shape=(2,)):
    return {
        'driver': 'zarr',
        'dtype': 'float32',
        'kvstore': {'driver': 'gfile', 'path': path},
        'metadata': {'shape': list(shape), 'chunks': list(shape), 'compressor': {'id': 'gzip'}},
    }


def write_legacy(folder, target, param_states=None, **contents):
    folder.mkdir()
    state = {'step': np.int32(3), 'param_states': param_states or {}}
    contents = {'version': 3, 'optimizer': {'target': target, 'state': state}} | contents
    (folder / 'checkpoint').write_bytes(flax.serialization.msgpack_serialize(contents))
    return folder


def test_placeholders_are_told_from_state_of_one_element(tmp_path):
    one = np.ones(1, 'f')
    slots = {'m': one, 'v': one, 'v_row': one, 'v_col': one}
    target = {'gate': one, 'kernel': np.ones((2, 3), 'f')}
    without = write_legacy(
        tmp_path / 'checkpoint_1', target, {'gate': slots, 'kernel': slots | {'v': target['kernel']}}
    )
    with_momentum = write_legacy(
        tmp_path / 'checkpoint_2', target, {'gate': slots, 'kernel': slots | {'m': target['kernel']}}
    )
    states = {
        path: {
            name.removeprefix('opt_state/param_states/') for name in open_checkpoint(path).leaves() if 'states' in name
        }
        for path in (without, with_momentum)
    }
    assert states[without] == {'gate/v', 'kernel/v'}
    assert states[with_momentum] == {'gate/m', 'gate/v', 'kernel/m'}
    with pytest.raises(UserError, match='has no leaf opt_state/param_states/kernel/m'):
        open_checkpoint(without).read('opt_state/param_states/kernel/m')


def test_newest_step_of_a_model_directory(tmp_path):
    for step in (9, 10, 100):
        write_legacy(tmp_path / f'checkpoint_{step}', {'kernel': np.full((2,), step, 'f')})
    (tmp_path / 'checkpoint_1000.tmp-1').mkdir()
    assert open_checkpoint(tmp_path).path.endswith('checkpoint_100')


def test_old_index_without_wrapper_and_with_the_path_on_top(tmp_path):
    folder = tmp_path / 'checkpoint_3'
    folder.mkdir()
    old = spec('target.kernel') | {'path': 'target.kernel', 'kvstore': {'driver': 'gcs', 'bucket': 'b'}}
    contents = {'target': {'kernel': old, 'bias': np.ones(2, 'f')}, 'state': {'step': 3, 'param_states': {}}}
    (folder / 'checkpoint').write_bytes(flax.serialization.msgpack_serialize(contents))
    reader = open_checkpoint(folder / 'checkpoint')
    assert reader.step == 3
    assert {name: leaf.shape for name, leaf in reader.leaves().items() if name.startswith('params')} == {
        'params/kernel': (2,),
        'params/bias': (2,),
    }


@pytest.mark.parametrize(
    ('encoded', 'reason'),
    [
        (b'\xc1 not msgpack', 'is not a T5X checkpoint index, or is damaged'),
        (msgpack.packb([1, 2]), 'is not a T5X checkpoint index, or is damaged'),
        (msgpack.packb({'target': {'x': msgpack.ExtType(2, b'')}}), 'extension of type 2'),
        (msgpack.packb({'target': {'x': msgpack.ExtType(42, b'')}}), 'extension of type 42'),
        (msgpack.packb({'target': {'x': 'text'}}), 'target/x is a str, neither an array'),
        (msgpack.packb({'target': {'x': spec('../elsewhere')}}), 'not one beside it'),
        (msgpack.packb({'target': {'x': spec('/etc')}}), 'not one beside it'),
        (
            msgpack.packb({'target': {'x': spec('x') | {'dtype': 'object!'}}}),
            'is not a T5X checkpoint index, or is damaged',
        ),
        (msgpack.packb({'model': {'x': 1}}), 'has no parameters below `target`'),
        (msgpack.packb({'target': {'x': 1}})[:-1], 'is not a T5X checkpoint index, or is damaged'),
    ],
)
def test_hostile_or_damaged_index(tmp_path, encoded, reason):
    (tmp_path / 'checkpoint').write_bytes(encoded)
    with pytest.raises(UserError, match=reason) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
