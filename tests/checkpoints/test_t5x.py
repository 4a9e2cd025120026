import functools
import json
import pathlib
import re
import shutil

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.checkpoints import trees
from tests.fixtures import fixtures_dir, requires_fixtures
from tests.moe.quick import jit
from tests.test_cli import call
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.errors import UserError
from upcycle.models import identify
from upcycle.transfer import transfer

FORMATS = {'t5x_dense_legacy': 't5x_legacy', 't5x_dense_orbax': 't5x_orbax'}


@pytest.fixture(scope='module')
def reference():
    with np.load(fixtures_dir() / 't5x_dense_reference.npz') as arrays:
        return dict(arrays)


def copy_of(name, tmp_path):
    # Without `copytree`'s default copy of modes, because the fixtures may be read-only.
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
    # A leaf in its own array and, in the legacy format, one that is inline in the index.
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


def write_state(folder, **state):
    """Replaces the optimizer's part of an index."""
    index = flax.serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
    index['optimizer']['state'] = state
    (folder / 'checkpoint').write_bytes(flax.serialization.msgpack_serialize(index))


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


# T5X casts every leaf of a restored run to the dtype of the weights, scalars included.
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'float64', 'int64', 'uint32', 'int32'])
@pytest.mark.parametrize('step', [0, 4, 256])
def test_a_step_is_a_whole_number_in_any_type(dtype, step, tmp_path):
    states = {'kernel': {'v': np.ones(2, 'f')}}
    folder = write_legacy(tmp_path / 'x', {'kernel': np.ones(2, 'f')}, states)
    write_state(folder, step=np.asarray(step, dtype), param_states=states)
    reader = open_checkpoint(folder)
    assert reader.step == step
    for name in ('step', 'opt_state/count'):
        assert reader.leaves()[name] == jax.ShapeDtypeStruct((), np.int32)
        assert reader.read(name) == step and reader.read(name).dtype == np.int32


@pytest.mark.parametrize(
    ('step', 'shown'),
    [
        (np.float32(4.5), 'float32 4.5'),
        (np.float32(np.nan), 'float32 nan'),
        (np.float64(np.inf), 'float64 inf'),
        (np.float32(-1), 'float32 -1.0'),
        (np.int32(-1), 'int32 -1'),
        (np.float32(2**31), 'float32 2147483648.0'),
        (np.int64(2**31), 'int64 2147483648'),
        (np.arange(2, dtype='f'), r'float32\[2\]'),
        (np.complex64(4), r'complex64 \(4\+0j\)'),
        (np.bool_(True), 'bool True'),
    ],
    ids=str,
)
def test_what_is_no_step_is_refused(step, shown, tmp_path):
    folder = write_legacy(tmp_path / 'x', {'kernel': np.ones(2, 'f')})
    write_state(folder, step=step, param_states={})
    with pytest.raises(
        UserError, match=f'state/step of .*x is damaged .{shown} is not a whole number from 0 to 2147483647'
    ):
        _ = open_checkpoint(folder).step


def index_of(folder):
    """Returns the entry of each leaf in a legacy index: the spec, or shape and dtype of an inline array."""
    found = {}

    def walk(node, keys):
        if isinstance(node, dict) and 'driver' not in node:
            for key, child in node.items():
                walk(child, (*keys, key))
        elif isinstance(node, dict):
            # The writer chooses chunks and compressor, which the array's folder records.
            found[keys] = {**node, 'metadata': {'shape': list(node['metadata']['shape'])}}
        else:
            found[keys] = (np.shape(node), np.asarray(node).dtype)

    walk(flax.serialization.msgpack_restore((pathlib.Path(folder) / 'checkpoint').read_bytes()), ())
    return found


