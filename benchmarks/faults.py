"""What happens to damaged files and to lists of nonsense: one table of how each case ended.

    python benchmarks/faults.py [--flips 40] [--cases 300] [--kills 50] [--seed 0]

A case is *fine* where the result is what it is without the damage, or *one line* where a TMPAError says what is wrong.
What must not be: a *traceback*, a *wrong* result without a word, a *hang* of more than ten seconds, or something *lost*
that was written before. The command ends with 1 where there is any. `tests/test_damage.py` runs a few of each.
"""
import argparse, os, random, signal, subprocess, sys, tempfile, time, warnings
from collections import Counter
from pathlib import Path

import numpy as np, torch

from tmpa.core import ReIDImage, TMPAError, leftovers, remove_dead
from tmpa.data.external import csv_items, llcm_items, regdb_items, sysu_items
from tmpa.evaluation import cross_settings_of
from tmpa.features import load_features, save_features
from tmpa.files import load_torch
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, save_weights
from tmpa.search import Gallery

ENDS = 'fine', 'one line', 'traceback', 'wrong', 'hang', 'lost'
BAD = ENDS[2:]


class Hang(BaseException): "Ten seconds are over."

def outcome(f, same):
    "How a call ends, and what it said; `same` says whether its result is right."
    def stop(*_): raise Hang
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            r = f()
            return ('fine', '') if same(r) else ('wrong', repr(r)[:200])
    except TMPAError as e: return ('one line' if '\n' not in str(e) and len(str(e)) <= 2005 else 'traceback'), str(e)
    except Hang: return 'hang', ''
    except Exception as e: return 'traceback', f'{type(e).__name__}: {e}'
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- Flipped bits ------------------------------------------------------------------------------------------------------

def _bytes(r):
    "What was read, as bytes that can be compared."
    if isinstance(r, dict): return repr([(k, _bytes(v)) for k, v in r.items()]).encode()
    if isinstance(r, (list, tuple)): return repr([_bytes(v) for v in r]).encode()
    if torch.is_tensor(r): r = r.detach().cpu().numpy()
    return f'{r.dtype} {r.shape}'.encode() + r.tobytes() if isinstance(r, np.ndarray) else repr(r).encode()

def _weights(f):
    net = load_tmpa(f)
    return net.meta, net.state_dict()

def _gallery(f):
    g = Gallery.load(f)
    return g.rows(range(len(g))), g.items, g.made_by, g.size, g.ir_range, g.dim

def files(folder):
    "One file of each kind, and how it is read."
    torch.manual_seed(0)
    folder = Path(folder)
    x, pids = torch.randn(40, 24), torch.arange(40)//4
    for kind in ('npz', 'pt', 'mat'): save_features(folder/f'x.{kind}', x, pids, pids%6 + 1, pids%2)
    g = Gallery(made_by='test')
    g.add([ReIDImage(Path(f'{i}.jpg'), int(p), 1, 0) for i, p in enumerate(pids)], feats=x)
    g.save(folder/'g.npz')
    save_weights(TMPANet(5, micro_resnet, pretrained=False), folder/'last.pth', trial='1', size=[48, 24])
    torch.save(dict(epoch=1, model=dict(w=x), random=dict(python=tuple(range(600)))), folder/'resume.pth')
    return {folder/'x.npz': load_features, folder/'x.pt': load_features, folder/'x.mat': load_features,
            folder/'g.npz': _gallery, folder/'last.pth': _weights, folder/'resume.pth': load_torch}

def flips(folder, n, seed=0):
    "Flip one bit at `n` places of each file; yields (name, end, what was said)."
    rng = random.Random(seed)
    for f, read in files(folder).items():
        data, want = f.read_bytes(), _bytes(read(f))
        bad = f.with_name(f'bad{f.suffix}')
        for _ in range(n):
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            bad.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at+1:])
            yield f'bit {f.name}', *outcome(lambda: read(bad), lambda r: _bytes(r) == want)


# --- Lists of nonsense -------------------------------------------------------------------------------------------------

WORDS = ['²', '٣', '9'*5000, '1' + '0'*22, '-1', '1.5', 'nan', '', ' ', '0x1', '1e3', '\0', 'ä'*200, 'n'*300, '../'*50, '/', '.',
         '"', '"' + 'q'*200_000, 'x'*200_000, ',', ';', '\r', '\n\n', '\ufeff', '\udcfc', '2147483648', '9223372036854775808', '=1+1']

