"""Smaller SVG files: what matplotlib writes, without its repetitions."""

import re
from collections.abc import Iterable, Iterator
from xml.etree import ElementTree

_SVG = '{http://www.w3.org/2000/svg}'
_HREF = '{http://www.w3.org/1999/xlink}href'


def shrink(svg: bytes) -> bytes:
    """The same picture in about a fifth of the bytes.

    Lengths are rounded to 0.1 points, points of a path are relative to the one before, equal styles share a class, names are
    numbers, groups that only have a name are dissolved, and neighbouring paths of one opaque style become one path.

    Args:
      svg: a file of matplotlib's.

    Returns:
      The smaller file.
    """
    root = ElementTree.fromstring(svg)
    styles: dict[str, str] = {}
    names: dict[str, str] = {}
    for node in list(root.iter()):
        node[:] = list(_children(node))
        node.tail = None
        if node.tag not in (f'{_SVG}style', f'{_SVG}text'):
            node.text = None
    _move_styles(root)
    for node in root.iter():
        node[:] = list(_joined(node))
        _shorten(node.attrib, styles, names)
    # In every style of a text.
    fonts = {found[0] for style in styles if (found := re.search('font-family:[^;]*;', style))}
    shared = fonts.pop() if len(fonts) == 1 else ''
    rules = [f'*{{{shared}}}', *(f'.{name}{{{style.replace(shared, "")}}}' for style, name in styles.items())]
    ElementTree.SubElement(root, f'{_SVG}style').text = ''.join(rules)
    ElementTree.register_namespace('', _SVG[1:-1])
    return ElementTree.tostring(root).replace(b' />', b'/>')


def _move_styles(root: ElementTree.Element) -> None:
    """Gives a marker the style of its uses, where they have only one."""
    uses: dict[str, list[ElementTree.Element]] = {}
    for use in root.iter(f'{_SVG}use'):
        uses.setdefault(use.get(_HREF)[1:], []).append(use)
    for path in root.iter(f'{_SVG}path'):
        found = uses.get(path.get('id'), [])
        if len(each := {use.get('style', '') for use in found}) == 1:
            path.set('style', f'{each.pop()}; {path.get("style", "")}'.strip('; '))
            for use in found:
                use.attrib.pop('style', None)


def _children(node: ElementTree.Element) -> Iterator[ElementTree.Element]:
    for child in node:
        if child.tag == f'{_SVG}g' and not set(child.attrib) - {'id'}:
            yield from _children(child)
        else:
            yield child


def _joined(nodes: Iterable[ElementTree.Element]) -> Iterator[ElementTree.Element]:
    """Joins neighbouring paths that differ in nothing else, such as the cells of a heat map."""
    last = None
    for node in nodes:
        alike = last is not None and all(
            x.tag == f'{_SVG}path' and 'opacity' not in str(x.attrib) for x in (last, node)
        )
        if alike and last.attrib | {'d': ''} == node.attrib | {'d': ''}:
            last.set('d', last.get('d') + node.get('d'))
        else:
            last = node
            yield node


def _shorten(attributes: dict[str, str], styles: dict[str, str], names: dict[str, str]) -> None:
    """Shortens the attributes of a node in place; `styles` and `names` are those of the whole picture."""
    for key in list(attributes):
        value = attributes.pop(key)
        # A name, alone or after the # of a reference; data: is an image.
        name = r'^[^#]+$' if key == 'id' else r'(?<=^#).+' if key == _HREF else r'(?<=url\(#)[^)]+'
        value = re.sub(name, lambda found: names.setdefault(found[0], f'n{len(names)}'), value)
        if key == 'd':
            value = _relative(value)
        elif key in ('x', 'y'):
            value = f'{float(value):.1f}'.removesuffix('.0')
        elif key == 'style':
            key, value = 'class', styles.setdefault(re.sub('([:;,]) ', r'\1', value), f's{len(styles)}')
        # Text that is not turned needs no transform.
        if not value.startswith('rotate(-0 '):
            attributes['href' if key == _HREF else key] = value


def _relative(path: str) -> str:
    """A path of M, L, Q, C and z in whole tenths of a point, each command relative to where the one before ended."""
    at = start = (0, 0)
    result, last = [], ''
    for command, numbers in re.findall(r'([MLQCz])([^MLQCz]*)', path):
        tenths = [round(10 * float(number)) for number in numbers.split()]
        points = list(zip(tenths[::2], tenths[1::2], strict=True))
        if command == 'L' == last and points == [at]:
            continue
        moves = ' '.join(f'{(x - at[0]) / 10:g} {(y - at[1]) / 10:g}' for x, y in points)
        result.append((' ' if command == last else command.lower()) + moves)
        at = points[-1] if points else start
        start = at if command == 'M' else start
        last = command
    return re.sub(r'(?<![\d.])(-?)0\.', r'\1.', ''.join(result)).replace(' -', '-')
