"""Reference entries of the pages: `.ci/reference.py`."""
import inspect, sys
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np, pytest
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'.ci'))
import reference  # noqa: E402
from reference import Lookup, cell_text, defined, entry, find, is_record, maker, module_of, parameters, with_shape, wrapped  # noqa: E402


def mixed(
    images:np.ndarray, # (n, 3, h, w) pictures | floats
    a, b, # Two of 'one' kind
    size:tuple|None=None, # Height and width
    # of the result
    *rest,
    keep:bool=False,
    **more, # As in `dict`
)->np.ndarray: # (n, D) features
    "Mix <them> well."

class Colour(IntEnum):
    "A colour."
    RED = 1 # Warm
    BLUE = 2

class Spot(NamedTuple):
    "A place."
    x: float # To the right
    y: float = 2.5

@dataclass
class Box:
    "A box."
    size:int # In pixels
    names:list = field(default_factory=list)
    def grow(self, by): "Larger by some."
    def move(self,
        by:int=1, # Pixels
    ): "Elsewhere."
    def _hidden(self): "Not for users."


@pytest.fixture
def ours(monkeypatch): monkeypatch.setattr(reference, 'OWN', __name__)

def rows(text): return [[o.strip() for o in l.strip('| ').split(' | ')] for l in text.splitlines() if l.startswith('|')]


def test_function(ours):
    text = entry('mixed', mixed)
    assert '### mixed\n' in text and 'mixed(images, a, b, size=None, *rest, keep=False, **more)' in text and 'Mix &lt;them> well.' in text
    head, _, *found = rows(text)
    assert head == ['Parameter', 'Type', 'Default', 'Meaning']
    kind = lambda o: f'<span class="kind">{o}</span>'
    value = lambda o: f'<span class="default"><code>{o}</code></span>'
    assert found[0] == ['<code>images</code>', kind('`ndarray` <code>(n, 3, h, w)</code>'), '', r'Pictures \| floats']
    assert found[1] == ['<code>a</code>, <code>b</code>', '', '', 'Two of <code>&#39;one&#39;</code> kind']
    assert found[2] == ['<code>size</code>', kind('`tuple` or `None`'), value('None'), 'Height and width']
    assert [o[0] for o in found[3:]] == ['<code>&#42;rest</code>', '<code>keep</code>', '<code>&#42;&#42;more</code>', '*Returns*']
    assert found[6] == ['*Returns*', kind('`ndarray` <code>(n, D)</code>'), '', 'Features']


def test_records(ours):
    assert rows(entry('Colour', Colour)) == [['Member', 'Value', 'Meaning'], ['---']*3, ['<code>RED</code>', '<code>1</code>', 'Warm'],
                                             ['<code>BLUE</code>', '<code>2</code>']]
    spot = entry('Spot', Spot)
    assert 'class Spot(x, y=2.5)' in spot and [o[0] for o in rows(spot)] == ['Field', '---', '<code>x</code>', '<code>y</code>']
    box = entry('Box', Box)
    assert 'class Box(size, names=...)' in box and '<code>grow(by)</code> | Larger by some.' in box
    assert '#### Box.move' in box and 'Box.move(by=1)' in box and 'hidden' not in box and 'id="box.grow"' in box


def test_shapes_leave_the_text():
    assert with_shape('', '(n,) and (m,) labels') == ('<code>(n,)</code> and <code>(m,)</code>', 'Labels')
    assert with_shape('`Tensor`', 'Class of each row (rows,); negative: none')[1] == 'Class of each row; negative: none'
    assert with_shape('', 'Features (n, D)') == ('', 'Features (n, D)')           # may be words in brackets
    assert with_shape('', '(h, w) that it has') == ('', '(h, w) that it has')
    assert with_shape('`ndarray`', '(n,) bool')[1] == 'bool'


def test_our_names_in_prose_are_code():
    assert cell_text('As in read_image; see tmpa.rerank.rerank') == 'As in `read_image`; see `tmpa.rerank.rerank`'
    assert cell_text('`read_image`, some_name, B+CA+PedMix') == '`read_image`, some_name, B+CA+PedMix'


def test_long_signatures_break_between_arguments():
    text = wrapped('f(', [f'argument_{i}=None' for i in range(9)])
    assert max(map(len, text.splitlines())) <= reference.WIDTH and text.endswith(')') and text.replace('\n ', '').count('None') == 9


