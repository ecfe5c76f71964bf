"""Records of tracks, wherever records go."""
import copy, pickle
from pathlib import Path

import numpy as np
import pytest

from tmpa.core import PublishedImage, ReIDImage, TrackedImage, check_record, check_records
from tmpa.search import Gallery
from tmpa.tracks import track_features

ONE = TrackedImage(Path('a.jpg'), 7, 3, 1, 12)


@pytest.mark.parametrize('how', [copy.copy, copy.deepcopy, check_record, lambda o: pickle.loads(pickle.dumps(o)),
                                 lambda o: o._replace(pid=7), lambda o: check_records([o])[0]])
def test_keeps_its_track(how):
    o = how(TrackedImage(*ONE, 'x', as_stored=True))
    assert (type(o), o.track, o.as_stored) == (TrackedImage, 'x', True) and o == ONE


def test_is_the_record_that_it_was():
    path, pid, cam, modality = ONE
    plain = ReIDImage(path, pid, cam, modality)
    assert ONE == plain and hash(ONE) == hash(plain) and len(ONE) == 4
    assert plain.track is None and PublishedImage(*plain).track is None and plain._replace(pid=1).track is None
    assert check_record(TrackedImage('a.jpg', 1, 2, 0, 'x')).path == Path('a.jpg')


def test_pixels_of_published_tracks_stay_as_stored():
    items = [PublishedImage(Path(f'{i}.jpg'), 1, 1, 0) for i in range(3)]
    assert all(o.as_stored for o in track_features(np.eye(3), items).items)