@requires_fixtures
class TestExportsAreWhatT5XWrites:
    """T5X is not installed, so its own files are compared by names, shapes and places."""

    def test_legacy(self, tmp_path):
        path = transfer(fixtures_dir() / 't5x_dense_orbax', tmp_path / 'x', 't5x_legacy')
        theirs = index_of(fixtures_dir() / 't5x_dense_legacy' / 'checkpoint_100')
        assert index_of(path) == theirs and len(theirs) == 492

    def test_orbax(self, tmp_path):
        path = transfer(fixtures_dir() / 't5x_dense_legacy', tmp_path / 'x', 't5x_orbax')

        def leaves(folder):
            tree = json.loads((pathlib.Path(folder) / 'state' / '_METADATA').read_text())['tree_metadata']
            return {
                name: (
                    leaf['key_metadata'],
                    leaf['value_metadata']['write_shape'],
                    leaf['value_metadata']['skip_deserialize'],
                )
                for name, leaf in tree.items()
            }

        theirs = leaves(fixtures_dir() / 't5x_dense_orbax' / 'checkpoint_100')
        assert leaves(path) == theirs and len(theirs) == 491


@requires_fixtures
class TestRestored:
    """A run that T5X has restored once: its Orbax step is float32."""

    path = fixtures_dir() / 't5x_interop' / 'dense_restored_orbax_4'
    model = ('--gin_file=models/t5_1_1_tiny.gin', '--gin_file=moe/t5.gin', '--gin.NUM_EXPERTS=4')
    sizes = {'EMBED_DIM': 128, 'MLP_DIM': 256, 'NUM_HEADS': 5, 'HEAD_DIM': 32, 'NUM_EMBEDDINGS': 384}
    sizes |= {'NUM_ENCODER_LAYERS': 4, 'NUM_DECODER_LAYERS': 4}
    options = (f'--from={path}', *model, *(f'--gin.{name}={size}' for name, size in sizes.items()))

    def test_import_and_export_keep_every_number(self, tmp_path):
        first = open_checkpoint(self.path)
        assert first.step == 4 and len(first.leaves()) == 272
        for format in ('upcycle', 't5x_orbax', 't5x_legacy'):
            again = open_checkpoint(transfer(str(self.path), tmp_path / format, format))
            trees.assert_same(again, {name: first.read(name) for name in first.leaves()})

    def test_inspect(self, capsys):
        code, out, _ = call(['inspect', str(self.path), '--json', '--quick'], capsys)
        facts = json.loads(out)
        assert (code, facts['step'], facts['not_read']) == (0, 4, {})

    def test_convert_carries_the_optimizer_state(self, tmp_path, capsys):
        code, _, error = call(['convert', *self.options, f'--to={tmp_path}/out', '--optimizer_state=tile'], capsys)
        assert code == 0, error
        made = open_checkpoint(tmp_path / 'out')
        assert made.step == made.read('step') == made.read('opt_state/count') == 4
        name = 'opt_state/param_states/encoder/layers_1/mlp/{}wi_0/kernel/v_row'
        dense, experts = open_checkpoint(self.path).read(name.format('')), made.read(name.format('expert/'))
        np.testing.assert_array_equal(experts, np.broadcast_to(dense, (4, *dense.shape)))

    def test_plan_carries_the_optimizer_state(self, tmp_path, capsys):
        run = ('--gin_file=tasks/synthetic_text.gin', '--gin_file=runs/upcycle.gin', '--gin.TRAIN_STEPS=9')
        run += (f'--gin.MODEL_DIR={tmp_path}', '--gin.OPTIMIZER_STATE=tile')
        code, out, error = call(['plan', *self.options, *run, '--json'], capsys)
        assert code == 0, error
        assert json.loads(out)['dropped'] == {}


def logits_of(reader, batch):
    """Returns logits of the model that is identified from a checkpoint."""
    model = identify.check(reader.path, reader.leaves(), identify.facts_of(reader.metadata))
    params = {tuple(name.split('/')[1:]): reader.read(name) for name in reader.leaves() if name.startswith('params/')}
    inputs = {name: tokens for name, tokens in batch.items() if name.endswith('_tokens')}
    return model, jit(model.module().apply)({'params': unflatten_dict(params)}, **inputs)


