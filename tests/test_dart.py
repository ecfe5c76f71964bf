"DART: its parts on random and degenerate input, its learner from one seed to one result, and what it must not touch."
import itertools, math, pickle

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st

from tmpa.callback.pedmix import PedMix
from tmpa.core import CheckpointError, ConfigError, ReIDImage
from tmpa.models.agw import AGWNet
from tmpa.models.net import split_params
from tmpa.dart import DART, TwinNet, dart_learner, measured_rows, sample_losses
from tmpa.data.load import ReIDDataLoaders
from tmpa.learner import tmpa_learner
from tmpa.models.backbone import micro_resnet, tiny_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, load_weights, read_meta, save_weights
from tmpa.robust import PairKind, clean_confidence, group_confidence, noisy_items, pair_division, quadruplet_loss, row_confidence, soft_id_loss

# ---------------------------------------------------------------- confidence

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 20) | st.sampled_from([0., 1., float('nan'), float('inf'), 1e300]), max_size=40))
def test_confidence_is_a_probability(losses):
    c = clean_confidence(losses)
    assert c.shape == (len(losses),) and ((c >= 0) & (c <= 1)).all()
    assert (c[~np.isfinite(losses)] == 0).all() and (c == clean_confidence(losses)).all()

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('losses', [[], [3.], [2.]*50, [0., 1.], [0.]*49 + [1.], [1e-12*i for i in range(9)], [5., 5., 9.], [1., 1. + 1e-16, 1.]])
def test_confidence_degenerate(losses):
    c = clean_confidence(losses)
    assert np.isfinite(c).all()
    if len(set(losses)) < 2: assert (c == 1).all()

def test_confidence_by_group():
    g = np.random.default_rng(0)
    l,m = g.gamma(2, 1, 90),g.integers(0, 2, 90)
    c = group_confidence(torch.tensor(l), torch.tensor(m))
    for o in (0, 1): assert (c[m == o] == clean_confidence(l[m == o])).all()

# ---------------------------------------------------------------- pairs and losses

def rows(seed, n, ids=3):
    g = torch.Generator().manual_seed(seed)
    r = lambda: torch.randint(0, ids, (n,), generator=g)
    return torch.randn(n, 5, generator=g, dtype=torch.float64)*.4, r(), torch.rand(n, generator=g, dtype=torch.float64), r()

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0, 1), st.sampled_from(['label', 'prediction']))
def test_division_by_loop(seed, n, threshold, match):
    _,y,w,p = rows(seed, n)
    kind = pair_division(y, w, p, threshold, match)
    for i,j in itertools.product(range(n), repeat=2):
        ref = y[i] if match == 'label' else p[i]
        want = -1 if i == j or w[i] <= threshold else (0 if w[j] > threshold else 1) if y[i] == y[j] else 3 if w[j] <= threshold and p[j] == ref else 2
        assert kind[i, j] == want

def by_cases(x, y, w, p, seed, threshold, margin):
    "Equations 13 to 16, anchor by anchor."
    n,g = len(y),torch.Generator().manual_seed(seed)
    draw = [torch.rand(n, n, generator=g) for _ in range(2)]
    d,out = [[math.dist(a, b) for b in x.tolist()] for a in x.tolist()],[]
    for i in range(n):
        P,N = [j for j in range(n) if j != i and y[j] == y[i]],[k for k in range(n) if y[k] != y[i]]
        if w[i] <= threshold or not P or not N: continue
        j,k = max(P, key=lambda o: draw[0][i, o]),min(N, key=lambda o: d[i][o])
        fp,fn = w[j] <= threshold,w[k] <= threshold and p[k] == y[i]
        S = [o for o in (P if fp else N) if w[o] > threshold]
        if fp and fn: z = d[i][k] - d[i][j]
        elif not fp and not fn: z = d[i][j] - d[i][k]
        elif not S: continue
        elif fp: z = d[i][max(S, key=lambda o: draw[1][i, o])] - (d[i][j] + d[i][k])/2
        else: z = (d[i][j] + d[i][k])/2 - min(d[i][o] for o in S)
        out.append(max(z + margin, 0))
    return sum(out)/max(len(out), 1)

