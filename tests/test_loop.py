"A step of training asks for nothing on the way: reads are counted on the CPU, and none may be on a pretended GPU."
import sys
from collections import Counter
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import AvgLoss, AvgSmoothLoss
from fastai.torch_core import set_seed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tmpa.callback.loop import (
    AsyncMixedPrecision, CalmProgress, DeviceAvgLoss, DeviceSmoothLoss, StayOnDevice, TorchOptim)
from tmpa.callback.pedmix import PedMix
from tmpa.callback.runaway import RunawayError, StopRunaway, not_finite
from tmpa.data.load import ReIDDataLoaders
from tmpa.dart import dart_learner
from tmpa.learner import sgd, tmpa_learner
from tmpa.models.backbone import micro_resnet

@pytest.fixture(scope='module')
def people(tmp_path_factory): return tmp_path_factory.mktemp('loop')/'people'

def loaders(people):
    return ReIDDataLoaders.from_synthetic(
        people, n_ids=24, per_modality=4, size=(48,24),
        P=3, K=2, num_workers=0, bs_valid=16, device='cpu')

def sgd_of(fused): return partial(sgd.func, opt=partial(sgd.keywords['opt'], fused=fused))

MAKE = {
    'B': lambda dls, **kw: tmpa_learner(dls, micro_resnet, pretrained=False, mfe=False, mft=False, mix=None, **kw),
    'TMPA': lambda dls, **kw: tmpa_learner(dls, micro_resnet, pretrained=False, mix=PedMix(6), **kw),
    'DART': lambda dls, **kw: dart_learner(dls, micro_resnet, pretrained=False, mix=PedMix(6), warmup=1, **kw),
}

# ---------------------------------------------------------------- counted on the CPU

def called_by(name):
    f = sys._getframe()
    while f and f.f_code.co_name != name: f = f.f_back
    return f is not None

class Reads(TorchDispatchMode):
    "Counts the numbers that Python asks for, but for the checks of slots and modality, on a GPU assertions there."
    def __init__(self):
        super().__init__()
        self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = func is torch.ops.aten._local_scalar_dense.default
        self.n += reads and not (called_by('slots') or called_by('check_modality'))
        return func(*args, **(kwargs or {}))

class CountReads(Callback):
    "Reads of each step, from before the first callback to after the last; a batch is made before that."
    order = -999
    def __init__(self): self.steps,self.batches = [],[]
    def before_batch(self):
        self.mode = Reads()
        self.mode.__enter__()
    def end(self):
        self.mode.__exit__(None, None, None)
        counts = self.steps if self.learn.training else self.batches
        counts.append((self.iter, self.mode.n))

class EndCount(Callback):
    order = 9999
    def after_batch(self): self.learn.count_reads.end()

def counted(learn, n=2):
    learn.add_cbs([CountReads(), EndCount()])
    with learn.no_logging(): learn.fit_tmpa(n, lr=.01)
    return learn.count_reads

@pytest.mark.parametrize('name', MAKE)
def test_a_step_reads_at_most_one_number(name, people):
    """That one is the guard's, which on a CPU looks before the backward pass.

    The first step of an epoch may check the batch.
    """
    set_seed(0)
    learn = MAKE[name](loaders(people))
    was = CalmProgress.every
    CalmProgress.every = 1e9  # the text of the bar is read by the clock
    try: count = counted(learn)
    finally: CalmProgress.every = was
    assert len(count.steps) > 6
    assert max(n for i,n in count.steps if i) <= 1
    assert {n for i,n in count.batches if i} <= {0}

def test_reads_are_counted(people):
    "The test above would fail with fastai's own parts."
    learn = MAKE['B'](loaders(people))
    learn.remove_cbs([StayOnDevice, StopRunaway])
    count = counted(learn, 1)
    assert type(learn.progress) is ProgressCallback and min(n for _,n in count.steps) >= 1

# ---------------------------------------------------------------- the same numbers

