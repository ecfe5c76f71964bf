"""Weights that have seen no photograph, on photographs of 50 real people; the infrared is *simulated*, see photographs.py.

Every image of one camera is searched in all images of the other, both ways, for all people and for two halves of
them: the renderer was chosen by half A, half B is what it was not chosen by.

    python benchmarks/zero_shot.py FOLDER rendered runs/rendered/last.pth --out runs/zero_shot
"""
import csv
import sys
from pathlib import Path

import numpy as np
from fastcore.script import Param, call_parse

sys.path.insert(0, str(Path(__file__).parent))
from photographs import prepare

from tmpa.data.readers import csv_items
from tmpa.evaluation import evaluate
from tmpa.learner import extract_features
from tmpa.weights import image_size, open_weights

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


@call_parse
def main(
    folder:str, # Folder of PKU-Reid: manifest.csv (file,pid,cam,orientation) and images/
    weights:Param('Files or folders of weights, or rendered', str, nargs='+'),
    out:str='runs/zero_shot', # Folder to make or to add to
):
    "Score weights on the 50 people."
    items = csv_items(prepare(folder, Path(out)/'data', 0, n_test=50), 'test')
    rows = [('chance', k, *v) for k, v in chance(items).items()]
    for name in weights:
        model, card = open_weights(name)
        rows += [(name, k, *v) for k, v in scores(model, items, image_size(card)).items()]
    with open(Path(out)/'scores.csv', 'w', newline='') as f: csv.writer(f).writerows([FIELDS, *rows])
    for row in [FIELDS, *rows]: print(*(f'{o!s:>9}' for o in row))
