"""Several processes on the CPU do what one does with the batch that they make together.

Each test is a function of this file, run by processes that a fork server begins: they find torch and fastai imported.
What waits too long is killed.
"""
import io, json, os, socket, subprocess, sys, time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import lr_find
from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import set_seed
from torch import nn
from tmpa.callback.runaway import RunawayError
from tmpa.callback.pedmix import PedMix, SlotMix
from tmpa.callback.resume import ResumeFit
from tmpa.core import ConfigError, DataError
from tmpa.dart import dart_learner
from tmpa.data.load import ReIDDataLoaders, ReIDDataset
from tmpa.extract import extract_features
from tmpa.learner import reid_learner, tmpa_learner
from tmpa.losses import TMPALoss
from tmpa.models.agw import AGWNet
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet
from tmpa.processes import agreed, gather, in_order, is_told, mean_of, n_processes, on_rank0, rank0_first
from tmpa.processes import this_process, together

pytest.importorskip('accelerate')
N_IDS = 24  # rendered, half of them for training

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])

def child(f, rank, world, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    with together(): torch.save(f(Path(folder)), Path(folder)/f'{f.__name__}{rank}.pth')

def in_processes(f, world, folder, timeout=600):
    "What a function of this file returns in each of `world` processes."
    ctx, port = get_context('forkserver'), free_port()
    ctx.set_forkserver_preload(['tmpa.experiment', 'tmpa.dart', 'accelerate'])
    procs = [ctx.Process(target=child, args=(f, r, world, port, str(folder))) for r in range(world)]
    for p in procs: p.start()
    end = time.monotonic() + timeout
    try:
        for p in procs: p.join(max(0, end - time.monotonic()))
        assert [p.exitcode for p in procs] == [0]*world
    finally:
        for p in procs: p.kill()
    return [torch.load(folder/f'{f.__name__}{r}.pth', weights_only=False) for r in range(world)]

@pytest.fixture(scope='module')
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    loaders(folder)
    return folder

def loaders(folder, P=2, **kw):
    how = dict(n_ids=N_IDS, per_modality=4, size=(48, 24), P=P, K=2, num_workers=0, bs_valid=7, device='cpu') | kw
    return ReIDDataLoaders.from_synthetic(folder/'people', **how)

# ---------------------------------------------------------------- one step

class HalfMix(SlotMix):
    "The upper half of the partner: no dice."
    def masks(self, n, size, device=None):
        mask = torch.zeros(n, 1, *size, dtype=torch.bool, device=device)
        mask[:, :, :size[0]//2] = True
        return mask

class FrozenNorms(Callback):
    def before_batch(self):
        for m in self.model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()

class Look(Callback):
    "Keep the loss, its terms and the gradients of the first step, and the statistics after it."
    order = 60
    def before_step(self):
        terms = {t: float(torch.as_tensor(getattr(self.loss_func, t))) for t in self.loss_func.terms}
        grads = {k: p.grad.clone() for k,p in self.model.named_parameters()}
        stats = {k: b.clone() for k,b in self.model.named_buffers()}
        self.learn.seen = dict(loss=float(self.learn.loss.detach()), terms=terms, grads=grads, stats=stats)
        raise CancelFitException

def networks():
    tmpa = lambda **kw: (lambda c: TMPANet(c, micro_resnet, False, **kw))
    return {'TMPA': tmpa(), 'pairs': tmpa(complete='pair'), 'mixed alone': tmpa(keep_originals=False),
            'without MFT': tmpa(mft=False), 'B': tmpa(mfe=False, mft=False),
            'AGW': lambda c: AGWNet(c, micro_resnet, False)}

def one_step(folder, name, sync_bn, P=2):
    dls = loaders(folder, P, aug=False)
    set_seed(3, reproducible=True)
    net = networks()[name](dls.c)
    with torch.no_grad():  # so that all terms have something to say
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.weight.uniform_(.5, 1.5); m.running_mean.normal_(0, .1)
    cbs = [HalfMix(), Look()] + ([] if sync_bn else [FrozenNorms()])
    learn = reid_learner(dls, net, TMPALoss(margin=2.), mix=None, cbs=cbs)
    with learn.distrib_ctx(sync_bn=sync_bn), learn.no_bar(), learn.no_logging(): learn.fit_tmpa(1)
    assert learn.model is net and dls.train.world == 1 and type(net.neck).__name__ == 'BNNeck'
    return learn.seen

def all_steps(folder):
    names = list(networks()) if n_processes() == 2 else ['TMPA', 'AGW']
    return {(name, sync): one_step(folder, name, sync) for name in names for sync in (False, True)}

@pytest.mark.parametrize('world', [2, 3])
def test_loss_and_gradients_of_the_whole_batch(people, world):
    got = in_processes(all_steps, world, people)
    for key in got[0]:
        want = one_step(people, *key, P=2*world)
        for seen in got:
            assert seen[key]['loss'] == pytest.approx(want['loss'], rel=1e-5)
            assert seen[key]['terms'] == pytest.approx(want['terms'], rel=2e-5, abs=1e-6, nan_ok=True), key
            off = {k: seen[key]['grads'][k] - g for k,g in want['grads'].items()}
            norm = lambda d: float(torch.cat([o.flatten() for o in d.values()]).norm())
            assert norm(off) <= 2e-4*norm(want['grads']), (key, norm(off), norm(want['grads']))
            for k,g in want['grads'].items():  # as far off as with people in another order
                assert float(off[k].norm()) <= 2e-2*float(g.norm()) + 2e-5*norm(want['grads']), (key, k, off[k].norm())
            if key[1]:
                for k,b in want['stats'].items():
                    assert torch.allclose(seen[key]['stats'][k].float(), b.float(), rtol=1e-4, atol=1e-5), (key, k)

# ---------------------------------------------------------------- fits

def scores(learn):
    learn.validate()
    m = learn.re_id_metrics
    return {c: m.value(c) for c in ('mAP', 'mAP_v2t', 'mAP_t2v', 'rank1_v2t', 'rank1_t2v')}

def net_and_scores(learn):
    rec = learn.recorder
    return dict(model={k: v.clone() for k,v in learn.model.state_dict().items()},
                values=torch.tensor(rec.values).nan_to_num(-1), losses=[float(o) for o in rec.losses])

def learner(folder, out, mix=None, cbs=(), **kw):
    dls = loaders(folder, valid='test')
    set_seed(1, reproducible=True)
    return tmpa_learner(dls, micro_resnet, path=folder/out, pretrained=False, mix=mix, cbs=list(cbs), **kw)

class Drawn(Callback):
    "The masks of the first batch, and whether each batch was mixed."
    order = PedMix.order + 1
    def before_fit(self): self.masks, self.mixed, self.pids = [], [], []
    def before_batch(self):
        if not self.training: return
        self.mixed.append(len(self.xb) == 3)
        self.pids.append(self.yb[1].tolist())
        if len(self.xb) == 3: self.masks.append((self.xb[2] != self.xb[0]).any(1)[0])

def whole_fit(folder):
    mix = PedMix(6, p=.6, seed=4)
    (folder/f'fit{n_processes()}').mkdir(exist_ok=True)
    files = [CSVLogger('history.csv'), SaveModelCallback('mAP', fname='best')]  # the first process writes them
    learn = learner(folder, f'fit{n_processes()}', mix, [Drawn()])
    if this_process(): torch.rand(7)  # one that has drawn more; all begin with the first one's weights nevertheless
    if this_process():
        with torch.no_grad(): learn.model.classifier.weight.add_(1)
    with learn.distrib_ctx(), learn.no_bar():
        with learn.no_logging(): learn.fit_tmpa(2, lr=.03, cbs=files)
        drawn = learn.drawn
        out = net_and_scores(learn) | dict(mixed=drawn.mixed, masks=drawn.masks, pids=drawn.pids)
        out |= dict(validated=scores(learn), feats=extract_features(learn.model, learn.dls.valid_items, (48, 24), bs=7),
                    flipped=extract_features(learn.model, learn.dls.valid_items[:3], (48, 24), bs=2, flip=True),
                    preds=learn.get_preds()[0])
    return out | dict(n=len(learn.dls.train), world=learn.dls.valid.world)

@pytest.mark.parametrize('world', [2, 3])
def test_a_fit_is_one_network_with_the_scores_of_one_process(people, world):
    got = in_processes(whole_fit, world, people)
    first = got[0]
    for other in got[1:]:
        for k,v in first['model'].items(): assert torch.equal(v, other['model'][k]), k
        assert torch.equal(other['values'], first['values']) and other['losses'] == first['losses']
        assert other['mixed'] == first['mixed']
        assert any(not torch.equal(a, b) for a,b in zip(other['masks'], first['masks']))  # masks of their own
        for a,b in zip(first['pids'], other['pids']): assert not set(a) & set(b)  # nobody in two shares of a batch
    assert 0 < sum(first['mixed']) < len(first['mixed'])
    assert len({p for o in got for b in o['pids'] for p in b}) == N_IDS//2
    # in one process, with these weights
    one = learner(people, 'one')
    one.model.load_state_dict(first['model'])
    with one.no_bar(): want, preds = scores(one), one.get_preds()[0]
    feats = extract_features(one.model, one.dls.valid_items, (48, 24), bs=7)
    flipped = extract_features(one.model, one.dls.valid_items[:3], (48, 24), bs=2, flip=True)
    for o in got:
        assert o['validated'] == want
        assert torch.equal(o['feats'], feats) and torch.equal(o['flipped'], flipped) and torch.equal(o['preds'], preds)
        assert o['world'] == 1
    lines = (people/f'fit{world}'/'history.csv').read_text().splitlines()
    assert len(lines) == 3 and (people/f'fit{world}'/'models'/'best.pth').exists()

def ran_away(folder):
    "One process alone has a loss that is no number."
    learn = learner(folder, 'away')
    class Spoil(Callback):
        order = 5
        def before_batch(self):
            if not self.training or self.iter != 2 or this_process() != 1: return
            self.learn.xb = self.xb[0]*float('nan'), self.xb[1]
    learn.add_cb(Spoil())
    try:
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, lr=.03)
    except RunawayError as e:
        return str(e), learn.dls.train.world, type(learn.model).__name__, [type(c).__name__ for c in learn.cbs]

def refused(folder):
    dls, out = loaders(folder), {}
    def line(f):
        try: f()
        except ConfigError as e: return str(e)
    def fit(learn):
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(1)
    out['dart'] = line(lambda: fit(dart_learner(dls, micro_resnet, False)))
    learn = tmpa_learner(dls, micro_resnet, False)
    learn.dls.loaders[0] = torch.utils.data.DataLoader(dls.train_ds)
    out['plain'] = line(lambda: fit(learn))
    learn = tmpa_learner(loaders(folder), micro_resnet, False, path=folder/'find')
    def find():
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False)
    return out | dict(find=line(find))

