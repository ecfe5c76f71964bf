"""Folders of runs that are damaged, cut off, or hold files of the user: nothing of the user's is lost, and what is wrong is said in one line."""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tmpa import run as folders
from tmpa.callback.loop import RunawayError
from tmpa.callback.resume import ResumeFit
from tmpa.core import CheckpointError, ConfigError, TMPAError
from tmpa.experiment import train_run
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, save_weights
from tmpa.recipes import get_recipe
from tmpa.run import RunConfig, clear_run, earlier_run, remove_leftovers, write_json
from tmpa.scoring import DataSpec


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
    (out/'.last-abcd12_4.pth').write_text('half a file')
    for name in MINE: (out/name).write_text('mine')
    return out


MINE = ('notes.txt', 'train.log', '.config-thesis', '.last-thesis2026x.pth', '.notes-20260101.csv', 'scores-mine.json')


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
    (out/'.config-thesis').rename(out/'.config-abcd_123.json')     # killed while it wrote its first file
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
    assert {p.name for p in Path(cfg.out).iterdir()} <= set(folders.RUN_FILES)
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
