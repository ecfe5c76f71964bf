"""Reference entries, made from the code: the signature in short, what it does, and tables of parameters, fields and methods.

nbdev writes a signature with all comments in it, which a page cannot wrap and a phone cannot show; this makes a table of the same docments.
It reads the exported modules, so that building the site runs no notebook."""
import ast, dataclasses, enum, functools, html, importlib, inspect, io, re, sys, textwrap, tokenize

from execnb.nbio import mk_cell
from fastcore.script import Param
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, patch_name
from nbdev.process import Processor
from nbdev.processors import FilterDefaults

EMPTY = inspect.Parameter.empty
DEFS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
WIDTH = 80                                                    # of a signature
SHAPE = r'\((?:[\w*+]+, ?)+[\w*+]*\)(?!\w)'
SHAPES = re.compile(rf'{SHAPE}(?: and {SHAPE})*')
OWN = 'tmpa'                                                  # whose classes show how they are made
ARRAYS = 'Tensor', 'ndarray'
STARS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
WORD = re.compile(r"`[^`]*`|(?<!\w)'[\w.+/-]+'(?!\w)")          # a value in quotes, and what is code already
PROPERTIES = property, functools.cached_property
SYMBOL = re.compile(r"`[^`]*`|(?<![\w./'\"])([EFC]'?)((?:[_^](?:sh|sp|C|V|I)){1,2})(?![\w(])")   # of the paper, as docments write them
OPTION = re.compile(r'`[^`]*`|(?<!\w)--[a-z][\w-]*')   # an option of a command, whose two dashes would become one
NAME = re.compile(r'`[^`]*`|(?<![\w.+\'"/])(?:tmpa\.[\w.]+\w|[a-z]+_\w+|[A-Z][a-z]\w*[A-Z]\w*|[A-Z]{2}\w+[a-z]\w*)(?![\w\'"/])')


def comments_of(source):
    "Line -> comment of a piece of source."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {o.start[0]: o.string.lstrip('#').strip() for o in tokens if o.type == tokenize.COMMENT}


@functools.lru_cache(None)
def source_of(obj):
    "Its source and the definition in it; (None, None) where there is none to read."
    try: source = textwrap.dedent(inspect.getsource(obj))
    except (OSError, TypeError): return None, None
    return source, ast.parse(source).body[0]


def arguments(node):
    "The arguments of a definition, in order."
    a = node.args
    return [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]


def above(line, comments, taken):
    "The comment lines right above a line, joined."
    found = []
    while line-1 in comments and line-1 not in taken:
        line -= 1
        found.insert(0, comments[line])
    return ' '.join(found)


def described(names, comments, taken):
    "Name -> (docment, all names that share its line), from a list of (name, line)."
    res = {}
    for name, line in names:
        together = [n for n, l in names if l == line]
        text = comments.get(line) or above(line, comments, taken)
        res[name] = text, together if text else [name]
    return res


def param_docs(func):
    "Name -> (docment, names that share it), of a function, of those that its `**kwargs` go to, and of the method that it stands in for; 'return' is one of them."
    res = {}
    while func is not None:
        source, node = source_of(func)
        if isinstance(node, DEFS[:2]):
            comments = comments_of(source)
            names = [(o.arg, o.end_lineno) for o in arguments(node) if o.arg not in ('self', 'cls')]
            at = {o.arg: i for i, o in enumerate(arguments(node))}
            names = [(n, value_line(node, n, line)) for n, line in names]
            if node.returns:
                names = [(n, l if l != node.returns.end_lineno else -at[n]) for n, l in names]
                names.append(('return', node.returns.end_lineno))
            res = described(names, comments, {l for _, l in names}) | res
            inherited = overridden_docs(func)
            res |= {n: inherited[n] for n, (text, _) in res.items() if not text and n in inherited}
        func = getattr(func, '__delwrap__', None)
    return res


def overridden_docs(func):
    "What the method of ours that a method stands in for says of its parameters."
    kind, _, name = func.__qualname__.rpartition('.')
    bases = getattr(getattr(sys.modules[func.__module__], kind, None), '__mro__', ())[1:]
    base = next((vars(c)[name] for c in bases if name in vars(c)), None)
    return param_docs(base) if inspect.isfunction(base) and is_ours(base) else {}


