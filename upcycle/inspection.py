"""`upcycle inspect`: what a checkpoint of any format holds, as tables or JSON."""

import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from upcycle import schema
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.leaf_names import grouped, not_read
from upcycle.models import identify, registry
from upcycle.surgery.receipt import mismatches


def inspect(path: str, *, as_json: bool = False, all_leaves: bool = False, quick: bool = False) -> int:
    """Prints what a checkpoint holds.

    Args:
      path: of the checkpoint.
      as_json: machine-readable, with every leaf and all metadata.
      all_leaves: list every leaf, not only the components.
      quick: read no weights, and so compare no experts.

    Returns:
      Exit code: 1 where its receipt does not match it, else 0.
    """
    reader = open_checkpoint(path)
    facts = describe(reader, quick=quick)
    if as_json:
        leaves = {name: {'shape': list(leaf.shape), 'dtype': leaf.dtype.name} for name, leaf in reader.leaves().items()}
        print(json.dumps({**facts, 'leaves': leaves, 'metadata': dict(reader.metadata)}, indent=1))
    else:
        _show(facts, reader, all_leaves)
    return 1 if facts['receipt_mismatches'] else 0


def describe(reader: Reader, *, quick: bool = False) -> dict[str, Any]:
    """The facts behind the tables, as JSON: sizes by component, and of an MoE checkpoint its experts and receipt."""
    leaves = reader.leaves()
    components: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        size = math.prod(leaf.shape)
        entry = components.setdefault(component(name), {'leaves': 0, 'numbers': 0, 'bytes': 0, 'dtypes': []})
        entry['leaves'] += 1
        entry['numbers'] += size
        entry['bytes'] += size * leaf.dtype.itemsize
        if leaf.dtype.name not in entry['dtypes']:
            entry['dtypes'].append(leaf.dtype.name)
    metadata = reader.metadata
    receipt = metadata.get('receipt')
    layers = identify.moe_layers(leaves)
    return {
        'path': str(reader.path),
        'format': reader.format,
        'family': metadata.get('family'),
        'step': reader.step,
        'facts': identify.facts_of(metadata),
        'num_leaves': len(leaves),
        'parameters': sum(math.prod(leaf.shape) for name, leaf in leaves.items() if name.startswith('params/')),
        'bytes': sum(entry['bytes'] for entry in components.values()),
        'components': components,
        'moe_layers': {layer: {} if quick else layer_statistics(reader, layer) for layer in layers},
        'not_read': metadata.get('not_read', {}),
        'receipt_mismatches': [] if receipt is None else mismatches(receipt, leaves),
    }


def component(name: str) -> str:
    """What a leaf is a part of, the same for every layer: 'layers_*/attention'."""
    top, *segments = name.split('/')
    if top != 'params':
        return top
    blocks, components = _modules()
    segments = [re.sub(rf'^({blocks})_\d+$', r'\1_*', segment) for segment in segments]
    for names in (('expert',), ('router',), components):
        for i, segment in enumerate(segments):
            if segment in names:
                return '/'.join(segments[: i + 1])
    if segments[-1] in ('scale', 'bias') and len(segments) > 1 and 'norm' in segments[-2].lower():
        return '/'.join([*segments[:-2], 'norms'])
    return '/'.join(segments[:-1]) or segments[-1]


@functools.cache
def _modules() -> tuple[str, tuple[str, ...]]:
    """A pattern of the numbered modules' names, and the names of the modules within a layer, in models of any family."""
    kinds = tuple(registry.families())
    blocks = '|'.join(block for kind in kinds for block in kind.blocks)
    return blocks, tuple(component for kind in kinds for component in kind.components)


def layer_statistics(reader: Reader, layer: str) -> dict[str, Any]:
    """How alike the experts of one MoE layer are, and how large its router's weights.

    Args:
      reader: the checkpoint.
      layer: its path, such as 'params/layers_1/mlp'.

    Returns:
      `num_experts`; `cosine` between the whole parameter vectors of each pair of experts (`mean`, `min`, `max`; 1: copies);
      `router`: `mean`, `std` and `max_abs` of its weights, and the mean cosine between two experts' columns; a layer whose
      experts are merged has none. A layer that is not whole has what can be told: 0 experts, or the numbers that its leaves
      disagree in, and no `cosine`.
    """
    leaves = reader.leaves()
    experts = [name for name in leaves if name.startswith(f'{layer}/expert/')]
    counts = sorted({leaves[name].shape[0] if leaves[name].shape else 0 for name in experts})
    found: dict[str, Any] = {'num_experts': counts[0] if len(counts) == 1 else counts or 0}
    if len(counts) == 1 and counts[0]:
        gram = 0.0
        for name in experts:
            value_ExN = np.asarray(reader.read(name), np.float32).reshape(counts[0], -1)
            gram = gram + (value_ExN @ value_ExN.T).astype(np.float64)
        found['cosine'] = _pairs(gram)
    kernels = [name for name in leaves if name.startswith(f'{layer}/router/') and name.endswith('kernel')]
    if kernels and len(leaves[kernels[0]].shape) == 2:
        router = np.asarray(reader.read(kernels[0]), np.float64)
        found['router'] = {
            'mean': float(router.mean()),
            'std': float(router.std()),
            'max_abs': float(np.abs(router).max()),
            'column_cosine': _pairs(router.T @ router)['mean'],
        }
    return found


