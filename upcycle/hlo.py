"""Counts matrix products and collectives in the text of a compiled program, loops included.

XLA's cost analysis counts the body of a loop once. Here every computation is weighted by how often it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable

from upcycle.kernel_steps import NotCountedError
from upcycle.kernels import Cost, Signature

# Bytes of one element.
_BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4,
    's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
COLLECTIVES = ('all-to-all', 'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute')

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"(?:[^}]*"bytes_accessed":"(\d+)")?')
_TYPE = re.compile(r'\b([a-z]\w*\[[\d,]*\])')
_METADATA = re.compile(r'kernel_metadata=\{\n(?:".*\n)*\}')  # spans lines
CostOf = Callable[[Signature], Cost | None]
GRID = 'grid'  # how the cost of a kernel was counted
_UNKNOWN = 2**63 - 1  # cycles of an operation that the compiler does not estimate
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program."""

    name: str
    result: str
    kind: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one step.

    Attributes:
      count: number of executions.
      operand_bytes: input of one device.
      result_bytes: output of one device.
      wire_bytes: sent by one device, with the usual ring or direct algorithm.
    """

    count: int = 0
    operand_bytes: int = 0
    result_bytes: int = 0
    wire_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class KernelCalls:
    """Calls of a kernel in one step, which XLA's own counts of a program do not cover.

    Attributes:
      count: number of executions.
      flops: of matrix products.
      bytes: read and written in memory.
      counted: `GRID`, or why its author's estimate had to do, with at least the bytes of operands and results.
    """

    count: int
    flops: float
    bytes: float
    counted: str


def not_traced(signature: Signature) -> None:
    """The cost of any kernel of a program that was not traced."""
    del signature


class Program:
    """A compiled program, from its `as_text()`."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Operation]] = {}
        self._shapes: dict[str, str] = {}
        self._entry = ''
        partitions = re.search(r'^HloModule .*num_partitions=(\d+)', text, re.MULTILINE)
        self._devices = int(partitions[1]) if partitions else 1
        here: list[Operation] = []
        for line in _METADATA.sub('', text).splitlines():
            if match := _COMPUTATION.match(line):
                here = self._computations[match[2]] = []
                self._entry = match[2] if match[1] else self._entry
            elif match := _OPERATION.match(line):
                operation = Operation(*match.groups())
                here.append(operation)
                self._shapes[operation.name] = operation.result
        self.times = self._executions()

    def operations(self):
        """Yields every operation and the number of its executions."""
        for name, operations in self._computations.items():
            for operation in operations:
                yield operation, self.times[name]

    def collectives(self) -> dict[str, Collective]:
        """Returns collectives by kind. An all-reduce of which each device keeps a part counts as a reduce-scatter."""
        total: dict[str, Collective] = {}
        for computation, operations in self._computations.items():
            for operation in operations:
                kind = operation.kind.removesuffix('-start')
                if kind not in COLLECTIVES or not self.times[computation]:
                    continue
                operands = sum(_bytes(self._shapes[name]) for name in _operands(operation))
                result = operands if operation.kind.endswith('-start') else _bytes(operation.result)
                group = _group_size(operation) or self._devices
                if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
                    kind, result = 'reduce-scatter', operands // group
                if kind == 'all-gather':
                    result = operands * group
                share = (group - 1) / group
                wire = {
                    'all-to-all': operands * share,
                    'all-gather': result * share,
                    'all-reduce': 2 * operands * share,
                    'reduce-scatter': operands * share,
                    'collective-permute': operands,
                }[kind]
                old, times = total.get(kind, Collective()), self.times[computation]
                total[kind] = Collective(
                    old.count + times,
                    old.operand_bytes + times * operands,
                    old.result_bytes + times * result,
                    old.wire_bytes + times * wire,
                )
        return total

    def matmul_flops(self, cost: CostOf = not_traced) -> float:
        """Counts the FLOPs of all matrix products, those of kernels included (see `kernels`); a multiply-add counts as 2."""
        total = sum(calls.flops for calls in self.kernels(cost).values())
        for operation, times in self.operations():
            if times and operation.kind in ('convolution', 'dot'):
                left, right = (_dimensions(self._shapes[name]) for name in _operands(operation)[:2])
                count = _dot_flops if operation.kind == 'dot' else _convolution_flops
                total += times * count(left, right, _dimensions(operation.result), operation.rest)
        return total

    def kernels(self, cost: CostOf = not_traced) -> dict[str, KernelCalls]:
        """Returns the calls of TPU kernels by name, those of the compiler (`ragged_dot`) included.

        Args:
          cost: gives the cost of a kernel, such as `Kernels.cost`; None for one that was not traced. It may raise
            `NotCountedError`.
        """
        total: dict[str, KernelCalls] = {}
        for operation, times in self.operations():
            ours = 'custom_call_target="tpu_custom_call"' in operation.rest
            if times and operation.kind == 'custom-call' and (ours or _ESTIMATE.search(operation.rest)):
                name, flops, size, counted = self._call(operation, cost)
                old = total.get(name, KernelCalls(0, 0.0, 0.0, GRID))
                total[name] = KernelCalls(
                    old.count + times,
                    old.flops + times * flops,
                    old.bytes + times * size,
                    counted if old.counted == GRID else old.counted,
                )
        return total

    def estimated_bytes(self) -> int:
        """Returns the bytes that XLA's own count takes from estimates of kernels, a loop counted once."""
        return sum(
            int(match[2] or 0)
            for operation, times in self.operations()
            if times and operation.kind == 'custom-call' and (match := _ESTIMATE.search(operation.rest))
        )

    def _call(self, operation: Operation, cost: CostOf) -> tuple[str, float, float, str]:
        """Returns name, FLOPs and bytes of one call, and how they were counted."""
        constraints = re.search(r'operand_layout_constraints=\{(.*?)\}, \w+=', operation.rest)
        operands = constraints[1] if constraints else ' '.join(self._shapes[name] for name in _operands(operation))
        signature = tuple(_TYPE.findall(operands)), tuple(_TYPE.findall(operation.result))
        try:
            if found := cost(signature):
                return found.name, found.flops, found.bytes, GRID
            reason = 'it is not a Pallas kernel of the traced program'
        except NotCountedError as error:
            reason = str(error)
        estimate = _ESTIMATE.search(operation.rest)
        flops, size = (int(number or 0) for number in estimate.groups()) if estimate else (0, 0)
        size = max(size, _bytes(operands) + _bytes(operation.result))
        return re.sub(r'\.\d+$', '', operation.name), flops, size, reason

    def estimated_cycles(self) -> int:
        """Returns the TPU compiler's estimate of a step's cycles outside collectives and kernels; 0 if it has none."""
        return sum(
            times * int(match[1])
            for operation, times in self.operations()
            if (match := re.search(r'"estimated_cycles":"(\d+)"', operation.rest)) and int(match[1]) != _UNKNOWN
        )

    def _executions(self) -> dict[str, int]:
        """Counts the runs of each computation in one step, as if a conditional ran all of its branches."""
        times: dict[str, int] = collections.defaultdict(int)

        def visit(name: str, count: int) -> None:
            times[name] += count
            for operation in self._computations[name]:
                inner = count * (self._trips(operation) if operation.kind == 'while' else 1)
                branches = _BRANCHES.search(operation.rest)
                named = re.findall(r'[\w.\-]+', branches[1]) if branches else []
                for called in (*_CALLED.findall(operation.rest), *named):
                    if called in self._computations:
                        visit(called, inner)

        visit(self._entry, 1)
        return times

    def _trips(self, loop: Operation) -> int:
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(match[1])
        condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]
        bounds = [
            int(operation.rest.split(')')[0])
            for operation in self._computations[condition]
            if operation.kind == 'constant' and operation.result.startswith('s32[]')
        ]
        return max(bounds, default=1)


