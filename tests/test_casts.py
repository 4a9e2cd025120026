"""Numbers that a narrower type cannot hold are refused, with the name of their leaf, at every write and load."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints import trees
from tests.test_cli import call
from tests.test_convert import arguments
from upcycle import casts
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.native import CheckpointManager
from upcycle.errors import UserError

SIZES = {'NUM_EMBEDDINGS': 40, 'EMBED_DIM': 16, 'NUM_HEADS': 2, 'HEAD_DIM': 6, 'MLP_DIM': 24}
# Leaves of a T5: an MLP that becomes experts, one that stays dense, a table, a scale.
LEAVES = (
    'params/encoder/layers_1/mlp/wi_1/kernel',
    'params/decoder/layers_0/mlp/wo/kernel',
    'params/token_embedder/embedding',
    'params/encoder/encoder_norm/scale',
)


# From, to, a number, words of the message.
REFUSED = {
    'float16': (
        'float32',
        'float16',
        -1e6,
        ['1 of 3 numbers', 'float16', '1e+06', '--dtype=bfloat16 or --dtype=float32'],
    ),
    'rounded up': ('float32', 'float16', 65520, ['65520']),
    'bfloat16 to float16': ('bfloat16', 'float16', 131072, ['131072']),
    'bfloat16': ('float32', 'bfloat16', 3.4e38, ['bfloat16', 'use --dtype=float32.']),
    'float64': ('float64', 'float32', 1e300, ['float32', '1e+300']),
    'int64': ('int64', 'int32', 2**31, ['int32', '2.14748e+09']),
    'negative': ('int64', 'uint32', -1, ['uint32']),
    'no whole number': ('float32', 'int32', 7.5, ['int32', '7.5']),
    'not a number as a whole one': ('float32', 'int32', np.nan, ['int32']),
    'a whole number as float16': ('int32', 'float16', 70000, ['float16', '70000']),
}


@pytest.mark.parametrize(
    ('case', 'module'),
    [(case, module) for case in REFUSED for module in (np, jnp) if module is np or '64' not in REFUSED[case][0]],
)
def test_a_number_that_does_not_fit(case, module):
    old, new, number, words = REFUSED[case]
    value = module.asarray([1, number, 0], old)
    with warnings.catch_warnings(), pytest.raises(UserError) as error:
        warnings.simplefilter('error')
        casts.cast('params/x', value, new)
    assert all(word in str(error.value) for word in ['params/x', *words]), error.value


def test_what_fits_is_cast_as_numpy_does(capsys):
    value = np.array([65519, -65504, 1e-9, 0, 0.1, np.inf, np.nan], np.float32)
    with np.errstate(all='ignore'):
        expected = value.astype(np.float16)
    for made in (casts.cast('x', value, 'float16'), casts.cast('x', jnp.asarray(value), 'float16')):
        np.testing.assert_array_equal(np.asarray(made), expected)
    assert casts.cast('x', value, 'float32') is value
    assert casts.cast('step', np.float32(7), 'int32') == 7
    assert casts.cast('x', np.zeros((0, 3), np.float32), 'float16').shape == (0, 3)
    assert capsys.readouterr().err == ''


def test_a_leaf_of_which_only_zeros_are_left_is_a_warning(capsys):
    assert not casts.cast('params/x', np.full(3, 1e-9, np.float32), 'float16').any()
    assert 'warning: all numbers of params/x are too small for float16' in capsys.readouterr().err


def t5(**leaves):
    """A T5 whose leaves hold 1e6 in one place."""
    tree = trees.t5(False, state=True)
    for name in leaves:
        tree[name].reshape(-1)[-1] = 1e6
    return tree


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 't5x_orbax', 'huggingface'])
@pytest.mark.parametrize('leaf', LEAVES[::2])
def test_import_and_export(format, leaf, tmp_path, capsys):
    source = trees.write(tmp_path / 'in', 'upcycle', t5(**{leaf: 1}))
    command = ['import'] if format == 'upcycle' else ['export', f'--format={format}']
    options = [f'--from={source}', f'--to={tmp_path}/out', '--optimizer_state=none']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        code, out, error = call([*command, *options, '--dtype=float16'], capsys)
    assert (code, out) == (2, '') and f'{leaf} holds 1 of' in error and '--dtype=bfloat16' in error
    assert os.listdir(tmp_path) == ['in']
    assert call([*command, *options, '--dtype=bfloat16'], capsys)[0] == 0


def test_a_vit(tmp_path, capsys):
    tree = trees.vit(False, state=False)
    tree['params/head/bias'][0] = -7e4
    source = trees.write(tmp_path / 'in.npz', 'vit_npz', tree)
    code, _, error = call(['import', f'--from={source}', f'--to={tmp_path}/out', '--dtype=float16'], capsys)
    assert code == 2 and 'params/head/bias holds 1 of 5' in error and os.listdir(tmp_path) == ['in.npz']


@pytest.mark.parametrize('leaf', LEAVES)
@pytest.mark.parametrize('operator', ['copy', 'drop'])
def test_convert(operator, leaf, tmp_path, capsys):
    source = trees.write(tmp_path / 'in', 'upcycle', t5(**{leaf: 1}))
    sizes = [f'--gin.{name}={value}' for name, value in SIZES.items()]
    more = [*sizes, '--dtype=float16', f'--operator={operator}', '--optimizer_state=none', '--verify']
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        code, _, error = call(arguments(source, tmp_path / 'out', *more), capsys)
    named = leaf.replace('/layers_1/mlp/', '/layers_1/mlp/expert/')
    assert code == 2 and named in error and 'float16 cannot hold' in error, error
    assert os.listdir(tmp_path) == ['in']


@pytest.mark.parametrize('command', ['import', 'convert'])
@pytest.mark.parametrize('step', [-1, 2**31])
def test_a_step_of_a_checkpoint_that_is_none(command, step, tmp_path, capsys):
    source = trees.write(tmp_path / 'in', 'upcycle', trees.t5(False, state=False) | {'step': np.int64(step)})
    sizes = [f'--gin.{name}={value}' for name, value in SIZES.items()]
    files = arguments(source, tmp_path / 'out', *sizes)
    code, _, error = call(files if command == 'convert' else [command, *files[3:5]], capsys)
    assert code == 2 and f'step of {source} is {step}' in error, error
    assert os.listdir(tmp_path) == ['in']


def test_a_clock_of_64_bits_is_not_cut_on_its_way_to_a_device(tmp_path):
    tree = trees.t5(False, state=True)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for number in (2**31 - 1, 2**32 + 5):
        source = trees.write(tmp_path / str(number), 'upcycle', tree | {'opt_state/count': np.int64(number)})
        reader = open_checkpoint(source)
        if number < 2**31:
            assert int(reader.read('opt_state/count', here)) == number
        else:
            with pytest.raises(UserError, match='opt_state/count is 4294967301, which int32 cannot hold'):
                reader.read('opt_state/count', here)


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_a_run_does_not_save_what_has_overflown(dtype, tmp_path):
    """A save does not cast, but checks the numbers, which the optimizer has cast."""

    def state(step, number):
        return {'step': np.int32(step), 'opt_state': {'param_states': {'x': {'m': jnp.asarray([1, number], dtype)}}}}

    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1, 60000), {}, {})
        manager.wait()
        words = f'step 2 is not saved .*opt_state/param_states/x/m holds .* too large for {dtype}'
        with pytest.raises(UserError, match=words + ('.*momentum_dtype' if dtype == 'float16' else '')):
            manager.save(2, state(2, np.inf), {}, {})
        assert manager.latest_step() == 1
    stored = open_checkpoint(tmp_path / 'checkpoints' / '1')
    assert stored.leaves()['opt_state/param_states/x/m'].dtype.name == dtype
    np.testing.assert_array_equal(stored.read('opt_state/param_states/x/m'), np.array([1, 60000], dtype))
