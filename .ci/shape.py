"""What a page shows of a notebook: examples with their results; the tests of a cell stand folded below them.

A notebook's cell is example and test at once: `test_eq(parse_size('96x48'), (96, 48))`. A reader wants the first half of it, `parse_size('96x48')  # (96, 48)`,
and the results that are printed or drawn. So the statements that only test go into a folded box, whole, and what they are about stays."""
import ast

FOLD = '#| code-fold: true\n#| code-summary: "{}"\n'
CLOSE = dict(test_close='≈ ', test_eq='', is_close='≈ ', equals='')
WIDTH = 100                                                   # of an example with its result


def called(node):
    "The name of the function that an expression calls, or ''."
    return getattr(node.func, 'id', getattr(node.func, 'attr', '')) if isinstance(node, ast.Call) else ''


def is_test(stmt):
    "Whether a statement, or a block of them, does nothing but test."
    if isinstance(stmt, ast.Assert): return True
    if isinstance(stmt, ast.Expr): return called(stmt.value).startswith('test_')
    if isinstance(stmt, (ast.For, ast.With, ast.If, ast.FunctionDef)): return any(is_test(o) for o in ast.walk(stmt) if isinstance(o, ast.stmt) and o is not stmt)
    return False


def plain(node):
    "Whether an expression is a value that can stand behind an example: numbers, words, and lists of them."
    if isinstance(node, ast.UnaryOp): return plain(node.operand)
    if isinstance(node, ast.BinOp): return plain(node.left) and plain(node.right)
    if isinstance(node, ast.Attribute): return isinstance(node.value, ast.Name) and node.value.id in ('torch', 'np', 'Modality')  # a dtype
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)): return all(map(plain, node.elts))
    if isinstance(node, ast.Dict): return all(map(plain, [*filter(None, node.keys), *node.values]))
    return isinstance(node, ast.Constant)


def example(stmt):
    "An equality with a plain value as (expression, sign, value), else None."
    if isinstance(stmt, ast.Expr) and called(stmt.value) in CLOSE and len(stmt.value.args) >= 2: (a, b), sign = stmt.value.args[:2], CLOSE[called(stmt.value)]
    elif isinstance(stmt, ast.Assert) and isinstance(o := stmt.test, ast.Compare) and len(o.ops) == 1 and isinstance(o.ops[0], ast.Eq): a, b, sign = o.left, o.comparators[0], ''
    else: return None
    private = any(o.startswith('_') and not o.startswith('__') for o in names(a, ast.Load))  # is of no use to a reader
    return (a, sign, b) if plain(b) and not plain(a) and not isinstance(a, ast.Name) and not private else None


def names(node, kind):
    "Names that a piece of code reads (`ast.Load`) or sets (`ast.Store`)."
    found = {o.id for o in ast.walk(node) if isinstance(o, ast.Name) and isinstance(o.ctx, kind)}
    if kind is ast.Store: found |= {o.name for o in ast.walk(node) if isinstance(o, (ast.FunctionDef, ast.ClassDef))}
    return found


def needed(stmts, shown):
    "Of the statements of a cell, by place, those that the ones in `shown` need; they are given by place too."
    keep, want = set(shown), set()
    for i in reversed(range(len(stmts))):
        changed = {o.value.id for o in ast.walk(stmts[i]) if isinstance(o, (ast.Attribute, ast.Subscript)) and isinstance(o.ctx, ast.Store) and isinstance(o.value, ast.Name)}
        if not is_test(stmts[i]) and (names(stmts[i], ast.Store) | changed) & want: keep.add(i)
        if i in keep: want |= names(stmts[i], ast.Load)
    return keep


def written(source, stmt, stmts):
    "A statement as it stands in the source, with the comment lines above it and the comment behind it."
    lines = source.splitlines()
    start = min([stmt.lineno, *(o.lineno for o in getattr(stmt, 'decorator_list', []))])
    above = []
    while start > 1 and lines[start-2].lstrip().startswith('#'): above, start = [lines[start-2], *above], start-1
    text = ast.get_source_segment(source, stmt) or ''
    if getattr(stmt, 'decorator_list', None): text = '\n'.join(lines[start-1+len(above):stmt.end_lineno])
    last = max(o.end_lineno == stmt.end_lineno and o.end_col_offset for o in stmts) == stmt.end_col_offset
    behind = lines[stmt.end_lineno-1].encode()[stmt.end_col_offset:].decode() if last else ''
    return '\n'.join([*above, text + ('  ' + behind.strip() if behind.strip().startswith('#') else '')])


def as_example(source, found):
    "An equality as an example: the expression and its value behind it."
    a, sign, b = found
    text, value = ast.get_source_segment(source, a), ast.get_source_segment(source, b)
    one = f'{text}  # {sign}{value}'
    return one if '\n' not in value and len(one.splitlines()[-1]) <= WIDTH else f'{text}\n' + '\n'.join(f'# {o}' for o in f'{sign}{value}'.splitlines())


def shape(source, has_output):
    "A cell's source as (what the page shows, what it folds away); either may be empty."
    head = [o for o in source.splitlines() if o.startswith('#|')]
    body = '\n'.join(o for o in source.splitlines() if not o.startswith('#|')).strip('\n')
    try: stmts = ast.parse(body).body
    except SyntaxError: return source, ''                     # a line of IPython's: it is no test
    tests = {i for i,o in enumerate(stmts) if is_test(o)}
    if not tests: return source, ''
    examples = {i: e for i,o in enumerate(stmts) if (e := example(o))}
    keep = set(range(len(stmts))) - tests if has_output else needed(stmts, set(examples))
    parts = [as_example(body, examples[i]) if i in examples else written(body, stmts[i], stmts) for i in sorted(keep | set(examples))]
    shown = '\n'.join([*head, *parts]) if examples or (has_output and keep) else ''
    return shown, body


def is_imports(source):
    "Whether a cell is a list of imports, too long to read past."
    try: stmts = ast.parse(source).body
    except SyntaxError: return False
    return len(stmts) > 4 and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in stmts)


def shape_cells(nb):
    "Shape all code cells of a notebook that a page shows."
    cells = []
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or '#| echo: false' in source or '#| code-fold' in source:
            cells.append(cell)
            continue
        if is_imports(source):
            cells.append({**cell, 'source': FOLD.format('Imports') + source})
            continue
        shown, tests = shape(source, bool(cell.get('outputs')))
        if shown or not tests: cells.append({**cell, 'source': shown})
        elif cell.get('outputs'): cells.append({**cell, 'source': '#| echo: false\n' + source})
        if tests: cells.append({**cell, 'source': FOLD.format('Tests') + tests, 'outputs': [], 'id': f"{cell.get('id', 'cell')}-tests"})
    nb['cells'] = cells
    return nb
