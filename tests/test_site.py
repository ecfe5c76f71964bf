"""The site as a reader meets it: built into a temporary folder, every page opened in a real browser at desktop and phone width, without a network."""
import functools, http.server, importlib, json, pkgutil, re, subprocess, sys, threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from browser import Browser, find_browser
from tmpa._modidx import d as index

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {'desktop': 1280, 'phone': 390}
MOST_WIDE = 20  # boxes of code or output that may scroll sideways, on all pages together
needs_browser = pytest.mark.skipif(not find_browser(), reason='no Chromium or Chrome here: install one (apt-get install chromium), or name it in TMPA_BROWSER')

# What is typed, and the page that must be among the first three.
SEARCHES = {
    'install': 'howto/install.html', 'how to train on SYSU-MM01': 'howto/sysu.html', 'RegDB': 'howto/regdb.html', 'custom loss': 'howto/own_loss.html',
    'own dataset csv': 'howto/own_data.html', 'export onnx': 'models.onnx.html', 'search a folder': 'tutorials/search.html', 'resume training': 'howto/resume.html',
    'several gpus': 'howto/several_gpus.html', 'half precision': 'howto/half_precision.html', 'mixing ratios': 'howto/ratios.html', 'what is mINP': 'howto/glossary.html',
    'same person threshold': 'explanations/threshold.html', 'score my features': 'howto/features.html', 'PedMix': 'callback.pedmix.html', 'wrt_loss': 'losses.html',
    't-SNE': 'vis.tsne.html', 'Grad-CAM': 'vis.gradcam.html', 'mixed precision': 'howto/half_precision.html', 'install gpu': 'howto/install.html',
    'custom dataset': 'howto/own_data.html', 'which weights': 'weights.html', 'batch size': 'data.batches.html', 'threshold': 'explanations/threshold.html',
    'rank-1 meaning': 'howto/glossary.html', 'license': 'index.html', 'multi gpu': 'howto/several_gpus.html', 'RegDB download': 'howto/regdb.html',
    'visualize attention': 'vis.gradcam.html', 'fine-tune': 'tutorials/own_data.html'}

# What a page says of itself once it has loaded. Its faults are [what, where] pairs.
PROBE = r"""(async width => {
    await document.fonts.ready;
    const faults = [], main = document.querySelector('main') || document.body, short = s => s.trim().replace(/\s+/g, ' ').slice(0, 80);
    if (!document.title.trim()) faults.push(['no title', document.URL]);
    if (!document.querySelector('h1')) faults.push(['no heading', document.URL]);
    for (const img of document.images) {
        img.loading = 'eager';
        await img.decode().catch(() => faults.push(['missing image', img.src.slice(0, 80)]));
    }
    const texts = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const at = texts.currentNode.parentElement, text = texts.currentNode.data;
        if (!at.closest('pre, code, script, style, math') && /\$[^$]+\$|\$\\|\\[()[\]]|\\[a-zA-Z]{2,}/.test(text)) faults.push(['raw maths', short(text)]);
    }
    for (const span of document.querySelectorAll('span.math')) if (!span.querySelector('math, svg, .katex, mjx-container')) faults.push(['unrendered maths', short(span.textContent)]);
    for (const math of document.querySelectorAll('math')) {
        const box = math.getBoundingClientRect(), copy = math.cloneNode(true);
        copy.querySelectorAll('annotation').forEach(o => o.remove());
        if (!copy.textContent.trim() || !box.width || !box.height) faults.push(['empty maths', short(math.outerHTML)]);
        if (copy.textContent.includes('\\')) faults.push(['unrendered maths', short(copy.textContent)]);
    }
    for (const box of document.querySelectorAll('.math.display')) if (box.scrollWidth > box.clientWidth + 1) faults.push(['cut equation', short(box.textContent)]);
    if (document.querySelector('math') && document.querySelector('link[href$="styles.css"]') && ![...document.fonts].some(f => f.family.includes('tmpa math') && f.status === 'loaded')) faults.push(['no font for equations', document.URL]);
    const wide = document.documentElement.scrollWidth;
    if (wide > width) faults.push(['wider than the screen', wide + ' px']);
    for (const e of main.querySelectorAll('*')) {
        const right = e.getBoundingClientRect().right;
        if (right <= width + 1 || e.closest('math')) continue;
        let box = e.parentElement;      // what scrolls e; its own edge is judged in its turn
        while (box && !/auto|scroll/.test(getComputedStyle(box).overflowX)) box = box.parentElement;
        if (!box || box === document.documentElement || box === document.body) faults.push(['cut off at the right', short(e.outerHTML)]);
    }
    const seen = e => e.offsetParent !== null && e.getBoundingClientRect().height > 0;
    const overflows = e => e.scrollWidth > e.clientWidth + 1;
    for (const img of main.querySelectorAll('img')) if (!img.alt.trim()) faults.push(['image without a text', img.src.slice(0, 80)]);
    const boxes = [...main.querySelectorAll('pre, .cell-output')].filter(e => seen(e) && !(e.tagName == 'PRE' && e.closest('.cell-output')));
    for (const box of boxes) if (/\bassert\b|\btest_(eq|ne|close|fail)\(/.test(box.textContent) && !box.closest('details')) faults.push(['test in sight', short(box.textContent)]);
    if (width > 1000) for (const table of main.querySelectorAll('table')) {
        for (let box = table; seen(table) && box && box !== main; box = box.parentElement) if (overflows(box)) { faults.push(['cut table', short(table.textContent)]); break; }
    }
    const wide_boxes = boxes.filter(e => overflows(e) || [...e.querySelectorAll('pre')].some(overflows)).map(e => short(e.textContent));
    return {faults, wide_boxes, ids: [...document.querySelectorAll('[id], a[name]')].map(o => o.id || o.name),
            links: [...document.querySelectorAll('a[href]')].map(o => o.href), title: document.title};
})"""