def talk(folder):
    "What processes tell each other."
    me, n = this_process(), n_processes()
    out = dict(order=in_order('abc'[:me + 1]), mean=float(mean_of(torch.tensor(float(me)))),
               first=on_rank0(lambda: f'from {me}'))
    x = torch.full((2, 2), float(me + 1), requires_grad=True)
    (gather(x)*torch.arange(2.*n).view(-1, 1)*(me + 1)).sum().backward()  # each process weighs the rows differently
    out |= dict(rows=gather(x).tolist(), grad=x.grad.tolist())
    def only(k):
        def f():
            if this_process() == k: raise DataError(f'process {k} found nothing')
            return me
        return f
    tries = dict(agreed=(agreed, only(1)), rank0=(on_rank0, only(0)),
                 first0=(rank0_first, only(0)), first1=(rank0_first, only(1)))
    for name, (run, f) in tries.items():
        try: run(f)
        except DataError as e: out[name] = str(e), is_told(e)
    made = folder/'made'
    def make():
        if not made.exists(): made.write_text(str(me))
        return made.read_text()
    return out | dict(made=rank0_first(make), agree=agreed(lambda: me))

def many(folder):
    "Several of the small tests in one start of processes."
    return dict(talk=talk(folder), ran_away=ran_away(folder), refused=refused(folder))

