"Weights under the names of AGW's published code: a network of those names, written out once more, has the same features."
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from torchvision.models.resnet import Bottleneck, ResNet
from tmpa.core import CheckpointError, TMPAError
from tmpa.dart import TwinNet
from tmpa.layers import GeM
from tmpa.models.agw import AGWNet, NonLocal
from tmpa.models.net import set_switches
from tmpa.published import load_published
from tmpa.weights import open_weights

def narrow(): return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=4)

class Block(nn.Module):
    "A non-local block with every product of two positions."
    def __init__(self, c):
        super().__init__()
        self.g, self.theta, self.phi = nn.Sequential(nn.Conv2d(c, 1, 1)), nn.Conv2d(c, 1, 1), nn.Conv2d(c, 1, 1)
        self.W = nn.Sequential(nn.Conv2d(1, c, 1), nn.BatchNorm2d(c))

    def forward(self, x):
        g, theta, phi = (o(x).flatten(2) for o in (self.g, self.theta, self.phi))  # (B, 1, N)
        n = g.shape[2]
        y = torch.stack([sum(theta[:, 0, i]*phi[:, 0, j]/n*g[:, 0, j] for j in range(n)) for i in range(n)], 1)
        return x + self.W(y.view(len(x), 1, *x.shape[2:]))

def named(name): return nn.ModuleDict({name: narrow()})

class Published(nn.Module):
    "What a published file holds, and what the published code computes from it."
    def __init__(self, blocks=True, n_classes=7):
        super().__init__()
        self.visible_module, self.thermal_module = named('visible'), named('thermal')
        self.base_resnet = named('base')
        for o in (self.visible_module['visible'], self.thermal_module['thermal'], self.base_resnet['base']): del o.fc
        if blocks: self.NL_2 = nn.ModuleList([Block(512) for _ in range(2)])
        if blocks: self.NL_3 = nn.ModuleList([Block(1024) for _ in range(3)])
        self.bottleneck, self.classifier = nn.BatchNorm1d(2048), nn.Linear(2048, n_classes, bias=False)
        first = self.base_resnet['base'].layer4[0]
        first.conv2.stride = first.downsample[0].stride = (1, 1)
        self.p, self.blocks = (3. if blocks else 1.), blocks

    def forward(self, x, modality):
        stem = self.thermal_module['thermal'] if modality else self.visible_module['visible']
        x = stem.maxpool(stem.relu(stem.bn1(stem.conv1(x))))
        base = self.base_resnet['base']
        for k, layer in enumerate((base.layer1, base.layer2, base.layer3, base.layer4), 1):
            behind = getattr(self, f'NL_{k}', [])
            for i, block in enumerate(layer):
                x = block(x)
                at = i - (len(layer) - len(behind))
                if at >= 0: x = behind[at](x)
        pooled = ((x**self.p).mean((2, 3)) + 1e-12)**(1/self.p)
        return dict(pool=F.normalize(pooled), bn=F.normalize(self.bottleneck(pooled)))

X = torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(0))

def build(seed=0, **kw):
    "Random weights with the statistics of some images; some channels are silent in all of them."
    torch.manual_seed(seed)
    net = Published(**kw)
    for o in net.modules():
        if not isinstance(o, (nn.BatchNorm2d, nn.BatchNorm1d)): continue
        o.momentum = 1.
        nn.init.uniform_(o.weight, .5, 1.5)
        if o is not net.bottleneck: nn.init.uniform_(o.bias, -.5, .5)
    for o in net.modules():
        if isinstance(o, Block): o.W[1].weight.data.mul_(.02)
    net.base_resnet['base'].layer4[2].bn3.bias.data[:200] -= 4
    with torch.no_grad():
        for m in (1, 0): net.train()(X, m)
        net.bottleneck.running_var.clamp_(min=1e-3)  # below, rounding alone moves features by 1e-5
    return net.eval()

def written(net, file, **more):
    torch.save(dict(net=net.state_dict(), mAP=.47, epoch=3, **more), file)
    return file

