"""Folders of runs that are damaged, cut off, or hold files of the user: nothing of the user's is lost, and what is wrong is said in one line."""
import json, os, runpy, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tmpa.callback.runaway import RunawayError
from tmpa.callback.resume import ResumeFit
from tmpa.core import CheckpointError, ConfigError, LostLoader, TMPAError
from tmpa.data.synthetic import make_regdb
from tmpa.demo import FIELDS, compare, demo_rows
from tmpa.callback.run import Watch
from tmpa.experiment import make_learner, train_run
from tmpa.extract import extract_features
from tmpa.many_runs import trials_folder
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, save_weights
from tmpa.report import read_log
from tmpa.recipes import get_recipe
from tmpa.provenance import save_environment
from tmpa.reproduce import pick_tables, reproduce
from tmpa.earlier import earlier_run
from tmpa.run import RunConfig
from tmpa.run_files import RUN_FILES, clear_run, folder_lock, remove_leftovers, write_json
from tmpa.data.load import ReIDDL
from tmpa.data.datasets import DataSpec, read_data
from tmpa.setup import make_setup


@pytest.fixture(scope='module')
def people(tmp_path_factory): return str(tmp_path_factory.mktemp('faults')/'people')


@pytest.fixture
def cfg(people, tmp_path):
    "A run of a second or two."
    spec = DataSpec(n_ids=16, size=(48, 24), path=people)
    how = dict(arch='micro_resnet', pretrained=False, epochs=1, lr=.03, P=4, K=2, num_workers=0)
    return RunConfig(get_recipe('B'), spec, str(tmp_path/'run'), **how)


@pytest.fixture
def begun(cfg):
    "The folder of a run that was killed in its first epoch, with files of the user beside its own."
    out = Path(cfg.out)
    out.mkdir()
    write_json(out/'config.json', cfg.asdict())
    (out/'history.csv').write_text('epoch,train_loss\n')
    (out/'.last-abcd12_4.tmpa.pth').write_text('half a file')
    for name in MINE: (out/name).write_text('mine')
    return out


@pytest.fixture
def one_line(monkeypatch, capsys, tmp_path, tmp_path_factory):
    "Call a command as a shell does, in an empty folder; it must end with status 2 and one line that has the words."
    monkeypatch.chdir(tmp_path)
    script = tmp_path_factory.mktemp('command')/'run.py'
    def call(command, *args, words=()):
        monkeypatch.setattr(sys, 'argv', [command, *map(str, args)])
        script.write_text(f'from tmpa.cli import {command}\n{command}()\n')
        with pytest.raises(SystemExit) as e: runpy.run_path(str(script), run_name='__main__')
        lines = capsys.readouterr().err.splitlines()
        assert e.value.code == 2 and len(lines) == 1, lines
        for w in [words] if isinstance(words, str) else words: assert w in lines[0], lines
        return lines[0]
    return call


MINE = ('notes.txt', 'train.log', '.config-thesis', '.last-thesis2026x.pth', '.last-features.pth', '.notes-20260101.csv', 'scores-mine.json')


def kept(out): return all((out/name).read_text() == 'mine' for name in MINE)


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_the_files_of_the_user_stay(cfg, begun):
    assert earlier_run(cfg) is None and kept(begun)
    assert sorted(p.name for p in begun.iterdir()) == sorted([*MINE, 'config.json'])
    scores = train_run(cfg, quiet=True, resume=True, rank_figure=False)['scores']
    assert kept(begun) and scores == json.loads((begun/'metrics.json').read_text())['scores']


@pytest.mark.parametrize('damage', ['cut', 'empty', 'first epoch', 'later epoch'])
def test_weights_that_cannot_be_gone_on_with(cfg, begun, damage):
    last = begun/'last.pth'
    if damage == 'cut': last.write_bytes(b'PK' + bytes(100))
    elif damage == 'empty': last.touch()
    else: torch.save(dict(model={}, meta=dict(epoch=1 if damage == 'first epoch' else 30)), last)
    was, long = last.read_bytes(), replace(cfg, epochs=80)
    write_json(begun/'config.json', long.asdict())
    for _ in range(2): assert earlier_run(long) is None
    of_use = damage in ('cut', 'later epoch')
    assert not last.exists() and (begun/'last-1.pth').exists() == of_use
    if of_use: assert (begun/'last-1.pth').read_bytes() == was
    assert kept(begun)


