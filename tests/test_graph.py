"One graph: nothing inside a step reads the device or copies to it, Dynamo takes it whole, and it exports; weights of 0.4.0 give the features that they gave."
import copy, logging
from pathlib import Path
from functools import partial
import pytest, torch, fastai.vision.all  # fastai patches Tensor.as_subclass, which no compiler can follow
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import Bottleneck, ResNet
from tmpa.callback.mix import PatchMix
from tmpa.callback.pedmix import PedMix
from fastai.vision.all import load_learner, set_seed
from tmpa.dart import DARTLoss, TwinNet
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.transforms import ReIDAug
from tmpa.learner import tmpa_learner
from tmpa.losses import TMPALoss
from tmpa.models.agw import AGWNet
from tmpa.models.backbone import micro_resnet, tiny_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, set_switches
from tmpa.search import fingerprint

SMALL = lambda: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=16)
NETS = {
    'TMPA': lambda: TMPANet(5, micro_resnet, False),
    'TMPA pair': lambda: TMPANet(5, micro_resnet, False, complete='pair'),
    'without MFT': lambda: TMPANet(5, micro_resnet, False, mft=False),
    'B+CA+PedMix': lambda: TMPANet(5, micro_resnet, False, mfe=False, mft=False),
    'STN': lambda: TMPANet(5, micro_resnet, False, mfe=False, mft=False, attention='stn'),
    'AGW': lambda: AGWNet(5, micro_resnet, False),
    'DART': lambda: TwinNet(5, micro_resnet, False),
}
MOD = torch.tensor([0, 0, 1, 1]*4)
LABEL = torch.arange(4).repeat_interleave(4)

def build(name, seed=0):
    torch.manual_seed(seed)
    return NETS[name]().train()

def loss_of(name):
    if name != 'DART': return TMPALoss(margin=5.)  # so that the hinge of MSS is active
    loss = DARTLoss()
    loss.conf = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    return loss

def batch(n=16): g = torch.Generator().manual_seed(1); return torch.randn(n, 3, 48, 24, generator=g), torch.randn(n, 3, 48, 24, generator=g)

# ---------------------------------------------------------------- a device that nobody waits for

class Watch(TorchDispatchMode):
    "Notes operations that read a value back, or have tensors of another device than CUDA."
    def __init__(self): super().__init__(); self.bad,self.n = [],0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n += 1
        devices = {o.device.type for o in tree_leaves((args, kwargs, out)) if isinstance(o, torch.Tensor)}
        if devices - {'cuda'} or func is torch.ops.aten._local_scalar_dense.default: self.bad.append((str(func), sorted(devices)))
        return out

def on_fake_cuda(tensors): return {k: torch.empty(v.shape, dtype=v.dtype, device='cuda') for k,v in tensors.items()}

def move_to_fake_cuda(m):
    for o in m.modules():
        there = {k: v for k,v in o._parameters.items() if v is not None}
        for k,v in on_fake_cuda(there).items(): o._parameters[k] = torch.nn.Parameter(v)
        o._buffers.update(on_fake_cuda({k: v for k,v in o._buffers.items() if v is not None}))

def step(name, m, loss, images, modality, label, mix):
    images = ReIDAug(erase=.5).encodes((images, modality, label, label, label))[0]
    return loss(m(images, modality, mix.mix(images, modality, label)), label)

@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('mix', [PedMix(8), PatchMix(8, independent=True)], ids=['PedMix', 'PatchMix'])
def test_forward_on_a_device_reads_and_copies_nothing(name, mix):
    m,loss = build(name),loss_of(name)
    with FakeTensorMode():
        move_to_fake_cuda(m)
        if name == 'DART': loss.conf = torch.rand(2, 16, device='cuda')
        x,y = torch.rand(16, 3, 48, 24, device='cuda'),torch.randint(0, 4, (16,), device='cuda')
        with Watch() as w: l = step(name, m, loss, x, torch.randint(0, 2, (16,), device='cuda'), y, mix)
    assert l.device.type == 'cuda' and w.n > 300 and w.bad == []

