"Region maps and masks against slow loops; PedMix against its definition."
import warnings
import pickle
from fractions import Fraction

import pytest, torch
from hypothesis import given, settings, strategies as st

from tmpa.callback.pedmix import PedMix, pedmix, same_partner, slots
from tmpa.core import ConfigError
from tmpa.regions import feather, grid_size, patch_counts, region_map, region_mask

def gen(s=0): return torch.Generator().manual_seed(s)

def slow_map(rows, cols):
    "Region of each patch from the boxes' definition, patch by patch."
    def box(fh, fw):
        h,w = max(1, round(Fraction(fh)*rows)),max(1, round(Fraction(fw)*cols))
        return (rows-h)//2, (cols-w)//2, h, w
    inside = lambda r,c,b: b[0] <= r < b[0]+b[2] and b[1] <= c < b[1]+b[3]
    b1,b2 = box(Fraction(2, 3), Fraction(1, 3)),box(Fraction(5, 6), Fraction(2, 3))
    return torch.tensor([[0 if inside(r, c, b1) else 1 if inside(r, c, b2) else 2 for c in range(cols)] for r in range(rows)])

def slow_counts(mask, size, patch, ratios):
    "Check one mask (1, H, W) patch by patch; returns patches taken in each region."
    ph,pw = patch if isinstance(patch, tuple) else (patch, patch)
    m,got = region_map(size, patch),[0, 0, 0]
    for r in range(m.shape[0]):
        for c in range(m.shape[1]):
            block = mask[0, r*ph:(r+1)*ph, c*pw:(c+1)*pw]
            assert block.all() or not block.any()
            got[int(m[r, c])] += bool(block[0, 0])
    return got

@pytest.mark.parametrize('rows', [1, 2, 3, 4, 5, 6, 8, 9, 15, 18, 21, 24, 36, 72])
@pytest.mark.parametrize('cols', [1, 2, 3, 4, 6, 9, 12, 18, 36])
def test_map_definition(rows, cols):
    m = region_map((rows*4, cols*4), 4)
    assert m.dtype == torch.int64 and torch.equal(m, slow_map(rows, cols))

def test_map_paper():
    m = region_map((288, 144), 12)
    assert m.shape == (24, 12) and m.flatten().bincount().tolist() == [64, 96, 128]
    m = region_map((288, 144), 16)
    assert (m == 0).sum() == 36 and (m < 2).sum() == 90 and m[0].tolist() == [2]*9 and m[1, 1] == 1 and m[15, 6] == 1 and m[16, 1] == 2 and m[1, 7] == 2

def test_map_is_a_copy():
    region_map((96, 48), 8).zero_()
    assert region_map((96, 48), 8).max() == 2

@pytest.mark.parametrize('size,patch', [((144, 72), 16), ((100, 50), 12), ((97, 53), 12), ((96, 48), (5, 4)), ((96, 48), 0), ((96, 48), -4), ((96, 48), 2.5), ((96, 48), (4, 4, 4)), ((96, 48), 'x')])
def test_map_refuses(size, patch):
    with pytest.raises((ConfigError)) as e: region_map(size, patch)
    assert '\n' not in str(e.value)
    if patch == 16: assert '12' in str(e.value) and '144x72' in str(e.value)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3), st.integers(0, 5))
def test_mask_counts(rows, cols, ph, pw, ratios, n):
    size,patch = (rows*ph, cols*pw),(ph, pw)
    m = region_mask(n, size, patch, tuple(ratios), generator=gen())
    assert m.shape == (n, 1, *size) and m.dtype == torch.bool
    ns = slow_map(rows, cols).flatten().bincount(minlength=3).tolist()
    want = [round((a or 0)*k) for a,k in zip(ratios, ns)]
    assert patch_counts(size, patch, tuple(ratios)) == want
    for o in m: assert slow_counts(o, size, patch, ratios) == want

def test_mask_paper_counts():
    for p,ns in ((12, (42, 67, 96)), (24, (10, 17, 24)), (16, (23, 38, 54))):
        for o in region_mask(4, (288, 144), p, (.65, .70, .75), generator=gen()): assert slow_counts(o, (288, 144), p, None) == list(ns)

