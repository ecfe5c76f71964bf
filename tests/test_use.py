"From a folder of pictures to an answer: galleries of weights, folders, and the commands."
import dataclasses, inspect, json, os, re, runpy, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from tmpa import commands, use
from tmpa.core import CheckpointError, ConfigError, DataError
from tmpa.data.folder import guess_modality
from tmpa.data.image import read_image
from tmpa.data.synthetic import render_person
from tmpa.evaluation import evaluate_features
from tmpa.features import load_features
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, save_weights
from tmpa.search import Gallery
from tmpa.verify import store_threshold, threshold

SIZE = 48, 24
PHOTOGRAPHS = Path(__file__).resolve().parents[2]/'shared'/'data'/'pku_reid_50'/'images'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    f = tmp_path_factory.mktemp('weights')/'last.pth'
    save_weights(TMPANet(4, micro_resnet, pretrained=False), f, size=SIZE)
    return f


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Pictures of six people by a visible and an infrared camera."
    root = tmp_path_factory.mktemp('pictures')
    for m, name in enumerate(('visible', 'infrared')):
        (root/name).mkdir()
        for pid in range(6): Image.fromarray(render_person(pid, m, 1 + 2*m, 0, SIZE)).save(root/name/f'{pid}.png')
    return root


@pytest.fixture
def pictures(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'pictures'))


# --- Gallery -----------------------------------------------------------------------------------------------------------

def test_gallery_of_weights(weights, pictures, tmp_path):
    g = Gallery.from_weights(weights)
    assert (g.size, g.ir_range, g.weights, g.threshold, g.model.training) == (SIZE, None, str(weights), None, False)
    assert g.add(pictures) == 12 and g.add(pictures) == 0
    assert [o.modality for o in g.items] == [1]*6 + [0]*6
    assert len(g.search(pictures/'visible')) == 6
    g.save(tmp_path/'g.npz')
    again = Gallery.load(tmp_path/'g.npz')
    with pytest.raises(ConfigError, match='no model'): again.search(pictures/'visible')
    assert again.weights == str(weights) and again.use_weights() is again
    assert again.search(pictures/'visible', k=3) == g.search(pictures/'visible', k=3)
    with pytest.raises(ConfigError, match='did you mean size'): Gallery.from_weights(weights, sise=SIZE)


def test_weights_that_are_gone_or_others(weights, pictures, tmp_path):
    mine = Path(shutil.copy(weights, tmp_path/'mine.pth'))
    g = Gallery.from_weights(mine)
    g.add(pictures/'visible')
    g.save(tmp_path/'g.npz')
    mine.rename(tmp_path/'moved.pth')
    again = Gallery.load(tmp_path/'g.npz')
    with pytest.raises(CheckpointError, match='mine.pth.*--weights'): again.use_weights()
    again.use_weights(tmp_path/'moved.pth')
    assert again.weights == str(tmp_path/'moved.pth')
    torch.manual_seed(1)
    save_weights(TMPANet(4, micro_resnet, pretrained=False), mine, size=SIZE)
    with pytest.raises(CheckpointError, match='not the model'): Gallery.load(tmp_path/'g.npz').use_weights()
    with pytest.raises(ConfigError, match='does not know its weights'): Gallery(made_by='x').use_weights()
    save_weights(TMPANet(4, micro_resnet, pretrained=False), mine)
    with pytest.raises(ConfigError, match='size='): Gallery.from_weights(mine)
    assert Gallery.from_weights(mine, size=(96, 48)).size == (96, 48)


def a_threshold(**fields):
    t = threshold(np.r_[.1, .2, .3, .9, 1., 1.1], np.r_[[True]*3, [False]*3], far=.34)
    return dataclasses.replace(t, **fields)

@pytest.fixture
def judged(weights, tmp_path):
    "Weights with a threshold."
    f = Path(shutil.copy(weights, tmp_path/'judged.pth'))
    store_threshold(f, a_threshold())
    return f


