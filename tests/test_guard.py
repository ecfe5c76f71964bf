"What fastai offers for a Learner: it works here, or says in one line what there is in its place."
import pickle, sys, types

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientClip
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropy
from fastai.metrics import F1Score, LossMetrics, accuracy, error_rate
from fastai.torch_core import set_seed
from torch import nn

from test_cli import SMALL, one_line, run
from tmpa.callback.loop import AsyncMixedPrecision
from tmpa.callback.runaway import RunawayError
from tmpa.callback.mix import SlotMixup
from tmpa.callback.pedmix import PedMix
from tmpa.core import ConfigError
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.synthetic import make_regdb
from tmpa.guard import ReIDLearner, tensorboard_scalars
from tmpa.interpret import ReIDInterpretation
from tmpa.learner import reid_learner, tmpa_learner
from tmpa.losses import TMPALoss
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet


@pytest.fixture(scope='module')
def regdb(tmp_path_factory):
    return make_regdb(tmp_path_factory.mktemp('guard')/'regdb', n_ids=24, per_modality=3, size=(48, 24))

def loaders(regdb, P=3, K=2, **kwargs):
    return ReIDDataLoaders.from_regdb(regdb, size=(48, 24), P=P, K=K, num_workers=0, bs_valid=16, **kwargs)

def learner(dls, mix=None, **kwargs):
    set_seed(0)
    return tmpa_learner(dls, micro_resnet, pretrained=False, mix=mix, **kwargs)

def fit(learn, n=1, **kwargs):
    set_seed(0)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr=.01, **kwargs)
    return learn

def columns(learn): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
def weights(learn): return torch.cat([p.detach().flatten().cpu() for p in learn.model.parameters()])

# ---------------------------------------------------------------- mixed precision

@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16', 'in a fit'])
def test_a_second_mixed_precision_takes_the_place_of_the_first(regdb, how, device):
    "One is at work, ours, and the weights are those of a learner that was mixed in this way from the start."
    mode = 'bf16' if how == 'to_bf16' else 'fp16'
    dls = loaders(regdb)
    device = dls.device.type
    def ours(mode):
        scale = dict(init_scale=2.**6) if mode == 'fp16' else {}
        return AsyncMixedPrecision(mode, device=device, **scale)
    want = weights(fit(learner(dls, precision='fp32', cbs=ours(mode))))
    dls.train.set_epoch(0)
    learn = learner(dls, precision='fp32', cbs=AsyncMixedPrecision('bf16', device=device))
    was = learn.mixed_precision
    if how == 'in a fit':
        fit(learn, cbs=MixedPrecision(init_scale=2.**6))
        assert learn._grab_cbs(MixedPrecision) == [was] and learn.mixed_precision is was  # for that fit alone
    else:
        learn.to_fp16(init_scale=2.**6) if how == 'to_fp16' else learn.to_bf16()
        fit(learn)
        one, = learn._grab_cbs(MixedPrecision)
        assert type(one) is AsyncMixedPrecision and one.amp_mode.value == mode and one is not was
    assert torch.equal(weights(learn), want)

def test_what_a_failed_fit_leaves(regdb, device):
    "The mixed precision of before, nothing entered, no gradient; whichever of the two was at work."
    dls = loaders(regdb)
    kind = dls.device.type
    class Fail(Callback):
        order = 5
        def __init__(self, event): setattr(self, event, self.fail)
        def fail(self): raise KeyboardInterrupt
    for event in ('before_batch', 'after_pred', 'after_loss', 'after_backward'):
        for cbs in ([], [MixedPrecision()]):
            learn = learner(dls, precision='fp32', cbs=AsyncMixedPrecision('bf16', device=kind))
            was = learn.mixed_precision
            with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[*cbs, Fail(event)])
            assert not torch.is_autocast_enabled(kind) and learn._grab_cbs(MixedPrecision) == [was]
            assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

def test_to_fp16_and_back(regdb, device):
    learn = learner(loaders(regdb), precision='fp32')
    learn.to_fp16()
    assert type(learn.mixed_precision) is AsyncMixedPrecision
    learn.to_fp32()
    assert not learn._grab_cbs(MixedPrecision)
    with pytest.raises(ConfigError, match=r'ModelToHalf.*use learn.to_fp16\(\)'): learn.to_non_native_fp16()
    fit(learn, cbs=GradientClip(.1))

