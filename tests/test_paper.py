"""The paper's numbers: in the package that is installed, and as the paper prints them."""
import subprocess, sys
from pathlib import Path

import pytest

from tmpa.paper import TABLES, get_table, published_methods

ROOT = Path(__file__).resolve().parents[1]
FILES = 'paper_tables.csv', 'paper_methods.csv'


@pytest.mark.skipif(not (ROOT/'setup.py').exists(), reason='builds the package')
def test_the_files_are_in_the_package(tmp_path):
    build = ['egg_info', '--egg-base', tmp_path, 'build_py', '--build-lib', tmp_path/'lib']
    subprocess.run([sys.executable, 'setup.py', '-q', *map(str, build)], cwd=ROOT, check=True, capture_output=True, timeout=600)
    for name in FILES: assert (tmp_path/'lib'/'tmpa'/name).read_bytes() == (ROOT/'tmpa'/name).read_bytes()


def test_some_numbers_of_the_paper():
    printed = {('table2', 'B'): (75.68, 90.10, 93.16, 67.41), ('table3', 'centre'): (77.82, 92.09, 94.90, 69.42),
               ('table4', 'DART+PedMix'): (84.63, 94.07, 98.11, 75.91), ('table6', 'B_DA+STN'): (82.33, 94.96, 96.84, 74.57),
               ('table7', '16×16'): (78.88, 92.25, 93.63, 69.87)}
    for (table, label), numbers in printed.items():
        row = next(r for r in get_table(table).rows if r.label == label)
        assert tuple(row.paper[k] for k in ('rank1', 'rank10', 'rank20', 'mAP')) == numbers
    params = {r.label: r.paper['params'] for r in TABLES['table5'].rows}
    assert params == {'AlignGAN': 82., 'JSIA': 60.6, 'DART': 70.9, 'TMPA (w/o MFT)': 69.5, 'TMPA': 48.3}
    assert published_methods()[0]['scores']['all_single'] == dict(rank1=42.4, rank10=85., mAP=40.7)
