"""Rename files and identifiers as names_map.py says, and prove that nothing else changed.

    python rename/rename.py [--check]      at the root of the repository; --check decides everything and writes nothing

Every name is resolved to its binding (a module's symbol through imports and re-exports, a class's member, a function's
local), and the map says what becomes of the binding; there are no line numbers. A word of CLOSED about which the map says
nothing is an error, and then nothing is written. After writing, each file is parsed again and its syntax tree compared
with the old one under the same decisions; bindings must correspond one to one (no capture, no collision).
"""

import ast
import copy
import fnmatch
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import names_map as M  # noqa: E402

ROOT = Path.cwd()
PACKAGE = 'qformer_jax'
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SHAPES = {'Float', 'Bool', 'Int', 'UInt8', 'UInt32', 'Literal', 'Shaped', 'Num'}
errors: list[str] = []
warnings: list[str] = []


def git(*words):
    return subprocess.run(['git', *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


# --- scopes --------------------------------------------------------------------------------------------------------


class Scope:
    def __init__(self, node, parent, kind, qual):
        self.node, self.parent, self.kind, self.qual = node, parent, kind, qual
        self.bound, self.globals, self.nonlocals = {}, set(), set()  # name -> 'import' | 'def' | 'class' | 'arg' | 'store'

    def bind(self, name, how):
        if name in self.globals:
            top = self
            while top.parent:
                top = top.parent
            return top.bound.setdefault(name, how)
        if name in self.nonlocals:
            return None
        self.bound.setdefault(name, how)

    def resolve(self, name):
        scope, first = self, True
        if name in self.globals:
            while scope.parent:
                scope = scope.parent
            return scope if name in scope.bound else None
        while scope:
            if name in scope.bound and (first or scope.kind != 'class') and name not in scope.nonlocals:
                return scope
            first = first and scope.kind == 'comprehension'
            scope = scope.parent
        return None


class Unit:
    """One source: a Python file, or the code of a document."""

    def __init__(self, path, text):
        self.path, self.text = path, text
        self.tree = ast.parse(text)
        self.scope_of, self.parents = {}, {}
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        self.top = Scope(self.tree, None, 'module', '')
        self.scopes = [self.top]
        self._bind(self.tree.body, self.top)
        self.lines = text.split('\n')
        self.imports = {}  # (scope, local name) -> (module path, symbol or None)
        self.dead = set()

    def _new(self, node, parent, kind, name):
        qual = f'{parent.qual}.{name}' if parent.qual and name else (name or parent.qual)
        scope = Scope(node, parent, kind, qual)
        self.scopes.append(scope)
        return scope

    def _bind(self, body, scope):
        for node in body:
            self._visit(node, scope)

    def _visit(self, node, scope):
        self.scope_of[node] = scope
        if isinstance(node, FUNCTIONS):
            scope.bind(node.name, 'def')
            inner = self._new(node, scope, 'function', node.name)
            for d in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
                self._visit(d, scope)
            for a in self._arguments(node.args):
                inner.bind(a.arg, 'arg')
                self.scope_of[a] = inner
                if a.annotation:
                    self._visit(a.annotation, scope)
            if node.returns:
                self._visit(node.returns, scope)
            self._bind(node.body, inner)
        elif isinstance(node, ast.Lambda):
            inner = self._new(node, scope, 'function', '')
            inner.kind = 'lambda'
            for d in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                self._visit(d, scope)
            for a in self._arguments(node.args):
                inner.bind(a.arg, 'arg')
                self.scope_of[a] = inner
            self._visit(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            scope.bind(node.name, 'class')
            for d in [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]:
                self._visit(d, scope)
            for k in node.keywords:
                self.scope_of[k] = scope
            self._bind(node.body, self._new(node, scope, 'class', node.name))
        elif isinstance(node, COMPREHENSIONS):
            inner = self._new(node, scope, 'comprehension', '')
            for i, g in enumerate(node.generators):
                self._visit(g.iter, inner if i else scope)
                self._visit(g.target, inner)
                for c in g.ifs:
                    self._visit(c, inner)
            for part in ([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]):
                self._visit(part, inner)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for a in node.names:
                self.scope_of[a] = scope
                scope.bind(a.asname or a.name.split('.')[0], 'import')
        else:
            if isinstance(node, ast.Global):
                scope.globals.update(node.names)
            if isinstance(node, ast.Nonlocal):
                scope.nonlocals.update(node.names)
            if isinstance(node, ast.NamedExpr):
                target = scope
                while target.kind == 'comprehension':
                    target = target.parent
                target.bind(node.target.id, 'store')
            elif isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                if not (isinstance(self.parents.get(node), ast.NamedExpr)):
                    scope.bind(node.id, 'store')
            if isinstance(node, ast.ExceptHandler) and node.name:
                scope.bind(node.name, 'store')
            if isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
                scope.bind(node.name, 'store')
            for child in ast.iter_child_nodes(node):
                self._visit(child, scope)

    @staticmethod
    def _arguments(args):
        return [*args.posonlyargs, *args.args, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg])]


# --- the old tree --------------------------------------------------------------------------------------------------


def listed():
    """Every file that the script may touch."""
    files = git('ls-files').split('\n')
    skip = ('tests/goldens/', 'tests/old_runs/', 'rename/')
    return [f for f in files if f and not f.startswith(skip) and (ROOT / f).is_file()]


def dotted(path):
    parts = path[:-3].split('/')
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FENCE = re.compile(r'^```python\n(.*?)\n```$', re.M | re.S)


def codes_of(path, text):
    """The pieces of Python of a document: each fence of a page, all cells of a notebook as one."""
    if path.endswith('.md'):
        return FENCE.findall(text)
    book = json.loads(text)
    code = '\n'.join(''.join(c['source']) for c in book['cells'] if c['cell_type'] == 'code')
    return [re.sub(r'^[!%]', '#!', code, flags=re.M)]


UNITS, TEXTS = {}, {}
for f in listed():
    if f.endswith('.py'):
        UNITS[f] = Unit(f, (ROOT / f).read_text())
    elif f.endswith(('.md', '.ipynb', '.toml', 'Makefile')) or f == '.ci/run':
        TEXTS[f] = (ROOT / f).read_text()
        for n, code in enumerate(codes_of(f, TEXTS[f]) if f.endswith(('.md', '.ipynb')) else ()):
            try:
                UNITS[f'{f}#{n}'] = Unit(f'{f}#{n}', code)
            except SyntaxError as error:
                warnings.append(f'{f}: its code does not parse ({error}); left as it is')
MODULE = {dotted(f): f for f in UNITS if f.endswith('.py')}
NEW = {f: M.FILES.get(f, f) for f in [*UNITS, *TEXTS]}
for f in M.FILES:
    if f not in UNITS:
        errors.append(f'map: FILES names {f}, which is not there')
for f in M.SYMBOLS:
    if f not in UNITS:
        errors.append(f'map: SYMBOLS names {f}, which is not there')


def package_of(path):
    return path.split('/')[:-1]


def absolute(path, node):
    """The dotted module that a `from` names, seen from the file at path."""
    if not node.level:
        return node.module
    base = package_of(path)
    base = base[: len(base) - node.level + 1]
    return '.'.join([*base, *([node.module] if node.module else [])])


for u in UNITS.values():
    for node in ast.walk(u.tree):
        if isinstance(node, ast.ImportFrom):
            module = absolute(u.path, node)
            for a in node.names:
                whole = f'{module}.{a.name}'
                there = (whole, None) if whole in MODULE else (module, a.name)
                u.imports[u.scope_of[a], a.asname or a.name] = there
        elif isinstance(node, ast.Import):
            for a in node.names:
                u.imports[u.scope_of[a], a.asname or a.name.split('.')[0]] = (a.name if a.asname else a.name.split('.')[0], None)


def origin(module, symbol, depth=0):
    """Where a symbol is defined: (file, name), or (file, None) for a module; None where it is not ours."""
    if symbol is None:
        return (MODULE[module], None) if module in MODULE else None
    if module not in MODULE or depth > 9:
        return None
    u = UNITS[MODULE[module]]
    if (u.top, symbol) in u.imports:
        return origin(*u.imports[u.top, symbol], depth + 1)
    if symbol in u.top.bound:
        return u.path, symbol
    if f'{module}.{symbol}' in MODULE:
        return MODULE[f'{module}.{symbol}'], None
    return None


def stem(path):
    return path.split('/')[-2] if path.endswith('/__init__.py') else path.split('/')[-1][:-3]


def symbol_new(file, name):
    """The new name of what a file defines at its top."""
    return M.SYMBOLS.get(file, {}).get(name, name)


def fits(globs, text):
    return any(fnmatch.fnmatchcase(text, g) for g in globs.split('|'))


used_rules = set()


def first_rule(rules, name, path, *keys):
    """The new name by the first rule whose globs (or regexes) fit; None where there is none."""
    for n, (words, files, *patterns, new) in enumerate(rules):
        if name in words.split() and fits(files, path) and all(p(k) for p, k in zip(patterns, keys, strict=True)):
            used_rules.add((id(rules), n))
            return name if new is None else new
    return None


def compile_rules(rules, kind):
    out = []
    for words, files, pattern, new in rules:
        test = (lambda q, p=pattern: fits(p, q)) if kind == 'glob' else (lambda q, p=re.compile(pattern): bool(p.search(q)))
        out.append((words, files, test, new))
    return out


LOCALS, ATTRS = compile_rules(M.LOCALS, 'glob'), compile_rules(M.ATTRS, 'regex')
KEYWORDS, STRINGS = compile_rules(M.KEYWORDS, 'regex'), compile_rules(M.STRINGS, 'glob')
ALL_WORDS = {w for rules in (M.LOCALS, M.ATTRS, M.KEYWORDS) for r in rules for w in r[0].split()}
ALL_WORDS |= set(M.MEMBERS) | M.CLOSED | {n for names in M.SYMBOLS.values() for n in names}


def binding_new(u, scope, name):
    """The new name of what `name` is bound to in `scope`."""
    if (scope, name) in u.imports:
        module, symbol = u.imports[scope, name]
        return import_new(u, scope, name, module, symbol)[1]
    if scope.kind == 'module':
        new = symbol_new(u.path, name)
        if new == name:
            new = first_rule(LOCALS, name, u.path, '') or name
    elif scope.kind == 'class':
        return member_new(u, scope, name)
    else:
        new = first_rule(LOCALS, name, u.path, scope.qual)
        if new is None:
            if name in M.CLOSED:
                complain(u, scope.node, f"local '{name}' in {scope.qual or 'module'}")
            new = name
        return new
    if new == name and name in M.CLOSED and first_rule(LOCALS, name, u.path, '') is None:
        complain(u, scope.node, f"module-level '{name}'")
    return new


def member_new(u, scope, name):
    new = M.CLASS_MEMBERS.get(f'{u.path}:{scope.qual}', {}).get(name)
    new = M.MEMBERS.get(name) if new is None else new
    if new is None:
        if name in M.CLOSED:
            complain(u, scope.node, f"member '{name}' of {scope.qual}")
        return name
    return new


def import_new(u, scope, local, module, symbol):
    """(new imported name, new local name) of an import."""
    has_as = None
    where = origin(module, symbol)
    if where is None:
        return symbol or module, M.IMPORT_AS.get(local) or local
    file, name = where
    imported = symbol if symbol is not None else module.rsplit('.', 1)[-1]
    new = stem(NEW[file]) if name is None else (symbol_new(file, name) if imported == name else imported)
    if local != imported:
        new_local = M.IMPORT_AS.get(local, local)
        if new_local is None:
            new_local = new
        else:
            new_local = first_rule(LOCALS, local, u.path, scope.qual) or new_local
        return new, new_local
    return new, new


def complain(u, node, what):
    message = f'{u.path}:{getattr(node, "lineno", 0)}: undecided {what}'
    if message not in errors:
        errors.append(message)


def source(node):
    return ast.unparse(node)


def module_of(u, node):
    """The origin of an expression that names a module, class or function of ours, or None."""
    if isinstance(node, ast.Name):
        scope = resolve(u, node)
        if scope is None:
            return None
        if (scope, node.id) in u.imports:
            return origin(*u.imports[scope, node.id])
        if scope.kind == 'module' and scope.bound[node.id] in ('class', 'def'):
            return (u.path, node.id)
        return None
    if isinstance(node, ast.Attribute):
        base = module_of(u, node.value)
        if base and base[1] is None:
            return origin(dotted(base[0]), node.attr)
    return None


def resolve(u, node):
    return u.scope_of[node].resolve(node.id)


def attribute_new(u, node):
    base = module_of(u, node.value)
    if base and base[1] is None:
        where = origin(dotted(base[0]), node.attr)
        if where is None:
            return node.attr
        file, name = where
        if name is None:
            return stem(NEW[file])
        return symbol_new(file, name) if name == node.attr else node.attr
    receiver = source(node.value)
    parent = u.parents.get(node)
    if isinstance(parent, ast.Call) and parent.func is node:
        receiver += '()' if not parent.args and not parent.keywords else '(..)'
    if base and base[1] is not None:
        receiver = f'{base[0]}:{base[1]}:' + receiver
    new = first_rule(ATTRS, node.attr, u.path, receiver)
    if new is None:
        new = M.MEMBERS.get(node.attr)
    if new is None:
        if node.attr in M.CLOSED:
            complain(u, node, f"attribute '{node.attr}' of `{receiver}`")
        return node.attr
    return new


def keyword_new(u, node):
    call = u.parents[node]
    callee = source(call.func) if isinstance(call, ast.Call) else 'class'
    new = first_rule(KEYWORDS, node.arg, u.path, callee)
    if new is None:
        if node.arg in M.CLOSED:
            complain(u, node.value, f"keyword '{node.arg}' of `{callee}`")
        return node.arg
    return new


# --- decisions -----------------------------------------------------------------------------------------------------


class Edits:
    def __init__(self, u):
        self.u, self.spans, self.node = u, [], {}  # node: id -> {field: new}
        self.raw = [line.encode() for line in u.lines]

    def at(self, line, col, old, new, node, field):
        if old == new:
            return
        if self.raw[line - 1][col : col + len(old.encode())] != old.encode():
            errors.append(f"{self.u.path}:{line}: expected '{old}' at column {col}: {self.raw[line - 1].decode()}")
            return
        self.spans.append((line, col, line, col + len(old.encode()), new))
        self.node.setdefault(id(node), {})[field] = new

    def text(self):
        """The source with all edits made."""
        raw = list(self.raw)
        spans = sorted(set(self.spans), reverse=True)
        for (l1, c1, l2, c2, new), after in zip(spans, [None, *spans]):
            if after and (l2, c2) > (after[0], after[1]):
                errors.append(f'{self.u.path}:{l1}: two edits overlap: {new!r}, {after[4]!r}')
            merged = raw[l1 - 1][:c1] + new.encode() + raw[l2 - 1][c2:]
            raw[l1 - 1 : l2] = [merged] + [None] * (l2 - l1)
        return '\n'.join(line.decode() for line in raw if line is not None)


def name_after(u, node, word):
    """(line, column in bytes) of the name behind `def` or `class`."""
    for line in range(node.lineno, node.lineno + 3):
        found = re.search(rf'\b(?:def|class)\s+({re.escape(word)})\b', u.lines[line - 1])
        if found:
            return line, len(u.lines[line - 1][: found.start(1)].encode())
    raise AssertionError((u.path, word))


def decide(u):
    e = Edits(u)
    for node in ast.walk(u.tree):
        if isinstance(node, ast.Name):
            scope = resolve(u, node)
            if scope is not None:
                e.at(node.lineno, node.col_offset, node.id, binding_new(u, scope, node.id), node, 'id')
        elif isinstance(node, ast.Attribute):
            new = attribute_new(u, node)
            e.at(node.end_lineno, node.end_col_offset - len(node.attr.encode()), node.attr, new, node, 'attr')
        elif isinstance(node, ast.arg):
            scope = u.scope_of[node]
            e.at(node.lineno, node.col_offset, node.arg, binding_new(u, scope, node.arg), node, 'arg')
        elif isinstance(node, ast.keyword) and node.arg:
            e.at(node.lineno, node.col_offset, node.arg, keyword_new(u, node), node, 'arg')
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            new = binding_new(u, u.scope_of[node], node.name)
            if new != node.name:
                e.at(*name_after(u, node, node.name), node.name, new, node, 'name')
        elif isinstance(node, ast.ExceptHandler) and node.name:
            new = binding_new(u, u.scope_of[node], node.name)
            if new != node.name:
                errors.append(f'{u.path}:{node.lineno}: except ... as {node.name}: not handled')
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            new = [binding_new(u, u.scope_of[node].resolve(n) or u.top, n) for n in node.names]
            if new != node.names:
                errors.append(f'{u.path}:{node.lineno}: global or nonlocal: not handled')
        elif isinstance(node, ast.Import):
            for a in node.names:
                if a.name in MODULE and NEW[MODULE[a.name]] != MODULE[a.name]:
                    if not a.asname:
                        errors.append(f'{u.path}:{node.lineno}: import {a.name}: not handled')
                    e.at(a.lineno, a.col_offset, a.name, dotted(NEW[MODULE[a.name]]), a, 'name')
        elif isinstance(node, ast.ImportFrom):
            import_edit(u, e, node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            string_edit(u, e, node)
    prose_edits(u, e)
    return e


def relative(path, module):
    """How the file at (new) path names a module of the package: '..models.blip2'."""
    base, target = package_of(path), module.split('.')
    common = 0
    while common < min(len(base), len(target)) and base[common] == target[common]:
        common += 1
    return '.' * (len(base) - common + 1) + '.'.join(target[common:])


def import_targets(u, node):
    """[(new absolute module, new name, new local name or None)] of a `from` import."""
    module, out = absolute(u.path, node), []
    for a in node.names:
        local = a.asname or a.name
        there = u.imports[u.scope_of[a], local]
        name, new_local = import_new(u, u.scope_of[a], local, *there)
        if there[1] is None:  # a module as a name
            new_module = '.'.join(dotted(NEW[MODULE[there[0]]]).split('.')[:-1]) if there[0] in MODULE else module
            name = dotted(NEW[MODULE[there[0]]]).split('.')[-1] if there[0] in MODULE else a.name
        else:
            new_module = dotted(NEW[MODULE[module]]) if module in MODULE else module
        out.append((new_module, name, new_local if new_local != name else None))
    return out


def import_edit(u, e, node):
    targets = import_targets(u, node)
    inside = NEW[u.path].startswith(f'{PACKAGE}/')
    said = lambda m: relative(NEW[u.path], m) if m.split('.')[0] == PACKAGE and inside else m  # noqa: E731
    if node.level and not inside:  # experiments name each other relatively
        said = lambda m: relative(NEW[u.path], m)  # noqa: E731
    new = [(said(m), n, a) for m, n, a in targets]
    old = [('.' * node.level + (node.module or ''), a.name, a.asname) for a in node.names]
    if new == old:
        return
    e.node.setdefault(id(node), {})['targets'] = targets
    modules = list(dict.fromkeys(m for m, _, _ in new))
    lines = []
    for m in modules:
        names = ', '.join(f'{n} as {a}' if a else n for mm, n, a in new if mm == m)
        lines.append(f'from {m} import ({names})' if len(names) > 60 else f'from {m} import {names}')
    indent = '\n' + ' ' * node.col_offset
    e.spans.append((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, indent.join(lines)))


def is_docstring(u, node):
    p = u.parents.get(node)
    return isinstance(p, ast.Expr)


def annotation_root(u, node):
    """Whether a string stands where an annotation does (and is no shape)."""
    child = node
    while (p := u.parents.get(child)) is not None:
        if isinstance(p, ast.arg):
            return p.annotation is child
        if isinstance(p, FUNCTIONS):
            return p.returns is child
        if isinstance(p, ast.AnnAssign):
            return p.annotation is child
        if isinstance(p, ast.Subscript) and source(p.value).split('.')[-1] in SHAPES:
            return False
        if not isinstance(p, (ast.Subscript, ast.Tuple, ast.BinOp, ast.List)):
            return False
        child = p
    return False


def decorated(u, node):
    """The function among whose decorators' names of arguments a string stands; None where it does not."""
    child = node
    while (p := u.parents.get(child)) is not None:
        if isinstance(p, FUNCTIONS) and child in p.decorator_list:
            return p
        if isinstance(p, ast.Call) and source(p.func).endswith('parametrize') and child is not p.args[0]:
            return None
        if not isinstance(p, (ast.Call, ast.keyword, ast.Tuple, ast.List)):
            return None
        child = p
    return None


def string_edit(u, e, node):
    value, parent = node.value, u.parents.get(node)
    if is_docstring(u, node) or isinstance(parent, (ast.JoinedStr, ast.FormattedValue)):
        return
    raw = e.raw[node.lineno - 1]
    if annotation_root(u, node):
        try:
            inner = ast.parse(value, mode='eval')
        except SyntaxError:
            return
        new, shift = value, 0
        for n in sorted((n for n in ast.walk(inner) if isinstance(n, ast.Name)), key=lambda n: n.col_offset):
            scope = u.scope_of[node].resolve(n.id) if node in u.scope_of else u.top.resolve(n.id)
            to = binding_new(u, scope, n.id) if scope else n.id
            new = new[: n.col_offset + shift] + to + new[n.end_col_offset + shift :]
            shift += len(to) - len(n.id)
        if new != value:
            e.at(node.lineno, node.col_offset + 1, value, new, node, 'value')
        return
    new = None
    if isinstance(parent, (ast.List, ast.Tuple)) and '__all__' in source(u.parents[parent]).split(' =')[0]:
        new = binding_new(u, u.top, value) if value in u.top.bound else None
    owner = decorated(u, node)
    if owner is not None:  # parametrize('a, b', ...), static_argnames=('a', 'b')
        inner = next(s for s in u.scopes if s.node is owner)
        said = [w.strip() for w in value.split(',')]
        if all(inner.bound.get(w) == 'arg' for w in said):
            new = re.sub(r'\w+', lambda w: binding_new(u, inner, w.group(0)), value)
    call = parent if isinstance(parent, ast.Call) else None
    name = source(call.func).split('.')[-1] if call else ''
    if call and name in ('setattr', 'getattr', 'hasattr', 'delattr', 'object', 'replaced', 'method') and len(call.args) > 1 and call.args[1] is node:
        base = module_of(u, call.args[0])
        if base and base[1] is None:
            where = origin(dotted(base[0]), value)
            new = symbol_new(*where) if where and where[1] == value else None
            if where and where[1] is None:
                new = stem(NEW[where[0]])
        elif base:
            new = M.CLASS_MEMBERS.get(f'{base[0]}:{base[1]}', {}).get(value, M.MEMBERS.get(value))
        else:
            new = first_rule(STRINGS, value, u.path, u.scope_of[node].qual)
            if new is None and value in ALL_WORDS:
                warnings.append(f"{u.path}:{node.lineno}: string '{value}' in `{source(call)[:80]}`")
    if isinstance(parent, ast.keyword) and parent.arg == 'method':
        new = M.MEMBERS.get(value)
    if re.fullmatch(rf'{PACKAGE}(\.\w+)+', value):
        new = dotted_path(value)
    if '/' in value and value.endswith('.py') and new is None:
        new = paths_in(value, u.path)
    if new is None:
        new = first_rule(STRINGS, value, u.path, u.scope_of[node].qual if node in u.scope_of else '')
        if new is None and value in M.CLOSED:
            warnings.append(f"{u.path}:{node.lineno}: string '{value}' stays: {u.lines[node.lineno - 1].strip()[:100]}")
    if new is not None and new != value:
        prefix = re.match(rb'[rRbBuU]*[\'"]{1,3}', raw[node.col_offset :]).end()
        e.at(node.lineno, node.col_offset + prefix, value, new, node, 'value')


def dotted_path(value):
    """'qformer_jax.a.b.symbol.member' under the map."""
    parts = value.split('.')
    for n in range(len(parts), 0, -1):
        module = '.'.join(parts[:n])
        if module in MODULE:
            rest = parts[n:]
            if rest:
                where = origin(module, rest[0])
                if where and where[1]:
                    members = M.CLASS_MEMBERS.get(f'{where[0]}:{where[1]}', {})
                    rest = [symbol_new(where[0], rest[0]) if where[1] == rest[0] else rest[0], *(members.get(r, M.MEMBERS.get(r, r)) for r in rest[1:])]
            return '.'.join([dotted(NEW[MODULE[module]]), *rest])
    return value


# --- prose: paths, and identifiers in backticks ----------------------------------------------------------------------

MOVED = {a: b for a, b in NEW.items() if a != b}
BY_NAME = defaultdict(list)
for f in [*UNITS, *TEXTS]:
    BY_NAME[f.split('/')[-1]].append(f)


def paths_in(text, here):
    """The text with old paths of moved files made new ones."""
    def whole(found):
        said = found.group(0)
        for prefix in ('', f'{PACKAGE}/', f'{PACKAGE}/data/', 'experiments/'):
            if prefix + said in MOVED:
                return MOVED[prefix + said].removeprefix(prefix)
        return said

    return re.sub(r'(?<![\w./-])(?:\w+/)+\w+\.py\b', whole, text)


def bare(said, here):
    """A file's name alone, in backticks: of the same folder, or the only one of that name."""
    same = '/'.join([*package_of(here), said])
    if same in NEW:
        if same not in MOVED:
            return said
        new = MOVED[same]
    elif len(BY_NAME[said]) == 1 and BY_NAME[said][0] in MOVED:
        new = MOVED[BY_NAME[said][0]]
    else:
        if any(f in MOVED for f in BY_NAME[said]):
            warnings.append(f'{here}: `{said}` may be any of {BY_NAME[said]}')
        return said
    there = package_of(NEW.get(here, here))
    return new.split('/')[-1] if package_of(new) == there else new.removeprefix(f'{PACKAGE}/')


def doc_words():
    """Old name -> new name, of those that mean one thing wherever they stand."""
    known = defaultdict(set)
    for file, names in M.SYMBOLS.items():
        if file.startswith(PACKAGE):
            for a, b in names.items():
                known[a].add(b)
    for u in UNITS.values():
        if u.path.startswith(PACKAGE):
            for name, how in u.top.bound.items():
                if how != 'import' and symbol_new(u.path, name) == name and name in known:
                    known[name].add(name)
    words = {a: next(iter(b)) for a, b in known.items() if len(b) == 1}
    return {**{a: b for a, b in words.items() if a not in M.DOC_NOT}, **{a: b for a, b in M.MEMBERS.items() if a not in M.DOC_NOT}, **M.DOC}


DOC_WORDS = doc_words()


def ticked(text, here, u=None, scope=None):
    """The text with identifiers inside `...` renamed, and old paths."""
    text = paths_in(text, here)
    by_file = {a: b for glob, words in M.DOC_FILE for a, b in words.items() if fits(glob, here)}

    def span(found):
        inside = found.group(1)
        if inside.startswith(('qformer ', '--', 'python ', 'make ', 'pip ')) or re.search(r'\.(jsonl?|md|png|npz|npy|txt)$', inside):
            return found.group(0)
        if inside in by_file:
            return f'`{by_file[inside]}`'
        if re.fullmatch(r'\w+\.py', inside):
            return f'`{bare(inside, here)}`'
        if re.fullmatch(rf'{PACKAGE}(\.\w+)+', inside):
            return f'`{dotted_path(inside)}`'

        def word(w):
            name, dot = w.group(2), w.group(1)
            if u is not None and not dot:
                s = scope.resolve(name)
                there = u.imports.get((s, name))
                after = re.match(r'\.(\w+)', inside[w.end(2) :])
                if there and there[1] is None and after and origin(there[0], after.group(1)) is None:
                    return name  # `start.vit`, an option, where a module `start` is imported
                if s is not None:
                    return binding_new(u, s, name)
            if dot:
                head = re.search(r'(\w+)\.$', inside[: w.start(2)])
                receiver = head.group(1) if head else ''
                if u is not None and receiver:
                    try:
                        base = u.top.resolve(receiver) and u.imports.get((u.top, receiver))
                    except KeyError:
                        base = None
                    if base:
                        where = origin(*base)
                        if where and where[1] is None:
                            what = origin(dotted(where[0]), name)
                            return dot + (symbol_new(*what) if what and what[1] == name else name)
                new = by_file.get(name) or first_rule(ATTRS, name, here, receiver) or M.MEMBERS.get(name, DOC_WORDS.get(name, name))
                return dot + new
            new = by_file.get(name) or DOC_WORDS.get(name, name)
            if new == name and name in M.CLOSED:
                warnings.append(f'{here}: `{inside}` still says {name}')
            return new

        return '`' + re.sub(r'(?<![\w\'"/-])(\.?)\b([A-Za-z_]\w*)\b(?![\'"/-])', word, inside) + '`'

    return re.sub(r'(?<!`)`([^`\n]+)`(?!`)', span, text)


def reflowed(raw, column, width=120):
    """A docstring whose lines that became too long give their last words to the line behind, within a paragraph."""
    lines, n = raw.split('\n'), 0
    while n < len(lines):
        room = width - (column if n == 0 else 0)
        if len(lines[n]) > room and ' ' in lines[n].strip():
            cut = lines[n].rfind(' ', 0, room + 1)
            rest = lines[n][cut + 1 :]
            lines[n] = lines[n][:cut]
            indent = ' ' * (len(lines[n]) - len(lines[n].lstrip()) if n else column)
            follows = lines[n + 1] if n + 1 < len(lines) else ''
            if follows.strip() and not follows.strip().startswith('"""') and follows.startswith(indent) and follows[len(indent)] != ' ':
                lines[n + 1] = f'{indent}{rest} {follows[len(indent):]}'
            else:
                lines.insert(n + 1, indent + rest)
        n += 1
    return '\n'.join(lines)


def prose_edits(u, e):
    if not u.path.endswith('.py'):
        return
    for node in ast.walk(u.tree):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
            continue
        c, scope = node.value, u.scope_of[node]
        owner = u.parents.get(node)
        raw = ast.get_source_segment(u.text, c)
        new = ticked(raw, u.path, u, scope)
        if new != raw:
            new = reflowed(new, c.col_offset)
            e.spans.append((c.lineno, c.col_offset, c.end_lineno, c.end_col_offset, new))
            e.node.setdefault(id(c), {})['value'] = ast.literal_eval(new)
    for token in tokenize.generate_tokens(io.StringIO(u.text).readline):
        if token.type == tokenize.COMMENT:
            new = ticked(token.string, u.path, u, u.top)
            if new != token.string:
                line, col = token.start
                at = len(u.lines[line - 1][:col].encode())
                e.spans.append((line, at, line, at + len(token.string.encode()), new))


# --- after: the proof ------------------------------------------------------------------------------------------------


class Apply(ast.NodeTransformer):
    def __init__(self, decided):
        self.decided = decided

    def generic_visit(self, node):
        for field, new in self.decided.get(id(node), {}).items():
            if field != 'targets':
                setattr(node, '_new_' + field, new)
        return super().generic_visit(node)


def under_map(u, e):
    """The old tree with every decision made, imports as a canonical form."""
    for node in ast.walk(u.tree):
        if isinstance(node, ast.ImportFrom):
            node._targets = e.node.get(id(node), {}).get('targets') or import_targets(u, node)
    memo = {}
    tree = copy.deepcopy(u.tree, memo)
    twin = {id(old): memo[id(old)] for old in ast.walk(u.tree)}
    for old_id, fields in e.node.items():
        for field, new in fields.items():
            if field != 'targets':
                setattr(twin[old_id], field, new)
    return tree


def canonical(tree, path):
    """A tree's dump, imports sorted within a run of them, docstrings cleaned, `__all__` sorted."""
    def targets(node):
        if isinstance(node, ast.Import):
            return [('import', a.name, a.asname) for a in node.names]
        found = getattr(node, '_targets', None)
        return found or [(absolute(path, node), a.name, a.asname) for a in node.names]

    for node in ast.walk(tree):
        for field in ('body', 'orelse', 'finalbody', 'handlers'):
            body = getattr(node, field, None)
            if not isinstance(body, list):
                continue
            out, run = [], []

            def flush():
                if run:
                    out.append(ast.Expr(ast.Constant('imports: ' + repr(sorted(set(map(str, run)))))))
                    run.clear()

            for s in body:
                if isinstance(s, (ast.Import, ast.ImportFrom)):
                    run.extend(targets(s))
                    continue
                flush()
                out.append(s)
            flush()
            setattr(node, field, out)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ' '.join(inspect.cleandoc(node.value.value).split())
        if isinstance(node, ast.Assign) and source(node.targets[0]) == '__all__':
            node.value.elts.sort(key=lambda x: x.value)
    return ast.dump(tree, indent=1)


def names_in_order(u):
    """Every bound name outside imports, with the scope that binds it."""
    out = []

    class Walk(ast.NodeVisitor):
        def visit_Name(self, node):
            s = resolve(u, node)
            out.append((None if s is None else (u.scopes.index(s)), node.id))

        def visit_Import(self, node):
            pass

        visit_ImportFrom = visit_Import

        def visit_arg(self, node):
            out.append((u.scopes.index(u.scope_of[node]), node.arg))
            self.generic_visit(node)

    Walk().visit(u.tree)
    return out


def check_capture(old, new):
    a, b = names_in_order(old), names_in_order(new)
    if len(a) != len(b):
        return errors.append(f'{new.path}: {len(a)} names before, {len(b)} after')
    there, back = {}, {}
    for x, y in zip(a, b):
        if there.setdefault(x, y) != y:
            errors.append(f'{new.path}: {x[1]} becomes both {there[x]} and {y}: a capture')
        if back.setdefault(y, x) != x:
            errors.append(f"{new.path}: '{y[1]}' ({new.scopes[y[0]].qual if y[0] is not None else 'builtin'}) was both {back[y]} and {x}: a collision")


def check_members(new):
    for s in new.scopes:
        if s.kind == 'class':
            seen = defaultdict(int)
            for n in s.node.body:
                if isinstance(n, FUNCTIONS):
                    seen[n.name] += 1 + sum('setter' in source(d) or 'overload' in source(d) for d in n.decorator_list) * -1
                elif isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
                    seen[n.target.id] += 1
            errors.extend(f'{new.path}: class {s.qual} has two members {n}' for n, c in seen.items() if c > 1)


def check_imports(units):
    modules = {dotted(f): u for f, u in units.items() if f.endswith('.py')}
    for u in units.values():
        for node in ast.walk(u.tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = absolute(u.path, node)
            if module.split('.')[0] not in (PACKAGE, 'experiments', 'tests'):
                continue
            if u.path.startswith(f'{PACKAGE}/') and not node.level:
                errors.append(f'{u.path}:{node.lineno}: an absolute import inside the package')
            for a in node.names:
                if f'{module}.{a.name}' in modules or a.name == '*' or (module == PACKAGE and a.name == 'configs'):
                    continue
                if module not in modules:
                    if not module.startswith(f'{PACKAGE}.configs'):
                        errors.append(f'{u.path}:{node.lineno}: no module {module}')
                elif a.name not in modules[module].top.bound:
                    errors.append(f'{u.path}:{node.lineno}: {module} has no {a.name}')


def occurrences(units, words):
    """Every identifier among the words, in code."""
    for u in units.values():
        for node in ast.walk(u.tree):
            for field in ('id', 'attr', 'arg', 'name', 'asname'):
                value = getattr(node, field, None)
                if isinstance(value, str) and (value in words or re.match('judge_', value)):
                    yield u.path, getattr(node, 'lineno', 0), field, value, node


def main():
    check_only = '--check' in sys.argv
    edits = {f: decide(u) for f, u in UNITS.items()}
    new_text = {f: e.text() for f, e in edits.items()}
    for rules, compiled, name in ((M.LOCALS, LOCALS, 'LOCALS'), (M.ATTRS, ATTRS, 'ATTRS'), (M.KEYWORDS, KEYWORDS, 'KEYWORDS')):
        for n, rule in enumerate(rules):
            if (id(compiled), n) not in used_rules:
                warnings.append(f'map: {name} rule {rule} fits nothing')
    if check_only or errors:
        return finish(check_only)

    for f, u in UNITS.items():
        if f.endswith('.py') and new_text[f] != u.text:
            (ROOT / f).write_text(new_text[f] + M.APPEND.get(f, ''))
    for f, text in TEXTS.items():
        new = document(f, text, {u.text: new_text[n] for n, u in UNITS.items() if n.startswith(f'{f}#')})
        if new != text:
            (ROOT / f).write_text(new)
    for old, new in M.FILES.items():
        (ROOT / new).parent.mkdir(parents=True, exist_ok=True)
        git('mv', old, new)
    for path, text in M.CREATE.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
        git('add', path)
    ruff = next((str(p) for p in (Path(sys.executable).parent / 'ruff', ROOT / '.venv/bin/ruff') if p.exists()), 'ruff')
    folders = ['qformer_jax', 'tests', 'experiments', 'configs']
    subprocess.run([ruff, 'check', '--quiet', '--fix', '--select', 'I,RUF022', '--unsafe-fixes', *folders], cwd=ROOT)
    subprocess.run([ruff, 'format', '--quiet', *folders], cwd=ROOT)
    move_noqa()
    prove(edits)
    subprocess.run([ruff, 'check', *folders], cwd=ROOT)
    subprocess.run([sys.executable, '-m', 'compileall', '-q', *folders], cwd=ROOT)
    smoke = f'import {PACKAGE}.cli, {PACKAGE}.training.loop, {PACKAGE}.inference.blip2; print({PACKAGE}.__file__)'
    if subprocess.run([sys.executable, '-c', smoke], cwd=ROOT, env={**__import__('os').environ, 'PYTHONPATH': str(ROOT)}).returncode:
        errors.append('the import smoke test fails')
    finish(False)


def move_noqa():
    """Where a line grew over several, its `noqa` of a lambda goes back to the line that the linter names."""
    for f in UNITS:
        if not f.endswith('.py'):
            continue
        lines = (ROOT / NEW[f]).read_text().split('\n')
        for n, line in enumerate(lines):
            if line.strip() == ')  # noqa: E731':
                indent = line[: line.index(')')]
                start = next(i for i in range(n - 1, 0, -1) if lines[i].startswith(indent) and lines[i][len(indent)] != ' ')
                lines[start], lines[n] = f'{lines[start]}  # noqa: E731', f'{indent})'
                (ROOT / NEW[f]).write_text('\n'.join(lines))


def document(path, text, new_code):
    """A document with its code ({old: new}), paths and backticks renamed."""
    if path.endswith('.ipynb'):
        book = json.loads(text)
        code, new = next(iter(new_code.items()), ('', ''))
        if len(code.split('\n')) != len(new.split('\n')):
            errors.append(f'{path}: the code changed its number of lines: mend by hand')
            return text
        lines = iter(new.split('\n'))
        for cell in book['cells']:
            old = ''.join(cell['source'])
            if cell['cell_type'] == 'code' and new:
                pairs = [(line, next(lines)) for line in old.split('\n')]
                said = '\n'.join(line if re.match('[!%]', line) else after for line, after in pairs)
            else:
                said = ticked(old, path)
            if said != old:
                cell['source'] = said.splitlines(keepends=True)
        return json.dumps(book, indent=1, ensure_ascii=False) + ('\n' if text.endswith('\n') else '')
    if not path.endswith('.md'):
        return paths_in(text, path)
    parts = re.split(r'(^```.*?^```$)', text, flags=re.M | re.S)
    for n, part in enumerate(parts):
        found = FENCE.fullmatch(part)
        if found:
            parts[n] = f'```python\n{new_code.get(found.group(1), found.group(1))}\n```'
        else:
            parts[n] = paths_in(part, path) if part.startswith('```') else ticked(part, path)
    return ''.join(parts)


def prove(edits):
    after = {}
    for f, u in UNITS.items():
        if not f.endswith('.py'):
            continue
        text = (ROOT / NEW[f]).read_text()
        text = text.replace(M.APPEND.get(f, '\0'), '')
        try:
            after[NEW[f]] = new = Unit(NEW[f], text)
        except SyntaxError as error:
            errors.append(f'{NEW[f]}: {error}')
            continue
        old_dump, new_dump = canonical(under_map(u, edits[f]), f), canonical(ast.parse(text), NEW[f])
        if old_dump != new_dump:
            a, b = old_dump.split('\n'), new_dump.split('\n')
            n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            errors.append(f'{NEW[f]}: its syntax tree is not that of the map:\n   {a[max(0, n - 3) : n + 2]}\n   {b[max(0, n - 3) : n + 2]}')
        check_capture(u, new)
        check_members(new)
    for path, text in M.CREATE.items():
        after[path] = Unit(path, text)
    for f, text in M.APPEND.items():
        after[NEW[f]] = Unit(NEW[f], (ROOT / NEW[f]).read_text())
    check_imports(after)
    for path, line, field, value, node in occurrences(after, M.CLOSED):
        if not (field == 'attr' and value == 'exists' and source(node).split('.')[-1] == 'exists' and M.PATH_EXISTS.search(source(node.value))):
            where = f'{path}:{line}: {value} ({field}) is still there'
            if not any(re.search(p, where) for p in M.ALLOWED):
                errors.append(where)


def finish(check_only):
    for line in warnings:
        print('note:', line)
    for line in errors:
        print('ERROR', line)
    print(f'{len(errors)} errors, {len(warnings)} notes')
    sys.exit(bool(errors))


if __name__ == '__main__':
    main()
