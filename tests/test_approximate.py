"""`Gallery(index='faiss')`: what it returns is what an exact search would, of what it has looked at."""
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tmpa import approximate, search
from tmpa.core import ConfigError, DataError, ReIDImage
from tmpa.evaluation import RULES
from tmpa.search import Gallery

faiss = pytest.importorskip('faiss')
D = 16

@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(approximate, 'SMALL', 500)
    monkeypatch.setattr(Gallery, 'block', 128)

def people(n, seed=0):
    "Features in clusters, with records."
    rng = np.random.default_rng(seed)
    centre, pid = np.random.default_rng(99).standard_normal((60, D)), rng.integers(60, size=n)
    x = torch.nn.functional.normalize(torch.from_numpy(centre[pid] + .2*rng.standard_normal((n, D))).float())
    return [ReIDImage(Path(f'{seed}/{i}.jpg'), int(p), 1 + i%6, int(1 + i%6 in (3, 6))) for i, p in enumerate(pid)], x

def both(n=2000, **kw):
    items, x = people(n)
    pair = Gallery(made_by='t'), Gallery(made_by='t', index='faiss', **kw)
    for g in pair: g.add(items, feats=x)
    return pair

def places(hits): return [h.pos for h in hits]

def right(exact, fast, q, **kw):
    "Whether hits have exact distances in exact order, and how many of the exact ones are among them."
    found = []
    for a, b in zip(exact.search(q, **kw), fast.search(q, **kw)):
        every = {h.pos: h.distance for h in exact.search(q[len(found)], **{**kw, 'k': len(exact), 'records': kw.get('records') and [kw['records'][len(found)]]})}
        d = [h.distance for h in b]
        assert len(b) == len(a) and len(set(places(b))) == len(b) and d == sorted(d)
        assert all(h.pos in every and abs(h.distance - every[h.pos]) < 1e-3 and h.item == exact.items[h.pos] for h in b)
        found.append(len(set(places(a)) & set(places(b)))/len(a) if a else 1)
    return np.mean(found)


def test_finds_what_is_near():
    exact, fast = both()
    q = people(40, 1)[1]
    assert right(exact, fast, q, k=10) > .9 and fast.index.inner.ntotal == 2000
    fast.index.probes = 1000  # every list
    assert [places(h) for h in fast.search(q)] == [places(h) for h in exact.search(q)]
    assert places(fast.search(q[0])) == places(exact.search(q[0]))


@pytest.mark.parametrize('rule', RULES)
def test_what_is_hidden_is_never_found(rule):
    exact, fast = both()
    qs, q = people(40, 1)
    assert right(exact, fast, q, k=10, rule=rule, records=qs) > .9
    for kw in (dict(cams=2), dict(cams=(1, 3), only=1), dict(only=0)):
        assert right(exact, fast, q, k=10, rule=rule, records=qs, **kw) > .9
    assert right(exact, fast, q[:5], k=1500) == 1  # long lists are exact


def test_small_galleries_are_exact():
    exact, fast = both(400)
    q = people(40, 1)[1]
    assert fast.search(q, k=10) == exact.search(q, k=10) and fast.index.inner is None


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('folder', [False, True])
def test_follows(tmp_path, seed, folder):
    "What is added is found, what is removed is not; also when another process does it."
    rng = random.Random(seed)
    items, x = people(4000, seed)
    exact = Gallery(made_by='t')
    fast = Gallery.open(tmp_path/'g', made_by='t', index='faiss') if folder else Gallery(made_by='t', index='faiss')
    writer = Gallery.load(tmp_path/'g') if folder else fast
    for _ in range(12):
        i = rng.sample(range(4000), rng.choice([1, 30, 700]))
        gone = rng.sample(range(len(exact)), len(exact)//3) if rng.random() < .4 else []
        by = rng.choice([fast, writer])
        by.refresh()
        for g in (exact, by):
            g.add([items[j] for j in i], feats=x[i])
            g.remove(gone)
        fast.refresh()
        assert list(fast.items) == list(exact.items)
        fast.index.probes = 1000
        q = exact.rows([0, len(exact)//2, len(exact)-1])
        assert [places(h) for h in fast.search(q, k=5)] == [places(h) for h in exact.search(q, k=5)]
        if len(exact) >= 500: assert fast.index.inner.ntotal == len(exact) == len(fast.index.ids)
    if not folder:
        with pytest.raises(ConfigError, match='folder'): fast.index.save()
        return
    fast.index.save()
    again = Gallery.load(tmp_path/'g', index='faiss')
    again.index.train = None  # it need not
    again.index.probes = 1000
    assert again.search(q, k=5) == fast.search(q, k=5) and len(list((tmp_path/'g').iterdir())) == 6
    f, = (tmp_path/'g').glob('index*')
    data = bytearray(f.read_bytes())
    data[len(data)//2] ^= 4
    f.write_bytes(data)
    with pytest.raises(DataError, match='index-.* is damaged'): Gallery.load(tmp_path/'g', index='faiss').search(q)
    fast.remove([0])
    assert not list((tmp_path/'g').glob('index*'))


def test_who_removes_after_others_did(tmp_path):
    items, x = people(1200)
    a = Gallery.open(tmp_path/'g', made_by='t', index='faiss')
    a.add(items, feats=x)
    a.index.probes = 1000  # every list
    a.search(x[0])
    Gallery.open(tmp_path/'g').remove([0, 1, 2])
    assert a.refresh() and a.remove([5]) == 1
    exact = Gallery.load(tmp_path/'g')
    for q in x[600:620]: assert places(a.search(q)) == places(exact.search(q))


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'faiss', None)
    with pytest.raises(ConfigError, match=r'tmpa\[search\]'): Gallery(index='faiss')
    with pytest.raises(ConfigError, match='hnsw'): Gallery(index='hnsw')
