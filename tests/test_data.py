"Data: readers on folders of true shape, hostile images, the sampler, augmentation, loaders. The whole reference set runs where TMPA_ORACLES names its folder."
import csv, io, json, os, pickle, random, shutil, struct, threading, warnings, zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image, ImageFile, ImageOps
from hypothesis import given, settings as hyp, strategies as st
from fastai.learner import Learner
from fastai.callback.schedule import lr_find
from fastai.vision.augment import aug_transforms
from tmpa.core import ConfigError, DataError, ProtocolError, ReIDImage
from tmpa.data.image import decoded
from tmpa.data.raw import _bits, image_exts
from tmpa.results import read_lines
from tmpa.report import write_report
from tmpa.models.tmpa import TMPANet
from tmpa.scoring import save_queries, score_feats, score_model
from tmpa.protocols import cross_settings, llcm_gallery, llcm_settings, load_perms, regdb_settings, sysu_gallery, sysu_settings
from tmpa.data.image import item_range, load_resized, read_image
from tmpa.data.readers import csv_items, llcm_items, regdb_items, sysu_items
from fastai.torch_core import TensorImage, set_seed
from fasttransform import ItemTransform, Transform
from multiprocessing import get_context
from tmpa.callback.pedmix import PedMix
from tmpa.data.cache import image_cache
from tmpa.data.load import ReIDDataLoaders, ReIDDataset, ReIDDL, _cache_for, identity_batches, on_device, one_ahead, split_by_pid
from tmpa.extract import extract_features
from tmpa.learner import tmpa_learner
from tmpa.search import Gallery
from tmpa.models.backbone import micro_resnet
from tmpa.data.transforms import Pieces, ReIDAug, channel_exchange, hflip, pad_crop, random_erase

ORACLES = os.environ.get('TMPA_ORACLES')
needs_oracles = pytest.mark.skipif(not ORACLES, reason='TMPA_ORACLES does not name the folder of reference outputs')

def one_line(e, *words):
    s = str(e.value)
    assert '\n' not in s and all(w in s for w in words), s

# --- SYSU-MM01 ---------------------------------------------------------------------------------------------------------------------------------------

def sysu_tree(root, rows):
    "Empty files in the shape of a structure table."
    (root/'exp').mkdir(parents=True)
    for s in ('train', 'val', 'test'): (root/'exp'/f'{s}_id.txt').write_text(','.join(r['pid'] for r in rows if r['split']==s)+'\n')
    for r in rows:
        for c in range(1, 7):
            if n := int(r[f'cam{c}']):
                d = root/f'cam{c}'/f"{int(r['pid']):04d}"
                d.mkdir(parents=True)
                for i in range(1, n+1): os.close(os.open(d/f'{i:04d}.jpg', os.O_CREAT))
    return root

@pytest.fixture(scope='module')
def sysu_small(tmp_path_factory):
    rows = [dict(pid=str(p), split=s, **{f'cam{c}': str((p*c) % 14 if p!=9 or c>2 else 0) for c in range(1, 7)}) for p, s in ((1, 'train'), (3, 'val'), (5, 'test'), (9, 'test'))]
    return sysu_tree(tmp_path_factory.mktemp('cam6')/'0005'/'cam1 data', rows)

def test_sysu_small(sysu_small):
    items = sysu_items(sysu_small, 'test')
    assert Counter(o.pid for o in items)=={5: sum((5*c) % 14 for c in range(1, 7)), 9: sum((9*c) % 14 for c in range(3, 7))}
    assert all(o.modality==(o.cam in (3, 6)) and o.path.parts[-3:-1]==(f'cam{o.cam}', f'{o.pid:04d}') for o in items)
    assert items==sysu_items(str(sysu_small)+'/', 'test')
    assert {o.pid for o in sysu_items(sysu_small)}=={1, 3} and {o.pid for o in sysu_items(sysu_small, 'val')}=={3}
    a,b = sysu_gallery(items, 'all', 1, 4),sysu_gallery(list(reversed(items)), 'all', 1, 4)
    assert [items[i] for i in a]==[items[::-1][i] for i in b]                       # the order of the items does not matter
    assert len(set(sysu_gallery(items, 'all', 10, 4)))==sum(min(10, (p*c) % 14) for p in (5, 9) for c in (1, 2, 4, 5) if p==5 or c>2)

def test_sysu_seeded_gallery_slice(tmp_path):
    "The first test identities with their real counts, and what published code draws for them (the random stream runs from identity to identity)."
    counts = {6: (42, 29, 20, 20, 20, 20), 10: (34, 30, 20, 20, 20, 20), 17: (0, 0, 20, 20, 20, 20), 21: (0, 0, 0, 20, 20, 20), 24: (0, 0, 20, 20, 21, 20)}
    test = sysu_items(sysu_tree(tmp_path/'cam1', [dict(pid=str(p), split='test', **{f'cam{c+1}': n for c, n in enumerate(v)}) for p, v in counts.items()]), 'test')
    num = lambda mode, t: [int(test[i].path.stem) for i in sysu_gallery(test, mode, 1, t, 'seeded')]
    assert num('all', 0)==[25, 25, 14, 2, 17, 17, 16, 13, 10, 16, 12, 19, 7, 17]
    assert num('all', 7)==[21, 5, 13, 2, 5, 27, 18, 4, 12, 19, 2, 17, 7, 2]
    assert num('indoor', 9)==[30, 20, 24, 9]

@pytest.fixture(scope='module')
def sysu_full(tmp_path_factory):
    root = tmp_path_factory.mktemp('cam3')/'SYSU-MM01'
    yield sysu_tree(root, list(csv.DictReader(open(Path(ORACLES)/'sysu_structure.csv'))))
    shutil.rmtree(root)                                                                # 45,000 files

@needs_oracles
def test_sysu_true_shape(sysu_full):
    items = sysu_items(sysu_full)
    assert (len({o.pid for o in items}), *Counter(o.modality for o in items).values())==(395, 22258, 11909)
    test = sysu_items(sysu_full, 'test')
    assert len({o.pid for o in test})==96
    ss = {s.name: s for s in sysu_settings(test)}
    assert {n: len(s.g_idxs[0]) for n, s in ss.items()}=={'all_single': 301, 'all_multi': 3010, 'indoor_single': 112, 'indoor_multi': 1120}
    assert all(len(s.q_idx)==3803 and len(s.g_idxs)==10 and s.rule=='sysu' and 'seeded' in s.note for s in ss.values())
    seen = {test[i].pid for i in ss['indoor_single'].g_idxs[0]}
    assert len(seen)==56 and sum(test[i].pid in seen for i in ss['indoor_single'].q_idx)==2208

@needs_oracles
def test_sysu_seeded_gallery_is_the_published_one(sysu_full):
    test = sysu_items(sysu_full, 'test')
    for key, names in json.loads((Path(ORACLES)/'sysu_gallery_names.json').read_text()).items():
        mode,trial = key.split('_')
        assert ['/'.join(test[i].path.parts[-3:]) for i in sysu_gallery(test, mode, 1, int(trial), 'seeded')]==names

@needs_oracles
def test_sysu_official_gallery(sysu_full):
    from scipy.io import loadmat
    f,test = Path(ORACLES)/'rand_perm_cam.mat',sysu_items(sysu_full, 'test')
    perms,raw = load_perms(f),loadmat(f)['rand_perm_cam']
    for mode, shots, n in (('all', 1, 301), ('all', 10, 3010), ('indoor', 1, 112), ('indoor', 10, 1120)):
        for t in (0, 9):
            g = sysu_gallery(test, mode, shots, t, perms=perms)
            assert len(g)==n==len(set(g))
            want = [(p, c, int(k)) for p in sorted({o.pid for o in test}) for c in ((1, 2, 4, 5) if mode=='all' else (1, 2))
                    for x in [raw[c-1, 0][p-1, 0] if p<=len(raw[c-1, 0]) else np.zeros((0, 0))] if x.size for k in x[t][:shots]]
            assert [(test[i].pid, test[i].cam, int(test[i].path.stem)) for i in g]==want
    (sysu_full/'exp'/'rand_perm_cam.mat').symlink_to(f)                              # found beside the index files: becomes the default
    try: assert all('official' in s.note for s in sysu_settings(test, trials=2)) and 'seeded' in sysu_settings(test, trials=1, convention='seeded')[0].note
    finally: (sysu_full/'exp'/'rand_perm_cam.mat').unlink()

