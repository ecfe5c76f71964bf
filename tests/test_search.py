"""`Gallery`: the ranking against a stable sort, its life on disk, and what it refuses."""
import json, os

import numpy as np
import pytest
import torch
from pathlib import Path
from PIL import Image

from tmpa import filling
from tmpa.core import CheckpointError, ConfigError, DataError, ProtocolError, ReIDImage
from tmpa.data.synthetic import make_sysu
from tmpa.data.readers import sysu_items
from tmpa.evaluation import RULES, evaluate
from tmpa.models.backbone import tiny_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, save_weights
from tmpa.search import Gallery, fingerprint, top_columns


def records(n, seed=0):
    rng = np.random.default_rng(seed)
    return [ReIDImage(Path(f'g{seed}-{i}.jpg'), int(rng.integers(12)), int(rng.integers(1, 7)), i % 2) for i in range(n)]

def coarse(n, d=16, seed=0):
    "Rows of length one whose products are exact in any order of summation, and mostly tied."
    return torch.randint(0, 2, (n, d), generator=torch.Generator().manual_seed(seed)).float().mul_(2).sub_(1)/d**.5

def gallery(n, block=None, **kw):
    g = Gallery(made_by='test', **kw)
    g.add(records(n), feats=coarse(n))
    return g


@pytest.fixture
def small_blocks(monkeypatch): monkeypatch.setattr(Gallery, 'block', 32)


@pytest.fixture(scope='module')
def people(tmp_path_factory): return sysu_items(make_sysu(tmp_path_factory.mktemp('data')/'sysu', n_ids=10, per_cam=2, size=(48, 24)), 'test')


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TMPANet(4, tiny_resnet, pretrained=False, mfe=False, mft=False).eval()


@pytest.mark.parametrize('n,k', [(1, 1), (31, 5), (32, 32), (33, 40), (200, 1), (200, 10), (200, 200)])
def test_is_a_stable_sort(small_blocks, n, k):
    g, q = gallery(n), coarse(17, seed=1)
    _, want = (q@coarse(n).T).sort(dim=1, descending=True, stable=True)
    got = [[h.pos for h in hits] for hits in g.search(q, k=k)]
    assert got == want[:, :k].tolist()
    assert all(h.item == g.items[h.pos] for h in g.search(q[0], k=k))
    assert [[h.pos for h in hits] for hits in g.search(q, k=k, step=3)] == got


@pytest.mark.parametrize('rule', RULES)
def test_is_the_ranking_of_the_evaluation(small_blocks, rule):
    g, qs, q = gallery(150), records(40, 1), coarse(40, seed=1)
    lab = lambda items: (np.array([o.pid for o in items]), np.array([o.cam for o in items]))
    (qp, qc), (gp, gc) = lab(qs), lab(g.items)
    r = evaluate(q, coarse(150), qp, gp, qc, gc, rule)
    for i, hits in enumerate(g.search(q, k=len(g), rule=rule, records=qs)):
        good = np.array([h.item.pid == qs[i].pid for h in hits])
        assert good.any() == r.valid[i]
        if not good.any(): continue
        at = np.flatnonzero(good)
        first = len({h.item.pid for h in hits[:at[0]]}) + 1 if RULES[rule].merge else at[0] + 1
        assert first == r.first_hit[i]
        assert abs((np.arange(1, len(at)+1)/(at+1)).mean() - r.ap[i]) < 1e-12


def test_filters(small_blocks):
    g, q = gallery(200), coarse(5, seed=2)
    for hits in g.search(q, k=500, cams=(2, 5), only=1): assert {(h.item.cam in (2, 5), h.item.modality) for h in hits} == {(True, 1)}
    every = g.search(q[0], k=500)
    assert [h.pos for h in g.search(q[0], k=500, cams=4)] == [h.pos for h in every if h.item.cam == 4]
    with pytest.raises(ConfigError, match='cams=9'): g.search(q, cams=9)
    with pytest.raises(ProtocolError, match='records='): g.search(q, rule='sysu')
    with pytest.raises(ProtocolError, match='rank1'): g.search(q, rule='rank1')
    with pytest.raises(ConfigError, match='k=0'): g.search(q, k=0)
    with pytest.raises(ConfigError, match='2 records for 5'): g.search(q, records=records(2))


