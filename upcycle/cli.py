"""The command line. Heavy imports wait until a command needs them, so that `--help` is quick."""

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import upcycle
from upcycle import interrupts, warning
from upcycle.errors import INTERRUPTED, PREEMPTED, UserError, status_of, whole_list, without_password
from upcycle.formats import FORMATS
from upcycle.host_memory import keep_freed_memory

TRACEBACK = 'UPCYCLE_TRACEBACK'  # an environment variable

DESCRIPTION = """\
Turn a trained dense Transformer into a Mixture-of-Experts model and go on training it.

A run is described by gin files (--gin_file, repeatable: models, moe, tasks, runs, in that order) and bindings
(--gin.NAME=VALUE), as in T5X:

  upcycle train --gin_file=models/t5_1_1_base.gin --gin_file=moe/t5.gin --gin_file=tasks/c4_span_corruption.gin \\
    --gin_file=runs/upcycle.gin --gin.INITIAL_CHECKPOINT_PATH=... --gin.MODEL_DIR=... --gin.TRAIN_STEPS=1100000
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 when it did what was asked, else by `errors.STATUSES`, and 1 after what nobody has foreseen.

    Args:
      arguments: of the command line; None: those of this process, which ends with the command.
    """
    before = interrupts.listen()
    _open_standard_streams()
    failure: BaseException | None = None
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except SystemExit as stop:  # argparse has said what there is to say
        code = stop.code
    except BaseException as error:
        code = _explain(error)
        failure = error
    code = _part(code, failure)
    if arguments is None:
        _say_no_more(code)
    elif before is not None:
        signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _explain(error: BaseException) -> int:
    """Says why a command ended early; its exit status."""
    code = INTERRUPTED if interrupts.came() else status_of(error)
    if code == INTERRUPTED:
        _say('interrupted; the same command goes on from the last checkpoint, where it has written one.')
    elif code != 1:
        _say(without_password(str(error)) + whole_list(error))
    elif reason := _cannot_print(error):
        _say(f'standard output cannot be written ({reason}): make room where it goes, or send it elsewhere.')
        _drop(sys.stdout)
        code = 2
    else:
        said = ' '.join(str(error).split())
        said = f'{type(error).__name__}: {said[:500]}' if said else type(error).__name__
        if traced := _is_traced():
            traceback.print_exception(error)
        _say(f'unexpected {without_password(said)}{"" if traced else f" ({TRACEBACK}=1 shows where)"}')
    return code


def _part(code: int, failure: BaseException | None) -> int:
    """Parts from the other processes of a run, which end with this one; asked to stop, all do so at the same step.

    Returns:
      The exit status.
    """
    from upcycle import hosts

    told = None if failure is None or code == PREEMPTED else ' '.join(str(failure).split()) or type(failure).__name__
    try:
        hosts.part(code, None if told is None else without_password(told))
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _is_traced() -> bool:
    return os.environ.get(TRACEBACK, '') not in ('', '0')


def _say(text: str) -> None:
    # A terminal that has gone changes nothing about the exit status.
    with contextlib.suppress(OSError, ValueError):
        print(f'upcycle: {text}', file=sys.stderr, flush=True)


