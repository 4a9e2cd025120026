"""Upcycling in memory: a dense model on the device becomes a sparse one, leaf by leaf."""

import time
from typing import Any

import jax

import upcycle
from accelerator.device import Device, LeftOutError, peak_bytes
from accelerator.steps import FAMILIES
from upcycle import configuration, cost, partitioning


def row(family: str, device: Device) -> dict[str, Any]:
    """Times `upcycle.upcycle`, function check included, and measures the most memory that it holds."""
    sizes = FAMILIES[family]
    files = [f'models/{sizes.toy if device.toy else sizes.size}.gin', f'tasks/{sizes.task}.gin', 'runs/scratch.gin']
    bindings = {'TRAIN_STEPS': 1, 'BATCH_SIZE': 1, **(sizes.toy_bindings if device.toy else {})}
    run = configuration.load_model(files, {name: repr(value) for name, value in bindings.items()})
    spec = run.train_data.batch_spec()
    init = jax.jit(lambda key: partitioning.unbox(run.model.init(key, spec)))
    experts = _experts(run.model, sizes.experts, device)
    params = jax.block_until_ready(init(jax.random.key(0)))
    sparse = upcycle.sparse(run.model, NUM_EXPERTS=experts)
    leaves = len(upcycle.plan(params, sparse).rows)
    begin = time.monotonic()
    made, receipt = upcycle.upcycle(params, sparse, key=0)
    jax.block_until_ready(made)
    seconds = time.monotonic() - begin
    layers = receipt['function_check']['layers']
    if isinstance(layers, str):
        raise ArithmeticError(layers)
    largest = max(layer['max_abs_difference_covered'] / layer['dense_rms'] for layer in layers.values())
    return {
        'sizes': f'{experts} experts, {leaves} leaves, {cost.num_bytes(params) / 1e9:.2f} GB to {cost.num_bytes(made) / 1e9:.2f}',
        'time': seconds,
        'memory_gb': peak_bytes() / 1e9,
        'difference': largest,
    }


def _experts(model: Any, choices: tuple[int, ...], device: Device) -> int:
    """Returns the most experts whose parameters fit together with the dense model and two more leaves."""
    if device.memory is None:
        return 4
    for experts in (*choices, 2):
        shapes = upcycle.plan(model, upcycle.sparse(model, NUM_EXPERTS=experts)).rows
        dense = upcycle.plan(model, model, upcycle.Surgery(operator=None)).rows
        sizes, held = ([4 * _size(row.shape) for row in rows] for rows in (shapes, dense))
        if sum(sizes) + sum(held) + 2 * max(sizes) < 0.9 * device.memory:
            return experts
    raise LeftOutError(f'{device.memory / 1e9:.0f} GB do not hold the dense and the smallest sparse model.')


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
