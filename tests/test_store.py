"""Galleries in folders: the same as those in memory, whatever is done to them and whoever is killed."""
import os, random, time
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from tmpa import search, store, store_files
from tmpa.core import CheckpointError, ConfigError, DataError, PublishedImage, ReIDImage
from tmpa.search import Gallery
from tmpa.store import Store
from tmpa.store_records import StoredItems, StoredNames

D = 12

def feats(n, seed=0): return torch.nn.functional.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)))

def records(n, seed=0):
    rng = np.random.default_rng(seed)
    kinds = ReIDImage, PublishedImage
    return [kinds[i%2](Path(f's{seed}/Straße {i}.jpg'), int(rng.integers(-1, 9)), int(rng.integers(7)), int(rng.integers(2))) for i in range(n)]

@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(Gallery, 'block', 32)
    for room in (store, store_files): monkeypatch.setattr(room, 'PIECE', 8)
    monkeypatch.setattr(store, 'SEGMENT', 64)

def same(a, b):
    assert len(a) == len(b) and list(a.items) == list(b.items) and [o.as_stored for o in a.items] == [o.as_stored for o in b.items]
    assert torch.equal(a.numbers(), b.numbers())
    if not len(a): return
    assert torch.equal(a.rows(range(len(a))), b.rows(range(len(a)))) and a.dim == b.dim
    assert a.search(feats(3, 99), k=7) == b.search(feats(3, 99), k=7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('seed', range(4))
def test_is_a_gallery_in_memory(tmp_path, seed, dtype):
    "Adding, removing, opening again and looking again, in any order."
    rng, every, x = random.Random(seed), records(300, seed), feats(300, seed)
    here, there = Gallery(made_by='t', dtype=dtype), Gallery.open(tmp_path/'g', made_by='t', dtype=dtype)
    reader = Gallery.load(tmp_path/'g')
    for _ in range(25):
        what = rng.choice(['add', 'add', 'add', 'one', 'remove', 'again', 'save', 'look'])
        if what in ('add', 'one'):
            i = rng.sample(range(300), 1 if what == 'one' else rng.randrange(1, 90))
            assert here.add([every[j] for j in i], feats=x[i]) == there.add([every[j] for j in i], feats=x[i])
        if what == 'remove' and len(here):
            i = rng.sample(range(len(here)), rng.randrange(1, len(here) + 1)//3)
            assert here.remove(i) == there.remove(i)
        if what == 'again': there = Gallery.open(tmp_path/'g')
        if what == 'save': there.save(tmp_path/'g')
        if what == 'look':
            reader.refresh()
            same(here, reader)
        same(here, there)
    there.store.verify()
    there.save(tmp_path/'copy'), there.save(tmp_path/'g.npz'), here.save(tmp_path/'from')
    for f in ('copy', 'g.npz', 'from'): same(here, Gallery.load(tmp_path/f))
    names = {o.name.split('-')[0] for o in (tmp_path/'g').iterdir()}
    assert names <= {'head.json', 'features', 'records', 'names', 'sums'} and len(list((tmp_path/'g').iterdir())) <= 5


def test_readers_keep_what_they_saw(tmp_path):
    w = Gallery.open(tmp_path/'g', made_by='t')
    w.add(records(100), feats=feats(100))
    r = Gallery.load(tmp_path/'g')
    hits = r.search(feats(2, 5), k=5)
    w.add(records(50, 1), feats=feats(50, 1))
    w.remove(range(90))
    assert len(r) == 100 and r.search(feats(2, 5), k=5) == hits and list(r.items) == records(100)
    assert r.refresh() and len(r) == 60 and not r.refresh()
    same(r, w)


def test_two_who_add(tmp_path):
    "Each sees what the other has added when it adds itself, and no file comes in twice."
    a, b = (Gallery.open(tmp_path/'g', made_by='t') for _ in range(2))
    items, x = records(60), feats(60)
    assert a.add(items[:40], feats=x[:40]) == 40
    assert b.add(items[20:], feats=x[20:]) == 20 and len(b) == 60
    assert a.add(items, feats=x) == 0 and len(a) == 60
    same(a, b)
    a.remove([3])
    with pytest.raises(ConfigError, match='changed by another process'): b.remove([3])
    assert b.add(items[3], feats=x[3:4]) == 1 and list(b.items) == items[:3] + items[4:] + [items[3]]
    c = Gallery.open(tmp_path/'h', made_by='t')
    d = Gallery.open(tmp_path/'h', made_by='u')
    c.add(items[0], feats=x[:1])
    with pytest.raises(CheckpointError, match='another model'): d.add(items[1], feats=x[:1])


def test_a_refused_removal_stays_refused(tmp_path):
    "Until the gallery was looked at again its places are those of other images."
    x, items = feats(6), records(6)
    a = Gallery.open(tmp_path/'g', made_by='t')
    a.add(items[:4], feats=x[:4])
    b = Gallery.open(tmp_path/'g')
    b.add(items[4], feats=x[4:5])
    for _ in range(2):
        with pytest.raises(ConfigError, match='refresh'): a.remove([0])
        assert list(Gallery.load(tmp_path/'g').items) == items[:5]
    assert a.refresh() and a.remove([0]) == 1 and list(Gallery.load(tmp_path/'g').items) == items[1:5]


def test_features_and_records_stay_together(tmp_path):
    "Whatever makes a gallery look at its folder, also where it is refused afterwards."
    x, items = feats(6), records(6)
    a = Gallery.open(tmp_path/'g', made_by='t')
    a.add(items[:4], feats=x[:4])
    b = Gallery.open(tmp_path/'g')
    b.remove([0])
    a.save(tmp_path/'g')
    same(a, b)
    assert a.search(x[1], 1)[0].item == items[1] and not a.refresh()
    b.remove([0])
    a.store.refresh()
    assert a.refresh() and a.search(x[2], 1)[0].item == items[2]
    b.remove([0, 1])
    b = Gallery.open(tmp_path/'g', made_by='u')
    b.add(items[5], feats=x[5:])
    for _ in range(2):
        with pytest.raises(CheckpointError, match='another model'): a.add(items[0], feats=x[:1])
        with pytest.raises(CheckpointError, match='another model'): a.save(tmp_path/'g')
        same(a, b)
    assert a.search(x[5], 1)[0].item == items[5]
    assert a.remove([0]) == 1 and Gallery.load(tmp_path/'g').made_by == 'u'


def test_saving_does_not_say_who_made_the_features_of_others(tmp_path):
    a, b, c = (Gallery.open(tmp_path/'g', made_by=name) for name in (None, 'u', 't'))
    b.add(records(3), feats=feats(3))
    a.save(tmp_path/'g')
    same(a, b)
    assert Gallery.load(tmp_path/'g').made_by == 'u' and a.refresh() and a.made_by == 'u' and not a.refresh()
    with pytest.raises(CheckpointError, match='another model'): c.save(tmp_path/'g')
    assert Gallery.load(tmp_path/'g').made_by == 'u'


def test_names_after_somebody_elses_removal(tmp_path):
    "As many images as before, but others: none comes in twice."
    x, items = feats(8), records(8)
    a = Gallery.open(tmp_path/'g', made_by='t')
    a.add(items[:4], feats=x[:4])
    assert a.add(items[3], feats=x[3:4]) == 0
    s = Store(tmp_path/'g')
    known = StoredNames(s)
    assert os.path.abspath(items[0].path) in known
    b = Gallery.open(tmp_path/'g')
    b.remove([0])
    b.add(items[5], feats=x[5:6])
    s.refresh()
    assert [os.path.abspath(items[i].path) in known for i in (0, 1, 5)] == [False, True, True]
    assert a.add(items[5], feats=x[5:6]) == 0 and a.add(items[0], feats=x[:1]) == 1
    assert list(Gallery.load(tmp_path/'g').items) == [*items[1:4], items[5], items[0]]


def test_somebody_adds_between_two_portions(tmp_path):
    "What a later portion holds was looked for before the first one met the other process."
    many, x = records(300), feats(300)
    a, b = (Gallery.open(tmp_path/'g', made_by='t') for _ in range(2))
    seen = a._known
    def known():
        monkey = seen()
        b.add(many[200:210], feats=x[200:210])
        return monkey
    a._known = known
    assert a.add(many, feats=x) == 290
    assert len(a) == len({o.path for o in a.items}) == 300


def test_a_threshold_is_everybodys(tmp_path):
    "Who opened the folder before it was said neither forgets it nor takes it back."
    from tmpa.verify import threshold
    a, b = (Gallery.open(tmp_path/'g', made_by='t') for _ in range(2))
    a.add(records(9), feats=feats(9))
    a.threshold = threshold(np.linspace(0, 1, 400), np.arange(400) < 200, far=.1)
    a.save(tmp_path/'g')
    b.add(records(3, 1), feats=feats(3, 1))
    assert Gallery.load(tmp_path/'g').threshold == a.threshold and b.threshold is None
    a.add(records(3, 2), feats=feats(3, 2))
    b.refresh()
    b.threshold = None
    a.remove([0])
    b.refresh()
    assert Gallery.load(tmp_path/'g').threshold == a.threshold and len(b) == 14
    c = Gallery.load(tmp_path/'g')
    c.threshold = None
    c.save(tmp_path/'g')
    assert a.refresh() and a.threshold is None


def test_a_threshold_comes_after_anything(tmp_path):
    "It is neither missed by who has added since, nor lost where somebody saves who never saw it."
    from tmpa.verify import threshold
    a, b, c = (Gallery.open(tmp_path/'g', made_by='t') for _ in range(3))
    a.add(records(9), feats=feats(9))
    a.threshold = threshold(np.linspace(0, 1, 400), np.arange(400) < 200, far=.1)
    a.save(tmp_path/'g')
    b.add(records(3, 1), feats=feats(3, 1))
    assert b.refresh() and b.threshold == a.threshold and not b.refresh()
    c.save(tmp_path/'g')
    assert Gallery.load(tmp_path/'g').threshold == a.threshold
    c.remove([0])
    assert Gallery.load(tmp_path/'g').threshold == a.threshold and c.refresh() and c.threshold == a.threshold


@pytest.mark.parametrize('seed', range(5))
def test_what_add_passes_over(tmp_path, monkeypatch, seed):
    "As a gallery in memory: one file is one image, however it is named and from where."
    (tmp_path/'a/b').mkdir(parents=True)
    rng, names = random.Random(seed), [f'{p}{i}.jpg' for i in range(6) for p in ('', './', '../', '../b/', f'{tmp_path}/a/', 'x/../', '../../')]
    here, there = Gallery(made_by='t'), Gallery.open(tmp_path/'g', made_by='t')
    for _ in range(20):
        monkeypatch.chdir(rng.choice([tmp_path/'a', tmp_path/'a/b', tmp_path]))
        i = rng.sample(range(len(names)), rng.randrange(1, 6))
        items = [ReIDImage(Path(names[j]), j, 1, 0) for j in i]
        assert here.add(items, feats=feats(len(names))[i]) == there.add(items, feats=feats(len(names))[i])
        same(here, there)
        if rng.random() < .3: there = Gallery.open(tmp_path/'g')


def test_damage(tmp_path):
    "A bit that flips anywhere, or a file that ends early or is gone: one line, or no difference."
    g = Gallery.open(tmp_path/'g', made_by='t')
    for s in range(3): g.add(records(30, s), feats=feats(30, s))
    want, rng = (g.rows(range(90)), list(g.items), g.made_by), random.Random(0)
    for f in sorted((tmp_path/'g').iterdir()):
        data = f.read_bytes()
        def spoiled():
            for _ in range(25):
                at = rng.randrange(len(data))
                yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at+1:]
            yield from (data[:-1], data[:len(data)//2], b'', None)
        for bad in spoiled():
            f.unlink()
            if bad is not None: f.write_bytes(bad)
            try:
                h = Gallery.load(tmp_path/'g')
                h.search(feats(2), k=90)
                assert torch.equal(h.rows(range(90)), want[0]) and list(h.items) == want[1] and h.made_by == want[2]
                wrong = 'sums' not in f.name or bad is None
            except DataError as e: wrong = '\n' in str(e)
            assert not wrong, (f.name, bad)
        f.write_bytes(data)
    same(g, Gallery.load(tmp_path/'g'))


META = dict(made_by='t', size=None, ir_range=None, dtype='float32')

def row(n): return np.random.default_rng(n).standard_normal(64, np.float32)

def adds_for_ever(folder, said):
    "What a process does until it is killed: NumPy alone, so that it can be forked."
    s = Store(folder)
    known = StoredNames(s)
    while True:
        n = int(StoredItems(s)[s.n-1].path.stem) + 1 if s.n else 0
        new = range(n, n + 1 + n%30)
        s.append(np.stack([row(i) for i in new]), [ReIDImage(Path(f'{i}.jpg'), i, 1, 0) for i in new], META, known)
        os.write(said, f'{new.stop}\n'.encode())
        if s.n > 100: s.keep([i for i in range(s.n) if i != 50], META)
        os.write(said, f'{new.stop}\n'.encode())

@pytest.mark.skipif('fork' not in get_all_start_methods(), reason='no fork')
def test_killed(tmp_path):
    "What was said to be added is there after a kill at any moment, and what is there is right."
    store.write_store(tmp_path/'g', META)
    rng, last = random.Random(0), 0
    for kills in range(300):
        if kills >= 30 and last > 50: break  # a busy machine needs more of them to get there
        says, said = os.pipe()
        p = get_context('fork').Process(target=adds_for_ever, args=[tmp_path/'g', said])
        p.start()
        os.close(said)
        time.sleep(rng.random()*.1)
        p.kill()
        p.join()
        with open(says) as f: last = max([last, *(int(o) for o in f if o.endswith('\n'))])
        s = Store(tmp_path/'g')
        s.verify()
        names = [int(o.path.stem) for o in StoredItems(s)]
        assert len(names) == len(set(names)) and [o.pid for o in StoredItems(s)] == names and (not names or names[-1] + 1 >= last)
        assert names[:50] == list(range(len(names[:50]))) and all((x.numpy() == row(n)).all() for n, x in zip(names, s.rows(range(s.n))))
    assert last > 50


def test_refuses(tmp_path, monkeypatch):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'letter.txt').touch()
    g = Gallery(made_by='t')
    g.add(records(5), feats=feats(5))
    with pytest.raises(ConfigError, match='letter.txt'): g.save(tmp_path/'mine')
    with pytest.raises(ConfigError, match='letter.txt'): Gallery.open(tmp_path/'mine')
    with pytest.raises(DataError, match='no gallery'): Gallery.load(tmp_path/'mine')
    assert [o.name for o in (tmp_path/'mine').iterdir()] == ['letter.txt']
    with pytest.raises(ConfigError, match='.npz'): g.save(tmp_path/'g.pkl')
    g.save(tmp_path/'g')
    with pytest.raises(ConfigError, match='float32'): Gallery.open(tmp_path/'g', dtype=torch.float16)
    with pytest.raises(CheckpointError, match='another model'): Gallery.open(tmp_path/'g', made_by='u')
    with pytest.raises(ConfigError, match='sise'): Gallery.open(tmp_path/'g', sise=3)
    h = Gallery.load(tmp_path/'g')
    with pytest.raises(CheckpointError, match='dimensions'): h.add(records(1, 3), feats=torch.ones(1, 3))
    h.remove(range(5))
    assert len(h) == 0 and h.dim is None and h.add(records(1, 3), feats=torch.ones(1, 3)) == 1
    def full(*_): raise OSError(28, 'No space left on device', 'g')
    monkeypatch.setattr(store_files, '_append', full)
    with pytest.raises(OSError): h.add(records(2, 4), feats=torch.ones(2, 3))
    assert len(h) == 1 and len(Gallery.load(tmp_path/'g')) == 1


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='who may do everything')
def test_a_folder_that_can_only_be_read(tmp_path):
    g = Gallery.open(tmp_path/'g', made_by='t')
    g.add(records(9), feats=feats(9))
    for f in (tmp_path/'g').iterdir(): f.chmod(0o444)
    (tmp_path/'g').chmod(0o555)
    h = Gallery.load(tmp_path/'g')
    assert h.search(feats(1))[0]
    with pytest.raises(ConfigError, match='cannot be written'): h.add(records(1, 3), feats=feats(1))
    (tmp_path/'g').chmod(0o755)


def test_on_a_device(tmp_path, device):
    g = Gallery.open(tmp_path/'g', made_by='t', device=device)
    here = Gallery(made_by='t', device=device)
    for s in range(3):
        for o in (g, here): o.add(records(40, s), feats=feats(40, s))
        assert g.search(feats(3, 9), k=9) == here.search(feats(3, 9), k=9) and g.rows([5]).device.type == g.device.type


def test_a_folder_that_lost_its_head(tmp_path):
    "Its features may be all that somebody has."
    g = Gallery.open(tmp_path/'g', made_by='somebody')
    g.add([ReIDImage(Path('a.jpg'), 0, 0, 0)], feats=torch.ones(1, 4))
    (tmp_path/'g'/'head.json').unlink()
    before = sorted(o.name for o in (tmp_path/'g').iterdir())
    with pytest.raises(DataError, match='but no head.json'): Gallery.open(tmp_path/'g', made_by='somebody')
    assert sorted(o.name for o in (tmp_path/'g').iterdir()) == before
