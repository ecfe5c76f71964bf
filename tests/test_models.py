"Networks: references spelled out row by row, pretrained starts, damaged files, mixed precision."
import argparse, copy, pickle, itertools
from urllib.error import URLError
import numpy as np, pytest, torch, torch.nn.functional as F, torchvision
from functools import partial
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50
from torchvision.models.resnet import Bottleneck, ResNet
from pathlib import Path
from tmpa.core import CheckpointError, ConfigError, ReIDImage
from tmpa.dart import TwinNet
from tmpa.data.load import ReIDDataLoaders, ReIDDataset
from tmpa.extract import extract_features
from tmpa.layers import GeM, avg_pool
from tmpa.losses import TMPALoss
from tmpa.models.agw import AGWNet, NonLocal
from tmpa.models.backbone import Extractor, Tail, make_resnet, micro_resnet, split_resnet, tiny_resnet
from tmpa.models.mft import MFT, complete_feature, cross_attention
from tmpa.models.tmpa import TMPANet, load_tmpa, load_weights, n_flops, n_params, read_meta, save_weights, split_params

small = lambda: ResNet(Bottleneck, [1, 1, 1, 1])
MOD = torch.tensor([0, 0, 1, 1]*2)
VARIANTS = [dict(), dict(eval_complete='own'), dict(eval_complete='miss'), dict(mft=False), dict(mft=False, eval_complete='own'), dict(mft=False, eval_complete='miss'),
            dict(mfe=False, mft=False)]

def net(arch=tiny_resnet, seed=0, **kw):
    torch.manual_seed(seed)
    kw = dict(keep_originals=False) | kw  # the plainest rows; tests that want others say so
    return TMPANet(kw.pop('n', 5), arch, pretrained=False, **kw)

def data(seed=1, size=(64, 32)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, *size, generator=g), torch.randn(8, 3, *size, generator=g)

def warm(m, x, xm=None):
    "Running statistics from a training batch, then every batch norm fixed, the model still in training mode."
    with torch.no_grad(): m.train()(x, MOD, xm)
    for o in m.modules():
        if isinstance(o, nn.modules.batchnorm._BatchNorm): o.eval()
    return m

def close(a, b, eps=1e-5): assert a.shape == b.shape and (a-b).abs().max() <= eps, (a-b).abs().max()

def one_line(e): assert '\n' not in str(e.value) and len(str(e.value)) < 500; return str(e.value)

# ---------------------------------------------------------------- rows

def by_hand(m, sh, vis, ir, missing):
    "F_C of one image from single maps, eq. 9-12 in order; `missing` None, 0 or 1."
    t = m.tail
    if m.mft is not None:
        k = t.layer4[0].conv1(sh) if t.bottleneck else m.mft.k(sh)
        v,gen = m.mft.v(sh),[]
        for b,f in ((m.mft.vis, vis), (m.mft.ir, ir)):
            q = b.q(f)
            Q,K,V = (o.flatten(2).transpose(1, 2) for o in (q, k, v))
            A = ((Q @ K.transpose(1, 2)/K.shape[-1]**.5).softmax(-1) @ V).transpose(1, 2).reshape(q.shape)
            gen.append(b.expand(A + b.conv(q)))
        conv = t.layer4(sh)
    else:
        gen,conv = [],sh
        for f in (vis, ir):
            Q,K = (o.flatten(2).transpose(1, 2) for o in (f, sh))
            gen.append(((Q @ K.transpose(1, 2)/K.shape[-1]**.5).softmax(-1) @ K).transpose(1, 2).reshape(sh.shape))
    rv,ri = gen[0] if missing == 0 else vis, gen[1] if missing == 1 else ir
    join = (lambda a,b: torch.cat([a, b], 1)) if m.mft is not None else torch.add
    return .25*join(gen[0], ri) + .25*join(rv, gen[1]) + conv, gen

def sh_of(m, x): f = m.mfe.shared(x); return f if m.mft is not None else m.tail(f)

@pytest.mark.parametrize('arch', [tiny_resnet, small])
@pytest.mark.parametrize('kw', VARIANTS[:-1])
def test_single_image_by_hand(arch, kw):
    x,_ = data(); m = warm(net(arch, **kw), x)
    with torch.no_grad():
        tr = m(x, MOD); m.eval(); m.feature = 'pool'; ev = m(x, MOD)
        for i in range(len(x)):
            o,own = x[i:i+1], (m.mfe.visible, m.mfe.infrared)[MOD[i]]
            vis,ir = (own(o), own(o)) if m.eval_complete == 'own' else (m.mfe.visible(o), m.mfe.infrared(o))
            fc,gen = by_hand(m, sh_of(m, o), vis, ir, 1-int(MOD[i]) if m.eval_complete == 'miss' else None)
            want = m.pool(fc)[0]
            close(tr['feat'][i], want, 1e-4); close(ev[i], F.normalize(want, dim=0))
        assert tr['slot_index'].tolist() == [0, 1, 4, 5] and tr['ir_index'].tolist() == [2, 3, 6, 7]
        close(tr['f_vis'], avg_pool(m.mfe.visible(x))[[0, 1, 4, 5]], 1e-4); close(tr['f_ir'], avg_pool(m.mfe.infrared(x))[[2, 3, 6, 7]], 1e-4)
        close(tr['logits_vis'], m.classifier_vis(tr['f_vis'])); close(tr['logits_ir'], m.classifier_ir(tr['f_ir']))
        close(tr['logits'], m.classifier(m.neck(tr['feat'])))
    close(tr['f_sh'], avg_pool(sh_of(m, x))[[0, 1, 4, 5, 2, 3, 6, 7]], 1e-4)

