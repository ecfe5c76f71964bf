"""Speed and memory of the evaluation, side by side with what it replaces; one thread.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py            all three parts, about three minutes
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py small      3,803 x 301 distances against a loop over queries
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py large      5,000 x 50,000 features against the matrix product alone
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py growth     up to 5,000 x 200,000

The contestants take turns, and the ratio is taken turn by turn, so that a busy machine disturbs both. Times are those of the process on the processor: on a machine of one's own they are the clock's.
"""
import os, sys
os.environ.setdefault('OMP_NUM_THREADS', '1')
import threading, time
import numpy as np, torch
from tmpa.evaluation import cmc_map, cmc_map_slow, evaluate

torch.set_num_threads(1)

def published_loop(dist, q_pids, g_pids, q_cams, g_cams, max_rank=20):
    "SYSU-MM01's rule the way scripts in the field compute it: sort everything, then walk down each list."
    order = np.argsort(dist, axis=1, kind='stable')
    names = g_pids[order]
    hits = (names == q_pids[:,None]).astype(np.int32)
    cmcs, aps, inps = [], [], []
    for i in range(len(dist)):
        keep = ~((q_cams[i] == 3) & (g_cams[order[i]] == 2))
        seen = names[i][keep]
        hit = hits[i][keep]
        if not hit.any(): continue
        ids = [seen[k] for k in sorted(np.unique(seen, return_index=True)[1])]
        cmc = (np.array(ids) == q_pids[i]).cumsum()[:max_rank]
        cmcs.append(np.r_[cmc, np.full(max_rank - len(cmc), cmc[-1])])
        run = hit.cumsum()
        last = np.flatnonzero(hit)[-1]
        inps.append(run[last]/(last + 1.))
        precision = np.asarray([x/(k + 1.) for k,x in enumerate(run)])
        aps.append((precision*hit).sum()/hit.sum())
    return np.mean(cmcs, axis=0), np.mean(aps), np.mean(inps)

def argsort_version(dist, q_pids, g_pids, q_cams, g_cams):
    "AP and INP with one full sort and cumulative sums, without a loop."
    d = np.where((q_cams == 3)[:,None] & (g_cams == 2), np.inf, dist)
    order = np.argsort(d, axis=1, kind='stable')
    hit = (g_pids[order] == q_pids[:,None]) & np.isfinite(np.take_along_axis(d, order, 1))
    run, n = hit.cumsum(1), hit.sum(1)
    rank = np.arange(1, d.shape[1] + 1)
    ok = n > 0
    ap = ((run/rank)*hit).sum(1)[ok]/n[ok]
    return ap.mean(), (n[ok]/(hit*rank).max(1)[ok]).mean()

def timed(f):
    t = time.process_time()
    r = f()
    return time.process_time() - t, r

def spread(x): return f'{np.median(x):.4g} ({min(x):.4g} to {max(x):.4g})'

def turns(n, base, **others):
    "Ratios base/other, turn by turn."
    ts = {k: [] for k in ('base', *others)}
    for f in (base, *others.values()): f()
    for _ in range(n):
        for k,f in (('base', base), *others.items()): ts[k].append(timed(f)[0])
    return ts

def features(n_q, n_g, n_id, dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(n_id, dim, generator=g)
    q_pids, g_pids = (torch.randint(0, n_id, (n,), generator=g) for n in (n_q, n_g))
    q, x = (centre[p] + 3*torch.randn(len(p), dim, generator=g) for p in (q_pids, g_pids))
    q_cams, g_cams = torch.where(torch.rand(n_q, generator=g) < .5, 3, 6), torch.randint(1, 6, (n_g,), generator=g)
    return q, x, q_pids.numpy(), g_pids.numpy(), q_cams.numpy(), g_cams.numpy()

def small():
    n_id = 96
    q, g, q_pids, g_pids, q_cams, g_cams = features(3803, 301, n_id, 64)
    g_pids[:n_id] = np.arange(n_id)
    a = (-q@g.T).numpy(), q_pids, g_pids, q_cams, g_cams
    r, loop = cmc_map(*a, rule='sysu'), published_loop(*a)
    assert abs(r.mAP - loop[1]) < 1e-9 and np.abs(r.cmc - loop[0]).max() < 1e-9
    ts = turns(9, lambda: published_loop(*a), short=lambda: cmc_map_slow(*a, rule='sysu'), argsort=lambda: argsort_version(*a), tmpa=lambda: cmc_map(*a, rule='sysu'))
    print('3,803 x 301 distances, rule sysu: seconds, and how many times faster than the loop')
    for k,name in (('base', 'loop of published code'), ('short', 'shortest loop (cmc_map_slow)'), ('argsort', 'argsort and cumsum, no CMC'), ('tmpa', 'cmc_map')):
        print(f'  {name:30s} {spread(ts[k]):32s} x {spread(np.array(ts["base"])/ts[k])}')

def rss(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20

def peak(f):
    "Greatest growth of the process while `f` runs, MiB."
    base, top, stop = rss(), [0.], threading.Event()
    def watch():
        while not stop.wait(.002): top[0] = max(top[0], rss() - base)
    t = threading.Thread(target=watch); t.start()
    try: f()
    finally: stop.set(); t.join()
    return top[0]

def product(q, g, rows=256):
    "The distances and nothing else, in blocks that are forgotten."
    out = q.new_empty(rows, len(g))
    for i in range(0, len(q), rows): torch.mm(q[i:i+rows], g.T, out=out[:len(q[i:i+rows])])

def large(n=5):
    a = features(5000, 50_000, 5000, 512)
    print('5,000 x 50,000, dim 512: seconds, and times the matrix product alone')
    fs = {rule: (lambda rule=rule: evaluate(*a, rule=rule)) for rule in ('regdb', 'sysu', 'llcm', 'market')}
    ts = turns(n, lambda: product(*a[:2]), **fs)
    print(f'  {"product":8s} {spread(ts["base"])}')
    for k,f in fs.items(): print(f'  {k:8s} {spread(ts[k]):32s} x {spread(np.array(ts[k])/ts["base"]):28s} {peak(f):.0f} MiB above the inputs')

def growth():
    print('growth, dim 512, rule sysu: queries, gallery, seconds, nanoseconds for each pair')
    for n_q,n_g in ((625, 50_000), (1250, 50_000), (2500, 50_000), (5000, 50_000), (5000, 12_500), (5000, 25_000), (5000, 100_000), (5000, 200_000)):
        a = features(n_q, n_g, 5000, 512)
        t = min(timed(lambda: evaluate(*a, rule='sysu'))[0] for _ in range(2))
        print(f'  {n_q:6d} {n_g:8d} {t:8.2f} {1e9*t/n_q/n_g:6.1f}', flush=True)

if __name__ == '__main__':
    for part in sys.argv[1:] or ('small', 'large', 'growth'): dict(small=small, large=large, growth=growth)[part]()
