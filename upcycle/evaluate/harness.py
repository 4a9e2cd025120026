"""The tasks of lm-eval (EleutherAI's harness) on a model of ours. Importing this module imports `lm_eval`."""

import contextlib
import fnmatch
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from upcycle.data.causal.tokenizers import Tokenizer
from upcycle.errors import UserError, one_line
from upcycle.evaluate import scoring
from upcycle.evaluate.scoring import Scored, Scorer
from upcycle.models.generation import Sampling

_SAMPLING = ('temperature', 'top_k', 'top_p')
_DRAWS = 1000  # of the bootstrap, for standard errors that have no formula
_SEED = 1234  # of few-shot examples, as lm-eval's command has it


class HarnessModel(TemplateLM):
    """A model of ours as lm-eval calls it. Texts are encoded as by its class `hf`.

    Args:
      scorer: scores and continues tokens.
      tokenizer: of the model.
      vocabulary_size: of the model.
      eos_ids: tokens that end a generated text.

    Raises:
      UserError: the tokenizer has neither BOS nor EOS.
    """

    max_gen_toks = 256  # of tasks that do not set it, as lm-eval has it

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, vocabulary_size: int, eos_ids: Sequence[int]):
        super().__init__()
        identity = tokenizer.identity
        prefix = identity.eos_id if identity.bos_id is None else identity.bos_id
        if prefix is None:
            raise UserError(
                'the tokenizer has neither BOS nor EOS, one of which begins a text: name another --tokenizer.'
            )
        self._scorer, self._tokenizer, self._vocabulary_size = scorer, tokenizer, vocabulary_size
        self._prefix, self._begin = prefix, tokenizer.decode([prefix])
        self._eos_ids = tuple(eos_ids)

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return self._scorer.max_length

    @property
    def eot_token_id(self) -> int | None:
        """EOS."""
        return self._tokenizer.identity.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none: BOS, else EOS."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the tokens of a text, with BOS if the tokenizer adds it; None: unless the text begins with it.

        Raises:
          UserError: a token is not of the model's vocabulary.
        """
        identity = self._tokenizer.identity
        tokens = self._tokenizer.encode([string])[0].tolist()
        if add_special_tokens is None:
            add_special_tokens = not (self._begin and string.startswith(self._begin))
        if add_special_tokens and identity.adds_bos:
            tokens.insert(0, identity.bos_id)
        if max(tokens, default=0) >= self._vocabulary_size:
            raise UserError(
                f'a text of the tasks has the token {max(tokens)}, and the model only {self._vocabulary_size} tokens: name its '
                'own tokenizer with --tokenizer.'
            )
        return tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See `TemplateLM`."""
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[Scored]:
        return self._scorer.log_likelihoods([pair for _, *pair in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See `LM`. As in the class `hf`, a BOS that the tokenizer adds is scored too."""
        return self._scorer.rolling([self.tok_encode(request.args[0]) for request in requests], self._prefix)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See `LM`.

        Raises:
          UserError: a task's `generation_kwargs` ask for what generation here cannot do.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [''] * len(requests)
        for seed, numbers in enumerate(groups.values()):
            stops, sampling, most = self._wishes(requests[numbers[0]])
            # A text without tokens has the beginning of one as its context.
            prompts = [self.tok_encode(requests[number].args[0]) or [self._prefix] for number in numbers]
            made = self._scorer.generate_until(prompts, stops, sampling, most, self._tokenizer.decode, seed)
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
        return texts

    def _wishes(self, request: Instance) -> tuple[list[str], Sampling, int]:
        """Returns the stop strings, the sampling and the most new tokens of a request."""
        kwargs = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
        eos = None if self.eot_token_id is None else self._tokenizer.decode([self.eot_token_id])
        stops, most = handle_stop_sequences(kwargs.pop('until'), eos=eos), kwargs.pop('max_gen_toks')
        chosen = {name: kwargs.pop(name) for name in _SAMPLING if name in kwargs}
        if not kwargs.pop('do_sample'):
            chosen = {}
        if others := {name: value for name, value in kwargs.items() if (name, value) != ('num_beams', 1)}:
            name, value = next(iter(others.items()))
            raise UserError(
                f'the task {request.task_name} has {name} = {value!r} in its generation_kwargs, and generation here has only '
                f'do_sample, {", ".join(_SAMPLING)}, max_gen_toks and until: remove it.'
            )
        return stops, Sampling(**chosen, eos_ids=self._eos_ids), most


def load_tasks(names: str, include_path: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """Loads tasks of lm-eval, and their data.

    Args:
      names: of tasks, groups or tags, separated by commas; may have wildcards.
      include_path: folder of further tasks in lm-eval's YAML.
      num_fewshot: solved examples in front of each question; None: the tasks' own.

    Returns:
      What `lm_eval.evaluator.evaluate` takes.

    Raises:
      UserError: there is no such folder or task, or a task or its data cannot be loaded.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f'--include_path={include_path} is not a folder: name one with tasks in YAML.')
    wanted = [name for part in names.split(',') if (name := part.strip())]
    if not wanted:
        raise UserError(f'--lm_eval={names} names no task: name some, separated by commas.')
    manager = _manager(wanted, include_path)
    found: dict[str, None] = {}
    for pattern in wanted:
        matching = fnmatch.filter(manager.all_tasks, pattern)
        if not matching:
            there = '' if include_path is None else f' and {include_path}'
            raise UserError(
                f'--lm_eval: lm-eval {lm_eval.__version__}{there} has no task {pattern!r}: `lm-eval ls tasks` lists its tasks, '
                'and --include_path names a folder of others.'
            )
        found |= dict.fromkeys(matching)
    try:
        loaded = manager.load([*found])
    except Exception as error:  # of YAML, of code that it names, of the library that reads the data
        raise UserError(f'--lm_eval={names} cannot be loaded: {one_line(error)}') from error
    for task in loaded['tasks'].values():
        own = task.get_config('num_fewshot')
        # As in lm-eval: a task may fix 0.
        if own != 0:
            task.set_config('num_fewshot', (own or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _manager(wanted: Sequence[str], include_path: str | None) -> TaskManager:
    """Indexes tasks: only those of the folder if it has all, since lm-eval's own are many thousands."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if wanted and {*wanted} <= {*own.all_subtasks}:
            return own
    return TaskManager(include_path=include_path)


def evaluate(model: TemplateLM, tasks: Mapping[str, Any], limit: float | None = None) -> dict[str, Any]:
    """Evaluates a model.

    Args:
      model: the model.
      tasks: from `load_tasks`.
      limit: examples per task, or if below 1 the share of them; None: all.

    Returns:
      `metrics` by task or group, of their scalars, those of a filter as 'METRIC,FILTER'; `lm_eval`: the version of the library,
      and by task `versions`, `n-shot` and `n-samples`.

    Raises:
      UserError: a task asks for what the model cannot do.
    """
    # Its worker processes would be forks of one with threads of JAX.
    os.environ['DISABLE_MULTIPROC'] = '1'
    try:
        with contextlib.redirect_stdout(sys.stderr):
            results = evaluator.evaluate(model, dict(tasks), limit=limit, bootstrap_iters=_DRAWS, log_samples=False)
    except UserError:
        raise
    except Exception as error:
        if any(frame.filename == scoring.__file__ for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise UserError(f'--lm_eval: the tasks cannot be evaluated: {one_line(error)}') from error
    about = {name: dict(results[name]) for name in ('versions', 'n-shot', 'n-samples')}
    return {
        'lm_eval': {'version': lm_eval.__version__, **about},
        'metrics': {task: _scalars(values) for task, values in results['results'].items()},
    }


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(',none'): float(value)
        for name, value in values.items()
        if ',' in name and not isinstance(value, str)
    }