def _operands(operation: Operation) -> list[str]:
    return re.findall(r'%([\w.\-]+)', operation.rest.split('),')[0])


def _dimensions(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(n) for n in found[2].split(',')] if found and found[2] else []


def _bytes(shape: str) -> int:
    return sum(
        _BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(',') if n) for kind, sizes in _ARRAY.findall(shape)
    )


def _group_size(operation: Operation) -> int | None:
    """Returns the number of devices in a collective's group; None for all."""
    if match := re.search(r'replica_groups=\{\{([\d,]+)\}', operation.rest):
        return len(match[1].split(','))
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', operation.rest):
        return int(match[2])
    if match := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}', operation.rest):
        sizes = dict(axis.split('=') for axis in match[1].split(','))
        return math.prod(int(sizes[axis.split(':')[0]]) for axis in match[2].split(','))
    return 2 if operation.kind.startswith('collective-permute') else None


def _dot_flops(left: list[int], right: list[int], out: list[int], rest: str) -> float:
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', rest)
    inner = math.prod(left[int(axis)] for axis in contracted[1].split(',') if axis) if contracted else 1
    return 2.0 * math.prod(out) * inner


def _convolution_flops(left: list[int], right: list[int], out: list[int], rest: str) -> float:
    """Counts the FLOPs of a convolution. TPUs write all products so, with batch dimensions as dilated windows."""
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', rest)
    left_labels, right_labels, out_labels = labels.groups()
    window = re.search(r'window=\{([^}]*)\}', rest)
    fields = dict(field.split('=') for field in window[1].split()) if window else {}
    spatial = sorted(label for label in right_labels if label.isdigit())

    def of(field: str, axis: int, default: str) -> list[int]:
        return [int(n) for n in fields.get(field, 'x'.join([default] * len(spatial))).split('x')[axis].split('_')]

    pairs = 1
    for axis, label in enumerate(spatial):
        size, outputs = right[right_labels.index(label)], out[out_labels.index(label)]
        stride, dilation, spread = (of(field, axis, '1')[0] for field in ('stride', 'rhs_dilate', 'lhs_dilate'))
        low = of('pad', axis, '0_0')[0]
        extent = left[left_labels.index(label)]
        pairs *= sum(
            (position := o * stride + k * dilation - low) % spread == 0 and 0 <= position // spread < extent
            for o in range(outputs)
            for k in range(size)
        )
    inner = right[right_labels.index('i')]
    return 2.0 * pairs * out[out_labels.index('b')] * out[out_labels.index('f')] * inner