def value_line(node, name, line):
    "The line that an argument ends on, with its default."
    a = node.args
    given = dict(zip([o.arg for o in [*a.posonlyargs, *a.args]][::-1], a.defaults[::-1]))
    given |= {o.arg: d for o, d in zip(a.kwonlyargs, a.kw_defaults) if d}
    return given[name].end_lineno if name in given else line


def field_docs(cls):
    "Name -> (docment, names that share it) of the fields that the body of a class lists."
    source, node = source_of(cls)
    if node is None: return {}
    names = []
    for o in node.body:
        if isinstance(o, ast.AnnAssign): names.append((o.target.id, o.end_lineno))
        if isinstance(o, ast.Assign) and isinstance(o.targets[0], ast.Name): names.append((o.targets[0].id, o.end_lineno))
    return described(names, comments_of(source), {l for _, l in names})


def is_record(obj):
    "Whether a class is a list of fields: a dataclass, a named tuple or an enumeration."
    if not inspect.isclass(obj): return False
    if issubclass(obj, enum.Enum) or dataclasses.is_dataclass(obj): return True
    return issubclass(obj, tuple) and hasattr(obj, '_fields') and maker(obj) is None


def maker(obj):
    "The function whose parameters an entry shows; None where there are none of ours."
    if isinstance(obj, property): return obj.fget
    if not inspect.isclass(obj):
        while not inspect.isfunction(obj):
            inner = next((o for k in ('__func__', 'f', 'func', '__wrapped__') if (o := getattr(obj, k, None)) is not None), None)
            if inner is None: return None
            obj = inner
        return inspect.unwrap(obj, stop=lambda o: hasattr(o, '__signature__'))
    for name in ('__init__', '__new__'):
        owner = next(c for c in obj.__mro__ if name in vars(c))
        func = getattr(vars(owner)[name], '__func__', vars(owner)[name])
        inherited = owner is not obj and issubclass(obj, Exception)
        if inspect.isfunction(func) and is_ours(func) and not inherited: return func
    return None


def is_ours(obj):
    "Whether it is defined in this package, and written by us."
    return getattr(obj, '__module__', None) is not None and obj.__module__.split('.')[0] == OWN and obj.__qualname__.split('.')[0] != '__create_fn__'


def parameters(func):
    "The parameters of a function but for the first of a method."
    if func is None: return []
    try: params = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError): return []
    return [p for p in params if p.name not in ('self', 'cls')]


def code(text):
    "Text as code that no link is made of, and that Markdown leaves alone."
    text = html.escape(text, quote=False)
    return '<code>' + re.sub(r'[|*_`$\\\[\]~^:"\'-]', lambda m: f'&#{ord(m[0])};', text) + '</code>'


def constant(value):
    "The name of an object of ours that has no short way to be written, or None."
    if value is None or isinstance(value, (bool, int, float, str, tuple, list, dict)): return None
    modules = [m for name, m in list(sys.modules.items()) if name.split('.')[0] == OWN]
    return next((k for m in modules for k, v in vars(m).items() if v is value), None)


def default_text(value):
    "A default as it would be typed, shortened where it is long."
    if value is EMPTY: return ''
    if isinstance(value, enum.Enum): return str(value)
    text = getattr(value, '__name__', None) or constant(value) or repr(value)
    text = re.sub(r'<function (\w+).*?>|<(?:\w+\.)*(\w+) object at .*?>|<class \'(?:\w+\.)*(\w+)\'>', r'\1\2\3', text)
    return text if len(text) <= 40 else text[:37] + '...'


def type_text(anno, default=EMPTY):
    "An annotation in words, its parts as code; without one what the default is."
    if getattr(anno, '__name__', '') in ('store_true', 'store_false'): anno = bool
    if isinstance(anno, Param): anno = bool if anno.action in ('store_true', 'store_false') else anno.type
    if anno is EMPTY: anno = type(default) if type(default) in (bool, int, float, str, tuple) else ''
    text = anno if isinstance(anno, str) else inspect.formatannotation(anno)
    text = re.sub(r'\b(?:\w+\.)+(?=\w)', '', text).replace(' ', '').replace('NoneType', 'None')
    parts = re.split(r'\|(?![^\[]*\])', text) if text else []
    return ' or '.join(f'`{o}`' if o.isidentifier() else code(o) for o in parts)


