"""Compiles the programs of an experiment for their TPU topologies: a JSON file each, and one table."""

import json
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from upcycle import configuration
from upcycle.errors import UserError
from upcycle.report.text import markdown_table
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
      out: the sweep's folder; programs that another experiment compiled there are reused.
      launcher_name: a name in `LAUNCHERS`, or 'print'.
      environment: environment variables of the compilers.
      cluster: options of the launcher, if it takes any.
      gin_files: included before the gin files of each program.
      bindings: bindings of every program.

    Returns:
      0 if every program is compiled, 1 if one failed.

    Raises:
      UserError: the configuration of a program is wrong; the message names the program.
    """
    commands = _commands(experiment, out, gin_files, bindings or {})
    if launcher_name == PRINT:
        for arguments in commands.values():
            print(shlex.join(['upcycle', *arguments]))
        return 0
    with conduct.lock(out) as held:
        failed = _compile_missing(commands, out, launchers.make(launcher_name, environment, held, 1, cluster))
    paths = {name: pathlib.Path(_path(out, name)) for name in commands}
    accounts = {name: json.loads(path.read_text('utf-8')) for name, path in paths.items() if path.exists()}
    table = as_markdown(accounts)
    pathlib.Path(out, f'{experiment.name}_compiled.md').write_text(table, 'utf-8')
    print(table)
    if failed:
        print('repeat the command: it tries the missing programs again.')
    return 1 if failed else 0


def _commands(
    experiment: ml_collections.ConfigDict, out: str, gin_files: Sequence[str], bindings: Mapping[str, str]
) -> dict[str, list[str]]:
    """Returns the arguments of `upcycle` by program. Builds each configuration, to find mistakes before compiling anything."""
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
    """Compiles the programs without a result file, one by one; returns the names of those that failed."""
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
    """Formats a table with one row per program. FLOPs are those of matrix products, with loops multiplied."""
    head = [
        'program',
        'topology',
        'TFLOP a chip and step',
        'arguments + temporaries, GB',
        'fits',
        'all-to-alls: number, GB on the wire',
        'other collectives, GB on the wire',
        'core-days, estimated',
    ]
    rows = []
    for name, account in accounts.items():
        wire = {kind: each['wire_bytes'] / 1e9 for kind, each in account['collectives'].items()}
        all_to_all = wire.pop('all-to-all', 0.0)
        rows.append(
            [
                name,
                account['topology'],
                f'{account["matmul_flops"] / 1e12:.1f}',
                f'{account["arguments"] / 1e9:.1f} + {account["temporaries"] / 1e9:.1f}',
                'yes' if account['fits'] else 'no',
                f'{account["collectives"]["all-to-all"]["count"]}, {all_to_all:.2f}' if all_to_all else '–',
                f'{sum(wire.values()):.2f}',
                f'{account["estimated_core_days"]:,.0f}',
            ]
        )
    return markdown_table(head, rows)


def _path(out: str, name: str) -> str:
    return os.path.join(out, FOLDER, f'{name}.json')
