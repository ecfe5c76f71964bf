"""What a disk, a user or a killed process leaves: pipes, leftovers, flipped bits, and lists of nonsense."""
import importlib.util, os, signal, subprocess, sys, tempfile, threading, time, warnings
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from scipy.io import savemat

from tmpa.callback.resume import ResumeFit, outline
from tmpa.core import DataError, ProtocolError, ReIDImage, TMPAError, atomic_write, leftovers, remove_dead, temp_folder
from tmpa.data.cache import image_cache
from tmpa.protocols import load_perms
from tmpa.data.readers import csv_items, regdb_items, sysu_items
from tmpa.data.image import read_image
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.synthetic import make_regdb, make_sysu
from tmpa.results import read_lines, write_lines
from tmpa.evaluation import cmc_map, cross_settings_of, evaluate, evaluate_settings
from tmpa.features import load_features
from tmpa.learner import tmpa_learner
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, read_meta, save_weights
from tmpa.report import read_log
from tmpa.run_files import read_json
from tmpa.scoring import evaluate_run, save_queries
from tmpa.search import Gallery


def line(e):
    "An error that is one line, of a length that can be read."
    text = str(e.value)
    assert '\n' not in text and len(text) <= 2005, text
    return text

def within(seconds, f):
    "What `f` raises; a hang fails."
    def stop(*_): raise AssertionError('it hangs')
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        with pytest.raises(TMPAError) as e: f()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return line(e)


# --- Pipes -------------------------------------------------------------------------------------------------------------

def index_of_pipes(d):
    "A data set in RegDB's shape whose index files are pipes."
    for o in ('Visible', 'Thermal', 'idx'): (d/o).mkdir()
    os.mkfifo(d/'idx'/'train_visible_1.txt')
    return d

READS = {
    'x.jpg': read_image, 'x.ppm': read_image, 'items.csv': csv_items, 'x.npz': load_features, 'x.pt': load_features,
    'x.mat': load_features, 'g.npz': Gallery.load, 'last.pth': read_meta, 'rand_perm_cam.mat': load_perms,
    'metrics.json': read_json, 'history.csv': read_log,
    'table.csv': lambda f: make_sysu(f.parent/'people', f),
}

@pytest.mark.parametrize('name', READS)
def test_a_pipe_is_no_file(tmp_path, name):
    os.mkfifo(tmp_path/name)
    text = within(5, lambda: READS[name](tmp_path/name))
    assert name in text and ('pipe' in text or 'no such file' in text or name == 'metrics.json')

def test_pipes_of_a_data_set(tmp_path):
    (tmp_path/'r').mkdir(); (tmp_path/'s'/'exp').mkdir(parents=True)
    os.mkfifo(tmp_path/'s'/'exp'/'test_id.txt')
    assert 'pipe' in within(5, lambda: regdb_items(index_of_pipes(tmp_path/'r'), 1, 'train'))
    assert 'pipe' in within(5, lambda: sysu_items(tmp_path/'s', 'test'))
    os.mkfifo(tmp_path/'x.jpg')
    (tmp_path/'i.csv').write_text('file,pid,cam,modality,split\nx.jpg,1,1,visible,train\n')
    text = within(5, lambda: csv_items(tmp_path/'i.csv'))
    assert 'line 2' in text and 'pipe' in text

def test_a_cache_or_manifest_that_is_a_pipe(tmp_path):
    data = make_regdb(tmp_path/'people', n_ids=2, per_modality=1, size=(24, 12))
    items = regdb_items(data, 1, 'train')
    cache = image_cache(items, (24, 12), folder=tmp_path/'c')
    cache.file.unlink()
    os.mkfifo(cache.file)
    assert len(image_cache(items, (24, 12), folder=tmp_path/'c')) == len(items) and cache.file.is_file()
    (data/'manifest.json').unlink()
    os.mkfifo(data/'manifest.json')
    assert 'manifest.json' in within(5, lambda: make_regdb(data, n_ids=2, per_modality=1, size=(24, 12)))


# --- What killed processes leave ---------------------------------------------------------------------------------------

def start(code):
    "A process that has printed a line, as `code` does when it is in the middle of something."
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    return p

WRITES = 'import sys, time\nfrom tmpa.core import *\nwith {}({!r}) as t:\n  {}; print(flush=True); time.sleep(60)'

