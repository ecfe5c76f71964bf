"Every path that a user gives may begin with ~: in Python, in a command, in an environment variable."
import csv, json
from pathlib import Path

import numpy as np
import pytest
import torch

from test_cli import SMALL, one_line, run
from tmpa.callback.resume import ResumeFit
from tmpa.core import ConfigError, DataError, ReIDImage, atomic_write, check_records, tmpa_home, user_path
from tmpa.data.cache import image_cache
from tmpa.protocols import load_perms, sysu_settings
from tmpa.data.image import read_image
from tmpa.data.readers import csv_items, regdb_items
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.synthetic import make_llcm, make_regdb, make_sysu
from tmpa.results import read_lines, write_lines
from tmpa.evaluation import evaluate_features
from tmpa.callback.run import SaveWeights
from tmpa.features import load_features, save_features
from tmpa.models.backbone import make_resnet, tiny_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, load_weights, read_meta, save_weights
from tmpa.recipes import Recipe
from tmpa.report import read_log, write_report
from tmpa.provenance import save_environment
from tmpa.earlier import earlier_run, run_state
from tmpa.run import RunConfig
from tmpa.run_files import new_folder, read_json, write_json
from tmpa.data.datasets import DataSpec, read_data
from tmpa.search import Gallery


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    return make_regdb(tmp_path_factory.mktemp('home')/'RegDB', n_ids=12, per_modality=3, size=(48, 24))

@pytest.fixture
def home(people, tmp_path, monkeypatch):
    "A home folder with RegDB in it; nothing called ~ may be left where one works."
    (tmp_path/'work').mkdir()
    (tmp_path/'home').mkdir()
    (tmp_path/'home'/'RegDB').symlink_to(people)
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path/'work')
    yield tmp_path/'home'
    assert not list((tmp_path/'work').iterdir())


def test_what_is_written_and_read(home, monkeypatch):
    monkeypatch.setenv('TMPA_HOME', '~/kept')
    assert tmpa_home() == home/'kept'
    with atomic_write('~/a/b.txt') as t: t.write_text('b')
    assert (home/'a'/'b.txt').read_text() == 'b'
    write_json('~/c.json', dict(c=1))
    assert read_json('~/c.json') == dict(c=1)
    save_environment('~/environment.json')
    save_environment('~/environment.json')
    write_lines('~/d.csv', [dict(epoch=1)], ['epoch'])
    assert read_lines('~/d.csv') == [dict(epoch='1')] and read_log('~/d.csv') == dict(epoch=[1.])
    assert write_report('~/e.html', 'title', []) == home/'e.html'
    assert new_folder('~/new') == home/'new' and run_state('~/new')[0] == 'cut off'
    with pytest.raises(ConfigError, match='exists already'): new_folder('~/new')
    images = '~/a.png', ReIDImage('~/b.png', 0, 1, 0)
    assert [o.path for o in check_records(images, 0)] == [home/'a.png', home/'b.png']
    assert {o.name for o in home.iterdir()} == {'RegDB', 'a', 'c.json', 'd.csv', 'e.html', 'environment.json', 'new'}

def test_features_and_galleries(home):
    x, y = np.eye(4, 8), np.arange(4)
    for end in ('npz', 'pt', 'mat'):
        save_features(f'~/f.{end}', x, y)
        assert (load_features(f'~/f.{end}').feats == x).all()
    save_features('~/gallery.mat', np.roll(x, 1, 1), y)
    evaluate_features('~/f.npz', '~/gallery.mat')
    images = sorted((home/'RegDB'/'Visible').rglob('*.bmp'))[:4]
    g = Gallery(made_by='me')
    assert g.add(['~/'+str(o.relative_to(home)) for o in images], 0, x) == 4
    assert g.add(images, 0, x) == 0 and g.items[0].path == images[0]
    g.save('~/g.npz')
    assert len(Gallery.load('~/g.npz', made_by='me')) == 4
    assert {o.name for o in home.iterdir()} == {'RegDB', 'f.npz', 'f.pt', 'f.mat', 'gallery.mat', 'g.npz'}

def test_weights(home):
    net = TMPANet(3, tiny_resnet, False, mfe=False, mft=False)
    save_weights(net, '~/w.pth')
    assert read_meta('~/w.pth')['arch'] == 'tiny_resnet'
    load_weights(net, '~/w.pth')
    assert load_tmpa('~/w.pth').dim == net.dim
    torch.save(tiny_resnet().state_dict(), home/'r.pth')
    make_resnet('tiny_resnet', '~/r.pth')
    assert SaveWeights('~/run', {}).folder == home/'run'
    assert ResumeFit('~/run/resume.pth').file == home/'run'/'resume.pth'

