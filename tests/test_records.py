"Whatever takes records takes paths, pictures and pixels too, and refuses anything else where it comes in, in one line."
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from tmpa.core import ConfigError, DataError, Modality, ReIDImage, check_records
from tmpa.protocols import cross_settings
from tmpa.data.load import ReIDDataLoaders, split_by_pid
from tmpa.interpret import ReIDInterpretation, plot_ranks
from tmpa.extract import extract_features
from tmpa.learner import tmpa_learner
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet
from tmpa.search import Gallery
from tmpa.vis.gradcam import plot_attention, plot_gradcam
from tmpa.vis.tsne import plot_tsne, separation, tsne

SIZE = 48, 24


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@pytest.fixture(scope='module')
def items(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    def one(p, m, n):
        f = d/f'{p}-{m}-{n}.png'
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(f)
        return ReIDImage(f, p, 1 + m, m)
    return [one(p, m, n) for p in range(4) for m in (0, 1) for n in (0, 1)]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return TMPANet(4, micro_resnet, pretrained=False).eval()


def line(f, *args, match, error=ConfigError, **kw):
    with pytest.raises(error, match=match) as e: f(*args, **kw)
    assert '\n' not in str(e.value)


def words(o): return o._replace(path=str(o.path))


def test_features_of_paths_and_pictures(items, model):
    want = extract_features(model, items, SIZE)
    mods, paths = [o.modality for o in items], [str(o.path) for o in items]
    assert torch.equal(extract_features(model, paths, SIZE, modality=mods), want)
    assert torch.equal(extract_features(model, [words(o) for o in items], SIZE), want)
    pictures = [np.asarray(Image.open(p)) for p in paths]
    assert torch.equal(extract_features(model, pictures, SIZE, modality=mods), want)
    for one in (items[0], paths[0], Path(paths[0]), pictures[0], torch.tensor(pictures[0])): assert torch.allclose(extract_features(model, one, SIZE, modality=0), want[:1], atol=1e-5)
    line(extract_features, model, ['a.jpg'], SIZE, match='pass modality=0')
    line(extract_features, model, ['a.jpg'], SIZE, modality=[0, 1], match='2 modalities for 1 images')
    line(extract_features, model, ['a.jpg'], SIZE, modality=0, match='no image a.jpg', error=DataError)
    line(extract_features, model, [], SIZE, match='list is empty', error=DataError)
    for bad in (None, 7, [7], [None], [items[0]._replace(pid=None)], np.zeros((2, 3))): line(extract_features, model, bad, SIZE, modality=0, match='no image|whole numbers')


def test_pictures_of_paths(items, model):
    a, b = items[0], items[2]
    for q,m in ((str(a.path), str(b.path)), (a.path, b), (words(a), words(b))):
        fig = plot_gradcam(model, q, m, size=SIZE, modality=[0, 1])
        assert len(fig.axes) == 8
        assert ('person unknown' in fig.get_suptitle()) == (q != words(a))
    line(plot_gradcam, model, 'a.jpg', 'b.jpg', size=SIZE, match='pass modality=0')
    one, same = (plot_gradcam(model, a, b, o, SIZE) for o in ('mfe.shared.layer2', ['mfe.shared.layer2']))
    assert [x.get_title() for x in one.axes] == [x.get_title() for x in same.axes] and len(one.axes) == 4
    assert len(plot_gradcam(model, a, b, model.mfe.shared.layer2, SIZE).axes) == 4
    assert len(plot_attention(model, a.path, str(b.path), size=SIZE, modality=[0, 1]).axes) == 5
    line(plot_attention, model, 'a.jpg', size=SIZE, match='pass modality=0')


def test_interpretation_of_paths(items):
    feats, mods = torch.randn(len(items), 4), [o.modality for o in items]
    assert ReIDInterpretation([words(o) for o in items], feats).items == items
    p = ReIDInterpretation([o.path for o in items], feats, modality=mods)
    assert [o.modality for o in p.items] == mods and len(p.plot_ranks(2, k=2).axes) == 6
    line(ReIDInterpretation, ['a.jpg'], feats[:1], match='pass modality=0')
    line(ReIDInterpretation, [items[0]._replace(pid=None)], feats[:1], match='pid=None')
    assert len(plot_ranks([words(o) for o in items], p.feats, p.setting(), 1, k=1).axes) == 2


def test_loaders_and_settings(items, device):
    dls = ReIDDataLoaders.from_items([words(o) for o in items], size=SIZE, P=2, K=1, num_workers=0, device=device)
    assert dls.train_items == items
    assert [o.modality for o in dls.test_dl([items[0].path], modality=1).dataset.items] == [Modality.INFRARED]
    for f in (ReIDDataLoaders.from_items, split_by_pid, cross_settings): line(f, ['a.jpg'], match='pass modality=0')
    line(dls.test_dl, ['a.jpg'], match='pass modality=0')


def test_one_thermal_frame_is_one_query(model, items):
    g = Gallery(model, SIZE)
    g.add(items)
    frame = np.zeros((50, 64), np.uint16) + 7
    hits = g.search(frame, modality=1, k=3)
    assert len(hits) == 3 and hits[0].pos < len(items) and hits.query.path.size == (64, 50)
    assert [h.pos for h in g.search(torch.from_numpy(frame.astype(np.int32)).to(torch.uint16), modality=1, k=3)] == [h.pos for h in hits]
    with pytest.warns(UserWarning, match='guessed from the pixels'): assert [h.pos for h in g.search(frame, k=3)] == [h.pos for h in hits]
    assert len(g.search([frame, frame], modality=1)) == 2
    assert len(g.search(np.zeros((50, 64), np.uint8), modality=1, k=2)) == 2 and len(g.search(np.zeros((50, 64, 3), np.uint8), modality=1, k=2)) == 2
    for odd in (np.zeros((50, 64), np.int64), np.zeros((50, 64), bool), np.zeros((50, 64, 3), np.uint16), np.zeros((50, 64, 3)), np.zeros((1, 50, 64, 3), np.uint8), torch.zeros(3, 50, 64)):
        line(g.search, odd, modality=1, match='no image and no features')
    for odd in (7, {1: 2}, [None], [[.1, .2]], object()): line(g.search, odd, modality=1, match='no image')
    line(g.add, frame, modality=1, match='keeps paths, not pictures')
    line(g.add, np.zeros((50, 64)), modality=1, match='no image')


def test_features_are_floats(items):
    g, x = Gallery(made_by='x'), torch.nn.functional.normalize(torch.randn(len(items), 64))
    g.add([words(o) for o in items], feats=x)
    assert g.items == items
    want = [[h.pos for h in o] for o in g.search(x[:3], k=4)]
    for q in (x[:3].numpy(), list(x[:3]), [o.numpy() for o in x[:3]], x[:3].double()): assert [[h.pos for h in o] for o in g.search(q, k=4)] == want
    assert [h.pos for h in g.search(x[0], k=4)] == want[0]
    line(g.nearest, np.zeros((3, 64), np.uint8), match='look like pixels')
    line(g.search, np.zeros((50, 64), np.uint16), modality=1, match='no model')
    line(g.search, [x[0], x[1, :5]], match='different lengths')
    line(g.add, [items[0]], feats=np.zeros((1, 64), np.uint16), match='look like pixels')
    paths = np.array([str(o.path) for o in items])
    assert Gallery(made_by='x').add(paths, modality=0, feats=x) == len(items)


def test_tsne_of_one_person_and_its_perplexity(items):
    x = torch.randn(len(items), 5)
    for n in (1, 2, 4): assert 'silhouette –' in plot_tsne({'x': x}, items, n_ids=n).axes[0].get_title() or n > 1
    line(plot_tsne, {'x': x}, items, perplexity=50, match='perplexity=50.*number of images, 16')
    line(plot_tsne, {'x': x}, items, perplexity=0, match='perplexity=0')
    line(plot_tsne, {'x': x}, items, n_ids=0, match='n_ids=0')
    line(plot_tsne, {'x': x[:1]}, ['a.jpg'], match='pass modality=0')
    assert len(tsne(x[:2])) == 2 and tsne(x[:6, :1]).shape == (6, 2)
    line(tsne, x[:1], match='2 or more')
    s = separation(x[:4], [1]*4, [0, 0, 1, 1])
    assert np.isnan(s['silhouette']) and np.isnan(s['other']) and s['same'] > 0


def test_check_records_says_which(items):
    assert check_records(items[0]) == items[:1] and check_records(iter(items)) == items
    line(check_records, [*items[:2], items[2]._replace(cam=1.5)], match='1-0-0.png|0-1-0.png')