def with_shape(kind, text):
    "A shape goes from the docment to the type: from its beginning, or from anywhere in words on a tensor."
    found = SHAPES.match(text)
    if not found and any(o in kind for o in ARRAYS) and len(SHAPES.findall(text)) == 1: found = SHAPES.search(text)
    if not found or text[found.end():].startswith((' that', ' of', ' where', ' as ', ' or')): return kind, text
    rest = (text[:found.start()].rstrip() + text[found.end():]).strip(' ,:')
    shape = ' and '.join(code(o) for o in found[0].split(' and '))
    return f'{kind} {shape}'.strip(), rest if re.match(r'(bool|u?int|float)\d*\b', rest) else rest[:1].upper() + rest[1:]


def as_maths(found):
    "A symbol of the paper such as F^V_sp as an equation; code stays as it is."
    if found[0][0] == '`': return found[0]
    return f'${found[1]}' + re.sub(r'([_^])(\w+?)(?=[_^]|$)', r'\1{\2}', found[2]) + '$'


def named(text):
    "Prose with the names of ours in it marked as code, which become links."
    known = NbdevLookup().syms
    text = SYMBOL.sub(as_maths, text)
    text = OPTION.sub(lambda m: m[0] if m[0][0] == '`' else f'`{m[0]}`', text)
    return NAME.sub(lambda m: f'`{m[0]}`' if m[0][0] != '`' and m[0] in known else m[0], text)


def said_by_command(anno):
    "Whether the help of a command says what an option is for."
    return isinstance(anno, Param) and bool(anno.help)


def help_text(anno):
    "What the help of a command says of an option."
    text = str(anno.help or '')
    chosen = [str(getattr(o, 'value', o)) for o in anno.choices or ()]
    return text + (': ' + ', '.join(chosen[:-1]) + ' or ' + chosen[-1] if len(chosen) > 1 and not all(o in text for o in chosen) else '')


def cell_text(text):
    "Prose as a cell of a table."
    text = re.sub(r'(?<!\\)\|', r'\\|', ' '.join(named(text).split())).replace('<', '&lt;')
    return WORD.sub(lambda m: code(m[0]) if m[0][0] == "'" else m[0], text)


def table(head, rows, kind):
    "A table of Markdown without the columns that are empty throughout."
    keep = [i for i in range(len(head)) if i == 0 or any(r[i] for r in rows)]
    lines = [[head[i] for i in keep], ['---' for _ in keep], *([r[i] or ' ' for i in keep] for r in rows)]
    return f'::: {{.{kind}}}\n\n' + '\n'.join('| ' + ' | '.join(o) + ' |' for o in lines) + '\n\n:::'


def entries(params, docs):
    "(names, type, default, docment) of parameters; those that share a docment share a row."
    rows, done = [], set()
    for p in params:
        if p.name in done: continue
        text, together = docs.get(p.name, ('', [p.name]))
        group = [o for o in params if o.name in together]
        done |= {o.name for o in group}
        if isinstance(p.annotation, Param): text = help_text(p.annotation)
        kinds = list(dict.fromkeys(type_text(o.annotation, o.default) for o in group))
        given = list(dict.fromkeys(default_text(o.default) for o in group))
        kind = ', '.join(filter(None, kinds))
        if not kind and re.fullmatch(r'[A-Z]\w+', text) and text in NbdevLookup().syms: kind, text = f'`{text}`', ''
        kind, text = with_shape(kind, cell_text(text))
        default = ', '.join(code(o) for o in given if o)
        rows.append([', '.join(code(STARS.get(o.kind, '') + o.name) for o in group), spanned('kind', kind), spanned('default', default), text])
    return rows


def spanned(kind, text):
    "A cell's text, marked for the style sheet."
    return text and f'<span class="{kind}">{text}</span>'


def parameter_table(func):
    "The table of a function's parameters and of what it returns, or ''."
    docs = param_docs(func)
    rows = entries(parameters(func), docs)
    returns = inspect.signature(func).return_annotation if func else EMPTY
    returns = EMPTY if returns is None else returns
    kind, text = with_shape(type_text(returns), cell_text(docs.get('return', ('',))[0]))
    if func and func.__name__ != '__init__' and (kind or text) and func.__name__ != '__new__': rows.append(['*Returns*', spanned('kind', kind), '', text])
    return table(['Parameter', 'Type', 'Default', 'Meaning'], rows, 'params') if any(any(r[1:]) for r in rows) else ''