def test_grows_and_shrinks(small_blocks):
    feats, items = coarse(150), records(150)
    a, b = Gallery(), Gallery()
    a.add(items, feats=feats)
    for i in range(0, 150, 7): assert b.add(items[i:i+7], feats=feats[i:i+7]) == len(items[i:i+7])
    assert a.items == b.items and torch.equal(a.rows(range(150)), b.rows(range(150))) and len(b.blocks) == 5
    assert b.add(items, feats=feats) == 0
    gone = {3, 4, 40, 41, 149}
    assert b.remove(gone) == 5 and len(b) == 145
    keep = [i for i in range(150) if i not in gone]
    assert torch.equal(b.rows(range(145)), feats[keep]) and b.items == [items[i] for i in keep]
    assert b.add(items, feats=feats) == 5 and b.search(feats[3], k=150)[0].distance < 1e-3
    assert b.remove(lambda o: True) == 150 and b.blocks == []
    with pytest.raises(ProtocolError, match='empty'): b.search(feats[0])
    with pytest.raises(ConfigError, match='place 150'): a.remove([150])


def test_half_precision(small_blocks):
    x = torch.nn.functional.normalize(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)))
    a, b = Gallery(), Gallery(dtype=torch.float16)
    for g in (a, b): g.add(records(100), feats=x)
    assert b.nbytes*2 == a.nbytes
    for p, q in zip(a.search(x, k=100), b.search(x, k=100)):
        assert np.allclose([h.distance for h in sorted(p, key=lambda h: h.pos)], [h.distance for h in sorted(q, key=lambda h: h.pos)], atol=.04)
    with pytest.raises(ConfigError, match='float16'): Gallery(dtype=torch.int8)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('n', [0, 1, 32, 100])
def test_saved_and_loaded(small_blocks, tmp_path, dtype, n):
    g = gallery(n, dtype=dtype) if n else Gallery(made_by='test', dtype=dtype)
    if n: g.items[0] = g.items[0]._replace(path=Path('Straße 名/ä b.jpg'))
    g.save(tmp_path/'g.npz')
    h = Gallery.load(tmp_path/'g.npz', made_by='test')
    assert h.items == g.items and len(h) == n and (not n or h.dtype == dtype)
    if n: assert torch.equal(h.rows(range(n)), g.rows(range(n))) and h.search(coarse(3)) == g.search(coarse(3))
    h.add(records(5, 7), feats=coarse(5))
    assert len(h) == n + 5
    assert {o.name for o in tmp_path.iterdir()} == {'g.npz'}
    with np.load(tmp_path/'g.npz', allow_pickle=False) as z: assert all(z[k].dtype != object for k in z.files)


def test_files_that_are_no_gallery(tmp_path):
    gallery(50).save(tmp_path/'g.npz')
    whole = (tmp_path/'g.npz').read_bytes()
    for name, data in (('cut', whole[:-200]), ('empty', b''), ('text', b'hello')):
        (tmp_path/f'{name}.npz').write_bytes(data)
        with pytest.raises(DataError, match=f'{name}.npz is damaged'): Gallery.load(tmp_path/f'{name}.npz')
    np.savez(tmp_path/'other.npz', feats=np.zeros((3, 4)))
    with pytest.raises(DataError, match='other.npz'): Gallery.load(tmp_path/'other.npz')
    with pytest.raises(DataError, match='none.npz does not exist'): Gallery.load(tmp_path/'none.npz')
    with pytest.raises(ConfigError, match='.npz'): gallery(5).save(tmp_path/'g.pkl')
    with pytest.raises(CheckpointError, match='another model'): Gallery.load(tmp_path/'g.npz', made_by='somebody')


