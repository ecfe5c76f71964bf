"""Every notebook runs from top to bottom, as `nbdev_test` runs it, in a process of its own so that seeds and settings cannot leak."""
import ast, itertools, json, os, re, subprocess, sys
from pathlib import Path

import pytest, yaml

import pretend, warm
from conftest import DEVICES, left_behind

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(q.startswith(('.', '_')) for q in p.relative_to(ROOT).parts))


def cells(path): return json.loads(path.read_text(encoding='utf8'))['cells']
def code(path): return [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code']

def mixes_imports(source):
    "Does nbdev run this cell for the docs (it runs all with an import in them) though it holds other statements?"
    if re.search(r'^#\| *(export\w*|default_exp|eval: *false)', source, re.M): return False
    body = ast.parse('\n'.join(l for l in source.split('\n') if not l.lstrip().startswith(('%', '!')))).body
    imports = (ast.Import, ast.ImportFrom)
    return any(isinstance(o, imports) for node in body for o in ast.walk(node)) and not all(isinstance(node, imports) for node in body)

def printed(path):
    "Stored outputs as text, pictures left out."
    for c in cells(path):
        for o in c.get('outputs', []):
            yield o.get('name', o['output_type']), ''.join(o.get('text', [])) + '\n'.join(''.join(v) for k,v in o.get('data', {}).items() if k.startswith('text/'))


# these take a minute or more on the stand-in
LONG = 'ablation.ipynb', 'own_method.ipynb', 'pictures.ipynb', 'train.ipynb', 'departures.ipynb', '18_experiment.ipynb', \
    'threshold.ipynb'

# a backward pass that was broken off keeps its graph, and the stand-in moves no weights that a graph still holds
BROKEN = '15d_guard.ipynb',

def runs_on(path, device):
    "On other devices than the CPU only pages run that make loaders or learners, which go to the default device."
    if device == 'cpu': return True
    if device == pretend.NAME and path.name in (*LONG, *BROKEN): return False
    return bool(re.search(r'ReIDDataLoaders\.from_|_learner\(|default_device', '\n'.join(code(path))))

HANGS = 1800  # seconds; none takes a tenth of it alone on a machine

def cold(source, *args, cwd, env, timeout):
    "As `warm.run`, in a process that imports everything itself: one that uses a GPU cannot be a fork of another."
    command = [sys.executable, '-c', source, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)'
PRETENDING = 'import sys, pretend; from nbdev.test import nbdev_test\nwith pretend.pretending(): nbdev_test(path=sys.argv[1], n_workers=0)'
RUNS = [(p, d) for p in NOTEBOOKS for d in DEVICES if runs_on(p, d)]

@pytest.mark.parametrize('path,device', RUNS, ids=lambda x: x if isinstance(x, str) else str(x.relative_to(ROOT/'nbs')))
def test_runs(path, device):
    env = dict(os.environ, MPLBACKEND='agg', PYTHONPATH=os.pathsep.join([str(ROOT/'tests'), os.environ.get('PYTHONPATH', '')]))
    run = cold if device == 'cuda' else warm.run
    status, out = run(PRETENDING if device == pretend.NAME else RUN, path, cwd=ROOT, env=env, timeout=HANGS)
    assert status == 0 and 'Success' in out, out[-6000:]
    assert not left_behind(), 'make folders with tempfile.TemporaryDirectory, which goes when the notebook ends'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_is_kept_as_agreed(path):
    assert path.stat().st_size <= 200_000, 'figures are to be small: 200 kB a notebook'
    first = next(c for c in cells(path) if c['cell_type'] == 'markdown')
    assert re.match(r'# .+\n\n?> .+|---\n', ''.join(first['source'])), 'a notebook opens with a title and a one-line promise'
    said = [l for l in first['source'] if l.strip()]
    assert len(said) <= 2 or said[0].startswith('---'), f'a page leaves out what else is in the first cell: {said[2]!r}'
    source = '\n'.join(code(path))
    assert not re.search(r'^#(slow|cuda|skip)\b', source, re.M), 'nbdev reads `#| slow`; the bare form runs'
    assert 'filterwarnings' not in source
    assert 'tempfile.mkdtemp()' not in source, 'tempfile.TemporaryDirectory() goes when the notebook ends'
    mixed = [s[:80] for s in code(path) if mixes_imports(s)]
    assert not mixed, f'a cell with imports is to hold nothing else, or building the docs runs the rest of it: {mixed}'
    for kind,text in printed(path):
        assert kind not in ('stderr', 'error'), f'stored {kind}: {text[:200]}'
        found = re.search(r'/tmp/|Traceback|\r|\x1b', text)
        assert not found, f'a folder of one machine, a traceback or a progress bar is stored: {text[max(0, found.start()-80):found.end()+80]!r}'
    module = re.search(r'^#\| *default_exp +(\S+)', source, re.M)
    if module:
        assert re.search(r'\btest_\w+\(|\bassert\b', source), 'exports code and asserts nothing'
        assert not re.search(rf'^(from|import) +tmpa\.{re.escape(module[1])}\b', source, re.M), 'imports the module that it defines'


NOT_SHOWN = re.compile(r'^#\| *((hide|export|exporti|hide_output) *:?$|(include|output): *false\b)', re.M)

def options(source):
    "Quarto's `#| key: value` at the top of a cell. nbdev keeps those of one line."
    directives = [l[2:] for l in itertools.takewhile(lambda l: l.startswith('#|'), source.split('\n'))]
    return yaml.safe_load('\n'.join(l.strip() for l in directives if re.match(r' *[\w-]+ *: ', l))) or {}

def undescribed(cell):
    "What is missing for who cannot see the pictures that a code cell shows, and for who wonders what to look at."
    source, data = ''.join(cell['source']), [o.get('data', {}) for o in cell.get('outputs', [])]
    if NOT_SHOWN.search(source): return []
    text = lambda o: isinstance(o, str) and len(o) > 20
    n, opts = sum(any(m.startswith('image/') for m in d) for d in data), options(source)
    caps = opts.get('fig-cap')
    found = []
    if n and not text(opts.get('fig-alt')): found.append('fig-alt: "what is in the picture, for who cannot see it"')
    if n and not (text(caps) or isinstance(caps, list) and len(caps) == n and all(map(text, caps))):
        found.append('fig-cap: "what to look for in the picture"')
    if caps and opts.get('fig-alt') == caps: found.append('two different texts: one says what to look for, one what is there')
    for tag in re.findall(r'<img\b[^>]*>', ''.join(''.join(d.get('text/html', '')) for d in data)):
        if not re.search(r'\balt="[^"]+"', tag): found.append(f'an alt in the code that makes {tag[:60]}')
    return found

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_pictures_have_captions_and_alternative_texts(path):
    found = [(''.join(c['source'])[-60:], w) for c in cells(path) if c['cell_type'] == 'code' for w in undescribed(c)]
    assert not found, f'add at the top of the cell, on one line each: {found}'
    prose = '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown')
    assert not re.search(r'!\[\s*\]\(|<img\b(?![^>]*\balt="[^"]+")', prose), 'a picture in the text wants an alternative text'