def agrees(ours, *published):
    for feature in ('pool', 'bn'):
        set_switches(ours, feature=feature)
        for m in (0, 1):
            with torch.no_grad():
                want = F.normalize(sum(o(X, m)[feature] for o in published))
                assert (ours(X, m) - want).abs().max() < 1e-5, (feature, m)

@pytest.mark.parametrize('blocks', [True, False])
def test_features_are_those_of_the_published_code(blocks, tmp_path):
    net = build(blocks=blocks)
    ours = load_published(written(net, tmp_path/'agw.t'), arch=narrow)
    assert type(ours) is AGWNet and not ours.training and ours.meta['n_classes'] == 7 and ours.meta['feature'] == 'bn'
    assert sum(isinstance(o, NonLocal) for o in ours.modules()) == 5*blocks
    agrees(ours, net)
    assert ours.pool.p == (3. if blocks else 1.)

def test_floor_and_non_local_blocks_count(tmp_path):
    "The comparison sees them."
    net = build()
    ours = load_published(written(net, tmp_path/'agw.t'), arch=narrow)
    pool = ours.pool
    def off():
        with torch.no_grad(): return (ours(X, 0) - net(X, 0)['bn']).abs().max()
    ours.pool = GeM(3.)
    assert off() > 3e-5
    ours.pool = pool
    assert off() < 1e-5
    for o in ours.modules():
        if isinstance(o, NonLocal): nn.init.zeros_(o.out[1].weight)
    assert off() > 1e-3

def test_two_networks(tmp_path):
    a, b = build(0), build(1)
    b.bottleneck_2 = nn.BatchNorm1d(2048)  # DART's files have it
    a.bottleneck_2 = nn.BatchNorm1d(2048)
    files = [written(o, tmp_path/f'{k}.t', optimizer=dict(state={})) for k, o in zip('ab', (a, b))]
    ours = load_published(*files, arch=narrow)
    assert type(ours) is TwinNet
    agrees(ours, a, b)
    set_switches(ours, evaluate='b')
    agrees(ours, b)
    ours.save_pretrained(tmp_path/'twin', size=(288, 144))
    again = open_weights(tmp_path/'twin', arch=narrow)[0]
    assert again.meta == ours.meta
    with torch.no_grad(): assert torch.equal(again(X, 0), ours(X, 0))

def test_open_weights_knows_them(tmp_path):
    net = build()
    ours, card = open_weights(written(net, tmp_path/'agw.t'), arch=narrow)
    agrees(ours, net)
    assert card['size'] == [288, 144] and card['run'] == dict(origin="AGW's published code", epoch=3, mAP=.47)

def test_what_is_not_recognised(tmp_path):
    net, file = build(), tmp_path/'w.t'
    sd = net.state_dict()
    def refused(sd, *words, **kw):
        torch.save(dict(net=sd), file)
        with pytest.raises(TMPAError) as e: load_published(file, **{'arch': narrow, **kw})
        assert '\n' not in str(e.value) and str(file) in str(e.value)
        for o in words: assert o in str(e.value), str(e.value)
    refused({**sd, 'part1.weight': X, 'NL_4.0.theta.weight': X}, '2 weights', 'part1.weight, NL_4.0.theta.weight')
    refused({k: v for k, v in sd.items() if 'layer3.5.conv2' not in k}, 'is missing')
    refused(sd, 'the model wants', arch='resnet50')
    refused({k: v for k, v in sd.items() if not k.startswith('NL_3.0')}, 'nonlocal3')
    refused({'conv.weight': X}, "not weights of AGW's published code", 'conv.weight')
    torch.save(dict(net={**sd, 'part1.weight': X}), file)
    with pytest.warns(UserWarning, match='part1.weight'): agrees(load_published(file, arch=narrow, strict=False), net)
    other = written(build(n_classes=8), tmp_path/'other.t')
    with pytest.raises(CheckpointError, match='two networks of one run'): load_published(file, other, arch=narrow, strict=False)
    with pytest.raises(TMPAError, match='3 files'): load_published(file, file, file)
