"""What happens to damaged files, lists of nonsense and killed processes: one table of how each case ended.

    python benchmarks/faults.py [--flips 60] [--cases 300] [--meta 200] [--edits 100] [--kills 50] [--every 1]

A case is *fine* where the result is what it is without the damage, or *one line* where a TMPAError says what is wrong.
What must not be: a *traceback*, a *wrong* result without a word, a *hang* of more than ten seconds, or something *lost*
that was written before. The command ends with 1 where there is any. `tests/test_damage.py` runs a few of each.
"""
import argparse, io, itertools, json, os, random, shutil, signal, subprocess, sys, tempfile, time, warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np, torch

from tmpa.console import one_line_errors
from tmpa.core import ReIDImage, TMPAError, leftovers
from tmpa.data.cache import image_cache
from tmpa.data.readers import csv_items, llcm_items, regdb_items, sysu_items
from tmpa.data.synthetic import make_regdb
from tmpa.demo import compare, demo_rows, summary_table
from tmpa.evaluation import cross_settings_of
from tmpa.callback.run import Watch
from tmpa.experiment import train_run
from tmpa.features import load_features, save_features
from tmpa.files import load_torch
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, load_tmpa, save_weights
from tmpa.recipes import get_recipe
from tmpa.results import score_table
from tmpa.reproduce import pick_tables, reproduce
from tmpa.run import RunConfig
from tmpa.run_files import write_json
from tmpa.data.datasets import DataSpec
from tmpa.search import Gallery
from tmpa.setup import make_setup

ENDS = 'fine', 'one line', 'traceback', 'wrong', 'hang', 'lost'
BAD = ENDS[2:]


class Hang(BaseException): "Ten seconds are over."

def outcome(f, same, seconds=10):
    "How a call ends, and what it said; `same` says whether its result is right."
    def stop(*_): raise Hang
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
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



# --- Kills at every event of a file ------------------------------------------------------------------------------------

_CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod'}

def _count_events(kill_at):
    "Count what this process does to files from now on, and kill it just before one; returns how to ask."
    seen = [0]
    def happens():
        seen[0] += 1
        if seen[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, args):
        opened = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if opened and not str(args[0]).startswith('/dev/') or event in _CHANGES: happens()
    fsync = os.fsync
    def counted(fd):
        happens()
        return fsync(fd)
    sys.addaudithook(hook)
    os.fsync = counted
    return lambda: seen[0]

def _child(work, kill_at=None, after=None, setup=None):
    "Do some work in a process of its own, perhaps killed at an event or after some seconds; events, or None: killed."
    get, put = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            for fd in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
            if setup: setup()
            seen = _count_events(kill_at)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                work()
            os.write(put, str(seen()).encode())
        except BaseException as e: os.write(put, f'{type(e).__name__}: {e}'[:2000].encode())
        finally: os._exit(1)
    os.close(put)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(get) as f: said = f.read()
    _, status = os.waitpid(pid, 0)
    if said and not said.isdigit(): raise RuntimeError(f'the work failed, though nobody had killed it: {said}')
    if not said and not os.WIFSIGNALED(status): raise RuntimeError('the work has ended without a word')
    return int(said) if said else None

class Work(NamedTuple):
    "Something that writes files."
    name: str
    begin: object           # Function of a folder: what is there before
    do: object              # Function of the folder: the work, which may be done again
    look: object            # Function of the folder: what came of it; a TMPAError where it is broken
    old_or_new: bool = True # Whether even a killed writer leaves what was there, or what was to be

def _put(d, x):
    "The files of the writers, with other numbers for another `x`."
    torch.manual_seed(x)
    g = Gallery(made_by='test')
    g.add([f'{i}.jpg' for i in range(4)], 0, feats=torch.randn(4, 8))
    g.save(d/'g.npz')
    save_weights(TMPANet(5, micro_resnet, pretrained=False), d/'last.pth')
    save_features(d/'x.npz', torch.randn(4, 8), torch.arange(4))
    write_json(d/'metrics.json', dict(scores=dict(a=x)))

