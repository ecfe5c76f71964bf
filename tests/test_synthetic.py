"The synthetic people: reproducible, never recognisable by colour alone, and written exactly in the layouts of the real data sets."
import csv, json, os, subprocess, sys, zlib
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from tmpa.core import ConfigError, DataError
from tmpa.data.synthetic import GENERATOR_VERSION, gallery, make_llcm, make_regdb, make_sysu, render_person

SMALL = dict(size=(48, 24))
CAMS = ((1, 2, 4, 5), (3, 6))

def tree(root): return {str(f.relative_to(root)): f.read_bytes() for f in sorted(Path(root).rglob('*')) if f.is_file()}

# ---------------------------------------------------------------- pictures
GOLDEN = {(1, 0, 1, 0, (144, 72), 0): 3302326593,
          (1, 1, 3, 0, (144, 72), 0): 242003357,
          (17, 0, 5, 3, (96, 48), 0): 3082468191,
          (17, 1, 6, 3, (96, 48), 0): 1831125829,
          (203, 0, 4, 1, (48, 24), 2): 1817453381,
          (203, 1, 9, 1, (48, 24), 2): 3936505115} # (pid, modality, cam, shot, size, seed): CRC-32 of the pixels

@pytest.mark.parametrize('key', sorted(GOLDEN))
def test_pixels_are_frozen(key):
    "A change of any pixel needs a new GENERATOR_VERSION, because results name the version."
    assert GENERATOR_VERSION == '1'
    assert zlib.crc32(render_person(*key[:4], size=key[4], seed=key[5]).tobytes()) == GOLDEN[key]

def test_same_in_another_process():
    code = 'import zlib; from tmpa.data.synthetic import render_person; print(zlib.crc32(render_person(5, 1, 6, 2, size=(96, 48), seed=3).tobytes()))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONHASHSEED': '7'}).stdout
    assert int(out) == zlib.crc32(render_person(5, 1, 6, 2, size=(96, 48), seed=3).tobytes())

@pytest.mark.parametrize('size', [(16, 8), (48, 24), (144, 72), (288, 144), (100, 37), (64, 128)])
@pytest.mark.parametrize('modality', [0, 1])
def test_any_size(size, modality):
    im = render_person(2, modality, 1, 0, size=size)
    assert im.shape == (*size, 3) and im.dtype == np.uint8 and im.std() > 5
    if modality: assert (im[..., 0] == im[..., 1]).all() and (im[..., 0] == im[..., 2]).all()

def test_sizes_show_the_same_photograph():
    a, b = (np.asarray(Image.fromarray(render_person(4, 0, 2, 1, size=s)).resize((24, 48), Image.BOX), float) for s in ((144, 72), (288, 144)))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > .95

def test_no_identity_breaks_the_renderer():
    for pid in range(300):
        im = render_person(pid, pid % 2, 1+pid % 9, pid % 4, size=(48, 24), seed=pid % 3)
        assert im.std() > 4, pid

def test_every_argument_matters():
    base = render_person(1, 0, 1, 0)
    for other in (dict(pid=2), dict(modality=1), dict(cam=2), dict(shot=1), dict(seed=1)):
        assert (render_person(**{**dict(pid=1, modality=0, cam=1, shot=0, seed=0), **other}) != base).mean() > .3, other

@pytest.mark.parametrize('bad', [dict(size=(4, 4)), dict(size=(48,)), dict(seed=-1), dict(pid=-3), dict(shot=.5), dict(modality=2)])
def test_bad_arguments_are_one_line(bad):
    with pytest.raises(ConfigError) as e: render_person(**{**dict(pid=1, modality=0, cam=1, shot=0), **bad})
    assert '\n' not in str(e.value)

# ---------------------------------------------------------------- colour is not enough
def mean_ap(dist, q, g):
    m = q[:, None] == g[np.argsort(dist, 1, kind='stable')]
    return (m.cumsum(1)/np.arange(1, m.shape[1]+1)*m).sum(1)/m.sum(1)

@pytest.fixture(scope='module')
def people():
    n, shots = 40, 6
    x = [np.stack([render_person(p, m, CAMS[m][(s+p) % len(CAMS[m])], s, **SMALL) for p in range(1, n+1) for s in range(shots)]) for m in (0, 1)]
    return x, np.repeat(np.arange(n), shots)

