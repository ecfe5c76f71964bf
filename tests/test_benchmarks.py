"The benchmarks run, at a size that shows only that they do."
import ast, importlib.util, itertools, json, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch

from tmpa.core import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/'nbs'/'experiments'/'results'


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f'{name}_benchmark', ROOT/'benchmarks'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='module')
def gpu(): return benchmark('gpu')

@pytest.fixture(scope='module')
def scale(): return benchmark('paper_scale')

def few(precisions, compiled):
    p = precisions[0]
    yield 'step', 'TMPA', p, False
    yield 'nothing', 'TMPA', p, False
    yield 'loop', 'B+PedMix', p, False
    yield 'loader', '', '', False
    yield 'kernels', 'B', p, False
    yield 'syncs', 'B', p, False

@pytest.mark.cpu(reason='chooses its device itself')
def test_gpu_benchmark(gpu, tmp_path, monkeypatch):
    "A part that fails is a row, and not the end."
    monkeypatch.setattr(gpu, 'plan', few)
    out = tmp_path/'new'/'gpu.json'
    gpu.run(gpu.TINY, torch.device('cpu'), ('fp32',), False, 2, out)
    result = json.loads(out.read_text())
    assert {'made', 'card', 'device', 'cores', 'versions', 'setting', 'rows'} <= set(result)
    assert {'tmpa', 'torch', 'fastai', 'cuda'} <= set(result['versions'])
    step, nothing, loop, loader, kernels, syncs = result['rows']
    for r in result['rows']: assert {'measure', 'network', 'precision', 'compiled'} <= set(r)
    assert 'KeyError' in nothing['error'] and not any('error' in r for r in result['rows'] if r is not nothing)
    for r in (step, loop, loader): assert r['ms'] > 0 and r['originals_s'] == pytest.approx(8e3/r['ms'])
    assert kernels['kernels'] > 10 and 0 < kernels['share_products'] < 1
    assert syncs['syncs'] is None

@pytest.mark.cpu(reason='chooses its device itself')
def test_what_there_is_no_time_for_is_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'plan', few)
    rows = gpu.run(gpu.TINY, torch.device('cpu'), ('fp32',), False, 0, tmp_path/'gpu.json')['rows']
    assert len(rows) == 6 and all('out of time' in r['error'] for r in rows)

def test_everything_is_planned_once(gpu):
    for compiled in (False, True):
        parts = list(gpu.plan(('fp16', 'bf16'), compiled))
        assert len(parts) == len(set(parts)) and parts[0][:2] == ('step', 'TMPA')
        wanted = set(itertools.product(('step', 'loop'), gpu.NETWORKS, ('fp16', 'bf16')))
        assert {o[:3] for o in parts} >= wanted