def test_mask_uniform_and_independent():
    n,rows,cols = 20000,12,6
    m,reg = region_mask(n, (rows, cols), 1, (.5, .25, .75), generator=gen(3)).view(n, -1).double(),region_map((rows, cols), 1).flatten()
    p = torch.tensor([k/(reg == r).sum() for r,k in enumerate(patch_counts((rows, cols), 1, (.5, .25, .75)))])[reg]
    z = (m.mean(0) - p)/(p*(1-p)/n).sqrt()
    assert z.abs().max() < 4.5                        # 72 patches, each as often as its region's ratio says
    a,b = m[0::2] - p,m[1::2] - p                     # neighbouring images
    assert ((a*b).mean(0)/(p*(1-p))).abs().max() < 4.5/(n/2)**.5
    c = torch.corrcoef(m.T)
    for r in range(3):                                # drawn without replacement: correlation -1/(n-1) within a region, none across
        i = (reg == r).nonzero().flatten(); k = len(i)
        off = c[i][:, i][~torch.eye(k, dtype=torch.bool)]
        assert abs(off.mean() + 1/(k-1)) < .002 and abs(c[i][:, reg != r].mean()) < .002

def test_mask_reproducible():
    a,b = region_mask(8, (96, 48), 8, generator=gen(1)),region_mask(8, (96, 48), 8, generator=gen(1))
    assert torch.equal(a, b) and not torch.equal(a, region_mask(8, (96, 48), 8, generator=gen(2)))
    g = gen(1); region_mask(8, (96, 48), 8, generator=g)
    assert not torch.equal(a, region_mask(8, (96, 48), 8, generator=g))
    torch.manual_seed(5); a = region_mask(2, (96, 48), 8); torch.manual_seed(5)
    assert torch.equal(a, region_mask(2, (96, 48), 8))

@pytest.mark.parametrize('ratios', [(.5, .5), (.5, -.1, .2), (1.01, 0, 0), (float('nan'), 0, 0)])
def test_mask_refuses(ratios):
    with pytest.raises(ConfigError): region_mask(1, (96, 48), 8, ratios)

def test_feather():
    m = region_mask(3, (48, 24), 4, generator=gen())
    f = feather(m, 2.)
    assert f.shape == m.shape and 0 <= f.min() and f.max() <= 1 and f.diff(dim=-1).abs().max() < .25
    assert torch.allclose(feather(m, 1e-3), m.float()) and torch.allclose(feather(torch.ones(1, 1, 8, 4), 50.), torch.ones(1, 1, 8, 4))
    assert torch.allclose(feather(m.flip(3), 2.), f.flip(3), atol=1e-6)

def batch(P=3, K=2, size=(24, 12), seed=0):
    torch.manual_seed(seed)
    return torch.randn(2*P*K, 3, *size),torch.tensor([0]*K+[1]*K).repeat(P),torch.arange(P).repeat_interleave(2*K)

def slow_pedmix(x, mod, mask):
    out,vis,ir = x.clone(),[i for i,m in enumerate(mod) if m == 0],[i for i,m in enumerate(mod) if m == 1]
    for k,(v,i) in enumerate(zip(vis, ir)):
        for r in range(x.shape[2]):
            for c in range(x.shape[3]):
                if mask[k, 0, r, c]: out[v, :, r, c],out[i, :, r, c] = x[i, :, r, c],x[v, :, r, c]
    return out

