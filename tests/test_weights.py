"Weights with a card: every network comes back as it was, damage is found, and a folder is whole or as before."
import json, os, signal, subprocess, sys
import pytest, torch
from safetensors.torch import load_file, save_file
from tmpa.core import CheckpointError, ConfigError, TMPAError
from tmpa.dart import TwinNet
from tmpa.models.agw import AGWNet
from tmpa.models.backbone import micro_resnet
from tmpa.models.net import fingerprint, set_switches
from tmpa.models.checkpoint import save_weights
from tmpa.models.tmpa import TMPANet
from tmpa.weights import _SAID_TWICE, _sha256, find_weights, from_pretrained, open_weights
from tmpa.card import CARD, image_size
from tmpa.weights import save_pretrained
from tmpa.card import read_card

NETS = {
    'TMPA': lambda: TMPANet(5, micro_resnet, False, heads=2),
    'without MFT': lambda: TMPANet(5, micro_resnet, False, mft=False),
    'B': lambda: TMPANet(5, micro_resnet, False, mfe=False, mft=False),
    'CBAM': lambda: TMPANet(5, micro_resnet, False, mfe=False, mft=False, attention='cbam'),
    'AGW': lambda: AGWNet(5, micro_resnet, False, nonlocal_channels=None),
    'DART': lambda: TwinNet(5, micro_resnet, False),
}
X = torch.randn(3, 3, 48, 24, generator=torch.Generator().manual_seed(0))
MOD = torch.tensor([0, 1, 1])

def build(name='B', seed=0):
    torch.manual_seed(seed)
    return NETS[name]().eval()

def features(model):
    with torch.no_grad(): return model(X, MOD)

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')/'b'
    save_pretrained(build(), folder, size=(48, 24), licence='Apache-2.0')
    return folder

def copied(saved, tmp_path):
    folder = tmp_path/'copy'
    folder.mkdir()
    for f in saved.iterdir(): (folder/f.name).write_bytes(f.read_bytes())
    return folder

def one_line(f, *contains, error=TMPAError):
    with pytest.raises(error) as e: f()
    assert '\n' not in str(e.value) and len(str(e.value)) < 700
    for text in contains: assert text in str(e.value)

# ---------------------------------------------------------------- there and back

@pytest.mark.parametrize('name', NETS)
def test_folder_and_file_give_the_network(name, tmp_path):
    net = build(name)
    if name == 'TMPA': set_switches(net, part='shared', eval_complete='own', lams=(0., .5))
    if name == 'DART': set_switches(net, evaluate='b', feature='pool')
    net.save_pretrained(tmp_path/'net', size=[48, 24], ir_range=(0, 9000), data='regdb', run=dict(trial=3))
    save_weights(net, tmp_path/'net.pth', size=[48, 24], data='regdb', trial=3, ir_range=[0, 9000])
    (a, card), (b, of_file) = open_weights(tmp_path/'net'), open_weights(str(tmp_path/'net.pth'))
    for model in (a, b):
        assert type(model) is type(net) and not model.training and model.meta == net.meta
        assert torch.equal(features(model), features(net)) and fingerprint(model) == card['fingerprint']
    assert {k: v for k,v in card.items() if k != 'sha256'} == {k: v for k,v in of_file.items() if k != 'sha256'}
    assert card['architecture'] == type(net).__name__ and list(card) == list(CARD)
    assert (card['dim'], card['size'], card['run']) == (features(net).shape[1], [48, 24], dict(trial=3))
    assert type(type(net).from_pretrained(tmp_path/'net')) is type(net)

@pytest.mark.parametrize('name', ['TMPA', 'DART'])
def test_nothing_else_needs_to_be_imported(name, tmp_path):
    save_weights(build(name), tmp_path/'w.pth')
    code = 'import sys; from tmpa.weights import open_weights; open_weights(sys.argv[1])'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, tmp_path/'w.pth'], check=True)

def test_a_card_goes_on_with_the_weights(saved, tmp_path):
    model, card = open_weights(saved)
    save_pretrained(model, tmp_path/'again', **card)
    assert read_card(tmp_path/'again') == card
    assert (tmp_path/'again'/'model.safetensors').read_bytes() == (saved/'model.safetensors').read_bytes()
    assert open_weights(saved/'model.safetensors')[1] == card

def test_half_precision(saved, tmp_path):
    net = build('TMPA')
    for dtype in ('float32', 'float16'): save_pretrained(net, tmp_path/dtype, getattr(torch, dtype))
    size = {o: (tmp_path/o/'model.safetensors').stat().st_size for o in ('float32', 'float16')}
    model, card = open_weights(tmp_path/'float16')
    assert size['float16'] < .55*size['float32'] and card['stored'] == 'float16'
    assert fingerprint(model) == card['fingerprint'] != fingerprint(net)
    assert all(v.dtype in (torch.float32, torch.int64) for v in model.state_dict().values())
    assert (features(model) - features(net)).abs().max() < 5e-3
    assert torch.equal(model.neck.running_var, net.neck.running_var)
    kinds = {v.dtype for k,v in load_file(tmp_path/'float16'/'model.safetensors').items() if v.ndim < 2}
    assert kinds == {torch.float32, torch.int64}

