"""Pictures of a report: small files that show what matplotlib drew."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from upcycle.report.html import write_report
from upcycle.report.plots import Plot
from upcycle.report.plots.experts import _heat_map
from upcycle.report.plots.figure import COLOURS, SMALL, _figure, _saved
from upcycle.report.plots.svg import shrink
from upcycle.report.runs import load_run

SVG = '{http://www.w3.org/2000/svg}'
NOISE = np.random.default_rng(0).normal(size=5000)


def panel(points, name='a run'):
    def draw(ax):
        ax.plot(points, label=name)
        ax.set_title(name)
        ax.legend()

    return draw


def plot(*panels):
    return Plot('key', 'title', 'caption', panels)


def points_of(path):
    """The end points of the commands of a path that `shrink` wrote."""
    at, start, found = np.zeros(2), np.zeros(2), []
    for command, numbers in re.findall(r'([mlqcz])([^mlqcz]*)', path):
        values = np.array([float(number) for number in re.findall(r'-?[\d.]+', numbers)]).reshape(-1, 2)
        if command == 'z':
            at = start
        for value in values[{'q': 1, 'c': 2}.get(command, 0) :: {'q': 2, 'c': 3}.get(command, 1)]:
            at = at + value
            found.append(at)
        start = at if command == 'm' else start
    return np.array(found)


def path(svg, number):
    """The path of that many vertices."""
    (found,) = [p.get('d') for p in ElementTree.fromstring(svg).iter(f'{SVG}path') if p.get('d').count(number) > 25]
    return found


def test_lines_lie_where_they_lay_and_do_not_drift():
    svg = _saved(_figure([panel(NOISE[:30])], 3.35), 'svg')
    small = shrink(svg)
    assert len(small) < len(svg) / 2
    before = np.array([(float(x), float(y)) for x, y in re.findall(r'[ML] ([\d.]+) ([\d.]+)', path(svg, 'L'))])
    found = max((points_of(p.get('d')) for p in ElementTree.fromstring(small).iter(f'{SVG}path')), key=len)
    assert before.shape == found.shape == (30, 2)
    np.testing.assert_allclose(found, before, atol=0.051)


def test_curves_and_closed_parts_of_a_path():
    svg = f'<svg xmlns="{SVG[1:-1]}"><path d="M 1 2 L 3.04 4 Q 5 5 6 6.06 C 7 7 8 8 9 9 z M 1 1 L 0.5 0.5"/></svg>'
    small = ElementTree.fromstring(shrink(svg.encode())).find(f'{SVG}path').get('d')
    expected = [(1, 2), (3, 4), (6, 6.1), (9, 9), (1, 1), (0.5, 0.5)]
    np.testing.assert_allclose(points_of(small), expected, atol=1e-9)


def test_every_text_and_reference_is_kept():
    name = 'a<b & "c" -- $d$ ü'
    svg = _saved(_figure([panel([1, 2], name), panel([1, 3])], 3.35), 'svg')
    before, after = ElementTree.fromstring(svg), ElementTree.fromstring(shrink(svg))
    texts = [[text.text for text in root.iter(f'{SVG}text')] for root in (before, after)]
    assert texts[0] == texts[1] and name in texts[1]
    ids = {node.get('id') for node in after.iter()}
    used = {found for node in after.iter() for value in node.attrib.values() for found in re.findall(r'#(\w+)', value)}
    assert used and used <= ids
    assert sum(1 for _ in after.iter(f'{SVG}use')) == sum(1 for _ in before.iter(f'{SVG}use'))


def test_joined_cells_are_drawn_once_each():
    cells = [f'<path d="M {i} 0 L {i} 1 L {i + 1} 1 z" style="fill: #{"ab"[i > 2]}"/>' for i in range(5)]
    svg = f'<svg xmlns="{SVG[1:-1]}"><g id="a"><g id="b">{"".join(cells)}</g></g></svg>'
    paths = [p.get('d') for p in ElementTree.fromstring(shrink(svg.encode())).iter(f'{SVG}path')]
    assert [path.count('z') for path in paths] == [3, 2]
    np.testing.assert_allclose(points_of(paths[0])[::3], [(0, 0), (1, 0), (2, 0)])


def test_few_points_are_svg_and_many_png():
    name, content = plot(panel([1, 2, 3])).picture()
    assert name == 'key.svg' and len(content) < SMALL
    name, content = plot(panel(NOISE)).picture()
    image = Image.open(io.BytesIO(content))
    assert (name, image.format, image.mode) == ('key.png', 'PNG', 'P')
    assert len(image.getcolors()) <= COLOURS and len(content) < 30_000


def test_a_heat_map_keeps_its_image():
    draw = plot(lambda ax: _heat_map(ax, np.arange(4), np.eye(3), 'a'))
    svg = shrink(_saved(_figure(draw.panels, 3.35), 'svg'))
    assert all(
        image.get('href').startswith('data:image/png') for image in ElementTree.fromstring(svg).iter(f'{SVG}image')
    )


def test_equal_figures_are_equal_files():
    assert plot(panel([1, 2])).picture() == plot(panel([1, 2])).picture()


@pytest.mark.parametrize('suffix', ['svg', 'png'])
def test_a_report_leaves_no_picture_of_an_earlier_one(tmp_path, monkeypatch, suffix):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'metrics.jsonl').write_text(
        '{"step": 0, "split": "validation", "loss": 1.0, "start_step": 0}\n'
    )
    for kind in ('svg', 'png', suffix):
        monkeypatch.setattr(Plot, 'picture', lambda self, kind=kind: (f'{self.key}.{kind}', kind.encode()))
        page = write_report([load_run(tmp_path / 'run')], tmp_path / 'out', 'title').read_text()
    assert {file.suffix for file in (tmp_path / 'out').iterdir()} == {'.html', '.csv', f'.{suffix}'}
    assert f'src="extra_flops.{suffix}"' in page