def test_pictures_without_words_are_found():
    png, html = {'data': {'image/png': ''}}, {'data': {'text/html': ['<p><img src="data:', 'x">']}}
    cell = lambda source, *outs: undescribed({'source': [source], 'outputs': list(outs)})
    cap, alt = '#| fig-cap: "Look at the blue line, which falls."\n', '#| fig-alt: "A blue line falls from 3 to 1."\n'
    assert cell('#| slow\n' + cap + alt + 'plot()', png) == cell('plot()') == cell('#| hide\nplot()', png) == []
    assert [len(cell(s + 'plot()', png)) for s in ('', cap, alt, '#| fig-cap: ""\n' + alt)] == [2, 1, 1, 1]
    assert len(cell(cap + 'plot()\n' + alt, png)) == 1                         # not at the top
    assert len(cell(cap.replace(' "', '\n#|   "') + alt + 'plot()', png)) == 1  # nbdev drops the second line
    assert cell(cap + alt.replace('A blue line falls from 3 to 1', 'Look at the blue line, which falls') + 'plot()', png)
    both = '#| fig-cap: ["Look at the blue line here.", "And at the red one there."]\n'
    assert cell(both + alt + 'plot()', png, png) == [] and len(cell(both + alt + 'plot()', png)) == 1
    assert len(cell('table', html)) == 1 and cell('#| hide_input\ntable', {'data': {'text/html': '<img alt="a cat" src="x">'}}) == []


def test_pages_have_names_of_their_own():
    "The number before a notebook's name is no part of its page's name: `21_index.ipynb` would be written over the home page."
    pages = [p.relative_to(ROOT/'nbs').with_name(re.sub(r'^\d+[a-z]*_', '', p.name)) for p in NOTEBOOKS]
    assert sorted(o for o in set(pages) if pages.count(o) > 1) == []


def test_quarto_config_is_one_file():
    link = ROOT/'nbs'/'_quarto.yml'
    assert link.is_symlink() and not os.path.isabs(os.readlink(link)) and link.resolve() == ROOT/'_quarto.yml'


def test_sidebar_lists_every_notebook():
    listed = re.findall(r'\S+\.ipynb', (ROOT/'_quarto.yml').read_text(encoding='utf8'))
    assert sorted({p.relative_to(ROOT/'nbs').as_posix() for p in NOTEBOOKS} - set(listed)) == [], 'add these to the sidebar in _quarto.yml'
    assert len(listed) == len(set(listed))