def rgb(x): return np.histogramdd(x.reshape(-1, 3), bins=(8,)*3, range=[(0, 256)]*3)[0].ravel()
def grey(x): return np.histogram(x.mean(-1), bins=64, range=(0, 256))[0].astype(float)
def bands(x): return np.concatenate([np.histogram(o.mean(-1), bins=16, range=(0, 256))[0] for o in np.array_split(x, 6)]).astype(float)
def chi2(a, b): return ((a[:, None]-b)**2/(a[:, None]+b+1e-12)).sum(-1)
def l1(a, b): return np.abs(a[:, None]-b).sum(-1)
def cosine(a, b): return 1-(a/np.linalg.norm(a, axis=1, keepdims=True))@(b/np.linalg.norm(b, axis=1, keepdims=True)).T

@pytest.mark.parametrize('dist', [chi2, l1, cosine])
@pytest.mark.parametrize('hist', [rgb, grey])
def test_histograms_score_under_twice_chance(people, hist, dist):
    x, y = people
    h = [np.stack([hist(o) for o in m]) for m in x]
    h = [o/o.sum(1, keepdims=True) for o in h]
    rng = np.random.default_rng(0)
    chance = np.mean([mean_ap(rng.random((len(y), len(y))), y, y).mean() for _ in range(5)])
    for a, b in ((0, 1), (1, 0)): assert mean_ap(dist(h[a], h[b]), y, y).mean() < 2*chance

def test_histograms_do_recognise_within_a_camera():
    "The control: where light and colour are shared the same histograms are well above chance, so the test above can fail."
    y, scores = np.arange(40), []
    for cam in CAMS[0]:
        h = [np.stack([rgb(render_person(p, 0, cam, s, **SMALL)) for p in y]) for s in (0, 1)]
        scores.append(mean_ap(l1(*h), y, y).mean())
    assert np.mean(scores) > 1.8*np.mean(1/(1+y))

# ---------------------------------------------------------------- folders
def test_the_readers_of_real_data_read_them(tmp_path):
    ext = pytest.importorskip('tmpa.data.readers')
    root = make_regdb(tmp_path/'r', n_ids=4, per_modality=2, **SMALL)
    assert len(ext.regdb_items(root, trial=3, split='train')) == 2*2*2
    root = make_sysu(tmp_path/'s', n_ids=5, per_cam=2, **SMALL)
    items = ext.sysu_items(root, split='test')
    assert {(i.cam, i.modality) for i in items} == {(1, 0), (2, 0), (3, 1), (4, 0), (5, 0), (6, 1)} and {i.pid for i in items} == {5}
    root = make_llcm(tmp_path/'l', n_ids=6, n_cams=2, per_cam=1, **SMALL)
    for split, n in (('train', 4), ('test', 2)):
        items = ext.llcm_items(root, split=split)
        assert len(items) == n*2*2 and all(f'_c{i.cam:02d}_' in i.path.name for i in items)

def test_regdb_layout(tmp_path):
    root = make_regdb(tmp_path/'r', n_ids=7, per_modality=3, **SMALL)
    assert root == tmp_path/'r'
    halves = []
    for t in range(1, 11):
        seen = {}
        for part, n in (('train', 3), ('test', 4)):
            for name, folder in (('visible', 'Visible'), ('thermal', 'Thermal')):
                rows = [l.split(' ') for l in (root/'idx'/f'{part}_{name}_{t}.txt').read_text().splitlines()]
                assert len(rows) == 3*n and sorted({int(r[1]) for r in rows}) == list(range(n))
                assert all(r[0].startswith(folder+'/') and Image.open(root/r[0]).size == (24, 48) for r in rows)
                seen[part, name] = {(r[0].split('/')[1], r[1]) for r in rows}
            assert seen[part, 'visible'] == seen[part, 'thermal'] and len(seen[part, 'visible']) == n
        assert not {p for p, _ in seen['train', 'visible']} & {p for p, _ in seen['test', 'visible']}
        halves.append(frozenset(seen['train', 'visible']))
    assert len(set(halves)) > 5

def test_regdb_files_are_the_rendered_pixels(tmp_path):
    for fmt in ('bmp', 'png'):
        root = make_regdb(tmp_path/fmt, n_ids=2, per_modality=1, fmt=fmt, **SMALL)
        f = next((root/'Visible'/'1').iterdir())
        assert f.suffix == '.'+fmt and (np.asarray(Image.open(f)) == render_person(1, 0, int(f.stem.split('_c')[1][0]), 0, **SMALL)).all()

