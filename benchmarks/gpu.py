"""How fast training is on this card, and what it waits for: one command, under four minutes.

A *step* is mix, forward, loss, backward and optimiser on a batch that is on the device already; the *loop* is the same
through the Learner with the real loader; the *loader* is the loader alone. A loop that takes longer than its step waits
for something. Without CUDA the script runs at a tiny size on the CPU, to show that it works.

    python benchmarks/gpu.py --out runs/gpu.json
"""
import json, os, platform, signal, tempfile, time, warnings
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import fastai, torch, torchvision
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true
from torch.profiler import ProfilerActivity, profile

import tmpa
from tmpa.core import atomic_write, plain
from tmpa.callback.pedmix import PedMix
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.synthetic import make_regdb
from tmpa.learner import tmpa_learner

NETWORKS = {'B': dict(mfe=False, mft=False, mix=None), 'B+PedMix': dict(mfe=False, mft=False), 'TMPA': {}}
DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
PRODUCTS = 'conv', 'gemm', 'xmma', 'cutlass', 'wgrad', 'dgrad', 'nvjet', '::mm', 'addmm', 'bmm', 'mkldnn'
FULL = dict(arch='resnet50', size=(288, 144), P=8, K=4, patch=12, ids=256, steps=20, warm=6, workers=os.cpu_count())
TINY = dict(arch='micro_resnet', size=(48, 24), P=2, K=2, patch=6, ids=12, steps=2, warm=1, workers=0)


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize()

def peak_gib(device): return round(torch.cuda.max_memory_allocated()/2**30, 3) if device.type == 'cuda' else None

def learner(dls, setting, network, precision, compiled, cbs=None):
    set_seed(0)
    kw = dict(NETWORKS[network])
    if 'mix' not in kw: kw['mix'] = PedMix(setting['patch'])
    return tmpa_learner(dls, setting['arch'], pretrained=False, precision=precision, compile=compiled, cbs=cbs, **kw)


# ---------------------------------------------------------------- the step, without a loader and without fastai

def step_of(dls, setting, network, precision, compiled):
    "A function that makes one step on one batch, which stays on the device."
    learn = learner(dls, setting, network, precision, compiled)
    mix = next((c for c in learn.cbs if isinstance(c, PedMix)), None)
    device = dls.device
    net = learn.model.to(device, memory_format=torch.channels_last).train()
    images, modality, label, *_ = map(plain, dls.one_batch())
    images = images.contiguous(memory_format=torch.channels_last)
    opt = torch.optim.SGD(
        net.parameters(), lr=.01, momentum=.9, nesterov=True, weight_decay=5e-4,
        fused=device.type == 'cuda')
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    def step():
        mixed = () if mix is None else (mix.mix(images, modality, label),)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != 'fp32'):
            out = net(images, modality, *mixed)
        scaler.scale(learn.loss_func(out, label)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return step

def measure_step(dls, setting, network, precision, compiled):
    step = step_of(dls, setting, network, precision, compiled)
    begun = time.perf_counter()
    for _ in range(setting['warm']): step()
    wait(dls.device)
    warm_s = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(setting['steps']): step()
    wait(dls.device)
    ms = 1e3*(time.perf_counter() - begun)/setting['steps']
    return dict(ms=ms, warm_s=round(warm_s, 1), peak_gib=peak_gib(dls.device))

def measure_kernels(dls, setting, network, precision, compiled):
    "What a step consists of; on the CPU its operations instead of kernels."
    cuda = dls.device.type == 'cuda'
    step = step_of(dls, setting, network, precision, compiled)
    for _ in range(setting['warm']): step()
    wait(dls.device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*cuda) as seen:
        step()
        wait(dls.device)
    events = [e for e in seen.key_averages() if not cuda or e.device_type == torch.autograd.DeviceType.CUDA]
    spent = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.key.lower()) for e in events]
    total = sum(t for t,_ in spent)
    products = sum(t for t,name in spent if any(o in name for o in PRODUCTS))
    share = products/total if total else None
    return dict(kernels=sum(e.count for e in events), kernels_ms=total/1e3, share_products=share)


# ---------------------------------------------------------------- the loop and the loader

class Clock(Callback):
    "Times the last epoch's batches after its first few, and waits for the device only before and after them."
    order, run_valid = -1000, False
    def __init__(self, skip): self.skip = skip
    def before_batch(self):
        if self.iter == min(self.skip, self.n_iter-1): self.begin()
    def begin(self):
        wait(self.dls.device)
        self.begun, self.first = time.perf_counter(), self.iter
    def after_train(self):
        wait(self.dls.device)
        self.ms = 1e3*(time.perf_counter() - self.begun)/(self.n_iter - self.first)

class Syncs(Callback):
    "Counts how often the host waits for the device in some batches."
    order, run_valid = -1000, False
    def __init__(self, first, n): self.first, self.n, self.seen = first, n, 0
    def before_batch(self):
        if self.iter == self.first: torch.cuda.set_sync_debug_mode('warn')
        if self.iter == self.first + self.n: torch.cuda.set_sync_debug_mode('default')