def test_a_folder_that_looks_empty(cfg, tmp_path):
    out = Path(cfg.out)
    out.mkdir()
    (out/'.config-thesis').write_text('mine')
    with pytest.raises(ConfigError, match='holds no run of tmpa'): earlier_run(cfg)
    assert (out/'.config-thesis').read_text() == 'mine'
    (out/'.config-thesis').rename(out/'.config-abcd_123.tmpa.json')     # killed while it wrote its first file
    assert earlier_run(cfg) is None and not out.exists()


def test_a_folder_that_is_a_link(cfg, tmp_path):
    (tmp_path/'disk').mkdir()
    Path(cfg.out).symlink_to(tmp_path/'disk')
    write_json(tmp_path/'disk'/'config.json', cfg.asdict())
    assert earlier_run(cfg) is None and Path(cfg.out).is_symlink() and (tmp_path/'disk').is_dir()


def test_logs_of_a_run_that_begins_again(begun):
    (begun/'tensorboard').mkdir()
    (begun/'tensorboard'/'events.out.tfevents.1').touch()
    (begun/'tensorboard'/'mine').touch()
    clear_run(begun)
    assert [p.name for p in (begun/'tensorboard').iterdir()] == ['mine']


@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_every_file_of_a_run_is_known_by_name(cfg):
    "`clear_run` would leave others behind."
    train_run(cfg, quiet=True)
    assert {p.name for p in Path(cfg.out).iterdir()} <= set(RUN_FILES)
    remove_leftovers(cfg.out)
    assert (Path(cfg.out)/'metrics.json').exists()


@pytest.mark.parametrize('where', ['a parameter', 'a running statistic'])
def test_numbers_that_are_none_replace_no_file(tmp_path, where):
    f, net = tmp_path/'w.pth', TMPANet(4, micro_resnet, pretrained=False, mfe=False, mft=False)
    fit = ResumeFit(f)
    fit.learn = SimpleNamespace(model=net, epoch=2, n_iter=3)
    net.register_buffer('mask', torch.full((2,), -torch.inf))     # no number that was learnt
    save_weights(net, f)
    was = f.read_bytes()
    numbers = net.neck.weight.data if where == 'a parameter' else net.neck.running_var
    numbers[0] = torch.nan
    with pytest.raises(CheckpointError, match='w.pth: not written, since neck.* is not finite'): save_weights(net, f)
    with pytest.raises(RunawayError, match='neck.* is not finite after epoch 2: .*w.pth stays as it is'): fit._write({}, [])
    assert [p.name for p in tmp_path.iterdir()] == ['w.pth'] and f.read_bytes() == was


WRONG = dict(lr=(-1, 0, float('nan'), float('inf'), '0.1', None), beta_warmup=(-5, float('nan')), epochs=(0, 1.5, None),
             warmup=(-1,), decay=((-1, 2),), P=(0,), K=(-2,), seed=(-1, 2**32, .5), patch=(0,), eval_every=(0,),
             num_workers=(-1,), select=('all',), precision=('fp64',), log=('xml',), ir_range=((5, 1), (1,)), arch=('vgg',))
WRONG_DATA = dict(n_ids=(1, 16.5), size=((0, 24), (48,), (48, 24.5)), seed=(-1,), data=('market',))


@pytest.mark.parametrize('field', [*WRONG, *(f'spec.{k}' for k in WRONG_DATA)])
def test_what_is_out_of_range_is_refused_before_anything_is_written(cfg, field):
    name = field.removeprefix('spec.')
    for value in (WRONG if name == field else WRONG_DATA)[name]:
        bad = replace(cfg, **{name: value}) if name == field else replace(cfg, spec=replace(cfg.spec, **{name: value}))
        for resume in (False, True):
            with pytest.raises(ConfigError, match=name): train_run(bad, quiet=True, resume=resume)
    assert not Path(cfg.out).exists()


@pytest.mark.cpu(reason="nothing is trained")
def test_ranges_of_comparisons_and_tables(cfg, tmp_path):
    rows = demo_rows(['B'], 1, size=(48, 24))
    kw = dict(arch='micro_resnet', pretrained=False, patch=8, quiet=True)
    for wrong in (dict(workers=0), dict(seeds=(-1,)), dict(lr=float('nan'))):
        with pytest.raises(ConfigError, match=next(iter(wrong))): compare(rows, tmp_path/'out', cfg.spec, **{**kw, **wrong})
    for wrong in (dict(epochs=0), dict(seeds=[-1]), dict(lr=-1), dict(budget=float('nan')), dict(ids=1)):
        with pytest.raises(ConfigError, match=next(iter(wrong))): make_setup('small', **wrong)
    for wrong in (dict(trial='x'), dict(ids=1)):
        with pytest.raises(ConfigError, match='leave it out'): make_setup('small', 'csv', 'list.csv', **wrong)
    with pytest.raises(ConfigError, match='workers=0'): reproduce(pick_tables('table2'), make_setup('small'), tmp_path/'out', workers=0)
    assert not (tmp_path/'out').exists()