def _tree(root, kind):
    "A small data set; the text files in it, and how it is read."
    def touch(*names):
        for o in names:
            (root/o).parent.mkdir(parents=True, exist_ok=True)
            (root/o).touch()
    def write(name, text):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(text)
        return root/name
    ids = 1, 2, 3
    if kind == 'csv':
        touch(*(f'im/{p}_{m}.png' for p in ids for m in 'vi'))
        rows = ''.join(f'im/{p}_{m[0]},{p},{1 + (m[0] == "i")},{m},train\n'.replace(',', '.png,', 1) for p in ids for m in ('visible', 'infrared'))
        return [write('items.csv', 'file,pid,cam,modality,split\n' + rows)], lambda: csv_items(root/'items.csv')
    if kind == 'regdb':
        touch(*(f'{m}/{p}/{i}.bmp' for m in ('Visible', 'Thermal') for p in ids for i in range(2)))
        return [write(f'idx/train_{m.lower()}_1.txt', ''.join(f'{m}/{p}/{i}.bmp {p-1}\n' for p in ids for i in range(2)))
                for m in ('Visible', 'Thermal')], lambda: regdb_items(root, 1, 'train')
    if kind == 'llcm':
        touch(*(f'test_{m}/cam{c}/{p:04d}/{p:04d}_c0{c}_{m}.jpg' for m in ('vis', 'nir') for p in ids for c in (1, 2)))
        return [write('idx/test_id.txt', '1,2,3')], lambda: llcm_items(root, 'test')
    touch(*(f'cam{c}/{p:04d}/{i:04d}.jpg' for c in range(1, 7) for p in ids for i in (1, 2)))
    return [write('exp/test_id.txt', '1,2,3\n')], lambda: sysu_items(root, 'test')

def _spoil_text(f, rng):
    "Something else in a list: a word, a line, its end, or its bytes."
    text = f.read_text(encoding='utf8', errors='surrogateescape')
    at, word = rng.randrange(len(text) + 1), rng.choice(WORDS)
    lines = text.splitlines(keepends=True) or ['\n']
    how = rng.choice(['insert', 'replace', 'cell', 'cut', 'twice', 'bytes'])
    if how == 'insert': text = text[:at] + word + text[at:]
    if how == 'replace': text = text[:at] + word + text[at + rng.randrange(1, 20):]
    if how == 'cut': text = text[:at]
    if how == 'twice': text = ''.join(lines + [rng.choice(lines)])
    if how == 'cell':
        i, sep = rng.randrange(len(lines)), ',' if ',' in text else ' '
        cells = lines[i].rstrip('\n').split(sep)
        cells[rng.randrange(len(cells))] = word
        lines[i] = sep.join(cells) + '\n'
        text = ''.join(lines)
    data = text.encode('utf8', 'surrogateescape')
    if how == 'bytes': data = data[:at] + rng.randbytes(rng.randrange(1, 8)) + data[at:]
    f.write_bytes(data)

def _spoil_place(root, texts, rng):
    "Something else in the place of a file or folder."
    every = [p for p in root.rglob('*') if p not in texts]
    p, how = rng.choice([*texts, *texts, *every]), rng.choice(['gone', 'pipe', 'loop', 'dangling', 'file', 'folder', 'empty'])
    if p.is_dir(): p.rename(root.parent/f'aside-{rng.random()}')
    else: p.unlink()
    if how == 'pipe': os.mkfifo(p)
    if how == 'loop': p.symlink_to(p.name)
    if how == 'dangling': p.symlink_to('nowhere')
    if how in ('file', 'empty'): p.write_bytes(b'' if how == 'empty' else b'\xff\x00 1\n')
    if how == 'folder': p.mkdir()

def _records(items):
    "Whether records are such that everything after the reader works with them."
    numbers = np.array([(o.pid, o.cam, o.modality) for o in items])
    cross_settings_of(numbers[:, 2])
    return numbers.dtype == np.int64 and len(items) > 0 and set(numbers[:, 2]) <= {0, 1} and len(str(items[0].path)) < 4096

def reader_cases(folder, n, seed=0):
    "Data sets with one thing or two that are not as they should be; yields (name, end, what was said)."
    rng = random.Random(seed)
    for i in range(n):
        root, kind = Path(folder)/f'{i}'/'data', rng.choice(['csv', 'regdb', 'llcm', 'sysu'])
        root.mkdir(parents=True)
        texts, read = _tree(root, kind)
        for _ in range(rng.choice([1, 1, 2])):
            if rng.random() < .7 and texts[0].is_file(): _spoil_text(rng.choice([f for f in texts if f.is_file()]), rng)
            else: _spoil_place(root, texts, rng)
        yield f'reader {kind}', *outcome(read, _records)


