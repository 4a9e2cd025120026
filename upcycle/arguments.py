"""The options of every command, and its handler."""

import argparse
from collections.abc import Callable
from typing import Any

import upcycle
from upcycle import handlers
from upcycle.formats import ENGINES, FORMATS, READ
from upcycle.models.quickstart import JOBS
from upcycle.models.registry import EXAMPLE

DESCRIPTION = f"""\
Turn a trained dense Transformer into a Mixture-of-Experts model and continue its training.

A run is described by gin files (--gin_file, repeatable: models, moe, tasks, runs, in that order) and bindings
(--gin.NAME=VALUE), as in T5X:

  upcycle train {' '.join(f'--gin_file={file}' for file in EXAMPLE)} \\
    --gin_file=runs/upcycle.gin --gin.INITIAL_CHECKPOINT_PATH=... --gin.MODEL_DIR=... --gin.TRAIN_STEPS=1100000
"""
_SEVERAL = "the dense checkpoint (INITIAL_CHECKPOINT_PATH); repeatable for EXPERT_OPERATOR = 'branches'"
_FORMATS = ', '.join(FORMATS)
# Adds a command: name, handler, help, and whether it takes gin files and bindings.
Add = Callable[..., argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. The parsed options hold a `handler`, which takes the others as keyword arguments."""
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
            order = 'repeatable: models, moe, tasks, runs'
            command.add_argument(
                '--gin_file', dest='gin_files', action='append', default=[], metavar='FILE', help=order
            )
            command.epilog = 'Bindings: --gin.NAME=VALUE, such as --gin.TRAIN_STEPS=1000.'
        return command

    _add_quickstart(add)
    _add_tokenize(add)
    _add_train(add)
    _add_plan(add)
    _add_evaluate(add)
    _add_generate(add)
    _add_compile(add)
    _add_convert(add)
    _add_transfer(add)
    _add_inspect(add)
    _add_sweep(add)
    _add_report(add)
    return top


def _add_quickstart(add: Add) -> None:
    text = 'run the main job on real data without a download (20 to 50 minutes on 2 cores)'
    quickstart = add('quickstart', handlers.quickstart, text)
    families = ' or '.join(f'{name} ({job.summary})' for name, job in JOBS.items())
    quickstart.add_argument('--family', default='language', help=families)
    quickstart.add_argument('--out', help='folder of the runs and the report (runs/quickstart_FAMILY)')
    quickstart.add_argument('--budget', type=float, default=1.0, help='multiplies the number of steps (%(default)s)')
    quickstart.add_argument('--seeds', default='0', help='comma-separated; several give error bars (%(default)s)')


def _add_tokenize(add: Add) -> None:
    tokenize = add('tokenize', handlers.tokenize, 'tokenise text or conversations into shards for language models')
    files = 'repeatable: a file, folder or glob of text, JSON lines (also .gz, .zst) or Parquet'
    tokenize.add_argument('--from', dest='source', action='append', required=True, metavar='PATH', help=files)
    kinds = 'a model folder, a tokenizer.json, SentencePiece model or GGUF file, or bytes'
    tokenize.add_argument('--tokenizer', required=True, metavar='PATH', help=kinds)
    tokenize.add_argument('--to', dest='target', required=True, metavar='FOLDER', help='the new folder of shards')
    field = 'of JSON objects, or the column of Parquet files (%(default)s)'
    tokenize.add_argument('--text_field', default='text', metavar='NAME', help=field)
    separator = "what separates the documents of a text file, such as '\\n\\n' (default: a document per file)"
    tokenize.add_argument('--separator', metavar='TEXT', help=separator)
    chat = "conversations, in the field messages: learn the assistant's tokens only"
    tokenize.add_argument('--chat', action='store_true', help=chat)
    tokenize.add_argument('--chat_template', metavar='FILE', help="default: the tokenizer folder's")
    share = 'share of the documents to hold out, by their hashes (%(default)g)'
    tokenize.add_argument('--validation', type=float, default=0.01, metavar='SHARE', help=share)
    tokenize.add_argument(
        '--validation_from', action='append', default=[], metavar='PATH', help='repeatable: files to hold out instead'
    )
    tokenize.add_argument('--workers', type=int, metavar='N', help='processes (default: one per core)')
    bad = 'records that may be left out (%(default)s)'
    tokenize.add_argument('--max_bad_records', type=int, default=0, metavar='N', help=bad)
    _add_json(tokenize)


def _add_train(add: Add) -> None:
    train = add('train', handlers.train, 'train a model: pretrain, continue, upcycle or fine-tune', gin=True)
    steps = 'steps to trace into MODEL_DIR/profile, such as 10:15'
    train.add_argument('--profile_steps', metavar='FIRST:LAST', help=steps)
    notice = 'gce or aws: also poll its metadata server for a preemption notice'
    train.add_argument('--preemption_notice', metavar='PLATFORM', help=notice)
    _add_hosts(train)


def _add_plan(add: Add) -> None:
    plan = add('plan', handlers.plan, 'plan the surgery of a run from metadata alone', gin=True)
    plan.add_argument('--from', dest='source', action='append', metavar='PATH', help=_SEVERAL)
    _add_json(plan)


def _add_evaluate(add: Add) -> None:
    evaluate = add(
        'eval', handlers.evaluate, 'evaluate a checkpoint: metrics, few-shot probes, tasks of lm-eval', gin=True
    )
    _add_source(evaluate, 'a run folder or any checkpoint')
    evaluate.add_argument('--few_shot', action='store_true', help='short for --gin_file=runs/few_shot.gin')
    _add_json(evaluate, file=True)
    _add_harness(evaluate)
    _add_hosts(evaluate)


def _add_harness(command: argparse.ArgumentParser) -> None:
    harness = command.add_argument_group('tasks of lm-eval instead, for language models (pip install upcycle[lm_eval])')
    tasks = 'names of tasks, groups or tags, separated by commas'
    harness.add_argument('--lm_eval', metavar='TASKS', help=tasks)
    harness.add_argument('--include_path', metavar='FOLDER', help="of further tasks, in lm-eval's YAML")
    shots = "solved examples in front of each question (default: the tasks' own)"
    harness.add_argument('--num_fewshot', type=int, metavar='N', help=shots)
    limit = 'examples per task, or a share of them below 1 (default: all)'
    harness.add_argument('--limit', type=float, metavar='N', help=limit)
    harness.add_argument('--batch_size', type=int, metavar='N', help='rows at a time (8)')
    longest = "the most tokens that the model reads at once (default: config.json's, or that of the run's data)"
    harness.add_argument('--max_length', type=int, metavar='N', help=longest)
    harness.add_argument('--tokenizer', metavar='PATH', help="as for generate (default: the checkpoint's)")


def _add_generate(add: Add) -> None:
    generate = add('generate', handlers.generate, 'continue or answer prompts with a language model')
    _add_source(generate, 'a run folder or any checkpoint')
    prompt = 'repeatable; without prompts, standard input is one, without its last line break'
    generate.add_argument('--prompt', dest='prompts', action='append', default=[], metavar='TEXT', help=prompt)
    generate.add_argument('--prompts_file', metavar='FILE', help='text with a prompt on each line')
    chat = "a prompt is a user's message, for the model's chat template"
    generate.add_argument('--chat', action='store_true', help=chat)
    tokenizer = "a model folder, a tokenizer.json or SentencePiece model, or bytes (default: the checkpoint's)"
    generate.add_argument('--tokenizer', metavar='PATH', help=tokenizer)
    most = 'the most tokens of a text (%(default)s)'
    generate.add_argument('--max_new_tokens', type=int, default=128, metavar='N', help=most)
    temperature = 'divides the logits; 0 chooses the most probable token (%(default)g)'
    generate.add_argument('--temperature', type=float, default=0.0, metavar='T', help=temperature)
    top_k = 'draw among this many most probable tokens (0: all)'
    generate.add_argument('--top_k', type=int, default=0, metavar='K', help=top_k)
    top_p = 'draw among the fewest most probable tokens that have this probability together (%(default)g)'
    generate.add_argument('--top_p', type=float, default=1.0, metavar='P', help=top_p)
    generate.add_argument('--seed', type=int, default=0, metavar='N', help='of the draws (%(default)s)')
    dtypes = ('float32', 'bfloat16', 'float16')
    generate.add_argument('--dtype', default='float32', choices=dtypes, help='of the model (%(default)s)')
    generate.add_argument(
        '--batch_size', type=int, default=8, metavar='N', help='the most prompts at a time (%(default)s)'
    )
    _add_json(generate)


def _add_compile(add: Add) -> None:
    text = 'compile a run ahead of time for a TPU topology, without a TPU'
    compile_ = add('compile', handlers.compile, text, gin=True)
    compile_.add_argument('--topology', required=True, metavar='KIND:SHAPE', help='such as v4:4x4x8 or v5e:16x16')
    compile_.add_argument('--num_slices', type=int, default=1, help='joined by the data-centre network (%(default)s)')
    share = 'share of the peak assumed for core-days (%(default)s)'
    compile_.add_argument('--utilization', type=float, default=0.4, help=share)
    _add_json(compile_, file=True)
    compile_.add_argument('--hlo', metavar='FILE', help='write the compiled program to this file, as text')


def _add_convert(add: Add) -> None:
    text = 'upcycle a dense checkpoint on the host and stream the result to disk'
    convert = add('convert', handlers.convert, text, gin=True)
    _add_source(convert, _SEVERAL, action='append')
    _add_target(convert)
    convert.add_argument('--format', default='upcycle', help=f'of the new checkpoint: {_FORMATS} (%(default)s)')
    _add_folder(convert)
    types = 'of the parameters; routers stay float32 (default: float32, with --format=huggingface unchanged)'
    convert.add_argument('--dtype', help=types)
    state = 'fresh, fresh_clock, tile (OPTIMIZER_STATE), or none to omit it'
    convert.add_argument('--optimizer_state', help=state)
    convert.add_argument('--operator', help='how experts are made (EXPERT_OPERATOR)')
    convert.add_argument('--seed', help='of all random numbers in the surgery (UPCYCLE_SEED)')
    convert.add_argument('--step', help='training steps of the dense model, if it does not hold them (DENSE_STEP)')
    convert.add_argument('--verify', action='store_true', help='read everything back and compare hashes')


def _add_transfer(add: Add) -> None:
    import_ = add('import', handlers.import_, 'rewrite a checkpoint of another format in ours')
    import_.add_argument('--format', help=f'refuse other formats: {", ".join(READ)}')
    export = add('export', handlers.export, 'rewrite a checkpoint of ours in another format')
    export.add_argument('--format', required=True, help=_FORMATS)
    _add_folder(export)
    for command in (import_, export):
        _add_source(command, 'the checkpoint')
        _add_target(command)
        command.add_argument('--dtype', help='of the parameters (default: unchanged)')
        kept = 'none omits it (%(default)s)'
        command.add_argument('--optimizer_state', default='keep', choices=('keep', 'none'), help=kept)
        command.add_argument('--step', metavar='N', help='its training steps, if it does not hold them')


def _add_inspect(add: Add) -> None:
    inspect = add('inspect', handlers.inspect, 'show the content of a checkpoint of any readable format')
    inspect.add_argument('path')
    inspect.add_argument('--leaves', dest='all_leaves', action='store_true', help='list every leaf')
    inspect.add_argument('--quick', action='store_true', help='read no weights, and so compare no experts')
    _add_json(inspect)


def _add_sweep(add: Add) -> None:
    sweep = add('sweep', handlers.sweep, 'run a grid: an experiment of configs/, or any bindings', gin=True)
    sweep.add_argument('--config', metavar='FILE', help='such as configs/finetune_imagenet.py')
    sweep.add_argument('--scale', help="of the experiment, such as mini (the experiment's default)")
    axis = 'repeatable: an axis of bindings over --gin_file'
    sweep.add_argument('--grid', dest='axes', action='append', default=[], metavar='NAME=A,B,C', help=axis)
    launcher = 'this machine, Slurm jobs, GKE workloads, or only print the commands (%(default)s)'
    launchers = ('local', 'slurm', 'gke', 'print')
    sweep.add_argument('--where', dest='launcher_name', default='local', choices=launchers, help=launcher)
    sweep.add_argument(
        '--cluster',
        action='append',
        default=[],
        metavar='NAME=VALUE',
        help="repeatable; --where=slurm: submitit's options, such as slurm_partition, timeout_min, gpus_per_node, nodes; "
        "--where=gke: xpk's, such as cluster, tpu-type, docker-image",
    )
    jobs = 'concurrent runs; on this machine they share the cores equally (%(default)s)'
    sweep.add_argument('--jobs', type=int, default=1, metavar='N', help=jobs)
    only = "only runs with matching names, such as 'language_xl/*', and the runs that they start from"
    sweep.add_argument('--only', metavar='PATTERN', help=only)
    sweep.add_argument('--out', help='folder of the runs (runs/NAME)')


def _add_report(add: Add) -> None:
    report = add('report', handlers.report, 'write tables and plots of run folders or of an experiment')
    report.add_argument('run_dirs', nargs='*', metavar='MODEL_DIR')
    report.add_argument('--config', metavar='FILE', help='instead of run folders: an experiment, finished or not')
    report.add_argument('--scale', help='of the experiment')
    out = "folder of report.html, report.csv and the plots (report); with --config the sweep's --out (runs/NAME)"
    report.add_argument('--out', help=out)


def _add_source(command: argparse.ArgumentParser, text: str, **more: Any) -> None:
    command.add_argument('--from', dest='source', required=True, metavar='PATH', help=text, **more)


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument('--to', dest='target', required=True, metavar='PATH', help='path of the new checkpoint')


def _add_folder(command: argparse.ArgumentParser) -> None:
    layout = "--format=huggingface: its model_type (default: the source's, else the first that can store the model)"
    command.add_argument('--layout', metavar='NAME', help=layout)
    engines = (
        f'--format=huggingface: refuse what one of these cannot compute exactly: {", ".join(ENGINES)} (transformers)'
    )
    command.add_argument('--for', dest='engines', metavar='ENGINE,...', help=engines)
    dense = (
        '--format=huggingface: experts writes a dense layer as equal experts, where that is exact (default: as it is)'
    )
    command.add_argument('--dense_layers', choices=('experts',), help=dense)


def _add_json(command: argparse.ArgumentParser, *, file: bool = False) -> None:
    command.add_argument('--json', dest='as_json', action='store_true', help='machine-readable')
    if file:
        command.add_argument('--out', metavar='FILE', help='also write the JSON to this file')


def _add_hosts(command: argparse.ArgumentParser) -> None:
    hosts = command.add_argument_group('several processes (start the same command in each; together they are one run)')
    platform = 'find the others by the platform: Cloud TPU, Slurm, Kubernetes, MPI'
    hosts.add_argument('--distributed', action='store_true', help=platform)
    hosts.add_argument('--coordinator_address', metavar='HOST:PORT', help='address of process 0')
    hosts.add_argument('--process_count', type=int, metavar='N')
    hosts.add_argument('--process_index', type=int, metavar='I')
    timeout = 'how long to wait for the others (%(default)g)'
    hosts.add_argument('--coordinator_timeout', type=float, default=300.0, metavar='SECONDS', help=timeout)
