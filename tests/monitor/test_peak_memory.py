import subprocess
import sys

from tptrain.monitor.peak_memory import peak_memory_bytes

CHILD = "from tptrain.monitor.peak_memory import peak_memory_bytes as p; a = p('cpu'); b = bytearray(b'x') * (80 << 20); print(a, p('cpu'))"


def test_the_peak_is_this_process_s_own_and_grows_with_what_it_holds():
    held = bytearray(b"x") * (200 << 20)
    before, after = map(int, subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout.split())
    assert peak_memory_bytes("cpu") > len(held)
    assert 1 << 20 < before < len(held), "a child shows its parent's peak"
    assert 75 << 20 < after - before < 100 << 20