# --- Metadata and galleries that say something else --------------------------------------------------------------------

VALUES = [None, True, -1, 0, 1.5, 99, 10**9, 10**22, float('nan'), '', 'x', 'x'*10**5, [], [1], [1, 2], ['a', 'b'], {}, {'a': 1}]

def metadata(folder, n, seed=0):
    "Weights and galleries, whole, with another value in their metadata; a value that changes nothing there is fine."
    import json
    rng, folder = random.Random(seed), Path(folder)
    files(folder)
    stored, z = torch.load(folder/'last.pth', weights_only=True), dict(np.load(folder/'g.npz'))
    meta = json.loads(str(z['meta']))
    same, feats = stored['model'], z['feats0'].tobytes()
    for i in range(n):
        value = rng.choice(VALUES)
        if i % 2:
            k = rng.choice(['meta', *stored['meta']])
            file = {**stored, 'meta': value} if k == 'meta' else {**stored, 'meta': {**stored['meta'], k: value}}
            torch.save(file, folder/'bad.pth')
            yield 'metadata of weights', *outcome(lambda: load_tmpa(folder/'bad.pth').state_dict(),
                                                  lambda r: all(torch.equal(r[k], same[k]) for k in same))
        else:
            k = rng.choice(['meta', 'rows', 'labels', *meta])
            bad = dict(z)
            if k == 'rows': bad['feats0'] = z['feats0'][:rng.randrange(40)]
            elif k == 'labels': bad['numbers'] = z['numbers'][:, :rng.randrange(40)]
            else: bad['meta'] = np.array(json.dumps(value if k == 'meta' else {**meta, k: value}))
            np.savez(folder/'bad.npz', **bad)
            yield 'metadata of a gallery', *outcome(lambda: _gallery(folder/'bad.npz'), lambda r: r[0].numpy().tobytes() == feats)


# --- Kills -------------------------------------------------------------------------------------------------------------

_LOOP = '''import sys, torch
from tmpa.search import Gallery
g = Gallery.load(sys.argv[1])
while True:
    n = len(g)
    g.add([f'{n}.jpg'], 0, feats=torch.ones(1, 2**16)*n + 1)
    g.save(sys.argv[1])
    print(len(g), flush=True)'''

def kills(folder, n, seed=0):
    "Kill a process that adds to a gallery and saves it; what it said it saved is there, and nothing is left beside it."
    rng, f = random.Random(seed), Path(folder)/'g.npz'
    g = Gallery(made_by='test')
    g.add(['0.jpg'], 0, feats=torch.ones(1, 2**16))
    g.save(f)
    for _ in range(n):
        p = subprocess.Popen([sys.executable, '-c', _LOOP, f], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        said = [p.stdout.readline()]
        time.sleep(rng.random()*.3)
        p.kill()
        said = [o for o in said + p.stdout.readlines() if o.endswith('\n')]
        p.wait()
        p.stdout.close()
        end = outcome(lambda: len(Gallery.load(f)), lambda r: r >= int(said[-1]))
        left = leftovers(f)
        yield 'kill', *(('lost', end[1]) if end[0] != 'fine' else ('wrong', f'left: {left}') if left else end)


def table(rows):
    "The ends of each kind of case, as text."
    head, counts = ['', 'tried', *ENDS], {}
    for name, end, _ in rows: counts.setdefault(name, Counter())[end] += 1
    lines = [head] + [[name, str(sum(c.values())), *(str(c[e]) for e in ENDS)] for name, c in counts.items()]
    return '\n'.join('  '.join(c.ljust(24) if i == 0 else c.rjust(9) for i, c in enumerate(l)) for l in lines)

def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--flips', type=int, default=60, help='bits flipped in each of six kinds of file')
    p.add_argument('--cases', type=int, default=300, help='data sets with something wrong')
    p.add_argument('--meta', type=int, default=200, help='weights and galleries with other metadata')
    p.add_argument('--kills', type=int, default=50, help='processes killed while they write')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    rows = []
    for f, n in ((flips, a.flips), (reader_cases, a.cases), (metadata, a.meta), (kills, a.kills)):
        with tempfile.TemporaryDirectory() as d: rows += f(d, n, a.seed)
    print(table(rows))
    bad = [r for r in rows if r[1] in BAD]
    for name, end, said in bad: print(f'{end}: {name}: {said[:300]}')
    sys.exit(bool(bad))

if __name__ == '__main__': main()
