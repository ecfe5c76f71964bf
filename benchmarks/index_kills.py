"""Kills of `tmpa_index` at any moment: the gallery opens with all that was confirmed, and the same command goes on.

    python benchmarks/index_kills.py [--kills 100] [--seed 0]

Half of the kills hit an index in a `.npz` file, half one in a folder. The ends are those of `faults.py`; the command
ends with 1 where anything was lost or is wrong. A test runs a few.
"""
import argparse, os, random, re, select, shutil, signal, sys, tempfile, time
from pathlib import Path

import numpy as np, torch
from PIL import Image

from faults import BAD, outcome, table
from tmpa import commands, use
from tmpa.core import leftovers
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, save_weights
from tmpa.search import Gallery


def _people_to_index(folder, n):
    "Pictures of noise, and weights that nobody trained."
    rng, pictures = np.random.default_rng(0), Path(folder)/'pictures'
    pictures.mkdir()
    for i in range(n): Image.fromarray(rng.integers(0, 256, (48, 24, 3), np.uint8)).save(pictures/f'{i:03}.png')
    torch.manual_seed(0)
    save_weights(TMPANet(5, micro_resnet, pretrained=False), Path(folder)/'last.pth', size=[48, 24])
    return pictures, Path(folder)/'last.pth'

def _index(pictures, weights, out, fd):
    "A process that runs tmpa_index, with a save twenty times a second; its number."
    if pid := os.fork(): return pid
    try:
        os.dup2(fd, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stdout = open(1, 'w', closefd=False)  # not what pytest or a notebook has put in its place
        torch.set_num_threads(1)  # or it would wait for threads that a forked process does not have
        commands.SAVE_EVERY = .05
        use.tmpa_index(str(pictures), weights=str(weights), modality='visible', out=str(out), bs=4, quiet=True)
        sys.stdout.flush()
        os._exit(0)
    finally: os._exit(1)

def index_kills(folder, n, seed=0, images=400, suffix='.npz'):
    "Kill `tmpa_index` at any moment and start it again: is there what it said? Yields (name, end, what was said)."
    rng, f = random.Random(seed), Path(folder)/f'g{suffix}'
    pictures, weights = _people_to_index(folder, images)
    whole = Gallery.from_weights(weights)
    whole.add(pictures, modality=0)
    want, killed = whole.rows(range(images)), 0
    while killed < n:
        if f.exists() and len(Gallery.load(f)) == images:  # once more from the start
            if f.is_dir(): shutil.rmtree(f)
            else: f.unlink()
        r, w = os.pipe()
        pid = _index(pictures, weights, f, w)
        os.close(w)
        said = open(r, 'rb', buffering=0)
        if rng.random() < .8: select.select([said], [], [], 10)  # most while it adds and saves, some before
        time.sleep(rng.random()*rng.choice([.1, 2]))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])  # it may have been at its end
        with said: lines = re.findall(rb'^(?:.*, )?([\d,]+) images are in .*\n', said.readall(), re.M)
        confirmed = int(lines[-1].replace(b',', b'')) if lines else 0
        def there():
            g = Gallery.load(f) if f.exists() else Gallery()
            return len(g), [o.path.name for o in g.items], g.rows(range(len(g)))
        def same(r):
            n, names, rows = r
            right = names == [f'{i:03}.png' for i in range(n)] and (not n or torch.allclose(rows, want[:n], atol=1e-5))
            return n >= confirmed and right
        end = outcome(there, same)
        left = [] if f.is_dir() else leftovers(f)
        if end[0] != 'fine': end = 'lost', end[1]
        elif left: end = 'wrong', f'left: {left}'
        yield f'kill of an index{suffix}', *end


def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--kills', type=int, default=100)
    p.add_argument('--seed', type=int, default=0)
    a, rows = p.parse_args(), []
    for suffix, n in (('.npz', a.kills - a.kills//2), ('', a.kills//2)):
        with tempfile.TemporaryDirectory() as d: rows += index_kills(d, n, a.seed, suffix=suffix)
    print(table(rows))
    bad = [r for r in rows if r[1] in BAD]
    for name, end, said in bad: print(f'{end}: {name}: {said[:300]}')
    sys.exit(bool(bad))

if __name__ == '__main__': main()
