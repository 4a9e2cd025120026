"""`upcycle inspect`: shows the content of a checkpoint of any format, as tables or JSON."""

import functools
import json
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
    """Prints the content of a checkpoint.

    Args:
      path: of the checkpoint.
      as_json: print JSON with all leaves and metadata.
      all_leaves: list all leaves, not only the components.
      quick: do not read weights or compare experts.

    Returns:
      The exit status: 1 if the receipt does not match the checkpoint, else 0.
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
    """Returns the content of the tables as JSON: sizes by component, and statistics of experts."""
    leaves = reader.leaves()
    components: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        entry = components.setdefault(component(name), {'leaves': 0, 'numbers': 0, 'bytes': 0, 'dtypes': []})
        entry['leaves'] += 1
        entry['numbers'] += leaf.size
        entry['bytes'] += leaf.size * leaf.dtype.itemsize
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
        'parameters': sum(leaf.size for name, leaf in leaves.items() if name.startswith('params/')),
        'bytes': sum(entry['bytes'] for entry in components.values()),
        'components': components,
        'moe_layers': {layer: {} if quick else layer_statistics(reader, layer) for layer in layers},
        'not_read': metadata.get('not_read', {}),
        'receipt_mismatches': [] if receipt is None else mismatches(receipt, leaves),
    }


def component(name: str) -> str:
    """Returns the component of a leaf, such as 'layers_*/attention'; the same for all layers."""
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
    """Returns a pattern of the names of numbered modules, and the names of modules within a layer, for all families."""
    kinds = tuple(registry.families())
    blocks = '|'.join(block for kind in kinds for block in kind.blocks)
    return blocks, tuple(component for kind in kinds for component in kind.components)


def layer_statistics(reader: Reader, layer: str) -> dict[str, Any]:
    """Computes the similarity of the experts of one MoE layer, and statistics of its router.

    Args:
      reader: the checkpoint.
      layer: its path, such as 'params/layers_1/mlp'.

    Returns:
      `num_experts`; `cosine`: cosine between the parameter vectors of each pair of experts (`mean`, `min`, `max`; 1 for copies);
      `router`: `mean`, `std` and `max_abs` of its weights, and `column_cosine`, the mean cosine between columns of two experts;
      missing if experts are merged. For an incomplete layer, `num_experts` is 0 or the list of differing numbers, and `cosine` is
      missing.
    """
    leaves = reader.leaves()
    experts = [name for name in leaves if name.startswith(f'{layer}/expert/')]
    counts = sorted({leaves[name].shape[0] if leaves[name].shape else 0 for name in experts})
    statistics: dict[str, Any] = {'num_experts': counts[0] if len(counts) == 1 else counts or 0}
    if len(counts) == 1 and counts[0]:
        gram = 0.0
        for name in experts:
            value_ExN = np.asarray(reader.read(name), np.float32).reshape(counts[0], -1)
            gram = gram + (value_ExN @ value_ExN.T).astype(np.float64)
        statistics['cosine'] = _pairs(gram)
    kernels = [name for name in leaves if name.startswith(f'{layer}/router/') and name.endswith('kernel')]
    if kernels and len(leaves[kernels[0]].shape) == 2:
        router = np.asarray(reader.read(kernels[0]), np.float64)
        statistics['router'] = {
            'mean': float(router.mean()),
            'std': float(router.std()),
            'max_abs': float(np.abs(router).max()),
            'column_cosine': _pairs(router.T @ router)['mean'],
        }
    return statistics


def _pairs(gram: np.ndarray) -> dict[str, float]:
    """Summarises the cosines of all pairs; `gram`: inner products."""
    norms = np.sqrt(np.diag(gram))
    cosine = gram / np.maximum(np.outer(norms, norms), 1e-300)
    pairs = cosine[np.triu_indices(len(gram), 1)] if len(gram) > 1 else np.ones(1)
    return {'mean': float(pairs.mean()), 'min': float(pairs.min()), 'max': float(pairs.max())}


def _show(facts: Mapping[str, Any], reader: Reader, all_leaves: bool) -> None:
    from upcycle import tables

    console = tables.console(160)
    step = 'unknown' if facts['step'] is None else facts['step']
    console.print(f'{facts["path"]}  format: {facts["format"]}  step: {step}', soft_wrap=True)
    sizes = tables.table('component', 'leaves', 'numbers', 'MB', 'dtype')
    for name, entry in facts['components'].items():
        megabytes, dtypes = f'{entry["bytes"] / 1e6:,.2f}', ', '.join(entry['dtypes'])
        sizes.add_row(name, str(entry['leaves']), f'{entry["numbers"]:,}', megabytes, dtypes)
    parameters = f'{facts["parameters"]:,} of them parameters'
    sizes.add_row('in all', str(facts['num_leaves']), parameters, f'{facts["bytes"] / 1e6:,.2f}', '')
    console.print(sizes)
    if facts['facts']:
        model = ', '.join(f'{name} = {schema.shown(value)}' for name, value in facts['facts'].items())
        console.print(f'model: {model}', soft_wrap=True)
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

    of_experts, of_router = ('cosine of pairs', 'smallest', 'largest'), ('router mean', 'std', 'largest', 'cosine')
    table = tables.table('MoE layer', 'experts', *of_experts, *of_router)
    for layer, statistics in layers.items():
        cosine, router = statistics.get('cosine', {}), statistics.get('router', {})
        values = [cosine.get(name) for name in ('mean', 'min', 'max')]
        values += [router.get(name) for name in ('mean', 'std', 'max_abs', 'column_cosine')]
        shown = ('' if value is None else f'{value:.4f}' for value in values)
        table.add_row(layer.removeprefix('params/'), str(statistics['num_experts']), *shown)
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
        whole = ', '.join(f'{name} {value:.4f}' for name, value in whole.items())
    if whole is not None:
        console.print(f'whole model: {whole}', soft_wrap=True)
    layers = check.get('layers')
    for layer, result in layers.items() if isinstance(layers, Mapping) else ():
        shown = ', '.join(f'{name} {value:.3g}' for name, value in result.items() if isinstance(value, int | float))
        console.print(f'  {layer}: {shown}', soft_wrap=True)