def test_what_processes_tell_each_other_and_refuse(people):
    got = in_processes(many, 2, people)
    for me, o in enumerate(g['talk'] for g in got):
        assert o['order'] == ['a', 'ab'] and o['mean'] == .5 and o['agree'] == me
        assert o['first'] == 'from 0' and o['made'] == '0'
        assert o['rows'] == [[1, 1], [1, 1], [2, 2], [2, 2]]
        assert o['grad'] == [[3.*r]*2 for r in (2*me, 2*me + 1)]  # weights of both, 1 + 2
        assert o['agreed'] == o['first1'] == ('process 1 found nothing', me == 0)
        assert o['rank0'] == o['first0'] == ('process 0 found nothing', me == 1)
    lines = {g['ran_away'][0] for g in got}
    assert len(lines) == 1 and 'batch 3 of' in lines.pop()
    assert all(g['ran_away'][1:3] == (1, 'TMPANet') and 'DistributedTrainer' not in g['ran_away'][3] for g in got)
    for g in got:
        assert 'one process' in g['refused']['dart'] and '\n' not in g['refused']['dart']
        assert 'use ReIDDataLoaders' in g['refused']['plain'] and 'lr_find' in g['refused']['find']

# ---------------------------------------------------------------- going on

class Killed(Callback):
    "As if the processes had been killed in that batch."
    order = 999
    def __init__(self, epoch): self.at = epoch
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (self.at, 1): raise RuntimeError('killed')