def test_sysu_errors(sysu_small, tmp_path):
    with pytest.raises(DataError) as e: sysu_items(tmp_path/'none')
    one_line(e, str(tmp_path/'none'), 'pass the folder')
    with pytest.raises(DataError) as e: sysu_items(tmp_path)
    one_line(e, 'train_id.txt')
    (tmp_path/'exp').mkdir()
    (tmp_path/'exp'/'test_id.txt').write_text('1,two')
    with pytest.raises(DataError) as e: sysu_items(tmp_path, 'test')
    one_line(e, 'test_id.txt', 'commas')
    (tmp_path/'exp'/'test_id.txt').write_text('1,2')
    with pytest.raises(DataError) as e: sysu_items(tmp_path, 'test')
    one_line(e, 'cam1')
    for c in range(1, 7): (tmp_path/f'cam{c}').mkdir()
    with pytest.raises(DataError) as e: sysu_items(tmp_path, 'test')
    one_line(e, 'no image')
    with pytest.raises(DataError): sysu_items(sysu_small, 'gallery')
    items = sysu_items(sysu_small, 'test')
    with pytest.raises(ProtocolError): sysu_gallery(items, 'outdoor')
    with pytest.raises(ProtocolError): sysu_gallery(items, convention='random')
    with pytest.raises(DataError) as e: sysu_gallery(items, perms=sysu_small/'exp'/'test_id.txt')
    one_line(e, 'test_id.txt', 'rand_perm_cam')
    with pytest.raises(DataError) as e: sysu_gallery(items, perms={})
    one_line(e, 'does not fit')
    (sysu_small/'cam4').rename(sysu_small/'cam4_away')
    try:
        with pytest.warns(UserWarning, match='cam4'): sysu_items(sysu_small, 'test')
    finally: (sysu_small/'cam4_away').rename(sysu_small/'cam4')

# --- RegDB, LLCM -------------------------------------------------------------------------------------------------------------------------------------

def regdb_tree(root, n_ids=4, n=3, trials=10, relabel=True):
    for m in ('Visible', 'Thermal'):
        for p in range(1, n_ids+1):
            (root/m/str(p)).mkdir(parents=True)
            for i in range(n): (root/m/str(p)/f'x {i}.bmp').touch()                  # a space in the name, on purpose
    (root/'idx').mkdir()
    for t in range(1, trials+1):
        pids = random.Random(t).sample(range(1, n_ids+1), n_ids)
        for s, part in (('train', pids[:n_ids//2]), ('test', pids[n_ids//2:])):
            for m in ('Visible', 'Thermal'):
                (root/'idx'/f'{s}_{m.lower()}_{t}.txt').write_text(''.join(f'{m}/{p}/x {i}.bmp {l if relabel else 7}\n' for l, p in enumerate(part) for i in range(n)))
    return root

def test_regdb(tmp_path):
    root = regdb_tree(tmp_path/'cam3')
    for t in range(1, 11):
        tr,te = regdb_items(root, t),regdb_items(root, t, 'test')
        assert len(tr)==len(te)==12 and not {o.pid for o in tr} & {o.pid for o in te} and {o.pid for o in tr} | {o.pid for o in te}=={1, 2, 3, 4}
        assert all(int(o.path.parent.name)==o.pid and o.cam==o.modality+1 and ('Visible', 'Thermal')[o.modality]==o.path.parts[-3] for o in tr+te)
    v,t = regdb_settings(te)
    assert (v.name, t.name, v.rule)==('v2t', 't2v', 'regdb') and len(v.q_idx)==len(v.g_idxs[0])==6 and te[v.q_idx[0]].modality==0

def test_regdb_label_where_folders_do_not_say_who(tmp_path):
    root = regdb_tree(tmp_path/'r', relabel=False)                                    # folders disagree with labels: labels win
    assert {o.pid for o in regdb_items(root)}=={7}

def test_regdb_errors(tmp_path):
    root = regdb_tree(tmp_path/'r')
    with pytest.raises(DataError) as e: regdb_items(root, 11)
    one_line(e, 'train_visible_11.txt', 'trial')
    f = root/'idx'/'train_thermal_1.txt'
    good = f.read_text()
    for bad, words in (('Thermal/1/gone.bmp 0\n', ('gone.bmp', 'line 7')), ('Thermal/99/x 0.bmp 0\n', ('99', 'line 7')), ('Thermal/1/x 0.bmp zero\n', ('line 7', 'correct the line')), ('nonsense\n', ('line 7',))):
        f.write_text(good+bad)
        with pytest.raises(DataError) as e: regdb_items(root)
        one_line(e, 'train_thermal_1.txt', *words)
    f.write_text('\n \n')
    with pytest.raises(DataError) as e: regdb_items(root)
    one_line(e, 'empty')
    f.write_bytes(b'\xff\xfe\x00bad')
    with pytest.raises(DataError) as e: regdb_items(root)
    one_line(e, 'train_thermal_1.txt')
    f.write_bytes(('\ufeff'+good.replace('/', '\\').replace('\n', '\r\n')+'\r\n\r\n').encode())    # Windows, with a byte order mark
    assert len(regdb_items(root))==12

def test_llcm(tmp_path):
    root = tmp_path/'cam8'
    for m in ('vis', 'nir'):
        for p in (3, 4):
            for c in (1, 2, 9):
                d = root/f'test_{m}'/f'cam{c}'/f'{p:04d}'
                d.mkdir(parents=True)
                for i in range(4): (d/f'{i}.jpg').touch()
        for p in (1, 2):
            (root/m/f'{p:04d}').mkdir(parents=True)
            for c in (1, 5): (root/m/f'{p:04d}'/f'{p:04d}_c{c:02d}_s185535_f7010_{m}.jpg').touch()
    (root/'idx').mkdir()
    (root/'idx'/'test_id.txt').write_text('3,4\n')
    for m in ('vis', 'nir'): (root/'idx'/f'train_{m}.txt').write_text('\n'.join(f'{m}/{p:04d}/{p:04d}_c{c:02d}_s185535_f7010_{m}.jpg {p-1}' for p in (1, 2) for c in (1, 5)))
    assert [(o.pid, o.cam, o.modality) for o in llcm_items(root)]==[(p, c, m) for m in (0, 1) for p in (1, 2) for c in (1, 5)]
    te = llcm_items(root, 'test')
    assert len(te)==48 and {o.cam for o in te}=={1, 2, 9}
    v,t = llcm_settings(te)
    assert v.rule=='llcm' and len(v.q_idx)==24 and [len(g) for g in v.g_idxs]==[6]*10 and te[v.g_idxs[0][0]].modality==1 and te[t.g_idxs[0][0]].modality==0
    rng = random.Random(3)
    assert [te[i].path.name for i in llcm_gallery(te, 0, 3)]==[rng.choice([f'{i}.jpg' for i in range(4)]) for _ in range(6)]
    (root/'idx'/'test_id.txt').unlink()
    with pytest.raises(DataError) as e: llcm_items(root, 'test')
    one_line(e, 'test_id.txt')

# --- lists and folders as people have them -----------------------------------------------------------------------------------------------------------

def photo(f, mode='L'):
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 4), 90, np.uint8)).convert(mode).save(f, format={'.jpe': 'JPEG'}.get(f.suffix))
    return f

def test_readers_and_decoder_know_the_same_formats(tmp_path):
    for c in range(1, 7):
        for name in ('0001.jpg', '0002.webp', '0003.jpe'): photo(tmp_path/f'cam{c}'/'0001'/name)
    (tmp_path/'exp').mkdir()
    (tmp_path/'exp'/'test_id.txt').write_text('1')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        items = sysu_items(tmp_path, 'test')
    assert len(items)==18 and all(read_image(o.path).shape==(3, 8, 4) for o in items)

def test_every_ending_that_is_listed_is_read(tmp_path):
    "Also those that Pillow itself cannot write are its decoder's, and nothing else is opened."
    for ext in sorted(image_exts()-{'.pfm', '.apng', '.avifs'}):
        f = tmp_path/f'x{ext}'
        try: Image.fromarray(np.full((32, 32), 90, np.uint8)).convert('1' if ext=='.pbm' else 'L').save(f)
        except (KeyError, OSError, ValueError): continue
        assert read_image(f).shape==(3, 32, 32), ext
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path/'x.pcx')
    assert '.pcx' not in image_exts()
    with pytest.raises(DataError) as e: read_image(tmp_path/'x.pcx')
    one_line(e, 'x.pcx')

def test_what_is_left_out_is_counted_and_said(tmp_path):
    for c in range(1, 7): photo(tmp_path/f'cam{c}'/'0001'/'0001.jpg')
    for name in ('0002.raw', '0003.raw', 'notes'): (tmp_path/'cam2'/'0001'/name).touch()
    for name in ('.hidden', 'Thumbs.db', 'desktop.ini'): (tmp_path/'cam3'/'0001'/name).touch()
    (tmp_path/'exp').mkdir()
    (tmp_path/'exp'/'test_id.txt').write_text('1')
    with pytest.warns(UserWarning, match=r'3 files in .*left out \(2 \.raw, 1 no ending.*0002\.raw') as w: assert len(sysu_items(tmp_path, 'test'))==6
    assert len(w)==1
    for m in ('vis', 'nir'): photo(tmp_path/f'test_{m}'/'cam1'/'0001'/'a.png')
    (tmp_path/'test_nir'/'cam1'/'0001'/'b.raw').touch()
    (tmp_path/'idx').mkdir()
    (tmp_path/'idx'/'test_id.txt').write_text('1')
    with pytest.warns(UserWarning, match='1 files in .*1 .raw'): assert len(llcm_items(tmp_path, 'test'))==2

def test_two_files_with_one_number_have_no_place_in_the_official_gallery(tmp_path):
    items = [ReIDImage(photo(tmp_path/'cam1'/'0001'/n), 1, 1, 0) for n in ('0001.jpg', '0001.png')]
    with pytest.raises(DataError) as e: sysu_gallery(items, perms={(1, 1): np.array([[1, 2]]*10)})
    one_line(e, '0001.jpg', '0001.png', 'one number')

