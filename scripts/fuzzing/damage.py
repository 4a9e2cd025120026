"""Random damage to bytes, text and JSON trees."""

import copy
import random
from typing import Any

JUNK = (
    *(0, -1, 1, 2, 7, 2**31, 2**60, -(2**60), 0.5, 1e300, True, None),
    *('', 'x', '..', '../../x', '/etc/passwd', 'gs://b/x', '\0', '\u2603'),
    *([], {}, [0], [2**60], [2**60, 0], [-1], {'a': 1}),
    *('float64', 'int32', 'F64', 'zarr', 'file', 'http', '|O', '<f8', 'a' * 5000),
)


def damaged(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Returns a description and the damaged bytes."""
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 100))
    if rng.random() < 0.3:
        at = min(at, rng.randrange(200))  # headers
    junk = rng.randbytes(length)
    ways = {
        'cut': content[:at],
        'overwritten': content[:at] + junk + content[at + length :],
        'zeroed': content[:at] + bytes(length) + content[at + length :],
        'longer': content[:at] + junk + content[at:],
        'shorter': content[:at] + content[at + length :],
        'twice': content + content,
        'empty': b'',
    }
    way = rng.choice(sorted(ways))
    return f'{way} at {at} of {len(content)}, {length} bytes', ways[way]


def mutated(rng: random.Random, tree: Any) -> tuple[str, Any]:
    """Returns a description and a copy of a JSON or msgpack tree with one node changed."""
    tree = copy.deepcopy(tree)
    nodes: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    if isinstance(tree, dict | list):
        visit(tree)
    if not nodes:
        return 'replaced', rng.choice(JUNK)
    node, key = rng.choice(nodes)
    other, other_key = rng.choice(nodes)
    old, junk = node[key], rng.choice(JUNK)
    way = rng.choice(('value', 'value', 'value', 'number', 'gone', 'renamed', 'exchanged', 'deep'))
    if way == 'number' and isinstance(old, int):
        node[key] = old + rng.choice((-1, 1, 1000, 2**40))
    elif way == 'gone':
        del node[key]
    elif way == 'renamed' and isinstance(node, dict):
        new = junk if isinstance(junk, str) else f'{key}x'
        node[rng.choice((new, str(key).replace('0', '999999999'), f'../{key}'))] = node.pop(key)
    elif way == 'exchanged' and not isinstance(old, dict | list) and not isinstance(other[other_key], dict | list):
        node[key], other[other_key] = other[other_key], old
    elif way == 'deep':
        for _ in range(rng.choice((5, 300))):
            old = [old]
        node[key] = old
    else:
        way, node[key] = 'value', junk
    return f'{way}: {str(key)[:80]!r} {str(old)[:80]!r} -> {str(junk)[:80]!r}', tree


def misspelt(rng: random.Random, text: str) -> str:
    """Changes one character of a text."""
    at = rng.randrange(len(text) + 1)
    char = rng.choice('aZ_./%@=:()[]{}\'"# 0\t')
    return rng.choice(
        (text[:at] + char + text[at:], text[:at] + char + text[at + 1 :], text[:at] + text[at + 1 :], text.lower())
    )