@pytest.mark.parametrize('shuffle', [False, True])
def test_pedmix_loop(shuffle):
    x,mod,y = batch()
    if shuffle: o = torch.randperm(len(x), generator=gen()); x,mod = x[o],mod[o]
    mask = region_mask(len(x)//2, (24, 12), 2, generator=gen())
    assert torch.equal(pedmix(x, mod, mask), slow_pedmix(x, mod.tolist(), mask))

def test_pedmix_keeps_type_and_input():
    from fastai.vision.core import TensorImage
    x,mod,y = batch(); keep = x.clone()
    out = PedMix(patch=2).mix(TensorImage(x), mod, y)
    assert isinstance(out, TensorImage) and torch.equal(x, keep)
    assert PedMix(patch=2, soft=1.).mix(x.half(), mod, y).dtype == torch.float16

def test_independent_masks():
    x,mod,y = batch(); v,i = slots(mod)
    both = PedMix(patch=2, independent=True).mix(x, mod, y)
    assert not torch.allclose(both[v] + both[i], x[v] + x[i])
    assert (((both[v] == x[v]) | (both[v] == x[i])).all() and ((both[i] == x[v]) | (both[i] == x[i])).all())

def test_same_partner():
    x,mod,y = batch(4, 3)
    seen = torch.stack([same_partner(y, mod, gen(s)) for s in range(60)])
    me = torch.arange(len(y))
    assert (y[seen] == y).all() and (mod[seen] == mod).all() and (seen != me).all()
    assert all(len(c.unique()) == 2 for c in seen.T)          # both of the others come up
    out = PedMix(patch=2, partner='same').mix(x, mod, y)
    p = (out[:, None] == x[None]).all(2).flatten(2)           # each pixel: which images it may come from
    allowed = (y[:, None] == y) & (mod[:, None] == mod)
    assert (p & allowed[..., None]).any(1).all() and not (p & ~allowed[..., None]).any()
    with pytest.raises(ConfigError): PedMix(patch=2, partner='same').mix(x, mod)

def test_slots_refuse():
    for m in ([0, 0, 0, 1], [0, 1, 1], [0, 0], [1, 1]):
        with pytest.raises(ConfigError): slots(torch.tensor(m))
    with pytest.raises(ConfigError): slots(torch.tensor([0, 0, 1, 1]), torch.tensor([3, 4, 4, 3]))
    v,i = slots(torch.tensor([1, 0, 0, 1]), torch.tensor([3, 3, 4, 4]))
    assert (v.tolist(), i.tolist()) == ([1, 2], [0, 3])

def test_callback_options():
    for kw in (dict(partner='x'), dict(p=1.1), dict(soft=-1), dict(ratios=(.1, .2)), dict(regions=(True,))):
        with pytest.raises(ConfigError): PedMix(**kw)
    assert PedMix(ratios=.4, regions=(True, False, True)).active_ratios == (.4, 0, .4)
    assert pickle.loads(pickle.dumps(PedMix(seed=3))).seed == 3
    from fastai.callback.fp16 import MixedPrecision
    assert PedMix.order < MixedPrecision.order and not PedMix.run_valid


def test_shares_that_whole_patches_give():
    "By counting in masks; a region without a patch has no share."
    from tmpa.regions import realised_shares
    for size, patch, ratios in (((288, 144), 12, (.65, .7, .75)), ((96, 48), 16, (.85, .9, .95)), ((96, 48), 24, (.65, .7, .75)), ((48, 24), 12, (.65, .7, .75)), ((96, 48), 16, (0, None, .1))):
        masks, regions = region_mask(20, size, patch, ratios)[:, 0], region_map(size, patch).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        want = [masks[:, regions == r].float().mean().item() if (regions == r).any() else None for r in range(3)]
        assert realised_shares(size, patch, ratios) == pytest.approx(want)
    assert [realised_shares((96, 48), 16, a)[0] for a in (.65, .75, .85)] == [.75]*3


def test_pedmix_says_what_it_exchanges_and_what_it_cannot():
    from tmpa.callback.pedmix import PedMix
    with pytest.warns(UserWarning, match='48x24 with patch 12 the sub-centre gets no patch, its ratio 0.7 does nothing') as w: PedMix(12).check((48, 24))
    assert len(w) == 1
    with pytest.warns(UserWarning, match='the centre has so few patches that none is exchanged'): PedMix(16, ratios=(.1, .7, .75)).check((96, 48))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        PedMix(12, regions=(True, False, True)).check((48, 24))
        (mix := PedMix(16)).check((96, 48))
    assert repr(mix) == 'PedMix(patch=16, ratios=(0.65, 0.7, 0.75)); exchanged at 96x48: centre 0.75, sub-centre 0.67, outer region 0.75'


def test_figure_4_names_the_shares(tmp_path):
    from tmpa.paper import TABLES
    from tmpa.setup import make_setup
    from tmpa.table_files import table_markdown
    from tmpa.tables import fill_rows, filled_table
    small, fine, paper = make_setup('small'), make_setup('small', patch=4), make_setup('paper', 'regdb', 'x')
    rows = lambda setup: [r[0] for r in filled_table(TABLES['fig4'], fill_rows(TABLES['fig4'], [], setup, 't2v'))[1:]]
    assert rows(small)[2:] == ['A_C = 0.65 (0.75, 0.67, 0.75)', 'A_C = 0.75 (0.75, 0.83, 0.88)', 'A_C = 0.85 (0.75, 0.83, 1.00)']
    assert rows(fine) == rows(paper) and len({r.partition('(')[2] for r in rows(fine)}) == 5   # the paper's grid
    assert fine.key != small.key and make_setup('small', patch=16) == small and '--patch 4' in fine.args
    text = table_markdown('fig4', TABLES['fig4'], fill_rows(TABLES['fig4'], [], fine, 't2v'), fine, 't2v')
    assert 'patch 4 for 12' in text and 'whole patches give' in text