def test_lists_from_windows(tmp_path):
    "Back slashes, blanks around cells, a byte order mark and capitals in the first line."
    for m in ('Visible', 'Thermal'): photo(tmp_path/m/'1'/'a b.bmp')
    (tmp_path/'l.csv').write_bytes('\ufefffile , PID,cam, Modality,split\r\n Visible\\1\\a b.bmp ,1,1,visible,train\r\n"Thermal\\1\\a b.bmp",1,2, Infrared,train\r\n'.encode())
    (tmp_path/'idx').mkdir()
    for m in ('Visible', 'Thermal'): (tmp_path/'idx'/f'train_{m.lower()}_1.txt').write_text(f'  {m}\\1\\a b.bmp   0 \r\n')
    assert csv_items(tmp_path/'l.csv')==regdb_items(tmp_path)

def test_names_that_are_not_utf8(tmp_path):
    "As the system takes them: they are read, trained on, and written where images are named."
    name = os.fsdecode(b'm\xfcller')
    try: (tmp_path/name).mkdir()
    except OSError: pytest.skip('this file system takes UTF-8 alone')
    rows = b''.join(b'm\xfcller/%d%d.png,%d,%d,%d,%s\n' % (p, m, p, m+1, m, s) for p in range(4) for m in range(2) for s in ([b'train'] if p<2 else [b'test']))
    for p in range(4):
        for m in range(2): photo(tmp_path/name/f'{p}{m}.png')
    (tmp_path/'l.csv').write_bytes(b'file,pid,cam,modality,split\n'+rows)
    items = csv_items(tmp_path/'l.csv', 'test')
    assert len(items)==4 and all(o.path.exists() for o in items) and read_image(items[0].path).shape==(3, 8, 4)
    settings = cross_settings(items)
    scores,results = score_feats(torch.eye(4), items, settings)
    save_queries(tmp_path/'q.csv', results, items, settings)
    assert b'm\xfcller/20.png' in (tmp_path/'q.csv').read_bytes()
    assert len(read_lines(tmp_path/'q.csv'))==4
    write_report(tmp_path/'r.html', name, [(name, dict(path=name)), ('text', name)])
    (tmp_path/'idx').mkdir()
    for m in ('visible', 'thermal'): (tmp_path/'idx'/f'train_{m}_1.txt').write_bytes(b'm\xfcller/00.png 0\n')
    assert regdb_items(tmp_path)[0].path.exists()
    (tmp_path/'l.csv').write_bytes(b'file,pid,cam,modality,split\nm\xfcll/0.png,1,1,0,train\n')
    with pytest.raises(DataError) as e: csv_items(tmp_path/'l.csv')
    one_line(e, 'line 2', 'UTF-8')
    e.value.msg.encode()                                                                # can be printed

# --- images ------------------------------------------------------------------------------------------------------------------------------------------

RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (8, 1))

def png16(a):
    "16-bit colour PNG, which Pillow cannot write: (H, W, 3) or with alpha (H, W, 4)."
    chunk = lambda t, d: struct.pack('>I', len(d))+t+d+struct.pack('>I', zlib.crc32(t+d))
    h,w,c = a.shape
    return (b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, {2: 4, 3: 2, 4: 6}[c], 0, 0, 0))
            +chunk(b'IDAT', zlib.compress(b''.join(b'\0'+r.astype('>u2').tobytes() for r in a)))+chunk(b'IEND', b''))

def tif16(a, order):
    "Uncompressed 16-bit TIFF of (H, W, 1, 3 or, as CMYK, 4) in either byte order."
    h,w,c = a.shape
    tags = [(256, w), (257, h), (258, 16), (259, 1), (262, {1: 1, 3: 2, 4: 5}[c]), (273, 200), (277, c), (278, h), (279, a.nbytes)]
    if c>1: tags[2] = (258, 150)                                                       # several counts need a place of their own
    several = lambda t: t==258 and c>1
    ifd = struct.pack(order+'H', len(tags))+b''.join(struct.pack(order+'HHI', t, 3 if several(t) else 4, c if several(t) else 1)+struct.pack(order+'I', v) for t, v in tags)+bytes(4)
    head = (b'II' if order=='<' else b'MM')+struct.pack(order+'HI', 42, 8)+ifd
    return (head.ljust(150, b'\0')+struct.pack(order+f'{c}H', *[16]*c)).ljust(200, b'\0')+a.astype(order+'u2').tobytes()

@pytest.mark.parametrize('mode,ext', [('1', 'png'), ('L', 'png'), ('L', 'jpg'), ('L', 'bmp'), ('LA', 'png'), ('P', 'png'), ('P', 'bmp'), ('RGB', 'png'), ('RGB', 'bmp'), ('RGB', 'jpg'), ('RGBA', 'png'),
                                      ('CMYK', 'tif'), ('CMYK', 'jpg'), ('YCbCr', 'jpg'), ('I;16', 'png'), ('I;16', 'tif'), ('I', 'tif'), ('F', 'tif')])
def test_every_mode(tmp_path, mode, ext):
    f = tmp_path/f'x.{ext}'
    im = {'I;16': lambda: Image.fromarray(RAMP.astype(np.uint16)*257), 'I': lambda: Image.fromarray(RAMP.astype(np.int32)*257), 'F': lambda: Image.fromarray((RAMP/255).astype(np.float32)),
          '1': lambda: Image.fromarray(RAMP>127), 'P': lambda: Image.fromarray(np.stack([RAMP]*3, -1)).quantize(64)}.get(mode, lambda: Image.fromarray(np.stack([RAMP]*3, -1)).convert(mode))()
    im.save(f, **(dict(quality=100) if ext=='jpg' else {}))
    for x in (read_image(f), load_resized(f, (8, 16))):
        assert x.shape==(3, 8, 16) and x.dtype==torch.float32 and x.is_contiguous() and 0<=x.min() and x.max()<=1
        want = torch.tensor(RAMP/255).float() if mode!='1' else torch.tensor(RAMP>127).float()
        assert (x-want).abs().max()<(.04 if mode in ('CMYK', 'P') else .02 if ext=='jpg' else 1e-6)
    assert load_resized(f, (20, 10)).shape==(3, 20, 10)

def test_16_bit_is_never_cut(tmp_path):
    raw = np.random.default_rng(0).integers(0, 65536, (24, 12), dtype=np.uint16)
    for ext in ('png', 'tif'):
        Image.fromarray(raw).save(tmp_path/f'a.{ext}')
        assert torch.equal(read_image(tmp_path/f'a.{ext}')[0], torch.tensor(raw.astype(np.float32)/65535))
    (tmp_path/'be.tif').write_bytes(tif16(raw[..., None], '>'))
    assert Image.open(tmp_path/'be.tif').mode=='I;16B' and torch.equal(read_image(tmp_path/'be.tif')[0], torch.tensor(raw.astype(np.float32)/65535))
    for c in (3, 4):
        a = np.random.default_rng(c).integers(0, 65536, (6, 5, c), dtype=np.uint16)
        (tmp_path/'c.png').write_bytes(png16(a))
        assert np.allclose(read_image(tmp_path/'c.png', as_stored=True).permute(1, 2, 0).numpy(), a[..., :3]/65535, atol=1e-7)
        assert load_resized(tmp_path/'c.png', (9, 9)).shape==(3, 9, 9)
    (tmp_path/'c.png').write_bytes(png16(a[..., :2]))                                  # grey and alpha
    with pytest.raises(DataError) as e: read_image(tmp_path/'c.png')
    one_line(e, 'c.png', '16-bit')
    for order in '<>':                                                                  # colour TIFF, both byte orders
        (tmp_path/'c.tif').write_bytes(tif16(a[..., :3], order))
        assert np.allclose(read_image(tmp_path/'c.tif').permute(1, 2, 0).numpy(), a[..., :3]/65535, atol=1e-7)
    # resized in float: a step of 40 raw values survives, and two images with different ranges stay comparable
    lo,hi = np.full((40, 20), 30000, np.uint16),np.full((40, 20), 30040, np.uint16)
    for n, a in (('lo', lo), ('hi', hi)): Image.fromarray(a).save(tmp_path/f'{n}.png')
    d = load_resized(tmp_path/'hi.png', (9, 7))-load_resized(tmp_path/'lo.png', (9, 7))
    assert torch.allclose(d, torch.full((3, 9, 7), 40/65535), atol=1e-6)
    x = load_resized(tmp_path/'hi.png', (9, 7), ir_range=(30000, 30020))
    assert torch.equal(x, torch.ones(3, 9, 7))                                         # clipped, not wrapped

