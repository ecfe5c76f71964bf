"""Python processes that begin with the slow imports done: forks of one process that has torch and its like.

`run(source, *args)` is `python -c source args` without the seconds that its imports take. No fork sees what another one
did. Nothing of ours is imported beforehand, nor fastai, which changes what others can do.
"""
import gc, importlib, json, os, random, select, signal, subprocess, sys, tempfile
from pathlib import Path

import numpy, torch

HERE = Path(__file__).resolve().parent
IMPORTED = ('matplotlib.pyplot', 'matplotlib_inline.backend_inline', 'nbdev.showdoc', 'nbdev.test', 'pandas', 'scipy.stats',
            'sklearn.manifold', 'sklearn.model_selection', 'timm.models', 'torch._inductor.compile_fx', 'torchvision.models')
MAIN = 'import warm; exec(warm.source())'
_servers = []


# ---------------------------------------------------------------- in the process that forks

def source():
    "Fork for every line that comes in; returns, in each fork, what it is to execute."
    for name in IMPORTED: importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork need not look at all that again
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid: return _become(json.loads(line))
        print(pid, flush=True)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()

def _become(asked):
    "Give this fork a group, a folder, an environment, arguments and an output of its own."
    os.setsid()
    out = os.open(asked['out'], os.O_WRONLY | os.O_APPEND)
    for fd in (1, 2): os.dup2(out, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    os.chdir(asked['cwd'])
    os.environ.clear()
    os.environ.update(asked['env'])
    sys.argv[1:] = asked['args']
    for seed in (random.seed, numpy.random.seed, torch.seed): seed()
    return asked['source']


# ---------------------------------------------------------------- in the process that asks

def _server():
    "The process that forks, begun when it is first needed. It ends with this one, whose pipe it reads."
    if not _servers or _servers[0].poll() is not None:
        path = os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])
        # who has talked to a GPU cannot fork
        env = dict(os.environ, PYTHONPATH=path, CUDA_VISIBLE_DEVICES='')
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        _servers[:] = [subprocess.Popen([sys.executable, '-c', MAIN], env=env, **pipes)]
    return _servers[0]

def _answer(server, timeout=None):
    if not select.select([server.stdout], [], [], timeout)[0]: raise TimeoutError
    return int(server.stdout.readline())

def run(source, *args, cwd='.', env=os.environ, timeout=600):
    "Exit status and output of `python -c source args`; after `timeout` seconds it is killed with all that it began."
    server = _server()
    with tempfile.NamedTemporaryFile() as out:
        asked = dict(source=source, args=list(map(str, args)), cwd=str(Path(cwd).resolve()), env=dict(env), out=out.name)
        server.stdin.write(json.dumps(asked).encode() + b'\n')
        pid = _answer(server)
        try: status = _answer(server, timeout)
        except BaseException as e:
            os.killpg(pid, signal.SIGKILL)
            _answer(server)
            if isinstance(e, TimeoutError): raise subprocess.TimeoutExpired('python', timeout, _text(out)) from None
            raise
        return status, _text(out)

def _text(out): return Path(out.name).read_text(encoding='utf8', errors='replace')