SEARCH = r"""(async word => {
    const field = document.querySelector('#quarto-search input');
    field.value = word;
    field.dispatchEvent(new Event('input'));
    for (let i = 0; i < 100 && !document.querySelector('.search-result'); i++) await new Promise(done => setTimeout(done, 50));
    return [...document.querySelectorAll('a.search-result')].map(o => o.href);
})"""


class Server:
    "A folder at http://127.0.0.1."
    def __init__(self, folder):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_): pass
            def do_GET(self): self.send_error(204) if self.path == '/favicon.ico' else super().do_GET()
        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
        self.url = f'http://127.0.0.1:{self.http.server_port}/'
    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self.url
    def __exit__(self, *_): self.http.shutdown(), self.http.server_close()


def reported(events, base):
    "Faults among what the browser reported while a page loaded."
    for o in events:
        method,p = o.get('method'),o.get('params', {})
        if method == 'Runtime.exceptionThrown': yield 'script error', p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text'])[:200]
        if method == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'): yield 'console error', str([a.get('value') for a in p['args']])[:200]
        if method == 'Log.entryAdded' and p['entry']['level'] == 'error': yield 'console error', f"{p['entry']['text'][:120]} {p['entry'].get('url', '')}"
        if method == 'Network.requestWillBeSent' and not p['request']['url'].startswith((base, 'data:', 'blob:')): yield 'asks the network', p['request']['url'][:120]


def dead(link, pages, folder, base):
    "Why a link leads nowhere, or None. Links to other sites are judged by their form; those into this repository by its files."
    if link.startswith(base):
        path,anchor = urldefrag(link[len(base):])
        path,anchor = unquote(path) or 'index.html',unquote(anchor)
        if path not in pages: return None if (folder/path).is_file() and not anchor else 'dead link'
        return None if not anchor or anchor in pages[path]['ids'] else 'dead anchor'
    source = re.match(r'https://github\.com/tmpa/tmpa/blob/main/([^#]+)(?:#L(\d+))?$', link)
    if source:
        file = ROOT/source[1]
        return None if file.is_file() and int(source[2] or 0) <= len(file.read_text(encoding='utf8').splitlines()) else 'no such line in the repository'
    return None if re.match(r'https://[\w-]+(\.[\w-]+)+(/\S*)?$|mailto:', link) and 'tmpa.github.io' not in link else 'malformed or absolute link'


def faults(folder, searches=()):
    "Every fault of every page in `folder`, one line each. `searches` says which page must be among the first three for what is typed."
    searches = dict(searches)
    pages,found,wide = {},[],[]
    with Server(folder) as base, Browser(find_browser()) as browser:
        for page in sorted(o.relative_to(folder).as_posix() for o in folder.rglob('*.html')):
            for device,width in WIDTHS.items():
                browser.open(base + page, width)
                pages[page] = browser.js(f'{PROBE}({width})')
                if device == 'desktop': wide += [f'{page}: {o}' for o in pages[page]['wide_boxes']]
                found += [f'{page}, {device}: {what}: {where}' for what,where in [*pages[page]['faults'], *reported(browser.events, base)]]
        for words,page in searches.items():
            browser.open(base + 'index.html')
            hits = browser.js(f'{SEARCH}({words!r})')
            first = [o[len(base):].partition('#')[0] for o in hits]
            if page not in list(dict.fromkeys(first))[:3]: found.append(f'search for {words}: {page} is not among {first[:6]}')
            found += [f'search for {words}: {why}: {o}' for o in hits if (why := dead(o, pages, folder, base))]
    for page,got in pages.items(): found += [f'{page}: {why}: {o}' for o in dict.fromkeys(got['links']) if (why := dead(o, pages, folder, base))]
    if len(wide) > MOST_WIDE: found += [f'{len(wide)} boxes of code and output are wider than their column:', *wide]
    titles = [o['title'] for o in pages.values()]
    return found + [f'two pages have the title {o}' for o in set(titles) if titles.count(o) > 1], pages