@pytest.mark.cpu(reason="nothing is trained")
def test_ranges_of_the_commands(one_line, tmp_path):
    (tmp_path/'l.csv').write_text('file,pid,cam,modality,split\n')
    csv = ('--data', 'csv', '--path', tmp_path/'l.csv')
    for wrong in ('--lr -1', '--lr nan', '--lr inf', '--beta_warmup -5', '--ids 1', '--p 0', '--size 0x24'):
        one_line('tmpa_train', *wrong.split(), words=wrong.split()[0].strip('-'))
    for wrong in ('--trial x', '--trial 1', '--ids 1'):
        one_line('tmpa_train', *csv, *wrong.split(), words=(wrong.split()[0].strip('-'), 'leave it out'))
    for command in ('tmpa_demo', 'tmpa_reproduce'):
        table = ('table2', '--scale', 'small')*(command == 'tmpa_reproduce')
        for wrong in ('--workers 0', '--seeds=-1,', '--epochs 0'): one_line(command, *table, *wrong.split(), words=wrong.strip('-')[:5])
    assert [p.name for p in tmp_path.iterdir()] == ['l.csv']


linux = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes as Linux has them')


def alive(pid):
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rsplit(')', 1)[1].split()[0] != 'Z'


def started(code, *args):
    "A script that was started, and the number that it prints."
    heard = lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], stdout=subprocess.PIPE, text=True,
                         preexec_fn=heard)
    return p, int(p.stdout.readline())


HOLDS = """import os, sys, time
from tmpa.run_files import folder_lock
with folder_lock(sys.argv[1]):
    child = os.fork()
    if child: print(child, flush=True)
    time.sleep(60)
"""


@linux
def test_a_lock_ends_with_its_process(tmp_path):
    p, child = started(HOLDS, tmp_path)
    try:
        with pytest.raises(ConfigError, match='in use'): folder_lock(tmp_path).__enter__()
        p.kill()
        p.wait()
        assert alive(child)
        with folder_lock(tmp_path): pass
    finally: os.kill(child, signal.SIGKILL)


LOADS = """import os, time, torch
from tmpa.processes import end_with_parent
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i):
        if i: time.sleep(60)
        return os.getpid()
for pid in torch.utils.data.DataLoader(Slow(), num_workers=2, worker_init_fn=end_with_parent): print(int(pid), flush=True)
"""


@linux
@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGTERM])
def test_a_loader_process_ends_with_the_command(sig):
    p, child = started(LOADS)
    p.send_signal(sig)
    p.wait()
    t = time.time()
    while alive(child) and time.time()-t < 60: time.sleep(.02)
    assert not alive(child)


@pytest.mark.cpu(reason='a process of a loader is killed')
def test_a_loader_process_that_is_killed(cfg, one_line, monkeypatch):
    def create_batches(self, samples): os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(ReIDDL, 'create_batches', create_batches)
    small = '--arch micro_resnet --scratch --size 48x24 --ids 16 --p 4 --k 2 --epochs 1 --workers 1 --quiet --recipe B'
    one_line('tmpa_train', '--path', cfg.spec.path, '--out', cfg.out, *small.split(), words=('loader process was killed', '--workers'))


DEEP = '['*100_000
DAMAGE = [('metrics.json', '[1]'), ('metrics.json', '{}'), ('metrics.json', '{"scores": 1}'), ('metrics.json', DEEP),
          ('config.json', DEEP), ('config.json', 'null'), ('config.json', '\x00'), ('config.json', '{"recipe": {}, "spec": {}}'),
          ('config.json', '{"recipe": {"name": 1, "mix": 3}, "spec": {}}'), ('config.json', '{"recipe": {"depth": 3}, "spec": {}}'),
          ('ran_away.json', '{}'), ('ran_away.json', '7')]


@pytest.mark.parametrize('name, text', DAMAGE)
def test_damaged_files_of_a_run(cfg, begun, name, text):
    (begun/'last.pth').write_text('weights')
    (begun/name).write_text(text)
    with pytest.raises(TMPAError) as e: earlier_run(cfg)
    said = str(e.value)
    assert str(begun/name) in said and len(said) < 400 and 'remove' not in said and ('elsewhere' in said or name == 'config.json')
    assert (begun/name).read_text() == text and (begun/'last.pth').read_text() == 'weights' and kept(begun)