def record_docs(cls):
    "Name -> (docment, names that share it) of the fields of a record, those that it inherits among them."
    docs = {}
    for c in cls.__mro__[::-1]:
        if c.__module__.split('.')[0] == OWN: docs |= field_docs(c)
    return docs


def field_names(cls):
    "The names of the fields of a record, or of the members of an enumeration."
    if issubclass(cls, enum.Enum): return [o.name for o in cls]
    if dataclasses.is_dataclass(cls): return [o.name for o in dataclasses.fields(cls) if not o.name.startswith('_')]
    return list(cls._fields)


def record_table(cls):
    "The table of the fields of a record, or of the members of an enumeration."
    docs, names = record_docs(cls), field_names(cls)
    if issubclass(cls, enum.Enum):
        return table(['Member', 'Value', 'Meaning'], [[code(n), code(repr(cls[n].value)), cell_text(docs.get(n, ('',))[0])] for n in names], 'params')
    if dataclasses.is_dataclass(cls): fields = [(o.name, o.type, made(o)) for o in dataclasses.fields(cls) if o.name in names]
    else: fields = [(o, cls.__annotations__.get(o, EMPTY), cls._field_defaults.get(o, EMPTY)) for o in names]
    params = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a, default=d) for n, a, d in fields]
    return table(['Field', 'Type', 'Default', 'Meaning'], entries(params, docs), 'params')


def made(field):
    "The default of a field of a dataclass."
    if field.default is not dataclasses.MISSING: return field.default
    return EMPTY if field.default_factory is dataclasses.MISSING else field.default_factory()


def signature(name, obj, prefix=''):
    "How it is called, with defaults and without types."
    if isinstance(obj, PROPERTIES): return name
    if inspect.isclass(obj) and (issubclass(obj, enum.Enum) or not is_record(obj) and maker(obj) is None): return f'class {name}'
    func = None if is_record(obj) else maker(obj)
    params = parameters(func)
    if is_record(obj): params = [inspect.Parameter(n, p.kind, default=p.default) for n, p in inspect.signature(obj).parameters.items()]
    parts, keyword_only = [], False
    for p in params:
        if p.kind is p.VAR_POSITIONAL: keyword_only = True
        elif p.kind is p.KEYWORD_ONLY and not keyword_only:
            if not getattr(func, '__delwrap__', None): parts.append('*')
            keyword_only = True
        value = '...' if 'factory' in repr(p.default) else default_text(p.default)
        parts.append(STARS.get(p.kind, '') + p.name + (f'={value}' if p.default is not EMPTY else ''))
    return wrapped(f'{prefix}{name}(', parts)


def wrapped(head, parts):
    "`head(a, b)`, broken between arguments where it is too long, the rest below the first."
    lines, indent = [head], min(len(head), 24)
    for i, part in enumerate(parts):
        part += ', ' if i < len(parts)-1 else ')'
        if len(lines[-1]) + len(part.rstrip()) > WIDTH and lines[-1] != head: lines.append(' '*indent)
        lines[-1] += part
    return '\n'.join(o.rstrip() for o in lines) + ('' if parts else ')')


def methods(cls):
    "The public methods and properties in the body of a class that say what they do."
    _, node = source_of(cls)
    names = [o.name for o in node.body if isinstance(o, DEFS[:2])] if node else []
    found = {n: vars(cls)[n] for n in names if n[0] != '_' and n in vars(cls)}
    return {n: o for n, o in found.items() if own_doc(o) and is_ours(maker(o))}


def own_doc(obj):
    "Its own docstring, or ''."
    if inspect.isclass(obj):
        _, node = source_of(obj)
        return ast.get_docstring(node) or '' if node else ''
    func = maker(obj)
    return inspect.cleandoc(func.__doc__) if func is not None and func.__doc__ else ''


def is_described(func):
    "Whether a parameter of a function has a docment."
    docs = param_docs(func)
    return any(docs.get(p.name, ('',))[0] for p in parameters(func))


def method_table(name, cls):
    "The table of the methods in the body of a class; those with more to say have entries of their own below it."
    rows, more = [], []
    for method, obj in methods(cls).items():
        if is_described(maker(obj)):
            more.append(entry(f'{name}.{method}', obj, 4))
            continue
        anchor = f'<span id="{name.lower()}.{method}"></span>'
        call = '' if isinstance(obj, PROPERTIES) else '(' + ', '.join(STARS.get(p.kind, '') + p.name for p in parameters(maker(obj))) + ')'
        rows.append([anchor + code(method + call), cell_text(own_doc(obj))])
    return '\n\n'.join([*([table(['Method', 'What it does'], rows, 'params')] if rows else []), *more])


