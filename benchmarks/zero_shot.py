"""Weights that have seen no photograph, on photographs of 50 real people; the infrared is *simulated*, see photographs.py.

Every image of one camera is searched in all images of the other, both ways, for all people and for two halves of
them, whose difference says how much the people matter.

    python benchmarks/zero_shot.py FOLDER rendered runs/rendered/last.pth --out runs/zero_shot
    python benchmarks/zero_shot.py FOLDER --train runs/rendered            # as tmpa_rendered, scored after every epoch
    python benchmarks/zero_shot.py FOLDER --start 5                        # trained on 30 of the people, from both starts
    python benchmarks/zero_shot.py FOLDER --renderers                      # both renderers, at equal compute
    python benchmarks/zero_shot.py FOLDER --recipes 3                      # the rows of table II, so many seeds of each
    python benchmarks/zero_shot.py FOLDER --sizes                          # networks of other sizes, other people
    python benchmarks/zero_shot.py FOLDER --start 5 --rows                 # the rows of table II, from the shipped weights

What ends early goes on where it was: finished rows stay in the table.
"""
import csv
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.torch_core import set_seed
from fastcore.script import Param, call_parse, store_true

sys.path.insert(0, str(Path(__file__).parent))
from photographs import prepare

from tmpa.data.load import ReIDDataLoaders
from tmpa.data.readers import csv_items, regdb_items
from tmpa.data.synthetic import make_regdb
from tmpa.data.transforms import ReIDAug
from tmpa.evaluation import evaluate
from tmpa.extract import extract_features
from tmpa.learner import reid_learner
from tmpa.models.backbone import get_arch, ibn_resnet
from tmpa.pretrain import Rendered, train_rendered
from tmpa.recipes import get_recipe
from tmpa.weights import open_weights
from tmpa.card import image_size

TABLE2 = 'B', 'B+CA', 'B+CA+PedMix', 'TMPA'
FIELDS = 'weights', 'people', 'v2i_R1', 'v2i_mAP', 'i2v_R1', 'i2v_mAP', 'mAP'


