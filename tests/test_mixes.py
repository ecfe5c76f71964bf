"Mixes against slow loops, at any size, patch and precision."
import pickle
from urllib.error import URLError

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from tmpa.callback.mix import (MIXES, AttentiveCutMix, PatchMix, SlotCutMix, SlotMixup, attention_scores, beta_lambdas,
                               box_mask, patch_mask, to_pixels, top_patches)
from tmpa.vis.mixes import show_mixes
from tmpa.callback.pedmix import PedMix, SlotMix, other_partner, slots
from tmpa.core import CheckpointError, ConfigError
from tmpa.models.backbone import tiny_resnet
from tmpa.models.tmpa import TMPANet
from tmpa.recipes import Recipe

def gen(s=0): return torch.Generator().manual_seed(s)

def energy(x): return x.abs()

def batch(P=3, K=2, size=(24, 12), seed=0):
    return torch.randn(2*P*K, 3, *size, generator=gen(seed)),torch.tensor([0]*K+[1]*K).repeat(P),torch.arange(P).repeat_interleave(2*K)

def mixes(patch=2, grid=(4, 3), **kw):
    own = dict(pedmix=dict(patch=patch), patchmix=dict(patch=patch), attentive_cutmix=dict(scorer=energy, grid=grid, top=min(6, grid[0]*grid[1])))
    return [MIXES[k](**own.get(k, {}), **kw) for k in MIXES]

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))

@settings(max_examples=60, deadline=None)
@given(sizes, st.lists(st.floats(0, 1), max_size=5), st.integers(0, 99))
def test_box(size, lam, seed):
    lam = torch.tensor(lam)
    m,(h,w) = box_mask(lam, size, gen(seed)),size
    assert m.shape == (len(lam), 1, h, w) and m.dtype == torch.bool
    for l,o in zip(lam.double(), m[:, 0]):
        rows,cols = o.any(1),o.any(0)
        assert torch.equal(o, rows[:, None] & cols)                                       # a product of two sets ...
        for on,s in ((rows, h), (cols, w)):
            k,side = on.nonzero().flatten(),int(float(1-l)**.5*s)//2*2
            assert len(k) == 0 or int(k[-1]-k[0])+1 == len(k)                             # ... each of them an interval
            if rows.any(): assert side//2 <= len(k) <= side                               # cut off by no more than half
        assert o.sum() <= float(1-l)*h*w + 1e-6*h*w

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.floats(0, 1), st.integers(0, 4))
def test_patches(rows, cols, ph, pw, ratio, n):
    m = patch_mask(n, (rows*ph, cols*pw), (ph, pw), ratio, gen())
    assert m.shape == (n, 1, rows*ph, cols*pw)
    blocks = m.unflatten(2, (rows, ph)).unflatten(4, (cols, pw)).transpose(3, 4)
    assert torch.equal(blocks.all(-1).all(-1), blocks.any(-1).any(-1))                    # whole patches
    assert (m.sum((1, 2, 3)) == round(ratio*rows*cols)*ph*pw).all()

def test_patches_are_uniform():
    n = 20000
    m = patch_mask(n, (12, 6), 1, .25, gen(3)).double().mean(0)
    assert ((m - .25)/(.25*.75/n)**.5).abs().max() < 4.5

def test_box_centres_are_uniform():
    m = box_mask(torch.full((20000,), 1 - 6/72**2), (72, 72), gen(1))                     # boxes of 2 x 2
    per_row = m.any(3)[:, 0].double().mean(0)
    assert (per_row[1:-1]*72/2 - 1).abs().max() < .2

