"""Table II at the paper's scale: ResNet-50, 288 x 144, 80 epochs, on rendered people in RegDB's shape.

One command does what its minutes allow, what decides most first; the same command goes on later, on another machine
too, from the small folder of results, which holds scores and no weights:

    python benchmarks/paper_scale.py --out runs/paper_scale --minutes 9

`--scale small` is the same with a narrow network and smaller images, for a CPU.

Every row starts twice: from random weights, and from a *rendered trunk*: a ResNet-50 that has learnt to tell other
rendered people apart, in visible images alone. It stands in for ImageNet's weights, which need a download, and is no
substitute for them: it has seen nothing but drawings.

The real people (--photographs, see benchmarks/photographs.py) are searched with the finished networks and never
trained on; their infrared is simulated.
"""
import hashlib, importlib.util, json, math, os, time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np, torch
from fastai.callback.core import CancelFitException
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from torch import nn
from torch.nn import functional as F

from tmpa.callback.pedmix import PedMix
from tmpa.callback.runaway import RunawayError
from tmpa.callback.resume import ResumeFit
from tmpa.core import ConfigError, ReIDImage, atomic_write, locked, tmpa_home
from tmpa.data.cache import image_cache
from tmpa.core import Modality
from tmpa.protocols import cross_settings
from tmpa.data.readers import csv_items, regdb_items
from tmpa.data.synthetic import GENERATOR_VERSION, make_regdb, make_sysu
from tmpa.data.transforms import ReIDAug
from tmpa.experiment import make_learner
from tmpa.extract import extract_features
from tmpa.layers import BNNeck, Classifier
from tmpa.models.backbone import get_arch
from tmpa.models.net import set_switches
from tmpa.recipes import get_recipe
from tmpa.provenance import environment
from tmpa.run import RunConfig
from tmpa.run_files import folder_lock
from tmpa.data.datasets import DataSpec, read_data
from tmpa.scoring import score_feats

TABLE2 = 'TMPA', 'B', 'B+CA', 'B+CA+PedMix'  # the row that decides most first
STARTS = 'trunk', 'scratch'
LONGER = 'B+CA+PedMix', 'B+CA'  # trained once more, for as many seconds as TMPA
ROWS = *TABLE2, 'TMPA w/o MFT'
SCORED = {'TMPA': {'own': dict(eval_complete='own'), 'miss': dict(eval_complete='miss'), 'shared': dict(part='shared')}}


@dataclass(frozen=True)
class Scale:
    "What all rows share. Results of two scales are never mixed."
    arch:str = 'resnet50'
    size:tuple = (288, 144)
    ids:int = 412             # half of them for training, as in RegDB
    epochs:int = 80
    P:int = 8
    K:int = 4
    patch:int|None = None     # of PedMix; None: the recipe's
    world:int = 8             # seed of the people; no other page uses it
    trunk_ids:int = 2000      # people of another world that the trunk has seen
    trunk_world:int = 1008
    trunk_epochs:int = 12
    trunk_batch:int = 128
    trunk_lr:float = 1e-3

SMALL = Scale(arch='micro_resnet', size=(96, 48), epochs=24, patch=16)  # some minutes a row on one core
TINY = Scale(arch='micro_resnet', size=(48, 24), ids=16, epochs=2, P=2, K=2, patch=12, trunk_ids=8, trunk_epochs=1,
             trunk_batch=16)
SCALES = dict(paper=Scale(), small=SMALL, tiny=TINY)

def scale_key(scale):
    "Differs when results would."
    return short_key(asdict(scale))

def trunk_key(scale):
    "Differs when the trunk would: rows with other patches begin with the same one."
    return short_key({k: v for k,v in asdict(scale).items() if k in ('arch', 'size') or k.startswith('trunk_')})

