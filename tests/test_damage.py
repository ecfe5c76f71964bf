"""What a disk, a user or a killed process leaves: pipes, leftovers, flipped bits, and lists of nonsense."""
import os, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np, pytest, torch

from tmpa.core import CheckpointError, DataError, TMPAError, atomic_write, leftovers, regular_file, remove_dead
from tmpa.data.cache import image_cache
from tmpa.data.external import csv_items, load_perms, regdb_items, sysu_items
from tmpa.data.image import read_image
from tmpa.data.synthetic import make_regdb, make_sysu
from tmpa.features import load_features
from tmpa.models.tmpa import load_weights, read_meta
from tmpa.search import Gallery


def line(e):
    "An error that is one line, of a length that can be read."
    text = str(e.value)
    assert '\n' not in text and len(text) <= 2005, text
    return text

def within(seconds, f):
    "What `f` raises; a hang fails."
    def stop(*_): raise AssertionError('it hangs')
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        with pytest.raises(TMPAError) as e: f()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return line(e)


# --- Pipes -------------------------------------------------------------------------------------------------------------

def index_of_pipes(d):
    "A data set in RegDB's shape whose index files are pipes."
    for o in ('Visible', 'Thermal', 'idx'): (d/o).mkdir()
    os.mkfifo(d/'idx'/'train_visible_1.txt')
    return d

READS = {
    'x.jpg': read_image, 'x.ppm': read_image, 'items.csv': csv_items, 'x.npz': load_features, 'x.pt': load_features,
    'x.mat': load_features, 'g.npz': Gallery.load, 'last.pth': read_meta, 'rand_perm_cam.mat': load_perms,
    'table.csv': lambda f: make_sysu(f.parent/'people', f),
}

@pytest.mark.parametrize('name', READS)
def test_a_pipe_is_no_file(tmp_path, name):
    os.mkfifo(tmp_path/name)
    text = within(5, lambda: READS[name](tmp_path/name))
    assert name in text and ('pipe' in text or 'no such file' in text)

def test_pipes_of_a_data_set(tmp_path):
    (tmp_path/'r').mkdir(); (tmp_path/'s'/'exp').mkdir(parents=True)
    os.mkfifo(tmp_path/'s'/'exp'/'test_id.txt')
    assert 'pipe' in within(5, lambda: regdb_items(index_of_pipes(tmp_path/'r'), 1, 'train'))
    assert 'pipe' in within(5, lambda: sysu_items(tmp_path/'s', 'test'))
    os.mkfifo(tmp_path/'x.jpg')
    (tmp_path/'i.csv').write_text('file,pid,cam,modality,split\nx.jpg,1,1,visible,train\n')
    text = within(5, lambda: csv_items(tmp_path/'i.csv'))
    assert 'line 2' in text and 'pipe' in text

def test_a_cache_or_manifest_that_is_a_pipe(tmp_path):
    data = make_regdb(tmp_path/'people', n_ids=2, per_modality=1, size=(24, 12))
    items = regdb_items(data, 1, 'train')
    cache = image_cache(items, (24, 12), folder=tmp_path/'c')
    cache.file.unlink()
    os.mkfifo(cache.file)
    assert len(image_cache(items, (24, 12), folder=tmp_path/'c')) == len(items) and cache.file.is_file()
    (data/'manifest.json').unlink()
    os.mkfifo(data/'manifest.json')
    assert 'manifest.json' in within(5, lambda: make_regdb(data, n_ids=2, per_modality=1, size=(24, 12)))


# --- What killed processes leave ---------------------------------------------------------------------------------------

def start(code):
    "A process that has printed a line, as `code` does when it is in the middle of something."
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    return p

WRITES = 'import sys, time\nfrom tmpa.core import *\nwith {}({!r}) as t:\n  {}; print(flush=True); time.sleep(60)'

@pytest.mark.parametrize('how, f, fill', [('atomic_write', 'g.npz', "t.write_bytes(b'x'*1000)"), ('temp_folder', 'v1', "(t/'a').mkdir()")])
def test_the_next_writer_removes_what_the_dead_left_and_nothing_else(tmp_path, how, f, fill):
    mine = [tmp_path/o for o in ('.g-features.npz', '.g-abcd1234.npz', '.v1-mine0000', '.g-thesis.tmpa.npz')]
    for o in mine: o.write_text('mine')
    dead, living = (start(WRITES.format(how, str(tmp_path/f), fill)) for _ in range(2))
    try:
        assert len(leftovers(tmp_path/f, earlier=False)) == 2
        remove_dead(tmp_path/f)
        assert len(leftovers(tmp_path/f, earlier=False)) == 2
        dead.kill(); dead.wait()
        remove_dead(tmp_path/f)
        assert len(leftovers(tmp_path/f, earlier=False)) == 1 and all(o.read_text() == 'mine' for o in mine)
    finally:
        for p in (dead, living): p.kill(); p.wait(); p.stdout.close()
    remove_dead(tmp_path/f)
    assert not leftovers(tmp_path/f, earlier=False) and sorted(tmp_path.iterdir()) == sorted(mine)

def test_galleries_and_rendered_people_clean_up(tmp_path):
    g = Gallery(made_by='test')
    g.add(['a.jpg'], 0, feats=torch.ones(1, 4))
    for f in ('.g-abcd1234.tmpa.npz', '.h-abcd1234.tmpa.npz'): (tmp_path/f).touch()
    (tmp_path/'.v1-abcd1234.tmpa'/'Visible').mkdir(parents=True)
    g.save(tmp_path/'g.npz')
    assert not (tmp_path/'.g-abcd1234.tmpa.npz').exists() and (tmp_path/'.h-abcd1234.tmpa.npz').exists()
    (tmp_path/'.g-abcd1234.tmpa.npz').touch()
    Gallery.load(tmp_path/'g.npz')
    assert not (tmp_path/'.g-abcd1234.tmpa.npz').exists()
    make_regdb(tmp_path/'v1', n_ids=2, per_modality=1, size=(24, 12))
    assert not (tmp_path/'.v1-abcd1234.tmpa').exists()
    assert not {o.name for o in tmp_path.iterdir()} - {'g.npz', '.h-abcd1234.tmpa.npz', 'v1'}

def test_writers_side_by_side(tmp_path):
    "Four threads write one file and clean up after each other: each write succeeds, and nothing is left."
    def write(i):
        for _ in range(50):
            with atomic_write(tmp_path/'a.txt') as t: t.write_text(str(i)*1000)
    errors, before = [], threading.excepthook
    threading.excepthook = lambda o: errors.append(o.exc_value)
    try:
        ts = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for t in ts: t.start()
        for t in ts: t.join()
    finally: threading.excepthook = before
    assert not errors and len(set((tmp_path/'a.txt').read_text())) == 1 and not leftovers(tmp_path/'a.txt')

def test_names_that_hardly_fit(tmp_path):
    for name in ('n'*251 + '.txt', 'ä'*125 + '.txt'):
        with atomic_write(tmp_path/name) as t: t.write_text('whole')
        assert (tmp_path/name).read_text() == 'whole'
    with pytest.raises(TMPAError) as e: atomic_write(tmp_path/('n'*300)/'a.txt').__enter__()
    assert 'too long' in line(e)
