"""The programs of an experiment, compiled for their TPU topologies: a JSON file each, and one table."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from upcycle import configuration
from upcycle.errors import UserError
from upcycle.sweep import conduct, grid, launchers

PRINT = 'print'
FOLDER = 'compiled'


def compile_all(
    experiment: ml_collections.ConfigDict,
    out: str,
    launcher_name: str,
    environment: Mapping[str, str],
    cluster: Mapping[str, Any],
    gin_files: Sequence[str] = (),
    bindings: Mapping[str, str] | None = None,
) -> int:
    """Compiles the programs that are not compiled yet, and writes `NAME_compiled.md`.

    Args:
      experiment: a config with `compile`.
      out: its folder; programs that another experiment compiled there are not compiled again.
      launcher_name: a name in `LAUNCHERS`, or 'print'.
      environment: of the compilers.
      cluster: options of a launcher that takes some.
      gin_files: put before those of each program.
      bindings: of every program.

    Returns:
      0 when every program has been compiled, 1 when one failed.

    Raises:
      UserError: a program's configuration does not fit; it names the program.
    """
    commands = _commands(experiment, out, gin_files, bindings or {})
    if launcher_name == PRINT:
        for arguments in commands.values():
            print(shlex.join(['upcycle', *arguments]))
        return 0
    with conduct.lock(out) as held:
        failed = _compile_missing(commands, out, launchers.make(launcher_name, environment, held, 1, cluster))
    accounts = {name: _read(_path(out, name)) for name in commands if os.path.exists(_path(out, name))}
    table = as_markdown(accounts)
    with open(os.path.join(out, f'{experiment.name}_compiled.md'), 'w', encoding='utf-8') as file:
        file.write(table)
    print(table)
    if failed:
        print('the same command tries again what is not compiled.')
    return 1 if failed else 0


def _commands(
    experiment: ml_collections.ConfigDict, out: str, gin_files: Sequence[str], bindings: Mapping[str, str]
) -> dict[str, list[str]]:
    """Arguments of `upcycle`, by program; each configuration is built, so that a mistake is found before anything is compiled."""
    commands = {}
    for program in experiment.compile:
        values = {name: grid.text_of(value) for name, value in program['bindings'].items()} | dict(bindings)
        files = (*gin_files, *program['gin_files'])
        try:
            configuration.load_model(files, values)
        except UserError as error:
            raise UserError(f'{program["name"]}: {error}') from error
        commands[program['name']] = [
            'compile',
            f'--topology={program["topology"]}',
            f'--out={_path(out, program["name"])}',
            *(f'--gin_file={file}' for file in files),
            *(f'--gin.{name}={value}' for name, value in values.items()),
        ]
    return commands


def _compile_missing(commands: Mapping[str, Sequence[str]], out: str, launcher: launchers.Launcher) -> list[str]:
    """Compiles the programs without an account, one after the other; the names of those that failed."""
    failed = []
    for number, (name, arguments) in enumerate(commands.items(), 1):
        if os.path.exists(_path(out, name)):
            continue
        print(f'{number}/{len(commands)} {name}', flush=True)
        os.makedirs(os.path.dirname(_path(out, name)), exist_ok=True)
        log = conduct.log_of(out, f'{FOLDER}/{name}')
        if code := conduct.run_to_end(launcher, arguments, log):
            failed.append(name)
            print(f'{name} failed: {conduct.reason_of(log, code)} ({log})', flush=True)
    return failed


def as_markdown(accounts: Mapping[str, Mapping[str, Any]]) -> str:
    """A table: a line a program. FLOPs are those of matrix products, with loops multiplied."""
    head = (
        'program',
        'topology',
        'TFLOP a chip and step',
        'arguments + temporaries, GB',
        'fits',
        'all-to-alls: number, GB on the wire',
        'other collectives, GB on the wire',
        'core-days, estimated',
    )
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    for name, a in accounts.items():
        wire = {kind: found['wire_bytes'] / 1e9 for kind, found in a['collectives'].items()}
        exchanged = wire.pop('all-to-all', 0.0)
        cells = (
            name,
            a['topology'],
            f'{a["matmul_flops"] / 1e12:.1f}',
            f'{a["arguments"] / 1e9:.1f} + {a["temporaries"] / 1e9:.1f}',
            'yes' if a['fits'] else 'no',
            f'{a["collectives"]["all-to-all"]["count"]}, {exchanged:.2f}' if exchanged else '–',
            f'{sum(wire.values()):.2f}',
            f'{a["estimated_core_days"]:,.0f}',
        )
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, ''])


def _path(out: str, name: str) -> str:
    return os.path.join(out, FOLDER, f'{name}.json')


def _read(path: str) -> Any:
    with open(path, encoding='utf-8') as file:
        return json.load(file)
