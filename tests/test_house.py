"How the code reads, counted: each number may only fall. Who lowers one lowers its ceiling here."
import ast, importlib, re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent/'tmpa'
FILES = sorted(f for f in ROOT.rglob('*.py') if f.name not in ('_modidx.py', '__init__.py'))

CEILINGS = {
    'lines over 120 columns': 0,
    'modules over 250 lines': 0,
    'export cells over 30 lines': 9,
    'functions with 8 parameters or more': 37,
    'own names in tmpa.all': 155,
}

def name(f): return str(f.relative_to(ROOT))
def module(f): return '.'.join(('tmpa', *f.relative_to(ROOT).with_suffix('').parts))

def cells(f):
    "The export cells of a module: the texts between the marks that nbdev writes."
    return re.split(r'^# %% .*\n', f.read_text(), flags=re.M)[1:]

def functions(f):
    "The functions of a module, those of classes and of functions among them."
    return [o for o in ast.walk(ast.parse(f.read_text())) if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))]

def n_parameters(f):
    "How many parameters a function has, without the object that it belongs to."
    named = [o.arg for o in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
    return len([o for o in named if o not in ('self', 'cls')])

def imports(f, tree=None):
    "(module of ours, name) for everything that a module, or a part of its tree, imports from another one."
    package = ('tmpa', *f.relative_to(ROOT).parent.parts)
    for o in ast.walk(tree or ast.parse(f.read_text())):
        if not isinstance(o, ast.ImportFrom): continue
        base = package[:len(package)-o.level+1] if o.level else ()
        module = '.'.join((*base, *filter(None, [o.module])))
        if module.split('.')[0] == 'tmpa': yield from ((module, a.name) for a in o.names)

def long_lines():
    return [f'{name(f)}:{n}' for f in FILES for n, line in enumerate(f.read_text().splitlines(), 1)
            if len(line) > 120 and not line.startswith('__all__')]

def long_modules():
    return [name(f) for f in FILES if len(f.read_text().splitlines()) > 250]

def long_cells():
    return [f'{name(f)}: {c.splitlines()[0]}' for f in FILES for c in cells(f) if len(c.strip().splitlines()) > 30]

def wide_functions():
    return [f'{name(f)}: {o.name}' for f in FILES for o in functions(f) if n_parameters(o) >= 8]

def own_names():
    return [n for _, n in imports(ROOT/'all.py')]

COUNTS = {
    'lines over 120 columns': long_lines,
    'modules over 250 lines': long_modules,
    'export cells over 30 lines': long_cells,
    'functions with 8 parameters or more': wide_functions,
    'own names in tmpa.all': own_names,
}

@pytest.mark.parametrize('what', COUNTS)
def test_no_more_than_before(what):
    found = COUNTS[what]()
    assert len(found) <= CEILINGS[what], f'{len(found)} {what}, there were {CEILINGS[what]}: {found}'

def test_no_private_name_crosses_a_module():
    crossing = [f'{name(f)}: {other}.{n}' for f in FILES for other, n in imports(f) if n.startswith('_') and not n.startswith('__')]
    assert crossing == []

NOTEBOOKS = {f.name.split('_', 1)[1][:-len('.ipynb')]: f.name for f in (ROOT.parent/'nbs').glob('[0-9]*.ipynb')}

def test_notebooks_are_read_in_the_order_of_their_names():
    "Two digits and a letter at most; what a module imports as it is imported stands in a notebook before its own."
    assert [f for f in NOTEBOOKS.values() if not re.match(r'\d\d[a-z]?_', f)] == []
    assert len({f.split('_')[0] for f in NOTEBOOKS.values()}) == len(NOTEBOOKS)
    def notebooks(*modules): return [NOTEBOOKS[o] for o in (m.removeprefix('tmpa.') for m in modules) if o in NOTEBOOKS]
    back = []
    for f in FILES:
        above = ast.Module([o for o in ast.parse(f.read_text()).body if isinstance(o, ast.ImportFrom)], [])
        needed = notebooks(*(m for other, n in imports(f, above) for m in (other, f'{other}.{n}')))
        [own] = notebooks(module(f))
        back += [f'{own}: {o}' for o in needed if o > own]
    assert back == []

def test_no_name_hides_another():
    "Two modules have one name for the same thing only; in a session every name has its one meaning."
    modules = [importlib.import_module(module(f)) for f in FILES if f.name != 'all.py']
    first, hidden = {}, []
    for m in modules:
        for n in m.__all__:
            there = first.setdefault(n, (m, getattr(m, n)))
            if there[1] is not getattr(m, n): hidden.append(f'{there[0].__name__}.{n} and {m.__name__}.{n}')
    assert hidden == []
    everything = importlib.import_module('tmpa.all')
    twice = [n for n in set(own_names()) if own_names().count(n) > 1]
    assert twice == [] and all(n in everything.__all__ for n in own_names())

def test_no_name_hides_one_of_fastai():
    import fastai.vision.all as fastai
    modules = [importlib.import_module(module(f)) for f in FILES if f.name != 'all.py']
    ours = [(m, n) for m in modules for n in m.__all__]
    assert [f'{m.__name__}.{n}' for m, n in ours if getattr(fastai, n, getattr(m, n)) is not getattr(m, n)] == []

@pytest.mark.parametrize('module, names', [
    ('callback.resume', 'data_key outline random_state set_random_state'), ('dart', 'TwinNet'),
    ('learner', 'extract_features'), ('recipes', 'Recipe recipe_content'), ('experiment', 'make_learner mean_map'),
    ('data.batches', 'on_device'), ('data.load', 'on_device one_ahead'),
    ('callback.loop', 'RunawayError StopRunaway not_finite'), ('callback.mix', 'show_mixes'),
    ('models.net', 'load_tmpa load_weights read_meta save_weights'),
    ('data.image', 'image_exts'), ('data.readers', 'as_float decoded item_range load_resized read_image'),
    ('store', 'StoredItems StoredNames as_record as_records read_head'),
    ('verify', 'OpenSet Roc open_set plot_curves roc unit_distances')])
def test_what_moved_is_found_where_it_was(module, names):
    "Code and pickles of 0.9 name them so."
    old = importlib.import_module(f'tmpa.{module}')
    for name in names.split(): assert getattr(old, name).__name__ == name
    with pytest.raises(ImportError): exec(f'from tmpa.{module} import nothing_of_the_kind')