def test_readers(home):
    files = [*regdb_items('~/RegDB', 1, 'train'), *regdb_items('~/RegDB', 1, 'test')]
    rows = [[o.path.relative_to(home), o.pid, o.cam, o.modality, split] for o in files for split in ('train', 'test')]
    head = 'file', 'pid', 'cam', 'modality', 'split'
    with open(home/'list.csv', 'w', newline='') as f: csv.writer(f).writerows([head, *rows])
    assert [o.path for o in csv_items('~/list.csv')] == [o.path for o in files]
    assert len(read_data(DataSpec('csv', '~/list.csv'))[0]) == len(files)
    with pytest.raises(DataError, match=f'no file {home}/none.csv'): csv_items('~/none.csv')
    with pytest.raises(DataError, match=f'no file {home}'): load_perms('~/none.mat')
    make_sysu('~/sysu', structure=None, n_ids=5, per_cam=1, size=(48, 24))
    make_llcm('~/llcm', n_ids=3, n_cams=2, per_cam=1, size=(48, 24))
    (home/'structure.csv').write_text('pid,split,cam1,cam2,cam3,cam4,cam5,cam6\n1,test,1,1,1,1,1,1\n')
    assert make_sysu('~/one', '~/structure.csv', size=(48, 24)) == home/'one'
    items = read_data(DataSpec('sysu', '~/sysu', 'all'))[1]
    with pytest.raises(DataError, match=f'no file {home}/perms'): sysu_settings(items, perms='~/perms')
    assert read_image('~/'+str(files[0].path.relative_to(home))).shape == (3, 48, 24)

def test_loaders(home):
    how = dict(size=(48, 24), P=2, K=1, num_workers=0, device='cpu')
    dls = ReIDDataLoaders.from_regdb('~/RegDB', cache='~/decoded', **how)
    assert dls.source['path'] == str(home/'RegDB') and list((home/'decoded').glob('48x24-*.images'))
    assert ReIDDataLoaders.from_items(dls.train_items, path='~/models', **how).path == home/'models'
    some = [o._replace(path=Path('~')/o.path.relative_to(home)) for o in dls.train_items]
    named = image_cache(dls.train_items, (48, 24), folder='~/two')
    assert all(i is not None for i in named.rows(some))
    ReIDDataLoaders.from_synthetic('~/people', n_ids=8, per_modality=2, **how)
    assert (home/'people'/'manifest.json').exists() and (home/'people'/'decoded').is_dir()

def test_a_run_is_found_again(home):
    cfg = RunConfig(Recipe('B'), DataSpec('regdb', '~/RegDB'), '~/run')
    assert (cfg.out, cfg.spec.path) == (str(home/'run'), str(home/'RegDB'))
    stored = cfg.asdict()
    stored['spec']['path'] = '~/RegDB'  # as versions before 0.7 wrote it
    write_json(home/'run'/'config.json', stored)
    write_json(home/'run'/'metrics.json', dict(scores={}))
    assert earlier_run(cfg) == dict(scores={})

def test_commands(home, run, device):
    here = '--data=regdb', '--path=~/RegDB'
    status, out, err = run('tmpa_train', *here, '--out=~/runs/a', *SMALL)
    assert status == 0 and f'Report: {home}/runs/a/report.html' in out, err
    one_line(run('tmpa_train', *here, '--out=~/runs/a', *SMALL), f'{home}/runs/a exists already')
    status, out, err = run('tmpa_evaluate', '--weights=~/runs/a/last.pth', '--path=~/RegDB', '--out=~/scores.json')
    assert status == 0 and json.loads((home/'scores.json').read_text())['scores'], err
    again = '--weights=~/runs/a/last.pth', '--path=~/RegDB', '--out=~/scores.json'
    one_line(run('tmpa_evaluate', *again), 'exists already')
    for f in ('demo', 'tables', 'all'): (home/f).write_text('a file')
    one_line(run('tmpa_demo', '--out=~/demo'), f'{home}/demo exists')
    one_line(run('tmpa_train', *here, '--out=~/all', '--trial', 'all', *SMALL), f'{home}/all is a file')
    one_line(run('tmpa_reproduce', 'table2', '--scale=small', *here, '--out=~/tables'), f'{home}/tables')
    assert not (home/'~').exists()