@pytest.mark.parametrize('top', [300, 16383, 65535])
def test_netpbm_is_never_cut(tmp_path, top):
    "Grey and colour, binary and text, by the value that the file calls its highest; raw values are the file's."
    a = np.random.default_rng(top).integers(0, top+1, (6, 5, 3))
    for kind, x in (('P6', a), ('P5', a[..., 0]), ('P3', a), ('P2', a[..., 0])):
        f = tmp_path/('a.ppm' if x.ndim==3 else 'a.pgm')
        body = x.astype('>u2').tobytes() if kind in ('P5', 'P6') else b'# a remark 1 2 3\n'+' '.join(map(str, x.flat)).encode()+b'\n'
        f.write_bytes(f'{kind}\n# made by hand\n5 6\n{top}\n'.encode()+body)
        want = torch.tensor(x).float().reshape(6, 5, -1).permute(2, 0, 1)
        assert torch.allclose(read_image(f), (want/top).expand(3, 6, 5), atol=1e-7), kind
        assert torch.allclose(read_image(f, (50, 250)), ((want-50)/200).clamp(0, 1).expand(3, 6, 5), atol=1e-6), kind
        assert decoded(f, (6, 5)).dtype==np.uint16 and load_resized(f, (9, 9)).shape==(3, 9, 9)
        if x.ndim==3:
            with pytest.raises(DataError) as e: read_image(Image.open(f))
            one_line(e, '8 bits')
        else: assert torch.allclose(read_image(Image.open(f)), read_image(f), atol=1e-5)
        f.write_bytes(f.read_bytes()[:-41])
        with pytest.raises(DataError) as e: read_image(f)
        one_line(e, str(f), 'restore the file')

def test_what_would_be_cut_is_refused(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name, mark, at, bits in (('a.j2k', b'\xff\x4f\xff\x51', 42, 11), ('a.jp2', b'\xff\x4f\xff\x51', 42, 11), ('a.avif', b'pixi', 9, 12)):
        f = tmp_path/name
        if f.suffix not in image_exts(): continue
        Image.fromarray(a).save(f)
        assert read_image(f).shape==(3, 32, 32)
        b = bytearray(f.read_bytes())
        b[b.find(mark)+at] = bits
        f.write_bytes(b)
        assert _bits(SimpleNamespace(format={'.avif': 'AVIF'}.get(f.suffix, 'JPEG2000')), f)==12
        with pytest.raises(DataError) as e: read_image(f)
        one_line(e, name, *['12 bits a colour'][:f.suffix!='.avif'])                    # pixels of 8 bits under that head are no AVIF
    (tmp_path/'c.tif').write_bytes(tif16(np.zeros((4, 4, 4), np.uint16), '<'))
    assert Image.open(tmp_path/'c.tif').mode=='CMYK'
    with pytest.raises(DataError) as e: read_image(tmp_path/'c.tif')
    one_line(e, 'c.tif', 'CMYK')

def test_white_is_zero(tmp_path):
    "Of 16 bits as of 8; of big-endian files Pillow says that it cannot read them."
    order = '<'
    a,f = np.arange(0, 48*1000, 1000, dtype=np.uint16).reshape(8, 6, 1),tmp_path/'w.tif'
    white = struct.pack(order+'HHII', 262, 4, 1, 0)
    black = struct.pack(order+'HHII', 262, 4, 1, 1)
    f.write_bytes(tif16(a, order).replace(black, white))
    assert Image.open(f).tag_v2[262]==0
    want = torch.tensor((65535-a[..., 0].astype(np.float32))/65535)
    assert torch.equal(read_image(f)[0], want) and torch.equal(read_image(Image.open(f))[0], want)
    assert torch.allclose(read_image(f, (65535-47000, 65535))[0], torch.tensor(1-a[..., 0]/47000).float(), atol=1e-6)
    Image.fromarray((a[..., 0]//257).astype(np.uint8)).save(f, tiffinfo={262: 0})
    assert torch.equal(read_image(f)[0], torch.tensor(a[..., 0]//257).float()/255)       # Pillow writes and reads white as zero
    f.write_bytes(tif16(a, order))
    assert torch.equal(read_image(f)[0], torch.tensor(a[..., 0].astype(np.float32)/65535))

def test_white_is_zero_without_a_range_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), .5, np.float32)).save(tmp_path/'a.tif')
    b = (tmp_path/'a.tif').read_bytes()
    black = struct.pack('<HHIHH', 262, 3, 1, 1, 0)
    assert black in b
    (tmp_path/'a.tif').write_bytes(b.replace(black, struct.pack('<HHIHH', 262, 3, 1, 0, 0)))
    with pytest.raises(DataError) as e: read_image(tmp_path/'a.tif')
    one_line(e, 'a.tif', 'black as zero')

def test_5_6_5_bitmap_is_8_bit_colour(tmp_path):
    a = np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], '<u2')[::-1]                     # rows from the bottom: red, green / blue, white
    head = struct.pack('<IiiHHIIiiII', 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)+struct.pack('<III', 0xF800, 0x07E0, 0x001F)
    (tmp_path/'a.bmp').write_bytes(b'BM'+struct.pack('<IHHI', 14+len(head)+8, 0, 0, 14+len(head))+head+a.tobytes())
    assert read_image(tmp_path/'a.bmp').permute(1, 2, 0).tolist()==[[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]]

def test_8_bit_ignores_ir_range(tmp_path):
    Image.fromarray(RAMP).save(tmp_path/'a.png')
    assert torch.equal(read_image(tmp_path/'a.png', (0, 1)), read_image(tmp_path/'a.png'))

def test_no_natural_range(tmp_path):
    for a in (np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.int32), np.full((4, 4), 36.6, np.float32), np.full((4, 4), np.nan, np.float32)):
        Image.fromarray(a).save(tmp_path/'a.tif')
        with pytest.raises(DataError) as e: read_image(tmp_path/'a.tif')
        one_line(e, 'a.tif', 'ir_range')
    assert torch.equal(read_image(tmp_path/'a.tif', (0, 50)), torch.zeros(3, 4, 4))