def test_everyday_words_are_no_links():
    core, other = Lookup('tmpa.core'), Lookup('tmpa.losses')
    assert '](' in core.link_line('`known`') and other.link_line('`known`') == '`known`' and '](' in other.link_line('`known()`')
    assert '](' in other.link_line('`read_image`')
    assert core.link_line('[the `read_image`](x.html)') == '[the `read_image`](x.html)'


@lru_cache(None)
def entries():
    "(name, object, entry) of all that the pages have entries for."
    found = []
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        nb = NBProcessor(path).nb
        for cell in nb.cells:
            if cell.cell_type != 'code' or 'hide' in cell.directives_ or not {'export', 'exports'} & cell.directives_.keys(): continue
            for name in defined(cell.source):
                obj = find(module_of(nb), name)
                found.append((f'{module_of(nb)}.{name}', obj, entry(name, obj)))
    return found


def test_nearly_all_parameters_are_in_tables():
    "Of 514 entries with parameters 477 had more to say of them than their names when this was written, and before it none had a table."
    having = [(name, text) for name, obj, text in entries() if is_record(obj) or parameters(maker(obj))]
    without = [name for name, text in having if '::: {.params}' not in text]
    assert len(having) > 450 and len(without) < len(having)/12, without


def undocumented(name, obj):
    "Parameters, fields and members of an entry, and of the methods that it lists, whose meaning nobody wrote down."
    if is_record(obj): docs = reference.record_docs(obj)
    else:
        docs = {p.name: ('a command says it',) for p in parameters(maker(obj)) if reference.said_by_command(p.annotation)}
        docs = reference.param_docs(maker(obj)) | docs
    fields = reference.field_names(obj) if is_record(obj) else [p.name for p in parameters(maker(obj))]
    yield from (f'{name}: {n}' for n in fields if not docs.get(n, ('',))[0])
    if not inspect.isclass(obj): return
    for method, o in reference.methods(obj).items(): yield from undocumented(f'{name}.{method}', o)


def test_every_parameter_is_documented():
    "By its meaning, shape and unit, on its line or on that of several; what stands in for a method of ours may leave it to that."
    assert [o for name, obj, _ in entries() for o in undocumented(name, obj)] == []


def test_a_method_that_stands_in_for_one_is_documented_by_it():
    import tmpa.callback.pedmix as p
    docs = reference.param_docs(p.PedMix.masks)
    assert docs['size'][0] == reference.param_docs(p.SlotMix.masks)['size'][0] != ''


def test_what_has_no_docment_is_found(ours):
    def add(a, b=2): "Add."
    assert list(undocumented('add', add)) == ['add: a', 'add: b']
    assert list(undocumented('mixed', mixed)) == ['mixed: keep']
    assert list(undocumented('Spot', Spot)) == ['Spot: y']


def test_events_without_words_have_no_entry():
    import tmpa.callback.resume, tmpa.recipe
    assert reference.is_silent('ResumeFit.before_fit', find('tmpa.callback.resume', 'ResumeFit.before_fit'))
    for module, name in (('tmpa.recipe', 'Recipe.check'), ('tmpa.callback.resume', 'ResumeFit'), ('tmpa.losses', 'id_loss')):
        assert not reference.is_silent(name, find(module, name))


def test_entries_are_fit_to_read():
    for name, obj, text in entries():
        assert not name.rpartition('.')[2].startswith('_'), name
        signature = text.split('```')[1]
        assert ' at 0x' not in text and 'functools' not in signature and '<function' not in text, name
        assert max(map(len, signature.splitlines())) <= reference.WIDTH + 24, name
    said = {name: text.split('```')[1] for name, _, text in entries()}
    for name in ('tmpa.learner.tmpa_learner', 'tmpa.learner.reid_learner', 'tmpa.dart.dart_learner'):
        assert 'opt_func=sgd' in said[name] and 'splitter=split_params' in said[name] and 'wd_bn_bias=True' in said[name]


def test_symbols_and_options_in_docments():
    assert reference.named("The parts E_sh, F'^V_sp and `F_C`; a name such as f_sh stays") == "The parts $E_{sh}$, $F'^{V}_{sp}$ and `F_C`; a name such as f_sh stays"
    assert reference.named('With --features: the rule; `--k 2` as well') == 'With `--features`: the rule; `--k 2` as well'


def test_classes_as_defaults_and_plural_shapes():
    assert reference.default_text((int, float)) == '(int, float)'
    assert with_shape('`int`', '(row, column)s of the map, or how many') == ('`int`', '(row, column)s of the map, or how many')


def test_a_colon_after_a_shape_goes():
    assert with_shape('', '(B,): which feature is missing') == ('<code>(B,)</code>', 'Which feature is missing')