def test_dotted_names_exist():
    "Prose and docstrings name our modules, classes and methods as they are. nbdev makes links of the names that it knows, and passes over others in silence."
    home = {name.removeprefix(f'{module}.'): module for module,names in index['syms'].items() for name in names}
    wrong = []
    for module in index['syms']: importlib.import_module(module)  # some give classes of others more methods
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for name in re.findall(r'`(\w+(?:\.\w+)+)', '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf8'))['cells'])):
            first,_,rest = name.partition('.')
            try:
                if first == 'tmpa': pkgutil.resolve_name(name)
                elif first in home and rest not in getattr(pkgutil.resolve_name(f'{home[first]}:{first}'), '__annotations__', {}): pkgutil.resolve_name(f'{home[first]}:{name}')
            except (ImportError, AttributeError): wrong.append(f'{path.name}: `{name}`')
    assert not wrong


@needs_browser
def test_every_page(tmp_path):
    site = tmp_path/'site'
    built = subprocess.run([sys.executable, '.ci/docs.py', '--out', str(site)], cwd=ROOT, capture_output=True, text=True)
    assert not built.returncode, built.stdout + built.stderr
    found,pages = faults(site, SEARCHES)
    assert len(pages) == sum(1 for o in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)
    assert not found, '\n'.join(found)


@needs_browser
def test_faults_are_seen(tmp_path):
    "A page with one fault of each kind, beside one without any."
    good = '<!doctype html><meta name="viewport" content="width=device-width"><title>{}</title><h1>{}</h1>'
    (tmp_path/'good.html').write_text(good.format('Good', 'Good') + '<p id="here"><a href="#here">here</a> costs $5, <code>$x$</code>'
        '<pre style="overflow-x:auto">' + 'long '*100 + '</pre><span class="math"><math><mi>x</mi></math></span>'
        '<a href="https://github.com/tmpa/tmpa/blob/main/README.md#L1">source</a><a href="https://docs.fast.ai/learner.html#learner">fastai</a>')
    bad = {
        'no title': '', 'no heading': '', 'missing image': '<img src="gone.png">', 'raw maths': '<p>energy $e=mc^2$', 'unrendered maths': r'<span class="math">\(x\)</span>',
        'empty maths': '<math></math>', 'wider than the screen': '<div style="width:2000px">wide</div>', 'script error': '<script>nothing.here()</script>',
        'cut off at the right': '<main style="overflow-x:clip"><pre style="width:2000px">wide</pre></main>',
        'console error': '<script>console.error("oh")</script>', 'image without a text': '<img src="data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7">',
        'test in sight': '<main><pre>test_eq(1, 1)</pre></main>',
        'cut equation': '<main><span class="math display" style="display:block;width:20px;overflow:auto"><math><mi>wide equation</mi></math></span></main>',
        'no font for equations': '<link href="styles.css" rel="stylesheet"><span class="math"><math><mi>x</mi></math></span>',
        'cut table': '<main><div style="width:100px;overflow-x:auto"><table><td style="min-width:300px">cut</table></div></main>',
        'asks the network': '<script src="https://example.org/x.js"></script>',
        'dead link': '<a href="gone.html">x</a>', 'dead anchor': '<a href="good.html#gone">x</a>',
        'no such line in the repository': '<a href="https://github.com/tmpa/tmpa/blob/main/README.md#L99999">x</a>',
        'malformed or absolute link': '<a href="https://tmpa.github.io/tmpa/core.html">x</a>'}
    for n,(what,source) in enumerate(bad.items()):
        head = good.format(*['' if what == 'no title' else what]*2)
        (tmp_path/f'bad{n}.html').write_text((head.replace('h1', 'p') if what == 'no heading' else head) + source)
    found,_ = faults(tmp_path)
    assert not [o for o in found if o.startswith('good.html')]
    for n,what in enumerate(bad): assert any(o.startswith(f'bad{n}.html') and f': {what}' in o for o in found), f'{what} was not seen in bad{n}.html'