@pytest.mark.parametrize('name', MAKE)
def test_numbers_are_those_of_fastai(name, people):
    def fit(ours):
        set_seed(0, reproducible=True)
        learn = MAKE[name](loaders(people))
        if not ours: learn.remove_cbs([StayOnDevice, StopRunaway])
        with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, lr=.01)
        return learn
    a,b = fit(True),fit(False)
    assert type(a.recorder.smooth_loss) is not AvgSmoothLoss
    assert type(b.recorder.smooth_loss) is AvgSmoothLoss
    assert [float(v) for v in a.recorder.losses] == [float(v) for v in b.recorder.losses]
    assert str(a.recorder.values) == str(b.recorder.values)
    theirs = b.model.state_dict()
    for k,v in a.model.state_dict().items(): assert torch.equal(v, theirs[k]), k

def test_fused_learner_trains_alike(people):
    "What a GPU does, on the CPU: fused SGD, and a look one batch later."
    def fit(fused):
        set_seed(0, reproducible=True)
        learn = MAKE['TMPA'](loaders(people), opt_func=sgd_of(fused))
        if fused: learn.stop_runaway.late = True
        with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, lr=.01)
        return learn
    a,b = fit(True),fit(None)
    assert a.opt.fuse() and not b.opt.fuse()
    unfused = b.model.state_dict()
    for k,v in a.model.state_dict().items(): assert torch.allclose(v, unfused[k], atol=1e-4), k

# ---------------------------------------------------------------- a loss that runs away

class Poison(Callback):
    "A term that is no number in one batch."
    order,run_valid = -500,False
    def __init__(self, epoch, batch, value): self.at,self.value = (epoch, batch),value
    def before_batch(self):
        loss = self.learn.loss_func
        if 'weighted' not in vars(loss): self.was = loss.weighted
        if (self.epoch, self.iter) != self.at:
            vars(loss).pop('weighted', None)
            return
        was,poisoned = self.was,loss.terms[1]
        def weighted(p, y):
            for name,weight,value in was(p, y):
                yield name, weight, value*self.value if name == poisoned else value
        loss.weighted = weighted

@pytest.mark.parametrize('name', ['B', 'TMPA'])
@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_the_term_epoch_and_batch_are_named(name, late, value, people):
    set_seed(0)
    learn = MAKE[name](loaders(people), opt_func=sgd_of(late or None))
    learn.stop_runaway.late = late
    with learn.no_bar(), learn.no_logging(), pytest.raises(RunawayError) as e:
        learn.fit_tmpa(3, lr=.01, cbs=Poison(1, 1, value))
    assert e.value.where == dict(epoch=2, batch=2, terms=['loss_wrt'])
    message = str(e.value)
    assert message.startswith(f'loss_wrt is {value} in epoch 2 of 3, batch 2 of') and '\n' not in message
    assert not_finite(learn.model) is None and len(learn.recorder.values) == 1

def test_a_rate_that_is_far_too_high_ends_the_fit(people):
    learn = MAKE['TMPA'](loaders(people))
    with learn.no_bar(), learn.no_logging(), pytest.raises(RunawayError, match='lower lr'):
        learn.fit_tmpa(9, lr=1e25, warmup=0)

# ---------------------------------------------------------------- a device that nobody waits for

def devices_of(o): return {t.device.type for t in tree_leaves(o) if isinstance(t, torch.Tensor)}

class Watch(TorchDispatchMode):
    "Notes reads of a number, and copies from the device that somebody waits for."
    def __init__(self):
        super().__init__()
        self.bad,self.ops = [],Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.ops[str(func)] += 1
        if func is torch.ops.aten._local_scalar_dense.default: self.bad.append(str(func))
        out = func(*args, **kwargs)
        left = 'cuda' in devices_of((args, kwargs)) and 'cpu' in devices_of(out)
        if left and not kwargs.get('non_blocking'): self.bad.append(str(func))
        return out

class FakeLearn:
    "As much of a Learner as a step needs."
    def __init__(self, **kw): self.__dict__.update(kw)

def test_smoothing_and_flags_read_nothing_of_a_device():
    with FakeTensorMode(), Watch() as w:
        rec = FakeLearn(loss=torch.rand((), device='cuda'))
        smooth,mean = DeviceSmoothLoss(),DeviceAvgLoss()
        smooth.reset()
        mean.reset()
        smooth.val = torch.zeros((), device='cuda')
        rec.yb = torch.zeros(4, device='cuda'),
        for _ in range(3):
            for metric in (smooth, mean): metric.accumulate(rec)
            for metric in (smooth, mean): metric.value
        assert smooth.value.is_cuda and mean.value.is_cuda
    assert w.bad == [] and w.ops['aten.lerp.Scalar'] == 3