def resumed(folder):
    def fit(name, cut=None):
        learn = learner(folder, name, PedMix(6, p=.6, seed=4))
        (folder/name).mkdir(exist_ok=True)
        cbs = [CSVLogger('history.csv'), ResumeFit(folder/name/'resume.pth', quiet=True)]
        if cut is not None: cbs.append(Killed(cut))
        try:
            with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit_tmpa(3, lr=.03, cbs=cbs)
        except RuntimeError: return
        return net_and_scores(learn)
    whole = fit('whole')
    fit('cut', cut=1)
    agreed(lambda: None)  # all have ended before one goes on
    again = fit('cut')
    agreed(lambda: None)
    return whole, again, (folder/'cut'/'resume.pth').exists()

def test_a_fit_goes_on_in_all_processes(people):
    got = in_processes(resumed, 2, people)
    for whole, again, left in got:
        assert again['losses'] == whole['losses'] and torch.equal(again['values'], whole['values']) and not left
        for k,v in whole['model'].items(): assert torch.equal(v, again['model'][k]), k
    a, b = ((people/o/'history.csv').read_text().splitlines() for o in ('whole', 'cut'))
    assert [o.rpartition(',')[0] for o in a] == [o.rpartition(',')[0] for o in b] and len(a) == 4  # but for the time

# ---------------------------------------------------------------- commands

TINY = dict(arch='micro_resnet', scratch=True, size='48x24', epochs=2, lr=.03, p=2, k=2, patch=6, ids=16,
            workers=0, quiet=True)

def commands(folder):
    "Exit status and lines of commands."
    from tmpa.cli import tmpa_evaluate, tmpa_train
    from tmpa.data.datasets import DataSpec, read_data
    data, lines = folder/'damaged', {}  # no other test's: one that fails leaves it so
    def run(name, f, **kw):
        out, err, status = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try: f(**kw)
            except SystemExit as e: status = e.code
        lines[name] = status, out.getvalue().strip(), err.getvalue().strip()
    run('patch', tmpa_train, **{**TINY, 'patch': 7}, path=str(data), out=str(folder/'a'))
    run('arch', tmpa_train, **{**TINY, 'arch': 'nothing'}, path=str(data), out=str(folder/'a'))
    run('dart', tmpa_train, **TINY, recipe='DART', path=str(data), out=str(folder/'a'))
    lines['left'] = (folder/'a').exists()
    run('evaluate', tmpa_evaluate, weights='x')
    test = rank0_first(lambda: read_data(DataSpec('synthetic', str(data), n_ids=16, size=(48, 24))))[1]
    last = Path(test[-1].path)  # of the last process's share
    whole = last.read_bytes()
    on_rank0(lambda: last.write_bytes(whole[:50]))
    run('damaged', tmpa_train, **TINY, path=str(data), out=str(folder/'b'), select='held_out', sync_bn=True)
    on_rank0(lambda: last.write_bytes(whole))
    lines['after'] = sorted(o.name for o in (folder/'b').iterdir())
    on_rank0(lambda: None)
    again = dict(**TINY, path=str(data), out=str(folder/'b'), select='held_out', sync_bn=True)
    run('exists', tmpa_train, **again)
    run('scored', tmpa_train, **again, resume=True)
    run('finished', tmpa_train, **again, resume=True)
    return lines

