"""python noise.py FLOAT32 FLOAT64 OUT: what float32 does to LAVIS's own numbers, array by array."""
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
a, b, out = map(Path, sys.argv[1:])
def arrays(case):
    yield from dict(np.load(case / 'arrays.npz')).items()
    for p in sorted(case.glob('*.safetensors')):
        if p.name == 'state_dict.safetensors': continue
        yield from ((f'{p.name}: {k}', v) for k, v in load_file(p).items())
noise = {}
for case in sorted(p for p in a.iterdir() if (p / 'meta.json').exists()):
    if case.name == 'processors': continue
    if (case/'state_dict.safetensors').exists():
        x, y = load_file(case/'state_dict.safetensors'), load_file(b/case.name/'state_dict.safetensors')
        assert all(np.array_equal(x[k], y[k]) for k in x)
    wide, rows = dict(arrays(b / case.name)), {}
    for k, x in arrays(case):
        y = wide[k]; assert x.shape == y.shape
        if x.dtype.kind != 'f':
            assert np.array_equal(x, y), k; continue
        f = np.isfinite(y); assert (f == np.isfinite(x)).all()
        rows[k] = {'noise': float(np.abs(x.astype(float)[f] - y[f]).max(initial=0)), 'scale': float(np.abs(y[f]).max(initial=0))}
    noise[case.name] = rows
(out / 'noise.json').write_text(json.dumps(noise, indent=1) + '\n')
lines = ['| case | arrays | largest noise / scale | of | gradients | largest noise / scale | of |', '|---|---|---|---|---|---|---|']
for case, rows in noise.items():
    def worst(keys):
        keys = [k for k in keys if rows[k]['scale'] and 'key.bias' not in k]
        if not keys: return '', '', ''
        rel = lambda k: rows[k]['noise'] / rows[k]['scale']
        k = max(keys, key=rel)
        return len(keys), f'{rel(k):.1e}', f'`{k.split(": ")[-1]}`'
    values = [k for k in rows if ': ' not in k]
    lines.append('| `%s` | ' % case + ' | '.join(map(str, [*worst(values), *worst([k for k in rows if ': ' in k])])) + ' |')
(out / 'noise.md').write_text('''What float32 does to LAVIS's own numbers: the same weights, inputs and draws computed by the same code in float32 and in
float64; the largest absolute difference of an array over its largest entry. All ids are equal. `*.key.bias` gradients,
zero in exact arithmetic, are left out. Intel, AVX-512, PyTorch 2.13, one thread.

''' + '\n'.join(lines) + '\n')
