"""Pictures and what they are drawn from, where the notebooks' own asserts are not enough: captum as an oracle, other networks, all protocols, memory."""
import tracemalloc
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from tmpa.core import ConfigError, Modality, ReIDImage
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.synthetic import make_llcm, make_regdb, make_sysu
from tmpa.interpret import ReIDInterpretation, pair_distances, top_matches
from tmpa.learner import tmpa_learner
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, n_params
from tmpa.ranking import cmc_map_slow
from tmpa.vis.architecture import architecture, plot_architecture
from tmpa.vis.gradcam import attention_map, grad_cam, plot_attention, plot_gradcam
from tmpa.vis.tsne import plot_tsne


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@pytest.fixture(scope='module')
def loaders(tmp_path_factory, device):
    "The three protocols, with small rendered sets."
    d,kw = tmp_path_factory.mktemp('sets'),dict(size=(48, 24), P=4, K=2, num_workers=0)
    return dict(sysu=ReIDDataLoaders.from_sysu(make_sysu(d/'sysu', n_ids=20, per_cam=2, size=(48, 24)), **kw),
                regdb=ReIDDataLoaders.from_regdb(make_regdb(d/'regdb', n_ids=16, per_modality=4, size=(48, 24)), **kw),
                llcm=ReIDDataLoaders.from_llcm(make_llcm(d/'llcm', n_ids=18, size=(48, 24)), **kw))


@pytest.fixture(scope='module')
def learners(loaders):
    torch.manual_seed(0)
    return {k: tmpa_learner(o, micro_resnet, pretrained=False, mix=None) for k,o in loaders.items()}


class TestInterpretation:
    @pytest.mark.parametrize('data', ['sysu', 'regdb', 'llcm'])
    def test_tables_of_every_protocol_by_a_slow_loop(self, learners, data):
        p = ReIDInterpretation.from_learner(learners[data])
        assert p.items == learners[data].dls.test_items
        D = torch.cdist(p.feats, p.feats).numpy()
        for name,s in p.settings.items():
            trials = [cmc_map_slow(D[np.ix_(s.q_idx, g)], p.pids[s.q_idx], p.pids[g], p.cams[s.q_idx], p.cams[g], s.rule) for g in s.g_idxs]
            table = p.by_camera(name)
            for cam in table.index:
                ap = [np.mean([t.ap[i] for t in trials if t.valid[i]]) for i,q in enumerate(s.q_idx) if p.cams[q] == cam and any(t.valid[i] for t in trials)]
                assert table.loc[cam, 'queries'] == len(ap)
                assert table.loc[cam, 'mAP'] == pytest.approx(100*np.mean(ap), abs=.1)   # cosine and Euclidean may order ties differently
            assert p.by_identity(name).queries.sum() == table.queries.sum()

    @pytest.mark.parametrize('data', ['sysu', 'regdb', 'llcm'])
    def test_figures_of_every_protocol(self, learners, data):
        p = ReIDInterpretation.from_learner(learners[data])
        for name,s in p.settings.items():
            assert len(p.plot_ranks(2, k=3, setting=name, trial=len(s.g_idxs)-1).axes) == 8
            assert 'AP' in p.plot_worst_queries(1, k=2, setting=name).axes[0].get_title()
            plt.close('all')
        assert len(p.plot_distances().axes) == 3

    def test_removals_agree_with_the_score(self, learners):
        p = ReIDInterpretation.from_learner(learners['llcm'])
        s = p.setting('t2v')
        for q in s.q_idx[:10]:
            g,d = top_matches(p.feats, p.pids, p.cams, q, s.g_idxs[0], s.rule, k=None)
            assert not ((p.pids[g] == p.pids[q]) & (p.cams[g] == p.cams[q])).any() and (np.diff(d) >= 0).all()

    def test_validation_items_where_there_is_no_test(self, loaders):
        src = loaders['regdb']
        dls = ReIDDataLoaders.from_items(src.train_items, src.valid_items, size=(48, 24), P=4, K=2, num_workers=0)
        learn = tmpa_learner(dls, micro_resnet, pretrained=False, mfe=False, mft=False, mix=None)
        assert ReIDInterpretation.from_learner(learn).items == dls.valid_items
        dls = ReIDDataLoaders.from_items(src.train_items, size=(48, 24), P=4, K=2, num_workers=0)
        with pytest.raises(ConfigError, match='pass items='): ReIDInterpretation.from_learner(tmpa_learner(dls, micro_resnet, pretrained=False, mix=None))

    def test_memory_does_not_grow_with_the_pairs(self):
        n = 12_000   # 72 million pairs; a list of them would take more than a gigabyte
        rng = np.random.default_rng(0)
        feats = torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)), dim=1)
        tracemalloc.start()
        d = pair_distances(feats, rng.integers(0, 90, n), rng.integers(0, 2, n), max_pairs=20_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(o['n_same']+o['n_other'] for o in d.values()) == n*(n-1)//2
        assert all(len(o['same']) == len(o['other']) == 20_000 for o in d.values()) and peak < 30e6, peak

    def test_one_person_or_one_modality(self):
        feats = torch.randn(4, 3)
        d = pair_distances(feats, [1, 1, 1, 1], [0, 0, 1, 1])
        assert [len(o['other']) for o in d.values()] == [0, 0, 0] and len(d['vis-ir']['same']) == 4
        d = pair_distances(feats, [1, 1, 2, 2], [0]*4)
        assert len(d['ir-ir']['same']) == len(d['vis-ir']['other']) == 0


class TestGradCAM:
    @pytest.mark.parametrize('layer', ['mfe.shared', 'mfe.visible.layer2', 'mfe.infrared', 'tail'])
    def test_as_captum(self, layer):
        attr = pytest.importorskip('captum.attr')
        torch.manual_seed(0)
        model = TMPANet(4, micro_resnet, pretrained=False).eval()
        x,t = torch.randn(3, 96, 48),torch.randn(model.dim)
        want = attr.LayerGradCam(lambda o: model(o, 1)@t, model.get_submodule(layer)).attribute(x[None])[0, 0].detach()
        got = grad_cam(model, x, 1, t, layer, relu=False)
        assert torch.allclose(got, want, atol=1e-5*float(want.abs().max()))

    def test_finite_differences_through_the_network(self):
        "A little more of one channel at all h w positions of a map changes the similarity by h w times the weight of that channel."
        torch.manual_seed(0)
        model,seen = _Pooled(TMPANet(4, micro_resnet, pretrained=False)).double().eval(),[]
        x,t,layer = torch.randn(3, 48, 32).double(),torch.randn(model.net.dim).double(),model.net.mft.vis.conv
        def score(c=0, e=0.):
            def shift(_, __, out): seen[:] = [out]; out = out.clone(); out[:, c] += e; return out
            h = layer.register_forward_hook(shift)
            with torch.no_grad(): s = float(model(x[None], torch.tensor([0]))[0]@t)
            h.remove()
            return s
        score()
        a = seen[0][0]
        w = torch.tensor([(score(c, 1e-6)-score(c, -1e-6))/2e-6/a[0].numel() for c in range(len(a))])
        want = (w[:, None, None]*a).sum(0)
        assert torch.allclose(grad_cam(model, x, 0, t, layer, relu=False), want, atol=1e-5*float(want.abs().max()))

    def test_plots_of_every_variant(self, learners, loaders):
        items = loaders['regdb'].test_items
        a,b = items[0],next(o for o in items if o.modality == Modality.INFRARED)
        assert len(plot_gradcam(learners['regdb'], a, b).axes) == 8
        assert len(plot_attention(learners['regdb'], b, a, positions=[(0, 0), (2, 1)]).axes) == 3
        for kw in (dict(mft=False), dict(mfe=False, mft=False)):
            m = TMPANet(4, micro_resnet, pretrained=False, **kw)
            assert len(plot_gradcam(m, a, b, size=(48, 24)).axes) == (8 if m.mfe.visible is not None else 4)
        with pytest.raises(ConfigError, match='one trunk'): plot_attention(m, a, b, size=(48, 24))

    def test_attention_needs_no_gradients_and_keeps_the_mode(self):
        m = TMPANet(4, micro_resnet, pretrained=False).train()
        m.mfe.visible.eval()
        w = attention_map(m, torch.randn(3, 64, 32), Modality.INFRARED)
        assert not w.requires_grad and m.training and not m.mfe.visible.training and not m.mft._forward_pre_hooks
        assert torch.allclose(w.sum((-2, -1)), torch.ones(w.shape[:2]), atol=1e-5)


class _Pooled(nn.Module):
    "F_C, averaged: all of the network that is not float32 by design."
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x, modality): return self.net.single(x, modality).f_c.mean((2, 3))