@pytest.mark.parametrize('kw', [dict(), dict(mft=False)])
@pytest.mark.parametrize('keep', [False, True])
def test_pair_by_hand(kw, keep):
    x,xm = data(); m = warm(net(complete='pair', keep_originals=keep, **kw), x, xm)
    vis,ir = [0, 1, 4, 5], [2, 3, 6, 7]
    with torch.no_grad():
        out = m(x, MOD, xm)
        assert out['index'].tolist() == (vis+ir)*(1+keep) and out['modality'].tolist() == ([0]*4+[1]*4)*(1+keep)
        for r in range(len(out['feat'])):
            src = x if keep and r < 8 else xm
            i,row = r % 4, out['index'][r]
            fc,gen = by_hand(m, sh_of(m, src[row:row+1]), m.mfe.visible(x[vis[i]:vis[i]+1]), m.mfe.infrared(x[ir[i]:ir[i]+1]), None)
            close(out['feat'][r], m.pool(fc)[0], 1e-4)
            if m.mft is not None:
                close(out['logits_vis_gen'][r], m.classifier_vis(avg_pool(gen[0]))[0], 1e-4)
                close(out['logits_ir_gen'][r], m.classifier_ir(avg_pool(gen[1]))[0], 1e-4)
        close(out['f_vis'], avg_pool(m.mfe.visible(x[vis])), 1e-4); close(out['f_ir'], avg_pool(m.mfe.infrared(x[ir])), 1e-4)
        close(out['f_sh'], avg_pool(sh_of(m, xm[vis+ir])), 1e-4)

def test_generated_features_are_classified_on_their_own_rows():
    x,_ = data(); m = warm(net(), x)
    with torch.no_grad():
        out = m(x, MOD); view = m.single(x, MOD)
        assert out['gen_vis_index'].tolist() == [0, 1, 4, 5] and out['gen_ir_index'].tolist() == [2, 3, 6, 7]
        close(out['logits_vis_gen'], m.classifier_vis(avg_pool(view.gen_vis))[[0, 1, 4, 5]]); close(out['logits_ir_gen'], m.classifier_ir(avg_pool(view.gen_ir))[[2, 3, 6, 7]])

def test_mixed_images_are_a_second_view():
    "Originals give the rows that they give alone; mixed images give F_sh beside the originals' specific features, and MSS its shared feature."
    x,xm = data(); m = warm(net(), x, xm)
    with torch.no_grad():
        org,mix = m(x, MOD),m(x, MOD, xm)
        assert (mix['feat'] - org['feat']).abs().max() > 1e-3
        fc,_ = by_hand(m, sh_of(m, xm[3:4]), m.mfe.visible(x[3:4]), m.mfe.infrared(x[3:4]), None)
        close(mix['feat'][3], m.pool(fc)[0], 1e-4)
        m.keep_originals = True
        both = m(x, MOD, xm)
        close(both['feat'], torch.cat([org['feat'], mix['feat']]), 1e-4); close(both['f_sh'], mix['f_sh'])
        close(both['f_sh'], avg_pool(sh_of(m, xm))[[0, 1, 4, 5, 2, 3, 6, 7]], 1e-4)
        assert both['index'].tolist() == list(range(8))*2 and both['gen_vis_index'].tolist() == [0, 1, 4, 5]*2

def test_row_order_is_free():
    "A shuffled batch gives every image the same outputs, slots paired in order of appearance."
    x,xm = data(); p = torch.tensor([4, 2, 0, 3, 1, 6, 5, 7])   # visible rows 4 0 1 5, infrared rows 2 3 6 7
    m = warm(net(), x, xm)
    with torch.no_grad(): a,b = m(x, MOD, xm), m(x[p], MOD[p], xm[p])
    close(b['feat'], a['feat'][p], 1e-4); close(b['f_sh'][:4], a['f_sh'][[2, 0, 1, 3]], 1e-4)
    assert b['slot_index'].tolist() == [0, 2, 4, 6] and b['ir_index'].tolist() == [1, 3, 5, 7]

def test_single_trunk():
    x,xm = data(); m = warm(net(mfe=False, mft=False), x)
    with torch.no_grad():
        close(m(x, MOD, xm)['feat'], m(xm, MOD)['feat'])
        m.keep_originals = True
        close(m(x, MOD, xm)['feat'], torch.cat([m(x, MOD)['feat'], m(xm, MOD)['feat']]), 1e-4)
        assert len(m(x[:3], torch.zeros(3, dtype=torch.long))['feat']) == 3     # one modality can train one trunk

def test_baseline_lives_inside():
    "With lambda_2 = lambda_3 = 0 TMPA is the baseline with the same weights."
    x,_ = data(); b = warm(net(mfe=False, mft=False), x).eval()
    for kw in (dict(), dict(mft=False)):
        m = net(seed=3, lams=(0., 0.), **kw); m.load_state_dict({**m.state_dict(), **b.state_dict()}); m.eval()
        with torch.no_grad(): close(m(x, MOD), b(x, MOD))

# ---------------------------------------------------------------- evaluation

