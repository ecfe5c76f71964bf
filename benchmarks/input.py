"""Images a second and core into a training batch, beside the per-image chain of the published scripts, in turn, on one CPU.

python benchmarks/input.py            # about two minutes
python benchmarks/input.py --quick    # a few seconds, a smaller size

Both resize (Lanczos), pad and crop, mirror, exchange channels, erase and normalise every image with the same chances. `cold`
begins with JPEG files; `warm` with images that were decoded and resized before: an array in memory for the chain, the
cache file for tmpa. `first epoch` makes that file on the way. Seconds are of processor time, with one thread.
"""
import argparse, json, os, platform, random, statistics, tempfile, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from datetime import date
from pathlib import Path
import numpy as np
import PIL
import tmpa
import torch
import torchvision.transforms as T
from PIL import Image
from tmpa.core import ReIDImage, atomic_write, keep_memory
from tmpa.data.cache import image_cache
from tmpa.data.load import ReIDDataLoaders
from tmpa.data.synthetic import render_person
from tmpa.data.transforms import ReIDAug
from tmpa.provenance import cpu_name

MEAN, STD = [.485, .456, .406], [.229, .224, .225]

# ------------------------------------------------------------------------------------------------ the per-image chain

class Erase:
    "Random erasing of one normalised image, as published: draw until a rectangle fits."
    def __call__(self, x):
        if random.random() > .5: return x
        _, height, width = x.shape
        for _ in range(100):
            area, ratio = random.uniform(.02, .4)*height*width, random.uniform(.3, 1/.3)
            h, w = round((area*ratio)**.5), round((area/ratio)**.5)
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                x[:, top:top+h, left:left+w] = 0
                return x
        return x

class Exchange:
    "One channel of a visible image fills all three, three times in four."
    def __call__(self, x):
        k = random.randint(0, 3)
        return x if k == 3 else x[k].expand_as(x).clone()

class Chain(torch.utils.data.Dataset):
    "One image at a time: file or array -> PIL -> tensor."
    def __init__(self, items, size, warm):
        self.items, self.size = items, size
        self.arrays = [self.read(o) for o in items] if warm else None
        common = [T.ToPILImage(), T.Pad(round(10*size[0]/288)), T.RandomCrop(size), T.RandomHorizontalFlip(),
                  T.ToTensor(), T.Normalize(MEAN, STD), Erase()]
        self.transform = T.Compose(common + [Exchange()]), T.Compose(common)  # visible, infrared

    def read(self, o): return np.array(Image.open(o.path).convert('RGB').resize(self.size[::-1], Image.LANCZOS))
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        o = self.items[i]
        array = self.read(o) if self.arrays is None else self.arrays[i]
        return self.transform[o.modality](array), o.pid, int(o.modality)

# ------------------------------------------------------------------------------------------------ measuring

def write_images(folder, source, n_ids):
    "JPEG files of rendered people, four visible and four infrared images each."
    items = []
    for pid in range(n_ids):
        for m in range(2):
            for k in range(4):
                f = folder/f'{pid}_{m}_{k}.jpg'
                Image.fromarray(render_person(pid, m, 1 + m, k, source)).save(f, quality=92)
                items.append(ReIDImage(f, pid, 1 + m, m))
    return items

def rate(batches):
    "Images per second of processor time."
    start, n = time.process_time(), 0
    for b in batches: n += len(b[0])
    return n/(time.process_time() - start)

def loaders(items, size, cache):
    return ReIDDataLoaders.from_items(items, size=size, P=8, K=4, num_workers=0, device='cpu', aug=ReIDAug(erase=.5), cache=cache)

def one_round(items, size, warm_chain, cached, folder):
    chain = lambda ds: torch.utils.data.DataLoader(ds, batch_size=64, shuffle=True)
    def first_epoch():
        image_cache(items, size, folder=folder, num_workers=0, progress=False)  # in this process, whose time is taken
        yield from loaders(items, size, folder).train
    return {'chain cold': rate(chain(Chain(items, size, warm=False))),
            'tmpa cold': rate(loaders(items, size, False).train),
            'tmpa first epoch': rate(first_epoch()),
            'chain warm': rate(chain(warm_chain)),
            'tmpa warm': rate(cached.train)}

def measure(source, size, n_ids, rounds):
    "Rates of each way, as many of them as rounds."
    with tempfile.TemporaryDirectory() as d:
        items = write_images(Path(d), source, n_ids)
        warm, cached = Chain(items, size, warm=True), loaders(items, size, Path(d)/'cache')
        one_round(items[:64], size, Chain(items[:64], size, warm=True), cached, Path(d)/"begin")  # everything is loaded
        return [one_round(items, size, warm, cached, Path(d)/f'round{r}') for r in range(rounds)]

def summary(rows):
    "Median rate and spread of each way, and the ratios of the same round."
    ratio = lambda a, b: [r[a]/r[b] for r in rows]
    values = {k: [r[k] for r in rows] for k in rows[0]}
    values |= {'cold ratio': ratio('tmpa cold', 'chain cold'), 'first epoch ratio': ratio('tmpa first epoch', 'chain cold'),
               'warm ratio': ratio('tmpa warm', 'chain warm')}
    return {k: dict(median=statistics.median(v), low=min(v), high=max(v)) for k, v in values.items()}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--out', help='JSON file to write')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    keep_memory()  # as the commands do, for both
    warnings.simplefilter('ignore', UserWarning)
    size, sources, n_ids = ((96, 48), [(128, 64)], 16) if args.quick else ((288, 144), [(128, 64), (288, 144), (384, 160)], 128)
    results = {}
    for source in sources:
        name = f'{source[0]}x{source[1]}'
        results[name] = summary(measure(source, size, n_ids, 2 if args.quick else args.rounds))
        print(f'JPEG of {name} to {size[0]}x{size[1]}, images a second and core: median (lowest to highest)')
        for k, v in results[name].items():
            digits = 2 if 'ratio' in k else 0
            print(f"  {k:18} {v['median']:8.{digits}f}  ({v['low']:.{digits}f} to {v['high']:.{digits}f})", flush=True)
    if args.out:
        versions = dict(tmpa=tmpa.__version__, torch=torch.__version__, pillow=PIL.__version__, python=platform.python_version())
        record = dict(made=date.today().isoformat(), cpu=cpu_name(), versions=versions, size=size, results=results)
        with atomic_write(args.out) as f: f.write_text(json.dumps(record, indent=1) + '\n')

if __name__ == '__main__': main()
