"""Launchers: their calls of fake gcloud, sbatch and xpk programs, and real processes on one host."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests import vision
from tests.invariants.devices import environment
from upcycle.errors import PREEMPTED, UNAVAILABLE
from upcycle.metrics import read_metrics

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'launch'
TRAIN = ('train', '--gin_file=a.gin', "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}")


@pytest.fixture
def stand_in(tmp_path):
    """Makes a program that records its arguments, one per line, and its input, and then runs a line of shell."""
    bin_folder = tmp_path / 'bin'
    bin_folder.mkdir()

    def make(name, body='exit 0'):
        path = bin_folder / name
        path.write_text(
            f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" -- >> {tmp_path}/{name}.txt\n'
            f'[[ -p /dev/stdin || -f /dev/stdin ]] && cat > {tmp_path}/{name}.in\n{body}\n'
        )
        path.chmod(0o755)
        return tmp_path / f'{name}.txt'

    return make


def launch(name, *arguments, folder, **environment):
    path = f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}'
    return subprocess.run(
        [LAUNCH / name, *map(str, arguments)],
        env={**os.environ, 'PATH': path, 'PERIOD': '0', **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
    )


def calls(path):
    return [call.strip('\n').split('\n') for call in path.read_text().split('--\n') if call]


@pytest.mark.parametrize('name', sorted(path.name for path in LAUNCH.glob('*.sh')))
def test_they_are_clean_and_say_how_they_are_called(name, tmp_path):
    # In this Python's environment, which need not be active.
    shellcheck = shutil.which('shellcheck', path=f'{sysconfig.get_path("scripts")}{os.pathsep}{os.environ["PATH"]}')
    if shellcheck is None:
        pytest.skip('shellcheck is not installed (pip install upcycle[test])')
    subprocess.run([shellcheck, LAUNCH / name], check=True)
    result = launch(name, folder=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith('usage: ')


GCLOUD = """
case "$*" in
  *queued-resources\\ describe*--format*) echo ACTIVE ;;
  *queued-resources\\ describe*) exit 1 ;;
  *--command=upcycle_env/bin/python\\ -m\\ upcycle*) [[ $(grep -c 'm upcycle' {log}) -ge {good} ]] || exit {status} ;;
