"""Started by torchrun in test_parallel.py: does jobs one after the other.

A job is [stage, out, changes of the config, step to be stopped at].
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402

from common import log, parallel, resume  # noqa: E402
from common.errors import InputError  # noqa: E402
from test_checkpoint import run  # noqa: E402

torch.set_num_threads(1)
town, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
write = log.Log.step

with parallel.processes():
    flush = resume.write_and_flush
    resume.write_and_flush = lambda path, write: (
        time.sleep(0.1 * (path.name == "saving")) or flush(path, write))
    for stage, out, changes, stop in jobs:
        def write_and_stop(self, step, *args, stop=stop, **numbers):
            write(self, step, *args, **numbers)
            if step == stop and parallel.rank() == 1:            # one process alone is told
                os.kill(os.getpid(), signal.SIGTERM)

        log.Log.step = write_and_stop
        try:
            run(stage, town, Path(out), **changes)
        except InputError as error:
            (Path(out) / "error").write_text(str(error))
        except SystemExit:                  # when rank 0 has saved, slow as it is
            assert parallel.rank() == 1 and list(Path(out).glob("resume/step_*.pt"))

parallel.leave()
