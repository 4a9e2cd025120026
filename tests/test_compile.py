"""`upcycle compile`: a tiny run compiled ahead of time for a TPU slice, by the TPU's own compiler."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests import runs
from upcycle import compile
from upcycle.hlo import GRID

requires_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install "upcycle[tpu]"'
)
TOPOLOGY = 'v4:2x2x1'


def arguments_of(**bindings):
    """Files and bindings of a tiny sparse run."""
    settings = runs.bindings('scratch', 'unused', 1000, NUM_EXPERTS=8, BATCH_SIZE=16, GROUPS_MULTIPLE_OF=4)
    settings |= {'ACTIVATION_DTYPE': 'bfloat16', 'EMBED_DIM': '128'} | bindings
    files = [f'--gin_file={file}' for file in runs.FILES['scratch']]
    return [*files, *(f'--gin.{name}={value}' for name, value in settings.items())]


def compile_(*options, topology=TOPOLOGY, **bindings):
    """Exit code, standard output and standard error of `upcycle compile`.

    In a process: libtpu, once loaded, sends SIGPROF for as long as its process lives, which `scripts/fuzz.py` takes for a hang.
    """
    command = [sys.executable, '-m', 'upcycle', 'compile', f'--topology={topology}', *arguments_of(**bindings)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@requires_libtpu
def test_the_account_of_a_tiny_run():
    code, out, errors = compile_('--json', MESH_SHAPE='(1,4,1)')
    assert code == 0, errors
    account = json.loads(out)
    assert account['fits'] and account['devices'] == account['chips'] == 4
    assert account['peak'] <= account['reserved'] < 2 * account['peak']
    # Out and back, forward and backward, of the encoder's and the decoder's MoE layer; nothing else crosses `expert`.
    exchanged = account['collectives']['all-to-all']
    assert exchanged['count'] == 8
    run = runs.build('scratch', 'unused', 1000, NUM_EXPERTS=8, BATCH_SIZE=16, GROUPS_MULTIPLE_OF=4, EMBED_DIM=128)
    layers = run.model.moe_layers()
    tokens = {'encoder': 16 * 32, 'decoder': 16 * 9}
    slots = sum(moe.slots(tokens[path.split('/')[0]], training=True) for path, moe in layers.items())
    # Out and back, forward and backward; 128 numbers of two bytes; a quarter of the slots on each of four devices.
    assert exchanged['operand_bytes'] == 4 * slots * 128 * 2 / 4
    assert 'all-gather' not in account['collectives']
    # Kernels of attention, which hardly count at these lengths, but for what fills their blocks.
    in_kernels = sum(calls['flops'] for calls in account['kernels'].values())
    assert account['matmul_flops'] - in_kernels == pytest.approx(account['analytic_flops'], rel=0.15)
    assert account['estimated_core_days'] > 0
    # The attention of two encoder layers and two decoder layers, and that of the latter to the encoder; and back.
    assert sum(calls['count'] for calls in account['kernels'].values()) == 2 * 6
    assert {calls['counted'] for calls in account['kernels'].values()} == {GRID}


@requires_libtpu
@pytest.mark.exhaustive
def test_a_loop_over_layers_on_a_mesh_with_a_model_axis_sends_nothing_but_tokens():
    """Gradients of stacked parameters lie as the parameters do: a compiler left to itself moves some by all-to-alls."""
    layers = {'NUM_ENCODER_LAYERS': 4, 'NUM_DECODER_LAYERS': 4, 'SCAN_LAYERS': True, 'REMAT': "'full'"}
    code, out, errors = compile_('--json', MESH_SHAPE='(1,2,2)', **layers)
    assert code == 0, errors
    assert json.loads(out)['collectives']['all-to-all']['count'] == 6 * 4


@requires_libtpu
@pytest.mark.parametrize('topology', ['v9:2x2x1', 'v4', 'v4:3x5x7x9'])
def test_an_unknown_topology_is_one_sentence(topology):
    code, out, errors = compile_(topology=topology)
    assert (code, out) == (2, '') and 'Traceback' not in errors
    assert errors.startswith('upcycle: ') and f'--topology={topology}' in errors and errors.count('\n') == 1


@pytest.mark.parametrize(
    ('message', 'sentence'),
    [
        (
            'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 132.52G of 95.74G hbm.',
            'it needs 132.52G of memory and a device has 95.74G.',
        ),
        (
            'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (99.83G) exceeds '
            'available HBM (95.74G).\nMore follows.',
            'it needs 99.83G of memory and a device has 95.74G.',
        ),
        ('RESOURCE_EXHAUSTED: something else\nMore follows.', 'RESOURCE_EXHAUSTED: something else'),
    ],
)
def test_a_shortage_of_memory_is_told_in_numbers(message, sentence):
    assert compile._shortage(message) == sentence


def test_a_utilization_of_nothing_is_refused():
    code, _, errors = compile_('--utilization=0')
    assert code == 2 and '--utilization=0' in errors