@pytest.mark.parametrize('ext', ['jpg', 'png', 'bmp', 'tif'])
def test_damaged(tmp_path, ext):
    f = tmp_path/f'x.{ext}'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 40, 3), dtype=np.uint8)).save(f)
    whole = f.read_bytes()
    for lenient in (False, True):
        old,ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES,lenient
        try:
            for n in (0, 1, 20, len(whole)//3, len(whole)//2, len(whole)*9//10):
                f.write_bytes(whole[:n])
                with pytest.raises(DataError) as e: read_image(f)
                one_line(e, str(f), 'restore the file')
                if n==0: one_line(e, '0 bytes')
            assert ImageFile.LOAD_TRUNCATED_IMAGES==lenient                           # left as found
        finally: ImageFile.LOAD_TRUNCATED_IMAGES = old
    f.write_text('<html>404</html>')
    with pytest.raises(DataError) as e: read_image(f)
    one_line(e, str(f))
    f.unlink()
    with pytest.raises(DataError) as e: read_image(f)
    one_line(e, str(f), 'no image')
    with pytest.raises(DataError) as e: read_image(tmp_path)                           # a folder
    one_line(e, str(tmp_path))

def tagged(im, orientation):
    ex = im.getexif()
    ex[274] = orientation
    return ex

def test_orientation_tag_is_ignored_in_published_sets(tmp_path):
    im = Image.fromarray(np.stack([RAMP]*3, -1))
    im.save(tmp_path/'o.png', exif=tagged(im, 6))
    assert read_image(tmp_path/'o.png', as_stored=True).shape==(3, 8, 16)

@pytest.mark.parametrize('orientation', range(10))
def test_orientation_of_every_depth(tmp_path, orientation):
    "As Pillow turns 8 bits."
    a = np.arange(4*6, dtype=np.uint8).reshape(4, 6)*10
    deep = Image.fromarray(a.astype(np.uint16)*257)
    want = np.asarray(ImageOps.exif_transpose(Image.open(save(tmp_path/'g.png', Image.fromarray(a), orientation))))
    colour = np.stack([a, a//2, 255-a], -1)
    for f, x in ((tmp_path/'g.png', None), (save(tmp_path/'d.png', deep, orientation), None), (save(tmp_path/'d.tif', deep, orientation), None), (save(tmp_path/'c.png', Image.fromarray(colour), orientation), 0)):
        got = read_image(f)[0].numpy()
        assert np.allclose(got, want/255, atol=1e-6), f
        assert load_resized(f, (12, 8)).shape==(3, 12, 8)
    assert torch.equal(read_image(Image.open(tmp_path/'c.png')), read_image(tmp_path/'c.png'))
    raw = png16(np.stack([a.astype(np.uint16)*257]*3, -1))
    exif = tagged(Image.fromarray(a), orientation).tobytes().removeprefix(b'Exif\0\0')
    chunk = struct.pack('>I', len(exif))+b'eXIf'+exif+struct.pack('>I', zlib.crc32(b'eXIf'+exif))
    (tmp_path/'e.png').write_bytes(raw[:33]+chunk+raw[33:])
    assert np.allclose(read_image(tmp_path/'e.png')[0].numpy(), want/255, atol=1e-6)
    assert read_image(tmp_path/'e.png', as_stored=True).shape==(3, 4, 6)

def save(f, im, orientation):
    im.save(f, exif=tagged(im, orientation))
    return f

def test_a_broken_tag_says_nothing(tmp_path):
    Image.fromarray(RAMP).save(tmp_path/'a.jpg', exif=b'Exif\0\0nonsense')
    assert read_image(tmp_path/'a.jpg').shape==(3, 8, 16)

def test_transparency_is_laid_on_white(tmp_path):
    "By a slow formula, at every depth and in every way in which a file says it; published sets keep what is under it."
    rng = np.random.default_rng(0)
    for c in (2, 4):
        a = rng.integers(0, 256, (6, 5, c), dtype=np.uint8)
        Image.fromarray(a, {2: 'LA', 4: 'RGBA'}[c]).save(tmp_path/'a.png')
        colour,alpha = a[..., :-1]/255,a[..., -1:]/255
        want = np.broadcast_to(colour*alpha+1-alpha, (6, 5, 3))
        for x in (read_image(tmp_path/'a.png'), read_image(Image.open(tmp_path/'a.png'))): assert np.abs(x.permute(1, 2, 0).numpy()-want).max()<=.51/255
        assert decoded(tmp_path/'a.png', (6, 5)).shape[0]=={2: 1, 4: 3}[c]
        assert np.allclose(read_image(tmp_path/'a.png', as_stored=True).permute(1, 2, 0).numpy(), np.broadcast_to(colour, (6, 5, 3)))
    a = rng.integers(0, 65536, (6, 5, 4), dtype=np.uint16)
    (tmp_path/'a.png').write_bytes(png16(a))
    colour,alpha = a[..., :3]/65535,a[..., 3:]/65535
    assert np.allclose(read_image(tmp_path/'a.png').permute(1, 2, 0).numpy(), colour*alpha+1-alpha, atol=1e-6)
    assert np.allclose(read_image(tmp_path/'a.png', as_stored=True).permute(1, 2, 0).numpy(), colour, atol=1e-6)
    p = Image.fromarray(np.array([[0, 1]], np.uint8), 'P')
    p.putpalette([10, 20, 30, 40, 50, 60])
    p.save(tmp_path/'p.png', transparency=0)
    assert (read_image(tmp_path/'p.png')*255).round().permute(1, 2, 0).tolist()==[[[255]*3, [40, 50, 60]]]
    assert (read_image(tmp_path/'p.png', as_stored=True)*255).round().permute(1, 2, 0).tolist()==[[[10, 20, 30], [40, 50, 60]]]
    Image.fromarray(np.array([[7, 8]], np.uint8)).save(tmp_path/'l.png', transparency=7)
    assert (read_image(tmp_path/'l.png')[0]*255).round().tolist()==[[255, 8]]
    for x, clear in ((np.array([[[700], [800]]]), struct.pack('>H', 700)), (np.array([[[700, 1, 2], [700, 1, 3]]]), struct.pack('>HHH', 700, 1, 2))):
        if x.shape[2]==1: Image.fromarray(x[..., 0].astype(np.uint16)).save(tmp_path/'d.png')
        else: (tmp_path/'d.png').write_bytes(png16(x))
        b = (tmp_path/'d.png').read_bytes()
        (tmp_path/'d.png').write_bytes(b[:33]+struct.pack('>I', len(clear))+b'tRNS'+clear+struct.pack('>I', zlib.crc32(b'tRNS'+clear))+b[33:])
        got = (read_image(tmp_path/'d.png')*65535).round()
        assert got[:, 0, 0].tolist()==[65535]*3 and got[:, 0, 1].tolist()==np.broadcast_to(x[0, 1], 3).tolist()

def test_own_photographs_are_turned_and_published_ones_are_not(tmp_path, device):
    "CSV, items and Gallery; through loaders, the cache and extraction alike."
    a = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 24, 3), dtype=np.uint8))
    for c in (1, 3):
        for p in (1, 2): (tmp_path/f'cam{c}'/f'{p:04d}').mkdir(parents=True); a.save(tmp_path/f'cam{c}'/f'{p:04d}'/'0001.png', exif=tagged(a, 6))
    (tmp_path/'exp').mkdir()
    (tmp_path/'exp'/'test_id.txt').write_text('1,2')
    (tmp_path/'l.csv').write_text('file,pid,cam,modality,split\n'+''.join(f'cam{c}/{p:04d}/0001.png,{p},{c},{int(c==3)},test\n' for p in (1, 2) for c in (1, 3)))
    with pytest.warns(UserWarning, match='cam2'): published = sysu_items(tmp_path, 'test')
    own,plain = csv_items(tmp_path/'l.csv', 'test'),[ReIDImage(*o) for o in published]
    assert own==published==plain and [o[0].as_stored for o in (own, plain, published)]==[False, False, True]
    upright,lying = (torch.from_numpy(decoded(own[0].path, (24, 12), as_stored=o)) for o in (False, True))
    assert not torch.equal(upright, lying)
    for items, want in ((own, upright), (plain, upright), (published, lying)):
        for cache in (False, tmp_path/'cache'):
            dls = ReIDDataLoaders.from_items(items, None, size=(24, 12), P=2, K=1, num_workers=0, cache=cache)
            assert torch.equal(torch.from_numpy(dls.train_ds.pixels(0)), want)
    assert len(list((tmp_path/'cache').glob('*.images')))==2
    pickled = pickle.loads(pickle.dumps(published))
    assert pickled==published and pickled[0].as_stored
    class Mean(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1))
        def forward(self, x, modality): return torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)*self.w
    net = Mean()
    f = [extract_features(net, o, (24, 12)) for o in (own, plain, published)]
    assert torch.equal(f[0], f[1]) and not torch.allclose(f[0], f[2])
    g = Gallery(net, (24, 12))
    g.add([str(own[0].path)], modality=0)
    assert torch.allclose(g.rows([0]), torch.nn.functional.normalize(f[0][:1]))
    g.add(published[1:])
    assert torch.allclose(g.rows([1]), torch.nn.functional.normalize(f[2][1:2]))
    g.save(tmp_path/'g.npz')
    assert [o.as_stored for o in Gallery.load(tmp_path/'g.npz', net).items]==[False, True, True, True]

def test_a_range_is_proposed(tmp_path, device):
    "14 bits without a range: one line, with the values; none where there is nothing to say."
    rng,items = np.random.default_rng(0),[]
    for p in range(4):
        for m in range(2):
            f = tmp_path/f'{p}{m}.png'
            Image.fromarray((7000+2000*rng.random((24, 12))).astype(np.uint16) if m else rng.integers(0, 256, (24, 12), dtype=np.uint8)).save(f)
            items.append(ReIDImage(f, p, m, m))
    values = [np.asarray(Image.open(o.path)) for o in items if o.modality]
    lo,hi = min(a.min() for a in values),max(a.max() for a in values)
    make = lambda **kw: ReIDDataLoaders.from_items(items, None, size=(24, 12), P=2, K=1, num_workers=0, **kw)
    with pytest.warns(UserWarning, match=rf'ir_range=\({lo}, {hi}\)') as w: make()
    assert len(w)==1 and '\n' not in str(w[0].message) and f'--ir_range {lo},{hi}' in str(w[0].message)
    assert read_image(items[1].path).std()<.03 and read_image(items[1].path, (lo, hi)).std()>.2
    net = TMPANet(4, micro_resnet, False, mfe=False, mft=False)
    with pytest.warns(UserWarning, match='ir_range'): score_model(net, items, cross_settings(items), (48, 24))
    with pytest.warns(UserWarning, match='ir_range'): Gallery(net, (48, 24)).add(items)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make(ir_range=(7000, 9000))
        score_model(net, items, cross_settings(items), (48, 24), ir_range=(7000, 9000))
        Gallery(net, (48, 24), ir_range=(7000, 9000)).add(items)
        for o in items[1::2]: Image.fromarray((65535*rng.random((24, 12))).astype(np.uint16)).save(o.path)
        make()

# --- sampler -----------------------------------------------------------------------------------------------------------------------------------------

def fake_items(counts): return [ReIDImage(Path(f'{p}_{m}_{i}.png'), p, m+1, m) for p, c in counts.items() for m in range(2) for i in range(c[m])]

