"""B against TMPA on photographs of real people, with *simulated* infrared.

PKU-Reid (Ma et al. 2016, arXiv:1605.02464; CC BY-NC-SA 4.0) has 50 people before two visible cameras. Camera 1 stays as it is; camera 2 becomes a stand-in for infrared: one channel,
a tone curve, blur and noise. The photographs are not part of tmpa; pass the folder that holds manifest.csv (file,pid,cam,orientation) and images/.

    python benchmarks/photographs.py FOLDER --out runs/photographs --workers 2
"""
import csv
from pathlib import Path

import numpy as np
from fastcore.script import call_parse
from PIL import Image, ImageFilter

from tmpa.demo import compare, demo_patch, demo_rows, summary_table
from tmpa.data.datasets import DataSpec


def simulated_infrared(img, rng):
    "One channel from a fixed unequal mix of the colours, a tone curve, blur and noise; 8-bit greyscale."
    r, g, b = np.moveaxis(np.asarray(img.convert('RGB'), np.float32)/255, -1, 0)
    x = np.clip(.75*r + .35*g - .1*b, 0, 1)**.7           # red and near-infrared reflectance go together more than blue
    x = Image.fromarray((255*x).astype(np.uint8)).filter(ImageFilter.GaussianBlur(.8))
    x = np.asarray(x, np.float32) + rng.normal(0, 6, (img.height, img.width))
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def prepare(folder, work, split_seed, n_test=20):
    "Write both cameras as an item list, identities split by seed; returns the CSV file."
    folder, work = Path(folder), Path(work)
    rows = list(csv.DictReader(open(folder/'manifest.csv', newline='')))
    pids = sorted({int(r['pid']) for r in rows})
    test = set(np.random.default_rng(split_seed).permutation(pids)[:n_test].tolist())
    work.mkdir(parents=True, exist_ok=True)
    table = work/f'items{split_seed}.csv'
    with open(table, 'w', newline='') as f:
        out = csv.writer(f); out.writerow(['file', 'pid', 'cam', 'modality', 'split'])
        for r in rows:
            infrared, name = r['cam'] == '2', f"{'ir' if r['cam'] == '2' else 'vis'}/{Path(r['file']).name}"
            target = work/name
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                src = folder/r['file'] if (folder/r['file']).exists() else folder/'images'/r['file']
                img = Image.open(src).convert('RGB')
                (simulated_infrared(img, np.random.default_rng(int(r['pid'])*100 + int(r['orientation']))) if infrared else img).save(target)
            out.writerow([name, r['pid'], r['cam'], 'infrared' if infrared else 'visible', 'test' if int(r['pid']) in test else 'train'])
    return table


@call_parse
def main(
    folder:str, # Folder of PKU-Reid
    out:str='runs/photographs', # Folder to make
    seeds:str='0,1,2', # Split of the identities and training seed
    epochs:int=40, # Of every row
    workers:int=1, # Runs at a time
):
    "Train B, B+CA and TMPA on three splits of 50 real people, 30 for training and 20 for the test."
    size, lines = (96, 48), []
    rows = demo_rows(['B', 'B+CA', 'TMPA'], epochs, size=size)
    for seed in map(int, seeds.split(',')):
        table = prepare(folder, Path(out)/'data', seed)
        lines += compare(rows, Path(out)/f'split{seed}', DataSpec('csv', str(table), size=size), (seed,), resume=True, quiet=True, workers=workers,
                         arch='micro_resnet', pretrained=False, patch=demo_patch(size), lr=.03, warmup=.3, decay=(.6, .85), cache=True)
    print(summary_table(lines))