@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 14), st.integers(1, 4), st.sampled_from([0., .3, .5, 1.]))
def test_quadruplet_by_loop(seed, n, ids, threshold):
    x,y,w,p = rows(seed, n, ids)
    got = quadruplet_loss(x, y, w, p, threshold, .3, generator=torch.Generator().manual_seed(seed))
    assert abs(float(got) - by_cases(x, y, w, p, seed, threshold, .3)) < 1e-9

def test_quadruplet_gradient():
    x,y,w,p = rows(3, 10)
    f = lambda x: quadruplet_loss(x, y, w, p, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(f, x.requires_grad_())

def test_trusting_all_is_a_triplet_loss():
    x,y,*_ = rows(5, 12)
    d = torch.cdist(x, x); g = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    pos = (y == y[:, None]) & ~torch.eye(12, dtype=bool)
    j = g.masked_fill(~pos, -1).argmax(1)
    want = F.relu(d[range(12), j] - d.masked_fill(y == y[:, None], 1e9).amin(1) + .3)[pos.any(1)].mean()
    got = quadruplet_loss(x, y, torch.ones(12), y.flip(0), generator=torch.Generator().manual_seed(0))
    assert abs(got - want) < 1e-9

@pytest.mark.parametrize('scale', [0., 1e-30, 1e30])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_losses_stay_finite(scale, dtype):
    x = (torch.randn(8, 5, generator=torch.Generator().manual_seed(0))*scale).to(dtype).requires_grad_()
    y,w = torch.tensor([0, 0, 1, 1]*2),torch.linspace(0, 1, 8)
    with torch.autocast('cpu', torch.bfloat16): l = quadruplet_loss(x, y, w, y.flip(0)) + soft_id_loss(x, y, w)
    l.backward()
    assert l.dtype == torch.float32 and l.isfinite() and x.grad.isfinite().all()

def test_mixed_rows_take_the_smaller_confidence():
    w,mod = torch.rand(8, generator=torch.Generator().manual_seed(0)),torch.tensor([0, 0, 1, 1]*2)
    c = row_confidence(w, torch.arange(8).repeat(2), mod, torch.arange(16) >= 8)
    partner = [2, 3, 0, 1, 6, 7, 4, 5]
    assert c.tolist() == w.tolist() + [min(w[i], w[j]).item() for i,j in enumerate(partner)]

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, .6))
def test_noise(seed, noise):
    items = [ReIDImage(f'{p}-{m}-{i}', 7*p, m, m) for p in range(4) for m in range(2) for i in range(6)]
    out,wrong = noisy_items(items, noise, seed)
    assert [a.pid != b.pid for a,b in zip(items, out)] == wrong.tolist() and wrong.sum() == 2*math.ceil(noise*24)
    assert {(o.pid, o.modality) for o in out} == {(o.pid, o.modality) for o in items} and [o.path for o in out] == [o.path for o in items]

# ---------------------------------------------------------------- network and files

def twin(n=7, arch=tiny_resnet, **kw): torch.manual_seed(0); return TwinNet(n, arch, False, **kw)

def test_keep_originals_false_has_only_mixed_rows():
    x,mod = torch.randn(4, 3, 48, 24),torch.tensor([0, 1]*2)
    out = twin(keep_originals=False)(x, mod, x)
    assert out['mixed'].all() and len(out['mixed']) == 4 and out['a']['index'].tolist() == [0, 1, 2, 3]

