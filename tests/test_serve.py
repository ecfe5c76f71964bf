"""The page of a gallery: what is sent to it, what it sends, and how it looks in a browser."""
import io, os, re, socket, threading, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tmpa import serve
from tmpa.core import ConfigError, ReIDImage
from tmpa.data.readers import sysu_items
from tmpa.data.synthetic import make_sysu
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet
from tmpa.search import Gallery
from tmpa.verify import threshold
from browser import Browser, find_browser

pytest.importorskip('fasthtml')
pytest.importorskip('httpx')
pytestmark = pytest.mark.cpu(reason='a page has one gallery on one device')


@pytest.fixture(scope='module')
def people(tmp_path_factory): return sysu_items(make_sysu(tmp_path_factory.mktemp('data')/'sysu', n_ids=30, per_cam=2, size=(96, 48)), 'test')

@pytest.fixture(scope='module')
def gallery(people):
    torch.manual_seed(0)
    g = Gallery(TMPANet(4, micro_resnet, pretrained=False, mfe=False, mft=False).eval(), (96, 48))
    g.add(people)
    return g

@pytest.fixture
def page(gallery):
    from starlette.testclient import TestClient
    return TestClient(serve.make_app(gallery), base_url='http://127.0.0.1')

def as_file(im, kind='PNG'):
    f = io.BytesIO()
    im.save(f, kind)
    return f.getvalue()

def places(text): return [int(o) for o in re.findall(r'src="image/(\d+)"', text)]

def hits_of(text): return [int(o) for o in re.findall(r'data-like="(\d+)"', text)]


def test_a_search(page, gallery, people):
    q = people[3]
    r = page.post('/ask?modality=0', content=q.path.read_bytes())
    want = [h.pos for h in gallery.search(Image.open(q.path), k=24, modality=q.modality)]
    assert r.status_code == 200 and hits_of(r.text) == want and 'data:image/jpeg;base64,' in r.text
    name = re.search('data-query="([^"]+)"', r.text)[1]
    every = [h.pos for h in gallery.search(Image.open(q.path), k=len(gallery), modality=q.modality)]
    seen, n = [], 1
    while True:
        r = page.get('/hits', params=dict(q=name, page=n))
        seen += hits_of(r.text)
        if re.search(r'disabled[^>]*>On<|data-page="\d+" disabled[^>]*>\s*On', r.text): break
        n += 1
    assert seen == every
    r = page.get('/hits', params=dict(q=name, cam=6))
    assert hits_of(r.text) == [p for p in every if gallery.items[p].cam == 6][:24]
    assert page.get('/hits', params=dict(q='nobody')).status_code == 410
    assert '9' in page.get('/hits', params=dict(q=name, cam=9)).text  # one line
    like = page.post('/like/5')
    assert hits_of(like.text)[0] == 5 and page.post('/like/5000').status_code == 404
    im = Image.open(io.BytesIO(page.get('/image/5').content))
    assert im.format == 'JPEG' and max(im.size) <= 256


def test_says_the_verdict(page, gallery, people, monkeypatch):
    class Third:
        def verdict(self, d): return 'match' if d < 1e-2 else 'maybe' if d < 1 else 'nobody'
    assert 'verdict' not in page.post('/like/5').text
    monkeypatch.setattr(gallery, 'threshold', Third(), raising=False)
    assert 'verdict match big' in page.post('/like/5').text


def verdicts_of(text):
    "The large verdict, and that of each image, None where there is none."
    big = re.search('verdict (\\w+) big', text)
    some = [re.search('verdict (\\w+)"', o) for o in text.split('<figure')[1:]]
    return big and big[1], [o and o[1] for o in some]

def test_the_same_verdicts_as_a_search(page, gallery, people, monkeypatch):
    "A threshold for a visible and an infrared image says nothing of two visible ones."
    q = people[3]
    d = gallery.search(q, k=1, only=1-q.modality)[0].distance
    for cross in (True, False):  # only the image itself is near enough for a match
        t = threshold([d/9, d/9, d/3, d/2, d*2], [1, 1, 0, 0, 0], far=.34, cross=cross)
        monkeypatch.setattr(gallery, 'threshold', t)
        want = gallery.search(Image.open(q.path), k=25, modality=q.modality)
        same = [h.item.modality == q.modality for h in want[:24]]
        assert any(same) and not all(same)
        got = verdicts_of(page.post(f'/ask?modality={q.modality}', content=q.path.read_bytes()).text)
        assert got == (want.verdict(), [want.verdict_of(h) for h in want[:24]])
        assert [v is None for v in got[1]] == [cross and o for o in same]
        want = gallery.search(gallery.rows([3]).float(), k=25, records=[gallery.items[3]])[0]
        assert want[0].pos == 3 and (want.verdict() == 'match') is not cross
        assert verdicts_of(page.post('/like/3').text) == (want.verdict(), [want.verdict_of(h) for h in want[:24]])