def _pairs(gram: np.ndarray) -> dict[str, float]:
    """Cosines of all pairs, from their products."""
    norms = np.sqrt(np.diag(gram))
    cosine = gram / np.maximum(np.outer(norms, norms), 1e-300)
    pairs = cosine[np.triu_indices(len(gram), 1)]
    if not len(pairs):
        return {'mean': 1.0, 'min': 1.0, 'max': 1.0}
    return {'mean': float(pairs.mean()), 'min': float(pairs.min()), 'max': float(pairs.max())}


def _show(facts: Mapping[str, Any], reader: Reader, all_leaves: bool) -> None:
    from upcycle import tables

    console = tables.console(160)
    step = 'unknown' if facts['step'] is None else facts['step']
    console.print(f'{facts["path"]}  format: {facts["format"]}  step: {step}', soft_wrap=True)
    numbers = tables.table('component', 'leaves', 'numbers', 'MB', 'dtype')
    for name, entry in facts['components'].items():
        numbers.add_row(
            name,
            str(entry['leaves']),
            f'{entry["numbers"]:,}',
            f'{entry["bytes"] / 1e6:,.2f}',
            ', '.join(entry['dtypes']),
        )
    numbers.add_row(
        'in all',
        str(facts['num_leaves']),
        f'{facts["parameters"]:,} of them parameters',
        f'{facts["bytes"] / 1e6:,.2f}',
        '',
    )
    console.print(numbers)
    if facts['facts']:
        console.print(
            'model: ' + ', '.join(f'{name} = {schema.shown(value)}' for name, value in facts['facts'].items()),
            soft_wrap=True,
        )
    if all_leaves:
        table = tables.table('leaf', 'shape', 'dtype')
        for name, leaf in reader.leaves().items():
            table.add_row(name, str(tuple(leaf.shape)), leaf.dtype.name)
        console.print(table)
    for line in not_read(facts):
        console.print(line, soft_wrap=True)
    if any(facts['moe_layers'].values()):
        console.print(_experts_table(facts['moe_layers']))
    if (receipt := reader.metadata.get('receipt')) is not None:
        _show_receipt(console, receipt)
    for difference in grouped(facts['receipt_mismatches']):
        console.print(f'the receipt does not match the checkpoint: {difference}', soft_wrap=True)


def _experts_table(layers: Mapping[str, Mapping[str, Any]]):
    from upcycle import tables

    table = tables.table(
        'MoE layer',
        'experts',
        'cosine of pairs',
        'smallest',
        'largest',
        'router mean',
        'std',
        'largest',
        'cosine',
    )
    for layer, found in layers.items():
        cosine, router = found.get('cosine', {}), found.get('router', {})
        values = [cosine.get(name) for name in ('mean', 'min', 'max')]
        values += [router.get(name) for name in ('mean', 'std', 'max_abs', 'column_cosine')]
        shown = ('' if value is None else f'{value:.4f}' for value in values)
        table.add_row(layer.removeprefix('params/'), str(found['num_experts']), *shown)
    return table


def _show_receipt(console: Any, receipt: Mapping[str, Any]) -> None:
    source = receipt['source']
    console.print(
        f'receipt: by {receipt["tool"]} from {source["path"]} ({source["format"]}, step {source["step"]}); operator '
        f'{receipt["operator"]}, router {receipt["router_init"]}, optimizer state {receipt["optimizer_state"]}, seed '
        f'{receipt["seed"]}',
        soft_wrap=True,
    )
    check = receipt.get('function_check', {})
    whole = check.get('whole_model')
    if isinstance(whole, Mapping):
        console.print(
            'whole model: ' + ', '.join(f'{name} {value:.4f}' for name, value in whole.items()), soft_wrap=True
        )
    elif whole is not None:
        console.print(f'whole model: {whole}')
    layers = check.get('layers')
    for layer, found in layers.items() if isinstance(layers, Mapping) else ():
        shown = ', '.join(f'{name} {value:.3g}' for name, value in found.items() if isinstance(value, int | float))
        console.print(f'  {layer}: {shown}', soft_wrap=True)