def short_key(content):
    text = json.dumps({**content, 'generator': GENERATOR_VERSION}, sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()[:8]


# ---------------------------------------------------------------- the people, and the trunk that has seen others

def in_turn(name):
    "What is made once on each machine is made by one process, and the others wait for it."
    tmpa_home().mkdir(parents=True, exist_ok=True)
    return locked(tmpa_home()/f'.{name}.lock')

def n_workers(ids): return os.cpu_count() if ids > 100 else 0

def people(scale):
    "The folder of rendered people in RegDB's layout."
    h, w = scale.size
    folder = tmpa_home()/f'scale-v{GENERATOR_VERSION}-{scale.ids}-{h}x{w}-{scale.world}'
    with in_turn('scale-people'):
        return make_regdb(folder, n_ids=scale.ids, size=scale.size, seed=scale.world, n_workers=n_workers(scale.ids))

def trunk_people(scale):
    "Ten visible images of each of the people that only the trunk sees."
    h, w = scale.size
    folder = tmpa_home()/f'scale-trunk-v{GENERATOR_VERSION}-{scale.trunk_ids}-{h}x{w}-{scale.trunk_world}'
    each = [(pid, 'train', 3, 3, 0, 2, 2, 0) for pid in range(1, scale.trunk_ids+1)]  # cameras 3 and 6 are infrared
    make_sysu(folder, each, size=scale.size, seed=scale.trunk_world, n_workers=n_workers(scale.trunk_ids))
    files = sorted(folder.glob('cam*/*/*.jpg'))
    return [ReIDImage(f, int(f.parent.name), int(f.parts[-3][3:]), Modality.VISIBLE) for f in files]

def trunk_images(scale, device):
    "Visible images (n, 3, h, w) of the trunk's people, 8 bits, on the device; and who they show (n,)."
    items = trunk_people(scale)
    cache = image_cache(items, scale.size)
    rows = np.array_split(cache.rows(items), max(1, len(items)//512))
    images = torch.cat([torch.from_numpy(np.stack([cache[i] for i in part])).to(device) for part in rows])
    who = torch.tensor(np.unique([o.pid for o in items], return_inverse=True)[1], device=device)
    return images, who

def trunk_loss(net, images, who, aug, mean, std):
    "Cross entropy of one augmented batch, and the share of its images that are named rightly."
    x, *_ = aug.encodes((images, torch.zeros(len(images), dtype=torch.long, device=images.device)))
    x = ((x.float()/255 - mean)/std).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.float16, enabled=x.is_cuda): logits = net(x)
    logits = logits.float()
    return F.cross_entropy(logits, who, label_smoothing=.1), (logits.argmax(1) == who).float().mean()

def trunk_rate(step, steps):
    "Share of the highest rate: a fifth of the steps linearly up, then half a cosine down."
    warm = max(1, steps//5)
    return (step+1)/warm if step < warm else .5 + .5*math.cos(math.pi*(step-warm)/(steps-warm))

def train_trunk(scale, device):
    "A ResNet that tells the trunk's people apart, and how well it did so in its last epoch."
    images, who = trunk_images(scale, device)
    set_seed(0, reproducible=True)
    net = get_arch(scale.arch)()
    net.fc = nn.Sequential(BNNeck(net.fc.in_features), Classifier(net.fc.in_features, int(who.max())+1))
    net = net.to(device, memory_format=torch.channels_last).train()
    steps = max(1, len(images)//scale.trunk_batch)
    opt = torch.optim.AdamW(net.parameters(), scale.trunk_lr, weight_decay=.05, fused=device.type == 'cuda')
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == 'cuda')
    aug = ReIDAug(exchange=0.)
    mean, std = (torch.tensor(o, device=device).view(3, 1, 1) for o in ((.485, .456, .406), (.229, .224, .225)))
    step = 0
    for epoch in range(scale.trunk_epochs):
        right = []
        for rows in torch.randperm(len(images)).to(device)[:steps*scale.trunk_batch].split(scale.trunk_batch):
            opt.param_groups[0]['lr'] = scale.trunk_lr*trunk_rate(step, steps*scale.trunk_epochs)
            loss, hit = trunk_loss(net, images[rows], who[rows], aug, mean, std)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            right.append(hit)
            step += 1
    return net, float(torch.stack(right).mean()), float(loss.detach())

def make_trunk(scale, device):
    "The file of the trunk's weights and what is known about it; trained once on each machine."
    with in_turn('scale-trunk'): return _make_trunk(scale, device)

def _make_trunk(scale, device):
    file = tmpa_home()/f'scale-trunk-{trunk_key(scale)}.pth'
    if not (file.exists() and file.with_suffix('.json').exists()):
        begun = time.perf_counter()
        net, accuracy, loss = train_trunk(scale, device)
        weights = {k: v.detach().cpu().contiguous() for k,v in net.state_dict().items() if not k.startswith('fc.')}
        if not all(v.isfinite().all() for v in weights.values()): raise RunawayError('the trunk has run away')
        digest = hashlib.sha1(b''.join(v.numpy().tobytes() for v in weights.values())).hexdigest()[:12]
        about = dict(people=scale.trunk_ids, accuracy=round(accuracy, 4), loss=round(loss, 4), weights=digest,
                     seconds=round(time.perf_counter() - begun, 1), card=card_name(device))
        with atomic_write(file) as t, open(t, 'wb') as f: torch.save(weights, f)
        with atomic_write(file.with_suffix('.json')) as t: t.write_text(json.dumps(about))
    return file, json.loads(file.with_suffix('.json').read_text())


# ---------------------------------------------------------------- results: a record a run, and its queries

def card_name(device): return torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'

def read_results(out, scale, option='--out'):
    "Records of earlier commands, and the scores of their queries; `option` is how the folder was named."
    out, key = Path(out), scale_key(scale)
    file = out/'runs.jsonl'
    if not file.exists(): return [], {}
    try:
        records = [json.loads(l) for l in file.read_text().splitlines()]
        with np.load(out/'queries.npz') as z: queries = {k: z[k] for k in z.files}
    except (OSError, ValueError) as e:
        raise ConfigError(f'{out} cannot be read ({type(e).__name__}): choose another {option}') from None
    if other := next((r['scale'] for r in records if r['scale'] != key), None):
        why = f'has results of another scale, patch or renderer ({other}, now {key})'
        raise ConfigError(f'{out} {why}: choose another {option}')
    return records, queries

def write_results(out, records, queries):
    "Both files, whole; queries first: a record whose queries are lost would never be made again."
    with atomic_write(Path(out)/'queries.npz') as t, open(t, 'wb') as f: np.savez_compressed(f, **queries)
    with atomic_write(Path(out)/'runs.jsonl') as t: t.write_text(''.join(json.dumps(r) + '\n' for r in records))

def take(out, folders, scale):
    "Add the runs of other folders, made beside these or on other machines; of two of a name the one that is done."
    for o in folders:
        if not (Path(o)/'runs.jsonl').exists():
            raise ConfigError(f'{o}/runs.jsonl is missing: give --take_from folders that this command has made')
    others = [read_results(o, scale, '--take_from') for o in folders]
    Path(out).mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        records, queries = read_results(out, scale)
        found = {r['name']: r for r in records}
        for theirs, their_queries in others:
            for r in theirs:
                if found.get(r['name'], {}).get('status') == 'done': continue
                found[r['name']] = r
                queries |= {k: v for k,v in their_queries.items() if k.startswith(r['name'] + '/')}
        write_results(out, list(found.values()), queries)


# ---------------------------------------------------------------- what is run, in which order

def name_of(start, row, seed, longer=False): return f"{start}/{row}{' longer' if longer else ''}/{seed}"

def plan(seeds=3):
    "(start, row, seed, as long as TMPA) of every run, in the order in which they are wanted."
    for start in STARTS:
        for row in TABLE2: yield start, row, 0, False
    for row in LONGER: yield 'trunk', row, 0, True
    yield 'trunk', 'TMPA w/o MFT', 0, False
    for seed in range(1, seeds):
        for start in STARTS:
            for row in TABLE2: yield start, row, seed, False

def seconds_of(row, records, card, epochs):
    "What training a row for so many epochs took on this card, or None."
    same = [r for r in records if (r['row'], r['card'], r['status'], r['beside']) == (row, card, 'done', 0)]
    took = [r['train_seconds']/r['epochs'] for r in same]
    return epochs*sum(took)/len(took) if took else None

def epochs_of(row, longer, records, card, scale):
    "Epochs of a run; those of one that trains as long as TMPA are known when both have been run on this card."
    if not longer: return scale.epochs
    ours, theirs = (seconds_of(o, records, card, scale.epochs) for o in (row, 'TMPA'))
    return round(scale.epochs*theirs/ours) if ours and theirs else None

class Part(ResumeFit):
    """Stop between two epochs when the next would outlast the command, and go on there in the next.

    The state of an unfinished row is large and stays on this machine; on another one the row begins anew.
    """
    def __init__(self, file, at, row=''):
        super().__init__(file, quiet=True)
        self.at, self.spent, self.stopped, self.row = at, 0., None, row
    def resume_state(self): return self.spent
    def set_resume_state(self, spent): self.spent = spent
    def before_epoch(self):
        super().before_epoch()
        self.begun = time.monotonic()
    def after_epoch(self):
        super().after_epoch()
        self.last = time.monotonic() - self.begun
        self.spent += self.last
        done, n = self.epoch+1, self.n_epoch
        if 10*done//n == 10*self.epoch//n: return  # a line for each tenth
        print(f'{self.row}: {done} of {n} epochs in {self.spent:.0f} s', flush=True)
    def _save(self):  # before every epoch but the first
        if time.monotonic() + self.last < self.at: return
        super()._save()
        self.stopped, self.inside = self.epoch, True  # as if cut off: an early stop would remove the state
        raise CancelFitException


# ---------------------------------------------------------------- one run

def config_of(scale, start, row, seed, epochs, trunk, compile):
    "One row; seed s trains and scores split s+1 of RegDB's ten."
    spec = DataSpec('regdb', str(people(scale)), str(seed+1), size=scale.size)
    return RunConfig(
        get_recipe(row), spec, out='', arch=scale.arch, pretrained=str(trunk) if start == 'trunk' else False,
        epochs=epochs, P=scale.P, K=scale.K, seed=seed, patch=scale.patch, compile=compile)

def real_people(folder):
    "Items of all photographs, camera 2 as simulated infrared; none without a folder."
    if not folder: return []
    here = importlib.util.spec_from_file_location('photographs', Path(__file__).with_name('photographs.py'))
    photographs = importlib.util.module_from_spec(here)
    here.loader.exec_module(photographs)
    with in_turn('scale-photographs'):
        return csv_items(photographs.prepare(folder, tmpa_home()/'photographs', 0, n_test=50), 'test')

def score(learn, sets, size, row):
    """Scores of a trained network on every set of people, in every way that its row is scored; and its queries.

    A query is a column: its average precision, the place of its first hit, whom it shows.
    """
    scores, queries = {}, {}
    usual = {k: getattr(learn.model, k) for k in ('eval_complete', 'part') if hasattr(learn.model, k)}
    for way, switches in {'': {}, **SCORED.get(row, {})}.items():
        set_switches(learn.model, **switches)
        for who, (items, settings, cache) in sets.items():
            feats = extract_features(learn.model, items, size, cache=cache)
            scores[f'{who} {way}'.strip()], results = score_feats(feats, items, settings)
            for s in settings:
                r = results[s.name].trials[0]
                pids = [items[i].pid for i in s.q_idx]
                queries['/'.join([who, way or 'as trained', s.name])] = np.stack([r.ap, r.first_hit, pids]).astype('f4')
        for k in switches: setattr(learn.model, k, usual[k])
    return scores, queries

def train(cfg, part, real):
    "Train one row and score it: the record without its name, and its queries; None where the time is over before."
    train_items, test, settings = read_data(cfg.spec)
    torch._dynamo.reset()  # or the graphs of earlier rows count against this one's
    learn = make_learner(cfg, train_items, test)
    cuda = learn.dls.device.type == 'cuda'
    if cuda: torch.cuda.reset_peak_memory_stats()
    with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(cfg.epochs, lr=cfg.lr, cbs=[part])
    if part.stopped: return None
    learn.model._compiled_call_impl = None  # to compile for evaluation would take longer than to evaluate
    sets = {'rendered': (test, settings, learn.dls.train_ds.cache)}
    if real: sets['real'] = (real, cross_settings(real), image_cache(real, cfg.spec.size))
    scores, queries = score(learn, sets, cfg.spec.size, cfg.recipe.name)
    peak = round(torch.cuda.max_memory_allocated()/2**30, 2) if cuda else None
    return dict(
        status='done', train_seconds=round(part.spent, 1), scores=scores, steps=len(learn.dls.train)*cfg.epochs,
        losses=[round(float(v[0]), 4) for v in learn.recorder.values], peak_gib=peak,
        n_train=len(learn.dls.train_items), precision='fp16' if cuda else 'fp32', weights='last epoch',
        feature='after BNNeck, L2-normalised, no flip, no re-ranking'), queries

def state_file(scale, name):
    slug = name.replace('/', '-').replace(' ', '_').replace('+', '_')
    return tmpa_home()/f'scale-{scale_key(scale)}-{slug}.pth'

def one_run(name, cfg, part, real, **about):
    "The record of a run and its queries, or None where the time was over before."
    try: found = train(cfg, part, real)
    except RunawayError as e: found = dict(status='ran away', why=str(e)), {}
    if found is None: return None
    record, queries = found
    about = dict(about, name=name, epochs=cfg.epochs, trial=cfg.spec.trial, compiled=cfg.compile)
    about.update(recipe=cfg.recipe.asdict(), made=date.today().isoformat(), environment=environment())
    return {**about, **record}, {f'{name}/{k}': v for k,v in queries.items()}

def run(out, minutes, scale=Scale(), seeds=3, photographs=None, compiled=(), device=None, only=(), beside=0,
        scoring=20):
    """Do what the minutes allow, with `scoring` seconds after a training, and an epoch at least; returns all records.

    `only`: names of runs, the others are left. `beside`: trainings that share the card, whose seconds mean little.
    """
    deadline = time.monotonic() + 60*minutes - scoring
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    card, worked = card_name(device), False
    Path(out).mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        records, queries = read_results(out, scale)
        real, done = real_people(photographs), {r['name'] for r in records}
        for start, row, seed, longer in plan(seeds):
            name, epochs = name_of(start, row, seed, longer), epochs_of(row, longer, records, card, scale)
            if name in done or only and name not in only: continue
            if epochs is None:
                print(f'{name}: waits for both rows that it is compared with', flush=True)
                continue
            trunk, about_trunk = make_trunk(scale, device) if start == 'trunk' else (None, None)
            if worked and time.monotonic() > deadline: break
            worked = True
            cfg = config_of(scale, start, row, seed, epochs, trunk, row in compiled)
            part = Part(state_file(scale, name), deadline, name)
            about = dict(start=start, row=row, seed=seed, longer=longer, card=card, beside=beside, trunk=about_trunk)
            found = one_run(name, cfg, part, real, scale=scale_key(scale), **about)
            if found is None:
                so_far = f'{name}: {part.stopped} of {epochs} epochs'
                print(f'{so_far}; the same command goes on, on this machine', flush=True)
                break
            records.append(found[0])
            queries.update(found[1])
            write_results(out, records, queries)
            print(shown(found[0]), flush=True)
    return records

def of_patch(scale, patch):
    "The scale with other patches; None, or the side that it has anyhow: itself."
    return scale if patch in (None, scale.patch or PedMix().patch) else replace(scale, patch=patch)

def shown(r):
    if r['status'] != 'done': return f"{r['name']}: {r['why']}"
    mAP = {k: 100*np.mean([s['mAP'] for s in v.values()]) for k,v in r['scores'].items()}
    return f"{r['name']:28} {r['train_seconds']:6.0f} s  " + '  '.join(f'{k} {v:.1f}' for k,v in mAP.items()) + ' mAP'

@call_parse
def main(
    out:str='runs/paper_scale', # Folder of the results, which the next command goes on with
    minutes:float=9, # How long the command may take; 0: nothing is trained, for --take_from alone
    seeds:int=3, # Seeds of each row
    photographs:str=None, # Folder of PKU-Reid, to search real people as well
    compiled:str='', # Rows to compile, with commas
    only:str='', # Runs such as trunk/B/0, with commas
    take_from:str='', # Folders of results to add first, with commas: made beside these, or on other machines
    beside:int=0, # Trainings that share the card with this one, for the record: their seconds are not compared
    scale:str='paper', # 'paper', 'small': a narrow network on a CPU, or 'tiny': to see that everything works
    patch:int=None, # Side of PedMix's patches in pixels; default the scale's
):
    "Train and score the rows of table II at the paper's scale, as many as the time allows."
    rows, names = ([o for o in given.split(',') if o] for given in (compiled, only))
    for given, known in ((rows, ROWS), (names, [name_of(*p) for p in plan(seeds)])):
        if unknown := set(given) - set(known): raise SystemExit(f'{sorted(unknown)[0]!r}: choose of {", ".join(known)}')
    if scale not in SCALES: raise SystemExit(f'--scale {scale}: choose of {", ".join(SCALES)}')
    how = dict(compiled=rows, only=names, beside=beside, scoring=1 if scale == 'tiny' else 20)
    scale = of_patch(SCALES[scale], patch)
    try:
        if others := [o for o in take_from.split(',') if o]: take(out, others, scale)
        records = run(out, minutes, scale, seeds, photographs, **how) if minutes > 0 else read_results(out, scale)[0]
    except ConfigError as e: raise SystemExit(str(e)) from None
    wanted = names or [name_of(*p) for p in plan(seeds)]
    left = [o for o in wanted if o not in {r['name'] for r in records}]
    more = f', the same command goes on with {left[0]}' if left else ''
    print(f'{len(records)} runs in {out}; {len(left)} are left{more}')