@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_top_patches_and_to_pixels(size, rows, cols, n):
    rows,cols = min(rows, size[0]),min(cols, size[1])
    s = torch.randint(4, (n, rows, cols), generator=gen()).float()                        # many ties
    for top in {0, 1, rows*cols//2, rows*cols}:
        t = top_patches(s, top)
        assert (t.sum((1, 2, 3)) == top).all()
        for a,b in zip(s, t[:, 0]): assert top in (0, rows*cols) or a[b].min() >= a[~b].max()
        m = to_pixels(t, size)
        assert m.shape == (n, 1, *size)
        for y in range(size[0]):
            for x in range(size[1]): assert torch.equal(m[:, 0, y, x], t[:, 0, y*rows//size[0], x*cols//size[1]])

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_nothing_lost_nothing_doubled(P, K, rows, cols, patch, shuffle):
    x,mod,y = batch(P, K, (rows*patch, cols*patch))
    if shuffle: o = torch.randperm(len(x), generator=gen()); x,mod = x[o],mod[o]          # slots are then of any two rows
    v,i = slots(mod)
    for cb in mixes(patch, (min(rows, 3), min(cols, 2)), independent=False):
        out = cb.mix(x, mod)
        assert out.shape == x.shape and torch.allclose(out[v] + out[i], x[v] + x[i], atol=1e-5)
        lo,hi = torch.minimum(x, x[other_partner(mod)]),torch.maximum(x, x[other_partner(mod)])
        assert (out >= lo - 1e-5).all() and (out <= hi + 1e-5).all()

@pytest.mark.parametrize('kind', MIXES)
def test_independent_partner_and_type(kind):
    from fastai.vision.core import TensorImage
    x,mod,y = batch(4, 3); v,i = slots(mod); keep = x.clone()
    k = list(MIXES).index(kind)
    out = mixes(independent=True)[k].mix(TensorImage(x), mod, y)
    assert isinstance(out, TensorImage) and torch.equal(x, keep)
    assert not torch.allclose(out[v] + out[i], x[v] + x[i])
    same = mixes(partner='same')[k]
    with pytest.raises(ConfigError): same.mix(x, mod)
    out = same.mix(torch.where(mod.bool().view(-1, 1, 1, 1), 1., 0.).expand_as(x).contiguous() + .25*x.sign(), mod, y)
    assert (out[mod == 0] < .5).all() and (out[mod == 1] > .5).all()                      # no trace of the other modality
    for dt in (torch.float16, torch.bfloat16): assert mixes()[k].mix(x.to(dt), mod, y).dtype == dt

@pytest.mark.parametrize('kind', MIXES)
def test_seed_and_options(kind):
    x,mod,y = batch(); k = list(MIXES).index(kind)
    a,b = (mixes(seed=3)[k] for _ in range(2)); a.rng,b.rng = gen(3),gen(3)
    assert torch.equal(a.mix(x, mod), b.mix(x, mod))
    torch.manual_seed(1); one = mixes()[k].mix(x, mod); torch.manual_seed(1)
    assert torch.equal(one, mixes()[k].mix(x, mod))
    for kw in (dict(p=-.1), dict(p=float('nan')), dict(partner='x')):
        with pytest.raises(ConfigError) as e: mixes(**kw)
        assert '\n' not in str(e.value)
    assert pickle.loads(pickle.dumps(mixes(seed=3)[k])).seed == 3 and issubclass(MIXES[kind], SlotMix)

def test_degenerate_batches():
    none = torch.zeros(0, 3, 24, 12),torch.zeros(0, dtype=torch.long)
    for cb in mixes():
        assert cb.mix(*none).shape == none[0].shape
        for m in ([0, 0, 0, 1], [0, 1, 1], [0]):
            with pytest.raises(ConfigError): cb.mix(torch.zeros(len(m), 3, 24, 12), torch.tensor(m))
        with pytest.raises(ConfigError): cb.mix(torch.zeros(2, 3, 24, 12), torch.tensor([0, 1]), torch.tensor([1, 2]))
        flat = torch.zeros(4, 3, 24, 12)                                                  # no contrast, no attention
        assert torch.equal(cb.mix(flat, torch.tensor([0, 1, 0, 1])), flat)

@pytest.mark.parametrize('kw', [dict(alpha=0), dict(alpha=-1), dict(alpha=float('inf')), dict(alpha=float('nan'))])
def test_alpha(kw):
    for cls in (SlotMixup, SlotCutMix):
        with pytest.raises(ConfigError): cls(**kw)

def test_tiny_and_huge_alpha():
    for a in (1e-6, 1e-2, 1e4):
        l = beta_lambdas(500, a, gen())
        assert l.isfinite().all() and 0 <= l.min() and l.max() <= 1
    assert (l - .5).abs().max() < .05

def test_scorer_sees_and_leaves_the_network():
    x,mod,y = batch(size=(64, 32))
    torch.manual_seed(0)
    net = TMPANet(3, tiny_resnet, pretrained=False, mfe=False, mft=False).train(); net.mfe.shared.bn1.eval()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    modes = [o.training for o in net.modules()]
    cb = AttentiveCutMix(); cb.learn = type('L', (), dict(model=net))()
    mixed = cb.mix(x, mod, y)
    assert [o.training for o in net.modules()] == modes and not mixed.requires_grad
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    s = attention_scores(net.mfe.shared, x, (7, 7))
    with torch.autocast('cpu', torch.bfloat16):
        low = attention_scores(net.mfe.shared, x, (7, 7))
        assert low.dtype == torch.float32 and (low - s).abs().max() < .1*s.abs().max()
        out = net(x, mod, cb.mix(x, mod, y))
    assert all(o.isfinite().all() for o in out.values() if o.is_floating_point())

def test_a_failing_scorer_gets_its_mode_back():
    class Bad(nn.Module):
        def forward(self, x): raise RuntimeError('no')
    bad = Bad().train()
    with pytest.raises(RuntimeError): attention_scores(bad, torch.zeros(1, 3, 4, 4), (2, 2))
    assert bad.training

def test_imagenet_offline(monkeypatch):
    def no_host(*a, **k): raise URLError('Name or service not known')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', no_host)
    x,mod,y = batch()
    with pytest.raises(CheckpointError) as e: AttentiveCutMix(scorer='imagenet').mix(x, mod, y)
    assert 'resnet50' in str(e.value) and 'another scorer' in str(e.value) and 'pretrained=' not in str(e.value) and '\n' not in str(e.value)

def test_imagenet_scorer_is_built_once_and_dropped(monkeypatch):
    import tmpa.callback.mix as m
    built = []
    monkeypatch.setattr(m, 'make_resnet', lambda name: built.append(name) or tiny_resnet())
    x,mod,y = batch(size=(64, 32)); cb = AttentiveCutMix(scorer='imagenet')
    for _ in range(2): cb.mix(x, mod, y)
    assert built == ['resnet50'] and cb.scores(x).shape == (len(x), 7, 7)
    cb.after_fit()
    assert cb._imagenet is None

def test_registry():
    mix = lambda **kw: Recipe('r', mix=kw)
    assert isinstance(mix().make_mix(), PedMix) and mix(kind='patchmix', patch=4, ratio=.3).make_mix().ratio == .3
    for kind in ('Mixup', None, 3):
        with pytest.raises(ConfigError, match='choose one of pedmix, mixup'): mix(kind=kind).check()
    with pytest.raises(ConfigError, match="has no argument ratios"): mix(kind='cutmix', ratios=.4).check()
    with pytest.raises(ConfigError): AttentiveCutMix(grid=(7, 0))
    with pytest.raises(ConfigError): AttentiveCutMix(grid=(7, 7, 7))

def test_sheet():
    x,mod,y = batch(size=(48, 24))
    fig = show_mixes(x.sigmoid(), mod, y, patch=4, scorer=energy, n=2)
    assert len(fig.axes) == 14 and [a.get_title()[:3] for a in fig.axes[:7]] == [f'({c})' for c in 'abcdefg']
    assert len(show_mixes(x.sigmoid(), mod, mixes={'PedMix': PedMix(4)}, n=99).axes) == 3*6
