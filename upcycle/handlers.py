"""Handlers of the commands. Each takes its command's options, and imports modules that load JAX when it is called."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle import warning
from upcycle.errors import UserError
from upcycle.formats import FORMATS, READ, folder_request

# Options of `arguments._add_harness`.
_HARNESS = ('include_path', 'num_fewshot', 'limit', 'batch_size', 'max_length', 'tokenizer')


def _join_hosts(
    distributed: bool,
    coordinator_address: str | None,
    process_count: int | None,
    process_index: int | None,
    coordinator_timeout: float,
) -> None:
    """Joins the other processes of the run, if the options of `arguments._add_hosts` ask for it."""
    from upcycle import hosts

    by_hand = (coordinator_address, process_count, process_index)
    given = [value is not None for value in by_hand]
    if any(given) and not all(given):
        raise UserError('--coordinator_address, --process_count and --process_index must be given together.')
    if all(given):
        if process_count < 1:
            raise UserError(f'--process_count={process_count} must be at least 1.')
        last = process_count - 1
        if not 0 <= process_index <= last:
            raise UserError(f'--process_index={process_index} must be from 0 to --process_count - 1 = {last}.')
        hosts.parse_address(coordinator_address)
    if not 0 < coordinator_timeout <= 1e6:
        raise UserError(f'--coordinator_timeout={coordinator_timeout:g} must be above 0 and at most 1e6.')
    if distributed or all(given):
        hosts.join(*by_hand, timeout=coordinator_timeout)


def quickstart(family: str, out: str | None, budget: float, seeds: str) -> None:
    from upcycle import quickstart

    try:
        numbers = tuple(int(seed) for seed in seeds.split(','))
    except ValueError:
        raise UserError(f'--seeds={seeds} must be comma-separated whole numbers, such as 0,1,2.') from None
    out = f'runs/quickstart_{family}' if out is None else out
    quickstart.quickstart(out, family=family, budget=budget, seeds=numbers)


def tokenize(**options: Any) -> None:
    _compute_on_the_cpu()
    from upcycle.commands import tokenize

    tokenize.run(**options)


def train(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    profile_steps: str | None,
    preemption_notice: str | None,
    **hosts: Any,
) -> None:
    _join_hosts(**hosts)
    from upcycle.commands import train
    from upcycle.training import notice, profile

    steps = range(0) if profile_steps is None else profile.parse(profile_steps)
    with notice.listen(preemption_notice):
        train.run(gin_files, bindings, profile_steps=steps)


def plan(gin_files: Sequence[str], bindings: Mapping[str, str], source: list[str] | None, as_json: bool) -> None:
    from upcycle.commands import plan

    if source is not None:
        bindings = {**bindings, 'INITIAL_CHECKPOINT_PATH': _one_or_several(source)}
    with warning.last():
        plan.run(gin_files, bindings, as_json=as_json)


def _one_or_several(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else repr(tuple(paths))


def evaluate(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    source: str,
    few_shot: bool,
    as_json: bool,
    out: str | None,
    lm_eval: str | None,
    **options: Any,
) -> None:
    of_harness = {name: options.pop(name) for name in _HARNESS}
    given = {name: value for name, value in of_harness.items() if value is not None}
    if lm_eval is None and given:
        raise UserError(f'--{next(iter(given))} is an option of --lm_eval: name its tasks, or remove it.')
    if lm_eval is not None and few_shot:
        raise UserError('--few_shot and --lm_eval are separate evaluations: remove one of them.')
    _join_hosts(**options)
    if lm_eval is not None:
        from upcycle.commands import harness

        harness.run(gin_files, bindings, source, lm_eval, as_json=as_json, out=out, **given)
        return
    from upcycle.commands import evaluate

    files = [*gin_files, *([evaluate.FEW_SHOT] if few_shot else [])]
    evaluate.run(files, bindings, source, as_json=as_json, out=out)


def generate(**options: Any) -> None:
    from upcycle.commands import generate

    generate.run(**options)


def compile(**options: Any) -> None:
    _compute_on_the_cpu()
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # the host need not be a TPU VM
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # no chip is used, so compilations may run in parallel
    from upcycle.commands import compile

    compile.run(**options)


def _compute_on_the_cpu() -> None:
    """Leaves the accelerators to other processes. Must run before JAX is loaded."""
    os.environ['JAX_PLATFORMS'] = 'cpu'


def convert(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    source: list[str],
    format: str,
    optimizer_state: str | None,
    operator: str | None,
    seed: str | None,
    step: str | None,
    layout: str | None,
    engines: str | None,
    dense_layers: str | None,
    **options: Any,
) -> None:
    _compute_on_the_cpu()
    _check_format(format)
    options['request'] = folder_request(format, layout, engines, dense_layers)
    named = {
        'INITIAL_CHECKPOINT_PATH': _one_or_several(source),
        'EXPERT_OPERATOR': operator,
        'UPCYCLE_SEED': seed,
        'DENSE_STEP': step,
        'OPTIMIZER_STATE': 'fresh' if optimizer_state == 'none' else optimizer_state,
    }
    bindings = {**bindings, **{name: value for name, value in named.items() if value is not None}}
    from upcycle.commands import convert

    path = convert.run(gin_files, bindings, format=format, optimizer_state=optimizer_state != 'none', **options)
    _print_written(path, format)


def _print_written(path: str, format: str) -> None:
    from etils import epath

    from upcycle.checkpoints.hf.config import summary
    from upcycle.checkpoints.hf.sources import CONFIG

    layout = f' ({summary(epath.Path(path) / CONFIG)})' if format == 'huggingface' else ''
    print(f'wrote {path}{layout}')


def _check_format(name: str | None, known: Sequence[str] = FORMATS) -> None:
    if name is not None and name not in known:
        raise UserError(f'--format={name} is not one of {", ".join(known)}.')


def import_(format: str | None, **options: Any) -> None:
    _transfer('upcycle', source_format=format, **options)


def export(format: str, layout: str | None, engines: str | None, dense_layers: str | None, **options: Any) -> None:
    _check_format(format)
    request = folder_request(format, layout, engines, dense_layers)
    _transfer(format, source_format=None, request=request, **options)


def _transfer(format: str, source_format: str | None, **options: Any) -> None:
    _check_format(source_format, READ)
    _compute_on_the_cpu()
    from upcycle import transfer

    path = transfer.transfer(format=format, source_format=source_format, **options)
    _print_written(path, format)


def inspect(**options: Any) -> int:
    _compute_on_the_cpu()
    from upcycle.inspection import inspect

    with warning.last():
        return inspect(**options)


def sweep(cluster: Sequence[str], **options: Any) -> int:
    environment = dict(os.environ)
    # Only the runs need the accelerators, and they get `environment`.
    _compute_on_the_cpu()
    # SIGTERM ends the runs of a sweep with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from upcycle.sweep.command import sweep
    from upcycle.sweep.grid import parse_option

    return sweep(cluster=dict(map(parse_option, cluster)), environment=environment, **options)


def report(run_dirs: Sequence[str], config: str | None, scale: str | None, out: str | None) -> None:
    if config is not None and not run_dirs:
        from upcycle.sweep.reports import report_experiment

        report_experiment(config=config, scale=scale, out=out)
        return
    if config is not None or scale is not None or not run_dirs:
        raise UserError('name either run folders, or an experiment with --config (and --scale), not both.')
    from upcycle.report.command import report_main

    report_main(run_dirs, 'report' if out is None else out)