@pytest.mark.parametrize('name', ['TMPA', 'DART'])
def test_without_classifiers(name, tmp_path):
    net = build(name)
    save_pretrained(net, tmp_path/'w', classifiers=False)
    model, card = open_weights(tmp_path/'w')
    assert torch.equal(features(model), features(net)) and card['arguments']['n_classes'] == 1
    assert fingerprint(model) == card['fingerprint'] and net.meta['n_classes'] == 5
    assert all(not v.any() for k,v in model.state_dict().items() if 'classifier' in k and v.ndim == 2)

def test_a_threshold_that_can_describe_itself(tmp_path):
    class Threshold:
        def to_dict(self): return dict(distance=.8)
    save_pretrained(build(), tmp_path/'w', threshold=Threshold())
    assert read_card(tmp_path/'w')['threshold'] == dict(distance=.8)

def test_size_is_asked_for_where_it_is_needed(tmp_path):
    save_weights(build(), tmp_path/'bare.pth')
    card = open_weights(tmp_path/'bare.pth')[1]
    assert card['size'] is None and image_size(card, [8, 4]) == (8, 4)
    one_line(lambda: image_size(card), 'for what size', error=ConfigError)

# ---------------------------------------------------------------- damage

def test_every_flipped_bit_is_found_or_harmless(saved, tmp_path):
    "In the card what inference needs cannot change unseen; the rest are words about it."
    folder, before = copied(saved, tmp_path), read_card(saved)
    inference = *_SAID_TWICE, 'mean', 'std', 'sha256'
    for name in ('model.safetensors', 'card.json'):
        good = (folder/name).read_bytes()
        for at in range(0, len(good), max(1, len(good)//60)):
            bad = bytearray(good)
            bad[at] ^= 1 << at % 8
            (folder/name).write_bytes(bad)
            try: card = open_weights(folder)[1]
            except TMPAError as e: assert '\n' not in str(e) and str(folder) in str(e)
            else: assert name == 'card.json' and all(card[k] == before[k] for k in inference)
        (folder/name).write_bytes(good)
    open_weights(folder)

def changed(folder, **fields): (folder/'card.json').write_text(json.dumps({**read_card(folder), **fields}))

@pytest.mark.parametrize('fields, said', [
    (dict(size=[96, 48]), 'has another size'), (dict(size=[10**9, 1]), 'height and width from 1 to 4096'),
    (dict(threshold=dict(distance=.1)), 'has another threshold'),
    (dict(mean=[0, 0, 0]), 'which is how images are normalised here'),
    (dict(arguments=[1]), 'not dict'), (dict(dim=0), 'dim is 0'), (dict(sha256='0'), 'damaged'), (dict(sha256=None), 'damaged')])
def test_a_card_that_says_something_else(saved, tmp_path, fields, said):
    folder = copied(saved, tmp_path)
    changed(folder, **fields)
    one_line(lambda: open_weights(folder), said, str(folder), error=CheckpointError)

def rewritten(folder, card, weights, **fields):
    "Whole files that agree with each other, and hold nonsense."
    card = {**card, **fields}
    save_file(weights, folder/'model.safetensors', dict(tmpa=json.dumps({k: card[k] for k in _SAID_TWICE})))
    (folder/'card.json').write_text(json.dumps({**card, 'sha256': _sha256(folder/'model.safetensors')}))

def test_files_that_are_whole_and_hold_something_else(saved, tmp_path):
    folder, card = copied(saved, tmp_path), read_card(saved)
    weights = load_file(folder/'model.safetensors')
    def refuse(weights, said, **fields):
        rewritten(folder, card, weights, **fields)
        one_line(lambda: open_weights(folder), said, str(folder), error=CheckpointError)
    args = card['arguments']
    refuse({k: v for k,v in weights.items() if 'layer4' not in k}, 'is missing')
    refuse(weights, 'which is unknown here', architecture='Net')
    refuse(weights, 'made for 1000000000 identities', arguments={**args, 'n_classes': 10**9})
    refuse(weights, 'do not fit', arguments={**args, 'arch': 'resnet152'})
    refuse(weights, 'describes no network', switches=dict(feature='both'))
    refuse({k: v.long() for k,v in weights.items()}, 'is of torch.int64, not torch.float32')
    refuse({k: v.float() for k,v in weights.items()}, 'num_batches_tracked')
    rewritten(folder, card, weights)
    assert torch.equal(features(open_weights(folder)[0]), features(build()))

def test_files_that_are_none(saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder/'card.json').write_text('[' * 100_000)
    one_line(lambda: open_weights(folder), 'card.json', 'cannot be read')
    (folder/'card.json').write_text('{"size": NaN}')
    one_line(lambda: open_weights(folder), 'NaN is no number')
    (folder/'card.json').write_bytes(b'\xff\xfe')
    one_line(lambda: open_weights(folder), 'cannot be read')
    (folder/'card.json').unlink()
    one_line(lambda: open_weights(folder), 'no card')
    (folder/'card.json').write_bytes((saved/'card.json').read_bytes())
    (folder/'model.safetensors').unlink()
    one_line(lambda: open_weights(folder), 'no weights')
    for nonsense in (b'', b'\xff'*64, (10**12).to_bytes(8, 'little') + b'{}'):
        (folder/'model.safetensors').write_bytes(nonsense)
        changed(folder, sha256=_sha256(folder/'model.safetensors'))
        one_line(lambda: open_weights(folder), 'not a file of safetensors')
    one_line(lambda: open_weights(tmp_path/'absent'), 'absent')

# ---------------------------------------------------------------- writing

def test_good_weights_are_not_replaced_by_bad_ones(saved, tmp_path):
    folder = copied(saved, tmp_path)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    bad, large = build(), build()
    bad.neck.running_var[0] = float('nan')
    large.tail.layer4[0].conv1.weight.data[0] = 1e6
    one_line(lambda: save_pretrained(bad, folder), 'neck.running_var is not finite: save the weights of an earlier')
    one_line(lambda: save_pretrained(large, folder, torch.float16), 'too large for float16')
    one_line(lambda: save_pretrained(build(), folder, scores=dict(mAP=float('nan'))), 'without NaN')
    one_line(lambda: save_pretrained(build(), folder, size=(0, 3)), 'height and width')
    one_line(lambda: save_pretrained(build(), folder, licenze='MIT'), 'licence')
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()} and os.listdir(tmp_path) == ['copy']

def test_what_is_replaced(saved, tmp_path):
    folder = copied(saved, tmp_path)
    save_pretrained(build(seed=1), folder, size=(48, 24))
    assert torch.equal(features(from_pretrained(folder)), features(build(seed=1)))
    assert 'Apache' not in (folder/'README.md').read_text()
    (folder/'README.md').write_text('mine')
    save_pretrained(build(seed=2), folder)
    assert (folder/'README.md').read_text() == 'mine'
    (folder/'thesis.tex').touch()
    one_line(lambda: save_pretrained(build(), folder), 'thesis.tex', error=ConfigError)
    one_line(lambda: save_pretrained(build(), folder/'thesis.tex'), 'no folder', error=ConfigError)
    one_line(lambda: save_pretrained(build(), folder/'thesis.tex'/'x'), 'cannot write', error=ConfigError)
    assert torch.equal(features(from_pretrained(folder)), features(build(seed=2)))
    assert os.listdir(tmp_path) == ['copy']

def test_others_may_read_it(saved, tmp_path):
    (tmp_path/'mine').touch()
    assert {o.stat().st_mode & 0o777 for o in saved.iterdir()} == {(tmp_path/'mine').stat().st_mode & 0o777}
    assert saved.stat().st_mode & 0o077

KILLED = """
import sys, torch
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet
from tmpa.weights import save_pretrained
net = TMPANet(5, micro_resnet, False, mfe=False, mft=False)
print('go', flush=True)
while True: save_pretrained(net, sys.argv[1])
"""

def test_a_killed_writer_leaves_whole_folders(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path/'w')], stdout=subprocess.PIPE)
    p.stdout.readline()
    try: p.wait(.3)
    except subprocess.TimeoutExpired: p.send_signal(signal.SIGKILL)
    p.wait()
    there = [o for o in (tmp_path/'w', tmp_path/'w.old') if o.exists()]
    for folder in there: open_weights(folder)
    save_pretrained(build(), tmp_path/'other')
    assert open_weights(tmp_path/'other')

# ---------------------------------------------------------------- the hub

def test_names_of_the_hub(saved, tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    asked = []
    def fetch(name, revision=None, allow_patterns=None):
        asked.append((name, revision))
        return str(saved)
    monkeypatch.setattr(hub, 'snapshot_download', fetch)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(features(from_pretrained('some/one', revision='v1')), features(build()))
    assert asked == [('some/one', 'v1')]
    (tmp_path/'runs').mkdir()
    for path in ('runs/absent', 'some/last.pth', str(saved), saved, './some/one', 'one'): find_weights(path)
    assert len(asked) == 1                                                       # none for folders and files

def test_without_network_or_extra(monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    def fetch(*args, **kwargs): raise OSError('no route to host\nand more')
    monkeypatch.setattr(hub, 'snapshot_download', fetch)
    one_line(lambda: from_pretrained('some/one'), 'some/one: no such folder here, and the hub', error=CheckpointError)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    one_line(lambda: from_pretrained('some/one'), 'pip install "tmpa[hub]"', error=ConfigError)
