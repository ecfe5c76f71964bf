"From a folder of pictures to an answer: galleries of weights, folders, and the commands."
import json, os, re, shutil, warnings
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from tmpa.core import CheckpointError, ConfigError, DataError, ReIDImage
from tmpa.data.folder import find_records, guess_modality
from tmpa.data.image import read_image
from tmpa.data.synthetic import render_person
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, save_weights
from tmpa.search import Gallery

SIZE = 48, 24
PHOTOGRAPHS = Path(__file__).resolve().parents[2]/'shared'/'data'/'pku_reid_50'/'images'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    f = tmp_path_factory.mktemp('weights')/'last.pth'
    save_weights(TMPANet(4, micro_resnet, pretrained=False), f, size=SIZE)
    return f


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Pictures of six people by a visible and an infrared camera."
    root = tmp_path_factory.mktemp('pictures')
    for m, name in enumerate(('visible', 'infrared')):
        (root/name).mkdir()
        for pid in range(6): Image.fromarray(render_person(pid, m, 1 + 2*m, 0, SIZE)).save(root/name/f'{pid}.png')
    return root


@pytest.fixture
def pictures(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'pictures'))


# --- Gallery -----------------------------------------------------------------------------------------------------------

def test_gallery_of_weights(weights, pictures, tmp_path):
    g = Gallery.from_weights(weights)
    assert (g.size, g.ir_range, g.weights, g.threshold, g.model.training) == (SIZE, None, str(weights), None, False)
    assert g.add(pictures) == 12 and g.add(pictures) == 0
    assert [o.modality for o in g.items] == [1]*6 + [0]*6
    assert len(g.search(pictures/'visible')) == 6
    g.save(tmp_path/'g.npz')
    again = Gallery.load(tmp_path/'g.npz')
    with pytest.raises(ConfigError, match='no model'): again.search(pictures/'visible')
    assert again.weights == str(weights) and again.use_weights() is again
    assert again.search(pictures/'visible', k=3) == g.search(pictures/'visible', k=3)
    with pytest.raises(ConfigError, match='did you mean size'): Gallery.from_weights(weights, sise=SIZE)


def test_weights_that_are_gone_or_others(weights, pictures, tmp_path):
    mine = Path(shutil.copy(weights, tmp_path/'mine.pth'))
    g = Gallery.from_weights(mine)
    g.add(pictures/'visible')
    g.save(tmp_path/'g.npz')
    mine.rename(tmp_path/'moved.pth')
    again = Gallery.load(tmp_path/'g.npz')
    with pytest.raises(CheckpointError, match='mine.pth.*--weights'): again.use_weights()
    again.use_weights(tmp_path/'moved.pth')
    assert again.weights == str(tmp_path/'moved.pth')
    torch.manual_seed(1)
    save_weights(TMPANet(4, micro_resnet, pretrained=False), mine, size=SIZE)
    with pytest.raises(CheckpointError, match='not the model'): Gallery.load(tmp_path/'g.npz').use_weights()
    with pytest.raises(ConfigError, match='does not know its weights'): Gallery(made_by='x').use_weights()
    save_weights(TMPANet(4, micro_resnet, pretrained=False), mine)
    with pytest.raises(ConfigError, match='size='): Gallery.from_weights(mine)
    assert Gallery.from_weights(mine, size=(96, 48)).size == (96, 48)


def test_broken_pictures(weights, pictures, tmp_path):
    (pictures/'visible'/'2b.png').write_bytes(b'')
    (pictures/'visible'/'4b.png').write_bytes((pictures/'visible'/'4.png').read_bytes()[:300])
    os.mkfifo(pictures/'visible'/'pipe.png')
    g = Gallery.from_weights(weights, bs=2)
    with pytest.raises(DataError, match='2b.png is empty'): g.add(pictures/'visible')
    with pytest.warns(UserWarning, match='3 of 9 images cannot be read') as said: assert g.add(pictures/'visible', on_error='skip') == 6
    assert '4b.png' in str(said[0].message) and 'pipe.png' in str(said[0].message)
    assert [f.name for f in g.skipped] == ['2b.png', '4b.png', 'pipe.png'] and [o.path.stem for o in g.items] == list('012345')
    with pytest.raises(DataError, match='2b.png'): g.search(pictures/'visible')
    with pytest.warns(UserWarning, match='3 of 9'): assert len(g.search(pictures/'visible', on_error='skip')) == 6
    with pytest.warns(UserWarning, match='1 of 1'): assert g.search([pictures/'visible'/'2b.png'], modality=0, on_error='skip') == []


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason='no photographs')
def test_photographs_are_visible():
    files = sorted(PHOTOGRAPHS.glob('*.png'))[::40]
    guesses = [guess_modality(255*read_image(f).permute(1, 2, 0).numpy()) for f in files]
    assert {m for m, _ in guesses} == {0} and np.median([sure for _, sure in guesses]) > .9
