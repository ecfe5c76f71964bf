"ONNX files: pixels as Pillow resizes them, features as the library makes them, and the ranking that both give."
import json, sys
import numpy as np, pytest, torch
from PIL import Image
from tmpa.core import ConfigError, TMPAError
from tmpa.dart import TwinNet
from tmpa.data.synthetic import make_sysu
from tmpa.data.readers import sysu_items
from tmpa.extract import extract_features
from tmpa.models.agw import AGWNet
from tmpa.models.backbone import micro_resnet
from tmpa.models.net import set_switches
from tmpa.models.checkpoint import save_weights
from tmpa.models.onnx import export_onnx, pillow_resize, resize_matrix
from tmpa.models.tmpa import TMPANet
from tmpa.search import Gallery

SIZE = 48, 24

def pixels(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

@pytest.mark.parametrize('wanted', [(48, 24), (288, 144), (7, 301)])
def test_resize_is_pillows(wanted):
    "To the last bit: larger, smaller, equal, and in one direction alone."
    for h, w in [(1, 1), (2, 3), (5, 5), (48, 24), (97, 53), (49, 24), (33, 200), (300, 150), (720, 11), (48, 500)]:
        for x in (pixels(h, w, 3, seed=h), np.where(pixels(h, w, 3) > 127, 255, 0).astype(np.uint8)):
            want = np.asarray(Image.fromarray(x).resize(wanted[::-1], Image.LANCZOS))
            got = pillow_resize(torch.from_numpy(x).permute(2, 0, 1)[None].double(), wanted)[0].permute(1, 2, 0)
            assert np.array_equal(got.numpy(), want), (h, w)

def test_resize_matrix_by_loops():
    def weight(d): return 0. if abs(d) >= 3 else 1. if d == 0 else float(np.sinc(d)*np.sinc(d/3))
    for n, like in ((4, 9), (9, 4), (5, 5)):
        scale = like/n
        wide = max(scale, 1.)
        rows = np.zeros((n, like))
        for i in range(n):
            for j in range(like): rows[i, j] = weight((j + .5 - (i + .5)*scale)/wide)
            rows[i] /= rows[i].sum()
        assert np.abs(resize_matrix(n, like).numpy() - rows).max() < 1e-6

# ---------------------------------------------------------------- files

NETS = {
    'TMPA': lambda: TMPANet(5, micro_resnet, False),
    'B': lambda: TMPANet(5, micro_resnet, False, mfe=False, mft=False),
    'AGW': lambda: AGWNet(5, micro_resnet, False),
    'DART': lambda: TwinNet(5, micro_resnet, False),
}

def build(name):
    "With running statistics of its own."
    torch.manual_seed(0)
    net = NETS[name]()
    with torch.no_grad():
        for _ in range(3): net(torch.randn(8, 3, *SIZE), torch.tensor([0, 0, 1, 1]*2))
    return net.eval()

def session_of(file):
    ort = pytest.importorskip('onnxruntime')
    s = ort.InferenceSession(file, providers=['CPUExecutionProvider'])
    return s, lambda x, modality: s.run(None, dict(images=x, modality=np.array(modality)))[0]

def needed():
    for o in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(o)

@pytest.fixture(scope='module')
def people(tmp_path_factory):
    return sysu_items(make_sysu(tmp_path_factory.mktemp('people'), n_ids=6, size=(96, 48)), split='test')

@pytest.mark.parametrize('name', NETS)
def test_features_and_ranking(name, people, tmp_path):
    "Of images of many sizes, grey and coloured; onnxruntime, extract_features and a Gallery agree."
    needed()
    net = build(name)
    if name == 'TMPA': set_switches(net, eval_complete='own')  # so that its modality counts
    save_weights(net, tmp_path/'w.pth', size=SIZE)
    session, run = session_of(export_onnx(tmp_path/'w.pth', tmp_path/'w.onnx'))
    card = json.loads(session.get_modelmeta().custom_metadata_map['tmpa'])
    assert card['size'] == list(SIZE) and card['dim'] == session.get_outputs()[0].shape[1]
    for i, shape in enumerate([(97, 53, 3), (48, 24, 3), (200, 31), (9, 9, 3)]):
        x = pixels(*shape, seed=i)
        Image.fromarray(x).save(tmp_path/'x.png')
        rgb = x if x.ndim == 3 else np.repeat(x[..., None], 3, 2)
        for modality in (0, 1):
            want = extract_features(net, [tmp_path/'x.png'], SIZE, modality=modality).numpy()
            assert abs(run(rgb[None], [modality]) - want).max() <= 1e-4
    decoded = [np.asarray(Image.open(o.path).convert('RGB')) for o in people]
    made = np.concatenate([run(x[None], [int(o.modality)]) for x, o in zip(decoded, people)])
    want = extract_features(net, people, SIZE).numpy()
    assert abs(made - want).max() <= 1e-4
    infrared = [o for o in people if o.modality == 1]
    gallery = Gallery(net, SIZE)
    gallery.add(infrared)
    at = [i for i, o in enumerate(people) if o.modality == 1]
    for i, o in enumerate(people):
        if o.modality == 1: continue
        hits = gallery.search(o, k=len(infrared))
        for f in (made, want):
            far = np.linalg.norm(f[at] - f[i], axis=1)
            assert np.all(np.diff(far[[h.pos for h in hits]]) >= -1e-6)  # the gallery's order is nearest first in each

def test_any_number_of_images_and_no_names_of_this_machine(tmp_path):
    needed()
    net = build('B')
    made = export_onnx(net, tmp_path/'a.onnx', SIZE).read_bytes()
    assert b'stack_trace' not in made and b'.py' not in made
    _, run = session_of(tmp_path/'a.onnx')
    x = pixels(5, 60, 30, 3)
    assert abs(run(x, [0, 1, 0, 1, 1]) - np.concatenate([run(x[i:i+1], [0]) for i in range(5)])).max() < 1e-6

def test_what_is_not_written(tmp_path, monkeypatch):
    needed()
    net = build('B')
    (tmp_path/'x.onnx').write_bytes(b'mine')
    def refuse(*args, contains, **kwargs):
        with pytest.raises(TMPAError) as e: export_onnx(*args, **kwargs)
        assert contains in str(e.value) and '\n' not in str(e.value)
        assert (tmp_path/'x.onnx').read_bytes() == b'mine' and [o.name for o in tmp_path.iterdir()] == ['x.onnx']
    refuse(net, tmp_path/'x.onnx', contains='for what size')
    refuse(net, tmp_path/'x.onnx', (10**6, 3), contains='height and width')
    refuse(tmp_path/'absent.pth', tmp_path/'x.onnx', contains='absent.pth')
    monkeypatch.setattr('tmpa.models.onnx._difference', lambda *args: 2e-4)
    refuse(net, tmp_path/'x.onnx', SIZE, contains='2.0e-04 off')
    class Reads(TMPANet):
        def features(self, images, modality):
            return super().features(images if images.sum() > 0 else -images, modality)
    torch.manual_seed(0)
    refuse(Reads(5, micro_resnet, False, mfe=False, mft=False), tmp_path/'x.onnx', SIZE, contains='cannot be exported')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    refuse(net, tmp_path/'x.onnx', SIZE, contains='pip install "tmpa[export]"')