# Another architecture must not be called a damaged file.
@requires_fixtures
@pytest.mark.parametrize('name', ['scalable_t5_equal_orbax', 'scalable_t5_unequal_legacy'])
def test_logits_of_scalable_t5(name, tmp_path):
    """T5X's stacked layers, with separate heads and position biases in every layer."""
    folder = fixtures_dir() / 't5x_interop'
    with np.load(folder / f'{name.rpartition("_")[0]}.npz') as arrays:
        batch = dict(arrays)
    expected = batch.pop('logits')
    reader = open_checkpoint(folder / name)
    model, logits = logits_of(reader, batch)
    assert model.config.position_biases == 'every_layer'
    assert (model.config.num_encoder_layers, model.config.num_decoder_layers) == (3, 2)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    # The state of stacked layers is left out, with its clock and without a line for each leaf.
    assert not [name for name in reader.leaves() if name.startswith('opt_state/')]
    assert list(reader.metadata['not_read']) == ['opt_state/param_states']
    imported = transfer(reader.path, tmp_path / 'ours', 'upcycle')
    for format in ('t5x_legacy', 't5x_orbax', 'huggingface'):
        again = open_checkpoint(transfer(imported, tmp_path / format, format))
        trees.assert_same(again, {name: reader.read(name) for name in reader.leaves()})
        assert identify.facts_in(again.path, again.leaves()) == {'position_biases': 'every_layer'}


