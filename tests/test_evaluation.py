"Evaluation against published code's outputs, its own slow definition, scikit-learn, and the laws that any ranking score obeys."
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from sklearn.metrics import average_precision_score
from tmpa.core import UNKNOWN, ConfigError, DataError, ProtocolError
from tmpa.conventions import compare_protocols
from tmpa.evaluation import (EvalResult, RULES, Rule, Setting, cmc_map, cmc_map_slow, evaluate, evaluate_features,
                             evaluate_settings)
from tmpa.confidence import bootstrap, compare_runs
from tmpa.features import load_features, save_features
from tmpa.rerank import rerank, rerank_slow

DATA, ORACLES = Path(__file__).parent/'data', os.environ.get('TMPA_ORACLES')
oracles = pytest.mark.skipif(not ORACLES, reason='set TMPA_ORACLES to the folder of evaluation oracles')
quick = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))

def same(a:EvalResult, b:EvalResult, tol=1e-12):
    assert (a.n_valid, a.n_queries) == (b.n_valid, b.n_queries)
    assert np.array_equal(a.valid, b.valid) and np.array_equal(a.first_hit, b.first_hit)
    for x,y in ((a.cmc, b.cmc), (a.ap, b.ap), (a.inp, b.inp), (a.mAP, b.mAP), (a.mINP, b.mINP)): np.testing.assert_allclose(x, y, rtol=0, atol=tol)

def identical(a, b): same(a, b, 0)

# Outputs of published code

@pytest.mark.parametrize('fn', (cmc_map, cmc_map_slow))
@pytest.mark.parametrize('key,rule', (('mangye_eval_sysu', 'sysu'), ('mangye_eval_regdb', 'regdb'), ('zyk_eval_llcm', 'llcm'), ('fastreid_py', 'market')))
@pytest.mark.parametrize('name', ('no_ties_some_invalid', 'ties_8levels', 'all_equal'))
def test_small_oracles(name, key, rule, fn):
    z = np.load(DATA/f'small_{name}.npz')
    q_cams = z['q_camids']//3 if rule in ('llcm', 'market') else z['q_camids']  # these outputs were made with query cameras 1 and 2 for 3 and 6
    r = fn(z['distmat'], z['q_pids'], z['g_pids'], q_cams, z['g_camids'], rule=rule, max_rank=10)
    np.testing.assert_allclose([*r.cmc, r.mAP, r.mINP], z[f'{key}_stable'], atol=1e-6)
    if rule == 'market':
        np.testing.assert_allclose(r.ap[r.valid], z['fastreid_per_query_AP_stable'], atol=1e-9)
        np.testing.assert_allclose(r.inp[r.valid], z['fastreid_per_query_INP_stable'], atol=1e-9)

def test_innov_agrees_with_sysu():
    z = np.load(DATA/'small_ties_8levels.npz')
    r = cmc_map(z['distmat'], z['q_pids'], z['g_pids'], z['q_camids'], z['g_camids'], rule='sysu', max_rank=10)
    np.testing.assert_allclose([*r.cmc, r.mAP], z['innov_cmc_mAP_stable'], atol=1e-6)

@oracles
@pytest.mark.parametrize('dtype', (np.float32, np.float64, np.int16))
def test_sysu_oracle(dtype):
    z = np.load(Path(ORACLES)/'sysu_all_ranks.npz')
    a = z['distmat'].astype(dtype), z['q_pids'], z['g_pids'], z['q_camids'], z['g_camids']
    r = cmc_map(*a, rule='sysu')
    np.testing.assert_allclose([*r.cmc, r.mAP, r.mINP], [*z['cmc'], z['mAP'], z['mINP']], atol=1e-6)
    assert r.n_valid == z['n_valid']
    m = cmc_map(*a, rule='market')
    np.testing.assert_allclose([*m.cmc, m.mAP], [*z['plain_market_cmc'], z['plain_market_mAP']], atol=1e-6)
    assert abs(m.mAP - r.mAP) > 1e-3

@oracles
@pytest.mark.parametrize('name,q,g', (('v2t', 'vis', 'thr'), ('t2v', 'thr', 'vis')))
def test_regdb_oracle(name, q, g):
    z = np.load(Path(ORACLES)/'regdb.npz')
    for dtype,tol in ((np.float64, 1e-6), (np.float32, 1e-4)):
        r = evaluate(z[q].astype(dtype), z[g].astype(dtype), z['labels'], z['labels'], metric='dot')
        np.testing.assert_allclose([*r.cmc, r.mAP, r.mINP], [*z[f'{name}_cmc'], z[f'{name}_mAP'], z[f'{name}_mINP']], atol=tol)

# Laws

