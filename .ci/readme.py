"""Render README.md from nbs/index.ipynb (nbdev_readme does the same but needs Quarto).  --check: fail if README.md differs from it."""
import re, sys
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parents[1]
NOTE = '<!-- Made from nbs/index.ipynb by .ci/readme.py; edit the notebook. -->\n\n'


LINK = re.compile(r'\]\((?!https?:)([\w./]*?)(?:\d+[a-z]*_)?([\w.]+)\.ipynb(#[\w-]+)?\)')  # to another notebook


def site_link(found):
    "A link between pages of the site, for a reader who is not on it."
    folder, name, anchor = found.groups()
    return f'](https://tmpa.github.io/tmpa/{folder}{name}.html{anchor or ""})'


def text(source): return source if isinstance(source, str) else ''.join(source)


def front_matter(source):
    "`# title` and the promise, from the YAML that nbdev makes of a notebook's first cell."
    meta = yaml.safe_load(source.strip().strip('-')) or {}
    return f"# {meta['title']}\n\n> {meta['description']}" if 'title' in meta else ''


def output(o):
    if 'text' in o: return text(o['text'])
    data = o.get('data', {})
    return '' if 'text/html' in data else text(data.get('text/plain', ''))  # a table or a picture is for the site


def render(cell):
    source = text(cell['source']).strip()
    if source.startswith('<!-- WARNING'): return ''
    if cell['cell_type'] == 'raw' or source.startswith('---\n'): return front_matter(source)
    if cell['cell_type'] == 'markdown': return LINK.sub(site_link, source).replace('](images/', '](nbs/images/')
    source = '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip()
    out = ''.join(map(output, cell.get('outputs', []))).strip()
    return f'```python\n{source}\n```' + (f'\n\n```\n{out}\n```' if out else '') if source else ''


def main():
    nb = read_nb(ROOT/'nbs'/'index.ipynb')
    FilterDefaults()(nb)  # what nbdev does to every page of the site
    parts = [p for p in map(render, nb.cells) if p]
    new = NOTE + re.sub(r'\n{3,}', '\n\n', '\n\n'.join(parts)) + '\n'
    if '[[`' in new:
        sys.exit('nbs/index.ipynb: nbdev itself makes a link of a name in backticks: write `name`, not [`name`](page)')
    readme = ROOT/'README.md'
    if '--check' not in sys.argv: readme.write_text(new, encoding='utf8')
    elif readme.read_text(encoding='utf8') != new: sys.exit('README.md is not what nbs/index.ipynb renders to: run `python .ci/readme.py` and commit it')


if __name__ == '__main__': main()