def small_gallery(seed, people):
    torch.manual_seed(seed)
    g = Gallery(TMPANet(4, micro_resnet, pretrained=False, mfe=False, mft=False).eval(), (96, 48), num_workers=0)
    g.add(people[:4])
    return g

def test_a_gallery_that_was_replaced_by_one_of_another_model(people, tmp_path):
    from starlette.testclient import TestClient
    first, second = small_gallery(0, people), small_gallery(1, people)
    first.save(tmp_path/'people')
    opened = [Gallery.load(tmp_path/'people', first.model, num_workers=0), Gallery.load(tmp_path/'people')]
    model, features = [TestClient(serve.make_app(g), base_url='http://127.0.0.1') for g in opened]
    data = people[0].path.read_bytes()
    kept = [(model, model.post('/ask?modality=0', content=data)), (model, model.post('/like/0')), (features, features.post('/like/0'))]
    assert all(r.status_code == 200 for _, r in kept)
    again = Gallery.load(tmp_path/'people', first.model, num_workers=0)
    again.add(people[4:6])  # of the same model: its images are found
    assert len(hits_of(model.post('/ask?modality=0', content=data).text)) == 6
    second.save(tmp_path/'people')
    refused = [model.post('/ask?modality=0', content=data), model.post('/like/0')]
    refused += [page.get('/hits', params=dict(q=re.search('data-query="([^"]+)"', r.text)[1])) for page, r in kept]
    for r in refused + [model.post('/ask?modality=0', content=data)]:
        assert r.status_code == 400 and r.text == 'the gallery was replaced by one of other weights: start tmpa_serve again'


def test_numbers_and_names_in_requests(gallery):
    from starlette.testclient import TestClient
    page = TestClient(serve.make_app(gallery, ['MyHost']), base_url='http://127.0.0.1', raise_server_exceptions=False)
    name = re.search('data-query="([^"]+)"', page.post('/like/0').text)[1]
    for n in ('0'*5000, '9'*5000, '0'*12 + '9999', '41', '\u0663'):
        for key in ('page', 'cam') if n != '41' else ['page']:
            r = page.get('/hits', params={'q': name, key: n})
            assert r.status_code == 400 and '\n' not in r.text and len(r.text) < 200, (key, n)
    assert page.get('/hits', params=dict(q=name, page='000002')).status_code == 200
    for n in ('9'*5000, '0'*5000, str(len(gallery)), '\u0663', '1.5'):
        assert page.get(f'/image/{n}').status_code == 404 and page.post(f'/like/{n}').status_code == 404, n
    assert page.get(f'/image/{len(gallery)-1}').status_code == 200
    for origin in ('http://[bad', 'http://[', ''): assert page.get('/', headers={'origin': origin}).status_code == 403
    for host in ('MyHost:8000', 'myhost', 'MYHOST:1'): assert page.get('/', headers={'host': host}).status_code == 200
    assert page.get('/', headers={'host': 'myhost.evil.example'}).status_code == 403


@pytest.mark.parametrize('name', ['bomb', 'pixels', 'svg', 'cut', 'empty', 'text', 'exe'])
def test_what_is_no_picture(page, people, name):
    data = dict(bomb=lambda: as_file(Image.new('1', (30_000, 30_000))), pixels=lambda: as_file(Image.new('L', (10_000, 6_000))),
                svg=lambda: b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', cut=lambda: people[0].path.read_bytes()[:900],
                empty=lambda: b'', text=lambda: b'../../etc/passwd', exe=lambda: b'MZ' + bytes(5000))[name]()
    t = time.monotonic()
    r = page.post('/ask?modality=0', content=data)
    assert r.status_code == 400 and '\n' not in r.text and 20 < len(r.text) < 200 and time.monotonic() - t < 5
    assert r.headers['content-type'].startswith('text/plain')
    assert page.post('/ask?modality=0', content=people[0].path.read_bytes()).status_code == 200  # and it goes on


def test_kinds_of_pictures(page, people):
    im = Image.open(people[0].path)
    for kind in ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP'): assert page.post('/ask', content=as_file(im.convert('RGB'), kind)).status_code == 200
    deep = Image.fromarray((np.asarray(im.convert('L')).astype(np.uint16)*200))
    assert page.post('/ask?modality=1', content=as_file(deep)).status_code == 200
    assert 'by its pixels' in page.post('/ask', content=as_file(im)).text
    for q in ('modality=2', 'modality=x', 'cam=-1', 'cam=' + '9'*30):
        r = page.post(f'/ask?{q}', content=as_file(im))
        assert r.status_code == 400 and '\n' not in r.text


