"""`upcycle eval`: evaluates a checkpoint."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from upcycle import configuration, files, lengths, outputs, partitioning, run_config
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.checkpoints.integrity import require_whole
from upcycle.data.causal import same_tokenizer
from upcycle.errors import UserError
from upcycle.evaluate.protocol import Subject
from upcycle.gin_data import require_data
from upcycle.gin_files import FROM_CHECKPOINT
from upcycle.metrics import plain
from upcycle.models import BatchSpec, Model
from upcycle.progress import counted
from upcycle.training import start
from upcycle.training.run import ModelRun
from upcycle.training.state import make_layout, params_from

FEW_SHOT = 'runs/few_shot.gin'
TASK_METRICS = 'runs/task_metrics.gin'


def run(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    checkpoint: str,
    *,
    as_json: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """`upcycle eval`: computes the metrics of a checkpoint on the evaluation data.

    FEW_SHOT adds few-shot probes, TASK_METRICS the metrics of seqio tasks.

    Args:
      gin_files: the configuration. If empty, or only FEW_SHOT and TASK_METRICS, the config.gin of the run folder that contains
        `checkpoint`, which is refused if it imports code: name such a file explicitly. models/from_checkpoint.gin is the model in
        `checkpoint`.
      bindings: bindings of the command line.
      checkpoint: any path that `open_checkpoint` reads.
      as_json: print JSON instead of a table.
      out: file for the JSON.

    Returns:
      The content of the JSON.

    Raises:
      UserError: the configuration or the checkpoint is wrong.
    """
    if out is not None:
        outputs.check('--out', out, outputs.Kind.FILE)
    reader = open_checkpoint(checkpoint)
    require_whole(reader.path)
    if all(file in (FEW_SHOT, TASK_METRICS) for file in gin_files):
        with config_of(checkpoint) as config:
            run = configuration.load_model([config, *gin_files], bindings)
    else:
        run = configuration.load_model(gin_files, with_checkpoint(gin_files, bindings, checkpoint))
    if run.eval_data is None:
        raise UserError('EVAL_DATASET is None: name a task, such as --gin_file=tasks/mnist5k.gin.')
    for evaluator in run.evaluators:
        evaluator.check_data(run.eval_data)
    lengths.warn_of_rows(reader, run.eval_data)
    same_tokenizer.warn(reader, run.eval_data)
    mesh = partitioning.make_mesh(run.mesh_shape, run.num_experts)
    start.check_batches(run, mesh, training=False)
    with partitioning.use(mesh):
        params, operator = params_of(run, mesh, run.eval_data.batch_spec(), reader)
        subject = Subject(run.model, run.eval_data, partitioning.batch_sharding(mesh), counted)
        metrics = {
            evaluator.name: evaluator.prepare(subject)(params)
            for evaluator in run.evaluators
            if evaluator.of_checkpoints
        }
    result = described(reader, run.model, operator) | {
        'data': run.eval_data.fingerprint(),
        'metrics': {split: {name: plain(value) for name, value in values.items()} for split, values in metrics.items()},
    }
    if jax.process_index() == 0:
        report(result, as_json, out)
    return result


def with_checkpoint(gin_files: Sequence[str], bindings: Mapping[str, str], checkpoint: str) -> Mapping[str, str]:
    """Returns the bindings; if the model is that of the checkpoint, also its path."""
    if any(file.endswith(FROM_CHECKPOINT) for file in gin_files):
        return {'INITIAL_CHECKPOINT_PATH': checkpoint, **bindings}
    return bindings


def params_of(run: ModelRun, mesh: Mesh, batch_spec: BatchSpec, reader: Reader) -> tuple[Any, str | None]:
    """Loads a checkpoint's parameters on a mesh; see `training.state.params_from`. Says if it is upcycled."""
    params, operator = params_from(run, make_layout(run, mesh, batch_spec), reader)
    if operator is not None:
        print(f'the checkpoint is dense and the model has MoE layers: upcycled by {operator!r}', file=sys.stderr)
    return params, operator


def described(reader: Reader, model: Model, operator: str | None) -> dict[str, Any]:
    """Returns what the JSON tells of a checkpoint and its model."""
    return {
        'checkpoint': str(reader.path),
        'format': reader.format,
        'step': reader.step if 'step' in reader.leaves() else None,
        'family': model.family,
        'operator': operator,
    }


def report(result: Mapping[str, Any], as_json: bool, out: str | None) -> None:
    """Writes the JSON to a file, if one is named, and prints it, or a table."""
    text = json.dumps(result, indent=1)
    if out is not None:
        outputs.write('--out', out, text + '\n')
    print(text if as_json else _metrics_table(result))


def _find_config(checkpoint: str) -> epath.Path | None:
    path = files.absolute(checkpoint)
    folders = (path, path.parent, path.parent.parent)
    return next((folder / run_config.CONFIG for folder in folders if (folder / run_config.CONFIG).is_file()), None)


def has_config(checkpoint: str) -> bool:
    """Returns whether a checkpoint is in a run folder."""
    return _find_config(checkpoint) is not None


@contextlib.contextmanager
def config_of(checkpoint: str) -> Iterator[str]:
    """Yields the path of the config.gin of the run folder that contains a checkpoint; from a bucket, of a local copy.

    Raises:
      UserError: there is no config.gin, or it imports code.
    """
    config = _find_config(checkpoint)
    if config is None:
        raise UserError(
            f'{checkpoint} is not in a run folder, so name its model and data: --gin_file=models/... '
            '(models/from_checkpoint.gin takes it from config.json), --gin_file=tasks/..., --gin_file=runs/eval.gin.'
        )
    if not files.is_remote(config):
        require_data(os.fspath(config))
        yield os.fspath(config)
        return
    # gin cannot read buckets.
    with tempfile.NamedTemporaryFile('w', suffix='.gin', encoding='utf-8') as copy:
        copy.write(config.read_text())
        copy.flush()
        require_data(copy.name, shown=os.fspath(config))
        yield copy.name


def _metrics_table(result: Mapping[str, Any]) -> str:
    """Formats one line per number; lists and per-layer metrics are only in the JSON."""
    rows = [
        (split, name, value)
        for split, metrics in result['metrics'].items()
        for name, value in metrics.items()
        if not isinstance(value, list) and (split == 'tasks' or name.count('/') < 2)
    ]
    first = max([10, *(len(split) for split, _, _ in rows)]) + 2
    width = max((len(name) for _, name, _ in rows), default=0) + 2
    lines = [f'{result["checkpoint"]}  format: {result["format"]}  step: {result["step"]}']
    return '\n'.join([*lines, *(f'{split:<{first}}{name:<{width}}{value:.6g}' for split, name, value in rows)])