@pytest.mark.parametrize('how, f, fill', [('atomic_write', 'g.npz', "t.write_bytes(b'x'*1000)"), ('temp_folder', 'v1', "(t/'a').mkdir()")])
def test_the_next_writer_removes_what_the_dead_left_and_nothing_else(tmp_path, how, f, fill):
    mine = [tmp_path/o for o in ('.g-features.npz', '.g-abcd1234.npz', '.v1-mine0000', '.g-thesis.tmpa.npz')]
    for o in mine: o.write_text('mine')
    dead, living = (start(WRITES.format(how, str(tmp_path/f), fill)) for _ in range(2))
    try:
        assert len(leftovers(tmp_path/f)) == 2
        remove_dead(tmp_path/f)
        assert len(leftovers(tmp_path/f)) == 2
        dead.kill(); dead.wait()
        remove_dead(tmp_path/f)
        assert len(leftovers(tmp_path/f)) == 1 and all(o.read_text() == 'mine' for o in mine)
    finally:
        for p in (dead, living): p.kill(); p.wait(); p.stdout.close()
    remove_dead(tmp_path/f)
    assert not leftovers(tmp_path/f) and sorted(tmp_path.iterdir()) == sorted(mine)

@pytest.mark.parametrize('make, how', [('mkstemp', atomic_write), ('mkdtemp', temp_folder)])
def test_what_is_taken_for_dead_before_it_is_locked_is_made_again(tmp_path, monkeypatch, make, how):
    "Two processes that begin the same file or folder at once."
    made, whole = [], getattr(tempfile, make)
    def taken_once(**kw):
        made.append(whole(**kw))
        if len(made) == 1: remove_dead(tmp_path/'v1')  # the other one, between making and locking
        return made[-1]
    monkeypatch.setattr(tempfile, make, taken_once)
    with how(tmp_path/'v1') as t:
        assert len(made) == 2 and leftovers(tmp_path/'v1') == [t]

def test_galleries_and_rendered_people_clean_up(tmp_path):
    g = Gallery(made_by='test')
    g.add(['a.jpg'], 0, feats=torch.ones(1, 4))
    for f in ('.g-abcd1234.tmpa.npz', '.h-abcd1234.tmpa.npz'): (tmp_path/f).touch()
    (tmp_path/'.v1-abcd1234.tmpa'/'Visible').mkdir(parents=True)
    g.save(tmp_path/'g.npz')
    assert not (tmp_path/'.g-abcd1234.tmpa.npz').exists() and (tmp_path/'.h-abcd1234.tmpa.npz').exists()
    (tmp_path/'.g-abcd1234.tmpa.npz').touch()
    Gallery.load(tmp_path/'g.npz')
    assert not (tmp_path/'.g-abcd1234.tmpa.npz').exists()
    make_regdb(tmp_path/'v1', n_ids=2, per_modality=1, size=(24, 12))
    assert not (tmp_path/'.v1-abcd1234.tmpa').exists()
    assert not {o.name for o in tmp_path.iterdir()} - {'g.npz', '.h-abcd1234.tmpa.npz', 'v1'}

def test_writers_side_by_side(tmp_path):
    "Four threads write one file and clean up after each other: each write succeeds, and nothing is left."
    def write(i):
        for _ in range(50):
            with atomic_write(tmp_path/'a.txt') as t: t.write_text(str(i)*1000)
    errors, before = [], threading.excepthook
    threading.excepthook = lambda o: errors.append(o.exc_value)
    try:
        ts = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for t in ts: t.start()
        for t in ts: t.join()
    finally: threading.excepthook = before
    assert not errors and len(set((tmp_path/'a.txt').read_text())) == 1 and not leftovers(tmp_path/'a.txt')

def test_names_that_hardly_fit(tmp_path):
    for name in ('n'*251 + '.txt', 'ä'*125 + '.txt'):
        with atomic_write(tmp_path/name) as t: t.write_text('whole')
        assert (tmp_path/name).read_text() == 'whole'
    with pytest.raises(TMPAError) as e: atomic_write(tmp_path/('n'*300)/'a.txt').__enter__()
    assert 'too long' in line(e)


# --- Flipped bits, lists of nonsense, kills: a few of what benchmarks/faults.py does -----------------------------------

spec = importlib.util.spec_from_file_location('faults', Path(__file__).parents[1]/'benchmarks'/'faults.py')
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

