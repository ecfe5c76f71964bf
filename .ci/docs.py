"""Build the site without Quarto, whole and readable offline, from the same _quarto.yml:  python .ci/docs.py [--out _docs]

nbdev prepares the notebooks as it does for Quarto, and smalldocs renders them. Added here: tests folded below examples (`shape.py`), a search of our own
(`search.js`), pages under the names that nbdev's links and Quarto use (`losses.html`,
not `13_losses.html`), relative links between pages, equations as MathML, nothing that a page would fetch from elsewhere. Exit 1 with the reasons on a broken
link or an equation that cannot be converted."""
import argparse, base64, html, io, json, os, re, shutil, sys, tempfile
from pathlib import Path

from latex2mathml.converter import convert
from PIL import Image
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.serve_drv import exec_nb
from smalldocs.config import load
from smalldocs.site import Site

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # entries are of the package beside, not of another that is installed
from reference import Procs  # noqa: E402
from shape import shape_cells  # noqa: E402

NUMBER = r'\d+[a-z]*_'                                       # before a notebook's name; no part of its page's
NOTEBOOK_LINK = re.compile(rf'(\]\((?:[\w.]+/)*|^ *- +(?:[\w.]+/)*){NUMBER}([\w.]+\.ipynb)', re.M)
MATH = re.compile(r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]](?=</span>)', re.S)
PLOT = re.compile(r'(<img (?:alt="[^"]*" )?src="data:image/(?:png|jpeg);base64,([^"]+)" class="img-fluid")')
SCREEN = 100                                                 # characters of a line of printed columns that a desk's screen holds
INCH = 96                                                    # in pixels of a style sheet
FETCHED = re.compile(r'<(?:link rel="stylesheet"|script)[^>]* (?:href|src)="https?://[^>]*>(?:</script>)?')
FONTS = re.compile(r'@import url\(https?:[^)]*\);')
# Browsers show the script alphabets only as characters of their own; some of these are older than their blocks in Unicode
LETTERS = re.compile(r'<mi mathvariant="(script|double-struck)">([A-Z])</mi>')
STYLED = dict(script=dict(zip('BEFHILMR', 'ℬℰℱℋℐℒℳℛ')), **{'double-struck': dict(zip('CHNPQRZ', 'ℂℍℕℙℚℝℤ'))})
BLOCK = {'script': 0x1D49C, 'double-struck': 0x1D538}
BAR = '<mo stretchy="false">&#x0007C;</mo>'                  # |x|, which browsers would set apart as a relation
OPEN_SOURCE = '#| code-fold: show\n#| code-summary: "Exported source"'   # as nbdev writes it
FOLDED_SOURCE = '#| code-fold: true\n#| code-summary: "Source"'
QUARTO_ONLY = re.compile(r'(output-file|html-math-method|grid) is (not read|ignored)')


def prepare(nbs, work):
    "Into `work`: the notebooks with signatures and cross links put in, named as their pages, and the files beside them."
    os.environ['IN_TEST'] = '1'                              # as in nbdev's own workers: cells that export do nothing
    for src in [nbs/'_quarto.yml', *map(Path, nbglob(nbs, file_glob=''))]:
        dest = work/src.relative_to(nbs)
        dest = dest.with_name(re.sub(f'^{NUMBER}', '', dest.name))
        dest.parent.mkdir(parents=True, exist_ok=True)
        if src.suffix == '.ipynb': exec_nb(src, dest, Procs)
        else: shutil.copyfile(src, dest)
        if src.suffix == '.ipynb': shape_page(dest)
        if dest.suffix in ('.ipynb', '.yml'): dest.write_text(NOTEBOOK_LINK.sub(r'\1\2', dest.read_text(encoding='utf8')), encoding='utf8')


def shape_page(page):
    "Examples shown, tests folded, in a prepared notebook."
    nb = shape_cells(json.loads(page.read_text(encoding='utf8')))
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if re.search(r'^(class|def|@)', source, re.M): cell['source'] = source.replace(OPEN_SOURCE, FOLDED_SOURCE)
    page.write_text(json.dumps(nb), encoding='utf8')


def mathml(found):
    "An equation as MathML, or as it was where that fails."
    span,kind,tex = found.groups()
    try: res = convert(html.unescape(tex), display='block' if kind == 'display' else 'inline')
    except Exception: return found[0]
    res = res.replace(BAR, BAR.replace('>', ' lspace="0" rspace="0">', 1))
    return span + LETTERS.sub(lambda m: f'<mi>{STYLED[m[1]].get(m[2], chr(BLOCK[m[1]] + ord(m[2]) - ord("A")))}</mi>', res)


