"""Parsing and validation of the lines of a `metrics.jsonl`, each a JSON object."""

import json
from collections.abc import Mapping
from typing import Any

# Stripped from a line; a power failure may leave zeros.
PADDING = ' \t\r\0'
# Running totals, of which reports take differences.
_COSTS = ('start_step', 'flops', 'seconds', 'sunk_flops', 'sunk_seconds')


# The end of the name of a rate: that of a family's units, such as tokens.
PER_DEVICE = '_per_second_per_device'


def depends_on_speed(name: str) -> bool:
    """Returns whether a metric depends on the machine's speed: a time, a rate, or a share of time."""
    return 'second' in name or name in ('device_busy', 'mfu')


def rate_of_units(record: Mapping[str, Any]) -> str | None:
    """Returns the name of a line's rate of units a second and device; None if it has none."""
    return next((name for name in record if name.endswith(PER_DEVICE)), None)


def is_number(value: Any) -> bool:
    """Returns whether `value` is a finite number (a diverged run logs nan)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # Plots need axes that are longer than the values and still finite; no metric of a working model is this large.
    return abs(value) < 2**996


def lines_of(log: bytes) -> list[bytes]:
    """Splits a `metrics.jsonl` into lines. The last one, after the last line break, is empty unless it was cut off."""
    return log.split(b'\n')


def parse_line(line: bytes) -> Any:
    """Parses a line, including `NaN` and `Infinity`; None if it is not JSON."""
    try:
        return json.loads(line.decode('utf-8-sig').strip(PADDING))
    except (ValueError, RecursionError):
        return None


def what_is_wrong(record: Any) -> str | None:
    """Returns why a (parsed) line cannot be from a run, or None."""
    if not isinstance(record, dict):
        return 'is not a JSON object'
    for name in ('step', 'split'):
        if name not in record:
            return f'has no {name!r}'
    if not isinstance(record['split'], str):
        return f"has 'split': {_shown(record['split'])}, which is not a word"
    for name in ('step', *_COSTS):
        value = record.get(name, 0)
        whole = name not in ('step', 'start_step') or isinstance(value, int)
        if not (is_number(value) and value >= 0 and whole):
            return f'has {name!r}: {_shown(value)}, which is not a number of {"steps" if "step" in name else name}'
    for name, value in record.items():
        if not _is_metric(value):
            return f'has {name!r}: {_shown(value)}, which is not a metric'
    return None


def _is_metric(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_metric, value))
    # Larger whole numbers do not fit into a float.
    return value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**1023)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f'{text[:60]}...'
