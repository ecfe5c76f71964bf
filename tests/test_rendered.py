"Weights that the package carries: opened by their name, the default of a search, a start of training."
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tmpa.core import CheckpointError
from tmpa.data.rendered import pictures
from tmpa.data.synthetic import render_person
from tmpa.models.backbone import ibn_resnet, make_resnet
from tmpa.models.net import fingerprint
from tmpa.models.tmpa import TMPANet
from tmpa.search import Gallery
from tmpa.weights import SHIPPED, find_weights, open_weights
from tmpa.card import read_card

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    "Pictures of four people by a visible and an infrared camera."
    for m, name in enumerate(('visible', 'infrared')):
        (tmp_path/'people'/name).mkdir(parents=True)
        for pid in range(4): Image.fromarray(render_person(pid, m, 1, 0, (64, 32))).save(tmp_path/'people'/name/f'{pid}.png')
    return tmp_path/'people'


def test_they_are_part_of_the_package():
    files = {f.name: f.stat().st_size for f in SHIPPED['rendered'].iterdir()}
    assert set(files) == {'model.safetensors', 'card.json', 'README.md'} and sum(files.values()) < 8e6
    assert SHIPPED['rendered'].is_relative_to(ROOT/'tmpa') and 'recursive-include tmpa *' in (ROOT/'MANIFEST.in').read_text()


def test_opened_by_name(tmp_path, monkeypatch):
    model, card = open_weights('rendered')
    assert fingerprint(model) == card['fingerprint'] and not model.training
    assert card['licence'] == 'Apache-2.0' and card['threshold'] is None and 'decisions about people' in card['not_for']
    assert 'simulated' in json.dumps(card['scores']) and 'rendered people' in card['data']
    assert type(TMPANet.from_pretrained('rendered')) is TMPANet
    monkeypatch.chdir(tmp_path)                # the name stays the package's, whatever lies there
    (tmp_path/'rendered').mkdir()
    assert find_weights('rendered') == SHIPPED['rendered']
    for folder in ('./rendered', Path('rendered')):
        with pytest.raises(CheckpointError, match='rendered'): open_weights(folder)


def test_the_default_of_a_gallery(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'rendered').mkdir()              # somebody's own
    g = Gallery.from_weights()
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'rendered people alone' in said and 'not for decisions about people' in said
    assert g.weights == 'rendered' and g.size == tuple(read_card(SHIPPED['rendered'])['size']) and g.threshold is None
    g.add(folder)
    g.save(tmp_path/'g.npz')
    again = Gallery.load(tmp_path/'g.npz').use_weights()
    assert again.search(folder/'infrared', k=3) == g.search(folder/'infrared', k=3)
    assert capsys.readouterr().err == ''


def test_commands_without_weights(folder, tmp_path, capsys):
    from tmpa.use import tmpa_features, tmpa_index, tmpa_search
    tmpa_index(str(folder/'visible'), out=str(tmp_path/'g.npz'), quiet=True)
    assert 'no weights are named' in capsys.readouterr().err
    tmpa_search(str(tmp_path/'g.npz'), str(folder/'infrared'))
    assert 'no weights are named' not in capsys.readouterr().err
    tmpa_features(str(folder), out=str(tmp_path/'f.npz'), quiet=True)
    assert 'no weights are named' in capsys.readouterr().err and (tmp_path/'f.npz').exists()


def test_a_start_of_training(device):
    shipped = open_weights('rendered')[0].state_dict()
    net = TMPANet(5, 'ibn_resnet', pretrained='rendered').state_dict()
    for extractor in ('shared', 'vis', 'ir'):
        if (k := f'mfe.{extractor}.layer2.0.conv1.weight') in net: assert torch.equal(net[k], shipped['mfe.shared.layer2.0.conv1.weight'])
    assert torch.equal(net['tail.layer4.0.conv2.weight'], shipped['tail.layer4.0.conv2.weight'])
    assert torch.equal(make_resnet(ibn_resnet, 'rendered').conv1.weight, shipped['mfe.shared.conv1.weight'])
    with pytest.raises(CheckpointError, match='rendered: not the weights of resnet18'): make_resnet('resnet18', 'rendered')


def test_people_look_alike_to_it():
    "Photographs of one person are nearer to each other than to those of others, people who were not trained on."
    model, card = open_weights('rendered')
    keys = [(10_000 + p, m, 0) for m in (0, 1) for p in range(16)]
    x = pictures(0, keys, tuple(card['size'])).float()/255
    x = (x - torch.tensor(card['mean'])[:, None, None])/torch.tensor(card['std'])[:, None, None]
    with torch.no_grad(): f = model(x, torch.tensor([k[1] for k in keys]))
    nearest = torch.cdist(f[:16], f[16:]).argmin(1)
    assert (nearest == torch.arange(16)).float().mean() > .5
