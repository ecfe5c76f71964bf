"""The commands as a shell calls them: help, a whole run, and one clear line for whatever a user can put right."""
import inspect, json, os, re, runpy, shutil, subprocess, sys
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tmpa import cli, many_runs
from tmpa.core import ConfigError
from tmpa.data.synthetic import make_llcm, make_regdb, make_sysu
from tmpa.experiment import train_run
from tmpa.scoring import evaluate_run
from tmpa.models.backbone import tiny_resnet
from tmpa.models.tmpa import TMPANet, save_weights
from tmpa.recipes import get_recipe
from tmpa.run import RunConfig
from tmpa.data.datasets import DataSpec

SMALL = '--arch tiny_resnet --scratch --size 48x24 --p 4 --k 2 --patch 4 --epochs 1 --workers 0 --quiet'.split()


@pytest.fixture(scope='module')
def regdb(tmp_path_factory): return make_regdb(tmp_path_factory.mktemp('data')/'regdb', n_ids=12, per_modality=3, size=(48, 24))


@pytest.fixture
def broken(regdb, tmp_path):
    "A copy that a test may damage."
    return Path(shutil.copytree(regdb, tmp_path/'RegDB'))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    "Call a command as its console script does; a process each would cost seconds."
    def _run(command, *args):
        script = tmp_path/f'{command}.py'
        script.write_text(f'from tmpa.cli import {command}\n{command}()\n')
        monkeypatch.setattr(sys, 'argv', [command, *map(str, args)])
        status = 0
        try: runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e: status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err
    return _run


def one_line(result, *words):
    status, out, err = result
    lines = [l for l in err.splitlines() if 'error:' in l]
    assert status == 2 and len(lines) == 1 and 'Traceback' not in err, err
    for w in words: assert str(w) in lines[0], lines[0]


@pytest.mark.parametrize('command', ['tmpa_demo', 'tmpa_check', 'tmpa_train', 'tmpa_evaluate', 'tmpa_reproduce'])
def test_help_is_complete(run, command):
    status, out, _ = run(command, '--help')
    assert not status and ('--out' in out) == (command != 'tmpa_check')  # which writes nothing
    for name, p in inspect.signature(getattr(cli, command)).parameters.items(): assert (name if p.default is p.empty else f'--{name}') in out
    cfg = ConfigParser(delimiters=['=']); cfg.read(Path(__file__).parents[1]/'settings.ini')
    assert f'{command}=tmpa.cli:{command}' in cfg['DEFAULT']['console_scripts']