@pytest.mark.parametrize('arch', [tiny_resnet, small])
@pytest.mark.parametrize('kw', VARIANTS)
@pytest.mark.parametrize('feature', ['bn', 'pool'])
def test_alone_or_in_a_batch(arch, kw, feature):
    x,xm = data(); m = net(arch, feature=feature, **kw)
    with torch.no_grad():
        for _ in range(3): m.train()(x, MOD, xm)
        m.eval(); f = m(x, MOD)
        close(f.norm(dim=1), torch.ones(8))
        for i in range(8): close(m(x[i:i+1], MOD[i:i+1]), f[i:i+1])
        for k in (0, 1): close(m(x[MOD == k], k), f[MOD == k])
        p = torch.randperm(8); close(m(x[p], MOD[p]), f[p])
        close(m(x.to(memory_format=torch.channels_last), MOD), f)

def test_evaluation_computes_what_it_uses():
    "Each extractor once; `own` chooses between them and reads nothing back; in training each sees its own rows; the baseline has none."
    x,_ = data(); m = net(eval_complete='own').eval(); calls = []
    m.mfe.visible.register_forward_hook(lambda *a: calls.append(len(a[2])))
    with torch.no_grad(): m(x, 1); m(x, MOD); assert calls == [8, 8]; m.train()(x, MOD); assert calls == [8, 8, 4]
    assert net(mfe=False, mft=False).mfe.visible is None

def test_training_computes_what_it_uses():
    x,xm = data(); m = net(); calls = {}
    for n,o in (('sh', m.mfe.shared), ('vis', m.mfe.visible), ('ir', m.mfe.infrared), ('tail', m.tail)):
        o.register_forward_hook(lambda mod,i,out,n=n: calls.setdefault(n, []).append(len(out)))
    m.mft.vis.conv.register_forward_hook(lambda mod,i,out: calls.setdefault('conv', []).append(len(out)))
    for kw,want in ((dict(), dict(sh=[8], vis=[8], ir=[8], tail=[8], conv=[8])), (dict(keep_originals=True), dict(sh=[8, 8], vis=[8], ir=[8], tail=[8, 8], conv=[8])),
                    (dict(complete='pair'), dict(sh=[8, 8], vis=[4], ir=[4], tail=[8, 8], conv=[4]))):
        calls.clear(); [setattr(m, k, v) for k,v in kw.items()]; m(x, MOD, xm); assert calls == want, (kw, calls)

BESIDE = {
    'TMPA': lambda: TMPANet(5, tiny_resnet, False),
    'TMPA with bottlenecks': lambda: TMPANet(5, small, False),
    'TMPA miss': lambda: TMPANet(5, tiny_resnet, False, eval_complete='miss'),
    'TMPA pair': lambda: TMPANet(5, tiny_resnet, False, complete='pair'),
    'without MFT': lambda: TMPANet(5, tiny_resnet, False, mft=False),
    'B+CA+PedMix': lambda: TMPANet(5, tiny_resnet, False, mfe=False, mft=False),
    **{k: lambda k=k: TMPANet(5, tiny_resnet, False, mfe=False, mft=False, attention=k) for k in ('se', 'stn', 'cbam')},
    'AGW': lambda: AGWNet(5, tiny_resnet, False),
    'DART': lambda: TwinNet(5, tiny_resnet, False),
    'DART one trunk': lambda: TwinNet(5, tiny_resnet, False, base='tmpa'),
}

