"""Replays every folder of `fixtures/faults`: the smallest inputs with which users met a fault, by the commands they used.

The tests of each kind are with the code that they test. These run the commands as processes, from the user's files to the
sentence and the status.
"""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.fixtures import fixtures_dir, requires_fixtures

pytestmark = [pytest.mark.exhaustive, requires_fixtures]
# Of each folder: the kind, options that each command is given, and what is printed, in this order (regular expressions).
CASES = {
    'a_process_that_never_comes': (
        'processes that do not come',
        '--coordinator_timeout=5',
        ['exit 69', 'upcycle: not all 2 processes have connected within 5 s', r'raise --coordinator_timeout', r'\n1\n'],
    ),
    'accelerator_is_not_there': ('platforms', '', ['upcycle: JAX_PLATFORMS=cuda cannot be used', 'exit 2']),
    'bucket_that_cannot_be_reached': (
        'addresses',
        '',
        [
            *('upcycle: gs://no-such-bucket-example/abc does not answer', 'exit 69'),
            *('upcycle: gs:// names no bucket', 'exit 2'),
            *('upcycle: gs://no-such-bucket-example/abc does not answer', 'exit 69'),
            *('upcycle: gs://no-such-bucket-example/abc/metrics.jsonl does not answer', 'exit 69'),
        ],
    ),
    'checkpoint_without_a_surgery': (
        'plan refuses what train refuses',
        '',
        ["upcycle: INITIAL_CHECKPOINT_PATH = 't5' is set, but SURGERY is None", 'runs/continue_dense.gin', 'exit 2']
        * 2,
    ),
    'checkpoints_are_gone': (
        'data of the user',
        '',
        [r'^7\n', 'upcycle: MODEL_DIR = .* up to step 8, and its checkpoints are gone', 'exit 2', r'\n7\n'],
    ),
    'coordinator_address': (
        'coordinators',
        '',
        [
            *('upcycle: --coordinator_address=localhost is not HOST:PORT', 'exit 2'),
            *('upcycle: --coordinator_address=localhost:abc is not HOST:PORT', 'exit 2'),
        ],
    ),
    'ctrl_c_while_it_starts': (
        'interrupts',
        '',
        ['0.2 (?:-2|130) False', *(f'{later} (?:-2|130|0) False' for later in ('0.8', '1.5'))],
    ),
    'disk_full_while_saving': (
        'places to write to',
        '',
        # The script cuts the line off, which says how much is needed.
        ['exit 2', r'\n1:upcycle: MODEL_DIR = .* cannot be written', r'\n1\n0'],
    ),
    'enum_compared_by_its_repr': (
        'values in messages',
        '',
        [
            'another run, in which .*aux_loss_factor is 0.0 and not 0.01',
            'exit 2',
            "gelu = 'erf', and .* 'tanh'",
            'exit 2',
        ],
    ),
    'float16_overflow': (
        'numbers',
        '',
        [
            *(
                'upcycle: params/Transformer/encoderblock_0/.*kernel holds 1 of 512 numbers that float16 cannot',
                'exit 2',
            ),
            *('does not exist', 'exit 2'),
            *(
                'upcycle: params/Transformer/encoderblock_0/.*kernel holds 1 of 512 numbers that float16 cannot',
                'exit 2',
            ),
        ],
    ),
    'gin_files_in_another_order': (
        'recipes',
        '',
        [
            *('upcycle: moe/t5.gin comes before models/t5_1_1_tiny.gin', 'exit 2'),
            *('upcycle: moe/vit.gin is for models of the family vit', 'exit 2'),
        ],
    ),
    'hf_config_fields_ignored': (
        'configuration fields',
        '',
        [
            *(r"mlp_activations = \['relu', 'linear'\]", 'exit 0'),
            *(r"MLP_ACTIVATIONS = \('relu', 'linear'\)", 'exit 2'),
            *(r'config.json: image_size is \[8, 32\]: our ViT supports squares only', 'exit 2'),
        ],
    ),
    'import_with_an_odd_step': (
        'steps',
        '',
        [
            *('upcycle: --step=-1 must be a whole number', 'exit 2', 'does not exist', 'exit 2'),
            *('upcycle: --step=99999999999 .* must be a whole number', 'exit 2', 'No such file'),  # of `ls`, on stderr
        ],
    ),
    'metrics_damaged_in_the_middle': (
        'data of the user',
        '',
        [
            *('warning: .*/metrics.jsonl, line 2: ', 'metrics.set_aside.jsonl', 'exit 0', r'\n8\n'),
            *(f'"step": {step}, "split": "{split}' for step in (4, 8, 10) for split in ('train', 'validation')),
        ],
    ),
    'mt5_sentinels_in_the_vocabulary': ('vocabularies', '', ['exit 0', 'exit 0', 'train  step 9/9', 'exit 0']),
    'newest_step_half_copied': (
        'which file counts',
        '',
        ['warning: .*/checkpoint_2000 is skipped .it has neither .* checkpoint_1000 is read instead', 'exit 0'],
    ),
    'npz_big_endian': ('numbers', '', ['exit 0', *(r'\nwrote ', 'exit 0') * 3]),
    'position_biases_in_every_layer': (
        'documented and refused',
        '',
        ['exit 0', r"POSITION_BIASES = 'every_layer'\)", 'exit 2'],
    ),
    'preprocessor_of_a_vit_ignored': (
        'configuration fields',
        '',
        ['warning: .*/preprocessor_config.json describes other images', 'exit 0'] * 2,
    ),
    'seqio_task_that_does_not_fit': (
        'tasks of the user',
        '',
        [
            *("upcycle: MIXTURE_OR_TASK_NAME = 'u_cached' cannot be read with USE_CACHED_TASKS = True", 'exit 2'),
            *("upcycle: MIXTURE_OR_TASK_NAME = 'u_cached' cannot be read with USE_CACHED_TASKS = False", 'exit 2'),
            *("upcycle: MIXTURE_OR_TASK_NAME = 'u_notargets' has the features inputs, and not targets", 'exit 2'),
        ],
    ),
    'single_file_beside_an_index': (
        'which file counts',
        '',
        ['warning: .*index.json and its files are ignored', 'exit 0', r'read: \[2\.\]'],
    ),
    'space_check_that_contradicts_itself': (
        'places to write to',
        '',
        ['has 62.9 MB free, but 67.2 MB are needed', 'exit 2', 'Read-only file system', 'exit 2'],
    ),
    't5_old_cross_attention_bias': (
        'documented and refused',
        '',
        ['not read  decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight', 'exit 0'] * 2,
    ),
    'two_processes_one_folder': (
        'two processes, one folder',
        '',
        [r'^(?:rc 0\nrc 2|rc 2\nrc 0)\n', r'upcycle: MODEL_DIR = .* is in use: process \d+ on .*', ':0\n.*:0\n'],
    ),
    'where_to_write_is_no_folder': (
        'places to write to',
        '',
        [
            *('upcycle: --out=.* cannot be written: it is a folder', 'exit 2'),
            *('upcycle: --out=.*/file cannot be written: it is a file', 'exit 2'),
            *('upcycle: --to=.*/file cannot be written: it is a file', 'exit 2'),
            *('upcycle: --to=.*/file/x cannot be written: .*/file is a file', 'exit 2'),
            *(
                'upcycle: MODEL_DIR = .*/dangling/run cannot be written: .*/dangling is a link to /nonexistent',
                'exit 2',
            ),
        ],
    ),
}


