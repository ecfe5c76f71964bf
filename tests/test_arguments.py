"Arguments that are passed on: a name that nobody knows is one line with the nearest, in every public function that takes more than it names."
import importlib, inspect, pkgutil
from functools import partial

import pytest, torch

import tmpa
from tmpa.callback.loop import AsyncMixedPrecision
from tmpa.core import ConfigError, ReIDImage
from tmpa.dart import TwinNet, dart_learner
from tmpa.data.load import ReIDDataLoaders, ReIDDL, ReIDDataset
from tmpa.data.synthetic import show_gallery
from tmpa.demo import compare
from tmpa.interpret import ReIDInterpretation
from tmpa.learner import reid_learner, tmpa_learner
from tmpa.models.backbone import ibn_resnet, micro_resnet, tiny_resnet
from tmpa.models.net import ReIDNet
from tmpa.recipes import Recipe, get_recipe
from tmpa.reproduce import sweep
from tmpa.robust import group_confidence
from tmpa.scoring import evaluate_run
from tmpa.search import Gallery
from tmpa.setup import make_setup

class Loaders:
    c, valid_items, device = 4, [], 'cpu'

dls = Loaders()
items = [ReIDImage('a.png', p, m, m) for p in range(2) for m in range(2)]
net = lambda method=None, **kw: Recipe('r', mfe=False, mft=False, mix=None, model=kw, **({'method': method} if method else {})).check()

CALLS = {
    'tmpa_learner': (lambda: tmpa_learner(dls, mixx=None), 'mixx', 'mix'),
    'model_kw': (lambda: tmpa_learner(dls, model_kw=dict(head=2)), 'head', 'heads'),
    'model_kw twice': (lambda: tmpa_learner(dls, model_kw=dict(mfe=False)), 'mfe', 'it takes'),
    'tmpa_learner terms': (lambda: tmpa_learner(dls, terms=()), 'terms', 'it takes'),
    'reid_learner': (lambda: reid_learner(dls, torch.nn.Linear(1, 1), None, precison='fp32'), 'precison', 'precision'),
    'dart_learner': (lambda: dart_learner(dls, warm_up=3), 'warm_up', 'warmup'),
    'dart_learner model_kw': (lambda: dart_learner(dls, model_kw=dict(evalate='a')), 'evalate', 'evaluate'),
    'TwinNet': (lambda: TwinNet(4, micro_resnet, False, pool=3), 'pool', 'pool_p'),
    'Recipe.mix': (lambda: Recipe('r', mix=dict(kind='pedmix', patches=3)).check(), 'patches', 'patch'),
    'Recipe.but': (lambda: get_recipe('TMPA').but(mixes=None), 'mixes', 'mix'),
    'Recipe.model': (lambda: net(head=2), 'head', 'heads'),
    'Recipe.model of DART': (lambda: net('dart', keep_original=True), 'keep_original', 'keep_originals'),
    'compare': (lambda: compare([], 'nowhere', None, epoch=3), 'epoch', 'it takes'),
    'make_setup': (lambda: make_setup('small', epoch=3), 'epoch', 'epochs'),
    'sweep': (lambda: sweep('TMPA', {}, None, worker=3), 'worker', 'workers'),
    'group_confidence': (lambda: group_confidence([1.], [0], max_iters=3), 'max_iters', 'max_iter'),
    'tiny_resnet': (lambda: tiny_resnet(widht=3), 'widht', 'width'),
    'micro_resnet': (lambda: micro_resnet(num_class=3), 'num_class', 'num_classes'),
    'ibn_resnet': (lambda: ibn_resnet(num_class=3), 'num_class', 'num_classes'),
    'evaluate_run': (lambda: evaluate_run('weights.pth', flp=True), 'flp', 'flip'),
    'AsyncMixedPrecision': (lambda: AsyncMixedPrecision(init_scal=3), 'init_scal', 'init_scale'),
    'show_gallery': (lambda: show_gallery(sise=(48, 24)), 'sise', 'size'),
    'Gallery.from_learner': (lambda: Gallery.from_learner(None, irange=3), 'irange', 'ir_range'),
    'Gallery.load': (lambda: Gallery.load('g.npz', sizes=3), 'sizes', 'size'),
    'plot_ranks': (lambda: ReIDInterpretation(items, torch.eye(4)).plot_ranks(titel='x'), 'titel', 'title'),
    'ReIDDL': (lambda: ReIDDL(ReIDDataset([]), sampeler=3), 'sampeler', 'did you mean sample?'),
}

@pytest.mark.parametrize('name', CALLS)
def test_unknown_names_are_one_line(name):
    call, given, near = CALLS[name]
    with pytest.raises(ConfigError) as e: call()
    assert f'has no argument {given}: ' in str(e.value) and near in str(e.value) and '\n' not in str(e.value)

def test_distrib_ctx_refuses_too():
    pytest.importorskip('accelerate')
    from fastai.learner import Learner
    with pytest.raises(ConfigError, match='did you mean sync_bn'), Learner.distrib_ctx(None, sync_b=True): pass

def test_own_networks_that_pass_arguments_on_may_take_what_their_bases_take():
    from tmpa.models.net import NETS
    from tmpa.models.tmpa import TMPANet
    class Own(TMPANet, method='own for arguments'):
        def __init__(self, n_classes, arch, pretrained=True, width=3, **kwargs): super().__init__(n_classes, arch, pretrained, mfe=False, mft=False, **kwargs)
    try:
        r = Recipe('own', mfe=False, mft=False, mix=None, net='own for arguments', model=dict(width=4, pool_p=2.))
        r.check()
        with pytest.raises(ConfigError, match='did you mean width'): r.but(model=dict(widht=4)).check()
    finally: del NETS['own for arguments']

# what takes anything by design, or is fastai's to call
ANY = {'save_weights', 'RunawayError', 'set_switches', 'Foreign', 'ReIDNet.__init_subclass__'}

def public():
    "Every function and method of ours with **kwargs, by name."
    for info in pkgutil.walk_packages(tmpa.__path__, 'tmpa.'):
        if info.name == 'tmpa.all' or info.name.startswith('tmpa._'): continue
        m = importlib.import_module(info.name)
        for k in getattr(m, '__all__', ()):
            o = getattr(m, k)
            members = [(k, o)] if not inspect.isclass(o) else [(f'{k}.{n}', v) for n, v in vars(o).items() if not n.startswith('_') or n == '__init__']
            for name, f in members:
                f = getattr(f, '__func__', f)
                if inspect.isfunction(f) and getattr(f, '__module__', '').startswith('tmpa'): yield name, inspect.unwrap(f)

def test_whatever_takes_more_checks_it():
    "Read from the sources, so that a new function with **kwargs is not forgotten."
    missing = {}
    for name, f in public():
        kw = [p for p in f.__code__.co_varnames[f.__code__.co_argcount:] if f.__code__.co_flags & inspect.CO_VARKEYWORDS and p in ('kwargs', 'kw', 'run', 'changes', 'meta', 'where', 'switches')]
        if not kw or name.removesuffix('.__init__') in ANY: continue
        code = inspect.getsource(f)
        if not ('check_names' in code or '_check_a' in code or name in ('tiny_resnet', 'micro_resnet', 'ibn_resnet', 'ReIDDL.new', 'ReIDDataLoaders.test_dl')): missing[name] = kw
    assert not missing


@pytest.mark.parametrize('model', [dict(pool_p='abc'), dict(heads='abc')])
def test_types_of_a_recipes_network(model):
    from tmpa.recipes import get_recipe
    with pytest.raises(ConfigError, match=next(iter(model))): get_recipe('TMPA').but(model=model).check()