class NoEvent:
    "torch.cuda.Event, where there is no CUDA."
    def record(self): pass

def fake_batch():
    label = torch.arange(3, device='cuda').repeat_interleave(4)
    images = torch.rand(12, 3, 48, 24, device='cuda')
    modality = torch.randint(0, 2, (12,), device='cuda')
    return images,modality,label,label,label

def on_fake_cuda(tensors):
    def moved(v): return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device='cuda')
    return {k: moved(v) for k,v in tensors.items() if v is not None}

def move_to_fake_cuda(net):
    for m in net.modules():
        for k,v in on_fake_cuda(m._parameters).items(): m._parameters[k] = torch.nn.Parameter(v)
        m._buffers.update(on_fake_cuda(m._buffers))

def steps_on_fake_cuda(learn, batches):
    "The events of a fit, without those that read once an epoch, around some steps."
    # fake weights cannot be moved, nor does autograd run without a driver
    def backward():
        for p in learn.model.parameters(): p.grad = learn.loss_grad.detach()*torch.ones_like(p)
    learn.model.to = lambda *args, **kwargs: learn.model
    learn._backward = backward
    learn.n_iter,learn.epoch,learn.training = 9,0,True
    learn('before_fit')
    learn.model.train()
    learn.recorder.before_epoch()
    for cb in (learn.recorder, learn.loss_terms): cb.before_train()
    with Watch() as w:
        # the first batch of an epoch, 0, may be checked
        for i,b in enumerate(batches, 1): learn.one_batch(i, b)
    return w

@pytest.mark.parametrize('amp', [None, 'fp16', 'bf16'])
@pytest.mark.parametrize('name', MAKE)
def test_a_learner_on_a_device_reads_nothing(name, amp, people, monkeypatch):
    """Whole steps of a Learner with all its callbacks, on a GPU of fake tensors.

    The fused kernel, which fake tensors do not know, is stood in for.
    """
    arrived,fused = [],[]
    def arrive(self, names, host, event, place): arrived.append((names[0], host.device.type, place[1]))
    def fused_sgd(params, *args, found_inf=None, **kw): fused.append(found_inf.device.type)
    monkeypatch.setattr(torch.cuda, 'Event', NoEvent)
    monkeypatch.setattr(StopRunaway, '_arrived', arrive)
    monkeypatch.setattr(torch, '_fused_sgd_', fused_sgd)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *args: True)
    learn = MAKE[name](loaders(people))
    if amp: learn.add_cb(AsyncMixedPrecision(amp))
    if name == 'DART': learn.dart.rows = learn.dart.conf = None
    with FakeTensorMode(allow_non_fake_inputs=True), learn.no_bar(), learn.no_logging():
        learn.dls.device = torch.device('cuda')
        move_to_fake_cuda(learn.model)
        learn.create_opt()
        if name == 'DART':
            monkeypatch.setattr(type(learn.dart), 'before_fit', lambda self: None)
            learn.dart.rows = torch.zeros(9, 12, dtype=torch.long, device='cuda')
            learn.dart.conf = torch.rand(2, 99, device='cuda')
        w = steps_on_fake_cuda(learn, [fake_batch() for _ in range(3)])
        losses = list(learn.recorder.losses)
    assert w.bad == [] and sum(w.ops.values()) > 500
    assert set(fused) == {'cuda'} and len(fused) == 3*len(learn.opt.param_lists)
    assert arrived == [('the loss', 'cpu', 1), ('the loss', 'cpu', 2)]
    assert {v.device.type for v in losses} == {'cuda'} and len(losses) == 3

def test_watch_sees_fastai_read(people):
    "The test above would fail with fastai's own recorder."
    learn = MAKE['B'](loaders(people))
    learn.remove_cbs([StayOnDevice, StopRunaway])
    with FakeTensorMode(allow_non_fake_inputs=True), learn.no_bar(), learn.no_logging():
        learn.dls.device = torch.device('cuda')
        move_to_fake_cuda(learn.model)
        learn.create_opt()
        learn.opt.step = lambda: None
        w = steps_on_fake_cuda(learn, [fake_batch()])
    assert any('_to_copy' in b for b in w.bad)