def _stored(d):
    weights, gallery = _weights(d/'last.pth')[1], _gallery(d/'g.npz')[0]
    return _bytes([weights, gallery, load_features(d/'x.npz').feats, (d/'metrics.json').read_text()])

def _writers():
    "Each writer by itself, over a file that is there."
    def begin(d):
        _put(d, 0)
        (d/'new').mkdir()
        _put(d/'new', 1)
    how = dict(save_weights=('last.pth', lambda new, f: save_weights(load_tmpa(new), f)),
               save_gallery=('g.npz', lambda new, f: Gallery.load(new).save(f)),
               save_features=('x.npz', lambda new, f: save_features(f, *load_features(new)[:2])),
               write_json=('metrics.json', lambda new, f: write_json(f, json.loads(new.read_text()))))
    return [Work(k, begin, lambda d, name=name, f=f: f(d/'new'/name, d/name), _stored) for k, (name, f) in how.items()]

def _all_bytes(d):
    return _bytes({str(f.relative_to(d)): f.read_bytes().hex() for f in sorted(d.rglob('*')) if f.is_file()})

def _people(d): return make_regdb(d/'people', n_ids=2, per_modality=1, size=(24, 12))

def _render():
    return Work('renderer', lambda d: None, _people, lambda d: _all_bytes(d/'people'), False)

def _decode():
    def do(d):
        items = regdb_items(d/'people', 1, 'train') + regdb_items(d/'people', 1, 'test')
        image_cache(items, (24, 12), folder=d/'images')
    def look(d):
        f, = (d/'images').glob('*.images')
        return f.read_bytes()[:4*3*24*12]  # what follows names the place of the images
    return Work('decoded images', _people, do, look, False)

MINE = 'notes.txt', 'train.log', '.config-thesis', '.last-features.pth', 'scores-mine.json'

def run_config(people, out, epochs=2):
    "A run of a second."
    how = dict(arch='micro_resnet', pretrained=False, epochs=epochs, lr=.03, P=4, K=2, num_workers=0)
    return RunConfig(get_recipe('B'), DataSpec('regdb', str(people), size=(48, 24)), str(out), **how)

def _trained(out):
    "What a run came to: its scores, the last weights, and which files it has."
    scores = json.loads((out/'metrics.json').read_text())['scores']
    return _bytes([sorted({f.name for f in out.iterdir()} - set(MINE)), repr(scores), _weights(out/'last.pth')[1]])

def _train(people):
    def do(d): train_run(run_config(people, d/'run'), quiet=True, resume=True, rank_figure=False)
    return Work('training', lambda d: None, do, lambda d: _trained(d/'run'), False)

def comparison(people, out):
    "A comparison of one row, as the text of its table."
    rows = demo_rows(['B'], 1, size=(48, 24))
    spec = DataSpec('synthetic', str(people), n_ids=16, size=(48, 24))
    kw = dict(arch='micro_resnet', pretrained=False, patch=8, P=4, K=2, lr=.03, num_workers=0)
    return str(summary_table(compare(rows, out, spec, resume=True, quiet=True, **kw)))

def tables(people, out, show=False):
    "A table of one row, as its text and the lines of its runs without their seconds."
    kw = dict(epochs=1, seeds=1, P=4, K=2, num_workers=0, cache=False)
    setup = make_setup('small', path=str(people), ids=16, size=(48, 24), **kw)
    f, = reproduce(pick_tables('table2'), setup, out, only=['B'], quiet=True, show=show)
    lines = [l.split(',') for l in (out/'results.csv').read_text().splitlines()]
    at = lines[0].index('seconds')
    return f.read_text() + '\n'.join(','.join(l[:at] + l[at+1:]) for l in lines)

def _compare(people):
    both = [lambda d: comparison(people, d/'run')]*2
    return Work('comparison', lambda d: None, *both, False)

def _reproduce(people):
    both = [lambda d: tables(people, d/'run')]*2
    return Work('tables', lambda d: None, *both, False)