esac"""


@pytest.mark.parametrize('status', [1, UNAVAILABLE, PREEMPTED])
def test_a_tpu_slice_is_asked_for_and_the_run_tried_until_it_ends(status, stand_in, tmp_path):
    log = stand_in('gcloud', GCLOUD.format(log=tmp_path / 'gcloud.txt', good=3, status=status))
    copy = 'gcloud storage cp --recursive gs://mine/shards .'
    settings = {'PACKAGE': 'upcycle==0.1', 'SPOT': '1', 'PREPARE': copy}
    result = launch('tpu_pod.sh', 'mine', 'v5p-8', 'here', *TRAIN, folder=tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    made = calls(log)
    create = next(call for call in made if 'create' in call)
    options = {
        '--node-id=mine',
        '--accelerator-type=v5p-8',
        '--zone=here',
        '--spot',
        '--runtime-version=v2-alpha-tpuv5',
    }
    assert options <= set(create)
    commands = [argument for call in made for argument in call if argument.startswith('--command=')]
    # Ubuntu 22.04 has Python 3.10.
    assert '--python 3.12 upcycle_env && ' in commands[0]
    assert commands[0].endswith("uv pip install --quiet --python upcycle_env 'upcycle==0.1[tpu]'")
    assert commands[1] == f'--command={copy}'
    assert len(commands) == 5 and len(set(commands[2:])) == 1
    # What the hosts' shells make of it are the arguments as they were given.
    python = 'upcycle_env/bin/python -m upcycle'
    words = subprocess.run(
        ['bash', '-c', commands[2].removeprefix('--command=').replace(python, "printf '%s\\n'")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words == [*TRAIN, '--distributed']


def test_a_users_mistake_is_not_tried_again(stand_in, tmp_path):
    log = stand_in('gcloud', GCLOUD.format(log=tmp_path / 'gcloud.txt', good=9, status=2))
    result = launch('tpu_pod.sh', 'mine', 'v4-8', 'here', *TRAIN, folder=tmp_path, PACKAGE='upcycle')
    assert result.returncode == 2
    assert log.read_text().count('-m upcycle') == 1


def test_slurm_gets_a_script_that_starts_a_process_for_each_gpu(stand_in, tmp_path):
    log = stand_in('sbatch')
    result = launch(
        'slurm.sh', 4, 8, *TRAIN, folder=tmp_path, SBATCH_ARGS='--partition=a100 --time=1:00', VENV='/my env'
    )
    assert result.returncode == 0, result.stderr
    assert calls(log) == [['--partition=a100', '--time=1:00']]
    script = tmp_path / 'sbatch.in'
    text = script.read_text()
    assert '#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=8\n' in text and r'source /my\ env/bin/activate' in text
    subprocess.run(['bash', '-n', script], check=True)
    # On a node: with stand-ins for the programs of Slurm, and no environment to activate.
    script.write_text(text.replace(r'source /my\ env/bin/activate', ''))
    srun = stand_in('srun')
    path = f'{tmp_path / "bin"}{os.pathsep}{os.environ["PATH"]}'
    subprocess.run(['bash', script], check=True, env={**os.environ, 'PATH': path}, stdin=subprocess.DEVNULL)
    assert calls(srun) == [['--kill-on-bad-exit=1', 'upcycle', *TRAIN, '--distributed']]
    # A run that was told to stop and has saved goes back into the queue, and no other.
    scontrol = stand_in('scontrol')
    for status, tries in ((1, 0), (2, 0), (PREEMPTED, 0), (UNAVAILABLE, 99), (UNAVAILABLE, 100)):
        stand_in('srun', f'exit {status}')
        job = {**os.environ, 'PATH': path, 'SLURM_JOB_ID': f'10{status}', 'SLURM_RESTART_COUNT': str(tries)}
        assert subprocess.run(['bash', script], env=job, stdin=subprocess.DEVNULL).returncode == status
    assert calls(scontrol) == [['requeue', f'10{PREEMPTED}'], ['requeue', f'10{UNAVAILABLE}']]


def test_xpk_gets_the_command_and_the_image(stand_in, tmp_path):
    log = stand_in('xpk')
    result = launch('gke.sh', 'mine', 'cluster', 'v4-128', 'image:1', *TRAIN, folder=tmp_path, SLICES='2')
    assert result.returncode == 0, result.stderr
    (call,) = calls(log)
    assert call[:2] == ['workload', 'create']
    assert {'--workload=mine', '--cluster=cluster', '--tpu-type=v4-128', '--num-slices=2'} <= set(call)
    assert '--restart-on-exit-codes=69,75' in call
    assert call[-1].startswith('--command=upcycle train --gin_file=a.gin ') and call[-1].endswith(' --distributed')


@pytest.mark.parametrize(
    ('name', 'arguments', 'program'),
    [
        ('tpu_pod.sh', ('mine', 'v4-8', 'here'), 'gcloud'),
        ('slurm.sh', (1, 1), 'sbatch'),
        ('gke.sh', ('mine', 'cluster', 'v4-8', 'image'), 'xpk'),
        ('processes.sh', (2,), 'upcycle'),
    ],
)
def test_a_dry_run_starts_nothing(name, arguments, program, stand_in, tmp_path):
    log = stand_in(program)
    result = launch(name, '--dry_run', *arguments, *TRAIN, folder=tmp_path)
    assert result.returncode == 0 and not log.exists()
    assert program in result.stdout and '--gin_file=a.gin' in result.stdout


def test_two_processes_are_one_run(tmp_path, stand_in):
    (tmp_path / 'bin' / 'upcycle').write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m upcycle "$@"\n')
    (tmp_path / 'bin' / 'upcycle').chmod(0o755)
    bindings = vision.bindings(tmp_path / 'run', 2, NUM_LAYERS=1, EVAL_STEPS=1)
    files = [f'--gin_file={file}' for file in (vision.MODEL, vision.TASK, 'runs/pretrain.gin')]
    options = [f'--gin.{name}={value}' for name, value in bindings.items()]
    result = launch(
        'processes.sh', 2, 'train', *files, *options, folder=tmp_path, XLA_FLAGS=environment(1)['XLA_FLAGS']
    )
    logs = [(tmp_path / 'processes' / f'{i}.txt').read_text() for i in range(2)]
    assert result.returncode == 0, (result.stderr, logs)
    assert "mesh    {'data': 2, 'expert': 1, 'model': 1}" in logs[0]
    assert read_metrics(str(tmp_path / 'run' / 'metrics.jsonl'))[-1]['step'] == 2


def test_when_one_process_fails_the_others_are_stopped(stand_in, tmp_path):
    stand_in('upcycle', 'case "$*" in *process_index=1*) exit 3 ;; *) exec sleep 600 ;; esac')
    result = launch('processes.sh', 2, *TRAIN, folder=tmp_path)
    assert result.returncode == 3 and 'status 3: see processes' in result.stderr


def test_processes_that_were_told_to_stop_are_started_again(stand_in, tmp_path):
    # Each is told to stop in its first 8 starts, at the same moment as the others.
    log = stand_in(
        'upcycle',
        f'tries={tmp_path}/tries_${{*: -1}}; echo >> "$tries"; sleep 0.05; [[ $(wc -l < "$tries") -gt 8 ]] || exit 75',
    )
    result = launch('processes.sh', 4, *TRAIN, folder=tmp_path)
    assert result.returncode == 0 and result.stderr == 8 * 'preempted and saved: restarting\n'
    assert len(calls(log)) == 4 * 9
    for status in (UNAVAILABLE, PREEMPTED, 2):
        log = stand_in('upcycle', f'exit {status}')
        log.unlink()
        result = launch('processes.sh', 1, *TRAIN, folder=tmp_path, TRIES='3')
        assert result.returncode == status and f'status {status}' in result.stderr
        assert len(calls(log)) == (1 if status == 2 else 3)


def test_when_nobody_answers_a_process_the_others_are_started_again_too(stand_in, tmp_path):
    log = stand_in('upcycle', 'case "$*" in *process_index=1*) exit 69 ;; *) exec sleep 600 ;; esac')
    result = launch('processes.sh', 2, *TRAIN, folder=tmp_path, TRIES='2')
    assert result.returncode == UNAVAILABLE and result.stderr.count('no answer: restarting') == 2
    assert log.read_text().count('process_index=1') == 2


def test_pauses_between_tries_grow(stand_in, tmp_path):
    stand_in('upcycle', 'exit 69')
    pauses = stand_in('sleep')
    launch('processes.sh', 1, *TRAIN, folder=tmp_path, TRIES='8', PERIOD='1')
    assert [int(call[0]) for call in calls(pauses)] == [1, 2, 4, 8, 16, 32, 64, 64]
