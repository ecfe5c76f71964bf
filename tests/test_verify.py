"""`tmpa.verify`: what its notebook leaves out."""
import json, subprocess, sys

import numpy as np
import pytest
import torch

from tmpa import rates
from tmpa.experiment import train_run
from tmpa.models.checkpoint import load_tmpa, read_meta
from tmpa.recipes import get_recipe
from tmpa.run import RunConfig
from tmpa.data.datasets import DataSpec, read_data
from tmpa.search import Gallery
from tmpa.curves import open_set, roc
from tmpa.pairs import Pairs
from tmpa.verify import Threshold, threshold, threshold_of


def test_needs_no_fastai():
    code = "import sys, tmpa.verify, tmpa.curves; print([m for m in sys.modules if m.startswith('fastai')])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_takes_tensors():
    d, same = torch.rand(400), torch.arange(400) % 4 == 0
    assert threshold(d, same, .05) == threshold(d.numpy(), same.numpy(), .05)
    assert roc(d, same).eer == roc(d.numpy(), same.numpy()).eer
    q, g = torch.arange(20), torch.arange(20)
    assert open_set(d.view(20, 20), q, g//2).n_other == open_set(d.view(20, 20).numpy(), q.numpy(), g.numpy()//2).n_other == 10


@pytest.mark.parametrize('cross', [None, True, False])
def test_is_json_with_numbers_of_numpy(cross):
    d, same = np.linspace(0, 1, 40), np.arange(40) < 20
    given = cross if cross is None else np.bool_(cross)
    who = np.arange(40)%7
    groups = np.stack([who, np.where(same, who, 8)], 1)
    t = threshold(d, same, np.float32(.25), np.float64(.9), groups, np.int64(50), np.float32(.9), cross=given)
    assert t.cross is cross and Threshold.from_dict(json.loads(json.dumps(t.to_dict()))) == t


def test_order_of_pairs_does_not_matter():
    rng = np.random.default_rng(0)
    who = np.array([(a, b) for a in range(12) for b in range(12) for _ in range(3)])
    p = Pairs(rng.random(len(who)).astype(np.float32), who[:,0] == who[:,1], who, who)
    o = rng.permutation(len(p))
    q = Pairs(p.distances[o], p.same[o], p.groups[o], p.rows[o])
    a, b = threshold(p, far=.05, n=50), threshold(q, far=.05, n=50)
    assert Threshold.from_dict(a.to_dict()) == a and np.allclose(a.accepted, b.accepted) and a.distance == b.distance


@pytest.mark.parametrize('first', [-300, 10**9])
def test_nearest_pairs_are_enough(monkeypatch, first):
    "However many a draw looks at first, its threshold is the same."
    rng = np.random.default_rng(1)
    who = np.array([(a, b) for a in range(60) for b in range(60)])
    p = Pairs(rng.random(len(who)), who[:,0] == who[:,1], who, who)
    want = threshold(p, far=.02, n=40)
    monkeypatch.setattr(rates, '_FIRST', first)
    assert threshold(p, far=.02, n=40) == want


@pytest.mark.parametrize('n_ids,some', [(40, True), (12, False)])
def test_a_run_leaves_a_threshold_of_its_held_out_people(tmp_path, device, n_ids, some):
    spec = DataSpec('synthetic', str(tmp_path/'people'), size=(32, 16), n_ids=n_ids)
    cfg = RunConfig(get_recipe('B'), spec, str(tmp_path/'run'), epochs=1, arch='micro_resnet', pretrained=False, P=4, K=2,
                    select='held_out')
    kept = train_run(cfg, quiet=True, rank_figure=False).get('threshold')
    meta = read_meta(tmp_path/'run'/'last.pth')
    assert meta.get('threshold') == kept and meta['epoch'] == 1
    if not some: return  # one person is not enough
    t = Threshold.from_dict(kept)
    assert (t.n_people, t.far, t.cross, t.note) == (3, .01, True, '3 held-out people of the training')
    assert Gallery.from_weights(tmp_path/'run'/'last.pth').threshold == t
    items = spec.dataset().held_out(cfg.seed)[1]
    assert abs(threshold_of(load_tmpa(tmp_path/'run'/'last.pth'), items, spec.size).distance - t.distance) < 1e-3


def test_a_share_of_nearly_all():
    "Rounding must not count one pair more than there are."
    d = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    same = torch.arange(3000) < 300
    assert threshold(d, same, far=1-1e-13).distance <= float(d.max())