@st.composite
def problems(draw, ties=True):
    "A distance matrix with labels; some queries invalid, some identities with many images."
    n_q, n_g, n_id = draw(st.integers(1, 12)), draw(st.integers(1, 60)), draw(st.integers(1, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    d = rng.integers(0, draw(st.integers(1, 30)), (n_q, n_g)) if ties else rng.permuted(np.tile(np.arange(n_g), (n_q, 1)), axis=1)
    q_pids, g_pids = rng.integers(0, n_id, n_q), rng.integers(0, n_id, n_g)
    if draw(st.booleans()): g_pids[rng.random(n_g) < .7] = 0
    g_pids[0] = q_pids[0]
    q_cams, g_cams = rng.integers(1, 7, n_q), rng.integers(1, 7, n_g)
    q_cams[0], g_cams[0] = 6, 1
    return d.astype(draw(st.sampled_from((np.float32, np.float64)))), q_pids, g_pids, q_cams, g_cams

rules = st.sampled_from([*RULES, Rule('none', True), Rule('place', False)])

@quick
@given(problems(), rules, st.integers(1, 30))
def test_agrees_with_definition(p, rule, max_rank): same(cmc_map(*p, rule=rule, max_rank=max_rank), cmc_map_slow(*p, rule=rule, max_rank=max_rank))

@quick
@given(problems(), rules, st.integers(1, 13))
def test_chunk_and_container(p, rule, chunk):
    r = cmc_map(*p, rule=rule)
    identical(r, cmc_map(*p, rule=rule, chunk=chunk))
    before = p[0].copy()
    identical(r, cmc_map(*map(torch.from_numpy, p), rule=rule))
    assert np.array_equal(before, p[0]), 'the distances of the caller were changed'

@quick
@given(problems(), rules, st.randoms(use_true_random=False))
def test_permuting_queries(p, rule, rnd):
    d, q_pids, g_pids, q_cams, g_cams = p
    o = np.array(rnd.sample(range(len(d)), len(d)))
    a, b = cmc_map(*p, rule=rule), cmc_map(d[o], q_pids[o], g_pids, q_cams[o], g_cams, rule=rule)
    assert (a.mAP, a.mINP, a.n_valid) == (b.mAP, b.mINP, b.n_valid)
    assert np.array_equal(a.cmc, b.cmc) and np.array_equal(a.ap[o], b.ap, equal_nan=True)

@quick
@given(problems(ties=False), rules, st.randoms(use_true_random=False))
def test_permuting_gallery_without_ties(p, rule, rnd):
    d, q_pids, g_pids, q_cams, g_cams = p
    o = np.array(rnd.sample(range(len(g_pids)), len(g_pids)))
    identical(cmc_map(*p, rule=rule), cmc_map(d[:,o], q_pids, g_pids[o], q_cams, g_cams[o], rule=rule))

@quick
@given(problems(), rules, st.randoms(use_true_random=False))
def test_relabelling_identities(p, rule, rnd):
    d, q_pids, g_pids, q_cams, g_cams = p
    new = np.array(rnd.sample([i for i in range(-1000, 1000) if i != UNKNOWN], 10))
    identical(cmc_map(*p, rule=rule), cmc_map(d, new[q_pids], new[g_pids], q_cams, g_cams, rule=rule))

@quick
@given(problems(), rules, st.sampled_from((lambda x: 3*x - 7, lambda x: (x + 1)**3, np.sqrt, lambda x: -1/(x + 1.))))
def test_monotone_change_of_distance(p, rule, f): identical(cmc_map(*p, rule=rule), cmc_map(f(p[0].astype(np.float64)), *p[1:], rule=rule))

@quick
@given(problems(), rules, st.integers(1, 20), st.integers(0, 2**32-1))
def test_distractors_never_help(p, rule, n, seed):
    d, q_pids, g_pids, q_cams, g_cams = p
    rng = np.random.default_rng(seed)
    more = np.concatenate([d, rng.integers(0, 30, (len(d), n))], axis=1)
    a, b = cmc_map(*p, rule=rule), cmc_map(more, q_pids, np.r_[g_pids, 100 + rng.integers(0, 3, n)], q_cams, np.r_[g_cams, rng.integers(1, 7, n)], rule=rule)
    assert a.n_valid == b.n_valid and b.mAP <= a.mAP + 1e-15 and b.mINP <= a.mINP + 1e-15 and (b.cmc <= a.cmc + 1e-15).all()

@quick
@given(problems(ties=False))
def test_sklearn(p):
    d, q_pids, g_pids, *_ = p
    r = cmc_map(d, q_pids, g_pids)
    for i in np.flatnonzero(r.valid): assert abs(r.ap[i] - average_precision_score(g_pids == q_pids[i], -d[i])) < 1e-12

# Cameras that the rule cannot know

def test_cameras_counted_from_0_are_refused():
    q, g, q_pids, g_pids, q_cams, g_cams = make(40, 60)
    evaluate(q, g, q_pids, g_pids, q_cams, g_cams, rule='sysu')
    for cams in ((q_cams - 1, g_cams), (q_cams, g_cams - 1), (q_cams, g_cams + 1)):
        for score in (evaluate, lambda q, g, *a, **kw: cmc_map(-q@g.T, *a, **kw)):
            with pytest.raises(ProtocolError, match="_cams, row .*SYSU-MM01 knows its cameras 1 to 6") as e: score(q, g, q_pids, g_pids, *cams, rule='sysu')
            assert '\n' not in str(e.value)
    for rule in ('llcm', 'market'): identical(evaluate(q, g, q_pids, g_pids, q_cams - 1, g_cams - 1, rule=rule), evaluate(q, g, q_pids, g_pids, q_cams, g_cams, rule=rule))

def test_cameras_that_the_modality_contradicts(tmp_path):
    q, g, q_pids, g_pids, *_ = make(40, 60)
    save_features(tmp_path/'q.npz', q, q_pids, np.full(40, 3), np.ones(40))
    save_features(tmp_path/'g.npz', g, g_pids, np.full(60, 1), np.zeros(60))
    save_features(tmp_path/'swapped.npz', g, g_pids, np.full(60, 1), np.ones(60))
    evaluate_features(tmp_path/'q.npz', tmp_path/'g.npz', 'sysu')
    with pytest.raises(ProtocolError, match='swapped.npz, row 0: camera 1 is visible in SYSU-MM01, but the modality of the image is 1'): evaluate_features(tmp_path/'q.npz', tmp_path/'swapped.npz', 'sysu')

# Queries that are their own gallery

def test_noise_does_not_find_itself(tmp_path):
    rng = np.random.default_rng(0)
    feats, pids = rng.normal(size=(40, 8)), np.arange(40)//2
    np.savez(tmp_path/'f.npz', feats=feats, pids=pids)
    np.savez(tmp_path/'m.npz', feats=feats, pids=pids, modality=np.arange(40) % 2)
    np.savez(tmp_path/'c.npz', feats=feats, pids=pids, cams=np.arange(40))
    for f,words in (('f', 'hold the same images.*two files'), ('m', r'cross_settings_of\(modality\)')):
        with pytest.raises(ProtocolError, match=words) as e: evaluate_features(tmp_path/f'{f}.npz', tmp_path/f'{f}.npz')
        assert '\n' not in str(e.value)
    np.savez(tmp_path/'few.npz', feats=feats[::-1][:9], pids=pids[::-1][:9])
    for score in (lambda: evaluate_features(tmp_path/'f.npz', tmp_path/'few.npz'), lambda: evaluate(feats, feats[::-1][:9].copy(), pids, pids[::-1][:9])):
        with pytest.raises(ProtocolError, match='9 of 40 queries are in the gallery themselves'): score()
    d = ((feats[:,None] - feats[None])**2).sum(2)
    with pytest.raises(ProtocolError, match='dist is symmetric'): cmc_map(d, pids, pids)
    with pytest.raises(ProtocolError, match="40 of 40 queries are in the gallery of setting 'all'"): evaluate_settings(feats, pids, None, [Setting('all', np.arange(40), [np.arange(40)], 'regdb')])
    left_out = np.where(np.eye(40, dtype=bool), 99, d)                 # each image without itself, from the definition
    hit = [pids[row.argmin()] == pids[i] for i,row in enumerate(left_out)]
    r = evaluate_features(tmp_path/'c.npz', tmp_path/'c.npz', 'market', metric='euclidean')
    assert r.rank(1) == np.mean(hit) < .3 and r.n_valid == 40

def test_equal_features_that_are_no_own_images():
    rng = np.random.default_rng(0)
    x, pids = rng.normal(size=(40, 8)), np.arange(40)//2
    evaluate(x, x, pids, pids, np.full(40, 3), np.full(40, 1))        # other cameras: other images
    evaluate(np.ones((4, 8)), np.ones((4, 8)), [1, 1, 2, 2], [1, 1, 2, 2])  # a network that tells nobody apart
    q_pids = np.where(np.arange(40) < 39, UNKNOWN, 7)
    evaluate(np.r_[x[:39], -x[:1]], x, q_pids, np.full(40, 7))        # those who are unknown are not scored

# People whom nobody knows

def test_unknown_in_the_gallery_is_junk():
    "As in the original evaluation of Market-1501."
    r = evaluate([[1., 0]], [[1., .01], [.9, .3]], [5], [-1, 5], [1], [2, 2], rule='market')
    assert r.percent['Rank-1'] == 100 and '1 of the gallery left out' in r.note

@quick
@given(problems(), rules, st.integers(0, 2**32-1))
def test_unknown_is_as_if_it_were_not_there(p, rule, seed):
    d, q_pids, g_pids, q_cams, g_cams = p
    rng = np.random.default_rng(seed)
    q, g = rng.random(len(q_pids)) < .3, rng.random(len(g_pids)) < .3
    q[0] = g[0] = False
    q_pids, g_pids = np.where(q, UNKNOWN, q_pids), np.where(g, UNKNOWN, g_pids)
    r = cmc_map(d, q_pids, g_pids, q_cams, g_cams, rule=rule)
    same(r, cmc_map_slow(d, q_pids, g_pids, q_cams, g_cams, rule=rule))
    without = cmc_map(d[~q][:,~g], q_pids[~q], g_pids[~g], q_cams[~q], g_cams[~g], rule=rule)
    assert np.array_equal(r.first_hit[~q], without.first_hit) and np.array_equal(r.ap[~q], without.ap, equal_nan=True)
    assert (r.mAP, r.mINP, r.n_valid, r.n_unknown) == (without.mAP, without.mINP, without.n_valid, q.sum()) and not r.valid[q].any()

def test_identities_in_words():
    names = np.array(['ann', '-1', 'bob'])
    for pids in (names, names.astype(object), list(names)):
        r = cmc_map([[.1, .2, .3]], ['bob'], pids)
        assert r.first_hit[0] == 2 and '1 of the gallery' in r.note

@pytest.mark.parametrize('bad', ([1, None], [1, float('nan')], [1, [2]]))
def test_identities_that_are_none(bad):
    for kw in (dict(q_pids=bad, g_pids=[1, 2]), dict(q_pids=[1, 2], g_pids=bad)):
        with pytest.raises(ProtocolError, match='_pids') as e: cmc_map(np.eye(2), **kw)
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('rule', RULES)
def test_all_equal(rule):
    rng = np.random.default_rng(0)
    a = np.zeros((50, 400)), rng.integers(0, 9, 50), rng.integers(0, 9, 400), rng.integers(1, 7, 50), rng.integers(1, 7, 400)
    same(cmc_map(*a, rule=rule), cmc_map_slow(*a, rule=rule))

def test_one_query_one_image():
    r = cmc_map([[.5]], [7], [7])
    assert (r.mAP, r.mINP, r.n_valid, r.n_gallery) == (1, 1, 1, 1) and np.array_equal(r.cmc, np.ones(20)) and r.first_hit[0] == 1
    r = cmc_map([[.5, .2]], [7], [7, 8], max_rank=3)
    assert r.mAP == .5 and np.array_equal(r.cmc, [0, 1, 1])

def test_sizes_that_need_blocks():
    "More columns than a block sorts at once, identities of more than sixteen images, ties in between."
    rng = np.random.default_rng(1)
    d = rng.integers(0, 3000, (30, 5000)).astype(np.float32)
    a = d, rng.integers(0, 60, 30), rng.integers(0, 50, 5000)*(rng.random(5000) < .8), rng.integers(1, 7, 30), rng.integers(1, 7, 5000)
    for rule in RULES: same(cmc_map(*a, rule=rule), cmc_map_slow(*a, rule=rule))

# What cannot be scored

def test_no_valid_query():
    assert 'AssertionError' in json.loads((DATA/'evaluation_errors.json').read_text())['regdb_all_invalid']  # published code stops as well
    for rule in RULES:
        with pytest.raises(ProtocolError, match='none of the 2 queries'): cmc_map(np.zeros((2, 3)), [1, 2], [3, 4, 5], [3, 3], [1, 1, 1], rule=rule)
    with pytest.raises(ProtocolError, match='none of the 1'): cmc_map(np.zeros((1, 2)), [1], [1, 1], [3], [2, 2], rule='sysu')  # all of the gallery is hidden
    with pytest.raises(ProtocolError, match='none of the 1'): cmc_map(np.zeros((1, 2)), [1], [1, 1], [4], [4, 4], rule='llcm')

@pytest.mark.parametrize('fn', (cmc_map, cmc_map_slow))
def test_what_the_rule_hides_is_counted(fn):
    args = np.zeros((3, 4)), [1, 1, 2], [1, 1, 7, UNKNOWN], [3, 3, 3], [2, 2, 1, 1]
    with pytest.raises(ProtocolError, match='2 of them have 4 matches there, all hidden, since the rule hides camera 2 from queries of camera 3'): fn(*args, rule='sysu')
    with pytest.raises(ProtocolError, match="2 of them have 4 matches there.*by its own camera"): fn(*args[:4], [3, 3, 3, 3], rule=Rule('same_cam', False))
    for rule in RULES:
        with pytest.raises(ProtocolError, match='check that both sides number identities alike'): fn(np.zeros((1, 2)), [3], [1, UNKNOWN], [3], [1, 1], rule=rule)
        with pytest.raises(ProtocolError, match='the identity of each is unknown'): fn(np.zeros((1, 2)), [UNKNOWN], [1, UNKNOWN], [3], [1, 1], rule=rule)

@pytest.mark.parametrize('bad', (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize('rule', RULES)
def test_not_finite(bad, rule):
    rng = np.random.default_rng(0)
    q, g, pids, q_cams, g_cams = rng.normal(size=(40, 4)), rng.normal(size=(30, 4)), np.arange(40)%7, np.full(40, 3), np.arange(30)%6 + 1
    d = -q@g.T
    d[13,0] = d[21,3] = bad
    with pytest.raises(ProtocolError, match=r'dist holds NaN or infinite values in 2 rows, the first of them \[13, 21\]'): cmc_map(d, pids, pids[:30], q_cams, g_cams, rule=rule)
    for name in 'q', 'g':
        x = dict(q=q.copy(), g=g.copy())
        x[name][[5, 9],2] = bad
        with pytest.raises(ProtocolError, match=rf'{name}_feats holds NaN or infinite values in 2 rows, the first of them \[5, 9\]') as e:
            evaluate(x['q'], x['g'], pids, pids[:30], q_cams, g_cams, rule=rule)
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('change,match', ((dict(g_pids=[1]), 'g_pids has shape'), (dict(q_pids=[[1, 2]]), 'q_pids has shape'), (dict(rule='sysu'), 'needs the camera'),
    (dict(rule='sysu', q_cams=[3, 3], g_cams=[1]), 'g_cams has shape'), (dict(rule='nothing'), 'choose one of'), (dict(g_feats=np.zeros((0, 2))), 'none of them empty'),
    (dict(g_feats=np.zeros((3, 5))), 'one model'), (dict(metric='l7'), "choose 'cosine'"), (dict(q_feats=np.zeros(4)), 'two dimensions')))
def test_wrong_arguments(change, match):
    ok = dict(q_feats=np.eye(2), g_feats=np.ones((3, 2)), q_pids=[1, 2], g_pids=[1, 2, 3])
    with pytest.raises(ProtocolError, match=match): evaluate(**{**ok, **change})

# Features

def make(n_q=700, n_g=900, n_id=50, dim=16, seed=0, noise=1.):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(n_id, dim))
    q_pids, g_pids = rng.integers(0, n_id, n_q), rng.integers(0, n_id, n_g)
    q, g = (centre[p] + noise*rng.normal(size=(len(p), dim)) for p in (q_pids, g_pids))
    return q.astype(np.float32), g.astype(np.float32), q_pids, g_pids, rng.integers(1, 7, n_q), rng.integers(1, 7, n_g)

@pytest.mark.parametrize('rule', RULES)
def test_evaluate_is_cmc_map_of_distances(rule):
    q, g, *labels = make()
    r = evaluate(q.astype(np.float64), g.astype(np.float64), *labels, rule=rule)
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    same(r, cmc_map_slow(-unit(q.astype(np.float64))@unit(g.astype(np.float64)).T, *labels, rule=rule), 1e-9)
    r = evaluate(q, g, *labels, rule=rule)
    for chunk in (256, 300, 512, 10_000): identical(r, evaluate(q, g, *labels, rule=rule, chunk=chunk))
    assert evaluate(q, g, *labels, rule=rule, chunk=100).mAP == pytest.approx(r.mAP, abs=1e-4)  # another shape of product may round otherwise

def test_threads():
    q, g, *labels = make()
    d, n = -q@g.T, torch.get_num_threads()
    a = cmc_map(d, *labels, rule='sysu')
    try:
        torch.set_num_threads(2)
        identical(a, cmc_map(d, *labels, rule='sysu'))
    finally: torch.set_num_threads(n)

@pytest.mark.parametrize('rule', RULES)
def test_on_a_device(rule, device):
    q, g, *labels = make()
    d = torch.from_numpy(-q@g.T)
    identical(cmc_map(d, *labels, rule=rule), cmc_map(d.to(device), *labels, rule=rule))

@pytest.mark.parametrize('rule', RULES)
def test_path_of_other_devices(rule, monkeypatch):
    "Without numpy's sort, as on a GPU; and distances that are not contiguous."
    import tmpa.counting as counting
    q, g, *labels = make()
    d = -q@g.T
    want = cmc_map(d, *labels, rule=rule)
    identical(want, cmc_map(np.asfortranarray(d), *labels, rule=rule))
    identical(want, cmc_map(torch.from_numpy(d.T.copy()).T, *labels, rule=rule))
    monkeypatch.setattr(counting, '_sorted_rows', lambda d: [d.sort(1).values])
    monkeypatch.setattr(counting, '_nearer', lambda d, own: d < own)
    identical(want, cmc_map(d, *labels, rule=rule))

def test_half_precision_features():
    q, g, *labels = make()
    a, b = evaluate(torch.from_numpy(q).bfloat16(), torch.from_numpy(g).bfloat16(), *labels), evaluate(q, g, *labels)
    assert abs(a.mAP - b.mAP) < .01

def test_settings_average_trials():
    q, g, q_pids, g_pids, q_cams, g_cams = make(60, 200)
    feats, pids, cams = np.concatenate([q, g]), np.r_[q_pids, g_pids], np.r_[q_cams, g_cams]
    trials = [60 + np.random.default_rng(t).choice(200, 120, replace=False) for t in range(3)]
    r = evaluate_settings(feats, pids, cams, [Setting('a', np.arange(60), trials, 'llcm'), Setting('b', np.arange(60), trials[:1], 'regdb')])
    one = [evaluate(q, feats[t], q_pids, pids[t], q_cams, cams[t], rule='llcm') for t in trials]
    assert r['a'].mAP == pytest.approx(np.mean([o.mAP for o in one]), abs=1e-12)
    assert r['a'].std['mAP'] == pytest.approx(100*np.std([o.mAP for o in one], ddof=1)) and np.isnan(r['b'].std['mAP'])
    assert evaluate_settings(feats, pids, None, [Setting('b', np.arange(60), trials[:1], 'regdb')])['b'].mAP == r['b'].mAP

# Without fastai

@pytest.mark.parametrize('module', ('evaluation', 'conventions', 'verify', 'curves', 'data.datasets'))
def test_scores_and_data_sets_need_no_fastai(module):
    "In a program where it is not installed."
    code = f"import sys; sys.modules['fastai'] = None; import tmpa.{module}"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert not done.returncode, done.stderr

# Files, re-ranking, confidence, conventions

def test_features_of_others(tmp_path):
    from scipy.io import savemat
    q, g, q_pids, g_pids, q_cams, g_cams = make(30, 80, 10)
    want = evaluate(q, g, q_pids, g_pids, q_cams, g_cams, rule='market')
    np.savez(tmp_path/'q.npz', feat=q, pid=q_pids, camid=q_cams)
    torch.save(dict(f=torch.from_numpy(g), labels=g_pids.tolist(), cams=torch.from_numpy(g_cams)), tmp_path/'g.pt')
    identical(want, evaluate_features(tmp_path/'q.npz', tmp_path/'g.pt', 'market'))
    savemat(tmp_path/'both.mat', dict(query_f=q, query_label=q_pids, query_cam=q_cams, gallery_f=g, gallery_label=g_pids, gallery_cam=g_cams))
    identical(want, evaluate_features(tmp_path/'both.mat', tmp_path/'both.mat', 'market'))
    with pytest.raises(DataError, match='several arrays'): load_features(tmp_path/'both.mat')

class Evil:
    def __reduce__(self): return os.system, ('true',)

def test_feature_files_that_are_refused(tmp_path):
    q, _, pids, *_ = make(5, 5, 2)
    torch.save(dict(feats=Evil(), pids=[1]), tmp_path/'evil.pt')
    (tmp_path/'empty.npz').write_bytes(b'')
    (tmp_path/'text.mat').write_text('no matrix')
    np.savez(tmp_path/'object.npz', feats=np.array([q, None], dtype=object), pids=pids)
    np.savez(tmp_path/'flat.npz', feats=q.ravel(), pids=pids)
    np.savez(tmp_path/'half.npz', feats=q, pids=pids + .5)
    np.savez(tmp_path/'names.npz', feats=q, pids=['a']*5)
    torch.save([1, 2], tmp_path/'list.pt')
    for f in ('evil.pt', 'empty.npz', 'text.mat', 'object.npz', 'flat.npz', 'half.npz', 'names.npz', 'list.pt', 'absent.npz', 'q.csv'):
        with pytest.raises(DataError, match=f) as e: load_features(tmp_path/f)
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('ext', ('npz', 'pt', 'mat'))
def test_features_round_trip(tmp_path, ext):
    q, _, pids, _, cams, _ = make(5, 5, 2)
    save_features(tmp_path/f'f.{ext}', q, pids, cams, np.zeros(5, int))
    f = load_features(tmp_path/f'f.{ext}')
    assert np.array_equal(f.feats, q) and np.array_equal(f.pids, pids) and np.array_equal(f.cams, cams) and np.array_equal(f.modality, np.zeros(5))

@pytest.mark.parametrize('k1,k2,lam', ((20, 6, .3), (7, 1, 0.), (5, 5, .8)))
def test_rerank_is_its_definition(k1, k2, lam):
    q, g, *_ = make(40, 90, 12)
    q, g = q.astype(np.float64), g.astype(np.float64)
    want = rerank_slow(q, g, k1, k2, lam)
    for chunk in (16, 1000): np.testing.assert_allclose(rerank(q, g, k1, k2, lam, chunk), want, atol=1e-9)
    np.testing.assert_allclose(rerank(q.astype(np.float32), g.astype(np.float32), k1, k2, lam), want, atol=1e-3)

@pytest.mark.parametrize('dtype', (np.float32, np.float64))
@pytest.mark.parametrize('people,copies', ((3, 200), (5, 60), (20, 10), (100, 3)))
def test_rerank_with_any_number_of_ties(people, copies, dtype):
    "Copies of a few features, which are also equally far from each other: all numbers here are exact in any precision."
    rng = np.random.default_rng(people)
    x = np.repeat(rng.choice([-1, 1], (people, 16)), copies, 0)[rng.permutation(people*copies)].astype(dtype)
    want = rerank_slow(x[:40], x[40:], 10, 4)
    for chunk in (16, 100, 1000): np.testing.assert_allclose(rerank(x[:40], x[40:], 10, 4, chunk=chunk), want, atol=1e-6 if dtype == np.float32 else 1e-9)

@pytest.mark.parametrize('people,copies', ((5, 60), (20, 10)))
def test_rerank_of_copies(people, copies):
    rng = np.random.default_rng(people)
    x = np.repeat(rng.normal(size=(people, 8)), copies, 0)[rng.permutation(people*copies)]
    want = rerank_slow(x[:40], x[40:], 10, 4)
    for chunk in (16, 100, 1000): np.testing.assert_allclose(rerank(x[:40], x[40:], 10, 4, chunk=chunk), want, atol=1e-9)

@pytest.mark.parametrize('rule', RULES)
def test_scores_of_reranking_in_blocks(rule):
    q, g, *labels = make(60, 150, 12)
    labels[0][3] = labels[1][5] = UNKNOWN
    want = cmc_map(rerank(q, g, 10, 4), *labels, rule=rule)
    for how,chunk in ((dict(), None), (dict(chunk=7), None), (dict(chunk=50), 13)): same(evaluate(q, g, *labels, rule=rule, rerank=dict(k1=10, k2=4, **how), chunk=chunk), want)

def test_reranked_scores_never_hold_all_distances(monkeypatch):
    import tmpa.evaluation as evaluation
    seen, original = [], evaluation.reranker
    def spy(*args, **kw):
        some = original(*args, **kw)
        def one(rows):
            seen.append(len(rows))
            return some(rows)
        return one
    monkeypatch.setattr(evaluation, 'reranker', spy)
    q, g, *labels = make(300, 200, 12)
    evaluate(q, g, *labels, rerank=True, chunk=32)
    assert max(seen) == 32 and sum(seen) == 300

def test_no_memory_is_one_line(monkeypatch):
    import tmpa.memory as memory
    q, g, *labels = make(300, 200, 12)
    dist = -q@g.T
    for score,words in ((lambda: rerank(q, g), r'holding the distances of 300 queries to a gallery of 200 needs about .* GB.*rerank=True'),
                        (lambda: evaluate(q, g, *labels, rerank=True), 're-ranking 300 queries in a gallery of 200.*smaller chunk, or fewer images'),
                        (lambda: evaluate(q, g, *labels), 'scoring 300 queries at a time in a gallery of 200.*chunk=75'),
                        (lambda: cmc_map(dist, *labels), 'scoring 300 queries at a time.*chunk=75')):
        score()
        with monkeypatch.context() as m:
            m.setattr(memory, 'free_memory', lambda: 1000)
            with pytest.raises(ConfigError, match=words) as e: score()
            assert '\n' not in str(e.value)

def test_rerank_of_equal_features():
    q, g, *_ = make(10, 30, 4)
    g[5] = g[4] = q[0]
    d = rerank(q, g, 6, 3)
    assert np.isfinite(d).all() and d[0,4] == pytest.approx(d[0,5], abs=1e-6)
    assert np.isfinite(rerank(np.ones((4, 3)), np.ones((9, 3)), 5, 2)).all()

def test_confidence():
    q, g, q_pids, g_pids, *_ = make(300, 200, 30)
    a, b = evaluate(q, g, q_pids, g_pids), evaluate(q + .5*np.random.default_rng(1).normal(size=q.shape), g, q_pids, g_pids)
    i = bootstrap(a, groups=q_pids)
    assert i.low < a.mAP < i.high and i == bootstrap(a, groups=q_pids) and i != bootstrap(a, groups=q_pids, seed=1)
    c, r = compare_runs(a, b, groups=q_pids), compare_runs(b, a, groups=q_pids)
    assert c.diff == -r.diff > 0 and c.p == r.p < .05 and compare_runs(a, a, 'rank1').p == 1
    with pytest.raises(ProtocolError, match='same queries'): compare_runs(a, b.ap[:-1])
    with pytest.raises(ProtocolError, match='which queries'): compare_runs(a, np.where(np.arange(300) < 3, np.nan, b.ap))

def test_compare_protocols_official_gallery():
    n_id, per = 6, 3
    pids = np.repeat(np.arange(1, n_id+1), 6*per); cams = np.tile(np.repeat(np.arange(1, 7), per), n_id)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_id+1, 8))[pids] + rng.normal(size=(len(pids), 8))
    perms = {(c, p): np.stack([rng.permutation(per) + 1 for _ in range(10)]) for c in (1, 2, 4, 5) for p in range(1, n_id+1)}
    t = compare_protocols(x, pids, cams, np.isin(cams, (3, 6)).astype(int), perms=perms, rerank=False)
    assert 'official' in t.rows[0][1] and [c for _,c,_ in t.rows].count('seeded gallery') == 1 and 'seeded gallery' in repr(t) and '<table>' in t._repr_html_()

# The loop that speed is compared with

def test_benchmark_baseline():
    f = Path(__file__).parents[1]/'benchmarks'/'evaluation.py'
    if not f.exists(): pytest.skip('benchmarks/ is not part of this installation')
    spec = importlib.util.spec_from_file_location('bench_evaluation', f)
    bench = importlib.util.module_from_spec(spec); spec.loader.exec_module(bench)
    z = np.load(DATA/'small_no_ties_some_invalid.npz')
    a = z['distmat'], z['q_pids'], z['g_pids'], z['q_camids'], z['g_camids']
    cmc, mAP, mINP = bench.published_loop(*a, max_rank=10)
    np.testing.assert_allclose([*cmc, mAP, mINP], z['mangye_eval_sysu_stable'], atol=1e-6)


@pytest.mark.parametrize('scale', [1e19, 1e-15, 1e-30])
def test_cosine_at_any_scale(scale):
    q, g, qp, gp = (torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), torch.randn(50, 16, generator=torch.Generator().manual_seed(1)), np.arange(30) % 10, np.arange(50) % 10)
    assert abs(evaluate(q*scale, g*scale, qp, gp).mAP - evaluate(q, g, qp, gp).mAP) < 1e-6


