"""`python -m tests.faults.driver STAGE CONFIG.json`: a stage's command, with faults in its actors; to be cut off."""

import signal
import sys

from jobs import mask, score
from tests.faults.injection import faulty_actors

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    with faulty_actors():
        sys.exit({"score": score, "mask": mask}[sys.argv[1]].main(["--config", sys.argv[2]]))