@pytest.fixture
def command(tmp_path):
    """`upcycle` and `python` in one folder, as the scripts expect them."""
    python = f'PYTHONPATH={shlex.quote(os.getcwd())}:$PYTHONPATH exec {shlex.quote(sys.executable)}'
    for name, line in {'upcycle': f'{python} -m upcycle "$@" $MORE_OPTIONS', 'python': f'{python} "$@"'}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{line}\n')
        (tmp_path / name).chmod(0o755)
    return tmp_path / 'upcycle'


def test_every_folder_is_replayed():
    assert sorted(CASES) == sorted(path.name for path in (fixtures_dir() / 'faults').iterdir())


@pytest.mark.parametrize('name', CASES)
def test_a_fault_is_gone(name, command, tmp_path):
    kind, options, expected = CASES[name]
    script = fixtures_dir() / 'faults' / name / 'run.sh'
    if 'mount' in script.read_text() and os.geteuid() != 0:
        pytest.skip('mounts a small file system, which needs root')
    (tmp_path / 'tmp').mkdir()
    environment = {**os.environ, 'UPCYCLE': str(command), 'MORE_OPTIONS': options, 'TMPDIR': str(tmp_path / 'tmp')}
    ended = subprocess.run(['bash', script], env=environment, capture_output=True, text=True)
    printed = ended.stdout + ended.stderr
    assert 'Traceback' not in printed
    assert re.search('.*?'.join(expected), printed, re.DOTALL), f'{kind}: {printed}'
    assert re.findall(r'\[(exit \d+)\]', printed) == [line for line in expected if line.startswith('exit ')], printed