def test_arrays_of_every_kind():
    x, p = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32), np.arange(20) % 5
    other = np.zeros(20, int), np.ones(20, int)  # cameras: the same features, but not the same images
    want = evaluate(x, x, p, p, *other).mAP
    for y in (x[::-1][::-1], x.astype('>f4'), x.astype(np.longdouble), x.astype(object).astype(float), x.tolist(), np.asfortranarray(x)): assert abs(evaluate(y, y, p, p, *other).mAP - want) < 1e-6
    for bad in (x.astype(complex), x.astype(object), [[1., 2.], [3.]], torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(ProtocolError, match='needed'): evaluate(bad, x, p, p, *other)
    cams = (np.arange(20) % 6 + 1)
    turned = np.roll(cams, 1)
    assert evaluate(x, x, p, p, cams.astype(str), turned.astype(object), 'sysu').mAP == evaluate(x, x, p, p, cams, turned, 'sysu').mAP
    for kw in (dict(chunk=-5), dict(chunk=7.), dict(rerank=dict(k=3)), dict(rerank=dict(k1=3.)), dict(rule=Rule('camera', True))):
        with pytest.raises(ProtocolError, match='chunk|rerank|re-ranking|same_cam'): evaluate(x, x, p, p, *other, **kw)


def test_reranking_says_that_it_normalises():
    x, p = np.random.default_rng(0).normal(size=(40, 8)), np.arange(40) % 10
    a, b = (evaluate(x, x, p, p, np.zeros(40), np.ones(40), metric=m, rerank=True) for m in ('cosine', 'dot'))
    assert a.mAP == b.mAP and 'L2-normalised' in b.note and 'L2' not in a.note


def test_features_of_the_other_side_are_none(tmp_path):
    np.savez(tmp_path/'a.npz', query_f=np.ones((2, 3)), query_label=[1, 2], gallery_f=np.ones((2, 3)))
    assert load_features(tmp_path/'a.npz', 'query').pids.tolist() == [1, 2]
    with pytest.raises(DataError, match='no identities'): load_features(tmp_path/'a.npz', 'gallery')
    torch.save({0: torch.ones(2)}, tmp_path/'b.pt')
    with pytest.raises(DataError, match='it holds 0'): load_features(tmp_path/'b.pt')
