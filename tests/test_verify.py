"""`tmpa.verify`: what its notebook leaves out."""
import subprocess, sys

import numpy as np
import pytest
import torch

from tmpa import verify
from tmpa.verify import Pairs, Threshold, open_set, roc, threshold


def test_needs_no_fastai():
    code = "import sys, tmpa.verify; print([m for m in sys.modules if m.startswith('fastai')])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_takes_tensors():
    d, same = torch.rand(400), torch.arange(400) % 4 == 0
    assert threshold(d, same, .05) == threshold(d.numpy(), same.numpy(), .05)
    assert roc(d, same).eer == roc(d.numpy(), same.numpy()).eer
    q, g = torch.arange(20), torch.arange(20)
    assert open_set(d.view(20, 20), q, g//2).n_other == open_set(d.view(20, 20).numpy(), q.numpy(), g.numpy()//2).n_other == 10


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
    monkeypatch.setattr(verify, '_FIRST', first)
    assert threshold(p, far=.02, n=40) == want
