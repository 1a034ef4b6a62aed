"""The log of a run: cut back on resume, mirrored to TensorBoard, drawn, and readable without a terminal."""

import json
import math
import struct

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from qformer_jax.errors import UserError
from qformer_jax.training import logs


def write(log, steps):
    for step in steps:
        log.write(step, 'train', {'loss': 10 / (1 + step), 'loss_itc': 0.5 * step}, {'seconds': 0.25})
        if step % 2 == 0:
            log.write(step, 'validation', {'loss': 11 / (1 + step)}, {})
    log.close()


def events(folder):
    """Return the set of (tag, step, value) in the event files (length, checksum, protobuf, checksum; repeated)."""
    found = []
    for path in folder.glob('tensorboard/*'):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack('<Q', data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    assert len(set(found)) == len(found)
    return set(found)


def logged(folder):
    """Return what `events` should be, from the log's own lines."""
    f32 = lambda x: struct.unpack('<f', struct.pack('<f', x))[0]  # noqa: E731
    found = set()
    for line in (folder / 'log.jsonl').read_text().splitlines():
        record = json.loads(line)
        step, kind, timing = record.pop('step'), record.pop('kind'), record.pop('timing')
        named = record | {f'timing/{name}': value for name, value in timing.items()}
        found |= {(f'{kind}/{name}', step, f32(value)) for name, value in named.items()}
    return found


def test_a_record_is_one_json_line_that_is_on_disk_at_once(tmp_path):
    log = logs.Log(tmp_path, -1)
    log.write(7, 'train', {'loss': 2.5}, {'seconds': 0.25})
    line = (tmp_path / 'log.jsonl').read_text()
    assert line == '{"step": 7, "kind": "train", "loss": 2.5, "timing": {"seconds": 0.25}}\n'
    log.close()


def test_resuming_equals_a_run_that_never_stopped(tmp_path):
    write(logs.Log(tmp_path / 'whole', -1), range(1, 9))
    write(logs.Log(tmp_path / 'parts', -1), range(1, 7))
    with (tmp_path / 'parts' / 'log.jsonl').open('a') as file:
        file.write('{"step": 7, "kind": "tra')  # torn by a kill
    write(logs.Log(tmp_path / 'parts', 4), range(5, 9))
    whole, parts = ((tmp_path / name / 'log.jsonl').read_bytes() for name in ('whole', 'parts'))
    assert parts == whole
    assert events(tmp_path / 'parts') == events(tmp_path / 'whole')


def test_tensorboard_events_equal_the_log_also_after_a_resume(tmp_path):
    write(logs.Log(tmp_path, -1), range(1, 7))
    assert events(tmp_path) == logged(tmp_path)
    (old,) = (tmp_path / 'tensorboard').iterdir()
    old.rename(old.with_name('events.out.tfevents.1.earlier'))  # a writer within the same second has the same name
    write(logs.Log(tmp_path, 3), range(4, 5))
    assert events(tmp_path) == logged(tmp_path)
    assert ('train/loss', 4, 2.0) in events(tmp_path)
    assert max(step for _, step, _ in events(tmp_path)) == 4


def test_a_bad_line_inside_is_named_and_a_fresh_run_keeps_nothing(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"step": 0, "kind": "train", "timing": {}}\nhalf\n{"step": 2}\n')
    with pytest.raises(UserError, match=r'log\.jsonl, line 2'):
        logs.Log(tmp_path, 2)
    (tmp_path / 'log.jsonl').write_text('{"step": 0, "kind": "train", "timing": {}}\n')
    logs.Log(tmp_path, -1).close()
    assert logs.records(tmp_path) == []


def test_what_is_not_finite_is_null_and_earlier_logs_are_read(tmp_path):
    """JSON knows no NaN: jq, pandas and browsers refuse it."""
    log = logs.Log(tmp_path, -1)
    log.write(1, 'train', {'loss': math.nan, 'accuracy': 0.5}, {'seconds': math.inf})
    log.close()
    line = '{"step": 1, "kind": "train", "loss": null, "accuracy": 0.5, "timing": {"seconds": null}}\n'
    assert (tmp_path / 'log.jsonl').read_text() == line
    earlier = '{"step": 1, "kind": "train", "loss": NaN, "accuracy": 0.5, "timing": {"seconds": -Infinity}}\n'
    (tmp_path / 'log.jsonl').write_text(earlier)
    assert logs.records(tmp_path) == [json.loads(line)]
    logs.Log(tmp_path, 1).close()
    assert (tmp_path / 'log.jsonl').read_text() == line, 'written anew when the run resumes'
    assert any(math.isnan(value) for name, _, value in events(tmp_path) if name == 'train/loss')


def test_the_curves_are_drawn_one_panel_a_loss(tmp_path):
    write(logs.Log(tmp_path, -1), range(1, 90))
    log = logs.Log(tmp_path, 90)
    log.write(90, 'train', {'loss': math.nan, 'loss_itc': 1.0, 'accuracy': 0.5}, {})
    log.close()
    with Image.open(logs.draw_curves(tmp_path)) as picture:
        assert picture.size == (1560, 540)  # two panels side by side
        assert len(picture.convert('RGB').getcolors(2**24)) > 50
    with pytest.raises(UserError, match='no losses to draw'):
        logs.draw_curves(tmp_path / 'elsewhere')


def test_the_drawn_mean_and_dots_are_those_of_the_log():
    log = [{'step': step, 'kind': 'train', 'loss': float(step)} for step in range(1, 91)]
    log.append({'step': 90, 'kind': 'validation', 'loss': 4.0})
    axes = logs.Figure().add_subplot()
    logs._draw_loss(axes, log, 'loss')
    thin, mean, dots = axes.get_lines()
    assert list(thin.get_ydata()) == list(range(1, 91))
    assert (mean.get_xdata()[0], mean.get_ydata()[0]) == (3, 2)  # the mean of records 1, 2, 3
    assert mean.get_ydata()[-1] == 89
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([90], [4])


def test_without_a_terminal_progress_is_a_plain_line_now_and_then_and_the_last(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 12.0, 14.0])
    monkeypatch.setattr(logs.time, 'monotonic', lambda: next(clock))
    with logs.Progress('stage1', 14, start=10) as progress:
        for step in (11, 12, 13, 14):
            progress.update(step, 3.25, 151.6, 0.034)
    assert capsys.readouterr().err.splitlines() == [
        'stage1 12/14  loss 3.2500  152 rows/s  data wait 3%  elapsed 0:00:11  left 0:00:11',
        'stage1 14/14  loss 3.2500  152 rows/s  data wait 3%  elapsed 0:00:14  left 0:00:00',
    ]


def test_in_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('COLUMNS', '140')
    with logs.Progress('stage1', 14) as progress:
        progress.update(7, 3.25, 151.6, 0.034)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ('stage1', '━', '7/14', 'loss 3.2500', '152 rows/s', 'data wait 3%'))
