"""One thread a process: pytest-xdist runs several side by side, and more threads than cores are many times slower."""
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(name, '1')
os.environ.setdefault('MPLBACKEND', 'agg')