def test_files_are_only_shown_by_place(page):
    for path in ('/image/../../etc/passwd', '/image/..%2f..%2fetc%2fpasswd', '/image/%2e%2e/%2e%2e/etc/passwd', '/image/-1', '/image/99999', '/image/1.5',
                 '/image/1e3', '/image//etc/passwd', '/page.css/../../etc/passwd', '/image/' + '9'*400, '/static/x', '/image/5%00'):
        r = page.get(path)
        assert r.status_code == 404 and 'root:' not in r.text and 'Traceback' not in r.text, path
    assert page.get('/ask').status_code == 405


def test_names_are_text(tmp_path):
    name = tmp_path/'"><img src=x onerror=alert(1)>&<script>alert(2)</script>'.replace('/', '')
    g = Gallery(made_by='t')
    g.add([ReIDImage(name, 1, 1, 0)], feats=torch.ones(1, 3))
    from starlette.testclient import TestClient
    page = TestClient(serve.make_app(g), base_url='http://127.0.0.1')
    for r in (page.get('/'), page.post('/like/0')): assert '<script>alert' not in r.text and '<img src=x' not in r.text and r.status_code == 200
    assert page.get('/image/0').status_code == 404
    assert 'without weights' in page.get('/').text and '--weights' in page.post('/ask', content=as_file(Image.new('L', (9, 9)))).text


def test_only_for_its_own_page(page, people):
    data = people[0].path.read_bytes()
    assert page.get('/', headers={'host': 'evil.example'}).status_code == 403
    assert page.get('/image/0', headers={'host': 'evil.example:80'}).status_code == 403
    for origin in ('http://evil.example', 'null', 'http://127.0.0.1:9'): assert page.post('/ask', content=data, headers={'origin': origin}).status_code == 403
    assert page.post('/ask?modality=0', content=data, headers={'origin': 'http://127.0.0.1'}).status_code == 200
    for r in (page.get('/'), page.get('/image/0'), page.get('/nowhere'), page.get('/', headers={'host': 'evil.example'})):
        assert "default-src 'none'" in r.headers['content-security-policy'] and r.headers['x-content-type-options'] == 'nosniff'
        assert r.headers['cache-control'] == 'no-store' and 'set-cookie' not in r.headers
    text = page.get('/').text
    assert not re.search(r'(src|href)="(https?:)?//', text) and '<style' not in text and not re.search(r'<script[^>]*>\s*[^<\s]', text)
    assert 'cdn' not in text and not re.search(r'https?://', page.get('/page.js').text + page.get('/page.css').text)


def test_nothing_is_written(page, people, tmp_path, monkeypatch):
    import builtins
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    real = builtins.open
    def reads(f, mode='r', *args, **kw):
        assert not set(mode) & set('wax+'), (f, mode)
        return real(f, mode, *args, **kw)
    monkeypatch.setattr(builtins, 'open', reads)
    big = as_file(Image.effect_noise((1500, 1500), 90).convert('RGB'))
    assert len(big) > 2**21 and page.post('/ask?modality=0', content=big).status_code == 200
    assert page.get('/').status_code == 200 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- a real server

@pytest.fixture
def server(gallery):
    import uvicorn
    with serve._listen('127.0.0.1', 0) as s:
        server = uvicorn.Server(uvicorn.Config(serve.make_app(gallery), log_level='error', limit_concurrency=100))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[s]))
        thread.start()
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until: time.sleep(.02)
        yield s.getsockname()[1]
        server.should_exit = True
        thread.join(30)

def sent(port, length, chunked):
    "How many bytes of an upload a server takes before it answers, and its answer."
    head = f'POST /ask?modality=0 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n'
    head += 'Transfer-Encoding: chunked\r\n\r\n' if chunked else f'Content-Length: {length}\r\n\r\n'
    part, n, answer = bytes(2**16), 0, b''
    with socket.create_connection(('127.0.0.1', port), 30) as s:
        s.sendall(head.encode())
        s.setblocking(False)
        until = time.monotonic() + 30
        while n < length and not answer and time.monotonic() < until:
            try: answer = s.recv(2**16)
            except BlockingIOError: pass
            if answer: break
            s.setblocking(True)
            try: s.sendall(b'%x\r\n%b\r\n' % (len(part), part) if chunked else part)
            except OSError: break
            finally: s.setblocking(False)
            n += len(part)
        s.setblocking(True)
        s.settimeout(10)
        try:
            while b'MB' not in answer and (more := s.recv(2**16)): answer += more
        except OSError: pass
    return n, answer