def test_train_then_evaluate(run, regdb, tmp_path, device, whole_report):
    status, out, err = run('tmpa_train', '--data', 'regdb', '--path', regdb, '--trial', 2, '--out', tmp_path/'r', *SMALL)
    assert status == 0, err
    assert 'Rank-1' in out and 'v2t' in out and 't2v' in out and 'mINP' in out
    files = {p.name for p in (tmp_path/'r').iterdir()}
    assert {'config.json', 'environment.json', 'history.csv', 'last.pth', 'metrics.json', 'report.html'} <= files
    status, out2, err = run('tmpa_evaluate', '--weights', tmp_path/'r'/'last.pth', '--path', regdb)
    assert status == 0 and out2.splitlines()[1] in out
    one_line(run('tmpa_evaluate', '--weights', tmp_path/'r'/'last.pth', '--path', regdb, '--trial', 1), 'trial 1', 'trial 2', 'last.pth')
    one_line(run('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'r', *SMALL), tmp_path/'r', 'exists')
    cut = tmp_path/'cut.pth'
    cut.write_bytes((tmp_path/'r'/'last.pth').read_bytes()[:5000])
    one_line(run('tmpa_evaluate', '--weights', cut, '--path', regdb), 'cut.pth')
    one_line(run('tmpa_evaluate', '--weights', tmp_path/'none.pth', '--path', regdb), 'none.pth')


def test_sysu_prints_counts(run, tmp_path, device):
    rows = [dict(pid=p, split='train' if p < 8 else 'val' if p < 9 else 'test', cam1=2, cam2=2, cam3=2, cam4=1, cam5=1, cam6=2) for p in range(1, 13)]
    root = make_sysu(tmp_path/'sysu', structure=rows, size=(48, 24))
    status, out, err = run('tmpa_train', '--data', 'sysu', '--path', root, '--out', tmp_path/'r', *SMALL)
    assert status == 0, err
    table = {l.split()[0]: l.split() for l in out.splitlines() if l.startswith(('all_', 'indoor_'))}
    assert table['all_single'][1:5] == ['16', '16', '16', '10'] and table['indoor_single'][3] == '8' and table['all_multi'][3] == '24'


def test_missing_folder_and_files(run, broken, tmp_path):
    train = ('tmpa_train', '--data', 'regdb', '--out', tmp_path/'r', *SMALL, '--path')
    one_line(run(*train, tmp_path/'nowhere'), tmp_path/'nowhere')
    index = broken/'idx'/'train_visible_1.txt'
    lines = index.read_text().splitlines()
    index.write_text('\n'.join(['Visible/1/not_there.bmp 0', *lines[1:]]) + '\n')
    one_line(run(*train, broken), 'train_visible_1.txt', 'not_there.bmp')
    index.unlink()
    one_line(run(*train, broken), 'train_visible_1.txt')
    assert not (tmp_path/'r').exists()


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('damage', ['truncated', 'empty'])
def test_damaged_images(run, broken, tmp_path, damage, workers, device):
    line = (broken/'idx'/'train_thermal_1.txt').read_text().splitlines()[0]
    img = broken/line.rsplit(' ', 1)[0]
    if damage == 'empty': img.write_bytes(b'')
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 24, 3), dtype=np.uint8)).save(img, format='JPEG')
        img.write_bytes(img.read_bytes()[:900])
    one_line(run('tmpa_train', '--data', 'regdb', '--path', broken, '--out', tmp_path/'r', *SMALL, '--workers', workers), img.name)


def test_identities(run, broken, tmp_path):
    train = ('tmpa_train', '--data', 'regdb', '--path', broken, '--out', tmp_path/'r', *SMALL)
    one_line(run(*train, '--p', 40), '40')
    f = broken/'idx'/'train_thermal_1.txt'
    test = (broken/'idx'/'test_thermal_1.txt').read_text().splitlines()
    f.write_text('\n'.join(f"{l.split()[0]} {int(l.split()[1]) + 100}" for l in test) + '\n')  # other people: nobody is seen in both modalities
    one_line(run(*train), 'modalit')