@pytest.mark.parametrize('text', ['[]', '{"resumed_with": 5}', '{"python": '])
def test_a_damaged_environment_of_a_trained_run(begun, text):
    f = begun/'environment.json'
    f.write_text(text)
    with pytest.raises(ConfigError, match='environment.json cannot be read .* or move it elsewhere'): save_environment(f)
    assert f.read_text() == text
    f.rename(begun/'elsewhere')
    save_environment(f)
    assert json.loads(f.read_text())['python']


@pytest.mark.parametrize('text', ['a,b\n1,2\n', 'epochs\n1\n', '\xff\xfe', 'x\n"' + 'y'*200_000])
def test_a_log_without_epochs(tmp_path, text):
    f = tmp_path/'history.csv'
    f.write_bytes(text.encode('latin1'))
    with pytest.raises(ConfigError, match='history.csv has no column epoch.* move it elsewhere'): read_log(f)


@pytest.mark.cpu(reason='nothing is trained')
@pytest.mark.parametrize('name, text', [('results.csv', 'day,hours\n1,8\n'), ('results.csv', ','.join(FIELDS) + '\nB,B,x\n'),
                                        ('results.csv', ','.join(FIELDS) + '\nB\n'), ('setup.json', '[1]'), ('setup.json', '{}')])
def test_damaged_files_of_a_comparison(cfg, tmp_path, name, text):
    out = tmp_path/'out'
    out.mkdir()
    (out/name).write_text(text)
    kw = dict(arch='micro_resnet', pretrained=False, patch=8, quiet=True, resume=True)
    with pytest.raises(ConfigError, match=f'{name} .* move it elsewhere'): compare(demo_rows(['B'], 1, size=(48, 24)), out, cfg.spec, **kw)
    assert [p.name for p in out.iterdir()] == [name] and (out/name).read_text() == text


SUMMARY = dict(arch='micro_resnet', pretrained=False, patch=8, quiet=True, resume=True)


@pytest.mark.cpu(reason='nothing is trained')
@pytest.mark.parametrize('name, text', [('report.html', '<html>my report'), ('results.md', '# mine'), ('report.html', ''),
                                        ('results.csv', 'day,hours\n'), ('results.csv', 'row')])
def test_a_summary_of_yours_is_not_written_over(cfg, tmp_path, name, text):
    out = tmp_path/'out'
    out.mkdir()
    (out/name).write_text(text)
    rows = demo_rows(['B'], 1, size=(48, 24))
    with pytest.raises(ConfigError, match=f'{name} .*move it elsewhere'): compare(rows, out, cfg.spec, **SUMMARY)
    assert [p.name for p in out.iterdir()] == [name] and (out/name).read_text() == text


def test_a_metrics_file_of_yours_beside_trials(tmp_path, one_line):
    (tmp_path/'ten').mkdir()
    (tmp_path/'ten'/'metrics.json').write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match='metrics.json cannot be read'): trials_folder(tmp_path/'ten', True)
    assert (tmp_path/'ten'/'metrics.json').read_text() == '{"mine": 1}'


def test_an_empty_table_of_yours(cfg, tmp_path):
    (tmp_path/'results.csv').write_text('day,hours\n')
    toy = make_setup('small', path=cfg.spec.path, ids=16, size=(48, 24))
    says = 'results.csv is not of tmpa_reproduce'
    with pytest.raises(ConfigError, match=says): reproduce(pick_tables('table2'), toy, tmp_path, show=True)
    assert (tmp_path/'results.csv').read_text() == 'day,hours\n'


def test_what_killed_commands_left_in_the_folder_of_tables(cfg, tmp_path):
    "A table that is not made again."
    left, mine = tmp_path/'.table5-regdb-t2v-abcd1234.tmpa.md', tmp_path/'.table5-regdb-t2v-abcd1234.md'
    for f in (left, mine): f.write_text('half')
    toy = make_setup('small', path=cfg.spec.path, ids=16, size=(48, 24))
    reproduce(pick_tables('table2'), toy, tmp_path, show=True, quiet=True)
    assert not left.exists() and mine.read_text() == 'half'


SCORES = {**{k: .5 for k in ('rank1', 'rank10', 'rank20', 'mAP', 'mINP')},
          **{k: 9 for k in ('n_queries', 'n_valid', 'n_gallery', 'n_trials')}}


@pytest.mark.parametrize('key, value', [('mAP', 'gone'), ('mAP', None), ('mAP', 22.5), ('mAP', float('nan')), ('mINP', {}),
                                        ('rank1', [1]), ('n_queries', 1.5), ('n_trials', '1'), ('mAP_std', -1), ('rank5', True)])