def test_model_and_pictures(people, model, tmp_path):
    g = Gallery(model, (48, 24))
    assert g.add(people) == len(people) and g.dim == model.dim
    q = people[3]
    hits = g.search(q, k=5)
    assert hits[0].item == q and hits[0].distance < 1e-2
    im = Image.open(q.path)
    for other in (str(q.path), im, np.asarray(im)): assert g.search(other, k=5, modality=q.modality) == hits
    assert [h.pos for h in g.search([q, people[9]], k=5)[0]] == [h.pos for h in hits]
    assert g.search(g.rows([3])[0], k=5)[0].item == q
    with pytest.warns(UserWarning, match='guessed from the pixels of 1 images'): assert g.search(q.path, k=5) == hits
    with pytest.raises(ConfigError, match='int'): g.search([1, 2], modality=0)
    with pytest.raises(DataError, match='nowhere.jpg'): g.search(tmp_path/'nowhere.jpg', modality=0)
    with pytest.raises(ConfigError, match='pictures'): g.add([im], modality=0)
    with pytest.raises(ConfigError, match='size'): Gallery(model)
    assert len(hits.show().axes) == 6 and str(q.path) in repr(hits)
    g.save(tmp_path/'g.npz')
    save_weights(model, tmp_path/'w.pth')
    again = Gallery.load(tmp_path/'g.npz', load_tmpa(tmp_path/'w.pth'))  # weights from disk are the same model
    assert again.search(q, k=5) == hits and again.size == (48, 24)
    with pytest.raises(CheckpointError, match='size'): Gallery.load(tmp_path/'g.npz', model, size=(96, 48))


def test_another_model_is_refused(people, model, tmp_path):
    g = Gallery(model, (48, 24))
    g.add(people[:6])
    g.save(tmp_path/'g.npz')
    with pytest.raises(CheckpointError, match='dimensions'): g.search(torch.randn(7))
    model.feature = 'pool'  # another switch, other features
    with pytest.raises(CheckpointError, match='was changed'): g.search(people[0])
    with pytest.raises(CheckpointError, match='another model'): Gallery.load(tmp_path/'g.npz', model)
    model.feature = 'bn'
    assert len(g.search(people[0])) == 6
    with torch.no_grad(): next(model.parameters()).mul_(1.001)
    with pytest.raises(CheckpointError, match='was changed'): g.add(people)


def test_damaged_image_keeps_what_came_before(people, model, tmp_path):
    bad = tmp_path/'bad.jpg'
    bad.write_bytes(people[0].path.read_bytes()[:300])
    g = Gallery(model, (48, 24), bs=4)
    assert g.add(people[:8]) == 8
    with pytest.raises(DataError, match='bad.jpg'): g.add([*people[:12], ReIDImage(bad, 1, 1, 0)])
    assert len(g) == 8 and g.add(people) == len(people) - 8 and g.items == people


def test_features_that_are_no_features():
    g = gallery(20)
    for bad, words in ((torch.full((3, 16), float('nan')), 'NaN'), (torch.zeros(0, 16), 'shape'), (torch.zeros(2, 2, 2), 'shape')):
        with pytest.raises(ProtocolError, match=words): g.nearest(bad)
    with pytest.raises(ConfigError, match='3 features for 2 images'): g.add(records(2, 5), feats=coarse(3))
    with pytest.raises(ConfigError, match='no model'): g.search('a.jpg', modality=0)


def test_fingerprint(model):
    a = fingerprint(model)
    assert a == fingerprint(model.train().eval().to(memory_format=torch.channels_last))
    torch.manual_seed(0)
    assert a == fingerprint(TMPANet(4, tiny_resnet, pretrained=False, mfe=False, mft=False))
    assert a != fingerprint(model.double())


@pytest.mark.parametrize('k', [1, 3, 8])
def test_top_columns_with_hidden_ones(k):
    sim = torch.tensor([[1., 1, 2, -torch.inf, 1, 2, -torch.inf, 0], [-torch.inf]*8])
    v, i = top_columns(sim, k)
    assert i.tolist() == sim.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()


def test_on_a_device(people, model, device):
    g = Gallery(model.to(device), (48, 24))
    g.add(people)
    assert g.device.type == device and g.search(people[3], k=3)[0].item == people[3]
    assert [h.pos for h in g.search([people[3]], k=5, rule='sysu', records=[people[3]])[0]]