@hyp(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_identity_batches(counts, P, K, seed, epoch):
    counts = {3*i+5: c for i, c in enumerate(counts)}
    items,both = fake_items(counts),{p for p, c in counts.items() if all(c)}
    counts = {p: c for p, c in counts.items() if p in both}
    b = identity_batches(items, P, K, seed, epoch)
    if not both:
        assert len(b)==0
        return
    P = min(P, len(both))
    most = max(sum(c[m] for c in counts.values()) for m in range(2))
    assert b.shape==(max(-(-len(both)//P), -(-most//(P*K))), P, 2, K)
    assert {items[i].pid for i in b.flat}==both
    for batch in b:
        assert len({items[i].pid for i in batch[:, 0, 0]})==P
        for person in batch:
            p, = {items[i].pid for i in person.flat}
            for m, row in enumerate(person):
                assert {items[i].modality for i in row}=={m}
                if counts[p][m]>=K: assert len(set(row))==K
    turns = Counter(items[i].pid for i in b[:, :, 0, 0].flat)
    assert max(turns.values())-min(turns.values())<=1                                   # dealt like cards
    assert (b==identity_batches(items, P, K, seed, epoch)).all()

def test_epochs_and_seeds_differ():
    items = fake_items({p: (10, 10) for p in range(20)})
    a = [identity_batches(items, 4, 2, s, e).tobytes() for s in range(3) for e in range(3)]
    assert len(set(a))==9

@pytest.fixture(scope='module')
def people(tmp_path_factory):
    d,rng,items = tmp_path_factory.mktemp('people'),np.random.default_rng(0),[]
    for p in range(10):
        base = rng.integers(0, 255, (8, 4, 3), dtype=np.uint8)
        for m in range(2):
            for k in range(5):
                f = d/f'{p}_{m}_{k}.png'
                im = Image.fromarray(base).resize((16, 32), Image.NEAREST)
                (im.convert('L') if m else im).save(f)
                items.append(ReIDImage(f, 100+p, 1+m, m))
    return items

mk = lambda items, valid=None, **kw: ReIDDataLoaders.from_items(items, valid, **{**dict(size=(32, 16), P=4, K=2, num_workers=0, device='cpu'), **kw})
batches = lambda dl: [(b[0].as_subclass(torch.Tensor).clone(), *b[1:]) for b in dl]

def test_same_batches_for_any_workers(people):
    res = []
    for n in (0, 1, 2, 3):
        dls = mk(people, num_workers=n, seed=5)
        torch.manual_seed(0)
        res.append(batches(dls.train))
    for other in res[1:]:
        assert len(other)==len(res[0])==len(dls.train)==7
        for a, b in zip(res[0], other): assert all(torch.equal(x, y) for x, y in zip(a, b))

def test_looking_does_not_change_the_order(people):
    a,b = mk(people),mk(people)
    b.one_batch(); b.show_batch(show=False); b.train.new(); b.test_dl(people[:3]).one_batch()
    for _ in range(2): assert all(torch.equal(x[3], y[3]) for x, y in zip(a.train, b.train))
    resumed = mk(people)
    resumed.train.set_epoch(2)
    assert all(torch.equal(x[3], y[3]) for x, y in zip(a.train, resumed.train))

def test_new_keeps_arguments(people):
    dl = mk(people, P=3, K=4, seed=9).train
    for o in (dl.new(), dl.new(num_workers=1), dl.new(dl.dataset)): assert (o.P, o.K, o.seed, o.bs, o.shuffle, len(o))==(3, 4, 9, 24, True, len(dl))
    assert dl.new(P=2).bs==16 and len(dl.new(shuffle=False))==-(-len(people)//24)
    assert len(dl.new(dl.dataset.new_empty()))==0
    two = pickle.loads(pickle.dumps(dl))
    assert (two.P, two.K, two.epoch)==(3, 4, dl.epoch)

def test_layout_and_types(people):
    dls = mk(people)
    x,modality,label,pid,cam = dls.one_batch()
    assert type(x).__name__=='TensorImage' and x.shape==(16, 3, 32, 16) and x.dtype==torch.float32
    assert all(type(o) is torch.Tensor and o.dtype==torch.int64 and o.shape==(16,) for o in (modality, label, pid, cam))
    assert modality.view(4, 2, 2)[:, 0].eq(0).all() and modality.view(4, 2, 2)[:, 1].eq(1).all() and pid.view(4, 4).eq(pid.view(4, 4)[:, :1]).all()
    assert torch.equal(label, pid-100) and dls.c==10 and dls.vocab==list(range(100, 110)) and cam.eq(modality+1).all()

# --- augmentation ------------------------------------------------------------------------------------------------------------------------------------

@hyp(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(8, 40), st.integers(8, 40), st.integers(0, 12), st.integers(0, 10**6))
def test_augmentation_by_slow_loops(n, h, w, pad, seed):
    g = lambda: torch.Generator().manual_seed(seed)
    x,modality = torch.rand(n, 3, h, w, generator=g())*.9+.05,torch.randint(0, 2, (n,), generator=g())
    y = pad_crop(x, pad, g())
    for a, b in zip(x, y):
        p = torch.zeros(3, h+2*pad, w+2*pad)
        p[:, pad:pad+h, pad:pad+w] = a
        assert any(torch.equal(b, p[:, i:i+h, j:j+w]) for i in range(2*pad+1) for j in range(2*pad+1))
    for a, b in zip(x, hflip(x, .5, g())): assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
    for a, b, m in zip(x, channel_exchange(x, modality, .75, g()), modality): assert torch.equal(a, b) or (m==0 and any(torch.equal(b, c.expand(3, h, w)) for c in a))
    for a, b in zip(x, random_erase(x, .5, fill=(2., 2., 2.), generator=g())):
        hit = (b==2).all(0)
        r,c = hit.any(1),hit.any(0)
        assert torch.equal(hit, r[:, None] & c) and torch.equal(a[:, ~hit], b[:, ~hit]) and int(r.sum())*int(c.sum())==int(hit.sum())
        for v in (r, c): assert int(v.long().diff().abs().sum())<=2                     # one stretch

def test_augmentation_train_only_and_normalised_last(people):
    dls = mk(people, people[:0], aug=ReIDAug(pad=0, flip=0, exchange=1., erase=0))
    x,m,*_ = dls.train.decode(dls.one_batch())
    x = x.as_subclass(torch.Tensor)
    assert (x[m==0].amax(1)-x[m==0].amin(1)).abs().max()<1e-5                            # exchange, then normalise: undoing the latter shows grey
    dl = dls.test_dl(people)
    assert torch.allclose(dl.decode(dl.one_batch())[0], torch.stack([load_resized(o.path, (32, 16)) for o in people[:128]]), atol=1e-5)
    plain = mk(people, aug=False)
    a = torch.cat([b[0] for b in plain.train.new(shuffle=False)])
    assert torch.allclose(a, torch.cat([b[0] for b in dl]), atol=1e-6)

def test_channel_exchange_switch(people):
    for ce, want in ((True, .75), (False, 0), (.3, .3)): assert mk(people, channel_exchange=ce).train.after_batch.fs[0].exchange==want

# --- loaders -----------------------------------------------------------------------------------------------------------------------------------------

class Net(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head = torch.nn.Linear(48, c)
    def forward(self, x, modality):
        f = torch.nn.functional.adaptive_avg_pool2d(x.as_subclass(torch.Tensor), 4).flatten(1)
        return self.head(f) if self.training else f

def loss(out, label, pid, cam): return torch.nn.functional.cross_entropy(out, label) if (label>=0).all() else out.new_tensor(float('nan'))

def test_learner_end_to_end(people, tmp_path, device):
    train,valid = split_by_pid(people, .3)
    dls = mk(train, valid, cache=tmp_path/'images', num_workers=None)
    learn = Learner(dls, Net(dls.c), loss, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        learn.lr_find(num_it=6, show_plot=False)
        learn.validate()
        f,t = learn.get_preds()
        assert f.shape==(len(valid), 48) and t[1].tolist()==[o.pid for o in valid] and t[0].eq(-1).all()
        assert learn.get_preds(ds_idx=0)[1][1].tolist()==[o.pid for o in train]
        some = learn.get_preds(dl=dls.test_dl(people[::7], bs=2))[0]
        assert len(dls.train_ds.cache)==len(people)
        learn.export()
        assert (tmp_path/'export.pkl').stat().st_size<60_000
    from fastai.learner import load_learner
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'export.pkl')
    with again.no_bar(): assert torch.allclose(again.get_preds(dl=again.dls.test_dl(people[::7]))[0], some, atol=1e-6)
    assert (again.dls.c, again.dls.P, again.dls.vocab, again.dls.settings)==(7, 4, dls.vocab, [])

def test_training_without_validation(people, device):
    dls = mk(people)
    learn = Learner(dls, Net(dls.c), loss)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.lr_find(num_it=4, show_plot=False)

def cached(people, tmp_path): return image_cache(people, (32, 16), folder=tmp_path/'images')

def test_cached_items_are_equal_and_not_pickled(people, tmp_path):
    a,b = ReIDDataset(people, size=(32, 16), cache=cached(people, tmp_path)),ReIDDataset(people, size=(32, 16))
    for _ in range(2): assert all(torch.equal(a[i][0], b[i][0]) for i in range(10))
    assert len(pickle.dumps(a)) < 40_000 and len(pickle.dumps(a.new_empty())) < 1000

def trained_weights(items, folder, **kwargs):
    "The weights of TMPA after two epochs on one seed."
    set_seed(3, reproducible=True)
    dls = ReIDDataLoaders.from_items(items, size=(48, 24), P=3, K=2, device='cpu', aug=ReIDAug(erase=.5), **kwargs)
    learn = tmpa_learner(dls, micro_resnet, pretrained=False, mix=PedMix(8), path=folder, precision='fp32')
    with learn.no_bar(), learn.no_logging(): learn.fit_tmpa(2, lr=.01)
    return learn.model.state_dict()

@pytest.mark.cpu(reason='compares bit for bit')
def test_a_cache_and_workers_change_no_weight(people, tmp_path):
    want = trained_weights(people, tmp_path, cache=False, num_workers=0)
    for kwargs in (dict(cache=tmp_path/'images'), dict(cache=False, num_workers=2), dict(cache=tmp_path/'images', num_workers=1)):
        got = trained_weights(people, tmp_path, **kwargs)
        assert all(torch.equal(got[k], v) for k,v in want.items()), kwargs

def with_infrared(people, folder, change):
    "The same records, with changed infrared images."
    def changed(o):
        f = folder/f'{o.path.stem}-changed.png'
        change(Image.open(o.path)).save(f)
        return o._replace(path=f)
    return [changed(o) if o.modality == 1 else o for o in people]

def test_mixed_depth_is_the_same_from_a_cache(people, tmp_path):
    "Visible images of 8 bits, infrared ones of 16: a batch has 16, and loses nothing."
    deep = lambda im: Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*3+1000)
    items = with_infrared(people[:40], tmp_path, deep)
    kw = dict(size=(32, 16), ir_range=(1000, 1765), aug=False)
    a,b = (ReIDDataLoaders.from_items(items, P=2, K=2, device='cpu', num_workers=0, cache=c, **kw).train for c in (False, tmp_path/'images'))
    assert {a.dataset.pixels(i).dtype.name for i in range(len(items))} == {'uint8', 'uint16'}
    for x,y in zip(a, b): assert all(torch.equal(p, q) for p,q in zip(x, y))
    want = torch.stack([load_resized(o.path, (32, 16), item_range(o, (1000, 1765))) for o in items])
    got = torch.cat([a.decode(x)[0] for x in a.new(shuffle=False)])
    assert torch.allclose(got, want, atol=1e-6)

def test_grey_and_colour_are_put_together_alike(people, tmp_path):
    "Augmentation on a CPU takes images from where they lie, a worker sends a whole batch."
    items = with_infrared(people[:40], tmp_path, lambda im: im.convert('L'))
    def batches(**kwargs):
        dl = ReIDDataLoaders.from_items(items, size=(32, 16), P=2, K=2, device='cpu', aug=ReIDAug(erase=.5), **kwargs).train
        torch.manual_seed(7)
        return dl, list(dl)
    (dl,want),*others = (batches(**kw) for kw in (dict(num_workers=0), dict(num_workers=1), dict(cache=tmp_path/'images')))
    assert type(next(dl.create_batches(iter(dl.get_idxs())))[0]) is Pieces
    assert {len(dl.dataset.pixels(i)) for i in range(len(items))} == {1, 3}
    for _,got in others: assert all(torch.equal(p, q) for x,y in zip(want, got) for p,q in zip(x, y))
    assert type(want[0][0]) is TensorImage and want[0][0].shape == (8, 3, 32, 16)

def test_one_cache_for_all_trials_and_splits(tmp_path):
    from tmpa.data.synthetic import make_regdb
    root = make_regdb(tmp_path/'r', 8, per_modality=2, size=(32, 16))
    kw = dict(size=(32, 16), P=2, K=2, device='cpu', cache=tmp_path/'images')
    made = [ReIDDataLoaders.from_regdb(root, trial=t, valid=v, **kw).train_ds.cache for t,v in ((1, 'held_out'), (2, None), (3, 'test'))]
    assert len({c.file for c in made}) == 1 and len(made[0]) == 32
    for f in (root/'idx').glob('test_*_1.txt'): f.unlink()       # no test part: what there is
    assert len(ReIDDataLoaders.from_regdb(root, trial=1, valid=None, **kw).train_ds.cache) == 16

def test_no_room_is_an_error_when_asked_for_and_a_warning_otherwise(people, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda f: shutil._ntuple_diskusage(9, 9, 100))
    with pytest.raises(ConfigError) as e: mk(people, cache=tmp_path/'images')
    one_line(e, str(tmp_path/'images'), 'GB free')
    with pytest.warns(UserWarning, match='decoded again in every epoch'):
        assert _cache_for(people, (32, 16), None, None, (), torch.device('cuda')) is None
    with pytest.raises(ConfigError) as e: mk(people, cache_gb=2)
    one_line(e, 'cache_gb', 'leave')

def make_cache(people, folder, gate, out):
    gate.wait()
    c = image_cache(people, (32, 16), folder=folder)
    out.put((str(c.file), int(c[3].sum()), c.file.stat().st_mtime_ns))

def test_two_processes_make_one_cache(people, tmp_path):
    ctx = get_context('fork')
    gate,out = ctx.Barrier(3),ctx.Queue()
    jobs = [ctx.Process(target=make_cache, args=(people, tmp_path/'images', gate, out)) for _ in range(3)]
    for j in jobs: j.start()
    got = {out.get(timeout=60) for _ in jobs}
    for j in jobs: j.join()
    assert len(got) == 1 and [f.suffix for f in sorted((tmp_path/'images').iterdir())] == ['.images', '.lock']

def test_one_ahead_keeps_the_order_raises_and_stops():
    asked = []
    def numbers(n, bad=None):
        for i in range(n):
            if i == bad: raise DataError('no image 3.jpg')
            asked.append(i)
            yield i
    assert list(one_ahead(numbers(5), lambda i: i*i)) == [0, 1, 4, 9, 16]
    assert list(one_ahead(iter(()), None)) == []
    got = []
    with pytest.raises(DataError) as e:
        for i in one_ahead(numbers(5, bad=3), lambda i: i): got.append(i)
    assert got == [0, 1, 2]
    one_line(e, '3.jpg')
    asked.clear()
    ahead = one_ahead(numbers(9), lambda i: i)
    assert next(ahead) == 0
    ahead.close()
    assert max(asked) <= 2                                          # one ahead, no more
    with pytest.raises(DataError): list(one_ahead(numbers(2), lambda i: (_ for _ in ()).throw(DataError('no room'))))

def test_a_gpu_gets_each_batch_by_a_copy_of_its_own(monkeypatch):
    "What the host asks of a GPU, in order: copies go to another stream than the steps, which wait for theirs alone."
    log,copies = [],threading.local()                               # of the thread that copies
    class Stream:
        def __init__(self, name): self.name = name
        def record_event(self): return copies.last
        def wait_event(self, event): log.append(('wait', event))
        def __enter__(self): copies.stream = self.name
        def __exit__(self, *_): copies.stream = None
    class Pixels:
        def __init__(self, i): self.i = i
        def to(self, device, non_blocking=False):
            log.append(('copy', self.i, device.type, non_blocking, copies.stream))
            copies.last = self.i
            return self
        def record_stream(self, stream): log.append(('keep', self.i, stream.name))
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: Stream('copies'))
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: Stream('steps'))
    got = [b[0].i for b in on_device(((Pixels(i),) for i in range(4)), torch.device('cuda'))]
    assert got == [0, 1, 2, 3]
    copied = [('copy', i, 'cuda', True, 'copies') for i in range(4)]
    assert [o for o in log if o[0] == 'copy'] == copied
    for i in range(4): assert log.index(copied[i]) < log.index(('wait', i)) < log.index(('keep', i, 'steps'))

def test_a_users_transform_sees_floats(people):
    seen = []
    class Look(Transform):
        def encodes(self, x:TensorImage):
            seen.append((x.dtype, float(x.max())))
            return x
    x = mk(people, aug=Look()).one_batch()[0]
    assert seen[0][0] == torch.float32 and 0 < seen[0][1] <= 1 and x.dtype == torch.float32

def test_items_with_transforms_of_their_own(people):
    class Dark(ItemTransform):
        def encodes(self, o): return (o[0]*.5, *o[1:])
    a,b = mk(people, aug=False, after_item=[Dark()]).train,mk(people, aug=False).train
    for (x,*n),(y,*m) in zip(a, b):
        assert torch.allclose(a.decode((x, *n))[0], b.decode((y, *m))[0]/2, atol=1e-6)
        assert all(torch.equal(p, q) for p,q in zip(n, m))

def test_bad_items(people, tmp_path):
    with pytest.raises(ConfigError) as e: mk(people, P=11)
    one_line(e, 'P=11', 'pass P=10')
    with pytest.raises(DataError) as e: mk([o for o in people if o.modality==1])
    one_line(e, 'both modalities')
    with pytest.raises(DataError): mk([])
    with pytest.raises(ConfigError): mk(['a.png'])
    with pytest.raises(ConfigError): mk(people, K=0)
    with pytest.raises(ConfigError): mk(people, size=(32,))
    with pytest.raises(ConfigError): mk(people).test_dl([Path('a.png')])
    with pytest.warns(UserWarning, match='1 of 10 .* 100$'): assert mk([o for o in people if o.pid!=100 or o.modality==0]).c==9
    with pytest.warns(UserWarning, match='10 validation identities'): mk(people, people)
    with pytest.raises(ConfigError): split_by_pid(people, 1.)
    with pytest.raises(ProtocolError) as e: cross_settings([o for o in people if o.modality==0])
    one_line(e, '50 test images', 'both modalities')

@pytest.mark.parametrize('workers', [0, 2])
def test_bad_image_is_one_line_from_any_process(people, tmp_path, workers):
    (tmp_path/'zero.jpg').touch()
    items = [o._replace(path=tmp_path/'zero.jpg') if o.pid==104 else o for o in people]
    with pytest.raises(DataError) as e: list(mk(items, num_workers=workers).train)
    one_line(e, 'zero.jpg is empty')
    assert 'Traceback' not in str(e.value)

def test_held_out_and_published(tmp_path):
    from tmpa.data.synthetic import make_regdb
    root = make_regdb(tmp_path/'r', 24, per_modality=2, size=(32, 16))
    kw = dict(size=(32, 16), P=4, K=2, num_workers=0, device='cpu')
    train,test = ({o.pid for o in regdb_items(root, 3, s)} for s in ('train', 'test'))
    held = ReIDDataLoaders.from_regdb(root, trial=3, **kw)
    a,b = ({o.pid for o in x} for x in (held.train_items, held.valid_items))
    assert a | b==train and not a & b and len(b)==1 and held.source['valid']=='held_out' and held.source['trial']==3
    pub = ReIDDataLoaders.from_regdb(root, trial=3, valid=None, **kw)
    assert pub.c==12 and pub.valid_items==[] and {o.pid for o in pub.test_items}==test and [s.name for s in pub.test_settings]==['v2t', 't2v']
    watch = ReIDDataLoaders.from_regdb(root, trial=3, valid='test', **kw)
    assert {o.pid for o in watch.valid_items}==test and watch.c==12
    with pytest.raises(ConfigError): ReIDDataLoaders.from_regdb(root, valid='train', **kw)
    syn = ReIDDataLoaders.from_synthetic(tmp_path/'r', n_ids=24, per_modality=2, **kw)
    assert syn.source['dataset']=='synthetic' and syn.c==11 and len(syn.train_ds.cache)==96

def test_from_sysu_splits(tmp_path):
    rows = [dict(pid=str(p), split=s, **{f'cam{c}': '2' for c in range(1, 7)}) for p, s in ((1, 'train'), (2, 'train'), (3, 'val'), (5, 'test'), (9, 'test'))]
    root = sysu_tree(tmp_path/'s', rows)
    kw = dict(size=(32, 16), P=2, K=1, num_workers=0, device='cpu')
    d = ReIDDataLoaders.from_sysu(root, **kw)
    assert ({o.pid for o in d.train_items}, {o.pid for o in d.valid_items}, [s.name for s in d.settings])==({1, 2}, {3}, ['v2t', 't2v'])
    d = ReIDDataLoaders.from_sysu(root, valid='test', trials=3, **kw)
    assert ({o.pid for o in d.train_items}, {o.pid for o in d.valid_items})==({1, 2, 3}, {5, 9})
    assert [s.name for s in d.settings]==['all_single', 'all_multi', 'indoor_single', 'indoor_multi'] and len(d.settings[0].g_idxs)==3


# --- what lists may hold ------------------------------------------------------------------------------------------------------------------------------

def test_an_image_named_twice_is_said(tmp_path):
    "Published code counts it twice, and so do we, with a warning."
    for m in ('Visible', 'Thermal'):
        (tmp_path/m/'1').mkdir(parents=True)
        for n in range(2): (tmp_path/m/'1'/f'{n}.bmp').touch()
    (tmp_path/'idx').mkdir()
    for m in ('visible', 'thermal'): (tmp_path/'idx'/f'test_{m}_1.txt').write_text(''.join(f'{m.title()}/1/{n}.bmp 0\n' for n in (0, 1, 0)))
    with pytest.warns(UserWarning, match='names 1 images again'): items = regdb_items(tmp_path, 1, 'test')
    assert len(items)==6
    (tmp_path/'idx'/'test_visible_1.txt').write_text('Visible/1 0\n')
    with pytest.raises(DataError) as e: regdb_items(tmp_path, 1, 'test')
    one_line(e, 'line 1', 'no image')

def test_listed_people_without_images_are_said(sysu_small, tmp_path):
    shutil.copytree(sysu_small, tmp_path/'sysu')
    (tmp_path/'sysu'/'exp'/'test_id.txt').write_text('5,9,77')
    with pytest.warns(UserWarning, match=r'no image of 1 of 3 listed identities \(77\)'): sysu_items(tmp_path/'sysu', 'test')
    for c in (1, 2): shutil.rmtree(tmp_path/'sysu'/f'cam{c}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ProtocolError, match='visible ones of cameras 1 and 2'): sysu_settings(sysu_items(tmp_path/'sysu', 'test'))

def test_a_fixed_range_is_the_infrared_cameras(tmp_path, device):
    "In the loaders as in `extract_features`: visible files of more than 8 bits keep their own."
    from tmpa.extract import extract_features
    items = []
    for i in range(8):
        for m in range(2):
            f = tmp_path/f'{i}_{m}.png'
            Image.fromarray(np.full((8, 4), 1000+100*i, np.uint16)).save(f)
            items.append(ReIDImage(f, i, 1+m, m))
    dls = ReIDDataLoaders.from_items(items, size=(8, 4), P=2, K=1, num_workers=0, ir_range=(0, 4095))
    class Mean(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, m): return x.mean((2, 3))
    dl = dls.test_dl(items)
    x = torch.cat([b[0] for b in dl]).as_subclass(torch.Tensor).mean((2, 3)).cpu()
    assert torch.allclose(x, extract_features(Mean(), items, (8, 4), ir_range=(0, 4095)), atol=1e-5)
    assert (x[::2] < x[1::2]).all()

def test_arguments_of_from_items(people):
    for kw,words in ((dict(bs=5), '2 x P x K'), (dict(size=128), 'height, width')):
        with pytest.raises(ConfigError) as e: ReIDDataLoaders.from_items(people, **{'size': (64, 32), 'P': 2, **kw})
        one_line(e, words)
    for bad in (dict(modality=2), dict(modality='visible'), dict(modality=-1), dict(pid='7'), dict(cam=None)):
        with pytest.raises(ConfigError) as e: ReIDDataLoaders.from_items([o._replace(**bad) for o in people], size=(64, 32), P=2)
        one_line(e, people[0].path.name)

@pytest.mark.parametrize('kw,words', [
    (dict(sise=(48, 24)), ('sise', 'did you mean size?')),
    (dict(chanel_exchange=False), ('chanel_exchange', 'did you mean channel_exchange?')),
    (dict(item_tfms=[]), ('item_tfms', 'size=')),
    (dict(batch_tfms=[]), ('batch_tfms', 'aug=')),
    (dict(after_batch=[]), ('after_batch', 'aug=')),
    (dict(sampler=[0]), ('sampler', 'P, K')),
    (dict(weights=[1.]), ('weights', 'P, K')),
    (dict(shuffle=False), ('shuffle', 'identity')),
    (dict(trial=3), ('trial',)),
    (dict(channel_exchange=1.5), ('channel_exchange=1.5', 'from 0 to 1')),
    (dict(channel_exchange='no'), ('channel_exchange', 'from 0 to 1')),
    (dict(channel_exchange=False, aug=ReIDAug()), ('channel_exchange=False', 'aug=ReIDAug(exchange=...)')),
    (dict(channel_exchange=.5, aug=False), ('channel_exchange=0.5', 'aug=')),
    (dict(aug=torch.nn.Identity()), ('Identity', 'encodes')),
    (dict(aug=[ReIDAug(), torch.nn.Identity()]), ('Identity', 'encodes')),
    (dict(aug=ReIDAug), ('ReIDAug', 'encodes')),
    (dict(aug='strong'), ('str', 'encodes')),
])
def test_arguments_that_would_do_nothing(people, kw, words):
    with pytest.raises(ConfigError) as e: mk(people, **kw)
    one_line(e, *words)

def test_from_methods_refuse_before_they_read(tmp_path):
    for f in ('from_sysu', 'from_regdb', 'from_llcm', 'from_synthetic'):
        make = getattr(ReIDDataLoaders, f)
        for kw, word in ((dict(sise=(48, 24)), 'did you mean size?'), (dict(valid_items=[]), 'valid'), (dict(settings_fn=None), 'settings_fn'), (dict(batch_tfms=[]), 'aug=')):
            with pytest.raises(ConfigError) as e: make(tmp_path/'nowhere', **kw)
            one_line(e, word, *kw)
    assert not list(tmp_path.iterdir())

def test_loaders_refuse_what_they_do_not_know(people):
    dls = mk(people)
    for call in (lambda: ReIDDL(dls.train_ds, sampler=[0]), lambda: dls.train.new(seeds=3), lambda: dls.test_dl(people, bsize=3), lambda: dls.show_batch(maxn=3),
                 lambda: dls.train.show_results(None, None, nrows=3)):
        with pytest.raises(ConfigError) as e: call()
        one_line(e, 'has no argument')
    assert len(mk(people, drop_last=True, persistent_workers=False, timeout=0).train)

def test_a_list_of_transforms_augments(people):
    "Ours alone as without a list; fastai's own beside it."
    def batch(aug): torch.manual_seed(0); return mk(people, aug=aug).train.one_batch()[0]
    plain,one = batch(False),batch(ReIDAug(erase=1.))
    assert torch.equal(batch([ReIDAug(erase=1.)]), one) and torch.equal(batch((ReIDAug(erase=1.),)), one) and not torch.equal(one, plain)
    assert torch.equal(batch([]), plain) and torch.equal(batch(None), plain)
    x = batch([*aug_transforms(flip_vert=True, max_rotate=40, p_affine=1.), ReIDAug(pad=0, flip=0, exchange=1.)])
    assert x.shape==plain.shape and not torch.allclose(x, plain)
    a,b = (mk(people, aug=o).test_dl(people[:4]).one_batch()[0] for o in ([ReIDAug(erase=1.)], False))
    assert torch.equal(a, b)                                                           # training alone

def test_a_damaged_image_leaves_the_model_in_training(people, tmp_path):
    from tmpa.extract import extract_features
    (tmp_path/'zero.png').touch()
    m = torch.nn.Linear(1, 1).train()
    with pytest.raises(DataError, match='zero.png'): extract_features(m, [people[0]._replace(path=tmp_path/'zero.png')], (8, 4))
    assert m.training
