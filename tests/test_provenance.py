"""What a run folder says about the code and the images that it was made of, and whether a change is noticed."""
import shutil, subprocess, warnings
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tmpa.core import ConfigError
from tmpa.data.synthetic import make_regdb
from tmpa.callback.run import Watch
from tmpa.experiment import train_run
from tmpa.provenance import git_state, read_images
from tmpa.recipes import get_recipe
from tmpa.scoring import evaluate_run
from tmpa.earlier import OtherImages, earlier_run, run_images
from tmpa.run import RunConfig
from tmpa.data.datasets import DataSpec, read_data


# --- Code --------------------------------------------------------------------------------------------------------------

def git(folder, *args):
    who = '-c', 'user.name=a', '-c', 'user.email=a@b.c'
    return subprocess.run(['git', *who, *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

def repository(folder, *names):
    "A repository with files, committed; its commit."
    for o in names:
        (folder/o).parent.mkdir(parents=True, exist_ok=True)
        (folder/o).touch()
    git(folder, 'init', '-q')
    if names: git(folder, 'add', '-f', *names)
    git(folder, 'commit', '-q', '--allow-empty', '-m', 'first')
    return git(folder, 'rev-parse', 'HEAD')

NOT_KNOWN = dict(git=None, git_clean=None)

@pytest.mark.skipif(not shutil.which('git'), reason='asks git')
def test_the_commit_is_that_of_the_sources(tmp_path, monkeypatch):
    head = repository(tmp_path, 'tmpa/__init__.py')
    assert git_state(tmp_path/'tmpa') == dict(git=head, git_clean=True)
    (tmp_path/'link').symlink_to(tmp_path/'tmpa')
    assert git_state(tmp_path/'link') == dict(git=head, git_clean=True)
    (tmp_path/'tmpa'/'__init__.py').write_text('1')
    assert git_state(tmp_path/'tmpa') == dict(git=head, git_clean=False)
    (tmp_path/'other').mkdir()
    repository(tmp_path/'other', 'a.txt')
    monkeypatch.setenv('GIT_DIR', str(tmp_path/'other'/'.git'))     # as in a hook of that repository
    assert git_state(tmp_path/'tmpa')['git'] == head

@pytest.mark.skipif(not shutil.which('git'), reason='asks git')
@pytest.mark.parametrize('place, tracked', [('.venv/lib/site-packages', False), ('third_party', True), ('.', False)])
def test_nobody_elses_commit(tmp_path, place, tracked):
    "An environment within a repository, a copy in a sub-folder, and a copy that it does not track."
    package = tmp_path/place/'tmpa'
    package.mkdir(parents=True)
    (package/'__init__.py').touch()
    repository(tmp_path, 'thesis.tex', *([f'{place}/tmpa/__init__.py'] if tracked else []))
    assert git_state(package) == NOT_KNOWN

def test_no_repository(tmp_path):
    (tmp_path/'tmpa').mkdir()
    assert git_state(tmp_path/'tmpa') == NOT_KNOWN


# --- Images ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def cfg(tmp_path):
    "A run of a second on people of its own."
    data = make_regdb(tmp_path/'people', n_ids=16, per_modality=2, size=(48, 24))
    how = dict(arch='micro_resnet', pretrained=False, epochs=2, lr=.03, P=4, K=2, num_workers=0)
    return RunConfig(get_recipe('B'), DataSpec('regdb', str(data), size=(48, 24)), str(tmp_path/'run'), **how)

def exchange(f):
    "Another image under the same name: a black one, of another size on the disk."
    with Image.open(f) as x: size = x.size
    Image.new('RGB', size).save(f, format='PNG')

def files(cfg, part):
    train, test, _ = read_data(cfg.spec)
    return [Path(o.path) for o in (train if part == 'train' else test)]

def run(cfg, **kw): return train_run(cfg, quiet=True, rank_figure=False, **kw)

@pytest.fixture
def cut(cfg, monkeypatch):
    "It was cut off in its second epoch."
    def kill(self):
        if self.epoch == 1: raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Watch, 'after_batch', kill)
        run(cfg)
    return cfg

@pytest.mark.cpu(reason='the files of runs are the same on every device')
@pytest.mark.parametrize('part', ['train', 'test'])
def test_an_exchanged_image_before_resume(cut, part):
    f = files(cut, part)[3]
    exchange(f)
    for _ in range(2):
        with pytest.raises(OtherImages) as e: run(cut, resume=True)
    assert f'1 of 64 images, the first {f.parent.name}/{f.name}, have another size' in str(e.value)
    assert 'put them back' in str(e.value) and '\n' not in str(e.value) and (Path(cut.out)/'resume.pth').exists()

@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_a_copied_data_set_goes_on(cut, tmp_path):
    shutil.copytree(cut.spec.path, tmp_path/'disk', copy_function=shutil.copyfile)
    here = replace(cut, spec=replace(cut.spec, path=str(tmp_path/'disk')))
    with pytest.warns(UserWarning, match='64 of 64 images, the first .*, were written again') as said: m = run(here, resume=True)
    assert len(said) == 1 and m['resumed_after'] == [1] and m['images_changed'] == dict(n=64, sizes=0, times=64, first='1/v_00001_c2_1.bmp')
    assert 'were written again' in (Path(cut.out)/'report.html').read_text()
    with pytest.warns(UserWarning, match='were written again'): assert earlier_run(here, images_of(here)) == m

def images_of(cfg): return run_images(cfg.spec, *read_data(cfg.spec)[:2])

@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_what_has_not_changed_needs_no_word(cut):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        m = run(cut, resume=True)
        assert earlier_run(cut, images_of(cut)) == m
    assert 'images_changed' not in m and len(read_images(Path(cut.out)/'image_files.csv')) == 64

@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_a_run_of_before_goes_on(cut):
    "Version 0.7 hashed names alone."
    (Path(cut.out)/'image_files.csv').unlink()
    exchange(files(cut, 'train')[0])
    assert run(cut, resume=True)['resumed_after'] == [1]

@pytest.mark.cpu(reason='nothing is trained')
@pytest.mark.parametrize('text', ['', 'part,file\n', '\x00', None])
def test_a_damaged_list(cut, text):
    f = Path(cut.out)/'image_files.csv'
    f.write_text(''.join(f.read_text().splitlines(keepends=True)[:-1]) if text is None else text)
    was = f.read_bytes()
    with pytest.raises(ConfigError, match='image_files.csv cannot be read .*move it elsewhere') as e: run(cut, resume=True)
    assert '\n' not in str(e.value) and f.read_bytes() == was and (Path(cut.out)/'resume.pth').exists()

@pytest.mark.cpu(reason='the files of runs are the same on every device')
@pytest.mark.parametrize('cache', [False, True])
def test_an_image_that_is_exchanged_between_epochs(cfg, monkeypatch, tmp_path, cache):
    "Once an image is decoded, what happens to its file is nothing to the run."
    f = files(cfg, 'train')[0]
    def after_epoch(self):
        if self.epoch == 0: exchange(f)
    monkeypatch.setattr(Watch, 'after_epoch', after_epoch, raising=False)
    cfg = replace(cfg, cache=str(tmp_path/'images') if cache else False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        m = run(cfg)
    said = [str(o.message) for o in said if 'another size' in str(o.message)]
    report = (Path(cfg.out)/'report.html').read_text()
    assert len(said) == ('another size' in report) == (not cache)
    assert m.get('images_changed') == (None if cache else dict(n=64, sizes=1, times=0, first=f'{f.parent.name}/{f.name}'))

@pytest.mark.cpu(reason='the files of runs are the same on every device')
def test_an_image_that_is_exchanged_before_scoring(cfg):
    run(cfg)
    score = lambda: evaluate_run(Path(cfg.out)/'last.pth', path=cfg.spec.path)[1]
    assert 'warning' not in score()
    exchange(files(cfg, 'train')[0])
    assert 'warning' not in score()     # it is not scored
    f = files(cfg, 'test')[2]
    exchange(f)
    assert f'warning: 1 of 32 images, the first {f.parent.name}/{f.name}, have another size' in score()
    (Path(cfg.out)/'image_files.csv').write_text('mine')
    assert 'warning' in score() and 'cannot be read' in score()
    (Path(cfg.out)/'image_files.csv').unlink()
    assert 'warning' not in score()