# ---------------------------------------------------------------- TensorBoard

class Writer:
    "Stands in for TensorBoard's."
    def __init__(self, log_dir=None): self.log_dir, self.scalars = log_dir, []; Writer.made.append(self)
    made = []
    def add_scalar(self, name, value, step):
        assert isinstance(float(value), float)
        self.scalars.append((name, step))
    def add_graph(self, *args): pytest.fail('no graph was asked for')
    add_images = add_image = add_figure = add_graph
    def close(self): pass

@pytest.fixture
def tensorboard(monkeypatch):
    "fastai's callback on a writer that stands in, where TensorBoard need not be."
    monkeypatch.setitem(sys.modules, 'tensorboard', sys.modules.get('tensorboard') or types.ModuleType('tensorboard'))
    module = types.ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    monkeypatch.delitem(sys.modules, 'fastai.callback.tensorboard', raising=False)
    from tmpa import guard
    guard._scalars.cache_clear()
    Writer.made.clear()
    yield Writer.made
    guard._scalars.cache_clear()
    sys.modules.pop('fastai.callback.tensorboard', None)

def test_tensorboard_callback(regdb, tensorboard, device):
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = learner(loaders(regdb))
    for cb in (TensorBoardCallback(log_dir='there'), TensorBoardCallback, tensorboard_scalars('there')):
        fit(learn, cbs=cb)
    a, b, c = ([n for n,_ in w.scalars] for w in tensorboard)
    assert a == b == c and {'train_loss', 'loss_id', 'loss_mft', 'mAP', 'rank1_v2t', 'lr_0'} <= set(a)
    assert tensorboard[0].log_dir == 'there'

def test_log_tensorboard(regdb, run, tmp_path, tensorboard, device):
    args = 'tmpa_train', '--data', 'regdb', '--path', regdb, *SMALL, '--log', 'tensorboard'
    status, _, err = run(*args, '--out', tmp_path/'r')
    assert status == 0 and tensorboard[0].log_dir == tmp_path/'r'/'tensorboard' and tensorboard[0].scalars, err

def test_without_tensorboard(regdb, run, tmp_path, monkeypatch, device):
    from tmpa import guard
    guard._scalars.cache_clear()
    monkeypatch.setitem(sys.modules, 'fastai.callback.tensorboard', None)
    with pytest.raises(ConfigError, match='pip install tensorboard'): tensorboard_scalars()
    args = 'tmpa_train', '--data', 'regdb', '--path', regdb, *SMALL, '--log', 'tensorboard'
    one_line(run(*args, '--out', tmp_path/'r'), '--log tensorboard', 'pip install tensorboard')

# ---------------------------------------------------------------- what is of classifiers

def test_what_is_of_classifiers_names_ours(regdb, device):
    dls = loaders(regdb)
    learn = learner(dls)
    def refused(f, *words):
        with pytest.raises(ConfigError) as e: f()
        assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value
    refused(lambda: fit(learn, cbs=MixUp()), 'MixUp', 'SlotMixup()')
    refused(lambda: fit(learn, cbs=[CutMix]), 'CutMix', 'SlotCutMix()')
    refused(lambda: learner(dls, cbs=MixUp(.2)), 'SlotMixup()')
    for loss in (CrossEntropyLossFlat(), LabelSmoothingCrossEntropy(), nn.CrossEntropyLoss(), F.cross_entropy):
        refused(lambda: learner(dls, loss_func=loss), 'loss_func=', 'use TMPALoss()')
    learn.loss_func = nn.CrossEntropyLoss()
    refused(lambda: fit(learn), 'loss_func=CrossEntropyLoss')
    learn.loss_func = TMPALoss()
    for metrics in (accuracy, [error_rate], F1Score(), lambda pred, label: 0.):
        refused(lambda: learner(dls, metrics=metrics), 'metrics=', 'mAP and rank1 are columns already')
    learn.metrics = learn.metrics + [lambda pred, label: 0.]
    refused(learn.validate, 'features, label, identity, camera')
    refused(lambda: loaders(regdb, shuffle=False), 'shuffle=False')
    learn = fit(learner(dls))
    for c in (Interpretation, ClassificationInterpretation):
        def worst(): c.from_learner(learn).plot_top_losses(3)
        with learn.no_bar(): refused(worst, 'ReIDInterpretation.from_learner', 'plot_worst_queries')
    refused(lambda: Interpretation(learn, dls.valid, torch.arange(6.)).plot_top_losses(3), 'plot_worst_queries')
    assert ReIDInterpretation.from_learner(learn).plot_worst_queries(2, 2) is not None