def test_commands_end_with_one_line_and_one_folder(people):
    first, other = in_processes(commands, 2, people)
    says = dict(patch='not divisible by patch 7', arch="arch 'nothing'", dart='trains in one process',
                evaluate='with tmpa_train', exists='exists already')
    for name, text in says.items():
        assert first[name][0] == other[name][0] == 2, name
        assert text in first[name][2] and '\n' not in first[name][2] and first[name][1] == '', (name, first[name])
        assert other[name][1:] == ('', '')
    assert not first['left']
    assert other['damaged'][0] == first['damaged'][0] == 2  # found by the last process, told by it alone
    line = other['damaged'][2]
    assert first['damaged'][2] == '' and 'the trained weights are kept' in line and '\n' not in line
    files = ['best.pth', 'config.json', 'environment.json', 'history.csv', 'last.pth']
    assert first['after'] == other['after'] == files
    for name in ('scored', 'finished'):
        assert first[name][0] == other[name][0] == 0 and 'Report:' in first[name][1] and other[name][1:] == ('', '')
    metrics = json.loads((people/'b'/'metrics.json').read_text())
    assert metrics['processes'] == 2 and metrics['scores']['v2t']['n_queries'] == 40

def lost(folder):
    "One process finds a damaged image while it trains."
    from tmpa.cli import tmpa_train
    whole = ReIDDataset.pixels
    def pixels(self, i):
        if this_process() == 1 and self.split_idx == 0: raise DataError('x.png: cannot be read')
        return whole(self, i)
    ReIDDataset.pixels, err = pixels, io.StringIO()
    with redirect_stderr(err), pytest.raises(SystemExit) as e:
        tmpa_train(**TINY, path=str(folder/'rendered'), out=str(folder/'lost'))
    return e.value.code, err.getvalue().strip()

def test_who_loses_another_process_ends(people):
    first, other = in_processes(lost, 2, people)
    assert first == (2, 'tmpa_train: error: process 0 of 2 has lost another one, which says why')
    assert other == (2, 'tmpa_train: error: x.png: cannot be read')

def test_accelerate_launch_makes_one_run(people):
    (people/'tmpa_train').write_text('from tmpa.cli import tmpa_train\ntmpa_train()\n')
    how = [w for k,v in (TINY | dict(epochs=1)).items() for w in ([f'--{k}'] if v is True else [f'--{k}', str(v)])]
    launch = ('-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 '  # as for GPUs
              '--mixed_precision no --dynamo_backend no --main_process_port').split()
    train = [people/'tmpa_train', *how, '--path', people/'rendered', '--out', people/'run']
    command = [sys.executable, *launch, free_port(), *map(str, train)]
    r = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count('Report:') == 1
    assert {o.name for o in (people/'run').iterdir()} == {
        'config.json', 'curves.png', 'environment.json', 'history.csv', 'last.pth', 'metrics.json', 'mixed_images.png',
        'queries.csv', 'ranked_lists.png', 'report.html'}
    assert json.loads((people/'run'/'metrics.json').read_text())['processes'] == 2

# ---------------------------------------------------------------- without several processes

def test_data_parallel_is_refused_in_one_line(people):
    dls = loaders(people)
    learn = tmpa_learner(dls, micro_resnet, pretrained=False)
    learn.model = nn.DataParallel(learn.model)
    with pytest.raises(ConfigError, match='distrib_ctx'): learn.fit(1)
    replica = TMPANet(3, micro_resnet, False).train()._replicate_for_data_parallel()
    x = torch.zeros(4, 3, 48, 24), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ConfigError, match='distrib_ctx.*accelerate launch'): replica(*x)

def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(ConfigError, match=r'pip install "tmpa\[distributed\]"'):
        with together(): pass
    monkeypatch.setenv('WORLD_SIZE', '1')
    with together(): assert n_processes() == 1