class TestArchitecture:
    @pytest.mark.parametrize('arch', [micro_resnet, 'resnet50'])
    @pytest.mark.parametrize('kw', [dict(), dict(mft=False), dict(mfe=False, mft=False), dict(complete='pair'), dict(eval_complete='miss', heads=2)], ids=str)
    def test_counts_add_up(self, arch, kw):
        m = TMPANet(5, arch, pretrained=False, **kw)
        b = architecture(m, (64, 32))
        assert sum(o.params for o in b.values()) == n_params(m, True) and 'other' not in b
        assert all(o.inputs for k,o in b.items() if k not in ('images', 'mixed')), 'a block that reads nothing'

    def test_what_is_added_to_a_model_is_drawn(self):
        m = TMPANet(5, micro_resnet, pretrained=False)
        m.surprise = nn.Linear(7, 3)
        fig = plot_architecture(m, (64, 32))
        assert any('other' in t.get_text() and '\n24' in t.get_text() for t in fig.axes[0].texts)

    def test_frozen_models_too(self):
        m = TMPANet(5, micro_resnet, pretrained=False)
        for p in m.parameters(): p.requires_grad_(False)
        assert architecture(m, (64, 32))['W_V'].inputs == ['conv_V', 'attn']


def test_tsne_of_learners_and_of_features(learners, loaders):
    dls = loaders['regdb']
    f = ReIDInterpretation.from_learner(learners['regdb']).feats
    fig = plot_tsne({'learner': learners['regdb'], 'features': f}, n_ids=4)
    a,b = (ax.get_title().split('\n')[1:] for ax in fig.axes)
    assert a == b
    with pytest.raises(ConfigError, match='nobody'): plot_tsne({'x': f[:2]}, [ReIDImage(Path('a'), 1, 1, 0)]*2)
