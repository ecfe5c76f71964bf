"Images of people whom nobody knows (identity -1) mean the same everywhere: nobody's match, nobody's mistake, nobody to train on."
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from tmpa.confidence import bootstrap
from tmpa.core import UNKNOWN, ConfigError, DataError, ProtocolError, ReIDImage
from tmpa.protocols import cross_settings, llcm_gallery, sysu_gallery
from tmpa.data.readers import csv_items
from tmpa.data.load import ReIDDataLoaders, ReIDDataset, identity_batches, split_by_pid
from tmpa.interpret import ReIDInterpretation, pair_distances
from tmpa.robust import noisy_items
from tmpa.scoring import score_feats
from tmpa.search import Gallery, Hit, Hits
from tmpa.vis.tsne import pick_people


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    "Five people, two images in each modality, the last of them unknown."
    d = tmp_path_factory.mktemp('people')
    def one(p, m, n):
        f = d/f'{p}-{m}-{n}.png'
        Image.fromarray(np.full((24, 12, 3), 40*p + 10*n, np.uint8)).save(f)
        return ReIDImage(f, UNKNOWN if p == 4 else p, 1 + m, m)
    return [one(p, m, n) for p in range(5) for m in (0, 1) for n in (0, 1)]


def test_nobody_is_trained_on(people, device):
    with pytest.warns(UserWarning, match='4 of 20 training images are of unknown identity'):
        dls = ReIDDataLoaders.from_items(people, size=(24, 12), P=2, K=1, num_workers=0, device=device)
    assert dls.vocab == [0, 1, 2, 3] and len(dls.train_items) == 16
    assert (dls.train.one_batch()[3] != UNKNOWN).all()
    nobody = [o._replace(pid=UNKNOWN) for o in people]
    with pytest.raises(DataError, match='none of the 20 training images'): ReIDDataLoaders.from_items(nobody, size=(24, 12), device=device)
    with pytest.raises(DataError, match='none of the 20 validation images'): ReIDDataLoaders.from_items(people, nobody, size=(24, 12), P=2, K=1, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # neither unknown nor seen in training
        known = [o for o in people if o.pid != UNKNOWN]
        ReIDDataLoaders.from_items(known[:8], known[8:] + nobody[:1], size=(24, 12), P=2, K=1, num_workers=0, device=device)


def test_nobody_is_dealt_or_held_out(people):
    assert {people[i].pid for i in identity_batches(people, P=4, K=2).flatten()} == {0, 1, 2, 3}
    for seed in range(5): assert UNKNOWN not in {o.pid for o in split_by_pid(people, .5, seed)[1]}
    assert UNKNOWN not in {people[i].pid for i in pick_people(people, 10)}
    with pytest.raises(ConfigError, match='nothing can be wrong'): noisy_items(people, .2)


def test_galleries_draw_nobody(people):
    assert all(people[i].pid != UNKNOWN for m in (0, 1) for i in llcm_gallery(people, m))
    sysu = [o._replace(cam=(1, 3)[o.modality]) for o in people]
    assert {sysu[i].pid for i in sysu_gallery(sysu)} == {0, 1, 2, 3}


def test_nobody_is_shown_as_right_or_wrong(people):
    frames = lambda fig: [any(s.get_visible() for s in ax.spines.values()) and ax.axison for ax in fig.axes]
    for q,h,framed in ((0, 1, True), (0, 19, False), (19, 0, False), (19, 18, False)):
        fig = Hits([Hit(.5, people[h], h)], query=people[q]).show()
        assert frames(fig)[1] == framed and '✗' not in fig.axes[1].get_title()
    assert '✗' in Hits([Hit(.5, people[4], 4)], query=people[0]).show().axes[1].get_title()
    assert 'id' not in repr(Hits([Hit(.5, people[19], 19)])).split('camera')[1] and 'id 0' in repr(Hits([Hit(.5, people[0], 0)]))


def test_interpretation_of_unlabelled_images(people):
    feats = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    p = ReIDInterpretation(people, feats)
    assert set(p.queries().pid) == {0, 1, 2, 3} and list(p.by_identity().index) and UNKNOWN not in p.by_identity().index
    assert p.results['v2t'].trials[0].n_unknown == 2 and 'left out as unknown' in repr(p.results['v2t'])
    nobody = ReIDInterpretation([o._replace(pid=UNKNOWN) for o in people], feats)
    for ask in (lambda: nobody.results, nobody.queries, nobody.by_camera, lambda: nobody.plot_worst_queries(1)):
        with pytest.raises(ProtocolError, match='the identity of each is unknown'): ask()
    d = pair_distances(feats, nobody.pids, nobody.modality)
    assert all(o['n_same'] == o['n_other'] == 0 for o in d.values())
    plt.close('all')


def test_no_group_of_unknown_people():
    x, groups = np.random.default_rng(0).random(40), np.arange(40)//2
    groups[:6] = UNKNOWN
    assert bootstrap(x, groups=groups) == bootstrap(x[6:], groups=groups[6:])


def test_csv_files_may_say_so(tmp_path):
    Image.new('RGB', (4, 8)).save(tmp_path/'a.png')
    (tmp_path/'list.csv').write_text('file,pid,cam,modality,split\na.png,-1,1,visible,test\n')
    assert csv_items(tmp_path/'list.csv', 'test')[0].pid == UNKNOWN


def test_a_query_of_an_unknown_person_has_no_same_camera_rule():
    g = Gallery(made_by='x')
    g.add([ReIDImage(Path('a'), UNKNOWN, 1, 1), ReIDImage(Path('b'), 5, 1, 1)], feats=torch.eye(2))
    with pytest.raises(ProtocolError, match='camera and identity'): g.search(torch.eye(2)[:1], rule='market', records=[ReIDImage(Path('q'), UNKNOWN, 1, 0)])
    assert [h.pos for h in g.search(torch.eye(2)[:1], rule='market', records=[ReIDImage(Path('q'), 5, 1, 0)])[0]] == [0]  # hides b, not the unknown one


def test_scores_count_the_unknown(people):
    feats = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    scores = score_feats(feats, people, cross_settings(people))[0]
    assert [o['n_unknown'] for o in scores.values()] == [2, 2] and [o['n_queries'] for o in scores.values()] == [10, 10]
    known = [i for i,o in enumerate(people) if o.pid != UNKNOWN]
    some = score_feats(feats[known], [people[i] for i in known], cross_settings([people[i] for i in known]))[0]
    assert 'n_unknown' not in some['v2t'] and some['v2t']['mAP'] == scores['v2t']['mAP']
