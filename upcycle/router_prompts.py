"""Router columns from prompts: ROUTER_INIT = 'hidden' with a file of prompts for each expert [ROUTER_PROMPTS].

After mergekit-moe's gate mode `hidden`: the column of an expert points to the mean hidden state of its prompts in the source
model. mergekit 0.1.5 takes the last token of each prompt, and the states before the layer's attention; here all tokens of a
prompt count, and the states are the inputs of the layer's MLP, which its router reads.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from upcycle import files, lengths, partitioning, warning
from upcycle.checkpoints import Reader
from upcycle.checkpoints.several import readers_of
from upcycle.data.causal.prompts import Prompts, tokenizer_of
from upcycle.errors import UserError, one_line
from upcycle.models import Model, Params
from upcycle.models.activations import prompt_activations
from upcycle.streamed import streamed
from upcycle.surgery.plan import PARAMS, Surgery
from upcycle.training.source_model import Leaves, source_model, unread_params

_BATCH = 4096  # tokens with padding


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """The prompts of one expert.

    Attributes:
      path: of the file.
      sha256: of its bytes.
      prompts: tokens of each prompt.
    """

    path: str
    sha256: str
    prompts: tuple[tuple[int, ...], ...]


def read(surgery: Surgery | None, model: Model, reader: Reader) -> tuple[PromptFile, ...]:
    """Reads the files of ROUTER_PROMPTS, a prompt on each line; () if there are none.

    Args:
      surgery: of the run.
      model: the sparse model.
      reader: of the source, whose tokenizer is used; of several checkpoints that of the first.

    Raises:
      UserError: the model has no prompts, the source has no tokenizer, the number of files is wrong, or a file cannot be read.
    """
    if surgery is None or not surgery.router_prompts:
        return ()
    if surgery.operator is None:
        raise UserError('ROUTER_PROMPTS is for new routers, and EXPERT_OPERATOR is None: remove ROUTER_PROMPTS.')
    if model.prompts != 'continued':
        raise UserError(f'ROUTER_PROMPTS needs a model that continues texts, not a {model.title}: remove it.')
    experts = next(moe.num_experts for moe in model.moe_layers().values())
    columns = 1 + max(surgery.operator.router_columns(experts))
    if len(surgery.router_prompts) != columns:
        shared = '' if columns == experts else f', since {experts} experts share {columns} columns'
        raise UserError(
            f'ROUTER_PROMPTS names {len(surgery.router_prompts)} files, and routers have {columns} columns{shared}: name '
            f'{columns}, in the order of the experts.'
        )
    first = readers_of(reader)[0]
    tokenizer = tokenizer_of(first)
    if tokenizer is None:
        raise UserError(
            f'{first.path} has no tokenizer, which ROUTER_PROMPTS needs: copy tokenizer.json of the model into it.'
        )
    reads, longest = Prompts(tokenizer), lengths.longest(first)
    found = tuple(_read(files.absolute(path), reads, model, longest) for path in surgery.router_prompts)
    for i, one in enumerate(found):
        if equal := next((other for other in found[:i] if other.prompts == one.prompts), None):
            warning.once(
                f'ROUTER_PROMPTS: {one.path} has the prompts of {equal.path}, so their experts start with equal router columns.'
            )
    return found


def _read(file: epath.Path, reads: Prompts, model: Model, longest: int | None) -> PromptFile:
    try:
        content = file.read_bytes()
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or one_line(error)
        raise UserError(f'ROUTER_PROMPTS: {file} cannot be read ({reason}): name a file of UTF-8 text.') from error
    if not lines:
        raise UserError(f'ROUTER_PROMPTS: {file} is empty: write a prompt on each line.')
    prompts = tuple(tuple(reads.encode(line)) for line in lines)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f'ROUTER_PROMPTS: prompt {number} of {file} has no tokens: remove it.')
        if max(prompt) >= model.config.vocab_size:
            raise UserError(
                f'ROUTER_PROMPTS: prompt {number} of {file} has the token {max(prompt)}, and the model only '
                f'{model.config.vocab_size} tokens: the tokenizer is that of another model.'
            )
        if longest is not None and len(prompt) > longest:
            raise UserError(
                f'ROUTER_PROMPTS: prompt {number} of {file} has {len(prompt)} tokens, and the model was made for {longest}: '
                'cut it into several lines.'
            )
    return PromptFile(str(file), hashlib.sha256(content).hexdigest(), prompts)


def described(prompts: Sequence[PromptFile]) -> list[dict[str, str]]:
    """Returns the files for a receipt."""
    return [{'path': file.path, 'sha256': file.sha256} for file in prompts]


class MeanStates:
    """Mean hidden states of the experts' prompts in the source model, at the inputs of its MLPs.

    A state is the mean over the tokens of a prompt, then over the prompts of a file. The source of several checkpoints is their
    mean, or the first one if the other weights are its own (BRANCHES_REST = 'first'). All layers are computed at the first call,
    in float32, and parameters are read one at a time.

    Args:
      prompts: see `read`.
      model: the sparse model.
      surgery: of the run.
      reader: of the source.
      leaves: of the sparse model, with their shardings.
    """

    def __init__(
        self, prompts: Sequence[PromptFile], model: Model, surgery: Surgery, reader: Reader, leaves: Leaves
    ) -> None:
        self._prompts, self._leaves = prompts, leaves
        self._reader = reader if surgery.operator.averages else readers_of(reader)[0]
        self._model = source_model(model, surgery.operator.name, self._reader).with_dtype('float32')
        self._paths = tuple(model.moe_layers())

    def __call__(self, mlp: str) -> np.ndarray:
        """Returns the states (E, D) of the MLP or MoE layer at a path, a row for each file."""
        return self._states[mlp.removeprefix(PARAMS)]

    def for_target(self, target: Mapping[str, jax.Array], mlp: str) -> np.ndarray:
        """The same for `surgery.place.execute`; prompts run on the source, so that the target's leaves are not needed."""
        return self(mlp)

    @functools.cached_property
    def _states(self) -> dict[str, np.ndarray]:
        mesh = next(iter(self._leaves.values())).sharding.mesh
        batches, owners = self._batches(partitioning.batch_shards(mesh))
        means: dict[str, list[np.ndarray]] = {}
        with partitioning.use(mesh):
            sharding = partitioning.batch_sharding(mesh)
            placed = [partitioning.put_batch(batch, sharding) for batch in batches]
            params = unread_params(self._reader, self._leaves, {})
            for name, mean_BxD in streamed(self._means, params, placed):
                number, _, path = name.partition(' ')
                means.setdefault(path, [np.empty(0)] * len(batches))[int(number)] = partitioning.whole_on_host(mean_BxD)
        states = {}
        for path, parts in means.items():
            mean_PxD = np.concatenate(parts)[: len(owners)]
            states[path] = np.stack([mean_PxD[owners == e].mean(axis=0) for e in range(len(self._prompts))])
        return states

    def _batches(self, shards: int) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
        """Returns batches of one shape, and the file of each row. Rows that fill the last batch repeat a prompt."""
        rows = [prompt for file in self._prompts for prompt in file.prompts]
        owners = np.repeat(np.arange(len(self._prompts)), [len(file.prompts) for file in self._prompts])
        length = 1 << (max(map(len, rows)) - 1).bit_length()
        size = shards * -(-min(max(_BATCH // length, 1), len(rows)) // shards)
        rows += [rows[0]] * (-len(rows) % size)
        tokens_PxL, mask_PxL = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
        for row, prompt in enumerate(rows):
            tokens_PxL[row, : len(prompt)], mask_PxL[row, : len(prompt)] = prompt, True
        starts = range(0, len(rows), size)
        batches = [{'tokens': tokens_PxL[i : i + size], 'mask': mask_PxL[i : i + size]} for i in starts]
        return batches, owners

    def _means(self, params: Params, batches: Sequence[Mapping[str, jax.Array]]) -> dict[str, Any]:
        return {
            f'{number:06} {path}': mean_BxD
            for number, batch in enumerate(batches)
            for path, mean_BxD in self._means_of(params, batch['tokens'], batch['mask'])
        }

    def _means_of(self, params: Params, tokens_BxL: jax.Array, mask_BxL: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        for path, x_BxLxD in prompt_activations(self._model, params, tokens_BxL, mask_BxL, self._paths).items():
            real_BxLx1 = mask_BxL[..., None]
            yield path, (x_BxLxD * real_BxLx1).sum(axis=1) / jnp.maximum(real_BxLx1.sum(axis=1), 1)
