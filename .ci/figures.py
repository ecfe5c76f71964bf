"""Run notebooks in place and store their outputs, figures at double resolution and as small as they can be:  python .ci/figures.py nbs/20_vis.tsne.ipynb ...

The site shows a figure as large as its inches say, so that what is written at 9 points can be read; a screen has twice as many dots. A figure
with photographs becomes a JPEG, any other a PNG of few colours; the quality falls until the notebook has at most 190 kB."""
import base64, io, os, re, sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from PIL import Image, ImageChops, ImageStat

DPI = 192
MOST = 190_000                                                # bytes of a notebook
PHOTO = 2500                                                  # colours, from which on a figure has photographs in it
STEPS = (192, 85, 256), (192, 75, 128), (160, 75, 64), (144, 70, 48), (128, 65, 32), (112, 60, 24), (96, 60, 16)
AS_IN_JUPYTER = f"""import matplotlib_inline.backend_inline as _inline, fastai.callback.progress as _progress, fastprogress.fastprogress as _bars
_inline.set_matplotlib_formats("png", dpi={DPI})
_progress.master_bar, _progress.progress_bar = _bars.NBMasterBar, _bars.NBProgressBar"""
NOT_RUN = re.compile(r'^#\| *(slow|cuda|notest|eval: *false)\b', re.M)
NOISE = re.compile(r'/tmp/|jit/_script\.py|Warning')


def run(path):
    "The notebook with the outputs of a run from top to bottom; slow cells keep theirs."
    book = read_nb(path)
    os.chdir(path.parent)
    shell = CaptureShell(path='.', mpl_format='png')
    shell.run_cell(AS_IN_JUPYTER)
    for cell in book.cells:
        if cell.cell_type != 'code' or NOT_RUN.search(cell.source): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc: raise RuntimeError(f'{path}:\n{cell.source}') from shell.exc
        hidden = re.search(r'^#\| *hide\b', cell.source, re.M)
        cell.outputs = [] if hidden else shown(cell.outputs)
    return book


def shown(outputs):
    "Outputs without warnings of libraries, progress bars, and what takes the place of a table of fastai's in plain text."
    res = []
    for out in outputs:
        data = out.get('data', {})
        page = ''.join(data.get('text/html', ''))
        if 'text/html' in data and (not re.sub('<[^>]*>', '', page).strip() or '<progress' in page or 'progress {' in page): continue
        if '\r' in ''.join(out.get('text', '')): continue
        if out.get('name') == 'stderr' and NOISE.search(''.join(out.text)): continue
        if 'fastprogress' in page:
            data.pop('text/markdown', None)
            data['text/plain'] = ['a table of epochs']
        res.append(out)
    return res


def smaller(data, dpi, quality, colours):
    "A figure as (type, bytes): one with photographs as JPEG, of fewer dots where need be, any other as PNG of few colours."
    image = Image.open(io.BytesIO(data)).convert('RGB')
    photo = jpeg(image, dpi, quality)
    if image.getcolors(PHOTO) is None: return 'image/jpeg', photo
    drawn = png(image, colours)
    return ('image/jpeg', photo) if len(drawn) > 2*len(photo) else ('image/png', drawn)   # grey photographs have few colours


def jpeg(image, dpi, quality):
    "A figure with photographs as bytes."
    file = io.BytesIO()
    image = image.resize([round(o*dpi/DPI) for o in image.size], Image.Resampling.LANCZOS)
    image.save(file, 'jpeg', dpi=(dpi, dpi), quality=quality, optimize=True)
    return file.getvalue()


def png(image, colours):
    "A drawn figure as bytes, of as few colours as it can do with."
    file = io.BytesIO()
    for n in (o for o in (colours, 64, 128, 256) if o >= colours):
        few = image.quantize(n)
        if ImageStat.Stat(ImageChops.difference(few.convert('RGB'), image)).mean[1] < 1: break
    few.save(file, 'png', dpi=(DPI, DPI), optimize=True)
    return file.getvalue()


def store(path):
    "Run a notebook and write it."
    book = run(path)
    figures = [(o.data, o.data['image/png']) for c in book.cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    for step in STEPS:
        for data, png in figures:
            for kind in ('image/png', 'image/jpeg'): data.pop(kind, None)
            kind, small = smaller(base64.b64decode(png), *step)
            data[kind] = base64.b64encode(small).decode()
        write_nb(book, path)
        if path.stat().st_size <= MOST: break
    print(f'{path.name}: {path.stat().st_size//1000} kB, {len(figures)} figures, {step}')


if __name__ == '__main__':
    for path in [Path(o).resolve() for o in sys.argv[1:]]: store(path)
