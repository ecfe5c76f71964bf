"""What pages show of cells that test: `.ci/shape.py`."""
import ast, base64, io, json, re, sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'.ci'))
from shape import is_test, shape, shape_cells  # noqa: E402


def test_equality_becomes_an_example():
    shown, tests = shape("test_eq(parse_size('96x48'), (96, 48))", False)
    assert shown == "parse_size('96x48')  # (96, 48)"
    assert tests == "test_eq(parse_size('96x48'), (96, 48))"


def test_what_an_example_needs_stays():
    source = '''# of people
size = parse('a')  # a comment
other = 3
def slow(x):
    return x
size.x = 4
for x in range(3): test_eq(slow(x), x)
test_close(g(size), .5); test_fail(lambda: f(), contains='x')
assert h(size) == [1, -2]'''
    shown, tests = shape(source, False)
    assert shown == "# of people\nsize = parse('a')  # a comment\nsize.x = 4\ng(size)  # ≈ .5\nh(size)  # [1, -2]"
    assert tests == source


def test_results_stay_and_tests_go():
    source = '#| slow\nx = f()\nassert x\ntest_eq(x, y)\nprint(x)'
    assert shape(source, True) == ('#| slow\nx = f()\nprint(x)', 'x = f()\nassert x\ntest_eq(x, y)\nprint(x)')


@pytest.mark.parametrize('source', ['x = 1', 'print(f(x))', '%matplotlib inline\nassert x', 'def f(): return 1', ''])
def test_cells_without_tests_are_left_alone(source): assert shape(source, True) == (source, '')


@pytest.mark.parametrize('source', ['assert x', 'test_fail(f)', 'def check(x): assert x', 'for x in y:\n    if x: test_eq(x, 1)'])
def test_cells_of_tests_are_folded(source): assert shape(source, False) == ('', source)


def test_bytes_and_characters():
    "Python counts columns in bytes."
    assert shape("test_eq(f('é'), 1); test_eq(g('×'), 'µ')  # both", False)[0] == "f('é')  # 1\ng('×')  # 'µ'"


def test_long_imports_are_folded():
    long = '\n'.join(f'import a{i}' for i in range(5))
    cells = [dict(cell_type='code', source=o, outputs=[]) for o in (long, 'import a', long + '\nx = 1')]
    assert [o['source'].startswith('#| code-fold') for o in shape_cells(dict(cells=cells))['cells']] == [True, False, False]


def test_every_notebook():
    "What is left to show is Python without a test in it, and nothing is lost that had an output."
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        nb = json.loads(path.read_text(encoding='utf8'))
        outputs = sum(len(c.get('outputs', [])) for c in nb['cells'])
        cells = shape_cells(nb)['cells']
        assert sum(len(c.get('outputs', [])) for c in cells) == outputs, path
        for cell in cells:
            source = ''.join(cell['source'])
            if cell['cell_type'] != 'code' or '#| code-fold' in source or '#| echo: false' in source: continue
            try: stmts = ast.parse(source).body
            except SyntaxError: continue
            assert not any(map(is_test, stmts)), (path, source)


def test_text_in_figures_can_be_read():
    "A page shows a figure as large as its inches say: no text below 9 points, and none so wide that the page makes it smaller."
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf8'))['cells']:
            source = ''.join(cell['source'])
            small = [o for o in re.findall(r'(?:font|label)size=(\d+(?:\.\d+)?)\b', source) if float(o) < 9]
            assert not small, (path.name, small, source[:80])
            for out in cell.get('outputs', []):
                for kind in ('image/png', 'image/jpeg'):
                    if kind not in out.get('data', {}): continue
                    image = Image.open(io.BytesIO(base64.b64decode(''.join(out['data'][kind]))))
                    dpi = image.info.get('dpi', (0, 0))[0]
                    assert dpi < 2 or image.width/dpi < 10.5, (path.name, image.width/dpi, source[-80:])