def _cannot_print(error: BaseException) -> str | None:
    """Why standard output takes no more, where that is what an error may be about; None: it does, as far as one line tells."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        print(flush=True)
    except OSError as error:
        return error.strerror
    return None


def _drop(stream: TextIO) -> None:
    """Lets go of what a stream still holds and cannot write."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Makes all three usable: closed ones lead nowhere, as do those that nobody reads any more, and what an encoding lacks is
    spelt out (as '\\xb1')."""
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        stream = getattr(sys, name)
        if stream is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            # Else the next file that is opened would be the stream, and get what libraries print.
            os.open(os.devnull, os.O_RDWR)
            stream = open(number, 'r' if number == 0 else 'w', encoding='utf-8', closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):
            stream = _that_may_go(stream)
            setattr(sys, name, stream)
            stream.reconfigure(errors='backslashreplace')


class _MayGo(io.FileIO):
    """A pipe or terminal that leads nowhere once it is gone: a command ends when its work is done, read or not."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def _that_may_go(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream, where it is a pipe or a terminal, on a `_MayGo`."""
    before = getattr(stream.buffer, 'raw', stream.buffer)
    if type(before) is not io.FileIO or stat.S_ISREG(os.fstat(before.fileno()).st_mode):
        return stream
    raw = _MayGo(before.fileno(), 'w', closefd=False)
    return io.TextIOWrapper(
        raw if stream.buffer is before else io.BufferedWriter(raw),  # PYTHONUNBUFFERED
        stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _say_no_more(code: int) -> None:
    """Before the interpreter ends: what libraries have left open is not the user's, and SIGINT has nothing to interrupt."""
    with contextlib.suppress(ValueError):
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop(stream)
    if code == INTERRUPTED:
        os._exit(code)  # threads of JAX and Orbax that are at work crash an interpreter that ends
    if code and not _is_traced():
        logging.disable()
        sys.unraisablehook = lambda unraisable: None


def run(arguments: Sequence[str]) -> int:
    """Parses and dispatches; raises UserError where `main` prints it."""
    warning.forget()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    bindings = {}
    for argument in rest:
        name, equals, value = argument.removeprefix('--gin.').partition('=')
        if not argument.startswith('--gin.') or not equals or not name:
            raise UserError(f'{argument} is not understood: bindings look like --gin.NAME=VALUE; see `upcycle --help`.')
        bindings[name] = value
    if bindings and not hasattr(options, 'gin_file'):
        raise UserError(f'{options.command} takes no gin bindings: leave out --gin.{next(iter(bindings))}.')
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f'the working folder is gone ({error.strerror}): change into one that is there.') from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError('no folder for temporary files can be written: set TMPDIR to one that can.') from error
    try:
        return options.handler(options, bindings) or 0
    except Exception as error:
        if status_of(error) != 1:
            raise
        from upcycle import files, hosts

        refusal = files.refused_by_bucket(error, arguments) or hosts.refused_by_jax(error)
        if refusal is None:
            raise
        raise refusal from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='upcycle',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--version', action='version', version=f'upcycle {upcycle.__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def add(name: str, handler: Callable[..., Any], text: str, *, gin: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(handler=handler)
        if gin:
            command.add_argument(
                '--gin_file', action='append', default=[], metavar='FILE', help='repeatable: models, moe, tasks, runs'
            )
            command.epilog = 'Bindings: --gin.NAME=VALUE, such as --gin.TRAIN_STEPS=1000.'
        return command

    quickstart = add(
        'quickstart', _quickstart, 'the main job on real data that needs no download, 20 to 50 minutes on 2 cores'
    )
    quickstart.add_argument('--family', default='language', help='language (T5 on text) or vision (ViT on images)')
    quickstart.add_argument('--out', help='folder for the runs and the report (runs/quickstart_FAMILY)')
    quickstart.add_argument('--budget', type=float, default=1.0, help='scales the number of steps (%(default)s)')
    quickstart.add_argument('--seeds', default='0', help='comma-separated; several give error bars (%(default)s)')

    train = add('train', _train, 'one training run', gin=True)
    train.add_argument(
        '--profile_steps', metavar='FIRST:LAST', help='steps to trace into MODEL_DIR/profile, such as 10:15'
    )
    train.add_argument(
        '--preemption_notice',
        metavar='PLATFORM',
        help='gce or aws: ask its metadata server, too, whether the machine is about to be taken away',
    )
    _add_hosts(train)

    several = "the dense checkpoint (INITIAL_CHECKPOINT_PATH); several times for EXPERT_OPERATOR = 'branches'"
    plan = add('plan', _plan, 'what the surgery of a run would do, from metadata alone', gin=True)
    plan.add_argument('--from', dest='source', action='append', metavar='PATH', help=several)
    plan.add_argument('--json', action='store_true', help='machine-readable')

    evaluate = add('eval', _evaluate, 'metrics of a checkpoint: loss, accuracy, few-shot probes', gin=True)
    evaluate.add_argument(
        '--from', dest='source', required=True, metavar='PATH', help='a run folder, or any checkpoint'
    )
    evaluate.add_argument('--few_shot', action='store_true', help='short for --gin_file=runs/few_shot.gin')
    evaluate.add_argument('--json', action='store_true', help='machine-readable')
    evaluate.add_argument('--out', metavar='FILE', help='write the JSON there, too')
    _add_hosts(evaluate)

    compile_ = add('compile', _compile, 'ahead-of-time compile of a run for a TPU topology, without a TPU', gin=True)
    compile_.add_argument('--topology', required=True, metavar='KIND:SHAPE', help='such as v4:4x4x8 or v5e:16x16')
    compile_.add_argument('--num_slices', type=int, default=1, help='joined by the data-centre network (%(default)s)')
    compile_.add_argument(
        '--utilization', type=float, default=0.4, help='share of the peak assumed for core-days (%(default)s)'
    )
    compile_.add_argument('--json', action='store_true', help='machine-readable')
    compile_.add_argument('--out', metavar='FILE', help='write the JSON there, too')
    compile_.add_argument('--hlo', metavar='FILE', help='write the compiled program there, as text')

    convert = add('convert', _convert, 'a dense checkpoint upcycled on the host and streamed to disk', gin=True)
    convert.add_argument('--from', dest='source', required=True, action='append', metavar='PATH', help=several)
    convert.add_argument('--to', dest='target', required=True, metavar='PATH', help='where the new one will be')
    convert.add_argument('--format', default='upcycle', help='of the new one: ' + ', '.join(FORMATS) + ' (%(default)s)')
    convert.add_argument('--dtype', help='of the parameters; routers stay float32 (default: float32)')
    convert.add_argument(
        '--optimizer_state', help='fresh, fresh_clock, tile (OPTIMIZER_STATE), or none to leave it out'
    )
    convert.add_argument('--operator', help='how experts are made (EXPERT_OPERATOR)')
    convert.add_argument('--seed', help='of everything random in the surgery (UPCYCLE_SEED)')
    convert.add_argument('--step', help='steps the dense model was trained for, where it does not say (DENSE_STEP)')
    convert.add_argument('--verify', action='store_true', help='read everything back and compare it by hash')

    import_ = add('import', _import, 'a checkpoint of another format in ours')
    import_.add_argument('--format', help='refuse any other: ' + ', '.join(FORMATS))
    export = add('export', _export, 'a checkpoint of ours in another format')
    export.add_argument('--format', required=True, help=', '.join(FORMATS))
    for command in (import_, export):
        command.add_argument('--from', dest='source', required=True, metavar='PATH', help='the checkpoint')
        command.add_argument('--to', dest='target', required=True, metavar='PATH', help='where the new one will be')
        command.add_argument('--dtype', help='of the parameters (default: as they are)')
        command.add_argument(
            '--optimizer_state', default='keep', choices=('keep', 'none'), help='none leaves it out (%(default)s)'
        )
        command.add_argument('--step', metavar='N', help='steps it was trained for, where it does not say')

    inspect = add('inspect', _inspect, 'what a checkpoint of any readable format holds')
    inspect.add_argument('path')
    inspect.add_argument('--leaves', action='store_true', help='list every leaf')
    inspect.add_argument('--quick', action='store_true', help='read no weights: compare no experts')
    inspect.add_argument('--json', action='store_true', help='machine-readable')

    sweep = add('sweep', _sweep, 'a grid of runs: an experiment of configs/, or any binding', gin=True)
    sweep.add_argument('--config', metavar='FILE', help='such as configs/finetune_imagenet.py')
    sweep.add_argument('--scale', help='of the experiment, such as mini; its own default if not given')
    sweep.add_argument(
        '--grid',
        action='append',
        default=[],
        metavar='NAME=A,B,C',
        help='repeatable: an axis of bindings over --gin_file',
    )
    sweep.add_argument(
        '--where',
        default='local',
        choices=('local', 'slurm', 'gke', 'print'),
        help='this machine, jobs of a Slurm cluster, workloads of a GKE cluster, or only the commands (%(default)s)',
    )
    sweep.add_argument(
        '--cluster',
        action='append',
        default=[],
        metavar='NAME=VALUE',
        help="repeatable; --where=slurm: submitit's options, such as slurm_partition, timeout_min, gpus_per_node, nodes; "
        "--where=gke: xpk's, such as cluster, tpu-type, docker-image",
    )
    sweep.add_argument(
        '--jobs',
        type=int,
        default=1,
        metavar='N',
        help='runs at once; on this machine each has its share of the cores (%(default)s)',
    )
    sweep.add_argument(
        '--only',
        metavar='PATTERN',
        help="of its runs those with such names, as 'language_xl/*', and what they start from",
    )
    sweep.add_argument('--out', help='folder of the runs (runs/NAME)')

    report = add('report', _report, 'tables and plots from run folders, or of an experiment')
    report.add_argument('runs', nargs='*', metavar='MODEL_DIR')
    report.add_argument(
        '--config', metavar='FILE', help="instead of run folders: a sweep's experiment, as far as it has come"
    )
    report.add_argument('--scale', help='of the experiment')
    report.add_argument(
        '--out',
        help='folder for report.html, report.csv and the plots (report); with --config that of the sweep (runs/NAME)',
    )
    return parser


def _add_hosts(command: argparse.ArgumentParser) -> None:
    hosts = command.add_argument_group('several processes (start the same command in each; they are one run)')
    hosts.add_argument(
        '--distributed', action='store_true', help='find the others by the platform: Cloud TPU, Slurm, Kubernetes, MPI'
    )
    hosts.add_argument('--coordinator_address', metavar='HOST:PORT', help='find the others by hand: process 0')
    hosts.add_argument('--process_count', type=int, metavar='N')
    hosts.add_argument('--process_index', type=int, metavar='I')
    hosts.add_argument(
        '--coordinator_timeout',
        type=float,
        default=300.0,
        metavar='SECONDS',
        help='how long to wait for the others (%(default)g)',
    )


def _join_hosts(options: argparse.Namespace) -> None:
    """Joins the other processes, where the options of `_add_hosts` name them."""
    from upcycle import hosts

    by_hand = (options.coordinator_address, options.process_count, options.process_index)
    if any(value is not None for value in by_hand):
        if any(value is None for value in by_hand):
            raise UserError('--coordinator_address, --process_count and --process_index go together: give all three.')
        if options.process_count < 1:
            raise UserError(f'--process_count={options.process_count} must be at least 1.')
        if not 0 <= options.process_index < options.process_count:
            raise UserError(
                f'--process_index={options.process_index} must lie between 0 and --process_count - 1 = '
                f'{options.process_count - 1}.'
            )
        hosts.parse_address(options.coordinator_address)
    if not 0 < options.coordinator_timeout <= 1e6:
        raise UserError(
            f'--coordinator_timeout={options.coordinator_timeout:g} must be above 0, and at most 1e6 seconds.'
        )
    if options.distributed or options.coordinator_address is not None:
        hosts.join(*by_hand, timeout=options.coordinator_timeout)


def _quickstart(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    keep_freed_memory()
    from upcycle import quickstart

    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(','))
    except ValueError:
        raise UserError(f'--seeds={options.seeds} must be whole numbers with commas between, such as 0,1,2.') from None
    out = f'runs/quickstart_{options.family}' if options.out is None else options.out
    quickstart.quickstart(out, family=options.family, budget=options.budget, seeds=seeds)


def _train(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    keep_freed_memory()
    _join_hosts(options)
    from upcycle import jobs
    from upcycle.train import notice, profile

    steps = range(0) if options.profile_steps is None else profile.parse(options.profile_steps)
    with notice.listen(options.preemption_notice):
        jobs.train(options.gin_file, bindings, profile_steps=steps)


def _plan(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    from upcycle import jobs

    if options.source is not None:
        bindings = {**bindings, 'INITIAL_CHECKPOINT_PATH': _one_or_several(options.source)}
    with warning.last():
        jobs.plan(options.gin_file, bindings, as_json=options.json)


def _one_or_several(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else repr(tuple(paths))


def _evaluate(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    keep_freed_memory()
    _join_hosts(options)
    from upcycle import jobs

    files = [*options.gin_file, *([jobs.FEW_SHOT] if options.few_shot else [])]
    jobs.evaluate(files, bindings, options.source, as_json=options.json, out=options.out)


def _compile(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    # Before JAX is loaded: the host must not look for TPUs of its own.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'
    # No chip is touched, so several compilations may run beside each other.
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
    from upcycle import jobs

    jobs.compile_(
        options.gin_file,
        bindings,
        options.topology,
        num_slices=options.num_slices,
        utilization=options.utilization,
        as_json=options.json,
        out=options.out,
        hlo=options.hlo,
    )


def _on_the_host() -> None:
    """Before JAX is loaded: files are turned on the host, and an accelerator is left to whom it serves."""
    os.environ['JAX_PLATFORMS'] = 'cpu'


def _convert(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _on_the_host()
    _check_formats(options.format)
    named = {
        'INITIAL_CHECKPOINT_PATH': _one_or_several(options.source),
        'EXPERT_OPERATOR': options.operator,
        'UPCYCLE_SEED': options.seed,
        'DENSE_STEP': options.step,
        'OPTIMIZER_STATE': 'fresh' if options.optimizer_state == 'none' else options.optimizer_state,
    }
    from upcycle import jobs

    path = jobs.convert(
        options.gin_file,
        {**bindings, **{name: value for name, value in named.items() if value is not None}},
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


def _import(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _transfer(options, 'upcycle', options.format)


def _export(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    _transfer(options, options.format, None)


def _transfer(options: argparse.Namespace, format: str, source_format: str | None) -> None:
    _check_formats(source_format, format)
    _on_the_host()
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


def _inspect(options: argparse.Namespace, bindings: dict[str, str]) -> int:
    _on_the_host()
    from upcycle.inspection import inspect

    with warning.last():
        return inspect(options.path, as_json=options.json, all_leaves=options.leaves, quick=options.quick)


def _sweep(options: argparse.Namespace, bindings: dict[str, str]) -> int:
    environment = dict(os.environ)
    # The runs need the accelerators; what watches them does not.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    # Whoever ends a sweep also ends its runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from upcycle.sweep.command import sweep
    from upcycle.sweep.grid import parse_option

    return sweep(
        config=options.config,
        scale=options.scale,
        gin_files=options.gin_file,
        axes=options.grid,
        bindings=bindings,
        where=options.where,
        jobs=options.jobs,
        cluster=dict(map(parse_option, options.cluster)),
        out=options.out,
        environment=environment,
        only=options.only,
    )


def _report(options: argparse.Namespace, bindings: dict[str, str]) -> None:
    if options.config is not None and not options.runs:
        from upcycle.sweep.command import report_experiment

        report_experiment(config=options.config, scale=options.scale, out=options.out)
        return
    if options.config is not None or options.scale is not None or not options.runs:
        raise UserError('name either run folders, or an experiment with --config (and its --scale), and not both.')
    from upcycle.report.html import report_main

    report_main(options.runs, 'report' if options.out is None else options.out)