@pytest.mark.parametrize('name', NETS)
def test_backward_on_a_device_reads_and_copies_nothing(name, monkeypatch):
    "Autograd does not run on a device that is not there: forward and backward are recorded on the CPU and played on the device."
    m,loss = build(name),loss_of(name)
    params,buffers = dict(m.named_parameters()),dict(m.named_buffers())
    def grads(params, buffers, x, modality, y, conf):
        if name == 'DART': loss.conf = conf
        net = lambda *args: functional_call(m, (params, buffers), args)
        return torch.autograd.grad(step(name, net, loss, x, modality, y, PedMix(8)), list(params.values()), allow_unused=True)
    args = params,buffers,torch.rand(16, 3, 48, 24),MOD,LABEL,torch.rand(2, 16)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)  # as the device sees it: no look at the values
    graph = make_fx(grads)(*args)
    monkeypatch.undo()
    assert not list(graph.buffers()) and not [k for k,v in vars(graph).items() if isinstance(v, torch.Tensor)]
    for node in graph.graph.nodes:
        if node.kwargs.get('device') == torch.device('cpu'): node.kwargs = {**node.kwargs, 'device': torch.device('cuda')}
    graph.recompile()
    with FakeTensorMode(), torch.no_grad(), Watch() as w:
        out = graph(on_fake_cuda(params), on_fake_cuda(buffers), *on_fake_cuda(dict(enumerate(args[2:]))).values())
    assert {o.device.type for o in out if o is not None} == {'cuda'} and w.n > 500
    assert [b for b in w.bad if 'empty' not in b[0]] == []

def test_the_watch_sees_what_it_is_for():
    with FakeTensorMode(), Watch() as w:
        x = torch.rand(4, device='cuda')
        x + torch.rand(4).to('cuda')
    assert any('_to_copy' in name for name,_ in w.bad)
    with FakeTensorMode(), pytest.raises(Exception, match='_local_scalar_dense'): bool(torch.rand(4, device='cuda').sum() > 1)

# ---------------------------------------------------------------- Dynamo

@pytest.mark.parametrize('name', NETS)
def test_one_graph(name):
    "The training forward with its loss is one graph without a break, evaluation another; both give what the eager network gives."
    m,loss,(x,xm) = build(name),loss_of(name),batch()
    eager = copy.deepcopy(m)
    torch._dynamo.reset()
    def train(net): torch.manual_seed(2); l = loss(net(x, MOD, xm), LABEL); l.backward(); return l.detach()
    def compiled(x, modality, xm, y): return loss(m(x, modality, xm), y)
    run = torch.compile(compiled, fullgraph=True, backend='aot_eager')
    torch.manual_seed(2); got = run(x, MOD, xm, LABEL); got.backward()
    assert abs(got.detach() - train(eager)) <= 1e-5
    for (k,a),b in zip(m.named_parameters(), eager.parameters()): assert (a.grad is None) == (b.grad is None) and (a.grad is None or (a.grad-b.grad).abs().max() <= 1e-5), k
    for (k,a),b in zip(m.state_dict().items(), eager.state_dict().values()): assert torch.allclose(a, b, atol=1e-6), k
    m.eval(); eager.eval()
    run = torch.compile(m, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for n in (16, 3): assert (run(x[:n], MOD[:n]) - eager(x[:n], MOD[:n])).abs().max() <= 1e-6

def test_graph_breaks_are_found():
    "The test above would fail for a network that reads a value back."
    def bad(x): return x*2 if x.sum() > 0 else x
    torch._dynamo.reset()
    with pytest.raises(Exception): torch.compile(bad, fullgraph=True, backend='aot_eager')(torch.ones(3))

def test_inductor_agrees(tmp_path):
    "The compiler that users get, where there is one for C++; the smallest network, since it takes a minute."
    m,(x,xm) = build('B+CA+PedMix'),batch()
    eager,loss = copy.deepcopy(m),TMPALoss(margin=5.)
    torch._dynamo.reset()
    m.compile(fullgraph=True)
    try: l = loss(m(x, MOD, xm), LABEL)
    except Exception as e:
        if 'compiler' in str(e).lower() or 'Python.h' in str(e): pytest.skip(f'no compiler: {type(e).__name__}')
        raise
    l.backward()
    want = loss(eager(x, MOD, xm), LABEL); want.backward()
    assert abs(l.detach() - want.detach()) <= 1e-5*abs(want.detach())
    for (k,a),b in zip(m.named_parameters(), eager.parameters()): assert (a.grad-b.grad).abs().max() <= 1e-5*max(1, b.grad.abs().max()), k
    assert sorted(m.state_dict()) == sorted(eager.state_dict())

@pytest.mark.cpu(reason='compilers know no stand-in')
def test_a_learner_trains_a_compiled_network(tmp_path):
    "Batches with fastai's types, a mix, scores after every epoch and an export, and the weights of the eager learner."
    dls = lambda: ReIDDataLoaders.from_synthetic(tmp_path/'people', n_ids=12, per_modality=4, size=(48,24), P=3, K=2, num_workers=0)
    def fit(compiled):
        set_seed(0, reproducible=True)
        learn = tmpa_learner(dls(), micro_resnet, pretrained=False, mfe=False, mft=False, mix=PedMix(8), path=tmp_path)
        torch._dynamo.reset()
        if compiled: learn.model.compile(fullgraph=True, backend='aot_eager')
        with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, lr=.01)
        return learn
    a,b = fit(True),fit(False)
    for (k,v),w in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.allclose(v, w, atol=1e-5), k
    numbers = lambda l: torch.tensor([float(v) for v in l.recorder.values[-1]])
    assert torch.allclose(numbers(a), numbers(b), atol=1e-4, equal_nan=True)
    a.export('learner.pkl')
    again = load_learner(tmp_path/'learner.pkl').model
    assert type(again) is TMPANet and sorted(again.state_dict()) == sorted(b.model.state_dict())

