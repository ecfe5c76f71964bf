"""A large gallery: its size on disk, and how long it takes to open it, to add one image, and to search it; one thread.

    OMP_NUM_THREADS=1 python benchmarks/search.py [--rows 1000000] [--dim 512] [--out search.json]

The exact search takes turns with what it must not be much slower than, one product and `topk` over features in memory
(`q@x.T`), and the ratio is taken turn by turn, so that a busy machine disturbs both. Searches are timed by the time of
the process on the processor; opening, adding and writing, which wait for the disk, by the clock. The recall of FAISS is
the share of the ten exactly nearest images among its ten: for features in clusters, ten images a person, and for a
fifth as many without any structure.
"""
import os, sys
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse, json, platform, tempfile, time
from pathlib import Path

import numpy as np, torch

import tmpa
from tmpa.core import ReIDImage, atomic_write, user_path
from tmpa.search import Gallery

PROBES = 4, 16, 64

def features(n, dim, clusters, seed=0):
    "Rows of length one: people in 64 dimensions, with ten images each, or noise alone."
    g = torch.Generator().manual_seed(seed)
    if not clusters: return torch.nn.functional.normalize(torch.randn(n, dim, generator=g))
    world = torch.Generator().manual_seed(0)
    mix, rare = torch.randn(64, dim, generator=world), torch.randn(64, dim, generator=world)
    x = torch.empty(n, dim)
    for s in range(0, n, 10_000):
        pid = (torch.arange(s, min(s + 10_000, n)) + seed*7)//10
        who = torch.randn(len(pid)//10 + 2, 64, generator=torch.Generator().manual_seed(1000 + s))
        pose, noise = torch.randn(len(pid), 64, generator=g)@rare, torch.randn(len(pid), dim, generator=g)
        x[s:s+len(pid)] = who[pid - pid[0]]@mix + .6*pose + 4.8*noise
    return torch.nn.functional.normalize(x)

def records(start, n):
    return [ReIDImage(Path(f'/data/images/cam{i%6 + 1}/{i//10:07d}/{i:08d}.jpg'), i//10, i%6 + 1, i%2)
            for i in range(start, start + n)]

def clock(f, of=time.perf_counter):
    t = of()
    r = f()
    return of() - t, r

def turns(n, plain, ours):
    "Median seconds on the processor of both, and of their ratio."
    plain(), ours()
    t = np.array([[clock(f, time.process_time)[0] for f in (plain, ours)] for _ in range(n)])
    plain, ours = t.T
    times = dict(plain=np.median(plain), ours=np.median(ours), ratio=np.median(ours/plain),
                 low=(ours/plain).min(), high=(ours/plain).max())
    return dict(turns=n, **{k: float(v) for k, v in times.items()})

def fill(g, x):
    for s in range(0, len(x), 50_000): g.add(records(s, len(x[s:s+50_000])), feats=x[s:s+50_000])

def disk(folder, x):
    "Write a gallery, open it, add to it."
    g = Gallery.open(folder, made_by='benchmark')
    wrote = clock(lambda: fill(g, x))[0]
    size = sum(f.stat().st_size for f in Path(folder).iterdir())
    opened = [clock(lambda: Gallery.load(folder))[0] for _ in range(3)]
    g = Gallery.load(folder)
    one = [clock(lambda: g.add(records(len(x) + i, 1), feats=x[:1] + i + 1))[0] for i in range(10)]
    first, again = (clock(lambda: g.search(x[0]), time.process_time)[0] for _ in range(2))
    return dict(bytes=size, write=wrote, open=float(np.median(opened)), add_first=one[0],
                add_one=float(np.median(one[1:])), first_search=first, second_search=again)

def exact(folder, x, q, n):
    "Exact searches against the plain product, features in float32 and float16."
    g, rows = Gallery.load(folder), []
    half = Gallery(made_by='benchmark', dtype=torch.float16)
    fill(half, x)
    for stored, gallery in (('float32, in a folder', g), ('float16, in memory', half)):
        for m in (1, len(q)):
            many = n if m == 1 else max(3, n//5)
            r = turns(many, lambda: (q[:m]@x.T).topk(10), lambda: gallery.search(q[:m]))
            rows.append(dict(stored=stored, queries=m, **r))
            said = f"{r['ours']:.3f} s, plain {r['plain']:.3f} s, ratio {r['ratio']:.2f}"
            print(f'exact, {stored}, {m} queries: {said}', flush=True)
    return rows

def approximate(folder, q, name):
    "Recall and speed of FAISS beside the exact search."
    g, rows = Gallery.load(folder, index='faiss'), []
    build = clock(g.index.follow, time.process_time)[0]
    if g.index.inner is None: return []
    g.index.save()
    read = clock(Gallery.load(folder, index='faiss').index.follow)[0]
    truth = [{h.pos for h in o} for o in Gallery.load(folder).search(q)]
    one = clock(lambda: [Gallery.nearest(g, o[None]) for o in q[:3]], time.process_time)[0]/3
    for g.index.probes in PROBES:
        g.search(q[:2])
        each = clock(lambda: [g.search(o) for o in q[:20]], time.process_time)[0]/20
        every, found = clock(lambda: g.search(q), time.process_time)
        recall = float(np.mean([len(t & {h.pos for h in o})/10 for t, o in zip(truth, found)]))
        lists, size = g.index.inner.nlist, next(Path(folder).glob('index*')).stat().st_size
        rows.append(dict(features=name, rows=len(g), lists=lists, probes=g.index.probes, recall=recall, one=each,
                         together=every, queries=len(q), exact_one=one, build=build, read=read, bytes=size))
        print(f'FAISS, {name}, {g.index.probes} of {lists} lists: recall@10 {recall:.3f}, {1000*each:.1f} ms a query, '
              f'exact {1000*one:.0f} ms', flush=True)
    return rows

def processor():
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: lines = []
    names = (o.partition(':')[2].strip() for o in lines if o.startswith('model name'))
    return next(names, platform.machine())

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--rows', type=int, default=1_000_000)
    p.add_argument('--dim', type=int, default=512)
    p.add_argument('--queries', type=int, default=100)
    p.add_argument('--turns', type=int, default=15)
    p.add_argument('--folder', help='where to write the galleries (default: a temporary folder)')
    p.add_argument('--no_faiss', action='store_true')
    p.add_argument('--out', help='a JSON file')
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        x, q = features(a.rows, a.dim, True), features(10*a.queries, a.dim, True, 1)[::10]
        r = dict(rows=a.rows, dim=a.dim, processor=processor(), threads=1, cores=os.cpu_count(),
                 versions=dict(tmpa=tmpa.__version__, torch=torch.__version__), made=time.strftime('%Y-%m-%d'),
                 disk=disk(f'{d}/people', x))
        print({k: round(v, 4) for k, v in r['disk'].items()}, flush=True)
        r['exact'] = exact(f'{d}/people', x, q, a.turns)
        r['faiss'] = []
        del x
        if not a.no_faiss:
            r['faiss'] += approximate(f'{d}/people', q, 'people')
            noise, n = features(a.rows//5, a.dim, False), a.rows//5
            disk(f'{d}/noise', noise)
            r['faiss'] += approximate(f'{d}/noise', features(a.queries, a.dim, False, 1), 'noise')
    if a.out:
        with atomic_write(user_path(a.out)) as tmp: tmp.write_text(json.dumps(r, indent=1) + '\n')
    return r

if __name__ == '__main__': main()
