"""Tables of the paper over seeds: shared rows, budgets, kills, other settings, and runs that are equal bit for bit."""
import json, os, re, runpy, signal, subprocess, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tmpa.all, tmpa.callback.runaway, tmpa.demo, tmpa.earlier, tmpa.run, tmpa.run_files, tmpa.run_records, tmpa.setup, tmpa.table_files, tmpa.tables
from tmpa.arguments import short_hash
from tmpa.cli import parse_ints
from tmpa.core import ConfigError
from tmpa.experiment import train_run
from tmpa.paper import TABLES, RecipeTable, TableRow, published_methods
from tmpa.recipes import RECIPES, Recipe, get_recipe, recipe_key

rp = SimpleNamespace(**{k: v for m in (tmpa.callback.runaway, tmpa.demo, tmpa.earlier, tmpa.run, tmpa.run_files, tmpa.run_records, tmpa.setup, tmpa.table_files, tmpa.tables, tmpa.all) for k, v in vars(m).items()})
TOY = dict(ids=16, epochs=1, seeds=1, size=(48, 24), arch='tiny_resnet', P=4, K=2)


@pytest.fixture(scope='module')
def people(tmp_path_factory): return str(tmp_path_factory.mktemp('data')/'people')


@pytest.fixture
def toy(people): return rp.make_setup('small', path=people, **TOY)


def states(out): return {f.name.split('-')[0]: rp.run_state(f)[0] for f in (out/'runs').iterdir()}


def run_cli(monkeypatch, capsys, tmp_path, *args):
    "Status, output and errors of `tmpa_reproduce ARGS`."
    script = tmp_path/'tmpa_reproduce.py'
    script.write_text('from tmpa.cli import tmpa_reproduce\ntmpa_reproduce()\n')
    monkeypatch.setattr(sys, 'argv', ['tmpa_reproduce', *map(str, args)])
    status = 0
    try: runpy.run_path(str(script), run_name='__main__')
    except SystemExit as e: status = e.code
    out = capsys.readouterr()
    return status, out.out, out.err