def source_link(obj):
    "Where its source is to be read."
    func = obj if inspect.isclass(obj) else maker(obj)
    cfg = get_config()
    file = func.__module__.replace('.', '/') + '.py'
    return f'{cfg.git_url}/blob/{cfg.branch}/{file}#L{inspect.getsourcelines(func)[1]}'


def entry(name, obj, level=3):
    "The whole entry of a function, class, method or property as Markdown."
    parts = ['---'] if level == 3 else []
    parts += [f'[source]({source_link(obj)}){{target="_blank" style="float:right; font-size:smaller"}}', '#'*level + f' {name}']
    parts.append(f'```python\n{signature(name, obj, "class " if inspect.isclass(obj) else "")}\n```')
    parts.append(named(own_doc(obj)).replace('<', '&lt;'))
    parts.append(record_table(obj) if is_record(obj) else parameter_table(maker(obj)))
    if inspect.isclass(obj): parts.append(method_table(name, obj))
    return '\n\n'.join(filter(None, parts))


def find(module, name):
    "The object of that name in a module; methods as they stand in their class."
    first, _, rest = name.partition('.')
    obj = getattr(importlib.import_module(module), first)
    return inspect.getattr_static(obj, rest) if rest else obj


def defined(source):
    "The names of what a cell defines for users, in order."
    names = []
    for o in ast.parse(source).body:
        if isinstance(o, DEFS) and not o.name.startswith('_'):
            found = patch_name(o)
            names += found if isinstance(found, list) else [found]
    return names


def is_silent(name, obj):
    "Whether a method that is patched in has no word for users, as the events of a callback."
    func = maker(obj)
    return '.' in name and not own_doc(obj) and func is not None and not is_described(func)


def module_of(nb):
    "The module that a notebook exports, or None."
    return next((f"{OWN}.{o.directives_['default_exp'][0]}" for o in nb.cells if 'default_exp' in getattr(o, 'directives_', {})), None)


class add_entries(Processor):
    "Put an entry behind every exported cell for each thing that it defines."
    def begin(self):
        module, cells = module_of(self.nb), []
        self.nb.module_ = module  # the cell that says so goes before links are made
        for cell in self.nb.cells:
            shown = cell.cell_type == 'code' and 'hide' not in cell.directives_ and {'export', 'exports'} & cell.directives_.keys()
            for name in defined(cell.source) if shown else ():
                obj = find(module, name)
                if not is_silent(name, obj): cells.append(mk_cell(entry(name, obj), 'markdown'))
            cells.append(cell)
        self.nb.cells = cells


class Lookup(NbdevLookup):
    "nbdev's links from names in backticks, without those of everyday words: `fill` is a link on its own page, or written `fill()`."
    def __init__(self, module):
        super().__init__()
        self.module = module

    def doc(self, sym): return super().doc(f'{self.module}.{sym}') or super().doc(sym)

    def _link_sym(self, found):
        name = found[1]
        everyday = name.islower() and name.isalpha() and not found[0].endswith('()`')
        return found[0] if everyday and f'{self.module}.{name}' not in self.syms else super()._link_sym(found)


    def link_line(self, line):
        "Links in a line, but none within the text of a link."
        return ''.join(o if i % 2 else super(Lookup, self).link_line(o) for i, o in enumerate(re.split(r'(\[[^\]]*\]\([^)]*\))', line)))


class add_links(Processor):
    "Make links of names in backticks, in prose and in outputs."
    def begin(self):
        lookup = Lookup(self.nb.module_)
        for cell in self.nb.cells:
            if cell.cell_type == 'markdown': cell.source = lookup.linkify(cell.source)
            for out in cell.get('outputs', []):
                if 'text/markdown' in (data := out.get('data', {})): data['text/markdown'] = [lookup.link_line(o) for o in data['text/markdown']]


class Procs(FilterDefaults):
    "nbdev's processors of a page, with our entries and links in place of its own."
    def base_procs(self):
        skip = 'clean_show_doc', 'exec_show_docs', 'mv_exports'
        ours = dict(add_show_docs=add_entries, add_links=add_links)
        return [ours.get(o.__name__, o) for o in super().base_procs() if o.__name__ not in skip]