def test_files(tmp_path):
    f,x = tmp_path/'twin.pth',torch.randn(3, 3, 48, 24)
    m = twin(evaluate='a', feature='pool').eval(); save_weights(m, f, note='x')
    again = load_tmpa(f)
    assert type(again).__name__ == 'TwinNet' and again.evaluate == 'a' and not again.training and read_meta(f)['note'] == 'x'
    assert again.base == 'agw' and type(again.a) is AGWNet
    with torch.no_grad(): assert torch.equal(again(x, 0), m(x, 0))
    with pytest.raises(CheckpointError, match='do not fit resnet18 TwinNet'): load_weights(TwinNet(7, 'resnet18', False), f)
    d = torch.load(f, weights_only=True); d['meta']['net'] = 'os'; torch.save(d, f)
    with pytest.raises(CheckpointError, match='holds a os, which is unknown'): load_tmpa(f)

def without_base(f):
    "A file of before 0.7, when twins had one trunk and said nothing of it."
    d = torch.load(f, weights_only=True)
    del d['meta']['base']
    torch.save(d, f)

def test_files_of_before_there_was_a_base(tmp_path):
    f, x = tmp_path/'twin.pth', torch.randn(3, 3, 48, 24)
    m = twin(base='tmpa', attention='se').eval()
    save_weights(m, f)
    without_base(f)
    again = load_tmpa(f)
    assert read_meta(f)['base'] == again.base == again.meta['base'] == 'tmpa' and type(again.b) is TMPANet
    with torch.no_grad(): assert torch.equal(again(x, 0), m(x, 0))
    with pytest.raises(CheckpointError, match='TwinNet of tmpa do not fit tiny_resnet TwinNet of agw') as e:
        load_weights(twin(), f)
    assert '\n' not in str(e.value)

def test_learners_of_before_there_was_a_base():
    m = twin(base='tmpa')
    del m.base
    again = pickle.loads(pickle.dumps(m))
    assert again.base == 'tmpa' and again.meta == twin(base='tmpa').meta

def test_one_weight_file_starts_both_trunks():
    sd = tiny_resnet().state_dict()
    m = TwinNet(7, tiny_resnet, sd)
    stems = [o.mfe.shared.stems for o in (m.a, m.b)]
    for o in stems:
        for s in (o.visible, o.infrared): assert torch.equal(s[0].weight, sd['conv1.weight'])
    assert not torch.equal(m.a.classifier.weight, m.b.classifier.weight)
    assert m.pretrained and [len(g) for g in split_params(m)] == [2*len([*m.a.mfe.parameters(), *m.a.tail.parameters()]), 4]

# ---------------------------------------------------------------- learner

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('dart')

def loaders(folder, **kw): return ReIDDataLoaders.from_synthetic(folder/'data', n_ids=12, per_modality=5, size=(48,24), **dict(P=3, K=2) | kw)

def fit(folder, epochs=2, mix=None, seed=0, cbs=None, dls=None, **kw):
    set_seed(seed, reproducible=True)
    learn = dart_learner(dls or loaders(folder), micro_resnet, pretrained=False, mix=mix, cbs=cbs, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(epochs, lr=.03)
    return learn

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 20), st.booleans(), st.integers(0, 99))
def test_every_image_is_measured(n_vis, n_ir, bs, halves, seed):
    torch.manual_seed(seed)
    modality = torch.tensor([0]*n_vis + [1]*n_ir)[torch.randperm(n_vis + n_ir)]
    rows = measured_rows(modality.tolist(), bs, halves)
    assert set(rows.flatten().tolist()) == set(range(n_vis + n_ir)) and rows.shape[1] <= bs
    per = rows.shape[1]//2
    if halves: assert (modality[rows].sum(1) == per).all() and (len(rows) - 1)*per < max(n_vis, n_ir)
    else: assert rows.flatten()[:n_vis + n_ir].unique().numel() == n_vis + n_ir   # none is read twice before all were