def apart(tree, heads):
    """Splits the heads of attention kernels, as in scalable_t5."""

    def turned(name, value):
        match = re.search(r'attention/(query|key|value|out)/kernel$', name)
        if match is None or not name.startswith('params/'):
            return value
        first, second = value.shape
        shape = (heads, -1, second) if match[1] == 'out' else (first, heads, second // heads)
        return value.reshape(shape)

    return {name: turned(name, value) for name, value in tree.items()}


def stacked(tree, blocks):
    """Stacks the layers of a flat tree as T5X and flaxformer do, in blocks of several layers."""
    out, stacks = {}, {}
    for name, value in tree.items():
        if match := re.fullmatch(r'params/(encoder|decoder)/layers_(\d+)/(.*)', name):
            block = f'subblock_{int(match[2]) % blocks}/' if blocks > 1 else ''
            stacks.setdefault(f'params/{match[1]}/{match[1]}/{block}{match[3]}', {})[int(match[2])] = value
        else:
            out[name] = value
    return out | {name: np.stack([layers[i] for i in sorted(layers)], axis=1) for name, layers in stacks.items()}


LAYOUTS = {
    'unscanned': lambda tree, blocks: tree,
    'unscanned, heads apart': lambda tree, blocks: apart(tree, 2),
    'scanned': lambda tree, blocks: stacked(tree, blocks),
    'scanned, heads apart': lambda tree, blocks: stacked(apart(tree, 2), blocks),
}


@functools.cache
def per_layer_t5(moe, state):
    # Four layers: with MoE two blocks of a dense and a sparse layer.
    more = {'position_biases': 'every_layer', 'num_encoder_layers': 4, 'num_decoder_layers': 4, 'num_heads': 2}
    return trees.t5(moe, state=state, **more)


def written(folder, tree):
    """Writes a flat tree as a checkpoint of T5X."""
    nested = unflatten_dict(tree, sep='/')
    state = nested.get('opt_state', {}).get('param_states', {})
    return write_legacy(folder, nested['params'], state)


@pytest.mark.parametrize('layers', [0, 10**9])
def test_a_stack_of_no_such_depth_is_refused(layers, tmp_path):
    table = spec('target.encoder.encoder.relpos_bias.rel_embedding', (2, layers, 32))
    folder = write_legacy(tmp_path / 'x', {'encoder': {'encoder': {'relpos_bias': {'rel_embedding': table}}}})
    with pytest.raises(UserError, match=f'target/encoder/encoder/.*x is damaged .a stack of {layers} layers'):
        open_checkpoint(folder).leaves()


@pytest.mark.parametrize('other', ['layers_1', 'encoder/subblock_0'])
def test_a_layer_is_not_read_twice(other, tmp_path):
    tree = {
        'params/encoder/encoder/encoder_norm/scale': np.ones((4, 2), 'f'),
        f'params/encoder/{other}/encoder_norm/scale': np.ones((4, 2), 'f'),
    }
    with pytest.raises(UserError, match='x holds params/encoder/layers_[01]/encoder_norm/scale twice'):
        open_checkpoint(written(tmp_path / 'x', tree)).leaves()


def test_a_leaf_of_a_stack_that_is_none_is_not_lost(tmp_path):
    tree = stacked({name: value for name, value in per_layer_t5(False, False).items() if name != 'step'}, 1)
    reader = open_checkpoint(written(tmp_path / 'x', tree | {'params/encoder/encoder/gate': np.ones(3, 'f')}))
    with pytest.raises(UserError, match=r'params/encoder/encoder/gate \(3,\) is unknown'):
        identify.check(reader.path, reader.leaves())


@pytest.mark.parametrize('moe', [False, True], ids=['dense', 'moe'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_position_biases_in_every_layer_of_every_layout(layout, moe, tmp_path):
    """One model in several layouts; flaxformer's loops and scalable_t5 both have biases in every layer."""
    tree = {name: value for name, value in per_layer_t5(moe, False).items() if name != 'step'}
    reader = open_checkpoint(written(tmp_path / 'x', LAYOUTS[layout](tree, 2 if moe else 1)))
    model = identify.check(reader.path, reader.leaves())
    assert model.config.position_biases == 'every_layer' and model.config.num_heads == 2
    trees.assert_same(reader, tree | {'step': np.int32(3)})
    # Regions, and results that the caller owns.
    for name in ('params/encoder/layers_3/attention/out/kernel', 'params/decoder/layers_1/pre_mlp_layer_norm/scale'):
        part = reader.read(name, region=(slice(3, 7),))
        np.testing.assert_array_equal(part, tree[name][3:7])
        part[...] = 0
    if moe:
        name = 'params/encoder/layers_1/mlp/expert/wo/kernel'
        np.testing.assert_array_equal(reader.read(name, region=(slice(2, 3), slice(0, 5))), tree[name][2:3, :5])
    trees.assert_same(reader, tree | {'step': np.int32(3)})


@pytest.mark.parametrize('layout', LAYOUTS)
def test_state_of_another_layout_is_left_out_in_one_line(layout, tmp_path, capsys):
    tree = {name: value for name, value in per_layer_t5(True, True).items() if name not in ('step', 'rng')}
    params = LAYOUTS[layout]({name: value for name, value in tree.items() if name.startswith('params/')}, 2)
    states = {name: value for name, value in tree.items() if name.startswith('opt_state/param_states/')}
    path = written(tmp_path / 'x', params | states)
    code, out, error = call(['inspect', str(path), '--quick'], capsys)
    assert code == 0, error
    plain = layout == 'unscanned'
    for shown in (out, call(['import', f'--from={path}', f'--to={tmp_path}/out'], capsys)[1]):
        assert shown.count('not read') == (not plain)
        assert ('not read  opt_state/param_states: the optimizer state' in shown) == (not plain)
    assert ('opt_state ' in out) == plain


def test_a_state_that_is_not_read_names_the_binding(tmp_path, capsys):
    """The message must name the real cause. A loop of flaxformer's, continued as by continue_dense.gin."""
    tree = {name: value for name, value in per_layer_t5(True, True).items() if name not in ('step', 'rng')}
    states = {name: value for name, value in tree.items() if name.startswith('opt_state/param_states/')}
    path = written(tmp_path / 'x', states | stacked({n: v for n, v in tree.items() if n.startswith('params/')}, 2))
    sizes = {'EMBED_DIM': 16, 'MLP_DIM': 24, 'NUM_HEADS': 2, 'HEAD_DIM': 6, 'NUM_EMBEDDINGS': 40, 'NUM_EXPERTS': 4}
    sizes |= {'NUM_ENCODER_LAYERS': 4, 'NUM_DECODER_LAYERS': 4, 'POSITION_BIASES': 'every_layer', 'TRAIN_STEPS': 9}
    files = ('models/t5_1_1_tiny.gin', 'moe/t5.gin', 'tasks/synthetic_text.gin', 'runs/continue_dense.gin')
    command = ['plan', f'--from={path}', *(f'--gin_file={file}' for file in files), f'--gin.MODEL_DIR={tmp_path}/run']
    command += [f'--gin.{name}={value}' for name, value in sizes.items()]
    code, out, error = call([*command, '--gin.OPTIMIZER_STATE=tile'], capsys)
    assert (code, out) == (2, '')
    assert "OPTIMIZER_STATE = 'tile' needs the checkpoint's optimizer state" in error
    assert "set OPTIMIZER_STATE = 'fresh'" in error and 'leaves)' not in error
    code, _, error = call([*command, '--gin.OPTIMIZER_STATE=fresh'], capsys)
    assert code == 0, error


def test_an_moe_for_hugging_face_is_refused_as_one(tmp_path):
    """The message must name the real cause, the experts and not the optimizer state."""
    tree = {name: value for name, value in trees.t5(True, state=True).items() if name != 'rng'}
    states = {name: value for name, value in tree.items() if name.startswith('opt_state/param_states/')}
    path = written(tmp_path / 'x', states | {name: value for name, value in tree.items() if name.startswith('params/')})
    with pytest.raises(UserError, match='^params/.*/expert/.* cannot be stored as huggingface, which has no MoE'):
        transfer(str(path), tmp_path / 'out', 'huggingface')
    assert not (tmp_path / 'out').exists()


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
        (msgpack.packb({'target': {'x': 'text'}}), 'target/x is a str instead of an array'),
        (msgpack.packb({'target': {'x': spec('../elsewhere')}}), 'outside its folder'),
        (msgpack.packb({'target': {'x': spec('/etc')}}), 'outside its folder'),
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


@pytest.mark.parametrize('states', ['optax', 'MultiOptimizer'])
def test_state_of_another_optimizer_is_left_out(states, tmp_path):
    folder = trees.write(tmp_path / 'x', 't5x_legacy', trees.t5(False, state=True))
    index = pathlib.Path(folder) / 'checkpoint'
    tree = flax.serialization.msgpack_restore(index.read_bytes())
    state = tree['optimizer']['state']
    if states == 'optax':
        moments = {'count': np.asarray(100), 'mu': {'x': np.ones(3, np.float32)}, 'nu': {'x': np.ones(3, np.float32)}}
        state['param_states'] = {'0': moments, '1': {}}
    else:
        tree['optimizer']['state'] = {'0': state, '1': {'step': np.asarray(100)}}
    index.write_bytes(flax.serialization.msgpack_serialize(tree))
    (index.parent / 'upcycle.json').unlink()
    reader = open_checkpoint(folder)
    assert not [name for name in reader.leaves() if name.startswith('opt_state/')]
    assert 'another optimizer than Adafactor' in reader.metadata['not_read']['opt_state']
    assert reader.step == (100 if states == 'optax' else None)
    assert open_checkpoint(transfer(folder, tmp_path / 'y', 'upcycle')).leaves().keys() >= {
        'params/encoder/encoder_norm/scale'
    }


def test_variables_that_are_no_parameters_are_left_out(tmp_path):
    folder = trees.write(tmp_path / 'x', 't5x_legacy', trees.t5(False, state=True))
    expected = open_checkpoint(folder).leaves().keys()
    index = pathlib.Path(folder) / 'checkpoint'
    tree = flax.serialization.msgpack_restore(index.read_bytes())
    tree['optimizer']['flax_mutables'] = {'batch_stats': {'mean': np.ones(3, np.float32)}}
    index.write_bytes(flax.serialization.msgpack_serialize(tree))
    (index.parent / 'upcycle.json').unlink()
    reader = open_checkpoint(folder)
    assert reader.leaves().keys() == expected and list(reader.metadata['not_read']) == ['flax_mutables']