CASES = dict(flips=(faults.flips, 8), reader_cases=(faults.reader_cases, 60), metadata=(faults.metadata, 24), kills=(faults.kills, 2))
SHORT = 'save_weights', 'save_gallery', 'save_features', 'write_json', 'decoded images'

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')

@forks
@pytest.mark.parametrize('only, every', [(SHORT, 12), (['renderer'], 64)])
def test_kills_at_events_of_files(tmp_path, only, every):
    rows = list(faults.event_kills(tmp_path, every, seed=3, only=only))
    assert len(rows) >= 5 and {r[1] for r in rows} == {'fine'}, [r for r in rows if r[1] != 'fine']

@forks
def test_edits_of_runs_and_kills_of_trainings():
    "In a process of its own: one that has trained with threads cannot be forked."
    less = '--flips 0 --cases 0 --meta 0 --kills 0 --edits 10 --every 39 --works training --seed 5'
    command = [sys.executable, '-W', 'ignore', faults.__file__, *less.split()]
    r = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [l for l in r.stdout.splitlines() if l.startswith(('edit: ', 'event: training'))]
    assert r.returncode == 0 and len(lines) > 3 and sum(int(l.split()[-7]) for l in lines) >= 11, r.stdout + r.stderr

def test_what_faults_would_find(tmp_path):
    "A suite that cannot fail shows nothing."
    def wait(): time.sleep(60)
    assert faults.outcome(lambda: 1/0, bool)[0] == 'traceback' and faults.outcome(lambda: 1, lambda r: r == 2)[0] == 'wrong'
    signal_of = faults.signal.alarm
    faults.signal.alarm = lambda n: signal_of(min(n, 1))
    try: assert faults.outcome(wait, bool)[0] == 'hang'
    finally: faults.signal.alarm = signal_of

def flip(f, at, bit=0):
    data = bytearray(f.read_bytes())
    data[at] ^= 1 << bit
    f.write_bytes(data)

def test_torch_files_without_checksums_are_read(tmp_path):
    x = torch.randn(3, 4)
    f = tmp_path/'x.pt'
    torch.save(dict(feats=x, pids=torch.arange(3)), f, _use_new_zipfile_serialization=False)
    assert torch.equal(torch.from_numpy(load_features(f).feats), x)
    if not hasattr(torch.serialization, 'set_crc32_options'): return
    torch.serialization.set_crc32_options(False)
    try: torch.save(dict(feats=x, pids=torch.arange(3)), f)
    finally: torch.serialization.set_crc32_options(True)
    assert torch.equal(torch.from_numpy(load_features(f).feats), x)

def test_a_header_that_names_fewer_rows(tmp_path):
    "numpy asks for the checksum only where it reads a part to its end."
    np.savez(tmp_path/'x.npz', feats=np.ones((40, 8)), pids=np.arange(40))
    at = (tmp_path/'x.npz').read_bytes().index(b'(40, 8)') + 1
    flip(tmp_path/'x.npz', at)
    with pytest.raises(DataError) as e: load_features(tmp_path/'x.npz')
    assert 'x.npz cannot be read' in line(e)

def test_a_gallery_of_fewer_rows_than_it_claims(tmp_path):
    g = Gallery(made_by='test')
    g.add([f'{i}.jpg' for i in range(5)], 0, feats=torch.randn(5, 4))
    g.save(tmp_path/'g.npz')
    z = dict(np.load(tmp_path/'g.npz'))
    for bad in (dict(feats0=z['feats0'][:3]), dict(feats0=z['feats0'][:, :2]), dict(feats0=z['feats0']*np.nan),
                dict(numbers=z['numbers'][:, :4]), dict(numbers=z['numbers']*1.), dict(feats0=z['feats0'].astype('f8'))):
        np.savez(tmp_path/'bad.npz', **{**z, **bad})
        with pytest.raises(DataError) as e: Gallery.load(tmp_path/'bad.npz')
        assert 'bad.npz is damaged or no gallery' in line(e)

BAD_META = dict(n_classes=10**9, mft=99, arch=5, net=[1], attention={'a': 1}, lams='x', heads='two', pool_p=[], mfe=[1], version=3)

@pytest.mark.parametrize('key', BAD_META)
def test_metadata_of_another_kind(tmp_path, key):
    save_weights(TMPANet(5, micro_resnet, pretrained=False), tmp_path/'w.pth')
    file = torch.load(tmp_path/'w.pth', weights_only=True)
    file['meta'][key] = BAD_META[key]
    torch.save(file, tmp_path/'w.pth')
    assert 'w.pth' in within(10, lambda: load_tmpa(tmp_path/'w.pth'))

