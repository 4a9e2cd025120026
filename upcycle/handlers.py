"""Handlers: each calls its command with the parsed options. Modules that load JAX are imported in the handler."""

import argparse
import os
import signal

from upcycle import warning
from upcycle.errors import UserError
from upcycle.formats import FORMATS


def _join_hosts(options: argparse.Namespace) -> None:
    """Joins the other processes of the run, if the options of `arguments._add_hosts` ask for it."""
    from upcycle import hosts

    by_hand = (options.coordinator_address, options.process_count, options.process_index)
    given = [value is not None for value in by_hand]
    if any(given) and not all(given):
        raise UserError('--coordinator_address, --process_count and --process_index must be given together.')
    if all(given):
        if options.process_count < 1:
            raise UserError(f'--process_count={options.process_count} must be at least 1.')
        last = options.process_count - 1
        if not 0 <= options.process_index <= last:
            raise UserError(f'--process_index={options.process_index} must be from 0 to --process_count - 1 = {last}.')
        hosts.parse_address(options.coordinator_address)
    if not 0 < options.coordinator_timeout <= 1e6:
        raise UserError(f'--coordinator_timeout={options.coordinator_timeout:g} must be above 0 and at most 1e6.')
    if options.distributed or all(given):
        hosts.join(*by_hand, timeout=options.coordinator_timeout)


def quickstart(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    from upcycle import quickstart

    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(','))
    except ValueError:
        raise UserError(f'--seeds={options.seeds} must be comma-separated whole numbers, such as 0,1,2.') from None
    out = f'runs/quickstart_{options.family}' if options.out is None else options.out
    quickstart.quickstart(out, family=options.family, budget=options.budget, seeds=seeds)


def train(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _join_hosts(options)
    from upcycle.commands import train
    from upcycle.training import notice, profile

    steps = range(0) if options.profile_steps is None else profile.parse(options.profile_steps)
    with notice.listen(options.preemption_notice):
        train.run(options.gin_file, bindings, profile_steps=steps)


def plan(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    from upcycle.commands import plan

    if options.source is not None:
        bindings = {**bindings, 'INITIAL_CHECKPOINT_PATH': _one_or_several(options.source)}
    with warning.last():
        plan.run(options.gin_file, bindings, as_json=options.json)


def _one_or_several(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else repr(tuple(paths))


def evaluate(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _join_hosts(options)
    from upcycle.commands import evaluate

    files = [*options.gin_file, *([evaluate.FEW_SHOT] if options.few_shot else [])]
    evaluate.run(files, bindings, options.source, as_json=options.json, out=options.out)


def compile(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _compute_on_the_cpu()
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # the host need not be a TPU VM
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # no chip is used, so compilations may run in parallel
    from upcycle.commands import compile

    compile.run(
        options.gin_file,
        bindings,
        options.topology,
        num_slices=options.num_slices,
        utilization=options.utilization,
        as_json=options.json,
        out=options.out,
        hlo=options.hlo,
    )


def _compute_on_the_cpu() -> None:
    """Leaves the accelerators to other processes. Must run before JAX is loaded."""
    os.environ['JAX_PLATFORMS'] = 'cpu'


def convert(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _compute_on_the_cpu()
    _check_formats(options.format)
    options_as_bindings = {
        'INITIAL_CHECKPOINT_PATH': _one_or_several(options.source),
        'EXPERT_OPERATOR': options.operator,
        'UPCYCLE_SEED': options.seed,
        'DENSE_STEP': options.step,
        'OPTIMIZER_STATE': 'fresh' if options.optimizer_state == 'none' else options.optimizer_state,
    }
    from upcycle.commands import convert

    path = convert.run(
        options.gin_file,
        {**bindings, **{name: value for name, value in options_as_bindings.items() if value is not None}},
        options.target,
        options.format,
        dtype=options.dtype,
        optimizer_state=options.optimizer_state != 'none',
        verify=options.verify,
    )
    print(f'wrote {path}')


def _check_formats(*formats: str | None) -> None:
    for name in formats:
        if name is not None and name not in FORMATS:
            raise UserError(f'--format={name} is not one of {", ".join(FORMATS)}.')


def import_(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _transfer(options, 'upcycle', options.format)


def export(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _transfer(options, options.format, None)


def _transfer(options: argparse.Namespace, format: str, source_format: str | None) -> None:
    _check_formats(source_format, format)
    _compute_on_the_cpu()
    from upcycle import transfer

    path = transfer.transfer(
        options.source,
        options.target,
        format,
        source_format=source_format,
        optimizer_state=options.optimizer_state,
        dtype=options.dtype,
        step=options.step,
    )
    print(f'wrote {path}')


def inspect(options: argparse.Namespace, bindings: dict[str, str]) -> int:
    _compute_on_the_cpu()
    from upcycle.inspection import inspect

    with warning.last():
        return inspect(options.path, as_json=options.json, all_leaves=options.leaves, quick=options.quick)


def sweep(options: argparse.Namespace, bindings: dict[str, str]) -> int:
    environment = dict(os.environ)
    # Only the runs need the accelerators, and they get `environment`.
    _compute_on_the_cpu()
    # SIGTERM ends the runs of a sweep with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from upcycle.sweep.command import sweep
    from upcycle.sweep.grid import parse_option

    return sweep(
        config=options.config,
        scale=options.scale,
        gin_files=options.gin_file,
        axes=options.grid,
        bindings=bindings,
        launcher_name=options.where,
        jobs=options.jobs,
        cluster=dict(map(parse_option, options.cluster)),
        out=options.out,
        environment=environment,
        only=options.only,
    )


def report(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    if options.config is not None and not options.runs:
        from upcycle.sweep.reports import report_experiment

        report_experiment(config=options.config, scale=options.scale, out=options.out)
        return
    if options.config is not None or options.scale is not None or not options.runs:
        raise UserError('name either run folders, or an experiment with --config (and --scale), not both.')
    from upcycle.report.command import report_main

    report_main(options.runs, 'report' if options.out is None else options.out)
