"""
A host that boots and is silent from then on: the interpreter in the arguments, whose output ends
with mitogen's last mark.
"""

import subprocess
import sys
import time

if __name__ == "__main__":
    with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE) as interpreter:
        assert interpreter.stdout is not None
        for line in interpreter.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
            if line.startswith(b"MITO002"):
                time.sleep(600)
