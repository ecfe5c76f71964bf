"""Every notebook runs from top to bottom, as `nbdev_test` runs it, in a process of its own so that seeds and settings cannot leak."""
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(q.startswith(('.', '_')) for q in p.relative_to(ROOT).parts))


def cells(path): return json.loads(path.read_text(encoding='utf8'))['cells']
def code(path): return [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_runs(path):
    nbdev_test = 'import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)'
    run = subprocess.run([sys.executable, '-c', nbdev_test, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600, env=dict(os.environ, MPLBACKEND='agg'))
    assert run.returncode == 0 and 'Success' in run.stdout + run.stderr, (run.stdout + run.stderr)[-6000:]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_is_kept_as_agreed(path):
    assert path.stat().st_size <= 200_000, 'figures are to be small: 200 kB a notebook'
    first = next(c for c in cells(path) if c['cell_type'] == 'markdown')
    assert re.match(r'# .+\n\n?> .+|---\n', ''.join(first['source'])), 'a notebook opens with a title and a one-line promise'
    source = '\n'.join(code(path))
    assert not re.search(r'^#(slow|cuda|skip)\b', source, re.M), 'nbdev reads `#| slow`; the bare form runs'
    assert 'filterwarnings' not in source
    module = re.search(r'^#\| *default_exp +(\S+)', source, re.M)
    if module:
        assert re.search(r'\btest_\w+\(|\bassert\b', source), 'exports code and asserts nothing'
        assert not re.search(rf'^(from|import) +tmpa\.{re.escape(module[1])}\b', source, re.M), 'imports the module that it defines'


def test_quarto_config_is_one_file():
    link = ROOT/'nbs'/'_quarto.yml'
    assert link.is_symlink() and not os.path.isabs(os.readlink(link)) and link.resolve() == ROOT/'_quarto.yml'
