"A fork of a process with the imports done is what a new process would be."
import subprocess, time

import pytest

import warm


def test_status_and_output(tmp_path):
    say = 'import os, sys; print(sys.argv[1:], os.getcwd(), os.environ["WHO"]); print("also", file=sys.stderr)'
    assert warm.run(say, 'a b', 3, cwd=tmp_path, env={'WHO': 'me'}) == (0, f"['a b', '3'] {tmp_path} me\nalso\n")
    assert warm.run('import sys; sys.exit(3)') == (3, '')
    status, out = warm.run('1/0')
    assert status == 1 and out.endswith('ZeroDivisionError: division by zero\n')
    assert warm.run('import os; os._exit(7)')[0] == 7
    assert warm.run('import os; os.kill(os.getpid(), 9)')[0] == -9

def test_nothing_goes_from_one_to_the_next():
    change = 'import os, torch, sys; os.environ["X"] = "1"; os.chdir("/"); torch.manual_seed(5); torch.mine = sys.mine = 1'
    look = 'import os, torch, sys; print(os.getcwd(), "X" in os.environ, hasattr(torch, "mine"), hasattr(sys, "mine"))'
    before = warm.run(look)
    assert warm.run(change)[0] == 0 and warm.run(look) == before
    assert before[1].split()[1:] == ['False']*3

def test_begins_as_a_new_process():
    "Nothing of ours is there yet, one thread, dice of its own, and what is registered for the end happens."
    ours = 'import sys; print(sorted(m for m in sys.modules if m.split(".")[0] in ("tmpa", "fastai", "pretend")))'
    assert warm.run(ours) == (0, '[]\n')
    assert warm.run('import os; print(len(os.listdir("/proc/self/task")))') == (0, '1\n')
    dice = 'import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(()).item())'
    assert not set(warm.run(dice)[1].split()) & set(warm.run(dice)[1].split())
    assert warm.run('import atexit; atexit.register(print, "end")') == (0, 'end\n')
    assert warm.run('import sys; print(__name__, sys.path[0] == "", sys.stdin.read() == "")') == (0, '__main__ True True\n')

def test_what_hangs_is_killed_with_what_it_began(tmp_path):
    hang = 'import os, sys, time; os.fork(); print("began", flush=True)\nwhile True: open(sys.argv[1], "a").write("."); time.sleep(.01)'
    with pytest.raises(subprocess.TimeoutExpired) as e: warm.run(hang, tmp_path/'beats', timeout=1)
    assert 'began' in e.value.output
    beats = (tmp_path/'beats').stat().st_size
    time.sleep(.2)
    assert (tmp_path/'beats').stat().st_size == beats
    assert warm.run('print(1)') == (0, '1\n')
