"Work that is too large for the memory ends in one line; stand-ins raise what the allocators of GPU and CPU raise."
import pytest
import torch

from test_cli import SMALL, one_line, run
from tmpa import cli
from tmpa.core import OutOfMemory
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.synthetic import make_regdb
from tmpa.callback.run import SaveWeights
from tmpa.extract import extract_features
from tmpa.learner import tmpa_learner
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet
from tmpa.search import Gallery

def gpu(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of')
def cpu(): torch.empty(2**50)

@pytest.fixture(scope='module')
def regdb(tmp_path_factory):
    return make_regdb(tmp_path_factory.mktemp('memory')/'regdb', n_ids=12, per_modality=3, size=(48, 24))

@pytest.fixture
def at_most(monkeypatch):
    "Batches of more images are too large for the network, in training or in evaluation."
    forward = TMPANet.forward
    def limit(n, full=gpu, training=None):
        def too_large(self, images, *args):
            if len(images) > n and training in (None, self.training): full()
            return forward(self, images, *args)
        monkeypatch.setattr(TMPANet, 'forward', too_large)
    return limit

@pytest.mark.parametrize('full,asked', [(gpu, '2.50 GiB'), (cpu, '4194304.00 GiB')])
def test_in_python(regdb, at_most, full, asked, device):
    dls = ReIDDataLoaders.from_regdb(regdb, size=(48, 24), P=4, K=2, num_workers=0)
    learn = tmpa_learner(dls, micro_resnet, pretrained=False, mix=None)
    at_most(8, full)
    said = f'16 images of 48x24 at a time .P=4, 2 modalities, K=2.: out of memory, {asked}'
    with learn.no_bar(), learn.no_logging(), pytest.raises(OutOfMemory, match=said): learn.fit_tmpa(1)
    assert learn.pred is None and learn.loss_grad is None
    items = dls.test_items
    said = f'features of {len(items)} images of 48x24, bs=9 at a time: out of memory, {asked} more .*make bs smaller'
    with pytest.raises(OutOfMemory, match=said):
        extract_features(learn.model, items, (48, 24), bs=9, num_workers=0)
    g = Gallery(learn.model, (48, 24), bs=9, num_workers=0)
    with pytest.raises(OutOfMemory, match='make bs smaller'): g.add(items)
    g.bs = 8
    assert g.add(items) == len(items)
    small = ReIDDataLoaders.from_regdb(regdb, size=(48, 24), P=2, K=2, num_workers=0, bs_valid=8)
    learn.dls = small
    with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(1, lr=.01)
    assert torch.isfinite(torch.tensor(learn.recorder.values[0][0]))

def test_in_commands(regdb, at_most, run, tmp_path, device):
    train = 'tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'r'
    at_most(10, training=True)
    one_line(run(*train, *SMALL), 'out of memory, 2.50 GiB', 'P=4', 'K=2', '48x24', '--p, --k, --size')
    assert not (tmp_path/'r').exists()  # so that the same command works with a smaller batch
    status, _, err = run(*train, *SMALL, '--p', 2)
    assert status == 0, err
    at_most(10, cpu)
    evaluate = 'tmpa_evaluate', '--weights', tmp_path/'r'/'last.pth', '--path', regdb
    one_line(run(*evaluate), 'bs=128', '--bs')
    status, out, err = run(*evaluate, '--bs', 10)
    assert status == 0 and 'v2t' in out, err
    one_line(run(*evaluate, '--bs', 0), 'bs=0')
    train = 'tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'s', *SMALL, '--p', 2
    one_line(run(*train), 'bs=128', 'the trained weights are kept')
    assert (tmp_path/'s'/'last.pth').exists()

def test_finished_epochs_stay(regdb, run, tmp_path, monkeypatch, device):
    "Memory that is taken by somebody else in the second epoch: what there is is gone on with."
    after = SaveWeights.after_epoch
    def second(self):
        if self.epoch: gpu()
        after(self)
    monkeypatch.setattr(SaveWeights, 'after_epoch', second)
    args = 'tmpa_train', '--data', 'regdb', '--path', regdb, '--out', tmp_path/'r', *SMALL, '--epochs', 2
    one_line(run(*args), 'out of memory')
    monkeypatch.setattr(SaveWeights, 'after_epoch', after)
    assert (tmp_path/'r'/'resume.pth').exists()
    status, _, err = run(*args, '--resume')
    assert status == 0, err

def test_anything_else_in_a_command(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'compare', lambda *args, **kwargs: gpu())
    one_line(run('tmpa_demo', '--out', tmp_path/'d'), 'out of memory, 2.50 GiB more were asked for', '--workers')