def test_measuring_with_more_of_one_modality(folder, device):
    "Each image is measured, and twins of one trunk are shown the order that they always were."
    dls = loaders(folder, bs_valid=16)
    ds = dls.train.dataset
    ds.items = [o for i,o in enumerate(ds.items) if o.modality == 0 or i % 2]
    assert sample_losses(TwinNet(12, micro_resnet, False).to(dls.device), dls).shape == (2, len(ds.items))
    seen = []
    class Seen(TwinNet):
        def logits(self, images, modality): seen.append(modality); return super().logits(images, modality)
    got = sample_losses(Seen(12, micro_resnet, False, base='tmpa').to(dls.device), dls, seed=4)
    torch.manual_seed(4)
    order = torch.randperm(len(ds.items))
    order = torch.cat([order, order[:-len(order) % 16]])
    assert torch.cat(seen).tolist() == [int(ds.items[i].modality) for i in order] and got.isfinite().all()

@pytest.mark.parametrize('mix', [None, lambda: PedMix(patch=6, seed=1)])
def test_one_seed_one_result(folder, mix, device):
    a,b = (fit(folder, mix=mix and mix()) for _ in range(2))
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(p, q)
    assert torch.equal(a.dart.conf, b.dart.conf) and str(a.recorder.values) == str(b.recorder.values)
    assert np.isfinite(a.recorder.values[-1][0]) and a.loss_func.conf is None
    other = fit(folder, mix=mix and mix(), seed=1)
    weight = lambda learn: learn.model.a.mfe.shared.stems.visible[0].weight
    assert not torch.equal(weight(a), weight(other))

def test_measuring_disturbs_nothing(folder, device):
    "Confidences of one, and a quadruplet loss that is switched off: the same training with and without the measuring pass."
    class Ones(DART):
        def before_batch(self): self.loss_func.conf = None
    runs = []
    for warmup in (0, 99):
        set_seed(0, reproducible=True)
        learn = dart_learner(loaders(folder), micro_resnet, pretrained=False)
        learn.remove_cb(DART); learn.add_cb(Ones(warmup))
        with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, lr=.03)
        runs.append(learn)
    assert runs[0].ones.losses is not None and runs[1].ones.losses is None
    for p,q in zip(*(r.model.state_dict().values() for r in runs)): assert torch.equal(p, q)
    assert str(runs[0].recorder.values) == str(runs[1].recorder.values)

def test_warmup_is_plain(folder, device):
    seen = []
    class Look(Callback):
        def after_loss(self):
            if self.training: seen.append((self.epoch, self.loss_func.conf is None, float(self.loss_func.loss_qdr)))
    fit(folder, epochs=3, warmup=2, cbs=[Look()])
    assert {(e, c) for e,c,_ in seen} == {(0, True), (1, True), (2, False)} and all(math.isnan(q) == c for _,c,q in seen)

def test_rows_with_loader_processes(folder, device):
    dls = loaders(folder, num_workers=1, cache=False, bs_valid=16)
    learn = fit(folder, dls=dls)
    assert learn.dart.losses.isfinite().all() and torch.equal(sample_losses(learn.model, dls, 5), sample_losses(learn.model, loaders(folder, bs_valid=16), 5))

def test_wrong_company(folder, device):
    dls = loaders(folder)
    learn = tmpa_learner(dls, micro_resnet, pretrained=False, mfe=False, mix=None, cbs=[DART()])
    with pytest.raises(ConfigError, match='make the learner with dart_learner'), learn.no_bar(): learn.fit(1)
    class Reorder(Callback):
        order = -50
        def before_batch(self): self.learn.xb,self.learn.yb = (tuple(o.flip(0) for o in b) for b in (self.xb, self.yb))
    with pytest.raises(ConfigError, match='reorders'): fit(folder, cbs=[Reorder()])
    with pytest.raises(ConfigError, match='evaluate'): TwinNet(3, tiny_resnet, False, evaluate='c')

def test_one_trunk_trains_as_well(folder, device):
    learn = fit(folder, mix=PedMix(patch=6, seed=1), model_kw=dict(base='tmpa'))
    assert type(learn.model.a) is TMPANet and learn.dart.losses.isfinite().all()
    assert np.isfinite(learn.recorder.values[-1][0])

def test_pickles(folder, device):
    learn = fit(folder)
    assert pickle.loads(pickle.dumps(learn.dart)).warmup is None and len(pickle.dumps(learn.loss_func)) < 5000
