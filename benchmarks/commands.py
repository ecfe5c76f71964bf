"""How long an engineer waits: 500 visible and 500 infrared pictures, three commands, one thread.

    python benchmarks/commands.py [--images 500] [--folder FOLDER]

Renders the pictures and makes weights of the demo's network, which is not counted (untrained: speed does not depend on
what it knows), then runs tmpa_index, tmpa_search with a JSON, a page and a sheet, and tmpa_features, each in a process
of its own.
"""
import argparse, os, resource, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from PIL import Image

from tmpa.data.synthetic import render_person
from tmpa.models.backbone import micro_resnet
from tmpa.models.tmpa import TMPANet, save_weights

SIZE = 96, 48
CAMERAS = (1, 2, 4, 5), (3, 6)


def prepare(root, n):
    "Two folders of JPEGs and a file of weights."
    for modality, side in enumerate(('visible', 'infrared')):
        (root/side).mkdir(parents=True)
        cams = CAMERAS[modality]
        for i in range(n):
            x = render_person(i//2, modality, cams[i % len(cams)], i, SIZE)
            Image.fromarray(x).save(root/side/f'{i:04}.jpg', quality=95)
    torch.manual_seed(0)
    save_weights(TMPANet(300, micro_resnet, pretrained=False), root/'last.pth', size=SIZE)

def seconds(command, *args):
    "Wall time and processor time of a command in a process of its own, which may use one thread."
    script = Path(args[0]).parent/command
    script.write_text(f'from tmpa.use import {command}\n{command}()\n')
    def spent():
        r = resource.getrusage(resource.RUSAGE_CHILDREN)
        return r.ru_utime + r.ru_stime
    start, before = time.perf_counter(), spent()
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, script, *map(str, args)], check=True, env=env, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, spent() - before

def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--images', type=int, default=500, help='of each modality')
    p.add_argument('--folder', help='where to work; default: a temporary one')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        root = Path(a.folder or d)/'pictures'
        prepare(root, a.images)
        index, weights = root/'g.npz', ('--weights', root/'last.pth')
        files = '--json', root/'found.json', '--html', root/'found.html', '--sheet', root/'found.png'
        visible, infrared = ('--modality', 'visible'), ('--modality', 'infrared')
        took = dict(tmpa_index=seconds('tmpa_index', root/'visible', *weights, *visible, '--out', index),
                    tmpa_search=seconds('tmpa_search', index, root/'infrared', *infrared, *files),
                    tmpa_features=seconds('tmpa_features', root/'infrared', *weights, *infrared, '--out', root/'f.npz'))
        made = 'g.npz', 'found.json', 'found.html', 'found.png', 'f.npz'
        for f in made: print(f'{f:12} {(root/f).stat().st_size/1e6:6.2f} MB')
    took[f'together, {a.images} + {a.images} images'] = [sum(s) for s in zip(*took.values())]
    for name, (wall, cpu) in took.items(): print(f'{name:28} {wall:5.1f} s, {cpu:5.1f} s of processor time')

if __name__ == '__main__': main()
