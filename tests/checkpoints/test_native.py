import json
import logging
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.invariants.devices import environment
from upcycle.checkpoints import Reader, native, open_checkpoint
from upcycle.errors import UserError


def make_state(seed=0, step=7):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    return {
        'step': jnp.int32(step),
        'params': {
            'encoder': {'layers_0': {'mlp': {'wi_0': {'kernel': kernel}}}, 'scale': rng.normal(size=8).astype('f')},
            'bias': jnp.asarray(rng.normal(size=5), jnp.bfloat16),
            'zeros': jnp.zeros((4,), jnp.float32),
        },
        'opt_state': {'count': np.int32(step), 'param_states': {'bias': {'v': jnp.ones((5,))}}, 'nothing': {}},
        'rng': jax.random.key_data(jax.random.key(seed)),
    }


def abstract(state):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    with native.CheckpointManager(folder) as manager:
        manager.save(7, make_state(), {'position': 3}, {'family': 't5', 'receipt': None})
    return folder


def run_python(code, devices=1):
    env = environment(devices)
    checkout = pathlib.Path(__file__).parents[2]
    command = [sys.executable, '-W', 'error::DeprecationWarning:jax.*', '-c', textwrap.dedent(code)]
    return subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True)


def test_a_step_that_was_moved_and_linked_is_kept(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / 'run') / 'checkpoints'
    shutil.move(folder / '7', tmp_path / 'elsewhere')
    (folder / '7').symlink_to(tmp_path / 'elsewhere')
    with native.CheckpointManager(tmp_path / 'run', keep=1) as manager:
        for step in (8, 9):
            manager.save(step, make_state(), {'position': 3}, {'family': 't5', 'receipt': None})
    assert sorted(path.name for path in folder.iterdir()) == ['7', '9']
    assert (tmp_path / 'elsewhere' / 'state').is_dir()