def test_what_is_told_works(regdb, device):
    "The remedies of the lines above."
    dls = loaders(regdb)
    fit(learner(dls, mix=SlotMixup()))
    learn = fit(learner(dls, mfe=False, loss_func=TMPALoss(w_wrt=0)))
    assert columns(learn)['loss_id'] > 0
    def spread(feats, label, pid, cam): return feats.std()
    learn = fit(learner(dls, metrics=[spread, *LossMetrics('loss_id')]))
    assert columns(learn)['spread'] > 0 and 'mAP' in columns(learn)

@pytest.mark.parametrize('kw', [{}, dict(mft=False), dict(mfe=False)])
@pytest.mark.parametrize('mix', [None, PedMix(6)])
def test_one_image_of_one_person(regdb, kw, mix, device):
    learn = learner(loaders(regdb, P=1, K=1), mix, precision='fp32', **kw)
    if kw.get('mfe') is False: assert torch.isfinite(weights(fit(learn))).all()
    else:
        with pytest.raises(ConfigError, match=r'one slot \(P=1, K=1\).*give a larger P or K'): fit(learn)
    fit(learner(loaders(regdb, P=1, K=2), mix, precision='fp32', **kw))

def test_a_learner_is_a_learner(regdb, tmp_path, device):
    learn = learner(loaders(regdb))
    assert type(learn) is ReIDLearner and type(pickle.loads(pickle.dumps(learn))) is ReIDLearner
    fit(learn)
    with learn.no_bar(): whole = learn.get_preds(1, None, False, False, False)
    assert len(whole) == 2

# ---------------------------------------------------------------- a loss of one's own

class Mine(nn.Module):
    "A loss that names its terms."
    terms = 'loss_mine', 'loss_other'
    factor = 1.
    def forward(self, out, label, *others):
        if isinstance(out, torch.Tensor): return out.new_full((), float('nan'))
        y = label[out['index']]
        mine = F.cross_entropy(out['logits'], y)
        self.loss_mine, self.loss_other = mine.detach(), out['feat'].detach().square().mean()*self.factor
        return mine*self.factor

class More(TMPALoss):
    "TMPA's loss and one term more."
    terms = *TMPALoss.terms, 'loss_more'
    def weighted(self, p, y):
        yield from super().weighted(p, y)
        yield 'loss_more', .1, p['feat'].square().mean()

class Nameless(nn.Module):
    "A loss that does not."
    def forward(self, out, label, *others): return Mine()(out, label)

def test_a_loss_names_its_terms(regdb, device):
    "Columns with the mean over the batches of an epoch, on every network; of TMPA's own those that the network has."
    dls = loaders(regdb)
    class Keep(Callback):
        order = 500
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append(float(self.loss_func.loss_mine))
    for kw in ({}, dict(mfe=False)):
        keep = Keep()
        learn = fit(learner(dls, loss_func=Mine(), precision='fp32', cbs=keep, **kw))
        c = columns(learn)
        assert [k for k in c if k.startswith('loss')] == ['loss_mine', 'loss_other']
        assert abs(c['loss_mine'] - sum(keep.seen)/len(keep.seen)) < 1e-5
    names = lambda **kw: [k for k in columns(fit(learner(dls, **kw))) if k.startswith(('loss', 'mss'))]
    assert names(loss_func=More(), mfe=False) == ['loss_id', 'loss_wrt', 'loss_more']
    assert names(loss_func=More()) == [*TMPALoss.terms, 'loss_more']
    assert names(loss_func=Nameless()) == []
    net = TMPANet(dls.c, micro_resnet, False, mfe=False, mft=False)
    learn = fit(reid_learner(dls, net, Mine(), ['loss_other']))
    assert [k for k in columns(learn) if k.startswith('loss')] == ['loss_other']

def test_a_term_of_ones_own_that_runs_away_is_named(regdb, device):
    learn = learner(loaders(regdb), loss_func=Mine(), mfe=False)
    learn.loss_func.factor = float('inf')
    with pytest.raises(RunawayError, match='loss_other is inf'): fit(learn)