def plot_size(found):
    "A figure as wide on the page as its inches say, whatever its resolution: 9 points are 9 points."
    image = Image.open(io.BytesIO(base64.b64decode(found[2])))
    dpi = image.info.get('dpi', (0, 0))[0]
    return f'{found[1]} style="width: {round(INCH*image.width/dpi)}px"' if dpi > 1 else found[1]


def sentences(found):
    "A printed output without columns, whose lines may wrap; columns keep their places, and wide ones scroll."
    columns = [o for o in found[1].splitlines() if re.search(r'\S {3,}\S', o)]
    kind = 'sentences' if not columns else 'around' if max(map(len, columns)) <= SCREEN else ''
    return found[0].replace('cell-output-stdout', f'cell-output-stdout {kind}'.strip(), 1)


def short_numbers(found):
    "fastai's table of epochs with three places instead of six, so that its columns can be read."
    return re.sub(r'(?<=\.\d{3})\d{3}(?=<)', '', found[0])


def finish(page, out, url):
    "Equations rendered, links within the site relative, nothing fetched. Returns the equations that failed."
    text = FETCHED.sub('', MATH.sub(mathml, page.read_text(encoding='utf8')))
    text = PLOT.sub(plot_size, text)
    text = re.sub(r'<div class="cell-output cell-output-stdout">(.*?)</div>', sentences, text, flags=re.S)
    text = re.sub(r'<table[^>]*fastprogress.*?</table>', short_numbers, text, flags=re.S)
    text = re.sub(r'<t[hd]\b.*?</t[hd]>', lambda m: m[0].replace('Rank-', 'Rank&#8209;').replace('± ', '±&nbsp;'), text, flags=re.S)
    text = re.sub(rf'(?<=href="){re.escape(url)}/', os.path.relpath(out, page.parent) + '/', text)
    page.write_text(text, encoding='utf8')
    failed = [tex for *_,tex in MATH.findall(text)] + re.findall(r'<m[ion]\b[^>]*>(\\[^<]*)<', text)   # unknown commands come through as names
    return [f'{page.relative_to(out)}: no MathML for {tex}' for tex in failed]


def search_without_tests(out):
    "Our search in place of smalldocs', over its index without the tests that pages fold away."
    shutil.copyfile(Path(__file__).with_name('search.js'), out/'site_libs'/'fuse'/'fuse.min.js')
    index = out/'search.json'
    entries = json.loads(index.read_text(encoding='utf8'))
    for page in {o['href'].partition('#')[0] for o in entries}:
        folded = re.findall(r'<summary>Tests</summary>(.*?)</details>', (out/page).read_text(encoding='utf8'), re.S)
        tests = [as_searched(html.unescape(re.sub(r'<[^>]+>', '', o))) for o in folded]
        for entry in (o for o in entries if o['href'].partition('#')[0] == page):
            for test in tests: entry['text'] = entry['text'].replace(test, '')
    index.write_text(json.dumps(entries, ensure_ascii=False), encoding='utf8')


def as_searched(code):
    "Code as smalldocs writes it into its index."
    return html.unescape(re.sub(r'<[^>]+>', ' ', ' '.join(code.split())))


def build(out):
    "The whole site in the folder `out`. Returns the complaints."
    cfg = get_config()
    with tempfile.TemporaryDirectory() as work:
        prepare(cfg.nbs_path, Path(work))
        site = Site(load(work), quiet=True)
        site.out = out
        site.build()
    complaints = [w for w in site.warnings if not QUARTO_ONLY.search(w)]  # the names of pages are right already
    search_without_tests(out)
    shutil.copytree(cfg.nbs_path/'fonts', out/'fonts', dirs_exist_ok=True)
    for page in sorted(out.rglob('*.html')): complaints += finish(page, out, cfg.doc_host + cfg.doc_baseurl)
    for css in (out/'site_libs'/'themes').glob('*.css'): css.write_text(FONTS.sub('', css.read_text(encoding='utf8')), encoding='utf8')
    return complaints


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=Path('_docs'), help='folder for the site; what it holds is replaced')
    if complaints := build(parser.parse_args().out.resolve()): sys.exit('\n'.join(complaints))