def test_more_identities_do_not_change_the_first(tmp_path):
    a, b = (tree(make_regdb(tmp_path/str(n), n_ids=n, per_modality=2, **SMALL)) for n in (2, 4))
    assert all(b[k] == v for k, v in a.items() if k.endswith('.bmp'))

def test_sysu_layout(tmp_path):
    rows = [dict(pid=3, split='train', cam1=2, cam2=0, cam3=1, cam4=0, cam5=0, cam6=2), dict(pid=533, split='val', cam1=0, cam2=1, cam3=0, cam4=1, cam5=1, cam6=1),
            dict(pid=6, split='test', cam1=1, cam2=1, cam3=1, cam4=1, cam5=1, cam6=1)]
    root = make_sysu(tmp_path/'s', rows, **SMALL)
    for r in rows:
        for k in range(1, 7):
            files = sorted(f.name for f in (root/f'cam{k}'/f'{r["pid"]:04d}').glob('*'))
            assert files == [f'{i:04d}.jpg' for i in range(1, r[f'cam{k}']+1)]
        assert (root/'exp'/f'{r["split"]}_id.txt').read_text().strip() == str(r['pid'])
    with open(tmp_path/'t.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    assert tree(make_sysu(tmp_path/'s2', tmp_path/'t.csv', **SMALL)) == tree(root)
    ir = np.asarray(Image.open(root/'cam3'/'0006'/'0001.jpg').convert('RGB'), int)
    assert np.abs(ir[..., 0]-ir[..., 2]).max() <= 4      # grey up to JPEG's rounding

def test_sysu_default_structure(tmp_path):
    root = make_sysu(tmp_path/'s', n_ids=10, per_cam=1, **SMALL)
    ids = {p: (root/'exp'/f'{p}_id.txt').read_text().strip().split(',') for p in ('train', 'val', 'test')}
    assert {k: len(v) for k, v in ids.items()} == dict(train=6, val=2, test=2) and len(set().union(*ids.values())) == 10
    assert len(list(root.rglob('*.jpg'))) == 60

@pytest.mark.parametrize('table', ['absent.csv', [(1, 'train', 1, 2)], [(1, 'dev', 1, 1, 1, 1, 1, 1)], [(1, 'test', 0, 0, 0, 0, 0, 0)], [('x', 'test', 1, 0, 0, 0, 0, 0)], [dict(pid=1)], 7,
                                   [(1, 'train', 1, 1, 1, 1, 1, 1), (1, 'test', 1, 1, 1, 1, 1, 1)]])
def test_bad_structure(tmp_path, table):
    with pytest.raises(DataError) as e: make_sysu(tmp_path/'s', tmp_path/table if isinstance(table, str) else table)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_llcm_layout(tmp_path):
    root = make_llcm(tmp_path/'l', n_ids=9, n_cams=3, per_cam=2, **SMALL)
    test = (root/'idx'/'test_id.txt').read_text().strip().split(',')
    assert test == ['7', '8', '9']
    for kind in ('vis', 'nir'):
        rows = [l.split(' ') for l in (root/'idx'/f'train_{kind}.txt').read_text().splitlines()]
        assert len(rows) == 6*3*2 and sorted({int(r[1]) for r in rows}) == list(range(6))
        assert all((root/r[0]).is_file() and r[0].startswith(f'{kind}/{int(r[1])+1:04d}/{int(r[1])+1:04d}_c0') for r in rows)
        for f in root.glob(f'test_{kind}/cam*/*/*.jpg'):
            cam, pid = int(str(f).split('cam')[1][0]), int(str(f).split('cam')[1][2:6])       # as published loaders read them
            assert str(pid) in test and f.name.startswith(f'{pid:04d}_c{cam:02d}_')
        assert len(list(root.glob(f'test_{kind}/cam*/*/*.jpg'))) == 3*3*2
    assert not list(root.glob('test_nir/cam3'))

def test_processes_write_the_same_bytes(tmp_path):
    a, b = (tree(make_sysu(tmp_path/str(n), n_ids=5, per_cam=5, n_workers=n, **SMALL)) for n in (0, 2))
    assert a == b

# ---------------------------------------------------------------- never half a folder, never somebody else's
@pytest.mark.parametrize('change', [dict(seed=1), dict(size=(50, 24)), dict(n_ids=3), dict(per_modality=2), dict(fmt='png'), dict(cams=((1,), (3,)))])
def test_another_data_set_is_refused(tmp_path, change):
    args = dict(n_ids=2, per_modality=1, **SMALL)
    root = make_regdb(tmp_path/'r', **args)
    before = tree(root)
    assert make_regdb(root, **args) == root and make_regdb(str(root), n_workers=2, **args) == root
    with pytest.raises(ConfigError) as e: make_regdb(root, **{**args, **change})
    assert str(root) in str(e.value) and '\n' not in str(e.value) and 'another path' in str(e.value)
    assert tree(root) == before and [o.name for o in tmp_path.iterdir()] == ['r']

def test_another_layout_is_refused(tmp_path):
    make_regdb(tmp_path/'r', n_ids=5, per_modality=1, **SMALL)
    with pytest.raises(ConfigError, match='layout'): make_sysu(tmp_path/'r', n_ids=5, per_cam=1, **SMALL)

@pytest.mark.parametrize('content', [None, '', '[]', '{"generator": "0"}'])
def test_a_users_folder_is_left_alone(tmp_path, content):
    mine = tmp_path/'mine'; mine.mkdir(); (mine/'thesis.txt').write_text('years')
    if content is not None: (mine/'manifest.json').write_text(content)
    with pytest.raises(ConfigError): make_llcm(mine, n_ids=3, **SMALL)
    assert (mine/'thesis.txt').read_text() == 'years' and len(list(tmp_path.iterdir())) == 1

def test_a_file_in_the_way(tmp_path):
    (tmp_path/'f').write_text('x')
    with pytest.raises(ConfigError): make_regdb(tmp_path/'f', n_ids=2, **SMALL)
    assert (tmp_path/'f').read_text() == 'x'

def test_an_empty_folder_and_new_parents_are_fine(tmp_path):
    (tmp_path/'empty').mkdir()
    for p in (tmp_path/'empty', tmp_path/'a'/'b'/'c'): assert (make_regdb(p, n_ids=2, per_modality=1, **SMALL)/'manifest.json').is_file()

def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    import tmpa.data.synthetic as syn
    calls, real = [], syn.render_person
    def stop(*a, **k):
        calls.append(1)
        if len(calls) > 5: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(syn, 'render_person', stop)
    with pytest.raises(KeyboardInterrupt): make_regdb(tmp_path/'r', n_ids=4, per_modality=2, **SMALL)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('call', [lambda p: make_regdb(p, n_ids=1), lambda p: make_regdb(p, n_ids=4, fmt='gif'), lambda p: make_regdb(p, per_modality=0), lambda p: make_regdb(p, size=(2, 2)), lambda p: make_regdb(p, seed=-1),
                                  lambda p: make_sysu(p, n_ids=2), lambda p: make_sysu(p, per_cam=0), lambda p: make_llcm(p, n_cams=9), lambda p: make_llcm(p, per_cam=0), lambda p: make_llcm(p, n_ids=2)])
def test_bad_requests_make_no_folder(tmp_path, call):
    with pytest.raises((ConfigError, DataError)) as e: call(tmp_path/'x')
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_manifest_says_what_it_is(tmp_path):
    m = json.loads((make_regdb(tmp_path/'r', n_ids=3, per_modality=2, seed=5, **SMALL)/'manifest.json').read_text())
    assert m.items() >= dict(generator=GENERATOR_VERSION, layout='regdb', size=[48, 24], seed=5, images=12, identities=3).items()

def test_gallery_shape():
    assert gallery(4, 2, size=(32, 16)).shape == (4*32, 4*16, 3)

@pytest.mark.skipif('TMPA_ORACLES' not in os.environ, reason='needs the folder TMPA_ORACLES with sysu_structure.csv')
def test_true_sysu_structure():
    from tmpa.data.synthetic import _structure
    rows = _structure(Path(os.environ['TMPA_ORACLES'])/'sysu_structure.csv')
    count = lambda splits, cams: sum(n[c-1] for _, s, n in rows if s in splits for c in cams)
    assert (len(rows), count({'train', 'val'}, (1, 2, 4, 5)), count({'train', 'val'}, (3, 6)), count({'test'}, (3, 6))) == (491, 22258, 11909, 3803)