def test_metadata_of_a_billion_extractors(tmp_path):
    save_weights(TMPANet(5, micro_resnet, pretrained=False), tmp_path/'w.pth')
    file = torch.load(tmp_path/'w.pth', weights_only=True)
    for value in (10**9, 99):
        torch.save({**file, 'meta': {**file['meta'], 'mfe': value}}, tmp_path/'w.pth')
        assert f'mfe={value}' in within(5, lambda: load_tmpa(tmp_path/'w.pth'))

@pytest.mark.parametrize('key, value', [('n_ids', 10**9), ('size', 5), ('size', [10**6, 10]), ('data', 'mine'), ('data_seed', 'x'), ('trial', {})])
def test_metadata_that_scoring_asks_for(tmp_path, key, value):
    meta = dict(data='synthetic', trial='1', size=[48, 24], n_ids=8, data_seed=0)
    save_weights(TMPANet(6, micro_resnet, pretrained=False), tmp_path/'w.pth', **{**meta, key: value})
    assert key.replace('n_ids', 'people').replace('size', '') in within(10, lambda: evaluate_run(tmp_path/'w.pth', path=str(tmp_path/'people')))

# --- The state of a fit ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def fit(tmp_path_factory):
    "A fit of two epochs that was cut off in the second, and a function that goes on with another state."
    d = tmp_path_factory.mktemp('fit')
    data = make_regdb(d/'people', n_ids=8, per_modality=2, size=(48, 24))
    dls = ReIDDataLoaders.from_regdb(data, size=(48, 24), P=2, K=2, num_workers=0, device='cpu')
    def go(file, cut=None):
        torch.manual_seed(0)
        learn = tmpa_learner(dls, micro_resnet, pretrained=False, mix=None, mfe=False, mft=False)
        with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, cbs=[ResumeFit(file, quiet=True), *([cut()] if cut else [])])
        return learn
    class Cut(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go(d/'resume.pth', Cut)
    return go, torch.load(d/'resume.pth', weights_only=True)

KEYS = 'epoch n_epoch train_iter data frozen model opt resumed recorder scaler log others random loader callbacks'.split()
STATES = [('epoch', v) for v in (-1, 0, 1.5, 99, 2, True, None, 'x')] + [(k, None) for k in ('model', 'opt', 'random', 'recorder')]
STATES += [(k, {'a': 1}) for k in KEYS] + [(k, 'gone') for k in KEYS] + [('resumed', ['x']), ('model', []), ('train_iter', -1)]

def test_states_of_a_fit_that_are_none(tmp_path, fit):
    go, state = fit
    f = tmp_path/'resume.pth'
    torch.save(state, f)
    assert go(f).epoch == 1
    for key, value in STATES:
        if key in ('callbacks', 'scaler') and value != 'gone': continue  # of what is not there
        bad = {k: v for k, v in state.items() if k not in (key, 'outline')}  # as before version 0.8, which wrote none
        torch.save(bad if value == 'gone' else {**bad, key: value}, f)
        assert 'resume.pth' in within(20, lambda: go(f)), (key, value)

def test_a_state_with_a_part_gone_says_so(tmp_path, fit):
    "Without the momentum of one weight the fit would go on to other numbers."
    go, state = fit
    f, opt = tmp_path/'resume.pth', state['opt']
    few = {k: v for k, v in list(opt['state'].items())[1:]}
    for bad in ({**opt, 'state': few}, {**opt, 'param_groups': opt['param_groups'][:1]}):
        torch.save({**state, 'opt': bad}, f)
        assert 'not what was written' in within(20, lambda: go(f))

def test_an_outline_is_of_every_part(fit):
    _, state = fit
    assert state['outline'] == outline(state) == outline({k: v for k, v in state.items() if k != 'outline'})
    for key in state:
        if key != 'outline': assert outline({k: v for k, v in state.items() if k != key}) != state['outline'], key
    other = {**state, 'recorder': {**state['recorder'], 'count': 7}}
    assert outline(other) != state['outline']


# --- What would be scored, or written, without a word ------------------------------------------------------------------

X, WHO = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), np.arange(8)//2

def scored(q=X, g=X + 1, q_pids=WHO, g_pids=WHO, **kw): return evaluate(q, g, q_pids, g_pids, **kw)