@pytest.mark.cpu(reason='nothing is computed')
def test_compile_is_an_argument(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(TMPANet, 'compile', lambda self, **kw: asked.append(kw))
    dls = ReIDDataLoaders.from_synthetic(tmp_path/'people', n_ids=12, per_modality=2, size=(48,24), P=3, K=2, num_workers=0)
    for compile in (False, True): tmpa_learner(dls, micro_resnet, pretrained=False, compile=compile)
    assert asked == [{}]

# ---------------------------------------------------------------- export

def trained(name):
    m,(x,xm) = build(name),batch()
    with torch.no_grad():
        for _ in range(2): m(x, MOD, xm)
    return m.eval()

class Folded(torch.nn.Module):
    "A network for one modality."
    def __init__(self, m, modality): super().__init__(); self.m,self.modality = m,modality
    def forward(self, images): return self.m(images, self.modality)

@pytest.mark.parametrize('name', NETS)
def test_export(name):
    m,(x,_) = trained(name),batch(6)
    mod,n = MOD[:6],torch.export.Dim('n')
    program = torch.export.export(m, (x, mod), dynamic_shapes=({0: n}, {0: n})).module()
    with torch.no_grad():
        want = m(x, mod)
        for k in (6, 2): assert (program(x[:k], mod[:k]) - want[:k]).abs().max() <= 1e-6
    torch.export.export(m, (x, mod))                                                      # with its defaults

@pytest.mark.parametrize('name', [o for o in NETS if o != 'TMPA pair'])                   # evaluates like TMPA
def test_onnx(name, tmp_path):
    ort = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    m,(x,_) = trained(name),batch(6)
    mod,n,f = MOD[:6],torch.export.Dim('n'),tmp_path/'m.onnx'
    with torch.no_grad(): want,visible = m(x, mod),m(x, 0)
    def run(*inputs):
        s = ort.InferenceSession(f)
        return torch.from_numpy(s.run(None, dict(zip([i.name for i in s.get_inputs()], [o.numpy() for o in inputs])))[0])
    torch.onnx.export(m, (x, mod), f, dynamic_shapes=({0: n}, {0: n}), verbose=False)
    for k in (6, 1): assert (run(x[:k], mod[:k]) - want[:k]).abs().max() <= 1e-4
    torch.onnx.export(Folded(m, 0).eval(), (x,), f, verbose=False)                             # modality folded in, everything else as it comes
    assert (run(x) - visible).abs().max() <= 1e-4

# ---------------------------------------------------------------- weights of 0.4.0

OLD = Path(__file__).parent/'data'/'weights'
KEPT = torch.load(OLD/'features-0.4.0.pt', weights_only=True)

@pytest.mark.parametrize('key', KEPT['features'])
def test_weights_of_0_4_give_their_features(key):
    name,switches = key.split(' ', 1)
    m = load_tmpa(OLD/f'{name}-0.4.0.pth', arch=partial(tiny_resnet, 2))
    if switches == '{}': assert fingerprint(m) == KEPT['prints'][name]                    # so that galleries still know them
    set_switches(m, **eval(switches))
    with torch.no_grad(): f = m(KEPT['images'].float(), KEPT['modality'])
    assert (f - KEPT['features'][key]).abs().max() <= 1e-6