def test_a_threshold_is_for_one_size(judged, pictures, tmp_path):
    assert Gallery.from_weights(judged).threshold == Gallery.from_weights(judged, size=SIZE).threshold == a_threshold()
    other = Gallery.from_weights(judged, size=(64, 32))
    assert other.threshold is None and other.use_weights(judged).threshold is None
    assert Gallery.from_weights(judged, ir_range=(0, 9)).threshold == a_threshold()  # the weights say nothing of it
    load_tmpa(judged).save_pretrained(tmp_path/'ranged', size=SIZE, ir_range=(0, 99), threshold=a_threshold())
    assert Gallery.from_weights(tmp_path/'ranged').threshold == a_threshold()
    assert Gallery.from_weights(tmp_path/'ranged', ir_range=(0, 9)).threshold is None


def test_broken_pictures(weights, pictures, tmp_path):
    (pictures/'visible'/'2b.png').write_bytes(b'')
    (pictures/'visible'/'4b.png').write_bytes((pictures/'visible'/'4.png').read_bytes()[:300])
    os.mkfifo(pictures/'visible'/'pipe.png')
    g = Gallery.from_weights(weights, bs=2)
    with pytest.raises(DataError, match='2b.png is empty'): g.add(pictures/'visible')
    with pytest.warns(UserWarning, match='3 of 9 images cannot be read') as said: assert g.add(pictures/'visible', on_error='skip') == 6
    assert '4b.png' in str(said[0].message) and 'pipe.png' in str(said[0].message)
    assert [f.name for f in g.skipped] == ['2b.png', '4b.png', 'pipe.png'] and [o.path.stem for o in g.items] == list('012345')
    with pytest.raises(DataError, match='2b.png'): g.search(pictures/'visible')
    with pytest.warns(UserWarning, match='3 of 9'): assert len(g.search(pictures/'visible', on_error='skip')) == 6
    with pytest.warns(UserWarning, match='1 of 1'): assert g.search([pictures/'visible'/'2b.png'], modality=0, on_error='skip') == []


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason='no photographs')
def test_photographs_are_visible():
    files = sorted(PHOTOGRAPHS.glob('*.png'))[::40]
    guesses = [guess_modality(255*read_image(f).permute(1, 2, 0).numpy()) for f in files]
    assert {m for m, _ in guesses} == {0} and np.median([sure for _, sure in guesses]) > .9


# --- Commands ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(monkeypatch, capsys, tmp_path_factory):
    "Run a command as a shell does, in this process; status and both consoles."
    monkeypatch.setenv('TMPA_HOME', str(tmp_path_factory.mktemp('home')))
    def _run(command, *args):
        script = tmp_path_factory.mktemp('bin')/command
        script.write_text(f'from tmpa.use import {command}\n{command}()\n')
        monkeypatch.setattr(sys, 'argv', [command, *map(str, args)])
        status = 0
        try: runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e: status = e.code
        out = capsys.readouterr()
        return status or 0, out.out, out.err
    return _run


def one_line(result, *words):
    status, out, err = result
    lines = [l for l in err.splitlines() if 'error:' in l]
    assert status == 2 and len(lines) == 1 and 'Traceback' not in err, err
    for w in words: assert str(w) in lines[0], lines[0]


