"The stand-in for a second device computes what the CPU computes, and raises what a GPU raises."
import copy, gc, weakref

import pytest, torch
from fastai.torch_core import set_seed
from tmpa.callback.pedmix import PedMix
from tmpa.data.load import ReIDDataLoaders
from tmpa.extract import extract_features
from tmpa.learner import tmpa_learner
from tmpa.models.backbone import micro_resnet

import pretend


MISTAKES = {
    'sum': lambda x, y: x + y,
    'compare': torch.equal,
    'join': lambda x, y: torch.cat([x, y]),
    'product': lambda x, y: x@y.T,
    'numpy': lambda x, y: x.numpy(),
    'index': lambda x, y: y[x.long()],
    'layer': lambda x, y: torch.nn.Linear(3, 1)(x),
    'convolution': lambda x, y: torch.nn.Conv1d(1, 1, 1)(x[:, None]),
}

@pytest.mark.parametrize('name', MISTAKES)
def test_mixing_devices_fails(name):
    x, y = torch.zeros(2, 3).to(pretend.NAME), torch.zeros(2, 3)
    with pytest.raises((RuntimeError, TypeError), match='device'): MISTAKES[name](x, y)

def test_what_a_gpu_allows():
    x = torch.arange(6.).view(2, 3).to(pretend.NAME)
    assert (x + torch.tensor(1.)).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert x[torch.tensor([1])].tolist() == [[3, 4, 5]]
    view = x.t()
    view[1] = 9  # the same memory
    assert x.tolist() == [[0, 9, 2], [3, 9, 5]] and float(x.sum()) == 28
    other = copy.deepcopy(torch.nn.Linear(3, 2).to(pretend.NAME))
    assert other.weight.device.type == pretend.NAME and other(x).shape == (2, 2)

def test_an_operation_keeps_nothing_alive():
    x = torch.zeros(2, 3).to(pretend.NAME)
    seen = weakref.ref(x)
    gc.disable()
    try:
        torch.stack([x + x, x.t().reshape(2, 3)])
        del x
        assert seen() is None
    finally: gc.enable()

def test_training_gives_the_numbers_of_the_cpu(tmp_path, device, tol):
    """Two steps of TMPA with its loader, loss, mix, optimiser and scores, then features.

    On every device they are those of the CPU, as far as its precision goes.
    """
    def upper_rows(n, size, device=None):
        "One mask for all devices."
        rows = torch.arange(size[0], device=device).view(1, 1, -1, 1)
        return rows.expand(n, 1, *size) < 20
    def fit(where):
        set_seed(0, reproducible=True)
        dls = ReIDDataLoaders.from_synthetic(
            tmp_path/'people', n_ids=12, per_modality=4, size=(48, 24),
            P=3, K=2, num_workers=0, aug=False, device=where)
        mix = PedMix(8)
        mix.masks = upper_rows
        learn = tmpa_learner(dls, micro_resnet, pretrained=False, mix=mix, precision='fp32')
        with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(1, lr=1e-3)
        features = extract_features(learn.model, dls.valid_items, (48, 24), num_workers=0)
        return next(learn.model.parameters()).device.type, features
    (here, want), (there, got) = fit('cpu'), fit(device)
    assert (here, there) == ('cpu', device) and got.device.type == 'cpu'
    assert (got - want).abs().max() <= 100*tol()  # sums in another order, twice through the optimiser