def test_an_interrupted_add_can_be_saved(people, model, tmp_path):
    "Labels that a search had kept are not those of what was added before an image that cannot be read."
    (tmp_path/'zero.png').touch()
    g = Gallery(model, (48, 24), bs=4)
    g.add(people[:5]); g.search(people[0]); g.save(tmp_path/'g.npz')
    many = [ReIDImage(Path(tmp_path/f'{i}.png'), i, 1, 1) for i in range(513)]
    for o in many[:512]: Image.new('RGB', (24, 48), (o.pid % 255, 0, 0)).save(o.path)
    with pytest.raises(DataError, match='512.png'): g.add(many)
    assert len(g) == 517 and g.search(people[0], cams=[1])
    g.save(tmp_path/'g.npz')
    assert Gallery.load(tmp_path/'g.npz', model).items == g.items


def test_weights_changed_behind_pytorchs_back(people, model):
    g = Gallery(model, (48, 24)); g.add(people[:3])
    for p in model.parameters(): p.data.add_(.1)
    try:
        with pytest.raises(CheckpointError, match='was changed'): g.add(people[3:5])
    finally:
        for p in model.parameters(): p.data.sub_(.1)


def test_arguments_as_they_come():
    g = gallery(40)
    q = g.rows([0])[0]
    cam = g.items[0].cam
    want = [h.pos for h in g.search(q, k=40, cams=cam)]
    for cams in (np.int64(cam), torch.tensor(cam), [cam], {cam}, np.array([cam]), (c for c in [cam])): assert [h.pos for h in g.search(q, k=40, cams=cams)] == want
    for kw in (dict(k=2.5), dict(k=None), dict(only='infrared'), dict(cams='door'), dict(step=0)):
        with pytest.raises(ConfigError): g.search(q, **kw)
    with pytest.raises(ConfigError, match='no image'): g.search(None)
    names = [o.path for o in g.items]
    for mask in (torch.arange(len(g)) == 3, [i == 2 for i in range(len(g)-1)]): assert g.remove(mask) == 1
    assert [o.path for o in g.items] == names[:2] + names[4:]
    assert g.remove(np.zeros(len(g), bool)) == 0 and g.remove([]) == 0 and g.remove(0) == 1
    with pytest.raises(ConfigError, match='mask of shape'): g.remove([True, False])
    odd = [o.path for o in g.items if o.pid % 3]
    assert g.remove(lambda o: o.pid % 3) == len(odd) > 0 and not {o.path for o in g.items} & set(odd)  # what a function gives is true or false, no place
    with pytest.raises(ConfigError, match='whole numbers'): g.remove([.5])
    with pytest.raises(ConfigError, match='pid'): g.add([ReIDImage(Path('a'), '7', 1, 1)], feats=torch.ones(1, 16))
    g.remove(range(len(g)))
    g.add([ReIDImage(Path('a'), 7, 1, 1)], feats=torch.ones(1, 3))  # an emptied gallery is free for another model
    assert g.dim == 3


def test_one_file_under_two_names(people, model, monkeypatch):
    g = Gallery(model, (48, 24)); g.add(people[:2])
    with pytest.raises(ConfigError, match='no image'): g.search(np.zeros((3, 48, 24), np.uint8), modality=0)
    monkeypatch.chdir(people[0].path.parent)
    assert g.add(people[0].path.name, modality=0) == 0


def test_long_lists_take_blocks_together(small_blocks):
    g = gallery(200)
    q = coarse(5, seed=9)
    for k in (10, 40, 100, 199, 200):
        s,i = g.nearest(q, k)
        ref = (torch.nn.functional.normalize(q) @ g.rows(range(200)).T).sort(dim=1, descending=True, stable=True)
        every = torch.nn.functional.normalize(q) @ g.rows(range(200)).T
        assert torch.allclose(s, ref.values[:, :k], atol=1e-6) and torch.allclose(every.gather(1, i), s, atol=1e-6) and all(len(set(r)) == k for r in i.tolist())
    first = [h.pos for h in g.search(q[0], k=200, rule='regdb')]
    late = [p for p in first if p >= 170]
    v,i = g.nearest(q[:1], 50, lambda s: torch.arange(s.start, s.stop) < 170)  # whole blocks hidden
    assert [p for p,x in zip(i[0].tolist(), v[0].tolist()) if x > -torch.inf] == late


