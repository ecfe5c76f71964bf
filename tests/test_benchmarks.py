"The benchmarks run, at a size that shows only that they do."
import importlib.util, itertools, json
from pathlib import Path

import pytest, torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def gpu():
    spec = importlib.util.spec_from_file_location('gpu_benchmark', ROOT/'benchmarks'/'gpu.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def few(precisions, compiled):
    p = precisions[0]
    yield 'step', 'TMPA', p, False
    yield 'nothing', 'TMPA', p, False
    yield 'loop', 'B+PedMix', p, False
    yield 'loader', '', '', False
    yield 'kernels', 'B', p, False
    yield 'syncs', 'B', p, False

@pytest.mark.cpu(reason='chooses its device itself')
def test_gpu_benchmark(gpu, tmp_path, monkeypatch):
    "A part that fails is a row, and not the end."
    monkeypatch.setattr(gpu, 'plan', few)
    out = tmp_path/'new'/'gpu.json'
    gpu.run(gpu.TINY, torch.device('cpu'), ('fp32',), False, 2, out)
    result = json.loads(out.read_text())
    assert {'made', 'card', 'device', 'cores', 'versions', 'setting', 'rows'} <= set(result)
    assert {'tmpa', 'torch', 'fastai', 'cuda'} <= set(result['versions'])
    step, nothing, loop, loader, kernels, syncs = result['rows']
    for r in result['rows']: assert {'measure', 'network', 'precision', 'compiled'} <= set(r)
    assert 'KeyError' in nothing['error'] and not any('error' in r for r in result['rows'] if r is not nothing)
    for r in (step, loop, loader): assert r['ms'] > 0 and r['originals_s'] == pytest.approx(8e3/r['ms'])
    assert kernels['kernels'] > 10 and 0 < kernels['share_products'] < 1
    assert syncs['syncs'] is None

@pytest.mark.cpu(reason='chooses its device itself')
def test_what_there_is_no_time_for_is_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'plan', few)
    rows = gpu.run(gpu.TINY, torch.device('cpu'), ('fp32',), False, 0, tmp_path/'gpu.json')['rows']
    assert len(rows) == 6 and all('out of time' in r['error'] for r in rows)

def test_everything_is_planned_once(gpu):
    for compiled in (False, True):
        parts = list(gpu.plan(('fp16', 'bf16'), compiled))
        assert len(parts) == len(set(parts)) and parts[0][:2] == ('step', 'TMPA')
        wanted = set(itertools.product(('step', 'loop'), gpu.NETWORKS, ('fp16', 'bf16')))
        assert {o[:3] for o in parts} >= wanted

@pytest.mark.cpu(reason='is about one core')
def test_input_benchmark(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('input_benchmark', ROOT/'benchmarks'/'input.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    try: module.main(['--quick', '--out', str(tmp_path/'input.json')])
    finally: torch.set_num_threads(threads)
    result = json.loads((tmp_path/'input.json').read_text())
    rates, = result['results'].values()
    for k in ('cold', 'first epoch', 'warm'):
        ratio = rates[f'{k} ratio']
        assert rates[f'tmpa {k}']['median'] > 0 and ratio['low'] <= ratio['high']
    assert 'images a second and core' in capsys.readouterr().out
