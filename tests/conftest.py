"""Threads and devices of the suite.

A test with the argument `device` runs once on every device there is: the CPU, CUDA, and a stand-in (see pretend.py), so
that a machine without a GPU finds what would fail on one. All others run on the CPU, also where there is a GPU. They
fail when they ask fastai for its default device, unless they are marked `cpu` with a reason.
"""
import atexit, os, shutil, sys, tempfile

# pytest-xdist runs several processes side by side, and more threads than cores are many times slower
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(name, '1')
os.environ.setdefault('MPLBACKEND', 'agg')

# What a process of the suite puts into the temporary folder it puts into one of its own. All of them are removed at
# the end, with what tests render, decode and compile; pytest keeps folders of failed tests where it always does.
if 'TMPA_TESTS' not in os.environ:
    os.environ['TMPA_TESTS'] = tempfile.mkdtemp(prefix='tmpa-tests-')
    atexit.register(shutil.rmtree, os.environ['TMPA_TESTS'], ignore_errors=True)
    os.environ.setdefault('PYTEST_DEBUG_TEMPROOT', tempfile.gettempdir())
SCRATCH = os.path.join(os.environ['TMPA_TESTS'], os.environ.get('PYTEST_XDIST_WORKER', 'main'))
os.makedirs(SCRATCH, exist_ok=True)
os.environ['TMPDIR'] = tempfile.tempdir = SCRATCH
os.environ.setdefault('TMPA_HOME', os.path.join(os.environ['TMPA_TESTS'], 'home'))
os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(os.environ['TMPA_TESTS'], 'compiled'))

from contextlib import ExitStack, contextmanager
from functools import partial

import fastai.torch_core, pytest, torch

from tmpa import interpret, run_report

import pretend

CUDA = torch.cuda.is_available()
DEVICES = ['cpu', *(['cuda'] if CUDA else []), pretend.NAME]
if CUDA: torch.cuda.init()  # before a test hides it from its processes


@pytest.fixture(scope='module', params=DEVICES)
def device(request):
    "Name of the device that is fastai's default during the test."
    return request.param

@pytest.fixture
def tol(device):
    "`tol(precision)`: how far apart two ways of computing may lie, on this device and in this precision."
    full = 1e-5 if device == 'cpu' else 1e-4
    tolerances = {'fp32': full, 'fp16': 4e-3, 'bf16': 3e-2}
    def of(precision='fp32'): return tolerances[precision]
    return of

# To draw six ranked lists of ten is most of what a short run takes.
run_report.plot_ranks = partial(interpret.plot_ranks, queries=2, k=3)

@pytest.fixture
def whole_report(monkeypatch):
    "The run draws its ranked lists as a user's does."
    monkeypatch.setattr(run_report, 'plot_ranks', interpret.plot_ranks)

@contextmanager
def _on_cpu():
    "No CUDA for this process nor for those that it starts."
    with pytest.MonkeyPatch.context() as patch:
        if CUDA:
            patch.setattr(torch.cuda, 'is_available', lambda: False)
            patch.setenv('CUDA_VISIBLE_DEVICES', '')
        yield

@contextmanager
def _on_cuda(): yield

_ON = {'cpu': _on_cpu, 'cuda': _on_cuda, pretend.NAME: pretend.pretending}

def _device_of(item): return getattr(item, 'callspec', None) and item.callspec.params.get('device')

_entered = []

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    "Tests of one device in a row enter it once: it takes a look into every module."
    device = _device_of(item) or 'cpu'
    if not _entered:
        _entered.append(ExitStack())
        _entered[0].enter_context(_ON[device]())
    try: return (yield)
    finally:
        if nextitem is None or (_device_of(nextitem) or 'cpu') != device: _entered.pop().close()

SLOW = 'test_every_page', 'test_inductor_agrees', 'test_one_graph', 'test_runs'

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    "What takes longest begins first, so that at the end no process waits for another one."
    items.sort(key=lambda item: SLOW.index(item.originalname) if item.originalname in SLOW else len(SLOW))

def pytest_configure(config):
    config.addinivalue_line('markers', 'cpu(reason): asks for the default device and is a test of the CPU alone')

_asked = []

def _recorded(default_device):
    def asked(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get('__name__')
        # these two ask, and take that of the loaders
        if caller not in ('fastai.callback.core', 'fastai.learner'): _asked.append(caller)
        return default_device(*args, **kwargs)
    return asked

pretend.replace(fastai.torch_core.default_device, _recorded(fastai.torch_core.default_device))

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if _asked and not _device_of(item) and not item.get_closest_marker('cpu'):
        pytest.fail('depends on the default device: '
                    'give it the argument `device`, so that it runs on every device there is')
    return result

@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    _asked.clear()
    return (yield)

# of multiprocessing, as long as the process lives, of onnxruntime, of torchrun and of torch's compiler
OTHERS = 'pymp-', '.ses', 'torchelastic_', 'torchinductor_'

def left_behind():
    "What tests have left in this process's temporary folder, which is emptied of it."
    left = [o for o in os.listdir(SCRATCH) if not o.startswith(OTHERS)]
    for name in left:
        path = os.path.join(SCRATCH, name)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return left

@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    result = yield
    # what a module shares goes when its last test ends
    if (nextitem is None or nextitem.module is not item.module) and (left := left_behind()):
        pytest.fail(f'tests of {item.module.__name__} left in the temporary folder: {", ".join(left)}')
    return result