def test_damage_deep_in_metrics(cfg, begun, key, value):
    scores = {k: v for k, v in {**SCORES, key: value}.items() if v != 'gone'}
    write_json(begun/'metrics.json', dict(seed=0, scores=dict(v2t=SCORES, t2v=scores)))
    was = (begun/'metrics.json').read_bytes()
    says = f'metrics.json cannot be read .of t2v, {key} is .*move it elsewhere'
    with pytest.raises(ConfigError, match=says) as e: earlier_run(cfg)
    assert '\n' not in str(e.value) and (begun/'metrics.json').read_bytes() == was


@pytest.mark.cpu(reason='nothing is trained')
def test_a_log_that_is_a_pipe(cfg):
    out = Path(cfg.out)
    train_run(cfg, quiet=True, rank_figure=False)
    for name in ('metrics.json', 'history.csv'): (out/name).unlink()
    os.mkfifo(out/'history.csv')
    says = 'history.csv: this is a pipe.*move elsewhere'
    with pytest.raises(ConfigError, match=says): train_run(cfg, quiet=True, resume=True)


@pytest.mark.cpu(reason='a process of a loader is killed')
@pytest.mark.parametrize('what', ['fit', 'features', 'cache'])
def test_a_loader_process_that_is_killed_in_a_script(cfg, tmp_path, monkeypatch, what):
    def kill(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
    from tmpa.data import cache, load
    train, *_ = read_data(cfg.spec)
    learn = make_learner(replace(cfg, num_workers=1), train)
    monkeypatch.setattr(load.ReIDDL, 'create_batches', kill)
    monkeypatch.setattr(cache, 'decoded', kill)
    monkeypatch.setattr(cache, '_check_space', lambda *args: None)
    with pytest.raises(LostLoader, match='a loader process was killed.*fewer num_workers') as e:
        if what == 'fit':
            with learn.no_bar(): learn.fit(1)
        elif what == 'features': extract_features(learn.model, train[:4], (48, 24), num_workers=1)
        else: cache.image_cache(train, (48, 24), folder=tmp_path/'images', num_workers=1)
    assert '\n' not in str(e.value)


def test_results_that_are_not_of_the_tables(cfg, tmp_path):
    (tmp_path/'results.csv').write_text('day,hours\n1,8\n')
    toy = make_setup('small', path=cfg.spec.path, ids=16, size=(48, 24))
    with pytest.raises(ConfigError, match='results.csv is not of tmpa_reproduce'): reproduce(pick_tables('table2'), toy, tmp_path, show=True)
    assert (tmp_path/'results.csv').read_text() == 'day,hours\n1,8\n'


def test_a_full_disk_while_rendering(tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('tmpa.data.synthetic._write_chunk', full)
    with pytest.raises(OSError) as e: make_regdb(tmp_path/'people', n_ids=4, size=(48, 24))
    assert e.value.filename == str(tmp_path/'people') and not list(tmp_path.iterdir())


@pytest.mark.cpu(reason='pictures are compared bit for bit')
def test_the_picture_of_mixed_images(cfg, tmp_path, monkeypatch):
    "In one go, cut off and resumed, and only scored again."
    whole = replace(cfg, recipe=get_recipe('B+CA+PedMix'), epochs=2, patch=8)
    cut = replace(whole, out=str(tmp_path/'cut'))
    def kill(self):
        if self.epoch == 1: raise KeyboardInterrupt
    train_run(whole, quiet=True, rank_figure=False)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Watch, 'after_batch', kill)
        train_run(cut, quiet=True, rank_figure=False)
    picture = Path(whole.out)/'mixed_images.png'
    first = picture.read_bytes()
    assert train_run(cut, quiet=True, resume=True, rank_figure=False)['resumed_after'] == [1]
    assert (Path(cut.out)/'mixed_images.png').read_bytes() == first
    (Path(whole.out)/'metrics.json').unlink()
    train_run(whole, quiet=True, resume=True, rank_figure=False)
    assert picture.read_bytes() == first


def test_commands_begin_without_a_warning():
    r = subprocess.run([sys.executable, '-c', 'import tmpa.cli'], capture_output=True, text=True, timeout=600)
    assert (r.returncode, r.stderr) == (0, '')


def test_workflows_say_what_they_may():
    for f in (Path(__file__).parents[1]/'.github'/'workflows').glob('*.yml'): assert '\npermissions: {contents: read' in f.read_text(), f.name