def _works(folder, every, only):
    "What is killed, and at how many of its events: all, or every so manieth of the long ones."
    people, drawn = folder/'people', folder/'drawn'
    short = [*_writers(), _render(), _decode()]
    long = [(_train(people), every), (_compare(drawn), 5*every), (_reproduce(drawn), 5*every)]
    works = [(w, step) for w, step in [(w, max(1, every//4)) for w in short] + long if not only or w.name in only]
    names = {w.name for w, _ in works}
    if 'training' in names: make_regdb(people, n_ids=16, per_modality=2, size=(48, 24))
    if names & {'comparison', 'tables'}: make_regdb(drawn, n_ids=16, size=(48, 24))
    return works

def _after_kill(w, d, old, new):
    "What there is after a kill, and after the work is done again: end, and what was said."
    if w.old_or_new:
        end = outcome(lambda: w.look(d), lambda r: r in (old, new))
        if end[0] != 'fine': return 'lost', end[1]
    marks = 'config.json', 'setup.json', 'runs'
    begun = [d, *(d/'run' for o in marks if (d/'run'/o).exists())]  # a folder of yours alone is no run, and refused
    places = [place/name for place in begun for name in MINE]
    for f in places: f.write_text('mine')
    def again():
        with redirect_stdout(io.StringIO()): w.do(d)
        return w.look(d)
    end = outcome(again, lambda r: r == new, 60)
    if any(not f.exists() or f.read_text() != 'mine' for f in places): return 'lost', 'a file of the user'
    left = [str(f) for f in d.rglob('.*') if '.tmpa' in f.name]
    return ('wrong', f'left: {left}') if left and end[0] == 'fine' else end

def _one_kill(w, d, old, new, **how):
    d.mkdir()
    w.begin(d)
    _child(lambda: w.do(d), **how)
    end = _after_kill(w, d, old, new)
    if end[0] not in BAD: shutil.rmtree(d)
    return end

def _before_and_after(w, folder):
    "What a piece of work begins and ends with, and how many events it has."
    d = folder/f'{w.name} whole'
    d.mkdir()
    w.begin(d)
    old = w.look(d) if w.old_or_new else None
    return old, _child(lambda: w.do(d)), w.look(d)

def event_kills(folder, every=1, seed=0, only=None):
    "Kill each piece of work at its events; done again it must end as without the kill, and leave nothing behind."
    folder = Path(folder)
    for w, step in _works(folder, every, only):
        old, n, new = _before_and_after(w, folder)
        for i in range(1 + seed%step, n+1, step):
            end = _one_kill(w, folder/f'{w.name} {i}', old, new, kill_at=i)
            yield f'event: {w.name}', end[0], f'event {i}: {end[1]}'

def random_kills(folder, n, seed=0):
    "Kill a training at moments of the clock."
    rng, folder = random.Random(seed), Path(folder)
    make_regdb(folder/'people', n_ids=16, per_modality=2, size=(48, 24))
    w = _train(folder/'people')
    t = time.time()
    _, _, new = _before_and_after(w, folder)
    took = time.time() - t
    for i in range(n):
        after = rng.random()*took
        end = _one_kill(w, folder/f'{i}', None, new, after=after)
        yield 'kill: training', end[0], f'{after:.2f} s: {end[1]}'


# --- Edits of the files of runs ----------------------------------------------------------------------------------------

ODD = [None, True, -1, 1.5, 1e308, 10**22, float('nan'), '', 'x', 'x'*10**5, [], [1], ['a', {}], {}, {'a': 1}]
RUN_TEXTS = ['config.json', 'metrics.json', 'environment.json', 'image_files.csv', 'history.csv', 'queries.csv',
             'report.html']

class State(NamedTuple):
    "A folder of tmpa's, and how it is gone on with."
    name: str
    files: list  # Names of those that are edited
    go_on: object # Function of the folder: what it came to, as text

def _cut_off():
    "Killed in its second epoch."
    def after_batch(self):
        if self.epoch == 1: os.kill(os.getpid(), signal.SIGKILL)
    Watch.after_batch = after_batch

def states(folder):
    "A finished run, one that is cut off, one that is not scored, a comparison and tables."
    people, drawn = folder/'people', folder/'drawn'
    make_regdb(people, n_ids=16, per_modality=2, size=(48, 24))
    make_regdb(drawn, n_ids=16, size=(48, 24))
    def go_on(out):
        m = train_run(run_config(people, out), quiet=True, resume=True, rank_figure=False)
        return str(score_table(m['scores']))
    go_on(folder/'finished')
    _child(lambda: go_on(folder/'cut off'), setup=_cut_off)
    shutil.copytree(folder/'finished', folder/'not scored')
    (folder/'not scored'/'metrics.json').unlink()
    comparison(drawn, folder/'comparison')
    tables(drawn, folder/'tables')
    run, = (folder/'tables'/'runs').iterdir()
    of = run.name.removesuffix('0')
    ends = (1, 'over_budget', dict(budget=5., seconds=301.)), (2, 'failed', dict(error='DataError: no image'))
    for seed, name, d in ends:
        other = run.with_name(f'{of}{seed}')
        other.mkdir()
        config = {**json.loads((run/'config.json').read_text()), 'seed': seed, 'out': str(other)}
        write_json(other/'config.json', config)
        write_json(other/f'{name}.json', {**d, 'config': config})
    scores = json.loads((run/'metrics.json').read_text())['scores']
    write_json(run/'scores-0123abcd.json', dict(score=dict(part='up'), scores=scores))
    names = 'config.json', 'metrics.json', 'metrics.json', 'environment.json', 'scores-0123abcd.json'
    runs = [f'runs/{run.name}/{o}' for o in names]
    more = [f'runs/{of}1/over_budget.json', f'runs/{of}1/config.json', f'runs/{of}2/failed.json', 'results.csv']
    row = [f'b-seed0/{o}' for o in ('config.json', 'metrics.json', 'metrics.json', 'environment.json')]
    cut_off = ['config.json', 'environment.json', 'image_files.csv', 'history.csv'] + ['resume.pth']*3
    not_scored = ['config.json', 'environment.json', 'history.csv', 'report.html', 'queries.csv', 'last.pth']
    summary = ['setup.json', 'setup.json', 'results.csv', 'results.md', 'report.html', *row]
    return [State('finished', RUN_TEXTS + ['metrics.json']*2, go_on),
            State('cut off', cut_off, go_on),
            State('not scored', not_scored, go_on),
            State('comparison', summary, lambda out: comparison(drawn, out)),
            State('tables', runs + more, lambda out: tables(drawn, out, show=True))]

def _places(o, at=()):
    "Where there are values in nested dicts and lists."
    inside = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) and len(o) < 100 else ()
    for k, v in inside:
        yield (*at, k)
        yield from _places(v, (*at, k))

def _edit_value(o, rng):
    "Take out a value somewhere, or put another one in its place; says which."
    places = list(_places(o))
    *way, k = places[rng.randrange(len(places))]
    for step in way: o = o[step]
    if rng.random() < .3:
        del o[k]
        return f'{[*way, k]} gone'
    o[k] = rng.choice(ODD)
    return f'{[*way, k]} is {repr(o[k])[:40]}'

def _edit_file(f, rng):
    "Make something else of a file; says what."
    data, kind = f.read_bytes(), f.suffix
    hows = ['value']*8 if kind in ('.json', '.pth') else ['cell']*6
    how = rng.choice(hows + ['cut', 'empty', 'bytes', 'gone', 'folder', 'pipe', 'list', 'deep'])
    if how == 'value' and kind == '.json':
        d = json.loads(data)
        how = _edit_value(d, rng)
        f.write_text(json.dumps(d, indent=1))
    elif how == 'value':
        d = torch.load(f, weights_only=True)
        how = _edit_value(d, rng)
        torch.save(d, f)
    elif how == 'cell': _spoil_text(f, rng)
    elif how == 'cut': f.write_bytes(data[:rng.randrange(len(data))])
    elif how == 'bytes': f.write_bytes(data[:len(data)//2] + rng.randbytes(5) + data[len(data)//2:])
    elif how == 'list': f.write_text('[1, 2]')
    elif how == 'deep': f.write_text('{"a": ' + '['*100_000)
    elif how == 'empty': f.write_bytes(b'')
    else:
        f.unlink()
        if how == 'folder': f.mkdir()
        if how == 'pipe': os.mkfifo(f)
    return how

def _said_in_one_line(f):
    "What a function gives; what a command would say in one line, or a warning beside another result, is a TMPAError."
    err, got = io.StringIO(), []
    with warnings.catch_warnings(record=True) as warned, redirect_stderr(err), redirect_stdout(io.StringIO()):
        warnings.simplefilter('always', UserWarning)
        try: one_line_errors(lambda: got.append(f()))()
        except SystemExit:
            if len(err.getvalue().splitlines()) != 1: raise RuntimeError(err.getvalue()) from None
            raise TMPAError(err.getvalue()) from None
    return got[0], [str(w.message) for w in warned if issubclass(w.category, UserWarning)]

def _kept(out, before, edited, finished):
    "What is lost of what was there, apart from the file that was edited; weights may be made anew by what ends well."
    now = {f.read_bytes() for f in out.parent.rglob('*') if f.is_file()}
    for f, data in before.items():
        if f == edited or f.suffix != '.txt' and (finished or f.suffix != '.pth'): continue
        if data not in now: return str(f.relative_to(out))

def edits(folder, n, seed=0):
    "Edit one file of a folder of tmpa's, and go on with it: the same result, or one line, and nothing is lost."
    rng, folder = random.Random(seed), Path(folder)
    with redirect_stdout(io.StringIO()): all_states = states(folder)
    wants = {}
    for i in range(n):
        s, out = rng.choice(all_states), folder/f'case {i}'/'run'
        if s.name not in wants:
            shutil.copytree(folder/s.name, out.with_name('whole'))
            wants[s.name], _ = _said_in_one_line(lambda: s.go_on(out.with_name('whole')))
            shutil.rmtree(out.with_name('whole'))
        shutil.copytree(folder/s.name, out)
        (out/'notes.txt').write_text('mine')
        f = out/rng.choice(s.files)
        before = {o: o.read_bytes() for o in out.rglob('*') if o.is_file()}
        how = _edit_file(f, rng)
        edited = f.read_bytes() if f.is_file() else None
        want = None if (s.name, how) == ('tables', 'gone') else wants[s.name]  # a table of what is there
        def go_on():
            r, warned = _said_in_one_line(lambda: s.go_on(out))
            if warned and r != want: raise TMPAError(warned[0])
            return r
        end, said = outcome(go_on, lambda r: want in (r, None), 60)
        lost = _kept(out, before, f, end == 'fine')
        stays = edited is None or f.is_file() and f.read_bytes() == edited
        if end == 'one line' and not stays: lost = f'what was edited in {f.name}'
        if lost: end, said = 'lost', lost
        if end not in BAD: shutil.rmtree(out.parent)
        yield f'edit: {s.name}', end, f'{s.name}, {f.name}, {how}: {said}'


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
    p.add_argument('--edits', type=int, default=100, help='files of runs, comparisons and tables that are edited')
    p.add_argument('--kills', type=int, default=50, help='processes killed while they save, as many while they train')
    p.add_argument('--every', type=int, default=1, help='kill at every event of a file, or every so manieth; 0: none')
    p.add_argument('--works', default='', help='with --every: kill these alone, with commas; training, for instance')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # processes are forked, which takes one without threads
    torch.set_num_threads(1)
    def at_events(d, n, seed): return event_kills(d, n, seed, a.works.split(',') if a.works else None)
    bad, parts = False, [(flips, a.flips), (reader_cases, a.cases), (metadata, a.meta), (edits, a.edits),
                         (kills, a.kills), (random_kills, a.kills), (at_events, a.every)]
    for f, n in parts:
        with tempfile.TemporaryDirectory() as d: rows = list(f(d, n, a.seed)) if n else []
        if rows: print(table(rows), flush=True)  # at once: all of it takes a while
        for name, end, said in rows:
            if end in BAD: print(f'{end}: {name}: {said[:300]}', flush=True)
        bad = bad or any(r[1] in BAD for r in rows)
    sys.exit(bad)

if __name__ == '__main__': main()