def measure_loop(dls, setting, network, precision, compiled):
    clock = Clock(setting['warm'])
    learn = learner(dls, setting, network, precision, compiled, cbs=[clock])
    with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, lr=.01)
    return dict(ms=clock.ms, peak_gib=peak_gib(dls.device))

def measure_syncs(dls, setting, network, precision, compiled):
    if dls.device.type != 'cuda': return dict(syncs=None)
    n = 5
    learn = learner(dls, setting, network, precision, compiled, cbs=[Syncs(setting['warm'], n)])
    try:
        with warnings.catch_warnings(record=True) as said, learn.no_bar(), learn.no_logging():
            warnings.simplefilter('always')
            learn.fit_tmpa(1, lr=.01)
    finally: torch.cuda.set_sync_debug_mode('default')
    return dict(syncs=sum('synchroniz' in str(w.message) for w in said)/n)

def measure_loader(dls, setting, *_):
    for _ in range(2):  # the first time fills the cache
        begun = time.perf_counter()
        for _ in dls.train: pass
        wait(dls.device)
    return dict(ms=1e3*(time.perf_counter() - begun)/len(dls.train))

MEASURES = dict(
    step=measure_step,
    loop=measure_loop,
    loader=measure_loader,
    kernels=measure_kernels,
    syncs=measure_syncs,
)


# ---------------------------------------------------------------- all of it, most decisive first

def plan(precisions, compiled):
    "(measure, network, precision, compiled) in the order in which they are wanted."
    first, both = precisions[0], ('step', 'loop')
    for network in ('TMPA', 'B'):
        for what in both: yield what, network, first, False
    yield 'loader', '', '', False
    yield 'syncs', 'TMPA', first, False
    if compiled:
        for network in ('TMPA', 'B'):
            for what in both: yield what, network, first, True
    yield 'kernels', 'TMPA', first, False
    for what in both: yield what, 'B+PedMix', first, False
    for precision in precisions[1:]:
        for network in NETWORKS:
            for what in both: yield what, network, precision, False
    for network in ('B', 'B+PedMix'):
        for what in ('kernels', 'syncs'): yield what, network, first, False
    if not compiled: return
    yield 'kernels', 'TMPA', first, True
    yield 'step', 'B+PedMix', first, True
    for precision in precisions[1:]:
        for network in NETWORKS: yield 'step', network, precision, True

@contextmanager
def until(deadline):
    "Interrupt what has not ended by then."
    def late(*_): raise TimeoutError('not measured: out of time')
    left = deadline - time.monotonic()
    if left <= 0: late()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, left)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def environment(device, setting):
    card = torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor() or platform.machine()
    versions = dict(
        tmpa=tmpa.__version__,
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        fastai=fastai.__version__,
        python=platform.python_version(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )
    return dict(
        made=date.today().isoformat(),
        card=card,
        device=device.type,
        cores=os.cpu_count(),
        versions=versions,
        setting=setting,
    )

def shown(row):
    network = row['network'] or 'all'
    mode = 'compiled' if row['compiled'] else 'eager'
    name = f"{network:9} {row['precision']:5}{mode:9} {row['measure']:8}"
    values = []
    for k,v in row.items():
        if k in ('network', 'precision', 'compiled', 'measure'): continue
        if isinstance(v, float): v = round(v, 3)
        values.append(f'{k} {v}')
    return name + '  '.join(values)

def run(setting, device, precisions, compiled, minutes, out):
    "Measure what the time allows; every row is on disk as soon as it is known."
    deadline = time.monotonic() + 60*minutes
    result = dict(environment(device, setting), rows=[])
    originals = 2*setting['P']*setting['K']
    with tempfile.TemporaryDirectory() as d:
        size = setting['size']
        people = make_regdb(Path(d)/'people', n_ids=setting['ids'], size=size, seed=0, n_workers=setting['workers'])
        dls = ReIDDataLoaders.from_regdb(
            people, size=size, P=setting['P'], K=setting['K'], valid=None,
            cache=Path(d)/'images', device=device)
        for measure, network, precision, is_compiled in plan(precisions, compiled):
            row = dict(measure=measure, network=network, precision=precision, compiled=is_compiled)
            if device.type == 'cuda':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            torch._dynamo.reset()
            try:
                with until(deadline):
                    row.update(MEASURES[measure](dls, setting, network, precision, is_compiled))
            except Exception as e: row['error'] = f'{type(e).__name__}: {e}'.strip().splitlines()[0][:200]
            if 'ms' in row: row['originals_s'] = 1e3*originals/row['ms']
            result['rows'].append(row)
            print(shown(row), flush=True)
            with atomic_write(out) as f: f.write_text(json.dumps(result, indent=1))
    return result

@call_parse
def main(
    out:str='runs/gpu.json', # File for the results, written row by row
    minutes:float=3.5, # What has not been measured by then is said to be missing
    tiny:store_true=False, # A tiny network and few images; always without CUDA
):
    "Measure step, loop and loader of B, B+PedMix and TMPA, eager and compiled."
    cuda = torch.cuda.is_available()
    setting = FULL if cuda and not tiny else TINY
    device = torch.device('cuda', torch.cuda.current_device()) if cuda else torch.device('cpu')
    run(setting, device, ('fp16', 'bf16') if cuda else ('fp32',), cuda, minutes, out)
    print(f'written to {out}')