def test_round_trip_is_exact(run):
    state = make_state()
    with native.CheckpointManager(run) as manager:
        assert manager.latest_step() == 7
        restored, data, metadata = manager.restore(7, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(assert_same_bits, restored, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert data == {'position': 3} and metadata == {'family': 't5', 'receipt': None}


def test_what_is_counted_on_while_a_save_is_under_way_is_not_in_it(tmp_path, monkeypatch):
    """Orbax serializes JSON in the background, here only after training has changed the dictionaries."""
    dumps, counted = json.dumps, threading.Event()

    def late_dumps(*arguments, **options):
        if threading.current_thread() is not threading.main_thread():
            counted.wait(60)
        return dumps(*arguments, **options)

    monkeypatch.setattr(json, 'dumps', late_dumps)
    metadata = {'window': {'count': 0, 'sums': {}}}
    with native.CheckpointManager(tmp_path) as manager:
        manager.save(7, make_state(), {'position': 3}, metadata)
        metadata['window']['count'] = 1
        metadata['window']['sums']['loss'] = 2.0
        counted.set()
        manager.wait()
        assert manager.restore(7, abstract(make_state()))[2] == {'window': {'count': 0, 'sums': {}}}


def test_lazy_reads_equal_orbax_restore(run):
    reader = open_checkpoint(run)
    assert isinstance(reader, Reader)
    assert (reader.format, reader.step, reader.metadata['family']) == ('upcycle', 7, 't5')
    assert reader.path == str(run / 'checkpoints' / '7')
    with ocp.StandardCheckpointer() as checkpointer:
        expected = native.flatten(
            checkpointer.restore(run / 'checkpoints' / '7' / 'state', target=abstract(make_state()))
        )
    assert reader.leaves().keys() == expected.keys() == native.flatten(make_state()).keys()
    for name, leaf in reader.leaves().items():
        value = reader.read(name)
        assert isinstance(value, np.ndarray) and (leaf.shape, leaf.dtype) == (value.shape, value.dtype)
        assert_same_bits(value, expected[name])


def test_read_places_and_casts(run):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    value = open_checkpoint(run).read('params/encoder/scale', sharding, jnp.bfloat16)
    assert value.sharding == sharding
    assert_same_bits(value, make_state()['params']['encoder']['scale'].astype(jnp.bfloat16))


def test_a_value_read_is_the_callers_own(run):
    reader = open_checkpoint(run)
    reader.read('params/zeros')[:] = 1
    assert_same_bits(reader.read('params/zeros'), np.zeros(4, 'f'))


def test_saved_is_what_was_there_at_the_call(tmp_path):
    state = make_state()
    expected = np.array(state['params']['encoder']['scale'])
    kernel = np.array(state['params']['encoder']['layers_0']['mlp']['wi_0']['kernel'])
    with native.CheckpointManager(tmp_path) as manager:
        manager.save(1, state, {}, {})
        state['params']['encoder']['scale'][:] = 0
        overwrite = jax.jit(lambda x: x + 1, donate_argnums=0)
        overwrite(state['params']['encoder']['layers_0']['mlp']['wi_0']['kernel']).block_until_ready()
    reader = open_checkpoint(tmp_path)
    assert_same_bits(reader.read('params/encoder/scale'), expected)
    assert_same_bits(reader.read('params/encoder/layers_0/mlp/wi_0/kernel'), kernel)


@pytest.mark.parametrize(('keep', 'left'), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_keep(tmp_path, keep, left):
    with native.CheckpointManager(tmp_path, keep=keep) as manager:
        for step in range(1, 6):
            manager.save(step, {'step': jnp.int32(step)}, {}, {})
    assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == left
    assert open_checkpoint(tmp_path).step == 5
    assert open_checkpoint(tmp_path / 'checkpoints' / str(left[0])).step == left[0]


def test_interrupted_save_does_not_look_finished(tmp_path):
    steps = tmp_path / 'checkpoints'
    with native.CheckpointManager(tmp_path) as manager:
        manager.save(1, make_state(step=1), {}, {})
    interrupted = steps / '2.orbax-checkpoint-tmp'
    (steps / '1').rename(interrupted)
    with pytest.raises(UserError, match='holds only interrupted saves .*2.orbax-checkpoint-tmp'):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match='is an interrupted save'):
        open_checkpoint(interrupted)
    with native.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() is None
        assert not interrupted.exists()


def test_killed_save_leaves_a_whole_step_or_none(tmp_path):
    killed = run_python(f"""
        import os, signal
        import jax.numpy as jnp
        from upcycle.checkpoints import native
        manager = native.CheckpointManager({str(tmp_path)!r}, keep=None)
        manager.save(1, {{'step': jnp.int32(1)}}, {{}}, {{}})
        manager.wait()
        manager.save(2, {{'step': jnp.int32(2), 'params': {{'big': jnp.ones((2048, 2048))}}}}, {{}}, {{}})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert killed.returncode == -9, killed.stderr
    reader = open_checkpoint(tmp_path)
    assert reader.step in (1, 2)
    if reader.step == 2:
        assert_same_bits(reader.read('params/big'), np.ones((2048, 2048), 'f'))


def test_resume_on_other_numbers_of_devices(tmp_path):
    code = f"""
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from upcycle.checkpoints import native, open_checkpoint
        n = jax.device_count()
        mesh = jax.make_mesh((n,), ('expert',), axis_types=(AxisType.Auto,))
        experts = NamedSharding(mesh, P('expert')); everywhere = NamedSharding(mesh, P())
        value = np.random.default_rng(0).normal(size=(8, 6, 4)).astype('f')
        shardings = {{'step': everywhere, 'params': {{'expert': experts, 'shared': everywhere}}}}
        state = {{'step': jnp.int32(0), 'params': {{'expert': value, 'shared': value[0]}}}}
        with native.CheckpointManager({str(tmp_path)!r}, keep=None) as manager:
            last = manager.latest_step()
            if last is None:
                state = jax.device_put(state, shardings)
            else:
                like = jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
                state, data, _ = manager.restore(last, like)
                assert data == {{'step': last}}
            assert jax.tree.map(lambda x: x.sharding, state) == shardings
            assert len(state['params']['expert'].addressable_shards) == n
            assert state['params']['expert'].addressable_shards[0].data.shape == (8 // n, 6, 4)
            np.testing.assert_array_equal(np.asarray(state['params']['expert']), value)
            step = (last or 0) + 1
            manager.save(step, state, {{'step': step}}, {{}})
        lazy = open_checkpoint({str(tmp_path)!r}).read('params/expert', experts)
        assert lazy.sharding == experts
        np.testing.assert_array_equal(np.asarray(lazy), value)
    """
    for devices in (8, 1, 4):
        done = run_python(code, devices)
        assert done.returncode == 0, done.stderr
        assert done.stderr == '', 'Orbax or JAX complained at default settings'
    assert open_checkpoint(tmp_path).path.endswith('/3')


def test_restore_lists_every_difference(run):
    wanted = abstract(make_state())
    del wanted['params']['zeros']
    wanted['params']['router'] = wanted['params']['bias']
    wanted['params']['bias'] = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=wanted['step'].sharding)
    wanted['rng'] = jax.ShapeDtypeStruct((4,), jnp.uint32, sharding=wanted['step'].sharding)
    with native.CheckpointManager(run) as manager, pytest.raises(UserError) as caught:
        manager.restore(7, wanted)
    assert str(caught.value).splitlines()[1:] == [
        '  different: params/bias is bfloat16[5] in the checkpoint, float32[5] in the model',
        '  different: rng is uint32[2] in the checkpoint, uint32[4] in the model',
        '  only in the checkpoint: params/zeros float32[4]',
        '  only in the model: params/router bfloat16[5]',
    ]
    assert str(run) in str(caught.value) and 'MODEL_DIR' in str(caught.value)


def test_mistakes_in_calls_are_named(run):
    wanted = abstract(make_state())
    with native.CheckpointManager(run) as manager:
        with pytest.raises(UserError, match=r'no finished step 8, only \[7\]'):
            manager.restore(8, wanted)
        with pytest.raises(UserError, match='step 7 cannot be saved: .* already holds step 7'):
            manager.save(7, make_state(), {}, {})
        with pytest.raises(TypeError, match='these have none: step'):
            manager.restore(7, wanted | {'step': jax.ShapeDtypeStruct((), jnp.int32)})
        with pytest.raises(TypeError, match="'opt_state' is a tuple: a state must be plain nested dicts"):
            manager.save(9, {'opt_state': (jnp.ones(2),)}, {}, {})
        with pytest.raises(TypeError, match="'rng' is a typed random key"):
            manager.save(9, {'rng': jax.random.key(0)}, {}, {})
        with pytest.raises(TypeError, match="key 'a.b' below 'params'"):
            manager.save(9, {'params': {'a.b': jnp.ones(2)}}, {}, {})
        assert manager.latest_step() == 7
    with pytest.raises(UserError, match='keep is 0'):
        native.CheckpointManager(run, keep=0)
    with pytest.raises(UserError, match='has no leaf params/nothing: `upcycle inspect'):
        open_checkpoint(run).read('params/nothing')


def damage_data(step):
    largest = max((step / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.parametrize(
    ('damage', 'names'),
    [
        (damage_data, 'params/big'),
        (lambda step: (step / 'state' / 'manifest.ocdbt').unlink(), 'missing arrays|cannot be read'),
        (lambda step: (step / 'state' / '_METADATA').write_text('{'), '_METADATA is damaged'),
        (lambda step: (step / 'metadata' / 'metadata').unlink(), 'metadata/metadata cannot be read'),
    ],
)
def test_damage_is_one_quiet_sentence(tmp_path, damage, names, caplog):
    rng = np.random.default_rng(0)
    state = {'step': jnp.int32(1), 'params': {'big': jnp.asarray(rng.normal(size=(300, 300)), jnp.float32)}}
    with native.CheckpointManager(tmp_path) as manager:
        manager.save(1, state, {}, {})
    damage(tmp_path / 'checkpoints' / '1')
    with pytest.raises(UserError, match=names) as caught:
        reader = open_checkpoint(tmp_path)
        for name in reader.leaves():
            reader.read(name)
        assert reader.metadata
    assert str(tmp_path) in str(caught.value) and 'copy' in str(caught.value) and '\n' not in str(caught.value)
    with native.CheckpointManager(tmp_path) as manager, pytest.raises(UserError, match=names):
        manager.restore(1, abstract(state))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