@pytest.mark.parametrize('name', BESIDE)
def test_mixed_images_leave_every_running_statistic_alone(name):
    "Beside originals, mixed images are normalised by their own batch; nothing that evaluation uses has seen one."
    torch.manual_seed(0)
    x,xm = data(); a = BESIDE[name](); b,before = copy.deepcopy(a),copy.deepcopy(a.state_dict())
    a(x, MOD, xm); b(x, MOD, 3*xm.flip(0) + 1)
    assert [k for k,v in a.state_dict().items() if not torch.equal(v, b.state_dict()[k])] == []
    means = [k for k in before if k.endswith('running_mean')]
    assert [k for k in means if torch.equal(a.state_dict()[k], before[k])] == []       # the originals do count, everywhere
    assert all(m.momentum == .1 and m.track_running_stats for m in a.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

# ---------------------------------------------------------------- training

@pytest.mark.parametrize('arch', [tiny_resnet, small])
@pytest.mark.parametrize('kw', [dict(), dict(complete='pair'), dict(heads=4), dict(eval_complete='own'), dict(eval_complete='miss'), dict(mft=False), dict(mfe=False, mft=False),
                                dict(keep_originals=True), dict(pool_trainable=True)])
def test_gradients_reach_everything(arch, kw):
    x,xm = data(); m = net(arch, **kw); out = m(x, MOD, xm)
    sum(v.square().sum() if k in ('feat', 'f_sh', 'f_vis', 'f_ir') else v.logsumexp(1).sum() for k,v in out.items() if v.is_floating_point()).backward()
    assert [n for n,p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0] == []

@pytest.mark.parametrize('kw', [dict(), dict(complete='pair'), dict(mft=False), dict(mfe=False, mft=False)])
def test_bf16_autocast(kw):
    x,xm = data(); m = net(**kw)
    with torch.autocast('cpu', torch.bfloat16): out = m(x, MOD, xm)
    assert all(v.dtype == (torch.float32 if v.is_floating_point() else torch.int64) for v in out.values())
    assert all(v.isfinite().all() for v in out.values())
    out['logits'].logsumexp(1).sum().backward()
    m.eval()
    with torch.no_grad():
        f = m(x, MOD)
        with torch.autocast('cpu', torch.bfloat16): h = m(x, MOD)
        assert h.dtype == torch.float32 and (f*h).sum(1).min() > .99
        assert (m.bfloat16()(x.bfloat16(), MOD)*f).sum(1).min() > .98      # a model cast as a whole

def test_bad_batches():
    x,xm = data(); m = net()
    for mod in (torch.zeros(8, dtype=torch.long), torch.tensor([0]*5+[1]*3)):
        with pytest.raises(ConfigError, match='infrared images') as e: m(x, mod)
        one_line(e)
    with pytest.raises(ConfigError, match='8 images but modality has 4'): m(x, MOD[:4])
    with pytest.raises(ConfigError, match='8 images but 4 mixed'): m(x, MOD, xm[:4])

def test_bad_arguments():
    for kw in (dict(mfe=False), dict(complete='x'), dict(eval_complete='x'), dict(feature='x'), dict(n=0), dict(heads=5), dict(pool_p=0), dict(attention=nn.Conv2d),
               dict(arch='resnet1'), dict(arch=lambda: nn.Linear(1, 1)), dict(arch=torchvision.models.alexnet)):
        with pytest.raises(ConfigError) as e: net(**kw)
        one_line(e)

def test_unfreeze_leaves_the_neck_alone():
    "fastai's unfreeze sets requires_grad on everything that the optimiser holds."
    from fastai.optimizer import SGD
    m = net(); opt = SGD(split_params(m), lr=1.); opt.freeze_to(1); assert not m.tail.layer4[0].conv1.weight.requires_grad
    opt.freeze_to(0)
    x,_ = data(); m(x, MOD)['logits'].logsumexp(1).sum().backward(); opt.step()
    assert m.neck.bias.abs().max() == 0 and not m.neck.bias.requires_grad

def test_groups():
    for kw in VARIANTS:
        m = net(**kw); a,b = split_params(m)
        assert len({id(p) for p in a+b}) == len(a)+len(b) == len(list(m.parameters()))
        assert all(not any(p is q for q in b) for p in m.mfe.parameters()) and any(m.classifier.weight is p for p in b)

def test_fastai_tensors_and_pickle():
    from fastai.torch_core import TensorImage, TensorCategory
    x,xm = data(); m = net()
    out = m(TensorImage(x), TensorCategory(MOD), TensorImage(xm))
    assert all(type(v) is torch.Tensor for v in out.values())
    m.eval()
    with torch.no_grad():
        f = m(TensorImage(x), TensorCategory(MOD)); assert type(f) is torch.Tensor
        close(pickle.loads(pickle.dumps(m))(x, MOD), f); close(copy.deepcopy(m)(x, MOD), f)

def test_attention_hook():
    class Half(nn.Module):
        def __init__(self, c): super().__init__(); self.w = nn.Parameter(torch.full((c, 1, 1), .5))
        def forward(self, x): return x*self.w
    x,_ = data(); m = net(mfe=False, mft=False, attention=Half); m(x, MOD)['feat'].sum().backward()
    assert m.attention.w.grad.abs().sum() > 0 and any(p is m.attention.w for p in split_params(m)[1])

@pytest.mark.parametrize('name', ['se', 'stn', 'cbam', 'CBAM'])
def test_attention_by_name(name, tmp_path):
    x,xm = data(); m = net(mfe=False, mft=False, keep_originals=True, attention=name)
    with torch.autocast('cpu', torch.bfloat16): out = m(x, MOD, xm)
    out['feat'].float().sum().backward()
    assert out['feat'].isfinite().all() and len(out['feat']) == 16 and all(p.grad is not None for p in m.attention.parameters())
    assert {id(p) for p in m.attention.parameters()} <= {id(p) for p in split_params(m)[1]}
    save_weights(m.eval(), tmp_path/'m.pth')
    with torch.no_grad(): close(load_tmpa(tmp_path/'m.pth')(x, MOD), m(x, MOD))

@pytest.mark.parametrize('bad', ['eca', 3, 'se '])
def test_unknown_attention(bad):
    with pytest.raises(ConfigError, match="'se', 'stn', 'cbam'") as e: net(mfe=False, mft=False, attention=bad)
    one_line(e)

# ---------------------------------------------------------------- AGW

def agw(arch=tiny_resnet, seed=0, **kw): torch.manual_seed(seed); return AGWNet(5, arch, False, **kw)

@pytest.mark.parametrize('kw', [dict(), dict(keep_originals=False), dict(nonlocal_blocks=False), dict(nonlocal_channels=None)])
def test_agw_trains(kw, tmp_path):
    x,xm = data(); m = agw(**kw); y = torch.arange(2).repeat_interleave(4)
    for mixed in (None, xm):
        out = m(x, MOD, mixed)
        assert out['index'].tolist() == list(range(8))*(1 + (mixed is not None and m.keep_originals)) and torch.equal(out['modality'], MOD[out['index']])
        loss = TMPALoss(alpha=1.); loss(out, y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    with torch.autocast('cpu', torch.bfloat16): out = m(x, MOD, xm)
    assert out['feat'].dtype == out['logits'].dtype == torch.float32 and TMPALoss()(out, y).isfinite()
    with torch.no_grad():
        f = m.eval()(x, MOD)
        for i in range(8): close(m(x[i:i+1], MOD[i:i+1])[0], f[i])
        p = torch.tensor([4, 2, 0, 3, 1, 6, 5, 7]); close(m(x[p], MOD[p]), f[p])
        save_weights(m, tmp_path/'a.pth'); new = load_tmpa(tmp_path/'a.pth')
        close(new(x, MOD), f); assert type(new) is AGWNet and new.meta == m.meta and not new.training

def test_agw_mixed_rows_use_the_stem_of_their_row():
    x,xm = data(); m = warm(agw(keep_originals=False), x, xm)
    with torch.no_grad():
        m.mfe.shared.stems.infrared[0].weight.mul_(-1)
        close(m(x, MOD, xm)['feat'], m(xm, MOD)['feat']); assert (m(xm, MOD)['feat'] - m(xm, 1-MOD)['feat']).abs().max() > 1e-3

def test_agw_mixed_images_leave_statistics_alone():
    x,xm = data(); a,b = agw(),agw()
    with torch.no_grad(): a(x, MOD); b(x, MOD, xm)
    for (k,v),w in zip(a.state_dict().items(), b.state_dict().values()):
        if 'running' in k: close(v, w)

@pytest.mark.parametrize('arch,want', [(tiny_resnet, 2), (resnet18, 2), (resnet34, 2+3), (resnet50, 2+3)])
def test_agw_nonlocal_blocks(arch, want):
    with torch.device('meta'): m = AGWNet(3, arch, False)
    assert sum(isinstance(o, NonLocal) for o in m.modules()) == want and n_flops(m, (64, 32)) > 0

class Published:
    """AGW's network written out once more, from its weights alone, in float64.

    A ResNet-50 whose last stage keeps the size, a stem for each modality, and behind the last two blocks of stage 2
    and the last three of stage 3 a non-local block with every product of two positions; means of cubes, to which
    `floor` is added before the cube root; batch norm. In training batch norm goes by the batch."""
    blocks = {1: 3, 2: 4, 3: 6, 4: 3}
    strides = {1: 1, 2: 2, 3: 2, 4: 1}
    nonlocals = {1: 0, 2: 2, 3: 3, 4: 0}  # behind so many of the last blocks

    def __init__(self, weights, training=False, clamp=0., floor=1e-12):
        self.w, self.training = {k: v.double() for k,v in weights.items()}, training
        self.clamp, self.floor = clamp, floor

    def conv(self, x, name, stride=1):
        w = self.w[f'{name}.weight']
        return F.conv2d(x, w, self.w.get(f'{name}.bias'), stride, w.shape[-1]//2)

    def norm(self, x, name):
        over = [d for d in range(x.ndim) if d != 1]
        mean, var = x.mean(over), x.var(over, unbiased=False)
        if not self.training: mean, var = self.w[f'{name}.running_mean'], self.w[f'{name}.running_var']
        numbers = mean, var, self.w[f'{name}.weight'], self.w[f'{name}.bias']
        mean, var, a, b = (o.view(1, -1, *[1]*(x.ndim-2)) for o in numbers)
        return a*(x - mean)/(var + 1e-5).sqrt() + b

    def stem(self, x, name):
        return F.max_pool2d(self.norm(self.conv(x, f'{name}.0', 2), f'{name}.1').clamp(min=0), 3, 2, 1)

    def bottleneck(self, x, name, stride):
        y = self.norm(self.conv(x, f'{name}.conv1'), f'{name}.bn1').clamp(min=0)
        y = self.norm(self.conv(y, f'{name}.conv2', stride), f'{name}.bn2').clamp(min=0)
        y = self.norm(self.conv(y, f'{name}.conv3'), f'{name}.bn3')
        if f'{name}.downsample.0.weight' in self.w:
            x = self.norm(self.conv(x, f'{name}.downsample.0', stride), f'{name}.downsample.1')
        return (x + y).clamp(min=0)

    def non_local(self, x, name):
        theta, phi, g = (self.conv(x, f'{name}.{o}').flatten(2) for o in ('theta', 'phi', 'g'))  # (B, 1, N)
        n = x[0, 0].numel()
        y = torch.zeros_like(g)
        for i in range(n):
            for j in range(n): y[:, :, i] += (theta[:, :, i]*phi[:, :, j]).sum(1, keepdim=True)/n*g[:, :, j]
        return x + self.norm(self.conv(y.view(*y.shape[:2], *x.shape[2:]), f'{name}.out.0'), f'{name}.out.1')

    def __call__(self, vis, ir):
        "Pooled and normalised feature of images (B, 3, H, W); in training pooled feature and scores of the identities."
        x = torch.cat([self.stem(o.double(), f'mfe.shared.stems.{m}') for o,m in ((vis, 'visible'), (ir, 'infrared'))])
        for stage,n in self.blocks.items():
            name = 'tail.layer4' if stage == 4 else f'mfe.shared.layers.layer{stage}'
            for k in range(n):
                x = self.bottleneck(x, f'{name}.{k}', self.strides[stage] if k == 0 else 1)
                if k >= n - self.nonlocals[stage]: x = self.non_local(x, f'{name}.nonlocal{k}')
        pooled = ((x.clamp(min=self.clamp)**3).mean((2, 3)) + self.floor)**(1/3)
        feat = self.norm(pooled, 'neck')
        if self.training: return pooled, feat @ self.w['classifier.weight'].T
        return [o/o.norm(dim=1, keepdim=True) for o in (pooled, feat)]

class PublishedPool(nn.Module):
    def forward(self, x): return ((x**3).mean((2, 3)) + 1e-12)**(1/3)

@pytest.fixture(scope='module')
def agw50():
    "AGW on a ResNet-50 in float64, every number of it random, its statistics those of a batch."
    m = agw(resnet50).double()
    g = torch.Generator().manual_seed(0)
    draw = lambda o: torch.rand(o.shape, generator=g, dtype=o.dtype)
    norms = [o for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for o in norms:
            o.weight.copy_(.5 + draw(o.weight))
            o.momentum = 1.
            if o is not m.neck: o.bias.copy_(draw(o.bias) - .5)
        for o in m.mfe.shared.stems.infrared[0].parameters(): o.add_(.05*(draw(o) - .5))
        for o in m.modules():  # their output is cubic in their input, which runs away over five of them
            if isinstance(o, NonLocal): o.out[1].weight.mul_(.1)
        m(data()[0].double(), MOD)
    return m.eval()

@pytest.fixture
def no_casts(monkeypatch): monkeypatch.setattr(torch.Tensor, 'float', lambda self: self)

def both(m, x):
    with torch.no_grad(): return torch.cat([m(x[MOD == 0], 0), m(x[MOD == 1], 1)])

def published(m, x, **kw): return Published(m.state_dict(), **kw)(x[MOD == 0], x[MOD == 1])[m.feature == 'bn']

@pytest.mark.parametrize('feature', ['bn', 'pool'])
def test_agw_differs_from_the_published_network_by_floor_and_casts(agw50, feature):
    m, x = copy.deepcopy(agw50), data(2)[0].double()
    m.feature = feature
    off = (both(m, x) - published(m, x)).abs().max()
    assert 1e-10 < off < 1e-5

@pytest.mark.parametrize('feature', ['bn', 'pool'])
def test_agw_without_casts_differs_by_the_floor(agw50, no_casts, feature):
    m, x = copy.deepcopy(agw50), data(2)[0].double()
    m.feature = feature
    close(both(m, x), published(m, x, clamp=m.pool.eps, floor=0.), 1e-12)
    assert (both(m, x) - published(m, x)).abs().max() > 1e-10
    m.pool = PublishedPool()
    close(both(m, x), published(m, x), 1e-12)

def test_without_non_local_blocks_it_is_another_network(agw50):
    "The comparison sees them."
    m, x = copy.deepcopy(agw50), data(2)[0].double()
    for o in m.modules():
        if isinstance(o, NonLocal): nn.init.zeros_(o.out[1].weight)
    assert (both(m, x) - published(agw50, x)).abs().max() > 1e-3

def test_agw_trains_as_the_published_network(agw50, no_casts):
    m, x = copy.deepcopy(agw50).train(), data(2)[0].double()
    m.pool = PublishedPool()
    pooled, scores = Published(m.state_dict(), training=True)(x[MOD == 0], x[MOD == 1])
    with torch.no_grad(): got = m(x, MOD)
    rows = MOD.argsort(stable=True)
    close(got['feat'][rows], pooled, 1e-11)
    close(got['logits'][rows], scores, 1e-11)

def test_agw_files(tmp_path):
    x,_ = data(); save_weights(agw(), tmp_path/'a.pth')
    with pytest.raises(CheckpointError, match='tiny_resnet AGWNet do not fit tiny_resnet baseline') as e: load_weights(net(mfe=False, mft=False), tmp_path/'a.pth')
    one_line(e)
    save_weights(agw(), tmp_path/'b.pth', net='MyNet')
    with pytest.raises(CheckpointError, match='holds a MyNet') as e: load_tmpa(tmp_path/'b.pth')
    one_line(e)

# ---------------------------------------------------------------- size

@pytest.fixture(scope='module')
def resnet50s():
    with torch.device('meta'): return {n: TMPANet(206, resnet50, False, **kw) for n,kw in dict(baseline=dict(mfe=False, mft=False), without=dict(mft=False), tmpa={}).items()}

def test_parameter_counts(resnet50s):
    with torch.device('meta'): r = resnet50()
    trunk = sum(p.numel() for n,p in r.named_parameters() if not n.startswith('fc'))
    assert n_params(resnet50s['baseline']) == trunk + 2048
    assert n_params(resnet50s['without']) == 3*trunk + 2048
    assert 47.8e6 < n_params(resnet50s['tmpa']) <= 48.3e6
    assert 48.7e6 < n_params(resnet50s['tmpa'], classifiers=True) < 48.9e6

def test_flops(resnet50s):
    assert abs(n_flops(resnet50s['baseline'])/1e9 - 10.3) < .1
    assert abs(n_flops(resnet50s['tmpa'])/1e9 - 23.6) < .2

def test_shapes_of_the_big_one(resnet50s):
    m = resnet50s['tmpa']; x = torch.zeros(2, 3, 288, 144, device='meta')
    assert m.mfe.shared(x).shape == (2, 1024, 18, 9) and m.tail(m.mfe.shared(x)).shape == (2, 2048, 18, 9)
    assert m.eval()(x, 0).shape == (2, 2048)

@pytest.mark.parametrize('arch', [resnet18, resnet34, 'resnet18', partial(tiny_resnet, 16), small, partial(resnet50, replace_stride_with_dilation=[False, False, True])])
def test_archs(arch):
    x,_ = data(); m = net(arch).eval()
    with torch.no_grad(): assert m(x, MOD).shape == (8, m.dim)

# ---------------------------------------------------------------- pretrained

def test_offline(monkeypatch):
    def no_host(*a, **k): raise URLError('Name or service not known')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', no_host)
    for arch in (resnet18, 'resnet18'):
        with pytest.raises(CheckpointError) as e: TMPANet(5, arch)
        s = one_line(e); assert 'checkpoints/resnet18-f37072fd.pth' in s and 'pretrained=False' in s and 'https://' in s
    def bad_hash(*a, **k): raise RuntimeError('invalid hash value (expected "f37072fd", got "00")')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', bad_hash)
    with pytest.raises(CheckpointError, match='invalid hash'): TMPANet(5, resnet18)
    with pytest.raises(ConfigError, match='IMAGENET9'): TMPANet(5, resnet18, weights='IMAGENET9')
    with pytest.raises(ConfigError, match='tiny_resnet takes no weights'): TMPANet(5, tiny_resnet)

def test_damaged_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    f = tmp_path/'checkpoints'/'resnet18-f37072fd.pth'; f.parent.mkdir(); f.write_bytes(b'PK\x03\x04 half a file')
    with pytest.raises(CheckpointError, match='resnet18-f37072fd.pth') as e: make_resnet(resnet18)
    one_line(e)

def test_torchvision_weights_are_used(monkeypatch):
    torch.manual_seed(5); sd,seen = resnet18().state_dict(), []
    def fake(url, *a, **k): seen.append(url); return sd
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fake)
    m = TMPANet(5, resnet18)
    assert len(seen) == 1 and 'resnet18' in seen[0]                      # read once, copied twice
    for e in (m.mfe.shared, m.mfe.visible, m.mfe.infrared): assert torch.equal(e.layer3[1].conv2.weight, sd['layer3.1.conv2.weight'])
    assert torch.equal(m.tail.layer4[1].bn2.weight, sd['layer4.1.bn2.weight']) and m.mft.k is not None

def test_pretrained_start(tmp_path):
    torch.manual_seed(0); sd = small().state_dict(); torch.save(sd, tmp_path/'r.pth')
    for src in (sd, tmp_path/'r.pth', str(tmp_path/'r.pth')):
        m = TMPANet(5, small, src)
        for e in (m.mfe.shared, m.mfe.visible, m.mfe.infrared):
            for k,v in e.state_dict().items(): assert torch.equal(v, sd[k]), k
        for k,v in m.tail.state_dict().items(): assert torch.equal(v, sd[k]), k
        for o in (m.mft.vis.q, m.mft.ir.q, m.mft.v): assert torch.equal(o.weight, sd['layer4.0.conv1.weight'])
        for o in (m.mft.vis, m.mft.ir): assert torch.equal(o.conv[2].weight, sd['layer4.0.conv2.weight'])
        assert m.mft.k is None
    m = TMPANet(5, small, sd, mft=False)
    for t in (m.mfe.visible, m.mfe.infrared): assert torch.equal(t[1].layer4[0].conv2.weight, sd['layer4.0.conv2.weight'])
    ids = [id(p) for p in m.parameters()]; assert len(ids) == len(set(ids))
    with torch.no_grad(): m.mfe.visible[0].conv1.weight.zero_()
    assert m.mfe.shared.conv1.weight.abs().sum() > 0                     # copies, not views
    with pytest.raises(CheckpointError, match='not the weights of resnet18'): TMPANet(5, resnet18, sd)
    with pytest.raises(CheckpointError, match='no such file'): TMPANet(5, small, tmp_path/'none.pth')

def test_stride_one_everywhere():
    for arch in (resnet18, small):
        t = Tail(arch()); assert all(o.stride == (1, 1) for o in t.modules() if isinstance(o, nn.Conv2d)) and t.layer4[0].stride == 1

def test_key_is_computed_once():
    "k_sh is the output of layer 4's first 1x1 convolution, and that convolution runs once."
    x,_ = data(); m = net(small).eval(); n = []
    m.tail.layer4[0].conv1.register_forward_hook(lambda *a: n.append(1))
    with torch.no_grad(): m(x, MOD)
    assert len(n) == 1

# ---------------------------------------------------------------- files

def test_files(tmp_path):
    f,m = tmp_path/'a'/'w.pth', net(heads=2, eval_complete='own', lams=(.3, .2)).eval(); x,_ = data()
    m.feature = 'pool'                                                   # switched after building
    save_weights(m, f, trial=4, data='regdb', out=tmp_path)
    meta = read_meta(f); assert (meta['trial'], meta['data'], meta['arch'], meta['n_classes'], meta['heads'], meta['out']) == (4, 'regdb', 'tiny_resnet', 5, 2, str(tmp_path))
    with torch.no_grad(): assert torch.equal(load_tmpa(f)(x, MOD), m(x, MOD))
    assert load_weights(net(heads=2), f)['trial'] == 4
    raw = f.read_bytes()
    for name,content in (('half', raw[:len(raw)//2]), ('empty', b''), ('text', b'hello'), ('nearly', raw[:-10])):
        g = tmp_path/f'{name}.pth'; g.write_bytes(content)
        for fn in (read_meta, load_tmpa, partial(load_weights, m)):
            with pytest.raises(CheckpointError, match=f'{name}.pth: damaged') as e: fn(g)
            one_line(e)
    torch.save([1, 2], g)
    with pytest.raises(CheckpointError, match='holds a list'): read_meta(g)
    with pytest.raises(CheckpointError, match='no such file'): load_weights(m, tmp_path/'absent.pth')
    with pytest.raises(CheckpointError, match='no such file'): load_weights(m, tmp_path)

def test_bare_and_fastai_files(tmp_path):
    m,f = net(), tmp_path/'m.pth'
    for o in (m.state_dict(), {'model': m.state_dict(), 'opt': {'state': []}}):
        torch.save(o, f); n = net(seed=9); assert load_weights(n, f) == {} and torch.equal(n.classifier.weight, m.classifier.weight)
    with pytest.raises(CheckpointError, match='does not say which model'): load_tmpa(f)

def test_other_models(tmp_path):
    f = tmp_path/'w.pth'; save_weights(net(), f)
    for kw,words in ((dict(arch=resnet18), 'resnet18 TMPA'), (dict(mft=False), 'tiny_resnet without MFT'), (dict(mfe=False, mft=False), 'tiny_resnet baseline'), (dict(arch=small), 'TMPA')):
        m = net(**kw); was = {k: v.clone() for k,v in m.state_dict().items()}
        with pytest.raises(CheckpointError, match=f'tiny_resnet TMPA do not fit.*{words}') as e: load_weights(m, f)
        one_line(e); assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items())      # refused as a whole
    m = net(n=9)
    with pytest.raises(CheckpointError, match='5 identities, the model has 9') as e: load_weights(m, f)
    one_line(e); load_weights(m, f, strict_classes=False); assert m.classifier.weight.shape == (9, 256)


# ---------------------------------------------------------------- modality codes

CODED = {'AGW': lambda: AGWNet(4, micro_resnet, False), 'own': lambda: TMPANet(4, micro_resnet, False, eval_complete='own'), 'TMPA': lambda: TMPANet(4, micro_resnet, False),
         'B': lambda: TMPANet(4, micro_resnet, False, mfe=False, mft=False), 'DART': lambda: TwinNet(4, micro_resnet, False)}

@pytest.mark.parametrize('name', CODED)
def test_codes_of_published_code_are_refused(name, device):
    "1 and 2, and anything else that is not 0 or 1: one line on the CPU, an assertion on a device; whole numbers of the right kind pass."
    net,x = CODED[name]().to(device),torch.randn(4, 3, 32, 16, device=device)
    for train in (True, False):
        net.train(train)
        net(x, torch.tensor([0, 1, 0, 1], device=device))
        if device == 'cuda': continue                                                    # what fails there takes the device with it
        for codes in ([1, 1, 2, 2], [0, 1, 0, -1], [3]*4):
            error = ConfigError if device == 'cpu' else RuntimeError
            with pytest.raises(error, match='0 is visible|modality must be 0|pairs'): net(x, torch.tensor(codes, device=device))
        for code in (2, -1):
            with pytest.raises(ConfigError, match=f'modality={code}: 0 is visible'): net(x, code)

def test_codes_are_refused_at_the_door(device):
    "Of loaders and extraction, before an image is read."
    items = [ReIDImage(Path('nowhere.png'), 1, 1, m) for m in (1, 2)]
    for call in (lambda: extract_features(CODED['B'](), items, (32, 16)), lambda: ReIDDataset(items), lambda: ReIDDataLoaders.from_items(items, None, device=device)):
        with pytest.raises(ConfigError, match='modality'): call()

def test_the_assertion_reads_nothing_back():
    "Evaluation on a device that nobody waits for."
    from test_graph import FakeTensorMode, Watch, move_to_fake_cuda
    for name in CODED:
        net = CODED[name]().eval()
        with FakeTensorMode(), torch.no_grad():
            move_to_fake_cuda(net)
            with Watch() as w: f = net(torch.rand(4, 3, 32, 16, device='cuda'), torch.randint(0, 2, (4,), device='cuda'))
        assert f.device.type == 'cuda' and w.n > 50 and w.bad == []

# ---------------------------------------------------------------- files of other programs

def test_weights_of_another_program(tmp_path):
    "Trained elsewhere in the same network, written as published code writes them; features are those of the source."
    source = net().eval()
    sd, x = source.state_dict(), torch.randn(2, 3, 64, 32)
    parallel = {f'module.{k}': v for k, v in sd.items()}
    files = [sd, parallel, dict(state_dict=sd), dict(net=sd, acc=np.float64(.81), epoch=np.int64(3)),
             dict(net=parallel, args=argparse.Namespace(lr=.1)),
             dict(model=sd, meta=['not ours'], optimizer=dict(state={0: dict(step=torch.ones(()))}, param_groups=[]))]
    with torch.no_grad(): want = source(x, 0)
    for i, content in enumerate(files):
        torch.save(content, tmp_path/f'{i}.pth')
        m = net(seed=1 + i)
        assert load_weights(m, tmp_path/f'{i}.pth') == {}
        with torch.no_grad(): assert torch.equal(m.eval()(x, 0), want)
        with pytest.raises(CheckpointError, match='does not say which model it is'): load_tmpa(tmp_path/f'{i}.pth')
    resnet = tiny_resnet()
    parallel = {f'module.{k}': v for k, v in resnet.state_dict().items()}
    torch.save(dict(state_dict=parallel, best_acc1=np.float32(70.)), tmp_path/'r.pth')
    m = TMPANet(5, tiny_resnet, tmp_path/'r.pth')
    assert torch.equal(m.mfe.shared.conv1.weight, resnet.conv1.weight)

def test_files_that_hold_no_weights_say_what_they_are(tmp_path):
    m, f = net(), tmp_path/'w.pth'
    two = dict(teacher=m.state_dict(), student=m.state_dict())
    for content, words in ((m, 'a whole TMPANet network with its code'), (dict(net=m), r'net \(a whole TMPANet network'),
                           (dict(epoch=3), 'no weights but epoch'), (two, 'teacher, student'),
                           (dict(a=torch.ones(2)), 'another program .*the file has a: build')):
        torch.save(content, f)
        with pytest.raises(CheckpointError, match=words) as e: load_weights(net(), f)
        assert '\n' not in str(e.value) and str(f) in str(e.value)
