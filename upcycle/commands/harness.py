"""`upcycle eval --lm_eval`: evaluates a checkpoint on tasks of lm-eval."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from upcycle import configuration, lengths, outputs, partitioning
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.checkpoints.integrity import require_whole
from upcycle.commands import evaluate
from upcycle.data.causal.prompts import folders_of, require_tokenizer, stop_tokens
from upcycle.data.causal.tokenizers import open_tokenizer
from upcycle.errors import UserError
from upcycle.extras import require
from upcycle.gin_files import FROM_CHECKPOINT
from upcycle.models import Model

EXTRA = 'lm_eval'
_NO_DATA = {'TRAIN_DATASET': 'None', 'EVAL_DATASET': 'None'}
_LENGTH = 2048  # of a model that does not tell it, as in lm-eval


def run(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    checkpoint: str,
    tasks: str,
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    tokenizer: str | None = None,
    as_json: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """`upcycle eval --lm_eval`: computes the metrics of tasks of lm-eval.

    Args:
      gin_files: the configuration. If empty, the model and mesh of the run folder that contains `checkpoint`; outside of one, the
        model in `checkpoint`, in float32.
      bindings: bindings of the command line. No data is read.
      checkpoint: any path that `open_checkpoint` reads.
      tasks, include_path, num_fewshot: see `evaluate.harness.load_tasks`.
      limit: see `evaluate.harness.evaluate`.
      batch_size: rows of a batch; rounded up to the parts of the mesh.
      max_length: the most tokens that the model reads at once; None: what the model was made for, else that of the run's rows.
      tokenizer: its path, or 'bytes'; None: the checkpoint's.
      as_json: print JSON instead of a table.
      out: file for the JSON.

    Returns:
      The content of the JSON.

    Raises:
      UserError: lm-eval is not installed; a task, an option, the configuration or the checkpoint is wrong.
    """
    _check(num_fewshot, limit, batch_size, max_length)
    if out is not None:
        outputs.check('--out', out, outputs.Kind.FILE)
    require('lm_eval', '--lm_eval', EXTRA)
    from upcycle.evaluate import harness
    from upcycle.evaluate.scoring import Scorer

    reader = open_checkpoint(checkpoint)
    require_whole(reader.path)
    with _configured(gin_files, bindings, checkpoint) as (files, values):
        model_run = configuration.load_model(files, values)
    _require_continuing(model_run.model)
    reads = open_tokenizer(require_tokenizer(reader, tokenizer))
    length = _longest(reader) if max_length is None else max_length
    lengths.warn(reader, length, f'--max_length={length}', 'lower it')
    loaded = harness.load_tasks(tasks, include_path, num_fewshot)
    mesh = partitioning.make_mesh(model_run.mesh_shape, model_run.num_experts)
    with partitioning.use(mesh):
        params, operator = evaluate.params_of(model_run, mesh, model_run.model.smallest_batch(), reader)
        parts = partitioning.batch_shards(mesh)
        rows = -(-batch_size // parts) * parts
        scorer = Scorer(model_run.model, params, partitioning.batch_sharding(mesh), rows, length)
        eos_ids = stop_tokens(folders_of(reader), reads)
        model = harness.HarnessModel(scorer, reads, model_run.model.config.vocab_size, eos_ids)
        found = harness.evaluate(model, loaded, limit)
    about = {'limit': limit, 'max_length': length, 'batch_size': rows}
    result = evaluate.described(reader, model_run.model, operator) | {'lm_eval': found['lm_eval'] | about}
    result['metrics'] = found['metrics']
    if jax.process_index() == 0:
        evaluate.report(result, as_json, out)
    return result


def _check(num_fewshot: int | None, limit: float | None, batch_size: int, max_length: int | None) -> None:
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f'--num_fewshot={num_fewshot} must be at least 0.')
    if limit is not None and not 0 < limit < float('inf'):
        raise UserError(f'--limit={limit:g} must be above 0: a number of examples, or below 1 a share of them.')
    for name, value in (('batch_size', batch_size), ('max_length', max_length)):
        if value is not None and value < 1:
            raise UserError(f'--{name}={value} must be at least 1.')


@contextlib.contextmanager
def _configured(
    gin_files: Sequence[str], bindings: Mapping[str, str], checkpoint: str
) -> Iterator[tuple[Sequence[str], Mapping[str, str]]]:
    """Yields gin files and bindings of a model without data."""
    if gin_files:
        yield gin_files, {**evaluate.with_checkpoint(gin_files, bindings, checkpoint), **_NO_DATA}
    elif evaluate.has_config(checkpoint):
        with evaluate.config_of(checkpoint) as config:
            yield [config], {'Run.train_data': 'None', 'Run.eval_data': 'None', **bindings}
    else:
        of_folder = {'INITIAL_CHECKPOINT_PATH': checkpoint, 'ACTIVATION_DTYPE': 'float32'}
        yield [FROM_CHECKPOINT, 'runs/eval.gin'], {**of_folder, **bindings, **_NO_DATA}


def _require_continuing(model: Model) -> None:
    if model.prompts != 'continued':
        raise UserError(
            f'--lm_eval scores texts that continue a prompt, and this is a {model.title}: name a language model.'
        )


def _longest(reader: Reader) -> int:
    """Returns the most tokens that a model reads at once."""
    if (most := lengths.longest(reader)) is not None:
        return most
    of_run = getattr(reader, 'data', {}).get('fingerprint', {}).get('sequence_length')
    return of_run if isinstance(of_run, int) else _LENGTH
