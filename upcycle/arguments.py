"""The command line: every command with its options, and who handles it."""

import argparse
from collections.abc import Callable
from typing import Any

import upcycle
from upcycle import handlers
from upcycle.formats import FORMATS
from upcycle.models.quickstart import JOBS
from upcycle.models.registry import EXAMPLE

DESCRIPTION = f"""\
Turn a trained dense Transformer into a Mixture-of-Experts model and go on training it.

A run is described by gin files (--gin_file, repeatable: models, moe, tasks, runs, in that order) and bindings
(--gin.NAME=VALUE), as in T5X:

  upcycle train {' '.join(f'--gin_file={file}' for file in EXAMPLE)} \\
    --gin_file=runs/upcycle.gin --gin.INITIAL_CHECKPOINT_PATH=... --gin.MODEL_DIR=... --gin.TRAIN_STEPS=1100000
"""
_SEVERAL = "the dense checkpoint (INITIAL_CHECKPOINT_PATH); several times for EXPERT_OPERATOR = 'branches'"
# Adds a command: name, handler, help, and whether it takes gin files and bindings.
Add = Callable[..., argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. Parsed options have a `handler`, which takes them and the bindings."""
    top = argparse.ArgumentParser(
        prog='upcycle',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument('--version', action='version', version=f'upcycle {upcycle.__version__}')
    commands = top.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def add(name: str, handler: Callable[..., Any], text: str, *, gin: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(handler=handler)
        if gin:
            command.add_argument(
                '--gin_file', action='append', default=[], metavar='FILE', help='repeatable: models, moe, tasks, runs'
            )
            command.epilog = 'Bindings: --gin.NAME=VALUE, such as --gin.TRAIN_STEPS=1000.'
        return command

    for add_command in (
        _add_quickstart,
        _add_train,
        _add_plan,
        _add_evaluate,
        _add_compile,
        _add_convert,
        _add_transfer,
        _add_inspect,
        _add_sweep,
        _add_report,
    ):
        add_command(add)
    return top


def _add_quickstart(add: Add) -> None:
    quickstart = add(
        'quickstart',
        handlers.quickstart,
        'the main job on real data that needs no download, 20 to 50 minutes on 2 cores',
    )
    families = ' or '.join(f'{name} ({job.summary})' for name, job in JOBS.items())
    quickstart.add_argument('--family', default='language', help=families)
    quickstart.add_argument('--out', help='folder for the runs and the report (runs/quickstart_FAMILY)')
    quickstart.add_argument('--budget', type=float, default=1.0, help='scales the number of steps (%(default)s)')
    quickstart.add_argument('--seeds', default='0', help='comma-separated; several give error bars (%(default)s)')


def _add_train(add: Add) -> None:
    train = add('train', handlers.train, 'one training run', gin=True)
    train.add_argument(
        '--profile_steps', metavar='FIRST:LAST', help='steps to trace into MODEL_DIR/profile, such as 10:15'
    )
    train.add_argument(
        '--preemption_notice',
        metavar='PLATFORM',
        help='gce or aws: ask its metadata server, too, whether the machine is about to be taken away',
    )
    _add_hosts(train)


def _add_plan(add: Add) -> None:
    plan = add('plan', handlers.plan, 'what the surgery of a run would do, from metadata alone', gin=True)
    plan.add_argument('--from', dest='source', action='append', metavar='PATH', help=_SEVERAL)
    plan.add_argument('--json', action='store_true', help='machine-readable')


def _add_evaluate(add: Add) -> None:
    evaluate = add('eval', handlers.evaluate, 'metrics of a checkpoint: loss, accuracy, few-shot probes', gin=True)
    evaluate.add_argument(
        '--from', dest='source', required=True, metavar='PATH', help='a run folder, or any checkpoint'
    )
    evaluate.add_argument('--few_shot', action='store_true', help='short for --gin_file=runs/few_shot.gin')
    evaluate.add_argument('--json', action='store_true', help='machine-readable')
    evaluate.add_argument('--out', metavar='FILE', help='write the JSON there, too')
    _add_hosts(evaluate)


def _add_compile(add: Add) -> None:
    compile_ = add(
        'compile', handlers.compile, 'ahead-of-time compile of a run for a TPU topology, without a TPU', gin=True
    )
    compile_.add_argument('--topology', required=True, metavar='KIND:SHAPE', help='such as v4:4x4x8 or v5e:16x16')
    compile_.add_argument('--num_slices', type=int, default=1, help='joined by the data-centre network (%(default)s)')
    compile_.add_argument(
        '--utilization', type=float, default=0.4, help='share of the peak assumed for core-days (%(default)s)'
    )
    compile_.add_argument('--json', action='store_true', help='machine-readable')
    compile_.add_argument('--out', metavar='FILE', help='write the JSON there, too')
    compile_.add_argument('--hlo', metavar='FILE', help='write the compiled program there, as text')


def _add_convert(add: Add) -> None:
    convert = add('convert', handlers.convert, 'a dense checkpoint upcycled on the host and streamed to disk', gin=True)
    convert.add_argument('--from', dest='source', required=True, action='append', metavar='PATH', help=_SEVERAL)
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


def _add_transfer(add: Add) -> None:
    import_ = add('import', handlers.import_, 'a checkpoint of another format in ours')
    import_.add_argument('--format', help='refuse any other: ' + ', '.join(FORMATS))
    export = add('export', handlers.export, 'a checkpoint of ours in another format')
    export.add_argument('--format', required=True, help=', '.join(FORMATS))
    for command in (import_, export):
        command.add_argument('--from', dest='source', required=True, metavar='PATH', help='the checkpoint')
        command.add_argument('--to', dest='target', required=True, metavar='PATH', help='where the new one will be')
        command.add_argument('--dtype', help='of the parameters (default: as they are)')
        command.add_argument(
            '--optimizer_state', default='keep', choices=('keep', 'none'), help='none leaves it out (%(default)s)'
        )
        command.add_argument('--step', metavar='N', help='steps it was trained for, where it does not say')


def _add_inspect(add: Add) -> None:
    inspect = add('inspect', handlers.inspect, 'what a checkpoint of any readable format holds')
    inspect.add_argument('path')
    inspect.add_argument('--leaves', action='store_true', help='list every leaf')
    inspect.add_argument('--quick', action='store_true', help='read no weights: compare no experts')
    inspect.add_argument('--json', action='store_true', help='machine-readable')


def _add_sweep(add: Add) -> None:
    sweep = add('sweep', handlers.sweep, 'a grid of runs: an experiment of configs/, or any binding', gin=True)
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


def _add_report(add: Add) -> None:
    report = add('report', handlers.report, 'tables and plots from run folders, or of an experiment')
    report.add_argument('runs', nargs='*', metavar='MODEL_DIR')
    report.add_argument(
        '--config', metavar='FILE', help="instead of run folders: a sweep's experiment, as far as it has come"
    )
    report.add_argument('--scale', help='of the experiment')
    report.add_argument(
        '--out',
        help='folder for report.html, report.csv and the plots (report); with --config that of the sweep (runs/NAME)',
    )


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