def halves(items):
    "All people, and two halves of them, drawn once and for all."
    pids = sorted({o.pid for o in items})
    a = set(np.random.default_rng(7).permutation(pids)[:len(pids)//2].tolist())
    return {'all': set(pids), 'half A': a, 'half B': set(pids) - a}


def both_ways(features, items):
    "Rank-1 and mAP in per cent, visible to infrared and back, and the mean of the two mAP."
    sides = [[i for i, o in enumerate(items) if o.modality == m] for m in (0, 1)]
    pids = np.array([o.pid for o in items])
    found = [evaluate(features[q], features[g], pids[q], pids[g]) for q, g in (sides, sides[::-1])]
    each = [round(100*float(x), 1) for r in found for x in (r.cmc[0], r.mAP)]
    return [*each, round(50*float(found[0].mAP + found[1].mAP), 1)]


def scores(model, items, size):
    "The scores of a network for all people and for each half."
    features = extract_features(model, items, size, num_workers=0)
    out = {}
    for name, pids in halves(items).items():
        some = [i for i, o in enumerate(items) if o.pid in pids]
        out[name] = both_ways(features[some], [items[i] for i in some])
    return out


def chance(items, draws=20):
    "The same for features by lot."
    rng, some = np.random.default_rng(0), halves(items)
    def one(pids):
        few = [o for o in items if o.pid in pids]
        lots = [both_ways(rng.standard_normal((len(few), 64)).astype(np.float32), few) for _ in range(draws)]
        return np.mean(lots, 0).round(1).tolist()
    return {name: one(pids) for name, pids in some.items()}


def write(path, head, rows):
    "A table as CSV, and on the console."
    with open(path, 'w', newline='') as f: csv.writer(f).writerows([head, *rows])
    for row in (head, *rows): print(*(f'{o!s:>9}' for o in row), flush=True)


def followed(items, folder, out):
    "Train the shipped weights, and score them after every epoch."
    config, rows = Rendered(), []
    def each(net, epoch):
        with torch.random.fork_rng(): found = scores(net, items, config.size)  # the training goes on as without
        rows.extend([epoch, k, *v] for k, v in found.items())
        write(out/'curve.csv', ('epoch', *FIELDS[1:]), rows)
    train_rendered(config, folder, 'cpu', each=each)


class Version1(Rendered):
    "The same training on people of the first renderer, 6 photographs of each in each modality."
    folder = None
    def loaders(self, device=None, num_workers=0):
        made = make_regdb(self.folder, 2*self.n_ids, per_modality=6, size=self.size, seed=self.seed)  # half of them train
        aug = [ReIDAug(exchange=self.exchange, erase=self.erase)]
        return ReIDDataLoaders.from_items(regdb_items(made, 1, 'train'), size=self.size, P=self.P, K=self.K, seed=self.seed,
                                          num_workers=num_workers, aug=aug, device=device)


def both_renderers(items, out):
    "24,000 training images of 1,000 people, 12,000 of them different, of each renderer."
    Version1.folder, rows = out/'version1', []
    for name, config in (('version 1', Version1(n_ids=1000, epochs=2)), ('version 2', Rendered(n_ids=1000, epochs=3))):
        net = train_rendered(config, out/name, 'cpu')
        rows += [(name, k, *v) for k, v in scores(net, items, config.size).items()]
        write(out/'renderers.csv', FIELDS, rows)


def trained(folder, out, split, start, recipe='B+CA', epochs=8):
    "Scores on 20 people after training on the 30 others, from the shipped weights or from random ones."
    table, recipe, size = prepare(folder, out/'data', split), get_recipe(recipe), (128, 64)
    train, test = csv_items(table, 'train'), csv_items(table, 'test')
    set_seed(split)
    dls = ReIDDataLoaders.from_items(train, size=size, seed=split, num_workers=0, cache=True, device='cpu',
                                     aug=bool(recipe.channel_exchange) or [ReIDAug(exchange=0)])
    net = recipe.make_net(len(dls.vocab), get_arch('ibn_resnet'), start)
    learn = reid_learner(dls, net, recipe.make_loss(), mix=recipe.make_mix(16))
    with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(epochs, lr=.03, warmup=.2, decay=(.6, .85), trunk=1.)
    return both_ways(extract_features(learn.model, test, size, num_workers=0), test)


def compared(folder, out, splits):
    "Both starts, and no training, on the same splits."
    rows, (net, card) = [], open_weights('rendered')
    for split in range(splits):
        test = csv_items(prepare(folder, out/'data', split), 'test')
        rows.append([split, 'rendered, not trained', *both_ways(extract_features(net, test, image_size(card)), test)])
        for start, name in ((False, 'random'), ('rendered', 'rendered')):
            rows.append([split, name, *trained(folder, out, split, start)])
            write(out/'start.csv', ('split', 'start', *FIELDS[2:]), rows)


def rows_compared(folder, out, splits):
    "B, B+CA, B+CA+PedMix and TMPA from the shipped weights, on the same splits."
    rows = []
    for split in range(splits):
        for name in TABLE2:
            began = time.monotonic()
            found = trained(folder, out, split, 'rendered', name)
            rows.append([split, name, round(time.monotonic() - began), *found])
            write(out/'rows.csv', ('split', 'recipe', 'seconds', *FIELDS[2:]), rows)


def grown(path, head, jobs, items):
    """Train and score what a table lacks, row by row.

    `jobs` are (name, config); a row of the table is the name, the seconds of the training, and scores.
    """
    rows = [list(o.values()) for o in csv.DictReader(open(path))] if path.exists() else []
    done = {tuple(o[:len(jobs[0][0])]) for o in rows}
    for name, config in jobs:
        name = tuple(map(str, name))
        if name in done: continue
        folder = path.parent/'-'.join(name).replace(' ', '_')
        shutil.rmtree(folder, ignore_errors=True)  # of a training that was stopped
        began = time.monotonic()
        net = train_rendered(config, folder, 'cpu')
        seconds = round(time.monotonic() - began)
        rows += [[*name, seconds, k, *v] for k, v in scores(net, items, config.size).items()]
        write(path, (*head, 'seconds', *FIELDS[1:]), rows)


FEW = dict(n_ids=1000, epochs=4)  # 32,000 training images: minutes instead of an hour


def trained_recipes(items, out, seeds):
    "B, B+CA, B+CA+PedMix and TMPA on the same people; B+CA also for about as long as TMPA takes."
    jobs = []
    for seed in range(seeds):
        jobs += [((name, seed, FEW['epochs']), Rendered(recipe=name, seed=seed, **FEW)) for name in TABLE2]
    longer = {**FEW, 'epochs': 11}
    jobs += [(('B+CA', seed, 11), Rendered(recipe='B+CA', seed=seed, **longer)) for seed in range(seeds)]
    grown(out/'recipes.csv', ('recipe', 'seed', 'epochs'), jobs, items)


def other_sizes(items, out):
    "The recipe of the shipped weights with other networks, image sizes and numbers of people, at equal images."
    jobs = [(('people', n), Rendered(n_ids=n, epochs=4000//n)) for n in (250, 1000, 4000)]
    jobs += [(('width', w), Rendered(partial(ibn_resnet, width=w), **FEW)) for w in (16, 64)]
    jobs += [(('height', h), Rendered(size=(h, h//2), **FEW)) for h in (96, 192)]
    grown(out/'sizes.csv', ('what', 'value'), jobs, items)


@call_parse
def main(
    folder:str, # Folder of PKU-Reid: manifest.csv (file,pid,cam,orientation) and images/
    weights:Param('Files or folders of weights, or rendered', str, nargs='*'),
    out:str='runs/zero_shot', # Folder to make or to add to
    train:str=None, # Folder to train the shipped weights in, scored after every epoch
    start:int=0, # Splits of the people on which to compare starts of training
    renderers:store_true=False, # Train on what both renderers draw, at equal compute
    recipes:int=0, # Seeds with which to train each row of table II on rendered people
    sizes:store_true=False, # Train networks of other sizes, on other numbers of people
    rows:store_true=False, # With --start: each row of table II, from the shipped weights
):
    "Score weights on the 50 people."
    out = Path(out)
    items = csv_items(prepare(folder, out/'zero', 0, n_test=50), 'test')
    if train: return followed(items, train, out)
    if start: return (rows_compared if rows else compared)(folder, out, start)
    if renderers: return both_renderers(items, out)
    if recipes: return trained_recipes(items, out, recipes)
    if sizes: return other_sizes(items, out)
    rows = [('chance', k, *v) for k, v in chance(items).items()]
    for name in weights:
        model, card = open_weights(name)
        rows += [(name, k, *v) for k, v in scores(model, items, image_size(card)).items()]
    write(out/'scores.csv', FIELDS, rows)
