"""Thresholds and tracks of a `Gallery`: verdicts, `max_distance`, and what is stored."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tmpa.core import ConfigError, DataError, PublishedImage, ReIDImage, TrackedImage
from tmpa.confidence import Interval
from tmpa.search import Gallery, Hits
from tmpa.verify import Threshold

RATE = Interval(.01, .005, .02)
CROSS, ANY = (Threshold(.5, .4, .6, .9, .01, .95, RATE, RATE, 10, 100, cross=c, note='made up') for c in (True, None))


def at(*distances):
    "Unit vectors at these distances from the first axis."
    cos = 1 - np.array(distances)**2/2
    return np.stack([cos, np.sqrt(1 - cos**2)], 1).astype(np.float32)

QUERY = torch.tensor([1., 0])
FAR = .1, .45, .55, .85, 1.2

def gallery(threshold=ANY, modality=(1, 1, 1, 1, 1)):
    g = Gallery(made_by='somebody')
    g.add([ReIDImage(Path(f'{i}.jpg'), i, 1, m) for i, m in enumerate(modality)], feats=at(*FAR))
    g.threshold = threshold
    return g

def search(g, **kw): return g.search(QUERY, k=9, records=[ReIDImage(Path('q.jpg'), 7, 2, 0)], **kw)


def test_each_hit_and_the_query_have_a_verdict():
    hits = search(gallery())
    want = ['match', 'match', 'maybe', 'maybe', 'nobody']
    assert [hits.verdict_of(h) for h in hits] == want and hits.verdict() == 'match'
    d = json.loads(json.dumps(hits.to_dict()))
    assert [h['verdict'] for h in d['hits']] == want and d['verdict'] == 'match'
    assert all(w in line for w, line in zip(want, repr(hits).split('\n')))


def test_without_a_threshold_nothing_is_said():
    hits = search(gallery(None))
    assert hits.verdict() is None and 'verdict' not in hits.to_dict() and 'verdict' not in hits.to_dict()['hits'][0]
    assert repr(hits).split('\n')[0] == '  1  0.100  0.jpg  camera 1  id 0'


def test_a_threshold_across_modalities_is_for_no_other_pair():
    hits = search(gallery(CROSS, (0, 0, 1, 0, 1)))
    assert [hits.verdict_of(h) for h in hits] == [None, None, 'maybe', None, 'nobody'] and hits.verdict() == 'maybe'
    assert search(gallery(CROSS, (0,)*5)).verdict() is None
    assert search(gallery(ANY, (0,)*5)).verdict() == 'match'
    of_features = gallery(CROSS, (0,)*5).search(QUERY)  # whose modality nobody knows
    assert of_features.verdict() == 'match'
    assert [h['verdict'] for h in hits.to_dict()['hits']] == [None, None, 'maybe', None, 'nobody']


@pytest.mark.parametrize('most,n', [(None, 5), (2, 5), (.9, 4), (.5, 2), (.05, 0), (0, 0), (np.float32(.6), 3)])
def test_max_distance(most, n):
    hits = search(gallery(), max_distance=most)
    assert [h.pos for h in hits] == list(range(n))
    assert hits.verdict() == ('match' if n else None)  # what was left out could have been a match


def test_nobody_is_found_within_the_last_bound():
    g = gallery()
    g.remove([0, 1, 2, 3])
    assert search(g, max_distance=ANY.maybe).verdict() == search(g).verdict() == 'nobody'
    assert search(g, max_distance=.3).verdict() is None


@pytest.mark.parametrize('bad', [-1, float('nan'), 'near', [1]])
def test_refuses_distances_that_are_none(bad):
    with pytest.raises(ConfigError, match='max_distance=.*give a distance'): search(gallery(), max_distance=bad)


def kinds():
    return [ReIDImage(Path('a.jpg'), 1, 1, 0), PublishedImage(Path('b.jpg'), 2, 1, 1), TrackedImage(Path('c.jpg'), -1, 2, 1, 'ä 7'),
            TrackedImage(Path('d.jpg'), 3, 2, 0, '', as_stored=True), TrackedImage(Path('e.jpg'), 3, 2, 0)]

@pytest.mark.parametrize('name', ['g.npz', 'folder'])
def test_threshold_and_tracks_are_stored(tmp_path, name):
    g = Gallery(made_by='somebody')
    g.add(kinds(), feats=at(*FAR))
    g.threshold = CROSS
    g.save(tmp_path/name)
    back = Gallery.load(tmp_path/name)
    assert back.threshold == CROSS
    assert [(o, o.track, o.as_stored) for o in back.items] == [(o, o.track, o.as_stored) for o in kinds()]
    assert back.add(kinds(), feats=at(*FAR)) == 0  # they are there
    back.threshold = None
    back.save(tmp_path/name)
    assert Gallery.load(tmp_path/name).threshold is None
    assert search(back)[2].item.track == 'ä 7' and search(back).to_dict()['hits'][2]['track'] == 'ä 7'


def test_a_folder_keeps_both_while_it_changes(tmp_path):
    g = Gallery.open(tmp_path/'g', made_by='somebody')
    g.threshold = ANY
    g.add(kinds()[:3], feats=at(*FAR[:3]))
    assert Gallery.open(tmp_path/'g').threshold == ANY
    g.add(kinds()[3:], feats=at(*FAR[3:]))
    g.remove([0])
    again = Gallery.open(tmp_path/'g')
    assert [o.track for o in again.items] == [None, 'ä 7', '', None] and again.threshold == ANY


def test_a_file_without_either_opens(tmp_path):
    gallery(None).save(tmp_path/'g.npz')
    with np.load(tmp_path/'g.npz') as z: arrays = dict(z)
    assert 'tracks' not in arrays
    meta = json.loads(str(arrays['meta']))
    for k in ('threshold', 'weights'): del meta[k]
    np.savez(tmp_path/'old.npz', **{**arrays, 'meta': np.array(json.dumps(meta))})
    old = Gallery.load(tmp_path/'old.npz')
    assert len(old) == 5 and old.threshold is None
    meta['threshold'] = dict(distance=.5)
    np.savez(tmp_path/'bad.npz', **{**arrays, 'meta': np.array(json.dumps(meta))})
    with pytest.raises(DataError, match='bad.npz: low is missing'): Gallery.load(tmp_path/'bad.npz')
    np.savez(tmp_path/'few.npz', **{**arrays, 'tracks': np.array(json.dumps(['1']))})
    with pytest.raises(DataError, match='few.npz is damaged'): Gallery.load(tmp_path/'few.npz')


def test_pictures_show_it(tmp_path):
    for i in range(5): Image.new('RGB', (8, 16)).save(tmp_path/f'{i}.jpg')
    hits = search(gallery())
    shown = Hits([h._replace(item=h.item._replace(path=tmp_path/h.item.path)) for h in hits], threshold=hits.threshold)
    assert [a.get_title() for a in shown.show().axes][::3] == ['0.10\nmatch', '0.85\nmaybe']