def added_slowly(items, rounds):
    "Places of what `add` takes, by a loop over all that is there already."
    kept = []
    for r in rounds:
        for i in r:
            if not any(os.path.abspath(items[i].path) == os.path.abspath(items[k].path) for k in kept): kept.append(i)
    return kept

def test_adding_takes_no_longer_in_a_large_gallery(monkeypatch):
    "One add looks at its own images alone, and so do the labels of the search after it."
    asked = []
    monkeypatch.setattr(filling, '_key', lambda o, key=filling._key: asked.append(o) or key(o))
    g = gallery(500)
    for i, o in enumerate(records(20, seed=1)):
        asked.clear()
        assert g.add(o, feats=coarse(1)) == 1 and len(asked) == 1
        assert g.numbers()[:, -1].tolist() == [o.pid, o.cam, o.modality]
    whole = gallery(500)
    whole.add(records(20, seed=1), feats=coarse(1).expand(20, -1))
    assert g.items == whole.items and torch.equal(g.numbers(), whole.numbers())
    assert torch.equal(g.rows(range(520)), whole.rows(range(520)))

@pytest.mark.parametrize('seed', range(5))
def test_what_add_passes_over(tmp_path, monkeypatch, seed):
    "Repeated, renamed, removed and added again, in one folder or another: as a loop over everything says."
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(seed)
    items = [ReIDImage(Path(f'{p}{i}.jpg'), i, 1, 0) for i in range(12) for p in ('', './', f'{tmp_path}/', 'x/../')]
    rounds = [rng.integers(len(items), size=rng.integers(1, 6)).tolist() for _ in range(12)]
    g = Gallery(made_by='test')
    for r in rounds: g.add([items[i] for i in r], feats=coarse(len(items))[r])
    kept = added_slowly(items, rounds)
    assert g.items == [items[i] for i in kept] and torch.equal(g.rows(range(len(g))), coarse(len(items))[kept])
    gone = g.items[0]
    g.remove([0])
    assert g.add(gone, feats=coarse(1)) == 1 and g.add(gone, feats=coarse(1)) == 0
    (tmp_path/'other').mkdir()
    monkeypatch.chdir(tmp_path/'other')
    here = os.path.abspath('0.jpg') in map(os.path.abspath, (o.path for o in g.items))  # names are of the folder of now
    assert g.add(ReIDImage(Path('0.jpg'), 0, 1, 0), feats=coarse(1)) == 1 - here
    g.items = list(g.items)
    assert g.add(g.items[-1], feats=coarse(1)) == 0


def test_hits_are_json_whatever_the_labels_are():
    g = Gallery(made_by='test')
    odd = ReIDImage(Path('a.jpg'), np.int64(3), np.int32(2), np.int64(1)), ReIDImage(Path('b.jpg'), np.int64(-1), np.int64(0), 0)
    g.add(list(odd), feats=coarse(2))
    q = ReIDImage(Path('q.jpg'), np.int64(4), np.uint8(5), np.int8(0))
    d = json.loads(json.dumps(g.search(coarse(2)[:1], records=[q])[0].to_dict()))
    said = {o['path']: (o['identity'], o['camera'], o['modality']) for o in [d['query'], *d['hits']]}
    assert said == {'q.jpg': (4, 5, 'visible'), 'a.jpg': (3, 2, 'infrared'), 'b.jpg': (None, None, 'visible')}


def test_one_query_that_cannot_be_read(model, people, tmp_path):
    (tmp_path/'bad.png').touch()
    g = Gallery(model, (48, 24))
    g.add(people[:3])
    with pytest.warns(UserWarning, match='1 of 1'): hits = g.search(tmp_path/'bad.png', modality=0, on_error='skip')
    assert hits == [] and list(g.skipped) == [tmp_path/'bad.png']
    with pytest.raises(DataError, match='bad.png'): g.search(tmp_path/'bad.png', modality=0)