@pytest.mark.parametrize('why, kw', [
    ('max_rank=0', dict(max_rank=0)), ('max_rank=1.5', dict(max_rank=1.5)), ("max_rank='5'", dict(max_rank='5')),
    ('max_rank=10000000', dict(max_rank=10**7)), ('q_pids is None', dict(q_pids=None)), ('g_pids is None', dict(g_pids=None)),
    ('q_pids holds nan in row 0', dict(q_pids=np.full(8, np.nan))), ('q_feats is zero in every row', dict(q=X*0)),
    ('g_feats is zero in every row', dict(g=X*0)), ('bfloat16', dict(q_pids=torch.tensor(WHO).bfloat16())),
    ('takes numbers from 9007199254740992', dict(q_pids=WHO + 2.**53, g_pids=WHO + 2.**53)),
    ('takes numbers from 16777216', dict(g_pids=(WHO + 2**24).astype('f4'))),
    ('takes numbers from 9223372036854775808', dict(g_pids=WHO.astype('u8') + np.uint64(2**63)))])
def test_what_cannot_be_scored(why, kw):
    for f in (scored, lambda q=X, g=X + 1, q_pids=WHO, g_pids=WHO, **kw: cmc_map(torch.cdist(q, g), q_pids, g_pids, **kw)):
        if f is not scored and 'zero' in why: continue
        with pytest.raises(ProtocolError) as e: f(**kw)
        assert why in line(e)

def test_identities_up_to_the_last_that_floats_tell_apart():
    want = scored().ap
    for pids in (WHO + 2.**52, (WHO + 2**23).astype('f4'), WHO + 2**60, WHO.astype('u8') + np.uint64(2**62)):
        assert np.array_equal(scored(q_pids=pids, g_pids=pids).ap, want)
    assert np.array_equal(scored(q_pids=WHO + 2**60, g_pids=WHO.astype('u8') + np.uint64(2**60)).ap, want)
    with pytest.raises(ProtocolError) as e: scored().rank(1.5)
    assert 'rank 1.5' in line(e)

def test_some_features_that_are_zero():
    some = X.clone()
    some[3] = 0
    with pytest.warns(UserWarning, match='1 of 8 rows of q_feats are zero.*row 3'): scored(q=some)
    with pytest.warns(UserWarning, match='1 of 8 rows of features are zero'): Gallery(made_by='t').add([f'{i}.jpg' for i in range(8)], 0, feats=some)
    with pytest.raises(ProtocolError): Gallery(made_by='t').add(['a.jpg'], 0, feats=torch.zeros(1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        scored(q=some, metric='euclidean')

@pytest.mark.parametrize('kind', ['npz', 'pt', 'mat'])
def test_feature_files_with_identities_that_merge(tmp_path, kind):
    f = tmp_path/f'x.{kind}'
    for pids in (WHO + 2.**53, WHO.astype('u8') + np.uint64(2**63)):
        d = dict(feats=X.numpy(), pids=pids)
        if kind == 'npz': np.savez(f, **d)
        elif kind == 'mat': savemat(f, d)
        else: torch.save({k: torch.from_numpy(v) for k, v in d.items()}, f)
        with pytest.raises(DataError) as e: load_features(f)
        assert 'for one another' in line(e)

def test_cells_that_a_spreadsheet_would_run(tmp_path):
    lines = [dict(row='=cmd|x', recipe="'=1", mAP='-0.5'), dict(row='@a', recipe='B', mAP='+1 to 2')]
    write_lines(tmp_path/'a.csv', lines, ['row', 'recipe', 'mAP'])
    assert (tmp_path/'a.csv').read_text().splitlines()[1:] == ["'=cmd|x,''=1,-0.5", "'@a,B,+1 to 2"]
    assert read_lines(tmp_path/'a.csv') == lines
    items = [ReIDImage(Path(f'=1+1/{i}.jpg'), i//2, 1, i%2) for i in range(8)]
    settings = cross_settings_of([o.modality for o in items])
    save_queries(tmp_path/'q.csv', evaluate_settings(X, [o.pid for o in items], None, settings), items, settings)
    assert "'=1+1/0.jpg" in (tmp_path/'q.csv').read_text() and ',=' not in (tmp_path/'q.csv').read_text()
    os.mkfifo(tmp_path/'pipe.csv')
    assert 'pipe' in within(5, lambda: read_lines(tmp_path/'pipe.csv'))