def test_two_runs_are_equal_bit_for_bit(toy, tmp_path, device):
    cfg = toy.config('TMPA', toy.specs[0], 0, tmp_path)
    for name, seed in (('a', 0), ('b', 0), ('c', 1)): train_run(replace(cfg, out=str(tmp_path/name), seed=seed, epochs=2), quiet=True)
    a, b, c = (torch.load(tmp_path/o/'last.pth', weights_only=True)['model'] for o in 'abc')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
    same = lambda f: (tmp_path/'a'/f).read_bytes() == (tmp_path/'b'/f).read_bytes()
    assert same('queries.csv')
    strip = lambda o: re.sub(r',\d\d:\d\d$', '', (tmp_path/o/'history.csv').read_text(), flags=re.M)  # the time of an epoch
    assert strip('a') == strip('b')
    scores = [json.loads((tmp_path/o/'metrics.json').read_text())['scores'] for o in 'ab']
    assert scores[0] == scores[1]
    assert {'config.json', 'environment.json', 'history.csv', 'last.pth', 'metrics.json', 'queries.csv'} <= {p.name for p in (tmp_path/'a').iterdir()}
    env = json.loads((tmp_path/'a'/'environment.json').read_text())
    assert 'git' in env and env['versions']['torch']
    assert env['cpu'] and env['instructions'] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_tables_share_runs_and_never_repeat_them(toy, tmp_path, capsys):
    rp.reproduce(rp.pick_tables('table2,table3'), toy, tmp_path, only=['B+CA', 'none', 'all'])
    assert capsys.readouterr().out.startswith('2 runs, 2 to do')
    before = {f: f.stat().st_mtime_ns for f in tmp_path.glob('runs/*/metrics.json')}
    assert len(before) == 2
    rp.reproduce(rp.pick_tables('table3,table7'), toy, tmp_path, only=['Baseline', '12×12', 'all'])
    assert capsys.readouterr().out == '2 runs, 0 to do\n'
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.glob('runs/*/metrics.json')}
    lines = rp.read_lines(tmp_path/'results.csv')
    assert [l['recipe'] for l in lines] == ['B+CA', 'B+CA+PedMix'] and all(0 <= float(l['mAP_t2v']) <= 1 and l['mINP_v2t'] for l in lines)
    for name in ('table2', 'table3', 'table7'):
        for end in ('md', 'csv', 'png'): assert (tmp_path/f'{name}-synthetic-t2v.{end}').exists()
    text = (tmp_path/'table7-synthetic-t2v.md').read_text()
    assert '76.83' in text and '8×8: not run yet. `reproduce(...)' in text  # the command line cannot say this toy setup


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_a_killed_command_goes_on(toy, people, tmp_path):
    code = f"""from tmpa.all import *
if __name__ == '__main__': reproduce(pick_tables('table2'), make_setup('small', path={people!r}, **{TOY!r}), {str(tmp_path/'out')!r}, only=['B', 'B+CA'])"""
    (tmp_path/'go.py').write_text(code)
    p = subprocess.Popen([sys.executable, str(tmp_path/'go.py')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs, t = tmp_path/'out'/'runs', time.time()
    while not (list(runs.glob('*/metrics.json')) and list(runs.glob('b_ca-*/config.json'))) and p.poll() is None and time.time()-t < 600: time.sleep(.005)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert states(tmp_path/'out')['b'] == 'done'
    finished = next(runs.glob('b-*/metrics.json')).stat().st_mtime_ns
    for f in runs.glob('b_ca-*/metrics.json'): f.unlink()  # should it have been that fast
    stray = next(runs.glob('b_ca-*'))/'stray.txt'; stray.write_text('a note on the run that was cut off')
    rp.reproduce(rp.pick_tables('table2'), toy, tmp_path/'out', only=['B', 'B+CA'], quiet=True)
    assert states(tmp_path/'out') == {'b': 'done', 'b_ca': 'done'} and stray.exists()
    assert next(runs.glob('b-*/metrics.json')).stat().st_mtime_ns == finished
    assert [l['recipe'] for l in rp.read_lines(tmp_path/'out'/'results.csv')] == ['B', 'B+CA']


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_other_settings_are_kept_apart(toy, people, tmp_path):
    more = rp.make_setup('small', path=people, **{**TOY, 'epochs': 2})
    for s in (toy, more): rp.reproduce(rp.pick_tables('table2'), s, tmp_path, only=['B'], quiet=True)
    lines = rp.read_lines(tmp_path/'results.csv')
    assert sorted(l['epochs'] for l in lines) == ['1', '2'] and len({l['setup'] for l in lines}) == 2
    for s in (toy, more):
        one, = (float(l['mAP_t2v']) for l in lines if l['setup'] == s.key)
        assert rp.fill_rows(TABLES['table2'], lines, s, 't2v')[0].values['mAP'] == [100*one]
    assert rp.fill_rows(TABLES['table2'], lines, replace(toy, seeds=(5,)), 't2v')[0].n == 0


def test_one_command_at_a_time(toy, tmp_path):
    with rp.folder_lock(tmp_path), pytest.raises(ConfigError, match='in use'): rp.reproduce(rp.pick_tables('table2'), toy, tmp_path, quiet=True)


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_budget(toy, tmp_path, capsys):
    short = replace(toy, budget=1e-3)
    for _ in range(2): rp.reproduce(rp.pick_tables('table2'), short, tmp_path, only=['B'])
    out = capsys.readouterr().out
    assert '1 runs, 1 to do' in out and '0.001 minutes of one core were over in epoch 1 of 1' in out and '1 runs, 0 to do' in out
    line, = rp.read_lines(tmp_path/'results.csv')
    assert (line['status'], line['budget'], line['mAP_t2v'] if 'mAP_t2v' in line else '') == ('over budget', '0.001', '')
    text = (tmp_path/'table2-synthetic-t2v.md').read_text()
    assert 'budget 0.001 minutes of one core a run' in text and 'B: more than 0.001 minutes. `reproduce(...) with this table and setup, and a larger budget' in text
    rp.reproduce(rp.pick_tables('table2'), toy, tmp_path, only=['B'], quiet=True, show=True)
    assert states(tmp_path) == {'b': 'over budget'}
    rp.reproduce(rp.pick_tables('table2'), toy, tmp_path, only=['B'], quiet=True)
    assert states(tmp_path) == {'b': 'done'}


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_a_row_that_fails_does_not_stop_the_others(toy, tmp_path, capsys):
    class Odd(rp.SlotMix):
        def masks(self, n, size, device=None): raise self.error('nobody to mix')
    rows = [TableRow('odd', Recipe('odd', mfe=False, mft=False, mix=dict(kind=Odd))), TableRow('B', 'B')]
    with pytest.raises(rp.TMPAError, match='1 of 2 runs failed, the first with ConfigError'): rp.reproduce(dict(mine=RecipeTable('Mine', rows)), toy, tmp_path)
    assert states(tmp_path) == {'odd': 'failed', 'b': 'done'}
    assert 'failed: ConfigError: Odd: nobody to mix' in (tmp_path/'mine-synthetic-t2v.md').read_text()
    with pytest.raises(ConfigError, match='nobody'): rp.reproduce(dict(mine=RecipeTable('Mine', rows[:1])), toy, tmp_path, quiet=True)


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_what_was_trained_is_not_lost(toy, tmp_path, monkeypatch):
    "Scoring that failed, and an interruption in the second epoch: the next command only does the rest."
    from tmpa import experiment as ex
    score,epochs = ex.score_feats,[]
    def fail(*a, **k): raise RuntimeError('the disk is full\nreally')
    monkeypatch.setattr(ex, 'score_feats', fail)
    with pytest.raises(rp.TMPAError, match='1 of 1 runs failed, the first with RuntimeError: the disk is full really'): rp.reproduce(rp.pick_tables('table2'), toy, tmp_path, only=['B'], quiet=True)
    weights = next(tmp_path.glob('runs/b-*/last.pth')); was = weights.stat().st_mtime_ns
    assert states(tmp_path) == {'b': 'failed'}
    monkeypatch.setattr(ex, 'score_feats', score)
    rp.reproduce(rp.pick_tables('table2'), toy, tmp_path, only=['B'], quiet=True)
    assert states(tmp_path) == {'b': 'done'} and weights.stat().st_mtime_ns == was
    two = replace(toy, run={**toy.run, 'epochs': 2})
    batch = ex.Watch.after_batch
    def stop(self):
        epochs.append(self.epoch)
        if self.epoch == 1: raise KeyboardInterrupt
    monkeypatch.setattr(ex.Watch, 'after_batch', stop)
    with pytest.raises(KeyboardInterrupt): rp.reproduce(rp.pick_tables('table2'), two, tmp_path, only=['B'], quiet=True)
    monkeypatch.setattr(ex.Watch, 'after_batch', lambda self: (epochs.append(self.epoch), batch(self)))
    epochs.clear()
    rp.reproduce(rp.pick_tables('table2'), two, tmp_path, only=['B'], quiet=True)
    assert set(epochs) == {1} and not list(tmp_path.glob('runs/*/resume.pth'))


@pytest.mark.cpu(reason='test_cli runs away on every device')
def test_a_loss_that_runs_away_stops_no_other_run(toy, tmp_path):
    "Not in the command that finds it, and not in the next."
    rows = [TableRow(r, r) for r in ('B', 'B+CA')]
    wild = replace(toy, run={**toy.run, 'lr': 1e25, 'warmup': 0})
    for _ in range(2):
        with pytest.raises(rp.RunawayError, match='lower lr'): rp.reproduce(dict(mine=RecipeTable('Mine', rows)), wild, tmp_path, quiet=True)
        assert set(states(tmp_path).values()) == {'failed'} and len(list(tmp_path.glob('runs/*/ran_away.json'))) == 2
    assert not (tmp_path/'set_aside').exists()


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='looks for processes as Linux has them')
def test_a_killed_worker_fails_nothing(toy, people, tmp_path):
    code = f"""from tmpa.all import *
if __name__ == '__main__':
    try: reproduce(pick_tables('table2'), make_setup('small', path={people!r}, **{ {**TOY, 'epochs': 30}!r}), {str(tmp_path/'out')!r}, only=['B', 'B+CA', 'B+CA+PedMix'], workers=2, quiet=True)
    except TMPAError as e: print(e)"""
    (tmp_path/'go.py').write_text(code)
    p = subprocess.Popen([sys.executable, str(tmp_path/'go.py')], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    t = time.time()
    while len(list(tmp_path.glob('out/runs/*/resume.pth'))) < 2 and p.poll() is None and time.time()-t < 600: time.sleep(.05)
    children = [int(c) for f in Path(f'/proc/{p.pid}/task').glob('*/children') for c in f.read_text().split()]
    worker = next(c for c in children if b'spawn_main' in Path(f'/proc/{c}/cmdline').read_bytes())
    os.kill(worker, signal.SIGKILL)
    out,_ = p.communicate(timeout=60)
    assert 'a training process was killed' in out and out.count('\n') == 1
    assert not list(tmp_path.glob('out/runs/*/failed.json')) and len(list(tmp_path.glob('out/runs/*/resume.pth'))) == 2


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_other_images_and_foreign_folders(toy, people, tmp_path, capsys):
    import shutil
    from tmpa.earlier import earlier_run
    rp.reproduce(rp.pick_tables('table2'), toy, tmp_path/'out', only=['B'], quiet=True)
    cfg = toy.config('B', toy.specs[0], 0, tmp_path/'out')
    assert earlier_run(cfg) and earlier_run(replace(cfg, spec=replace(cfg.spec, path='elsewhere'), recipe=replace(cfg.recipe, name='other name')))
    with pytest.raises(rp.ConfigError, match='other images'): earlier_run(cfg, 'generator 99')
    for name,files in (('a', {'config.json': '{}', 'thesis.tex': 'x'}), ('b', {'.profile': 'x'}), ('c', {'config.json': '[1]'}), ('d', {'config.json': 'half'})):
        (d := tmp_path/name).mkdir()
        for f,text in files.items(): (d/f).write_text(text)
        with pytest.raises(rp.ConfigError, match='holds no run|cannot be read'): earlier_run(replace(cfg, out=str(d)))
        assert {f.name for f in d.iterdir()} == set(files)
    run = next((tmp_path/'out'/'runs').iterdir())
    config = (run/'config.json').read_text()
    (run/'config.json').write_text('half')
    with pytest.raises(rp.ConfigError, match='config.json cannot be read'): rp.reproduce(rp.pick_tables('table2'), toy, tmp_path/'out', only=['B'], quiet=True)  # finished: nothing is done to it
    (run/'metrics.json').rename(tmp_path/'metrics.json')
    capsys.readouterr()
    rp.reproduce(rp.pick_tables('table2'), toy, tmp_path/'out', only=['B'])  # an unfinished one may hold weights: it is kept
    assert f'cannot be gone on with; it is kept in {tmp_path}/out/set_aside/{run.name}-1, and the run begins again' in capsys.readouterr().out
    assert (tmp_path/'out'/'set_aside'/f'{run.name}-1'/'last.pth').exists() and states(tmp_path/'out') == {'b': 'done'}
    (run/'metrics.json').write_text('half')
    with pytest.raises(rp.ConfigError, match='metrics.json cannot be read'): rp.reproduce(rp.pick_tables('table2'), toy, tmp_path/'out', only=['B'], quiet=True)


def test_the_papers_numbers_stand_beside_their_own_kind(toy):
    t = TABLES['table3']
    papers = lambda setup, setting: [c for c in rp.filled_table(t, rp.fill_rows(t, [], setup, setting))[0] if 'paper' in c]
    assert papers(toy, 't2v') and not papers(toy, 'v2t')
    assert not papers(rp.make_setup('paper', 'sysu', 'x'), 'all_single')
    line = lambda trial, v: dict(recipe_key=short_hash({}), setup='a', status='done', data='sysu', arch='resnet50', epochs='80', trial=trial, rank1_all_single=v)
    rows = [r for r in rp.table1([line('all', .6), line('3', .5)]) if r[0] == 'TMPA here, sysu']
    assert len(rows) == 2 and all('±' not in c for r in rows for c in r)


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_workers_and_parts(toy, tmp_path):
    "Two processes give what one gives, and a finished network can be scored by its parts."
    rp.reproduce(rp.pick_tables('table2,parts'), toy, tmp_path/'two', only=['B+CA', 'TMPA'], workers=2, quiet=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rp.reproduce(rp.pick_tables('table2'), toy, tmp_path/'one', only=['B+CA'], quiet=True)
    torch.set_num_threads(threads)
    one, two = (next((tmp_path/o/'runs').glob('b_ca-*/queries.csv')).read_text() for o in ('one', 'two'))
    assert one == two
    lines = rp.read_lines(tmp_path/'two'/'results.csv')
    assert len(lines) == 5 and sum('part=' in l['recipe'] for l in lines) == 2
    filled = rp.fill_rows(TABLES['parts'], lines, toy, 't2v')
    assert [f.n for f in filled] == [1]*4 and len({f.values['mAP'][0] for f in filled}) > 2


def test_errors_are_one_line(monkeypatch, capsys, tmp_path):
    small = '--scale', 'small', '--ids', 10, '--path', tmp_path/'people', '--out', tmp_path/'out'
    for args, words in ((('table8',), ('table8', 'table2', 'all')), (('table2',), ('--data', '--scale small')),
                        (('table2', *small, '--rows', 'X'), ("'X'", 'B+CA')), (('table2', *small, '--direction', 'up'), ("'up'", 't2v')), (('table2', '--data', 'regdb', '--path', tmp_path/'nowhere'), ('nowhere',)),
                        (('table2', *small, '--seeds', 'many'), ('many',)), (('table2', *small, '--rows', 'B;TPMA'), ('TPMA', 'B+CA')), (('table2', *small, '--rows', ''), ('rows',)), (('table2', *small, '--budget', 0), ('budget', 'above 0')),
                        (('table2', *small, '--epochs', 0), ('epochs', '1 or more')), (('table2', *small, '--seeds=-1,2',), ('seeds=(-1, 2)', 'from 0')), (('table2', *small, '--trial', '1;2'), ('1;2',)), (('table2', *small[:-1], tmp_path/'tmpa_reproduce.py'/'x'), ('tmpa_reproduce.py',)), (('table2', *small, '--trial', 11), ('11',))):
        status, out, err = run_cli(monkeypatch, capsys, tmp_path, *args)
        assert status == 2 and err.count('\n') == 1 and 'error:' in err, err
        for w in words: assert w in err
    assert not (tmp_path/'out').exists()


def test_command_line(monkeypatch, capsys, tmp_path, device):
    args = 'table3', '--scale', 'small', '--ids', 16, '--epochs', 1, '--seeds', 1, '--rows', 'none', '--out', tmp_path/'out', '--path', tmp_path/'people'
    status, out, err = run_cli(monkeypatch, capsys, tmp_path, *args)
    assert status == 0, err
    assert '1 runs, 1 to do' in out and '| none | 76.83 |' in out and 'results.csv' in out and 'centre, sub-centre: not run yet' in out
    assert (tmp_path/'out'/'table3-synthetic-t2v.png').stat().st_size > 2000
    missing = next(l for l in out.splitlines() if l.startswith('- centre:')).split('`')[1]
    assert missing == f'tmpa_reproduce table3 --rows "centre" --scale small --path {tmp_path/"people"} --epochs 1 --ids 16 --seeds 1 --out {tmp_path/"out"}'


def test_one_seed_and_all_tables_in_capitals(people):
    assert rp.make_setup('small', path=people, seeds=[5]).args.endswith('--seeds 5,') and parse_ints('5,', 'seeds') == [5]
    assert rp.pick_tables('ALL').keys() == rp.pick_tables('all').keys()
    with pytest.raises(rp.ConfigError, match='seeds=.*from 0'): rp.make_setup('small', path=people, seeds=[-1])


def test_recipes_of_all_tables():
    "Every row that is not only a published number has a recipe, and table I is the paper's."
    assert {r.label for t in TABLES.values() for r in t.rows if r.recipe is None} == {'AlignGAN', 'JSIA'}
    for t in TABLES.values():
        for r in t.rows:
            if r.recipe: assert Recipe.from_dict(json.loads(json.dumps(get_recipe(r.recipe).asdict()))).name
    assert len(published_methods()) == 20
    assert recipe_key('B+CA') == rp.row_key(TABLES['table7'].rows[0]) == rp.row_key(TABLES['table3'].rows[0])


def test_methods_are_told_apart():
    "By what they do: names and versions of functions and classes, a chance of 1 from the default, and not by defaults that are spelled out."
    key = lambda r, **kw: recipe_key(get_recipe(r).but(**kw))
    ca = [key('B+CA', channel_exchange=c) for c in (True, .75, 1., 1, .25, False, 0)]
    assert ca[0] == ca[1] and ca[2] == ca[3] and len(set(ca)) == 4 and ca[5] == ca[6] == key('B')
    def two(c): return rp.SE(c, 2)
    att = [key('B', model=dict(attention=a)) for a in (partial(rp.SE, reduction=2), partial(rp.CBAM, reduction=2), two, partial(rp.SE, reduction=2), rp.SE)]
    assert len(set(att)) == 4 and att[0] == att[3]
    def mix(share, doc='', number=None):
        class Mine(rp.SlotMix):
            __doc__, version = doc, number
            def __init__(self, stripes=8, **kwargs): super().__init__(**kwargs); self.stripes = stripes
            def masks(self, n, size, device=None): return torch.full((n, 1, *size), share)
        return Mine
    mine = [key('B', mix=dict(kind=k, **kw)) for k,kw in ((mix(0.), {}), (mix(1., number=2), {}), (mix(0., 'x'), dict(stripes=8, p=1.)))]
    assert mine[0] == mine[2] != mine[1]
    class Net(rp.TMPANet, method='net_of_a_test'): pass
    own = []
    for number in (None, 2, 'two'):
        Net.version = number
        own.append(key('B', net='net_of_a_test'))
    del rp.NETS['net_of_a_test']
    assert len(set(own)) == 3 and own[0] == short_hash(dict(channel_exchange=False, mfe=False, mft=False, mix=None, net='net_of_a_test'))


def test_a_lambda_is_refused_before_anything_is_trained(toy, tmp_path):
    "Two of them have one name."
    row = TableRow('mine', Recipe('mine', mfe=False, mft=False, model=dict(attention=lambda c: rp.SE(c, 2))))
    with pytest.raises(ConfigError, match='a lambda has no name.*functools.partial'): rp.reproduce(dict(mine=RecipeTable('Mine', [row])), toy, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_numbers_that_versions_before_wrote_are_still_those_of_their_recipes():
    key = lambda r, **kw: recipe_key(get_recipe(r).but(**kw))
    # runs of before 0.7, when AGW and DART were something else, belong to the recipes that say so
    before = {'AGW alpha=0.8': '9b018064', 'DART one trunk': 'b54a6cca', 'DART+PedMix one trunk': '9863d27c'}
    assert {r: key(r) for r in before} == before and not {key(r) for r in ('AGW', 'DART', 'DART+PedMix')} & {*before.values()}
    for r,kw in (('B+CA+PatchMix', dict(mix=dict(kind='patchmix', ratio=.5))), ('B+CA+CutMix', dict(mix=dict(kind='cutmix', alpha=1.))), ('DART', dict(loss=dict(threshold=.5))), ('AGW', dict(model=dict(nonlocal_channels=1)))):
        assert key(r, **kw) == key(r), r


@pytest.mark.parametrize('change,words', [(dict(mfe=False), 'MFT needs'), (dict(loss=dict(alfa=1)), 'alfa'), (dict(model=dict(heeds=1)), 'heeds'), (dict(mix=dict(ratio=1)), 'ratio'), (dict(method='dart'), 'one trunk'), (dict(net='agw'), 'one trunk'),
    (dict(net='agw', method='dart'), 'one trunk'),
    (dict(method='dart', mfe=False, mft=False, model=dict(base='agw')), 'base'), (dict(mix=dict(kind='stripes')), 'choose one of')])
def test_recipes_that_contradict_themselves(toy, tmp_path, change, words):
    r = get_recipe('TMPA').but(**change)
    with pytest.raises(ConfigError, match=words): r.check()
    with pytest.raises(ConfigError, match=words): rp.reproduce(dict(mine=RecipeTable('Mine', [TableRow('x', r)])), toy, tmp_path/'out', quiet=True)
    assert not (tmp_path/'out').exists()


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_sweep(toy, tmp_path):
    "A patch is in pixels; two sweeps in one folder have tables of their own; what cannot be run is said before the first run."
    a = rp.sweep('B+CA+PedMix', {'mix.patch': [4, 8]}, toy, tmp_path, quiet=True)
    assert [f.row.label for f in a] == ['mix.patch 4', 'mix.patch 8'] and [f.n for f in a] == [1, 1]
    assert sorted(json.loads(f.read_text())['recipe']['mix']['patch'] for f in tmp_path.glob('runs/*/config.json')) == [[4, 4], [8, 8]]
    b = rp.sweep('B', {'model.attention': [partial(rp.SE, reduction=k) for k in (2, 4)]}, toy, tmp_path, quiet=True)
    assert [f.n for f in b] == [1, 1] and len({f.row.label for f in b}) == 2 and len(list(tmp_path.glob('runs/*'))) == 4
    assert len(list(tmp_path.glob('sweep-*.md'))) == 2
    for grid,words in (({'mix.patch': [7]}, '7'), ({'mix.patch': [None]}, 'patch'), ({'mix.p': .5}, 'list'), ({'mix.p': []}, 'list'), ({'loss.alfa': [1]}, 'alfa')):
        with pytest.raises(ConfigError, match=words): rp.sweep('B+CA+PedMix', grid, toy, tmp_path, quiet=True)
    long = {f'loss.{k}': [.5] for k in ('alpha', 'beta', 'lam1', 'lam2', 'w_wrt', 'w_msi', 'w_mft', 'margin', 'eps') if k in __import__('inspect').signature(rp.TMPALoss).parameters}
    name = Path(toy.config(rp.with_fields('TMPA', {k: v[0] for k,v in long.items()} | {'mix.seed': 10**30}), toy.specs[0], 0, tmp_path).out).name
    assert len(name) < 120
    with pytest.raises(ConfigError, match='lrr'): rp.make_setup('small', lrr=1)


def test_scoring_again(toy, tmp_path, capsys, device):
    "Own blocks are known; a network that is gone costs one row; `show` scores nothing; a folder of another row may be damaged."
    class Block(torch.nn.Module):
        def __init__(self, c): super().__init__(); self.c = torch.nn.Conv2d(c, c, 1)
        def forward(self, x): return x*self.c(x).sigmoid()
    own = Recipe('own', mfe=False, mft=False, mix=None, model=dict(attention=Block))
    table = RecipeTable('Mine', [TableRow('B', 'B'), TableRow('before', own, score=dict(feature='pool')), TableRow('wrong', own, score=dict(part='specific'))])
    file, = rp.reproduce(dict(mine=table), toy, tmp_path, quiet=True)
    said = capsys.readouterr().out
    assert said.startswith("wrong: not scored: part='specific'") and said.count('\n') == 1
    text = file.read_text()
    assert [l.split('|')[-2].strip() for l in text.splitlines() if l.startswith(('| B', '| before', '| wrong'))] == ['1/1', '1/1', '0/1']
    run, = tmp_path.glob('runs/own-*')
    for f in run.glob('scores-*'): f.unlink()
    rp.reproduce(dict(mine=table), toy, tmp_path, quiet=True, show=True)
    assert not list(run.glob('scores-*'))
    (run/'config.json').unlink(); (run/'last.pth').unlink()
    with pytest.warns(UserWarning, match='no config.json'): rp.reproduce(rp.pick_tables('table2'), toy, tmp_path, only=['B'], quiet=True)
    with pytest.raises(ConfigError, match='metric'): rp.reproduce(dict(mine=replace(table, metrics=('rank5',))), toy, tmp_path, quiet=True)


def test_table1_says_what_is_missing(toy, tmp_path):
    out = rp.reproduce(rp.pick_tables(' table1, table2'), rp.make_setup('small', path=str(tmp_path/'people'), ids=16, epochs=1, seeds=1), tmp_path, direction='v2t', show=True, quiet=True)
    assert 'TMPA: not run yet. `tmpa_reproduce table1 --rows "TMPA" --scale small' in out[0].read_text()
    assert '--direction v2t --out' in out[1].read_text()
    row = RecipeTable('Mine', [TableRow('a|b', 'B')])
    assert r'| a\|b |' in rp.table_markdown('mine', row, rp.fill_rows(row, [], toy, 't2v'), toy, 't2v')


def test_a_line_says_which_instruction_sets_made_the_run(toy, tmp_path):
    from tmpa.provenance import environment, save_environment
    from tmpa.run_files import write_json
    cfg = toy.config('B', toy.specs[0], 0, tmp_path)
    out = Path(cfg.out)
    out.mkdir(parents=True)
    write_json(out/'config.json', cfg.asdict())
    write_json(out/'metrics.json', dict(scores={}))
    here = torch.backends.cpu.get_cpu_capability()
    said = lambda: rp.run_lines(out)[0]['instructions']
    assert said() == ''  # of a version that did not note it
    save_environment(out/'environment.json')
    assert said() == here
    write_json(out/'environment.json', {**environment(), 'instructions': 'AVX1024'})
    save_environment(out/'environment.json')
    assert said() == f'AVX1024+{here}'


def test_real_data_has_no_number_of_rendered_people(toy, tmp_path):
    from tmpa.earlier import earlier_run
    from tmpa.run_files import write_json
    cfg = toy.config('B', replace(toy.specs[0], data='regdb', path='RegDB'), 0, tmp_path)
    Path(cfg.out).mkdir(parents=True)
    write_json(Path(cfg.out)/'config.json', cfg.asdict()); write_json(Path(cfg.out)/'metrics.json', dict(scores={}))
    assert earlier_run(replace(cfg, spec=replace(cfg.spec, n_ids=300, seed=5)))


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='looks for processes as Linux has them')
@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(people, tmp_path, sig):
    code = f"""from tmpa.all import *
if __name__ == '__main__': reproduce(pick_tables('table2'), make_setup('small', path={people!r}, **{ {**TOY, 'epochs': 40}!r}), {str(tmp_path/'out')!r}, only=['B', 'B+CA', 'B+CA+PedMix'], workers=2, quiet=True)"""
    (tmp_path/'go.py').write_text(code)
    heard = lambda: signal.signal(sig, signal.SIG_DFL)  # a shell ignores SIGINT for what it starts in the background
    p = subprocess.Popen([sys.executable, str(tmp_path/'go.py')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                         preexec_fn=heard if sig != signal.SIGKILL else None)
    t = time.time()
    while len(list(tmp_path.glob('out/runs/*/resume.pth'))) < 2 and p.poll() is None and time.time()-t < 600: time.sleep(.05)
    children = [int(c) for f in Path(f'/proc/{p.pid}/task').glob('*/children') for c in f.read_text().split()]
    assert len(children) >= 2
    p.send_signal(sig)  # to this process alone
    p.wait(timeout=600)
    alive = lambda c: Path(f'/proc/{c}/stat').exists() and Path(f'/proc/{c}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    t = time.time()
    while any(map(alive, children)) and time.time()-t < 300: time.sleep(.1)
    assert not any(map(alive, children))
    assert len(list(tmp_path.glob('out/runs/*'))) == 2  # none was begun after it