@pytest.mark.parametrize('chunked', [False, True])
def test_a_large_upload_is_refused_while_it_arrives(server, people, chunked):
    n, answer = sent(server, 100*2**20, chunked)
    assert b'413' in answer and b'more than 20 MB' in answer
    assert n < 40*2**20 and (chunked or n < 8*2**20)
    import httpx
    assert httpx.post(f'http://127.0.0.1:{server}/ask?modality=0', content=people[0].path.read_bytes()).status_code == 200


def test_two_at_once(server, people, gallery):
    "Each gets its own answer; so do twenty."
    import httpx
    got = {}
    def ask(i): got[i] = httpx.post(f'http://127.0.0.1:{server}/ask?modality={people[i].modality}', content=people[i].path.read_bytes(), timeout=60)
    for n in (2, 20):
        threads = [threading.Thread(target=ask, args=[i]) for i in range(n)]
        for t in threads: t.start()
        for t in threads: t.join()
        for i in range(n): assert hits_of(got[i].text) == [h.pos for h in gallery.search(Image.open(people[i].path), k=24, modality=people[i].modality)]


@pytest.mark.skipif(find_browser() is None, reason='no browser')
def test_in_a_browser(server, people, gallery, tmp_path, monkeypatch):
    class Third:
        def verdict(self, d): return 'match' if d < .3 else 'maybe' if d < .5 else 'nobody'
    monkeypatch.setattr(gallery, 'threshold', Third(), raising=False)
    shots = Path(os.environ.get('TMPA_SHOTS', tmp_path))
    with Browser(find_browser()) as b:
        for name, width in (('desktop', 1280), ('phone', 390)):
            b.open(f'http://127.0.0.1:{server}/', width, 900)
            assert '12' in b.js('String(document.querySelectorAll("figure").length)')
            b.js('fetch("image/3").then(r => r.blob()).then(f => ask(new File([f], "query.jpg"))).then(() => 0)')
            wait(b, 'document.querySelectorAll("[data-query] figure").length == 24')
            wait(b, '[...document.querySelectorAll("img")].slice(0, 8).every(i => i.complete && i.naturalWidth)')
            assert b.js('document.querySelector(".verdict").textContent') in ('match', 'maybe')
            assert b.js('document.documentElement.scrollWidth <= innerWidth')
            b.screenshot(shots/f'{name}.png')
            first = b.js('document.querySelector(".path").title')
            b.js('document.querySelector("[data-page=\'2\']").click()')
            wait(b, 'document.querySelector(".turn span").textContent == "page 2"')
            assert b.js('document.querySelector(".path").title') != first
            b.js('document.getElementById("cam").value = 6; document.getElementById("cam").dispatchEvent(new Event("change"))')
            wait(b, '[...document.querySelectorAll("figcaption")].every(f => f.textContent.includes("camera 6"))')
            b.js('document.querySelector("[data-like]").click()')
            wait(b, 'document.querySelector(".asked p:nth-of-type(2)").textContent.includes("of the gallery")')
            b.js('ask(new File([new Uint8Array(21*2**20)], "big.png"))')
            assert 'more than 20' in b.js('document.getElementById("said").textContent')
            b.js('ask(new File(["<svg/>"], "x.svg"))')
            wait(b, 'document.getElementById("said").textContent.includes("no picture")')
        bad = [e for e in b.events if e.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded') and '400' not in str(e)]
        asked = {e['params']['request']['url'] for e in b.events if e.get('method') == 'Network.requestWillBeSent'}
    assert not bad, bad
    assert all(u.startswith((f'http://127.0.0.1:{server}/', 'data:', 'blob:')) for u in asked)

def wait(b, what):
    until = time.monotonic() + 30
    while not b.js(what):
        assert time.monotonic() < until, (what, b.js('document.body.innerText'))
        time.sleep(.05)


def test_the_command_says_where_it_is(capsys):
    with serve._listen('127.0.0.1', 0) as s:
        s.listen()
        with pytest.raises(ConfigError, match='choose another --port'): serve._listen('127.0.0.1', s.getsockname()[1]).listen()
    for bad in (('nowhere.invalid', 0), ('127.0.0.1', 99999)):
        with pytest.raises(ConfigError, match='choose another'): serve._listen(*bad)
    with serve._listen('0.0.0.0', 0) as s: assert not serve._is_loopback(s)
    with serve._listen('127.0.0.1', 0) as s: assert serve._is_loopback(s)
