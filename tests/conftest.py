"""Threads and devices of the suite.

A test with the argument `device` runs once on every device there is: the CPU, CUDA, and a stand-in (see pretend.py), so
that a machine without a GPU finds what would fail on one. All others run on the CPU, also where there is a GPU. They
fail when they ask fastai for its default device, unless they are marked `cpu` with a reason.
"""
import atexit, os, shutil, sys, tempfile

# pytest-xdist runs several processes side by side, and more threads than cores are many times slower
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(name, '1')
os.environ.setdefault('MPLBACKEND', 'agg')

# what tests render and decode goes with them; processes of pytest-xdist find it here
if 'TMPA_HOME' not in os.environ:
    os.environ['TMPA_HOME'] = tempfile.mkdtemp(prefix='tmpa-tests-')
    atexit.register(shutil.rmtree, os.environ['TMPA_HOME'], ignore_errors=True)

from contextlib import contextmanager

import fastai.torch_core, pytest, torch

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

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    on_its_device = _ON[_device_of(item) or 'cpu']
    with on_its_device(): return (yield)

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