@pytest.mark.cpu(reason='is about one core')
def test_input_benchmark(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('input_benchmark', ROOT/'benchmarks'/'input.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    try: module.main(['--quick', '--out', str(tmp_path/'input.json')])
    finally: torch.set_num_threads(threads)
    result = json.loads((tmp_path/'input.json').read_text())
    rates, = result['results'].values()
    for k in ('cold', 'first epoch', 'warm'):
        ratio = rates[f'{k} ratio']
        assert rates[f'tmpa {k}']['median'] > 0 and ratio['low'] <= ratio['high']
    assert 'images a second and core' in capsys.readouterr().out


@pytest.mark.cpu(reason='is about one core')
def test_search_benchmark(tmp_path, monkeypatch, capsys):
    "Every row, small; and the page shows what it writes."
    from tmpa import approximate
    monkeypatch.setattr(approximate, 'SMALL', 500)
    threads = torch.get_num_threads()
    small = '--rows 4000 --dim 32 --queries 20 --turns 3'.split()
    try: benchmark('search').main([*small, '--folder', str(tmp_path), '--out', str(tmp_path/'search.json')])
    finally: torch.set_num_threads(threads)
    r = json.loads((tmp_path/'search.json').read_text())
    assert r['disk']['bytes'] > 4000*32*4 and 0 < r['disk']['open'] and r['disk']['add_one'] > 0
    assert len(r['exact']) == 4 and all(o['low'] <= o['ratio'] <= o['high'] for o in r['exact'])
    for o in r['faiss']: assert 0 <= o['recall'] <= 1 and o['lists'] > 1
    kept = json.loads((ROOT/'nbs/experiments/results/search.json').read_text())
    assert set(kept) == set(r) and set(kept['disk']) == set(r['disk'])
    assert max(o['ratio'] for o in kept['exact']) <= 1.2 and kept['rows'] == 1_000_000 and kept['disk']['open'] < 1
    assert [o.name for o in tmp_path.iterdir()] == ['search.json']

# ---------------------------------------------------------------- at the paper's scale

SOME = 'trunk/TMPA/0', 'scratch/B/0'

def page_of(folder, monkeypatch):
    "What the page on the paper's scale shows of results in a folder."
    monkeypatch.chdir(ROOT/'nbs'/'experiments')
    shown, here = [], {}
    for cell in json.loads(Path('scale.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        code = ast.parse(''.join(cell['source']).replace("'results/paper_scale'", repr(str(folder))))
        last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None
        exec(compile(code, 'scale.ipynb', 'exec'), here)
        if last: shown.append(eval(compile(ast.Expression(last.value), 'scale.ipynb', 'eval'), here))
    return '\n'.join(o if isinstance(o, str) else getattr(o, 'data', None) or o.markdown() for o in shown)

def same_but_for_time(records):
    "Records without what a clock or another folder changes."
    clock = 'train_seconds', 'made', 'environment'
    return [{k: v for k,v in r.items() if k not in clock} for r in records]

@pytest.mark.cpu(reason='compares two trainings to the last bit')
def test_paper_scale_goes_on(scale, tmp_path, monkeypatch, capsys):
    "In parts of an epoch, each a command of its own, the same scores as in one piece."
    def of(folder, minutes):
        return scale.run(tmp_path/folder, minutes, scale.TINY, 1, device='cpu', only=SOME, scoring=0)
    monkeypatch.setenv('TMPA_HOME', str(tmp_path/'home'))
    whole = of('whole', 10)
    assert [r['name'] for r in whole] == list(SOME)
    parts = [len(of('parts', 0)) for _ in range(4)]
    said = capsys.readouterr().out
    assert parts == [0, 1, 1, 2] and '1 of 2 epochs; the same command goes on, on this machine' in said
    assert '2 of 2 epochs in ' in said
    again, queries = scale.read_results(tmp_path/'parts', scale.TINY)
    assert same_but_for_time(again) == same_but_for_time(whole)
    _, want = scale.read_results(tmp_path/'whole', scale.TINY)
    assert set(queries) == set(want) and all((queries[k] == want[k]).all() for k in want)
    assert {k.split('/')[-2] for k in want} == {'as trained', 'own', 'miss', 'shared'}
    assert len(list((tmp_path/'parts').iterdir())) == 2 and not list((tmp_path/'home').glob('scale-*-0.pth'))
    assert of('parts', 0) == again  # nothing is left to do
    tmpa, b = again
    assert set(tmpa['scores']) == {'rendered', 'rendered own', 'rendered miss', 'rendered shared'}
    assert b['trunk'] is None and tmpa['trunk']['people'] == scale.TINY.trunk_ids
    page = page_of(tmp_path/'parts', monkeypatch)
    assert '**2 of 24 runs**' in page and f"{100*tmpa['scores']['rendered']['t2v']['mAP']:.1f}" in page
    assert f"{100*b['scores']['rendered']['t2v']['mAP']:.1f}" in page

def test_paper_scale_mixes_no_results(scale, tmp_path):
    scale.write_results(tmp_path, [dict(name='scratch/B/0', scale='another')], {})
    with pytest.raises(ConfigError, match='another scale'): scale.read_results(tmp_path, scale.TINY)
    (tmp_path/'queries.npz').write_bytes(b'nothing')
    with pytest.raises(ConfigError, match='cannot be read'): scale.read_results(tmp_path, scale.TINY)
    assert len({scale.scale_key(o) for o in scale.SCALES.values()}) == len(scale.SCALES)
    with pytest.raises(SystemExit, match='choose of paper, small, tiny'): scale.main(scale='large')

def test_runs_of_several_folders_come_together(scale, tmp_path, capsys):
    "Those that are there already stay, with their queries; a run that is done takes the place of one that ran away."
    key, ap = scale.scale_key(scale.TINY), torch.zeros(3, 4).numpy()
    def folder(where, name, epochs, status='done'):
        (tmp_path/where).mkdir()
        record = dict(name=name, scale=key, epochs=epochs, status=status)
        queries = {f'{name}/rendered': ap + epochs} if status == 'done' else {}
        scale.write_results(tmp_path/where, [record], queries)
        return str(tmp_path/where)
    out, b = folder('all', 'trunk/B/0', 1), folder('b', 'trunk/B+CA/0', 2, 'ran away')
    more = [b, folder('c', 'trunk/B/0', 3), folder('d', 'trunk/B+CA/0', 4)]
    scale.main(out=out, scale='tiny', minutes=0, take_from=','.join([*more, '']), only='trunk/B/0,trunk/TMPA/0')
    assert '2 runs' in (said := capsys.readouterr().out) and '1 are left' in said and 'trunk/TMPA/0' in said
    records, queries = scale.read_results(out, scale.TINY)
    assert [(r['name'], r['epochs']) for r in records] == [('trunk/B/0', 1), ('trunk/B+CA/0', 4)]
    assert {k: v.max() for k, v in queries.items()} == {'trunk/B/0/rendered': 1, 'trunk/B+CA/0/rendered': 4}
    with pytest.raises(ConfigError, match='nowhere/runs.jsonl is missing'):
        scale.take(tmp_path/'new', [b, 'nowhere'], scale.TINY)
    with pytest.raises(ConfigError, match='another scale.*choose another --take_from'):
        scale.take(tmp_path/'new', [b], scale.SMALL)
    assert not (tmp_path/'new').exists()

def test_what_was_run_at_the_papers_scale(scale):
    "The runs that the page shows are of this scale, with scores that their queries give, all of the same people."
    records, queries = scale.read_results(RESULTS/'paper_scale', scale.Scale())
    assert {r['name'] for r in records} >= {f'trunk/{row}/0' for row in scale.TABLE2}
    people = {}
    for r in records:
        for name, settings in r['scores'].items():
            who, *way = name.split()
            for setting, s in settings.items():
                ap, first, pid = queries['/'.join([r['name'], who, *(way or ['as trained']), setting])]
                n, each = {'rendered': (206, 10), 'real': (50, 8)}[who]
                assert (torch.unique(torch.tensor(pid), return_counts=True)[1] == each).all() and len(set(pid)) == n
                assert (people.setdefault((r['trial'], who, setting), pid) == pid).all()
                assert ap.mean() == pytest.approx(s['mAP'], abs=1e-5)
                assert (first == 1).mean() == pytest.approx(s['rank1'], abs=1e-5)

def test_numbers_of_the_papers_scale_in_the_readme(scale):
    records, _ = scale.read_results(RESULTS/'paper_scale', scale.Scale())
    mean = {r['row']: 50*sum(s['mAP'] for s in r['scores']['rendered'].values()) for r in records
            if (r['start'], r['seed'], r['longer']) == ('trunk', 0, False)}
    said = ', '.join(f'{row} {mean[row]:.1f}' for row in ('B', 'B+CA', 'B+CA+PedMix', 'TMPA'))
    assert all(said in (ROOT/f).read_text(encoding='utf8') for f in ('README.md', 'CHANGELOG.md'))

@pytest.mark.parametrize('patch', [16, 4])
def test_what_was_run_at_the_small_scale(scale, patch):
    records = [json.loads(l) for l in (RESULTS/'paper_scale_small'/f'patch{patch}.jsonl').read_text().splitlines()]
    assert {r['scale'] for r in records} == {scale.scale_key(scale.of_patch(scale.SMALL, patch))}
    rows = ['B+CA+PedMix', *['B+CA']*(patch == 16)]
    wanted = {scale.name_of(s, r, k) for s in scale.STARTS for r in rows for k in range(3)}
    assert {r['name'] for r in records} >= wanted
    assert len({r['trunk']['weights'] for r in records if r['trunk']}) == 1

def test_paper_scale_plans_every_row_once(scale):
    names = [scale.name_of(*p) for p in scale.plan(3)]
    assert len(names) == len(set(names)) and names[:4] == [f'trunk/{r}/0' for r in scale.TABLE2]
    assert set(names) >= {f'{s}/{r}/{seed}' for s in scale.STARTS for r in scale.TABLE2 for seed in range(3)}

def test_as_long_as_tmpa(scale):
    "Epochs from seconds of the same card, those of shared cards left out."
    def run(row, seconds, card='a', beside=0):
        return dict(row=row, train_seconds=seconds, card=card, beside=beside, epochs=80, status='done')
    runs = [run('B+CA', 100.), run('B+CA', 900., beside=2), run('TMPA', 250.), run('TMPA', 1., card='b')]
    assert scale.epochs_of('B+CA', True, runs, 'a', scale.Scale()) == 200
    assert scale.epochs_of('B+CA', False, runs, 'a', scale.Scale()) == 80
    assert scale.epochs_of('B+CA', True, runs, 'b', scale.Scale()) is None

@pytest.mark.cpu(reason='compares two trainings to the last bit')
def test_the_trunk_learns_and_can_be_made_again(scale):
    "With its own rate; and the ResNet-50 of the page has learnt, where an earlier way of training it did not."
    more = replace(scale.TINY, trunk_ids=32, trunk_epochs=12)
    assert scale.train_trunk(more, torch.device('cpu'))[1] > .6  # of 32 people
    (a, *_), (b, *_) = (scale.train_trunk(replace(more, trunk_epochs=2), torch.device('cpu')) for _ in range(2))
    for v, w in zip(a.state_dict().values(), b.state_dict().values()): assert (v == w).all()
    kept = [json.loads(l) for l in (RESULTS/'paper_scale'/'runs.jsonl').read_text().splitlines()]
    assert all(r['trunk']['accuracy'] > .9 for r in kept if r['trunk'])

def test_rows_with_other_patches_begin_with_the_same_trunk(scale):
    usual, other = (scale.of_patch(scale.SMALL, o) for o in (16, 4))
    assert usual == scale.of_patch(scale.SMALL, None) == scale.SMALL and other.patch == 4
    assert scale.of_patch(scale.Scale(), 12) == scale.Scale()  # PedMix's own
    assert scale.trunk_key(usual) == scale.trunk_key(other) != scale.trunk_key(scale.Scale())
    assert scale.scale_key(usual) != scale.scale_key(other)