@pytest.mark.parametrize('command', ['tmpa_index', 'tmpa_search', 'tmpa_features'])
def test_help_is_complete_and_needs_no_torch(run, tmp_path, command):
    status, out, _ = run(command, '--help')
    assert status == 0
    for name, p in inspect.signature(getattr(use, command)).parameters.items(): assert (name if p.default is p.empty else f'--{name}') in out
    cfg = ConfigParser(delimiters=['='])
    cfg.read(Path(__file__).parents[1]/'settings.ini')
    assert f'{command}=tmpa.use:{command}' in cfg['DEFAULT']['console_scripts']
    script = tmp_path/command
    script.write_text(f'from tmpa.use import {command}\n{command}()\n')
    r = subprocess.run([sys.executable, '-X', 'importtime', script, '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and not re.search(r'\| +(torch|numpy|fastai)$', r.stderr, re.M) and re.search(r'\| +fastcore$', r.stderr, re.M)


ODD = ['a=b.png', 'ü 名 "quoted" \'too\'.png', '<img src=x onerror=alert(1)>.png', '-1.png', 'two\nlines.png']

def test_the_engineers_way(run, weights, pictures, tmp_path, monkeypatch):
    "Two folders of unlabelled pictures, some of them odd and some broken; commands alone."
    for i, name in enumerate(ODD): shutil.copy(pictures/'infrared'/f'{i}.png', pictures/'infrared'/name)
    (pictures/'visible'/'0b.png').write_bytes(b'')
    (pictures/'visible'/'notes.txt').write_text('none')
    monkeypatch.chdir(pictures)
    status, out, err = run('tmpa_index', 'visible', '--weights', weights, '--modality', 'visible', '--out', tmp_path/'g.npz', '--quiet')
    assert status == 0 and out.splitlines()[-1] == f"6 images are new, 6 images are in {tmp_path/'g.npz'}", err
    assert '1 of 7 images cannot be read' in err and '0b.png is empty' in err and '1 .txt' in err and '7 visible images' in err
    monkeypatch.chdir(tmp_path)
    files = [tmp_path/o for o in ('o=ut.json', 'out.html', 'out.png')]
    ask = ('tmpa_search', tmp_path/'g.npz', pictures/'infrared', '--modality', 'infrared', '--k', 3)
    status, out, err = run(*ask, '--json', files[0], '--html', files[1], '--sheet', files[2])
    assert status == 0 and '... and 1 more' in out, err
    d, g = json.loads(files[0].read_text()), Gallery.load(tmp_path/'g.npz').use_weights()
    assert [Path(q['query']['path']).name for q in d['queries']] == sorted(os.listdir(pictures/'infrared'))
    assert [[h['place'] for h in q['hits']] for q in d['queries']] == [[h.pos for h in o] for o in g.search(pictures/'infrared', k=3)]
    assert d['images'] == 6 and d['weights'] == str(weights) and d['fingerprint'] == g.made_by and d['left_out'] == {}
    page = files[1].read_text()
    assert page.count('<section>') == 11 and page.count('<img ') == 11*4 and '<img src=x' not in page and '&lt;img src=x' in page
    assert Image.open(files[2]).width > 200
    for kind, f in zip(('json', 'html', 'sheet'), files): one_line(run(*ask, f'--{kind}', f), f, 'exists already')
    status, out, err = run('tmpa_search', tmp_path/'g.npz', pictures/'infrared'/'a=b.png', '--k', 2)
    assert status == 0 and len(out.splitlines()) == 2 and 'guessed' not in err  # its folder says infrared


def test_two_modalities_in_one_gallery(run, weights, pictures, tmp_path):
    g = tmp_path/'g.npz'
    status, out, err = run('tmpa_index', pictures, '--weights', weights, '--out', g, '--quiet')
    assert status == 0 and '6 visible, 6 infrared images' in err and '12 images are new' in out, err
    status, out, err = run('tmpa_search', g, pictures/'infrared', '--only', 'visible', '--json', tmp_path/'a.json')
    d = json.loads((tmp_path/'a.json').read_text())
    assert status == 0 and {h['modality'] for q in d['queries'] for h in q['hits']} == {'visible'}
    plain = pictures.parent/'plain'
    plain.mkdir()
    for f in (pictures/'infrared').iterdir(): shutil.copy(f, plain/f'0007_c3_{f.name}')
    status, out, err = run('tmpa_index', plain, '--out', g, '--quiet')  # goes on, with the weights that it knows
    assert status == 0 and '6 images are new, 18 images are in' in out and 'guessed from the pixels of 6 images: 6 infrared' in err
    assert '6 of them with a known identity' in err and {(o.pid, o.cam) for o in Gallery.load(g).items[12:]} == {(7, 3)}
    assert run('tmpa_index', plain, '--out', g, '--quiet')[1].startswith('0 images are new, 18 images are in')


def test_a_folder_as_gallery(run, weights, pictures, tmp_path):
    "What has no ending is a folder, which only grows."
    g = tmp_path/'many'
    status, out, err = run('tmpa_index', pictures/'visible', '--weights', weights, '--out', g, '--quiet')
    assert status == 0 and g.is_dir() and '6 images are new, 6 images are in' in out, err
    assert '6 images are new, 12 images are in' in run('tmpa_index', pictures/'infrared', '--out', g, '--quiet')[1]
    again = Gallery.load(g)
    assert len(again) == 12 and again.weights == str(weights)
    status, out, err = run('tmpa_search', g, pictures/'infrared'/'0.png', '--k', 1)
    assert status == 0 and '0.png' in out, err


def test_features_of_a_folder_and_of_a_list(run, weights, pictures, tmp_path):
    f = tmp_path/'f.npz'
    status, out, err = run('tmpa_features', pictures, '--weights', weights, '--out', f, '--quiet')
    assert status == 0 and 'features of 12 images, 128 numbers each' in out, err
    x = load_features(f)
    want = Gallery.from_weights(weights)
    want.add(pictures)
    assert np.allclose(x.feats, want.rows(range(12)), atol=1e-6) and x.modality.tolist() == [1]*6 + [0]*6 and set(x.pids) == {-1}
    assert np.load(f)['names'].tolist() == [str(o.path) for o in want.items]
    rows = [f'pictures/{m}/{i}.png,{i},{1 + (m == "infrared")},{m},test' for m in ('visible', 'infrared') for i in range(6)]
    (tmp_path/'list.csv').write_text('\n'.join(['file,pid,cam,modality,split', *rows]))
    for name, m in (('q', 'infrared'), ('g', 'visible')):
        status, _, err = run('tmpa_features', tmp_path/'list.csv', '--weights', weights, '--modality', m, '--out', tmp_path/f'{name}.npz', '--quiet')
        assert status == 0, err
    r = evaluate_features(tmp_path/'q.npz', tmp_path/'g.npz', rule='market')
    assert r.n_queries == 6 and r.valid.all()
    for kind in ('pt', 'mat'):
        assert run('tmpa_features', tmp_path/'list.csv', '--weights', weights, '--out', tmp_path/f'f.{kind}', '--quiet')[0] == 0
        assert load_features(tmp_path/f'f.{kind}').pids.tolist() == list(range(6))*2
    one_line(run('tmpa_features', pictures, '--weights', weights, '--out', f), f, 'exists already')
    one_line(run('tmpa_features', pictures, '--weights', weights, '--out', tmp_path/'f.txt'), 'f.txt', '.npz')


def test_what_cannot_be_is_one_line(run, weights, pictures, tmp_path):
    g, empty, texts, broken = (tmp_path/o for o in ('g.npz', 'empty', 'texts', 'broken'))
    for o in (empty, texts, broken): o.mkdir()
    (texts/'a.txt').write_text('')
    (broken/'a.png').write_text('')
    index = ('tmpa_index', '--weights', weights, '--out', g, '--quiet')
    one_line(run(*index, empty), empty, 'is empty')
    one_line(run(*index, texts), texts, '1 .txt')
    one_line(run(*index, broken, '--modality', 'visible'), broken, 'none of the 1 images')
    one_line(run(*index, tmp_path/'nowhere'), 'nowhere')
    one_line(run(*index[:-3], '--out', tmp_path/'g.pkl', pictures), 'g.pkl', '.npz')
    one_line(run(*index, pictures, '--size', '48'), '288x144')
    one_line(run(*index, pictures, '--device', 'nothing'), 'nothing')
    one_line(run(*index, pictures, '--bs', 0), 'bs=0')
    assert not g.exists()
    assert run(*index, pictures/'visible')[0] == 0
    one_line(run(*index, pictures, '--size', '96x48'), g, 'leave --size')
    torch.manual_seed(1)
    other = tmp_path/'other.pth'
    save_weights(TMPANet(4, micro_resnet, pretrained=False), other, size=SIZE)
    one_line(run('tmpa_index', pictures, '--weights', other, '--out', g), other, 'not the model')
    one_line(run('tmpa_search', g, pictures, '--weights', other), other, 'not the model')
    one_line(run('tmpa_search', g, broken/'a.png', '--modality', 'infrared'), 'a.png is empty')
    one_line(run('tmpa_search', g, pictures, '--k', 0), 'k=0')
    one_line(run('tmpa_search', g, pictures, '--sheet', tmp_path/'a.docx'), 'a.docx', '.png')
    one_line(run('tmpa_search', tmp_path/'no.npz', pictures), 'no.npz')
    moved = weights.rename(weights.with_name('moved.pth'))
    try: one_line(run('tmpa_search', g, pictures), weights, '--weights')
    finally: moved.rename(weights)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['broken', 'empty', 'g.npz', 'other.pth', 'pictures', 'texts']


def test_a_threshold_of_another_size_is_left_out(run, judged, pictures, tmp_path):
    from tmpa.export import tmpa_export
    from tmpa.weights import open_weights
    for size, there in (('48x24', True), ('64x32', False)):
        g, f = tmp_path/f'{size}.npz', tmp_path/f'w{size}'
        assert run('tmpa_index', pictures, '--weights', judged, '--size', size, '--out', g, '--quiet')[0] == 0
        read = Gallery.load(g)
        assert (read.threshold is not None) == (read.use_weights(judged).threshold is not None) == there
        tmpa_export.__wrapped__(str(judged), folder=str(f), size=size)
        assert (open_weights(f)[1]['threshold'] is not None) == there


def test_two_begin_a_folder_with_other_weights(weights, judged, pictures, tmp_path):
    "Who comes second is refused, and says nothing of its own weights in the gallery of the first."
    torch.manual_seed(1)
    other = tmp_path/'other.pth'
    save_weights(TMPANet(4, micro_resnet, pretrained=False), other, size=SIZE)
    a, b = (commands.gallery_for(tmp_path/'g', f, None, None)[0] for f in (judged, other))
    b.add(pictures/'visible')
    b.save(tmp_path/'g')
    for _ in range(2):
        with pytest.raises(CheckpointError): a.add(pictures)
        with pytest.raises(CheckpointError, match='another model'): a.save(tmp_path/'g')
        with pytest.raises(CheckpointError): a.search(pictures/'visible')
    g = Gallery.load(tmp_path/'g')
    assert (g.weights, g.threshold, len(g)) == (str(other), None, 6) and g.use_weights()


@pytest.mark.parametrize('out', ['g.npz', 'g'])
def test_a_threshold_that_came_later(run, judged, pictures, tmp_path, out):
    "It is stored with the gallery also where no image is new."
    index = ('tmpa_index', pictures, '--weights', judged, '--out', tmp_path/out, '--quiet')
    assert run(*index)[0] == 0 and Gallery.load(tmp_path/out).threshold == a_threshold()
    new = a_threshold(distance=.25, maybe=.5)
    store_threshold(judged, new)
    assert run(*index)[1].splitlines() == [f'0 images are new, 12 images are in {tmp_path/out}']
    assert Gallery.load(tmp_path/out).threshold == new
    moved = judged.rename(tmp_path/'moved.pth')
    assert run(*index[:3], moved, *index[4:])[0] == 0 and Gallery.load(tmp_path/out).weights == str(moved)


def test_a_folder_that_is_empty_is_a_new_gallery(run, weights, pictures, tmp_path):
    g = tmp_path/'g'
    index = ('tmpa_index', pictures, '--weights', weights, '--out', g, '--quiet')
    for left in ((), ('.head-ab_c.tmpa.json',), ('letter.txt',), ('features-00000000.f32',)):
        g.mkdir()
        for name in left: (g/name).touch()
        if left and left[0][0] != '.':
            one_line(run(*index), g)
            assert [o.name for o in g.iterdir()] == list(left)
        else: assert run(*index)[0] == 0 and len(Gallery.load(g)) == 12
        shutil.rmtree(g)


@pytest.mark.parametrize('out', ['g.npz', 'g'])
def test_without_images_a_gallery_is_free_for_other_weights(run, judged, pictures, tmp_path, out):
    g = Gallery.from_weights(judged, dtype=torch.float16)
    g.save(tmp_path/out)
    torch.manual_seed(1)
    other = tmp_path/'other.pth'
    save_weights(TMPANet(4, micro_resnet, pretrained=False), other, size=(64, 32), ir_range=(0, 99))
    status, _, err = run('tmpa_index', pictures, '--weights', other, '--out', tmp_path/out, '--quiet')
    g = Gallery.load(tmp_path/out)
    assert status == 0 and (g.size, g.ir_range, g.weights, g.threshold) == ((64, 32), (0, 99), str(other), None), err
    assert len(g) == 12 and g.dtype == torch.float16 and len(g.use_weights().search(pictures/'visible')) == 6


def test_only_one_writes_a_file(run, weights, pictures, tmp_path):
    out = tmp_path/'g.npz'
    with commands.one_writer(out): one_line(run('tmpa_index', pictures, '--weights', weights, '--out', out), out, 'another tmpa_index')


def test_interrupted_and_gone_on_with(run, weights, pictures, tmp_path, monkeypatch):
    "What was looked at is saved, and the next command goes on."
    g, extract = tmp_path/'g.npz', Gallery._extract
    def interrupted(self, items):
        if len(self) == 4: raise KeyboardInterrupt
        return extract(self, items)
    with monkeypatch.context() as m:
        m.setattr(Gallery, '_extract', interrupted)
        status, out, err = run('tmpa_index', pictures, '--weights', weights, '--out', g, '--bs', 2, '--quiet')
    assert status == 2 and 'interrupted' in err and f'4 images are in {g}' in out
    assert '8 images are new, 12 images are in' in run('tmpa_index', pictures, '--out', g, '--quiet')[1]


def test_saving_takes_a_small_share(weights, monkeypatch):
    "The next save waits for twenty times what the last one took."
    now, saves = [0.], []
    class Slow(list):
        def save(self, path):
            saves.append(now[0])
            now[0] += 1
    monkeypatch.setattr(commands.time, 'monotonic', lambda: now[0])
    g = Slow()
    saver = commands.GallerySaver(g, Path('g.npz'), 1000, quiet=True)
    for i in range(1000):
        g.append(i)
        now[0] += .1
        saver(i+1)
    assert len(saves) == 5 and saves[0] < 2.2 and min(np.diff(saves)) > 20


def test_verdicts(run, weights, pictures, tmp_path):
    "A threshold in the weights gives each answer a word, everywhere."
    t = threshold(np.r_[.1, .2, .3, .9, 1., 1.1], np.r_[[True]*3, [False]*3], far=.34)
    near, far = tmp_path/'near', tmp_path/'far'
    load_tmpa(weights).save_pretrained(near, size=SIZE, threshold=dataclasses.replace(t, distance=1.9, maybe=1.95))
    load_tmpa(weights).save_pretrained(far, size=SIZE, threshold=dataclasses.replace(t, distance=0, maybe=0))
    g = tmp_path/'g.npz'
    assert run('tmpa_index', pictures/'visible', '--weights', weights, '--out', g, '--quiet')[0] == 0
    ask = ('tmpa_search', g, pictures/'infrared')
    for where, word in ((near, 'match'), (far, 'nobody')):
        files = [tmp_path/f'{word}.{o}' for o in ('json', 'html', 'png')]
        status, out, err = run(*ask, '--weights', where, '--json', files[0], '--html', files[1], '--sheet', files[2])
        d = json.loads(files[0].read_text())
        assert status == 0 and out.count(word) == 6 + 3, err  # and the names of the files
        assert {q['verdict'] for q in d['queries']} == {word} == {h['verdict'] for q in d['queries'] for h in q['hits']}
        assert d['threshold']['distance'] == (1.9 if word == 'match' else 0) and f'<span class="{word}">' in files[1].read_text()
    status, out, err = run(*ask, '--weights', far, '--max_distance', 'maybe')
    assert status == 0 and out.count('no hits') == 6 and out.count('nobody') == 6, err
    one_line(run(*ask, '--max_distance', 'match'), 'no threshold')
    one_line(run(*ask, '--max_distance', 'near'), 'near')
    assert 'no hits' in run(*ask, '--max_distance', '0')[1]
    status, out, err = run('tmpa_search', g, pictures/'infrared'/'0.png', '--weights', near, '--k', 1)
    assert status == 0 and 'match' in out and 'camera' not in out


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no processes to kill')
@pytest.mark.parametrize('suffix', ['.npz', ''])
def test_killed_and_gone_on_with(tmp_path, monkeypatch, suffix):
    "A few of what benchmarks/index_kills.py does."
    monkeypatch.setenv('TMPA_HOME', str(tmp_path/'home'))
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'benchmarks')
    import faults, index_kills
    rows = list(index_kills.index_kills(tmp_path, 2, seed=7, images=60, suffix=suffix))
    assert len(rows) >= 2 and not [r for r in rows if r[1] in faults.BAD], rows


def test_folders_by_date_are_nobody():
    from tmpa.data.folder import name_labels
    assert name_labels('visible/20240101/a.jpg') == (-1, 0)
    assert name_labels('Visible/30/a.jpg') == (30, 1) and name_labels('cam2/0001/a.jpg') == (1, 2)


def test_names_that_are_not_utf8_in_matlab_files(tmp_path):
    from tmpa.features import save_features
    save_features(tmp_path/'f.mat', torch.ones(2, 3), [1, 2], names=['a\udcff.png', 'b.png'])
    assert load_features(tmp_path/'f.mat').pids.tolist() == [1, 2]


def test_the_verdict_beside_a_hit_is_of_that_hit():
    "A threshold across modalities says nothing of two visible images, though it may say who another hit is."
    from tmpa.core import ReIDImage
    x = torch.eye(3)
    g = Gallery(made_by='somebody')
    g.threshold = threshold(np.r_[.1, .2, 1.2, np.linspace(1.3, 1.4, 200)], np.arange(203) < 3, cross=True)
    g.add([ReIDImage(Path(f'{i}.jpg'), -1, 0, i) for i in (0, 1)], feats=torch.stack([x[0], .95*x[0] + .31*x[1]]))
    hits = g.search(x[:1], k=2, records=[ReIDImage(Path('q.jpg'), -1, 0, 0)])
    assert use._of_nearest(hits[0]) is None and hits[0].verdict() is not None
    assert 'match' not in use._nearest_lines(hits)


def test_a_sheet_of_names_that_the_font_lacks(tmp_path, recwarn):
    from tmpa.vis.hits import save_sheet
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.set_title('王小明')
    save_sheet(tmp_path/'s.png', fig)
    plt.close(fig)
    assert not [o for o in recwarn if 'Glyph' in str(o.message)]