def test_arguments(run, regdb, tmp_path):
    train = ('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'r', *SMALL)
    one_line(run(*train, '--patch', 7), '7')
    one_line(run(*train, '--size', '48'), '288x144')
    one_line(run(*train, '--trial', 11), '11')
    one_line(run(*train, '--epochs', 0), 'epochs=0')
    one_line(run(*train, '--workers', -1), 'num_workers=-1')
    one_line(run(*train, '--select', 'held_out', '--p', 2, '--eval_every', 0), 'eval_every=0')
    for r in ('5', '9,1'): one_line(run(*train, '--ir_range', r), 'ir_range', '0,65535')
    one_line(run(*train, '--recipe', 'vit'), 'vit', 'TMPA')
    one_line(run('tmpa_evaluate'), '--weights')
    assert not (tmp_path/'r').exists()


def test_fields_of_the_recipe(run, regdb, tmp_path, device):
    "What --set changes is checked before anything is written, kept in the run folder, and compared by --resume."
    train = ('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'r', *SMALL)
    for text, words in {'mix.ratio=.5': 'did you mean ratios?', 'loss.beta=much': "beta='much'", 'mixx.p=1': 'did you mean mix?',
                        'mix.ratios': 'field=value', 'mix.ratios=.5,.6': 'three values', 'mix.ratios=.5,.6,2': 'from 0 to 1'}.items():
        one_line(run(*train, '--set', text), words)
    one_line(run(*train, '--recipe', 'B', '--set', 'mix.p=.5'), 'mix of B is None')
    one_line(run(*train, '--set', 'loss.beta=.1', '--set', 'loss.beta=.2'), 'loss.beta is given twice')
    assert not (tmp_path/'r').exists()
    changed = '--set', 'mix.ratios=.5,.55,.6', 'loss.beta=.2', '--set', 'mfe=false', 'mft=false'
    status, out, err = run(*train, *changed)
    assert status == 0 and 'ratios=(0.5, 0.55, 0.6)' in out, err
    kept = json.loads((tmp_path/'r'/'config.json').read_text())['recipe']
    assert kept['mix'] == {'ratios': [.5, .55, .6]} and kept['loss'] == {'beta': .2} and not kept['mfe']
    one_line(run(*train, '--resume'), 'begun with another recipe')
    assert run(*train, *changed, '--resume')[0] == 0


def test_check(run, regdb, broken, tmp_path):
    status, out, err = run('tmpa_check', '--data', 'regdb', '--path', regdb)
    assert status == 0 and 'not the published data set' in out and ' 2,060 ' in out, err
    (broken/'idx'/'train_visible_4.txt').unlink()
    status, out, err = run('tmpa_check', '--data', 'regdb', '--path', broken, '--images', 0)
    assert status == 1 and 'training part, trial 4' in out and 'train_visible_4.txt' in out and not err.strip(), err
    assert run('tmpa_check', '--data', 'regdb', '--path', broken, '--trial', 5)[0] == 0
    one_line(run('tmpa_check', '--data', 'regdb'), 'needs --path')
    one_line(run('tmpa_check', '--data', 'regdb', '--path', regdb, '--trial', 12), '12')


class IdentityLoss(torch.nn.Module):
    "Cross entropy alone, in training."
    terms = 'loss_id',
    def __init__(self, weight=1.):
        super().__init__()
        self.weight = weight

    def forward(self, out, label, *others):
        if isinstance(out, torch.Tensor): return out.new_full((), float('nan'))
        self.loss_id = torch.nn.functional.cross_entropy(out['logits'], label[out['index']])
        return self.weight*self.loss_id


def test_a_recipe_with_a_loss_of_ones_own(regdb, tmp_path, device):
    "Its terms are columns, its weights are scored again, and a finished run with another argument is another run."
    recipe = get_recipe('B').but(name='B, identity alone', loss=dict(kind=IdentityLoss, weight=.5))
    cfg = RunConfig(recipe, DataSpec('regdb', regdb, '2', size=(48, 24)), tmp_path/'r', 'tiny_resnet', False, 1, .03, P=4, K=2, num_workers=0)
    scores = train_run(cfg, quiet=True)['scores']
    assert 'loss_id' in (tmp_path/'r'/'history.csv').read_text().splitlines()[0].split(',')
    assert evaluate_run(tmp_path/'r'/'last.pth', path=regdb, num_workers=0)[0].keys() == scores.keys()
    assert train_run(cfg, quiet=True, resume=True)['scores'] == scores
    other = replace(cfg, recipe=recipe.but(loss=dict(kind=IdentityLoss, weight=.6)))
    with pytest.raises(ConfigError, match='another recipe'): train_run(other, quiet=True, resume=True)


def test_offline(run, regdb, tmp_path, monkeypatch, device):
    from urllib.error import URLError
    def no_network(*a, **k): raise URLError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'hub'))
    args = [a for a in SMALL if a not in ('--scratch', 'tiny_resnet', '--arch')]
    one_line(run('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'r', '--arch', 'resnet18', *args), 'resnet18', 'pth', '--scratch')


def test_a_run_starts_from_the_weights_of_the_package(run, regdb, device, tmp_path):
    how = ['tmpa_train', '--data', 'regdb', '--path', regdb, '--recipe', 'B', *SMALL, '--out']
    start = [a for a in how if a not in ('--scratch', '--arch', 'tiny_resnet', '--out')] + ['--arch', 'ibn_resnet', '--out']
    status, out, err = run(*start, tmp_path/'r', '--pretrained', 'rendered')
    assert status == 0, err
    assert json.loads((tmp_path/'r'/'config.json').read_text())['pretrained'] == 'rendered'
    one_line(run(*how, tmp_path/'s', '--pretrained', 'rendered'), 'leave the other out')
    one_line(run(*start, tmp_path/'s', '--pretrained', 'no.pth'), 'no --pretrained file', 'no.pth', 'rendered')
    assert not (tmp_path/'s').exists()


def test_checkpoint_of_another_architecture(tmp_path):
    from torchvision.models import resnet18
    from tmpa.core import CheckpointError
    from tmpa.models.tmpa import load_weights
    small, other = TMPANet(4, tiny_resnet, pretrained=False), TMPANet(4, resnet18, pretrained=False, mfe=False, mft=False)
    save_weights(small, tmp_path/'w.pth')
    with pytest.raises(CheckpointError, match='w.pth.*tiny_resnet.*resnet18'): load_weights(other, tmp_path/'w.pth')


def test_installed_commands_answer():
    exe = Path(sys.executable).parent/'tmpa_train'
    if not exe.exists(): pytest.skip('tmpa is not installed in this environment')
    r = subprocess.run([exe, '--data', 'regdb', '--path', 'nowhere', '--out', 'never-made'], capture_output=True, text=True, timeout=600)
    assert r.returncode == 2 and 'nowhere' in r.stderr and 'Traceback' not in r.stderr


def test_other_peoples_features(run, tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (('q', 12), ('g', 40)): np.savez(tmp_path/f'{name}.npz', feat=rng.normal(size=(n, 8)), pid=np.arange(n) % 4, cam=1 + np.arange(n) % 3)
    status, out, err = run('tmpa_evaluate', '--features', tmp_path/'q.npz', tmp_path/'g.npz', '--rule', 'sysu', '--out', tmp_path/'s.json')
    assert status == 0, err
    assert out.splitlines()[1].split()[:5] == ['features', '12', '12', '40', '1'] and (tmp_path/'s.json').exists()
    status, out, err = run('tmpa_evaluate', '--features', tmp_path/'q.npz', tmp_path/'g.npz', '--metric', 'euclidean', '--rerank')
    assert status == 0 and 'euclidean' in out and 're-rank' in out, err
    one_line(run('tmpa_evaluate', '--features', tmp_path/'q.npz', tmp_path/'g.npz', '--flip', '--trial', 5, '--complete', 'own'), '--trial, --complete, --flip')
    one_line(run('tmpa_evaluate', '--weights', tmp_path/'w.pth', '--rule', 'sysu'), '--rule')
    np.savez(tmp_path/'empty.npz', feat=rng.normal(size=(0, 8)), pid=[], cam=[])
    one_line(run('tmpa_evaluate', '--features', tmp_path/'q.npz', tmp_path/'empty.npz', '--rule', 'sysu'), 'empty.npz')
    np.savez(tmp_path/'odd.npz', x=rng.normal(size=(3, 8)))
    one_line(run('tmpa_evaluate', '--features', tmp_path/'odd.npz', tmp_path/'g.npz'), 'odd.npz', 'x')


def test_demo(run, tmp_path, device):
    args = ('tmpa_demo', '--out', tmp_path/'demo', '--data', tmp_path/'people', '--ids', 16, '--size', '48x24', '--epochs', 1)
    status, out, err = run(*args)
    assert status == 0, err
    assert '\r' not in out and '█' not in out and out.count('\nepoch 0, train_loss ') == 2  # no bars in a file
    table = {l.split('  ')[0]: l for l in out.splitlines() if l.startswith(('B ', 'TMPA ', 'method'))}
    assert {'B', 'TMPA', 'method'} <= set(table) and 'mAP v2t' in table['method'] and 'mAP t2v' in table['method']
    for f in ('results.csv', 'results.md', 'report.html', 'tmpa-seed0/report.html', 'tmpa-seed0/mixed_images.png', 'tmpa-seed0/best.pth'): assert (tmp_path/'demo'/f).exists(), f
    report = (tmp_path/'demo'/'report.html').read_text()
    links = re.findall(r'href="([^"]+)"', report)
    assert len(links) == 4 and all((tmp_path/'demo'/o).exists() for o in links)
    assert re.search(r'class="lead">(B|TMPA) has mAP .*, the highest: .* above (B|TMPA) \(one run each: no interval\)', report)
    assert report.count('class="query"') == 3 and report.count('<h3>TMPA</h3>') == report.count('<h3>B</h3>') == 3
    one_line(run(*args), 'exists', '--resume')
    assert run(*args, '--resume', '--quiet')[0] == 0
    assert (tmp_path/'demo'/'report.html').read_text() == report


@pytest.mark.cpu(reason='scores are compared bit for bit')
def test_a_cache_changes_no_score(run, regdb, tmp_path):
    scores = []
    for cache in ('off', tmp_path/'images'):
        out = tmp_path/f'run{len(scores)}'
        status, _, err = run('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', out, '--cache', cache, '--precision', 'fp32', *SMALL)
        assert status == 0, err
        scores.append(json.loads((out/'metrics.json').read_text())['scores'])
    assert scores[0] == scores[1]
    assert len(list((tmp_path/'images').glob('48x24-*.images'))) == 1
    file = tmp_path/'file'
    file.touch()
    one_line(run('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'x', '--cache', file, *SMALL), file, '--cache off')
    assert not (tmp_path/'x').exists()


def test_a_run_whose_loss_runs_away(run, regdb, tmp_path, device):
    args = ('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'wild', '--lr', 1e25, *SMALL)
    one_line(run(*args), 'in epoch 1 of 1, batch', 'is nan', 'lower lr')
    files = sorted(p.name for p in (tmp_path/'wild').iterdir())
    assert files == ['config.json', 'environment.json', 'history.csv', 'image_files.csv', 'ran_away.json']
    for _ in range(2): one_line(run(*args, '--resume'), 'ran_away.json', 'choose another --out with a lower --lr', '--precision fp32')
    assert sorted(p.name for p in (tmp_path/'wild').iterdir()) == files


def test_ten_trials_go_on_where_they_were_cut_off(run, regdb, tmp_path, monkeypatch):
    args = ('tmpa_train', '--data', 'regdb', '--path', regdb, '--trial', 'all', '--out', tmp_path/'all', '--recipe', 'B', *SMALL)
    one_line(run(*args, '--patch', 7, '--recipe', 'TMPA'), '7')
    assert not (tmp_path/'all').exists()
    from tmpa import run_files as folder
    from tmpa.earlier import earlier_run
    seen = []
    def train(cfg, quiet, resume):
        "Stands in for the training."
        if resume and (before := earlier_run(cfg)): return before
        if cfg.spec.trial == '3' and len(seen) == 2: raise KeyboardInterrupt
        seen.append(cfg.spec.trial)
        folder.write_json(folder.new_folder(cfg.out)/'config.json', cfg.asdict())
        m = dict(scores={'v2t': dict(n_queries=9, n_valid=9, n_gallery=9, n_trials=1, **{k: int(cfg.spec.trial)/10 for k in ('rank1', 'rank10', 'rank20', 'mAP', 'mINP')})})
        folder.write_json(Path(cfg.out)/'metrics.json', m)
        return m
    monkeypatch.setattr(many_runs, 'train_run', train)
    assert run(*args)[0] == 2 and seen == ['1', '2']
    (tmp_path/'all'/'trial2'/'metrics.json').unlink()  # as if the second was cut off before its scores were written
    one_line(run(*args), 'exists', '--out')
    first = (tmp_path/'all'/'trial1'/'metrics.json').stat().st_mtime_ns
    status, out, err = run(*args, '--resume')
    assert status == 0 and 'mean of ten trials' in out, err
    assert seen == ['1', '2', '2', *map(str, range(3, 11))]
    assert (tmp_path/'all'/'trial1'/'metrics.json').stat().st_mtime_ns == first
    m = json.loads((tmp_path/'all'/'metrics.json').read_text())
    assert m['trials'] == 10 and m['scores']['v2t']['n_trials'] == 10 and m['scores']['v2t']['mAP_std'] > 0
    one_line(run(*args, '--resume', '--lr', .5), 'lr', '--out')
    (tmp_path/'all'/'notes.txt').touch()
    one_line(run(*args, '--resume'), 'other things')


TEN_TRIALS = '''
from tmpa import cli, many_runs, run_files
from pathlib import Path
def train(cfg, quiet, resume):
    "Stands in for the training."
    run_files.new_folder(cfg.out)
    numbers = dict.fromkeys(('rank1', 'rank10', 'rank20', 'mAP', 'mINP'), int(cfg.spec.trial)/10)
    return dict(scores={'v2t': dict(n_queries=9, n_valid=9, n_gallery=9, n_trials=1, **numbers)})
many_runs.train_run = train
cli.tmpa_train(data='regdb', path='nowhere', trial='all', out=%r, recipe='B', arch='tiny_resnet', scratch=True)
'''

def test_a_console_of_another_encoding_ends_nothing(tmp_path):
    "Ten finished models whose table holds a plus-minus sign, in a folder whose name is no text."
    out = str(tmp_path).encode()+b'/r\xff'
    code = TEN_TRIALS % out.decode('utf8', 'surrogateescape')
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, env=env, timeout=600)
    assert r.returncode == 0, r.stderr
    assert b'55.00 +- 30.28' in r.stdout and b'Reports: '+out in r.stdout
    assert json.loads(Path(os.fsdecode(out), 'metrics.json').read_text())['trials'] == 10

def test_help_is_in_letters_that_every_console_has(run):
    for command in ('tmpa_demo', 'tmpa_train', 'tmpa_evaluate', 'tmpa_reproduce'):
        assert run(command, '--help')[1].isascii()


def test_llcm_both_directions(run, tmp_path, device):
    root = make_llcm(tmp_path/'llcm', n_ids=15, n_cams=3, per_cam=2, size=(48, 24))
    status, out, err = run('tmpa_train', '--data', 'llcm', '--path', root, '--out', tmp_path/'r', *SMALL)
    assert status == 0, err
    table = {l.split()[0]: l.split() for l in out.splitlines() if l.startswith(('v2t', 't2v'))}
    assert table['v2t'][1:5] == table['t2v'][1:5] == ['30', '30', '15', '10']
    status, out2, err = run('tmpa_evaluate', '--weights', tmp_path/'r'/'last.pth', '--path', root, '--trial', 3)
    assert status == 0 and 'trial 3' in out2, err


def test_tensorboard(run, regdb, tmp_path):
    pytest.importorskip('tensorboard')
    status, out, err = run('tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'r', *SMALL, '--log', 'tensorboard')
    assert status == 0 and list((tmp_path/'r'/'tensorboard').glob('events*')), err


def csv_of(root, rows):
    "A list of pictures of noise; rows are (pid, modality, split)."
    rng = np.random.default_rng(0)
    lines = ['file,pid,cam,modality,split']
    for i, (pid, m, split) in enumerate(rows):
        f = root/f'{i}.png'
        if not f.exists(): Image.fromarray(rng.integers(0, 255, (48, 24, 3), dtype=np.uint8)).save(f)
        lines.append(f'{f.name},{pid},{m+1},{m},{split}')
    return lines


ROWS = [(p, m, 'train' if p < 6 else 'test') for p in range(9) for m in (0, 1, 0, 1)]


def test_people_of_training_in_the_test_are_said(run, tmp_path, device):
    "Every row twice: in the command, before and after the training, in the report and in the metrics; nothing where there are none."
    lines = csv_of(tmp_path, ROWS)
    other = {'train': 'test', 'test': 'train'}
    twice = lines + [l.rpartition(',')[0] + ',' + other[l.rpartition(',')[2]] for l in lines[1:]]
    for name, some in (('clean', lines), ('twice', twice)):
        (tmp_path/'l.csv').write_text('\n'.join(some))
        train = ('tmpa_train', '--data', 'csv', '--path', tmp_path/'l.csv', '--recipe', 'B', '--out', tmp_path/name, *SMALL)
        if name == 'twice':
            with pytest.warns(UserWarning, match='9 people and 36 images of the test are in the training part too'): status, out, err = run(*train)
        else: status, out, err = run(*train)
        assert status == 0, err
        metrics, report = json.loads((tmp_path/name/'metrics.json').read_text()), (tmp_path/name/'report.html').read_text()
        status, out2, err = run('tmpa_evaluate', '--weights', tmp_path/name/'last.pth', '--path', tmp_path/'l.csv', '--out', tmp_path/f'{name}.json')
        assert status == 0, err
        how = json.loads((tmp_path/f'{name}.json').read_text())['how']
        said = ['9 people and 36 images of the test are in the training part too' in o for o in (out, report, out2, how)]
        assert said == [name == 'twice']*4 and metrics.get('also_trained') == (dict(people=9, images=36) if name == 'twice' else None)


def test_equal_id_files_of_sysu(tmp_path):
    from tmpa.data.datasets import DataSpec, also_trained, read_data
    rows = [dict(pid=p, split='train' if p < 4 else 'val' if p < 5 else 'test', cam1=2, cam2=2, cam3=2, cam4=1, cam5=1, cam6=2) for p in range(1, 8)]
    spec = DataSpec('sysu', make_sysu(tmp_path/'sysu', structure=rows, size=(48, 24)), 'all')
    train, test, _ = read_data(spec)
    assert also_trained(spec, train, test) == {}
    for s in ('train', 'val'): shutil.copy(tmp_path/'sysu'/'exp'/'test_id.txt', tmp_path/'sysu'/'exp'/f'{s}_id.txt')
    train, test, _ = read_data(spec)
    assert also_trained(spec, train, test) == dict(people=3, images=30)


def test_regdb_parts_may_number_people_alike(tmp_path):
    "Where folders do not say who somebody is, label 0 of each part is another person; the same image is the same."
    from tmpa.data.datasets import DataSpec, also_trained, read_data
    for p in 'abcd':
        for m in ('Visible', 'Thermal'):
            (tmp_path/m/p).mkdir(parents=True)
            Image.new('L', (4, 8)).save(tmp_path/m/p/'x.bmp')
    def write(train, test):
        (tmp_path/'idx').mkdir(exist_ok=True)
        for s, people in (('train', train), ('test', test)):
            for m in ('Visible', 'Thermal'): (tmp_path/'idx'/f'{s}_{m.lower()}_1.txt').write_text(''.join(f'{m}/{p}/x.bmp {i}\n' for i, p in enumerate(people)))
    spec = DataSpec('regdb', str(tmp_path))
    for train, test, want in (('ab', 'cd', {}), ('abc', 'cd', dict(people=1, images=2))):
        write(train, test)
        a, b, _ = read_data(spec)
        assert also_trained(spec, a, b) == want


def test_evaluation_reads_the_test_part_alone(run, regdb, broken, tmp_path):
    w = tmp_path/'w.pth'
    meta = dict(size=[48, 24], n_ids=0, data_seed=0)
    def weights(data, trial): save_weights(TMPANet(4, tiny_resnet, pretrained=False, mfe=False, mft=False), w, data=data, trial=trial, **meta)
    lines = csv_of(tmp_path, ROWS)
    (tmp_path/'l.csv').write_text('\n'.join([lines[0], *(l for l in lines if l.endswith('test'))]))
    weights('csv', 'all')
    status, out, err = run('tmpa_evaluate', '--weights', w, '--path', tmp_path/'l.csv')
    assert status == 0 and 'v2t' in out and 'arning' not in out, err
    (tmp_path/'0.png').unlink()                                                          # an image of training
    (tmp_path/'l.csv').write_text('\n'.join(lines))
    assert run('tmpa_evaluate', '--weights', w, '--path', tmp_path/'l.csv')[0] == 0
    weights('regdb', '1')
    want = run('tmpa_evaluate', '--weights', w, '--path', broken)
    for f in (broken/'idx').glob('train_*'): f.unlink()
    assert run('tmpa_evaluate', '--weights', w, '--path', broken) == want and want[0] == 0
    rows = [dict(pid=p, split='train' if p < 4 else 'val' if p < 5 else 'test', cam1=2, cam2=2, cam3=2, cam4=1, cam5=1, cam6=2) for p in range(1, 8)]
    root = make_sysu(tmp_path/'sysu', structure=rows, size=(48, 24))
    weights('sysu', 'all')
    for f in ('train_id.txt', 'val_id.txt'): (root/'exp'/f).unlink()
    status, out, err = run('tmpa_evaluate', '--weights', w, '--path', root)
    assert status == 0 and 'all_single' in out, err
    root = make_llcm(tmp_path/'llcm', n_ids=15, n_cams=3, per_cam=2, size=(48, 24))
    weights('llcm', 'all')
    for f in (root/'idx').glob('train_*'): f.unlink()
    for d in ('vis', 'nir'): shutil.rmtree(root/d, ignore_errors=True)
    status, out, err = run('tmpa_evaluate', '--weights', w, '--path', root)
    assert status == 0 and 't2v' in out, err
