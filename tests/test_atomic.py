"""Folders to write in that nobody else clears, and that nobody leaves."""

import subprocess
import sys

from qformer_jax.atomic import all_or_nothing, scratch_folder, write_text


def test_what_a_killed_process_left_is_cleared_and_what_another_uses_is_kept(tmp_path):
    code = ('import pathlib, sys\nfrom qformer_jax.atomic import scratch_folder\n'
            'with scratch_folder(pathlib.Path(sys.argv[1])) as folder:\n'
            '    (folder / "half").write_text("x"); print(folder.name, flush=True); sys.stdin.read()\n')  # fmt: skip
    start = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, '-c', code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with start() as other, start() as killed:
        left = killed.stdout.readline().strip()
        used = other.stdout.readline().strip()
        killed.kill()
        killed.wait()
        assert (tmp_path / left / 'half').is_file()
        with scratch_folder(tmp_path) as mine:
            assert {path.name for path in tmp_path.iterdir()} == {used, mine.name}
        other.communicate('')
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_may_hold_another(tmp_path):
    """As where a file that appears whole is written into a folder that appears whole."""
    with all_or_nothing(tmp_path / 'out') as out:
        out.mkdir()
        with all_or_nothing(out.parent / 'note') as note:
            note.write_text('x')
        write_text(out / 'inside', 'y')
    assert {path.name for path in tmp_path.iterdir()} == {'out'} and (tmp_path / 'out' / 'inside').read_text() == 'y'
